"""The journal when the disk is full, the configuration is another one, or the file is damaged or not ours."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.integration.kd_runs import BAD, DONE, Runs
from tests.unit.fault_teacher import FaultTeacher

pytestmark = pytest.mark.slow


class Reference(NamedTuple):
    """A teacher, and what an undisturbed run with it gives."""

    teacher: FaultTeacher
    folder: Path
    files: dict[str, str]
    asked: int

    def finished(self, folder: Path) -> Runs:
        """A copy of the finished run."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Runs(folder, self.teacher)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    with FaultTeacher() as teacher:
        runs = Runs(tmp_path_factory.mktemp("reference"), teacher)
        assert runs.run().code == DONE
        yield Reference(teacher, runs.folder, runs.files(), sum(teacher.ledger.whole.values()))


@pytest.mark.parametrize("size", [0, 10_000, 50_000, 120_000])
def test_a_full_disk_is_one_line_and_with_room_the_run_goes_on(reference: Reference, tmp_path: Path, size: int) -> None:
    ledger = reference.teacher.begin()
    runs = Runs(tmp_path, reference.teacher)
    end = runs.run(largest_file=size)
    assert end.code == BAD and len(end.lines) == 1 and "kd.jsonl" in end.lines[0], end
    assert not runs.out.exists()
    before = runs.answers()
    assert runs.run().code == DONE
    assert runs.files() == reference.files
    assert before.items() <= runs.answers().items()
    assert sum(ledger.whole.values()) <= reference.asked + runs.one("SELECT count(*) FROM attempt WHERE "
                                                                    "state = 'uncertain'")  # fmt: skip


@pytest.mark.parametrize("size", [50_000, 60_000])
def test_a_full_disk_while_the_dataset_is_built_is_one_line_and_nothing_is_asked_again(
    reference: Reference, tmp_path: Path, size: int
) -> None:
    ledger = reference.teacher.begin()
    runs = reference.finished(tmp_path)
    end = runs.run(largest_file=size)
    assert end.code == BAD and len(end.lines) == 1 and "kd.jsonl" in end.lines[0], end
    assert runs.files() == reference.files, "what was there stays, nothing half-written is left"
    runs.out.unlink()
    assert runs.run(largest_file=size).code == BAD and not runs.out.exists()
    assert runs.run().code == DONE
    assert runs.files() == reference.files and not ledger.arrivals


def test_another_model_is_refused_before_anything_is_paid(reference: Reference, tmp_path: Path) -> None:
    ledger = reference.teacher.begin()
    runs = reference.finished(tmp_path)
    end = runs.run("--model", "other")
    assert end.code == BAD and "teacher.model was stub-1, is other" in end.lines[0] and "--fork" in end.err, end
    assert "the endpoint does not list --model other; it lists stub-1" in end.err
    assert not ledger.arrivals and runs.files() == reference.files


def test_another_configuration_is_refused_by_name_unless_forked(reference: Reference, tmp_path: Path) -> None:
    ledger = reference.teacher.begin()
    runs = reference.finished(tmp_path)
    before, asked = runs.files(), len(ledger.arrivals)
    end = runs.run(temperature=0.25)
    assert end.code == BAD and len(end.lines) == 1 and "temperature" in end.lines[0] and "--fork" in end.err, end
    assert runs.files() == before and len(ledger.arrivals) == asked, "nothing was sent or changed"
    assert runs.run("--fork", temperature=0.25).code == DONE
    assert b'"temperature": 0.25' in Path(f"{runs.out}.d/header.json").read_bytes()
    assert runs.run("--fork").code == DONE, "the first configuration's answers are still there"
    assert runs.files() == before


def test_what_changes_no_answer_may_change(reference: Reference, tmp_path: Path) -> None:
    ledger = reference.teacher.begin()
    runs = reference.finished(tmp_path)
    assert runs.run(concurrency=2, timeout_s=9.0, attempts=3, stream=True, rpm=1000).code == DONE
    assert runs.files() == reference.files and not ledger.arrivals


def test_a_larger_total_keeps_the_answers(reference: Reference, tmp_path: Path) -> None:
    ledger = reference.teacher.begin()
    runs = Runs(tmp_path, reference.teacher, total=15)
    assert runs.run().code == DONE
    runs.total = 40
    assert runs.run().code == DONE
    assert runs.files() == reference.files
    assert sum(ledger.whole.values()) == reference.asked
    runs.total = 15
    assert runs.run().code == DONE
    assert len(runs.out.read_bytes().splitlines()) == 15
    assert sum(ledger.whole.values()) == reference.asked


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 + 100])


def _scramble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100:4000] = os.urandom(3900)
    path.write_bytes(data)


def _noise(path: Path) -> None:
    path.write_bytes(os.urandom(8192))


def _text(path: Path) -> None:
    path.write_text("not a database, and a long text all the same\n" * 100)


def _older(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 0")
    db.close()


def _newer(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 77")
    db.close()


def _foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE answer(key, attempt, dead, packed, body)")
    db.close()


def _trigger(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TRIGGER evil AFTER INSERT ON answer BEGIN DELETE FROM answer; END")
    db.close()


def _symlink(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _unwritable(path: Path) -> None:
    """For root, nothing is unwritable but what is not there."""
    path.unlink()
    path.symlink_to("/proc/version")


HARM = (_cut, _scramble, _noise, _text, _older, _newer, _foreign, _trigger, _symlink, _fifo, _folder, _unwritable)


@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__.strip("_"))
def test_a_damaged_or_foreign_journal_is_named_and_never_overwritten(
    reference: Reference, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    ledger = reference.teacher.begin()
    runs = reference.finished(tmp_path)
    for beside in ("-wal", "-shm"):
        Path(f"{runs.journal}{beside}").unlink(missing_ok=True)
    harm(runs.journal)
    asked = len(ledger.arrivals)
    before = runs.journal.read_bytes() if runs.journal.is_file() else None
    dataset = runs.files()
    end = runs.run(within=5)
    assert end.code == BAD and len(end.err.strip().splitlines()) == 1 and "journal.sqlite" in end.err, end
    assert len(ledger.arrivals) == asked, "nothing was sent"
    assert before is None or runs.journal.read_bytes() == before
    assert runs.files() == dataset
