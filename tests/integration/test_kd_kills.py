"""SIGKILL, Ctrl-C, SIGTERM and a second run: nothing received is lost, nothing is asked twice, the bytes are the same.

`KD_KILLS=200 KD_SEED=7 pytest tests/integration/test_kd_kills.py -k any_instant` for a long schedule.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.integration.kd_runs import BAD, DONE, PAUSED, TERMINATED, Runs, ended, wait_until
from tests.unit.fault_teacher import Chaos, FaultTeacher

KILLS = int(os.environ.get("KD_KILLS", "10"))
PROBES = 5
SEED = int(os.environ.get("KD_SEED", "1"))

pytestmark = pytest.mark.slow


class Reference(NamedTuple):
    """A teacher, and what an undisturbed run with it gives."""

    teacher: FaultTeacher
    files: dict[str, str]
    asked: int


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    with FaultTeacher(silence=8.0) as teacher:
        runs = Runs(tmp_path_factory.mktemp("reference"), teacher)
        assert runs.run().code == DONE
        yield Reference(teacher, runs.files(), sum(teacher.ledger.whole.values()))


class Killed(NamedTuple):
    """What a schedule of kills found."""

    kills: int
    in_flight: int
    """Attempts that were open when their run was killed, summed."""


def killed_at_random(runs: Runs, kills: int, draw: random.Random, *flags: str) -> Killed:
    """Start and kill so many times; after each the journal is whole and no answer in it is gone or changed."""
    known: dict[bytes, str] = {}
    in_flight = 0
    for _ in range(kills):
        served = runs.teacher.ledger.served
        # a quarter of the kills at any moment from the start of the process on, the others from a request on
        wanted = 0 if draw.random() < 0.25 else len(served) + draw.randrange(1, 8)
        run = runs.start(*flags)
        wait_until(lambda run=run, wanted=wanted, served=served: run.poll() is not None or len(served) >= wanted)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(draw.uniform(0, 0.25 if wanted else 1.5))
        run.send_signal(signal.SIGKILL)
        run.communicate()
        now = runs.answers()
        assert known.items() <= now.items(), "an answer that was on disk is gone or changed"
        known = now
        in_flight += runs.open_attempts()
    return Killed(kills, in_flight)


@pytest.mark.parametrize("chaos", [None, Chaos(5, 0.1)], ids=["sound", "faulty"])
def test_killed_at_any_instant_nothing_is_lost_or_doubled(
    reference: Reference, tmp_path: Path, chaos: Chaos | None
) -> None:
    teacher = reference.teacher
    ledger = teacher.begin(delay=0.15, chaos=chaos)
    runs = Runs(tmp_path, teacher)
    kills = KILLS if chaos is None else max(KILLS // 2, 4)
    seen = killed_at_random(runs, kills, random.Random(SEED))
    teacher.delay = 0.0
    runs.until_done()
    assert runs.files() == reference.files
    assert runs.one("SELECT count(*) FROM attempt a JOIN answer b USING (key) WHERE a.id > b.attempt") == 0
    if chaos is None:
        assert sum(ledger.whole.values()) <= reference.asked + seen.in_flight
    assert ledger.tokens <= runs.ledger()["counted"]["tokens"]
    print(f"{seen.kills} kills, {seen.in_flight} requests in flight, {sum(ledger.whole.values())} answers served for "
          f"{reference.asked}")  # fmt: skip


def test_killed_while_the_dataset_is_written_it_appears_whole_or_not_at_all(
    reference: Reference, tmp_path: Path
) -> None:
    runs = Runs(tmp_path, reference.teacher)
    reference.teacher.begin()
    run = runs.start()
    ended(run)
    draw = random.Random(SEED)
    for _ in range(max(KILLS // 3, 3)):
        runs.out.unlink(missing_ok=True)
        run = runs.start()
        folder = Path(f"{runs.out}.d")
        # the writer's temporary files show that it has begun
        before = set(folder.iterdir()) | set(tmp_path.iterdir())
        wait_until(lambda run=run, before=before, folder=folder: run.poll() is not None or
                   (set(folder.iterdir()) | set(tmp_path.iterdir())) - before)  # fmt: skip
        time.sleep(draw.uniform(0, 0.02))
        run.send_signal(signal.SIGKILL)
        run.communicate()
        if runs.out.exists():
            assert runs.files()["kd.jsonl"] == reference.files["kd.jsonl"]
    assert runs.run().code == DONE
    assert runs.files() == reference.files, "temporary files of killed runs are gone, too"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, PAUSED), (signal.SIGTERM, TERMINATED)], ids=["ctrl-c", "term"]
)
def test_stopped_while_the_dataset_is_written_it_leaves_nothing_half_written(
    reference: Reference, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    ledger = reference.teacher.begin()
    runs = Runs(tmp_path, reference.teacher)
    assert runs.run().code == DONE
    whole, asked = runs.files(), len(ledger.arrivals)
    draw, codes = random.Random(SEED), set()
    for _ in range(4):
        run = runs.start()
        assert run.stderr is not None
        while "writing the dataset" not in run.stderr.readline():
            assert run.poll() is None
        time.sleep(draw.uniform(0, 0.02))
        run.send_signal(number)
        codes.add(ended(run).code)
        assert runs.files() == whole == reference.files
    late = {DONE, -number, 130} if number == signal.SIGINT else {DONE, -number}  # after it, the interpreter's own way
    assert code in codes <= {code} | late
    assert runs.run().code == DONE and runs.files() == whole
    assert len(ledger.arrivals) == asked


def test_ctrl_c_finishes_what_is_in_flight_and_sends_nothing_more(reference: Reference, tmp_path: Path) -> None:
    ledger = reference.teacher.begin(delay=0.4)
    runs = Runs(tmp_path, reference.teacher)
    run = runs.start()
    wait_until(lambda: len(ledger.served) > 12)
    arrived = len(ledger.arrivals)
    run.send_signal(signal.SIGINT)
    end = ended(run, within=5)
    assert end.code == PAUSED and len(end.lines) == 1, end
    assert len(ledger.arrivals) <= arrived + 1  # one may have been on its way
    assert sum(ledger.whole.values()) == len(ledger.served), "everything in flight was waited for"
    assert sum(ledger.whole.values()) == runs.one("SELECT count(*) FROM attempt WHERE state = 'settled'")
    reference.teacher.delay = 0.0
    assert runs.run().code == DONE
    assert runs.files() == reference.files
    assert sum(ledger.whole.values()) == reference.asked, "nothing was asked twice"


@pytest.mark.parametrize(
    ("signals", "code", "within"),
    [((signal.SIGINT, signal.SIGINT), PAUSED, 2), ((signal.SIGTERM,), TERMINATED, 12)],
    ids=["ctrl-c twice", "term"],
)
def test_who_is_in_a_hurry_gets_out_and_loses_nothing_that_came(
    reference: Reference, tmp_path: Path, signals: tuple[signal.Signals, ...], code: int, within: float
) -> None:
    ledger = reference.teacher.begin()
    runs = Runs(tmp_path, reference.teacher)
    run = runs.start(timeout_s=30)
    wait_until(lambda: len(ledger.served) > 12)
    reference.teacher.delay = 40.0
    wait_until(lambda: ledger.in_flight >= 2)
    for number in signals:
        time.sleep(0.2)
        run.send_signal(number)
    assert ended(run, within).code == code
    assert len(runs.answers()) >= sum(ledger.whole.values()) - PROBES
    reference.teacher.delay = 0.0
    assert runs.run().code == DONE
    assert runs.files() == reference.files
    assert sum(ledger.whole.values()) == reference.asked
    assert ledger.tokens <= runs.ledger()["counted"]["tokens"]


def test_a_second_run_on_the_same_output_refuses_and_the_first_is_not_harmed(
    reference: Reference, tmp_path: Path
) -> None:
    ledger = reference.teacher.begin(delay=0.7)
    runs = Runs(tmp_path, reference.teacher)
    first = runs.start()
    wait_until(lambda: len(ledger.served) > 8)
    for _ in range(2):
        second = runs.run(within=5)
        assert second.code == BAD and len(second.err.strip().splitlines()) == 1, second
        assert "another run" in second.err
    assert runs.ledger()["settled"]["attempts"] > 0, "the ledger can be read meanwhile"
    assert first.poll() is None
    reference.teacher.delay = 0.0
    assert ended(first).code == DONE
    assert runs.files() == reference.files
    assert sum(ledger.whole.values()) == reference.asked


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_the_teacher_is_probed_pauses_at_once(reference: Reference, tmp_path: Path, times: int) -> None:
    ledger = reference.teacher.begin(delay=3.0)
    runs = Runs(tmp_path, reference.teacher)
    run = runs.start()
    wait_until(lambda: len(ledger.arrivals) == 1)
    for _ in range(times):
        run.send_signal(signal.SIGINT)
        time.sleep(0.05)
    end = ended(run, within=2.5)
    # the second one may come when all is said, and end the interpreter on its way out
    assert end.code in (PAUSED, -signal.SIGINT)[:times] and end.lines and "Traceback" not in end.err, end
    reference.teacher.delay = 0.0
    assert runs.run().code == DONE and runs.files() == reference.files
