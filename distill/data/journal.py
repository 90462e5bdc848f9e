"""The journal of a run: SQLite in WAL mode, the only truth while it runs; the dataset is built from it.

    attempt   every request that was sent, with what was reserved for it and what became of it: the ledger
    answer    what came back, whole, by the key of its request; written in the transaction that settles the attempt
    meta      what the answers depend on, and what the probe found
    run       one row for each time the command was started

What gathers while one transaction goes to disk is the next one (group commit), in the order in which it came; a request
waits for the commit of its reservation before it is sent, so whatever went before it is on disk too. Rows are entered
by the event loop's thread, and another one waits for the disk. An attempt that is `open` when the journal is opened was
in flight when its run died: what it reserved counts as spent for ever, since the server may have served it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import itertools
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from distill.artifacts import require_replaceable_file
from distill.data.schema import Usage
from distill.data.teacher.wire import LARGEST_BODY, Reply
from distill.errors import DatasetError, InputError, describe_os_error

JOURNAL = "journal.sqlite"
"""Name of the journal beside a dataset."""
RUN = "run_id/"
"""Begins the name of a value that says under which run_id a dataset was built."""
_APPLICATION = 0x6B642F31  # "kd/1"
_VERSION = 1
_TABLES = {
    "meta": "CREATE TABLE meta(name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    "run": "CREATE TABLE run(id INTEGER PRIMARY KEY, began REAL NOT NULL, code TEXT NOT NULL) STRICT",
    "attempt": "CREATE TABLE attempt(id INTEGER PRIMARY KEY, run INTEGER NOT NULL, key BLOB NOT NULL, "
    "purpose TEXT NOT NULL, began REAL NOT NULL, ended REAL, state TEXT NOT NULL, reserved_tokens INTEGER NOT NULL, "
    "reserved_cost INTEGER NOT NULL, status INTEGER, detail TEXT, prompt INTEGER, cached INTEGER, completion INTEGER, "
    "reasoning INTEGER, cost INTEGER) STRICT",
    "answer": "CREATE TABLE answer(key BLOB PRIMARY KEY, attempt INTEGER NOT NULL, dead TEXT, packed INTEGER NOT NULL, "
    "crc32 INTEGER NOT NULL, body BLOB NOT NULL) STRICT",
}
_PACK_ABOVE = 16 << 10  # bytes; log-probabilities make bodies large and compress 10 to 1

_RESERVE = (
    "INSERT INTO attempt(id, run, key, purpose, began, state, reserved_tokens, reserved_cost) "
    "VALUES(?,?,?,?,?,'open',?,?)"
)
_SETTLE = (
    "UPDATE attempt SET ended=?, state=?, status=?, detail=?, prompt=?, cached=?, completion=?, reasoning=?, cost=? "
    "WHERE id=?"
)
_ANSWER = "INSERT OR IGNORE INTO answer(key, attempt, dead, packed, crc32, body) VALUES(?,?,?,?,?,?)"
_NOTHING = ""
_META = "INSERT OR REPLACE INTO meta(name, value) VALUES(?,?)"

State = Literal["settled", "released", "uncertain"]
Reason = Literal["http", "malformed", "unanswered"]
_Operation = tuple[str, tuple[Any, ...], asyncio.Future[None] | None]


class Dead(NamedTuple):
    """Why there never will be an answer: the server refused (http), or it was given up."""

    reason: Reason
    detail: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Answer(NamedTuple):
    """What is known of a request: the body that came back, or why there never will be one."""

    body: bytes
    dead: Dead | None = None
    reply: Reply | None = None
    """The body, read, of one that has just come."""


class Settlement(NamedTuple):
    """How an attempt ended. `usage` and `cost` (in 1e-12 of the currency) are what the server counted, of a settled
    one; None where it did not say: then what was reserved counts. `detail`: what went wrong, or the answer's id."""

    state: State
    status: int
    detail: str = ""
    usage: Usage | None = None
    cost: int | None = None


class Totals(NamedTuple):
    """A sum over attempts: how many, tokens, and 1e-12 of the currency. Where no usage is known: what was reserved."""

    attempts: int = 0
    tokens: int = 0
    cost: int = 0

    def __add__(self, other: Totals) -> Totals:  # type: ignore[override]
        return Totals(*(a + b for a, b in zip(self, other)))


class Journal:
    """Opened for writing by one run at a time: InputError if another has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _lock(path)
        try:
            self._db = _open(path)
            self._reader = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
            with damage(path):
                self._db.execute("UPDATE attempt SET state='uncertain', detail='its run died' WHERE state='open'")
                (last,) = self._db.execute("SELECT coalesce(max(id), 0) FROM attempt").fetchone()
                self.run = self._begin()
                self._known = {key for (key,) in self._db.execute("SELECT key FROM answer")}
        except BaseException:
            os.close(self._lock)
            raise
        self._ids = itertools.count(last + 1)
        self._pending: list[_Operation] = []
        self._waiting: list[asyncio.Future[None]] = []  # for the transaction that is going to disk
        self._busy = False
        self._broken: str | None = None
        self._disk = concurrent.futures.ThreadPoolExecutor(1, "journal")

    def _begin(self) -> int:
        from distill.artifacts import code_version

        cursor = self._db.execute("INSERT INTO run(began, code) VALUES(?,?)", (time.time(), code_version()))
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    # reading

    @property
    def has_answers(self) -> bool:
        """Whether anything was ever answered."""
        return bool(self._known)

    def answer(self, key: bytes) -> Answer | None:
        """What is known of a request, if anything is: by the set of keys first, since most are asked for when new."""
        if key not in self._known:
            return None
        return read_answer(self._reader, self.path, key)

    def meta(self, name: str) -> str | None:
        """A value that was kept."""
        with damage(self.path):
            row = self._reader.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
        return row[0] if row else None

    def failures(self, key: bytes, beginning: str = "") -> list[int]:
        """Attempts at a request that the server took up and did not answer, not those that we broke off; of those
        whose detail begins so."""
        with damage(self.path):
            sql = ("SELECT id FROM attempt WHERE key=? AND status IS NOT NULL AND detail <> 'cancelled' "
                   "AND (state='uncertain' OR status=500) AND substr(detail, 1, ?)=? ORDER BY id")  # fmt: skip
            return [number for (number,) in self._reader.execute(sql, (key, len(beginning), beginning))]

    def answered_since(self, attempt: int) -> bool:
        """Whether an attempt that began after this one was answered."""
        with damage(self.path):
            sql = "SELECT EXISTS(SELECT 1 FROM answer WHERE attempt > ? AND dead IS NULL)"
            return bool(self._reader.execute(sql, (attempt,)).fetchone()[0])

    def answered_ids(self) -> set[str]:
        """The servers' own numbers of all answers so far, the probe's among them."""
        with damage(self.path):
            return {
                name for (name,) in self._reader.execute("SELECT detail FROM attempt WHERE state='settled'") if name
            }

    def recent(self, seconds: float) -> list[tuple[float, int]]:
        """Attempts that began in the last `seconds`: how long ago, oldest first, and their tokens."""
        now = time.time()
        sql = ("SELECT began, coalesce(prompt + completion, reserved_tokens) FROM attempt "
               "WHERE began > ? ORDER BY began")  # fmt: skip
        with damage(self.path):
            # what began later than now did so before the clock was set back
            return [(max(now - began, 0.0), tokens) for began, tokens in self._reader.execute(sql, (now - seconds,))]

    def totals(self) -> dict[str, Totals]:
        """Sums of the ledger by state."""
        with damage(self.path):
            return totals(self._reader)

    # writing

    def reserve(self, key: bytes, purpose: str, tokens: int, cost: int) -> tuple[int, asyncio.Future[None]]:
        """Enter an attempt that is about to be sent; its number, and what to await before sending it."""
        number = next(self._ids)
        row = (number, self.run, key, purpose, time.time(), tokens, cost)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._submit(_RESERVE, row, future)
        return number, future

    def settle(self, attempt: int, end: Settlement) -> None:
        """Enter how an attempt ended."""
        self._submit(_SETTLE, _settle_row(attempt, end))

    def settle_with(self, attempt: int, end: Settlement, key: bytes, answer: Answer) -> None:
        """Enter how an attempt ended together with its answer, in one transaction."""
        self._submit(_SETTLE, _settle_row(attempt, end))
        self._enter_answer(key, attempt, answer)

    def give_up(self, key: bytes, dead: Dead) -> Answer:
        """Enter that a request will never be answered."""
        answer = Answer(b"", dead)
        self._enter_answer(key, 0, answer)
        return answer

    def _enter_answer(self, key: bytes, attempt: int, answer: Answer) -> None:
        packed = len(answer.body) > _PACK_ABOVE
        body = zlib.compress(answer.body, 1) if packed else answer.body
        dead = None if answer.dead is None else str(answer.dead)
        self._known.add(key)
        self._submit(_ANSWER, (key, attempt, dead, int(packed), _crc32(key, dead, body), body))

    def keep(self, name: str, value: str) -> None:
        """Keep a value."""
        self._submit(_META, (name, value))

    async def flush(self) -> None:
        """Wait until everything so far is on disk. InputError if the disk refuses."""
        if self._busy:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._submit(_NOTHING, (), future)
            await future
        elif self._broken:
            raise InputError(self._broken)

    def _submit(self, sql: str, row: tuple[Any, ...], future: asyncio.Future[None] | None = None) -> None:
        if self._broken:
            raise InputError(self._broken)
        self._pending.append((sql, row, future))
        if not self._busy:
            self._busy = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self._flush, loop)  # after all who are ready now

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        """Enter what has gathered, and send it to disk."""
        batch, self._pending = self._pending, []
        self._waiting = [future for _, _, future in batch if future]
        try:
            self._enter(batch)
        except Exception as error:  # whatever it is, those who wait must hear of it
            self._finish(loop, error)
            return
        done = self._disk.submit(self._db.execute, "COMMIT")
        done.add_done_callback(lambda task: _in_loop(loop, self._finish, loop, task.exception()))

    def _enter(self, batch: list[_Operation]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        for sql, rows in itertools.groupby(batch, key=lambda item: item[0]):
            if sql != _NOTHING:
                self._db.executemany(sql, [row for _, row, _ in rows])

    def _finish(self, loop: asyncio.AbstractEventLoop, error: BaseException | None) -> None:
        """Wake who waited for a transaction, and begin the next one."""
        waiting, self._waiting = self._waiting, []
        if error is not None:
            self._broken = f"cannot write journal {self.path}: {_reason(error)}"
            waiting += [future for _, _, future in self._pending if future]
            self._pending = []
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
        for future in waiting:
            if not future.done() and self._broken:
                future.set_exception(InputError(self._broken))
            elif not future.done():
                future.set_result(None)
        self._busy = bool(self._pending)
        if self._busy:
            self._flush(loop)

    def close(self) -> None:
        """Write what waits, and let the next run in."""
        self._disk.shutdown()
        with contextlib.suppress(sqlite3.Error, OverflowError):
            if self._pending and not self._broken:
                if not self._db.in_transaction:
                    self._enter(self._pending)
                self._db.execute("COMMIT")
        self._reader.close()
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        os.close(self._lock)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_ledger(path: Path) -> sqlite3.Connection:
    """The journal at `path`, opened to be read only. InputError if it is none."""
    require_replaceable_file(path)
    if not path.is_file():
        raise InputError(f"{path}: no such journal")
    # a journal at rest is read without a trace; one that is written to has its latest rows in the log beside it
    log = path.with_name(f"{path.name}-wal")
    rest = "" if log.is_file() and log.stat().st_size else "&immutable=1"
    with damage(path):
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro{rest}", uri=True)
        _check(db, path)
    return db


def read_answer(db: sqlite3.Connection, path: Path, key: bytes) -> Answer | None:
    """What the journal `db`, of the file `path`, holds of a request. DatasetError if that is damaged."""
    with damage(path):
        row = db.execute("SELECT dead, packed, crc32, body FROM answer WHERE key=?", (key,)).fetchone()
    if row is None:
        return None
    dead, packed, crc32, body = row
    if not (isinstance(body, bytes) and isinstance(dead, str | None)) or crc32 != _crc32(key, dead, body):
        raise DatasetError(f"{path}: damaged: an answer is not the one that was kept")
    return Answer(_unpack(body, path) if packed else body, _dead(dead))


def totals(db: sqlite3.Connection, where: str = "1") -> dict[str, Totals]:
    """Sums of the ledger by state. What a settled attempt's server did not count is what was reserved.

    sqlite3.Error if the file is damaged; see `damage`.
    """
    known = "state='settled' AND completion IS NOT NULL"
    rows = db.execute(
        f"SELECT state, count(*), sum(CASE WHEN {known} THEN prompt + completion ELSE reserved_tokens END), "
        f"sum(CASE WHEN {known} THEN cost ELSE reserved_cost END) FROM attempt WHERE {where} GROUP BY state"
    )
    return {state: Totals(n, tokens, cost) for state, n, tokens, cost in rows}


def _settle_row(attempt: int, end: Settlement) -> tuple[Any, ...]:
    usage = end.usage
    counted = (usage.prompt, usage.cached, usage.completion, usage.reasoning) if usage else (None,) * 4
    return (time.time(), end.state, end.status, end.detail, *counted, end.cost, attempt)


def _dead(text: str | None) -> Dead | None:
    if text is None:
        return None
    reason, _, detail = text.partition(": ")
    return Dead(reason, detail) if reason in get_args(Reason) else Dead("http", text)  # type: ignore[arg-type]


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: Any) -> None:
    """Call in a loop's thread; a loop that is gone has nobody who waits."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *args)


def _reason(error: BaseException) -> str:
    if "full" in str(error):
        return "no space left on device"
    return f"{error} (is the disk full?)" if "I/O" in str(error) else str(error)


def _crc32(key: bytes, dead: str | None, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(key + (dead or "").encode()))


def _unpack(body: bytes, path: Path) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(body, LARGEST_BODY)
    except zlib.error as error:
        raise DatasetError(f"{path}: damaged: {error}") from error
    if not unpacker.eof:
        raise DatasetError(f"{path}: damaged: an answer is cut off or longer than {LARGEST_BODY >> 20} MiB")
    return plain


def _lock(path: Path) -> int:
    """Hold the folder for this run: the lock goes with the process, however it ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"cannot write {path.parent}: {describe_os_error(error)}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise InputError(f"{path.parent}: another run is writing this dataset") from error
    return descriptor


def _open(path: Path) -> sqlite3.Connection:
    """Open or make the journal. Tables are made before WAL begins: a file without them was never used."""
    require_replaceable_file(path)
    with damage(path):
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            (empty,) = db.execute("SELECT count(*) = 0 FROM sqlite_master").fetchone()
            if empty:
                db.execute("BEGIN IMMEDIATE")
                db.execute(f"PRAGMA application_id = {_APPLICATION}")
                db.execute(f"PRAGMA user_version = {_VERSION}")
                for sql in _TABLES.values():
                    db.execute(sql)
                db.execute("COMMIT")
            _check(db, path)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
        except BaseException:
            db.close()
            raise
    return db


def _check(db: sqlite3.Connection, path: Path) -> None:
    """That the file is a journal of this version, without a table, view or trigger that is not ours."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION:
        raise InputError(f"{path}: a SQLite file, but not a journal of this project")
    if version != _VERSION:
        raise InputError(f"{path}: a journal of version {version}; this is version {_VERSION}")
    found = db.execute("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'").fetchall()
    if dict(found) != _TABLES:
        raise InputError(f"{path}: damaged: its tables are not those of a journal")


@contextlib.contextmanager
def damage(path: Path) -> Iterator[None]:
    """SQLite's complaints as one line that names the file."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter from a text of damaged bytes
        raise InputError(f"cannot use journal {path}: {_reason(error)}") from error
