"""Verdicts: only a pass counts as passed, NaN never passes, and everything survives JSON."""

from __future__ import annotations

import json
import math

import pytest

from distill import gates
from distill.gates import Gate

PASS, FAIL = gates.holds(True), gates.holds(False)
SKIP, UNSURE, ERROR = gates.skipped("no Mac"), Gate("inconclusive"), Gate("error", reason="it broke")


@pytest.mark.parametrize(("value", "status"), [
    (0.5, "pass"), (1.0, "pass"), (1.0001, "fail"), (math.nan, "fail"), (-math.inf, "fail"), (math.inf, "fail"),
])  # fmt: skip
def test_at_most_passes_finite_values_up_to_the_threshold(value: float, status: str) -> None:
    assert gates.at_most(value, 1.0).status == status


@pytest.mark.parametrize(("value", "n", "status"), [
    (0.9, 10, "pass"), (0.89, 10, "fail"), (1.0, 9, "inconclusive"), (0.0, 9, "inconclusive"), (math.nan, 10, "fail"),
    (math.inf, 10, "fail"),
])  # fmt: skip
def test_at_least_needs_enough_samples_before_it_judges(value: float, n: int, status: str) -> None:
    assert gates.at_least(value, 0.9, n=n, n_min=10).status == status


@pytest.mark.parametrize(("found", "code", "strict"), [
    ([PASS], 0, 0), ([PASS, SKIP], 0, 3), ([SKIP], 3, 3), ([], 3, 3), ([PASS, UNSURE], 3, 3), ([PASS, FAIL], 1, 1),
    ([PASS, ERROR], 1, 1), ([SKIP, UNSURE, FAIL], 1, 1),
])  # fmt: skip
def test_the_exit_code_is_that_of_the_worst_verdict(found: list[Gate], code: int, strict: int) -> None:
    named = {str(i): gate for i, gate in enumerate(found)}
    assert (gates.exit_code(named), gates.exit_code(named, strict=True)) == (code, strict)


def test_the_closing_line_counts_each_verdict_and_names_what_was_skipped() -> None:
    line = gates.summary({"a": PASS, "b": PASS, "c": FAIL, "d": SKIP, "e": UNSURE})
    assert line == "2 pass, 1 fail, 1 inconclusive, 1 skipped (d: no Mac)"
    assert gates.summary({}) == "no checks"


def test_the_closing_line_gives_a_reason_once() -> None:
    both = {"a": SKIP, "b": gates.skipped("no GPU"), "c": SKIP}
    assert gates.summary(both) == "3 skipped (a, c: no Mac; b: no GPU)"
    assert gates.summary({"a": SKIP, "c": SKIP}) == "2 skipped (no Mac)"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_json_does_not_know_become_text(value: float) -> None:
    made = {
        "a": gates.at_most(value, 1.0),
        "b": gates.at_least(value, 1.0, n=1),
        "c": gates.holds(False, observed=value),
    }
    text = json.dumps(gates.to_json(made), allow_nan=False)
    assert {gate["observed"] for gate in json.loads(text).values()} == {str(value)}


def test_a_gate_returns_from_json_as_it_was() -> None:
    gate = gates.at_most(0.5, 1.0, backend="distill.mil", reason="why")
    assert Gate(**gates.to_json({"g": gate})["g"]) == gate
    assert set(gates.to_json({"g": gate})["g"]) == {"status", "observed", "threshold", "backend", "reason"}


def test_the_table_has_a_line_for_each_gate() -> None:
    lines = gates.table({"short": PASS, "longer": gates.at_most(2.0, 1.0, reason="too far")}).splitlines()
    assert lines == ["PASS         short ", "FAIL         longer  observed 2  threshold 1  (too far)"]
