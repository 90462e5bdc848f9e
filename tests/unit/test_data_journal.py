"""The journal: on disk before anybody acts, one writer, everything in flight at a death counted as spent."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.journal import Answer, Dead, Journal, Settlement, Totals, read_ledger, totals
from distill.data.schema import Usage
from distill.errors import InputError

KEY = bytes(range(32))


def _path(tmp_path: Path) -> Path:
    return tmp_path / "kd.jsonl.d" / "journal.sqlite"


async def _answered(
    journal: Journal, key: bytes, body: bytes, usage: Usage | None = None, cost: int | None = 7
) -> None:
    number, written = journal.reserve(key, "answer", 100, 1000)
    await written
    journal.settle_with(number, Settlement("settled", 200, "", usage, cost), key, Answer(body))
    await journal.flush()


@pytest.mark.parametrize("body", [b"", b"short", b"x" * 100_000, os.urandom(50_000)])
def test_an_answer_comes_back_as_it_was_kept(tmp_path: Path, body: bytes) -> None:
    with Journal(_path(tmp_path)) as journal:
        asyncio.run(_answered(journal, KEY, body))
        assert journal.answer(KEY) == Answer(body) and journal.answer(KEY[::-1]) is None
    with Journal(_path(tmp_path)) as journal:
        assert journal.answer(KEY) == Answer(body)


@pytest.mark.parametrize("dead", [Dead("http", "HTTP 400: a: b"), Dead("malformed", ""), Dead("unanswered", "x")])
def test_why_there_is_no_answer_comes_back_by_type(tmp_path: Path, dead: Dead) -> None:
    async def work(journal: Journal) -> None:
        journal.give_up(KEY, dead)
        await journal.flush()

    with Journal(_path(tmp_path)) as journal:
        asyncio.run(work(journal))
    with Journal(_path(tmp_path)) as journal:
        assert journal.answer(KEY) == Answer(b"", dead)


def test_failures_are_counted_by_how_they_begin_and_what_was_answered_meanwhile(tmp_path: Path) -> None:
    async def work(journal: Journal) -> None:
        for status, state, detail in ((200, "uncertain", "bad json"), (500, "released", "no"), (0, "released", "no"),
                                      (200, "uncertain", "cancelled"), (200, "uncertain", "bad type")):  # fmt: skip
            number, written = journal.reserve(KEY, "answer", 1, 1)
            await written
            journal.settle(number, Settlement(state, status, detail))  # type: ignore[arg-type]
        await journal.flush()
        assert (journal.failures(KEY), journal.failures(KEY, "bad"), journal.failures(b"")) == ([1, 2, 5], [1, 5], [])
        assert not journal.answered_since(1)
        await _answered(journal, b"a" * 32, b"yes")
        assert journal.answered_since(5) and not journal.answered_since(6)

    with Journal(_path(tmp_path)) as journal:
        asyncio.run(work(journal))


def test_the_ledger_sums_what_was_counted_and_else_what_was_reserved(tmp_path: Path) -> None:
    async def work(journal: Journal) -> None:
        await _answered(journal, b"a" * 32, b"1", Usage(10, 20), 30)
        await _answered(journal, b"b" * 32, b"2", None, None)
        for state in ("released", "uncertain"):
            number, written = journal.reserve(b"c" * 32, "answer", 5, 50)
            await written
            journal.settle(number, Settlement(state, 503))  # type: ignore[arg-type]
        _, written = journal.reserve(b"d" * 32, "answer", 3, 33)
        await written

    with Journal(_path(tmp_path)) as journal:
        asyncio.run(work(journal))
        found = journal.totals()
        assert found["settled"] == Totals(2, 30 + 100, 30 + 1000)
        assert found["uncertain"] == Totals(1, 5, 50) and found["open"] == Totals(1, 3, 33)
    with Journal(_path(tmp_path)) as journal:
        assert journal.totals()["uncertain"] == Totals(2, 8, 83) and "open" not in journal.totals()


def test_what_is_awaited_is_on_disk_for_another_process(tmp_path: Path) -> None:
    async def work(journal: Journal) -> None:
        number, written = journal.reserve(KEY, "answer", 5, 50)
        await written
        other = sqlite3.connect(_path(tmp_path))
        assert other.execute("SELECT id, state FROM attempt").fetchall() == [(number, "open")]
        other.close()

    with Journal(_path(tmp_path)) as journal:
        asyncio.run(work(journal))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.binary(max_size=40)), max_size=60), st.integers(1, 16))
def test_at_any_concurrency_the_first_answer_to_a_request_stays(tmp_path_factory, answers, workers) -> None:
    path = _path(tmp_path_factory.mktemp("journal"))
    first: dict[int, bytes] = {}

    async def one(journal: Journal, number: int, body: bytes) -> None:
        attempt, written = journal.reserve(bytes([number]) * 32, "answer", 1, 1)
        await written
        first.setdefault(number, body)
        journal.settle_with(attempt, Settlement("settled", 200, "", Usage(1, 1), 1), bytes([number]) * 32, Answer(body))

    async def work(journal: Journal) -> None:
        limit = asyncio.Semaphore(workers)

        async def bounded(item: tuple[int, bytes]) -> None:
            async with limit:
                await one(journal, *item)

        await asyncio.gather(*map(bounded, answers))

    with Journal(path) as journal:
        asyncio.run(work(journal))
    with Journal(path) as journal:
        assert {number: journal.answer(bytes([number]) * 32) for number in first} == {
            number: Answer(body) for number, body in first.items()
        }
        assert journal.totals().get("settled", Totals()).attempts == len(answers)


def test_only_one_run_has_a_journal_and_a_dead_one_does_not_keep_it(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from distill.data.journal import Journal
journal = Journal(Path({str(_path(tmp_path))!r}))
print("ready", flush=True)
time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"ready\n"
    with pytest.raises(InputError, match="another run is writing this dataset"):
        Journal(_path(tmp_path))
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    Journal(_path(tmp_path)).close()


def test_the_ledger_can_be_read_while_a_run_has_the_journal(tmp_path: Path) -> None:
    with Journal(_path(tmp_path)) as journal:
        asyncio.run(_answered(journal, KEY, b"x", Usage(1, 2), 3))
        db = read_ledger(_path(tmp_path))
        assert totals(db) == {"settled": Totals(1, 3, 3)}
        db.close()


def test_a_killed_writer_loses_nothing_that_it_was_told_is_on_disk(tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
from distill.data.journal import Answer, Journal, Settlement
async def main():
    journal = Journal(Path({str(_path(tmp_path))!r}))
    async def one(n):
        key = n.to_bytes(32, "big")
        number, written = journal.reserve(key, "answer", 1, 1)
        await written
        journal.settle_with(number, Settlement("settled", 200), key, Answer(b"%d" % n))
        await journal.flush()
        print(n, flush=True)
    for start in range(0, 100_000, 8):
        await asyncio.gather(*(one(start + i) for i in range(8)))
asyncio.run(main())
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    said = [0, *(int(line) for line in child.communicate()[0].splitlines() if line.endswith("\n") or line.isdigit())]
    assert len(said) > 8
    with Journal(_path(tmp_path)) as journal:
        for number in said:
            assert journal.answer(number.to_bytes(32, "big")) == Answer(b"%d" % number)
        check = journal._reader.execute("PRAGMA integrity_check").fetchone()
        assert check == ("ok",)


def _foreign(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine(a)")


def _newer(path: Path) -> None:
    Journal(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 9")


def _trigger(path: Path) -> None:
    Journal(path).close()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TRIGGER t AFTER INSERT ON answer BEGIN DELETE FROM attempt; END")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"x" * 8192), "not a database"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(4080)), "journal"),
        (_foreign, "not a journal of this project"),
        (_newer, "version 9"),
        (_trigger, "its tables are not those of a journal"),
        (lambda path: path.symlink_to("/etc/hostname"), "something other than a regular file"),
        (lambda path: os.mkfifo(path), "something other than a regular file"),
        (lambda path: path.mkdir(), "something other than a regular file"),
    ],
)
def test_what_is_no_journal_is_refused_by_name_and_left_alone(tmp_path: Path, spoil, message: str) -> None:
    path = _path(tmp_path)
    path.parent.mkdir()
    spoil(path)
    before = path.read_bytes() if path.is_file() and not path.is_symlink() else None
    with pytest.raises(InputError, match=message) as raised:
        Journal(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert before is None or path.read_bytes() == before


def test_a_full_disk_is_one_clear_error_and_what_was_kept_stays(tmp_path: Path) -> None:
    import resource

    async def work(journal: Journal) -> None:
        await _answered(journal, b"a" * 32, b"kept")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(InputError, match=r"cannot write journal .*journal\.sqlite"):
                for number in range(200):
                    await _answered(journal, bytes([number]) * 32, os.urandom(10_000))
            with pytest.raises(InputError, match="cannot write journal"):
                journal.keep("a", "b")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)

    with Journal(_path(tmp_path)) as journal:
        asyncio.run(work(journal))
    with Journal(_path(tmp_path)) as journal:
        assert journal.answer(b"a" * 32) == Answer(b"kept")
        asyncio.run(_answered(journal, b"z" * 32, b"goes on"))
