"""A hard budget: what the server really served never exceeds it, whatever happens on the way."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distill.data.budget import UNIT
from distill.data.budget import usd as usd_of
from tests.integration.kd_runs import CONFIG, DONE, PAUSED, Runs
from tests.unit import faults
from tests.unit.fault_teacher import Chaos, FaultTeacher, Ledger

pytestmark = pytest.mark.slow


class Reference(NamedTuple):
    """A teacher, and what an undisturbed run with it gives and takes."""

    teacher: FaultTeacher
    files: dict[str, str]
    tokens: int
    cost: Decimal


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    price = CONFIG["prices"]
    with FaultTeacher(silence=8.0, prices=(str(price["input"]), str(price["output"]))) as teacher:
        runs = Runs(tmp_path_factory.mktemp("reference"), teacher)
        assert runs.run().code == DONE
        books = runs.ledger()
        assert books["settled"]["tokens"] == teacher.ledger.tokens
        assert Decimal(books["settled"]["cost_usd"]) == teacher.ledger.cost
        assert books["uncertain"]["tokens"] == 0
        yield Reference(teacher, runs.files(), teacher.ledger.tokens, teacher.ledger.cost)


def kept(books: dict[str, Any], ledger: Ledger, tokens: int | None = None, usd: Decimal | None = None) -> None:
    """served <= settled + uncertain <= budget."""
    counted, paid = books["counted"]["tokens"], Decimal(books["counted"]["cost_usd"])
    assert ledger.tokens <= counted and ledger.cost <= paid, (ledger.as_dict(), books)
    assert tokens is None or counted <= tokens, books
    assert usd is None or paid <= usd, books


@pytest.mark.parametrize("kind", ["tokens", "usd"])
def test_a_budget_pauses_the_run_and_a_higher_one_goes_on(reference: Reference, tmp_path: Path, kind: str) -> None:
    ledger = reference.teacher.begin(delay=0.01)
    runs = Runs(tmp_path, reference.teacher)
    for share in (0.5, 0.8, 1.0):
        tokens, usd = int(reference.tokens * share), (reference.cost * Decimal(share)).quantize(Decimal("1e-9"))
        flags = ("--budget-tokens", str(tokens)) if kind == "tokens" else ("--budget-usd", str(usd))
        end = runs.run(*flags)
        assert end.code == PAUSED and len(end.lines) == 1 and "budget" in end.lines[0], end
        books = runs.ledger()
        kept(books, ledger, *((tokens, None) if kind == "tokens" else (None, usd)))
        counted = books["counted"]
        spent = f"{counted['tokens']:,}" if kind == "tokens" else usd_of(int(Decimal(counted["cost_usd"]) / UNIT))
        assert f"{spent} of" in end.lines[0], "the pause says what the ledger says"
        assert ledger.tokens >= reference.tokens * share * 0.4, "it spends what it may"
    assert runs.run().code == DONE
    assert runs.files() == reference.files
    assert ledger.tokens == reference.tokens, "nothing was paid twice"


def test_a_budget_that_no_request_fits_spends_nothing(reference: Reference, tmp_path: Path) -> None:
    ledger = reference.teacher.begin()
    end = Runs(tmp_path, reference.teacher).run("--budget-tokens", "40")
    assert end.code == PAUSED and "budget" in end.err, end
    assert ledger.served == []


@pytest.mark.parametrize("seed", [1, 2])
def test_a_budget_holds_under_kills_and_faults(reference: Reference, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    ledger = reference.teacher.begin(chaos=Chaos(seed, 0.3), delay=0.1)
    runs = Runs(tmp_path, reference.teacher)
    tokens = 3 * reference.tokens
    for _ in range(8):
        run = runs.start("--budget-tokens", str(tokens))
        try:
            run.wait(draw.uniform(0.4, 1.5))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
        run.communicate()
        if runs.journal.exists():
            kept(runs.ledger(), ledger, tokens)
    reference.teacher.delay = 0.0
    runs.until_done()
    assert runs.files() == reference.files
    kept(runs.ledger(), ledger)


def test_answers_that_never_arrive_use_the_budget_up(reference: Reference, tmp_path: Path) -> None:
    """The server worked on them, so they may be on the bill."""
    kinds = ("reset-worked", "short-body", "reset-body", *faults.GARBAGE)
    ledger = reference.teacher.begin(chaos=Chaos(3, 0.9, kinds))
    runs = Runs(tmp_path, reference.teacher)
    tokens = reference.tokens // 3
    for _ in range(20):
        end = runs.run("--budget-tokens", str(tokens), attempts=1)
        assert end.code == PAUSED, end
        kept(runs.ledger(), ledger, tokens)
        if "budget" in end.err:
            break
    assert "budget" in end.err and ledger.tokens > 0


def test_a_server_that_counts_more_than_it_may_stops_the_run_at_once(reference: Reference, tmp_path: Path) -> None:
    ledger = reference.teacher.begin(faults=[None] * 20 + ["overcharge"] * 100)
    runs = Runs(tmp_path, reference.teacher)
    end = runs.run("--budget-tokens", str(reference.tokens * 50))
    assert end.code == PAUSED and len(end.lines) == 1, end
    assert "10,000,000" in end.lines[0] and ledger.given["overcharge"] <= 7


@pytest.mark.parametrize("seed", [1, 2])
def test_a_server_that_counts_more_than_it_may_is_known_to_the_next_start(
    reference: Reference, tmp_path: Path, seed: int
) -> None:
    ledger = reference.teacher.begin(chaos=Chaos(seed, 0.5, ("surcharge",)), delay=0.02)
    runs = Runs(tmp_path, reference.teacher)
    tokens = 100_000
    first = runs.run("--budget-tokens", str(tokens))
    assert first.code == PAUSED and "so much more is reserved" in first.lines[0], first
    for _ in range(10):
        end = runs.run("--budget-tokens", str(tokens))
        kept(runs.ledger(), ledger, tokens)
        if end.code == PAUSED and "budget is used up" in end.lines[0]:
            break
    assert "budget is used up" in end.lines[0] and ledger.tokens > tokens * 0.6


def test_without_usage_the_reservation_counts(reference: Reference, tmp_path: Path) -> None:
    ledger = reference.teacher.begin(faults=[None] * 10 + ["no-usage"] * 10)
    runs = Runs(tmp_path, reference.teacher)
    runs.until_done()
    kept(runs.ledger(), ledger)
    assert runs.ledger()["counted"]["tokens"] > ledger.tokens
