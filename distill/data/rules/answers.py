"""The journal beside a dataset, read only and not trusted: its answers, and what was paid for each."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from distill.artifacts import canonical_json, sha256_text
from distill.data.journal import RUN, Answer, damage, read_answer, read_ledger
from distill.data.rules.header import capabilities_of, identity_of, protocol_of
from distill.data.rules.whole import Whole
from distill.data.schema import Header, Usage
from distill.data.teacher.probe import Capabilities
from distill.data.teacher.wire import LARGEST_BODY
from distill.errors import InputError

_STEPS = 100_000  # of SQLite's machine between two looks at how many there were
_MOST_STEPS = 2_000  # times that: a damaged tree may have no end


class Paid(NamedTuple):
    """The attempt that brought an answer. `cost` in 1e-12 of the currency; None where the server did not say."""

    state: str
    usage: Usage | None
    cost: int | None


class Answers:
    """A journal that is opened to be read."""

    def __init__(self, path: Path) -> None:
        """InputError if it is none."""
        self.path, self._steps = path, 0
        self._db = read_ledger(path)
        self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST_BODY + (1 << 20))
        self._db.set_progress_handler(self._tick, _STEPS)
        with damage(path):
            self._db.execute("PRAGMA trusted_schema = OFF")
            self._db.execute("PRAGMA cell_size_check = ON")

    def close(self) -> None:
        """Let it go."""
        self._db.close()

    def answer(self, key: bytes) -> Answer | None:
        """What was answered to a request. DatasetError if that is damaged."""
        with self._bounded():
            return read_answer(self._db, self.path, key)

    def paid(self, key: bytes) -> Paid | None:
        """What was paid for the answer to a request; None where no attempt brought it."""
        sql = ("SELECT t.state, t.prompt, t.completion, t.reasoning, t.cached, t.cost FROM answer a "
               "JOIN attempt t ON t.id = a.attempt WHERE a.key = ? AND t.key = a.key")  # fmt: skip
        with self._bounded():
            row = self._db.execute(sql, (key,)).fetchone()
        if row is None:
            return None
        state, *counted, cost = row
        known = all(isinstance(n, int) for n in counted)
        return Paid(str(state), Usage(*counted) if known else None, cost if isinstance(cost, int) else None)

    def meta(self, name: str) -> str | None:
        """A value that was kept."""
        with self._bounded():
            row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else None

    def codes(self) -> set[str]:
        """The versions of the code that ran."""
        with self._bounded():
            return {str(code) for (code,) in self._db.execute("SELECT DISTINCT code FROM run LIMIT 10000")}

    @contextlib.contextmanager
    def _bounded(self) -> Iterator[None]:
        self._steps = 0
        with damage(self.path):
            try:
                yield
            except (TypeError, OverflowError) as error:
                raise InputError(f"{self.path}: damaged: {error}") from error

    def _tick(self) -> bool:
        self._steps += 1
        return self._steps > _MOST_STEPS


def journal_problems(header: Header, answers: Answers) -> Iterator[str]:
    """What the journal keeps of the whole run is what the header says."""
    from distill.data.asking import depends_on  # the clients of teachers, which take long to load

    protocol = protocol_of(header)
    if protocol is None:
        return
    try:
        kept, server = answers.meta("depends_on"), answers.meta("server")
        name = "capabilities/" + sha256_text(canonical_json(msgspec.to_builtins(identity_of(header))))[:16]
        found, codes = answers.meta(name), answers.codes()
        known = answers.meta(f"{RUN}{header.run_id}") is not None
    except InputError as error:
        yield str(error)
        return
    if kept is None or kept != canonical_json(depends_on(protocol)):
        yield "teacher, sampling or seed are not those that the journal was begun with"
    if not known:
        yield "run_id is that of no run of the journal: another configuration"
    if found is None or _read(found) != capabilities_of(header):
        yield "capabilities are not those that the probe found"
    if header.created_by.get("code") not in codes:
        yield "created_by names code that the journal was never run by"
    if (server or None) != header.teacher.server:
        yield "teacher's server is not what the journal says"


def _read(text: str) -> Capabilities | None:
    try:
        return msgspec.json.decode(text, type=Capabilities)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def heard_problems(header: Header, whole: Whole) -> Iterator[str]:
    """Who the answers say that they are from is who the header says."""
    for name in ("models", "system_fingerprints"):
        if list(getattr(header.teacher, f"{name}_seen")) != sorted(getattr(whole, name)):
            yield f"teacher's {name}_seen are not those of the journal's answers"
