"""Whatever the teacher's server does on the way, the dataset ends with the bytes of an undisturbed run.

Every fault is in tests/unit/faults.py. A run may pause (exit 75) and be started again; it may not lose, double, mix up
or reject what a sound server would have answered.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.integration.kd_runs import BAD, DONE, Runs, ended, valid, wait_until
from tests.unit import faults
from tests.unit.fault_teacher import Chaos, FaultTeacher

FAMILIES = {
    "storms": faults.STORMS,
    "statuses": faults.STATUSES,
    "cuts": faults.CUTS,
    "garbage": faults.GARBAGE,
    "silences": faults.SILENCES,
    "sound": faults.SOUND,
}

pytestmark = pytest.mark.slow


class Reference(NamedTuple):
    """A teacher, and what an undisturbed run with it gives."""

    teacher: FaultTeacher
    files: dict[str, str]
    asked: int


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    with FaultTeacher(silence=8.0, refuse_every=29) as teacher:
        runs = Runs(tmp_path_factory.mktemp("reference"), teacher)
        assert runs.run().code == DONE
        assert valid(runs.out)
        ledger = teacher.ledger
        yield Reference(teacher, runs.files(), sum(ledger.whole.values()))


@pytest.mark.parametrize("changes", [{"concurrency": 1}, {"concurrency": 64}, {"stream": True}], ids=str)
def test_neither_concurrency_nor_streaming_shows_in_the_bytes(
    reference: Reference, tmp_path: Path, changes: dict[str, object]
) -> None:
    ledger = reference.teacher.begin(delay=0.01)
    runs = Runs(tmp_path, reference.teacher)
    assert runs.run(**changes).code == DONE
    assert runs.files() == reference.files
    assert ledger.most_in_flight <= changes.get("concurrency", 7)
    assert sum(ledger.whole.values()) == reference.asked


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fault_leaves_no_trace_in_the_bytes(reference: Reference, tmp_path: Path, family: str, stream: bool) -> None:
    kinds = FAMILIES[family]
    ledger = reference.teacher.begin(faults=[item for kind in kinds for item in (kind, None)], delay=0.005)
    runs = Runs(tmp_path, reference.teacher)
    runs.until_done(stream=stream)
    assert set(ledger.given) == set(kinds), "every fault of the family was given"
    assert runs.files() == reference.files
    assert valid(runs.out)
    assert ledger.tokens <= runs.ledger()["counted"]["tokens"]
    assert not ledger.early, "the server's wish to be left alone was kept"


@pytest.mark.parametrize("seed", [1, 2])
def test_any_mixture_of_faults_leaves_no_trace_in_the_bytes(reference: Reference, tmp_path: Path, seed: int) -> None:
    ledger = reference.teacher.begin(chaos=Chaos(seed, 0.25), delay=0.005)
    runs = Runs(tmp_path, reference.teacher)
    runs.until_done(stream=bool(seed % 2))
    assert runs.files() == reference.files
    assert sum(ledger.given.values()) > 15
    assert ledger.tokens <= runs.ledger()["counted"]["tokens"]


def test_trouble_while_a_run_starts_leaves_no_trace_in_the_bytes(reference: Reference, tmp_path: Path) -> None:
    """Neither in what the probe found nor in what the server is called."""
    teacher = reference.teacher
    lookups: list[list[faults.Item]] = [[], [503], ["reset"], [None, 500, 429], [None, None, "reset", 502]]
    kinds = (None, "bad-json", "no-usage", "reset-worked", "500")
    outcomes = []
    for number, (kind, trouble) in enumerate(zip(kinds, lookups)):
        ledger = teacher.begin(faults=[None] * (number % 2) + [kind])
        teacher.lookups = list(trouble)
        runs = Runs(tmp_path / str(number), teacher, total=6)
        runs.until_done()
        outcomes.append({name.rpartition("/")[2]: digest for name, digest in runs.files().items()})
        assert outcomes[number] == outcomes[0], (kind, trouble)
        assert ledger.given.total() == (kind is not None) and not teacher.lookups
    header = json.loads(Path(f"{runs.out}.d/header.json").read_bytes())
    assert header["teacher"]["server"] == "vLLM 1.2.3" and header["capabilities"]["usage"]


def test_a_server_that_restarts_is_waited_for(reference: Reference, tmp_path: Path) -> None:
    reference.teacher.begin(delay=0.1)
    runs = Runs(tmp_path, reference.teacher)
    run = runs.start()
    wait_until(lambda: len(reference.teacher.ledger.served) > 15)
    reference.teacher.down(0.5)
    if (end := ended(run)).code != DONE:
        assert end.code == 75, end
        runs.until_done()
    assert runs.files() == reference.files


@pytest.mark.parametrize(("fault", "code"), [("401", BAD), ("quota", 75), ((403, {}), BAD)], ids=str)
def test_a_wall_stops_the_run_at_once_and_the_next_goes_on(
    reference: Reference, tmp_path: Path, fault: faults.Item, code: int
) -> None:
    ledger = reference.teacher.begin(faults=[None] * 20 + [fault] * 40)
    runs = Runs(tmp_path, reference.teacher)
    end = runs.run()
    assert end.code == code and len(end.lines) == 1, end
    assert ledger.given.total() <= 7, "nobody runs against a wall but those already under way"
    assert sum(ledger.whole.values()) == len(runs.answers()) + runs.one("SELECT count(*) FROM attempt WHERE "
                                                                        "purpose = 'probe'")  # fmt: skip
    reference.teacher.faults = []
    assert runs.run().code == DONE
    assert runs.files() == reference.files
    assert sum(ledger.whole.values()) == reference.asked


def test_a_redirect_is_not_followed(reference: Reference, tmp_path: Path) -> None:
    ledger = reference.teacher.begin(faults=[None] * 20 + ["redirect"] * 400)
    end = Runs(tmp_path, reference.teacher).run()
    assert end.code in (BAD, 75) and len(end.lines) == 1, end
    assert ledger.elsewhere == 0


def test_another_models_answer_shows_in_the_header(reference: Reference, tmp_path: Path) -> None:
    reference.teacher.begin(faults=[None] * 20 + ["wrong-model"] * 3)
    runs = Runs(tmp_path, reference.teacher)
    runs.until_done()
    header = json.loads(Path(f"{runs.out}.d/header.json").read_bytes())
    assert header["teacher"]["models_seen"] == ["another-model", "stub-1"]


@pytest.mark.parametrize(("limit", "starts"), [({"rpm": 12}, 1), ({"tpm": 4000}, 1), ({"rpm": 12}, 2)], ids=str)
def test_limits_a_minute_hold_as_the_server_counts_them(
    reference: Reference, tmp_path: Path, limit: dict[str, int], starts: int
) -> None:
    """Starting again does not begin a new minute."""
    ledger = reference.teacher.begin()
    runs = Runs(tmp_path, reference.teacher)
    for _ in range(starts):
        run = runs.start(**limit)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(3)
        run.kill()
        run.communicate()
    assert 5 <= ledger.most_within(60)[0] <= limit.get("rpm", 10**9)
    assert ledger.tokens <= limit.get("tpm", 10**9)


def test_a_prompt_that_nobody_answered_for_now_keeps_its_place(reference: Reference, tmp_path: Path) -> None:
    """With one attempt at a time every fault puts a prompt off; no other may take its place in the quota. A third
    fault of the same prompt would be one too many: it is given up."""
    pattern: list[faults.Item] = [None, None, None, None, "500-soon"]
    ledger = reference.teacher.begin(faults=pattern * 100, delay=0.005, most_each=2)
    runs = Runs(tmp_path, reference.teacher)
    runs.until_done(attempts=1)
    assert ledger.given.total() > 8
    assert runs.files() == reference.files


def test_a_prompt_that_is_never_answered_is_given_up_alike_at_any_concurrency(tmp_path: Path) -> None:
    outcomes = []
    with FaultTeacher(refuse_every=17, refusal="reset-body") as teacher:
        for concurrency in (1, 7):
            runs = Runs(tmp_path / str(concurrency), teacher)
            runs.until_done(attempts=1, concurrency=concurrency)
            outcomes.append({name.rpartition("/")[2]: digest for name, digest in runs.files().items()})
            assert b"unanswered" in Path(f"{runs.out}.d/rejects.jsonl").read_bytes()
    assert outcomes[0] == outcomes[1]


def test_a_prompt_whose_answers_can_never_be_read_costs_a_few_and_is_rejected_by_type(tmp_path: Path) -> None:
    outcomes = []
    with FaultTeacher(refuse_every=29, refusal="bad-json") as teacher:
        for concurrency in (1, 7):
            ledger = teacher.begin()
            runs = Runs(tmp_path / str(concurrency), teacher)
            runs.until_done(concurrency=concurrency, attempts=2)
            outcomes.append({name.rpartition("/")[2]: digest for name, digest in runs.files().items()})
            assert b'"malformed"' in Path(f"{runs.out}.d/rejects.jsonl").read_bytes()
            asked = Counter(served.key for served in ledger.served)
            assert max(asked.values()) <= 12
            assert valid(runs.out)
    assert outcomes[0] == outcomes[1]


def test_a_teacher_of_which_nothing_can_be_read_any_more_is_not_paid_for_long(
    reference: Reference, tmp_path: Path
) -> None:
    ledger = reference.teacher.begin(faults=[None] * 20 + ["bad-json"] * 500)
    runs = Runs(tmp_path, reference.teacher)
    end = runs.run(attempts=2)
    assert end.code == 75 and "stopped answering" in end.lines[0], end
    assert ledger.given["bad-json"] <= 30
    reference.teacher.faults = []
    runs.until_done()
    assert runs.files() == reference.files
