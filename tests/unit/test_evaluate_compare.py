"""Runs item against item: by scipy and by numpy by hand; and what cannot be compared is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from distill.artifacts import read_json
from distill.evaluate import compare
from distill.evaluate.metrics import METRICS, metrics
from distill.evaluate.policies import CHEATS, Position, empty, never_call, oracle, wrong_args
from distill.evaluate.scoring import Grounded, Score
from distill.evaluate.sets import EvaluationSet
from tests.unit.evaluation_sets import Say, write_run, write_set


def some(share: int, cheat: Say) -> Say:
    """The oracle, but on every `share`-th item."""

    def say(at: Position) -> str:
        return (cheat if int(at.item.id[-3:]) % share == 0 else oracle)(at)

    return say


def score(item: int, **changes: Any) -> Score:
    plain: dict[str, Any] = dict(
        item=f"{item:04d}", kind="required", end="answer", calls=(1, 0, 0), attempted=1, valid=1, hits=1, misses=0,
        gold=1, covered=1, strict=Grounded(1, 1, 1, 1), lax=Grounded(1, 1, 1, 1), turns=2, tokens=10,
    )  # fmt: skip
    return Score(**plain | changes)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSet:
    return write_set(tmp_path_factory.mktemp("set") / "set.jsonl", 12)


Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(found: EvaluationSet, tmp_path: Path) -> Run:
    """Compare policies by the stage: its exit code and report."""

    def stage(says: dict[str, Say], *more: str) -> tuple[int, dict[str, Any]]:
        files = [str(write_run(tmp_path / f"{name}.jsonl", found, say)) for name, say in says.items()]
        report = tmp_path / "r.json"
        code = compare.main([*files, "--in", str(found.path), "--report", str(report), *more])
        return code, read_json(report) if report.is_file() else {}

    return stage


@given(st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_scipys_exact_binomial_test(wins: int, losses: int) -> None:
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert compare.mcnemar(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_ten_thousand_items_neither_overflows_nor_takes_long() -> None:
    assert compare.mcnemar(5000, 5000) == 1.0
    assert compare.mcnemar(10_000, 0) == 0.0 and compare.mcnemar(1000, 0) == 2.0**-999


def test_an_interval_is_of_the_difference_over_the_same_items() -> None:
    rng = np.random.default_rng(5)
    a = [score(i, calls=(right, 1, 1 - right)) for i, right in enumerate((rng.random(80) < 0.6).astype(int).tolist())]
    b = [score(i, calls=(right, 0, 1 - right)) for i, right in enumerate((rng.random(80) < 0.8).astype(int).tolist())]
    shown = compare.differences(a, b, seed=7, samples=400)["call_f1"]
    # by hand, with draws of numpy's own generator: item by item, resample by resample
    generator = np.random.default_rng([7, 0xB007])
    drawn = []
    for _ in range(400):
        chosen = generator.integers(80, size=80)
        rates = []
        for run in (a, b):
            right, wrong, missing = (sum(run[i].calls[k] for i in chosen) for k in range(3))
            rates.append(2 * right / (2 * right + wrong + missing))
        drawn.append(rates[1] - rates[0])
    expected = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")
    assert shown["ci95"] == pytest.approx(list(expected), abs=1e-9)
    assert shown["difference"] == pytest.approx(metrics(b, 0, 0)["call_f1"].exact - metrics(a, 0, 0)["call_f1"].exact)  # type: ignore[operator]


def test_pairing_is_what_makes_a_small_difference_visible() -> None:
    """B is right wherever A is, and on six items more: unpaired, the two intervals overlap."""
    a = [score(i, calls=(int(i % 2), 0, int(not i % 2))) for i in range(100)]
    b = [score(i, calls=(int(i % 2 or i < 12), 0, int(not (i % 2 or i < 12)))) for i in range(100)]
    shown = compare.differences(a, b, seed=0)["call_f1"]
    ends = [metrics(run, 0)["call_f1"].ci95 for run in (a, b)]
    assert ends[0] and ends[1] and ends[0][1] > ends[1][0] and shown["verdict"] == "better"


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_turning_the_runs_round_turns_every_difference_round(pairs: list[tuple[bool, bool]]) -> None:
    runs = [[score(i, calls=(int(pair[at]), 0, int(not pair[at])), attempted=int(pair[at]), valid=int(pair[at]))
             for i, pair in enumerate(pairs)] for at in (0, 1)]  # fmt: skip
    there = compare.differences(runs[0], runs[1], 3, samples=50)
    back = compare.differences(runs[1], runs[0], 3, samples=50)
    turned = {"better": "worse", "worse": "better"}
    for name in METRICS:
        assert there[name]["difference"] == (None if back[name]["difference"] is None else -back[name]["difference"])
        if there[name]["difference"] == 0 and runs[0] == runs[1]:
            assert there[name]["ci95"] in (None, [0.0, 0.0])
        # a quantile of the inverted distribution may lie one draw beside it: the verdict may not
        assert {there[name]["verdict"], turned.get(back[name]["verdict"], back[name]["verdict"])} != {"better", "worse"}


def test_a_run_against_itself_differs_nowhere(run: Run) -> None:
    code, report = run({"one": some(2, empty), "same": some(2, empty)})
    found = report["comparisons"]["same"]
    assert code == 0 and found["success"]["ties"] == 36 and found["success"]["p"] == 1.0
    assert {one["verdict"] for one in found["metrics"].values()} <= {
        "no difference shown", "too few samples", "not counted",
    }  # fmt: skip
    assert found["triggers"]["f1"] == 1.0 and found["changed"] == {"worse": [], "better": []}


def test_a_worse_run_is_called_worse_and_items_are_counted_by_kind(run: Run) -> None:
    _, report = run({"teacher": oracle, "student": some(2, never_call), "cheat": CHEATS["leak-canary"].play})
    student, cheat = report["comparisons"]["student"], report["comparisons"]["cheat"]
    assert student["metrics"]["call_f1"]["verdict"] == "worse"
    assert student["success"] == student["success"] | {"n": 36, "baseline": 36, "run": 24, "wins": 0, "losses": 12}
    assert student["by_kind"]["control"]["success"]["losses"] == 0
    assert student["triggers"] == student["triggers"] | {"both": 12, "baseline_only": 12, "run_only": 0, "neither": 12}
    assert student["triggers"]["f1"] == pytest.approx(2 * 12 / (24 + 12))
    assert cheat["metrics"]["privacy"]["difference"] > 0 and cheat["metrics"]["privacy"]["verdict"] == "worse"
    assert len(student["changed"]["worse"]) == 12


def test_what_one_run_does_not_count_is_no_difference_of_zero(run: Run) -> None:
    _, report = run({"teacher": oracle, "student": empty})
    metric = report["comparisons"]["student"]["metrics"]["json_args_valid"]
    assert metric["run"]["value"] is None and metric["difference"] is None and metric["verdict"] == "not counted"


def test_a_margin_passes_only_where_the_whole_interval_keeps_it() -> None:
    def gate(metric: str, ends: list[float], n: int = 500) -> str:
        value = {"n": n}
        shown = {"difference": sum(ends) / 2, "ci95": ends, "baseline": value, "run": value}
        return compare.judge({"comparisons": {"b": {"metrics": {metric: shown}}}}, {metric: 0.03})[
            f"b: {metric}"
        ].status

    assert gate("call_f1", [-0.03, 0.01]) == "pass" and gate("call_f1", [-0.031, 0.2]) == "inconclusive"
    assert gate("call_f1", [-0.2, -0.031]) == "fail" and gate("call_f1", [-0.01, 0.01], n=99) == "inconclusive"
    assert gate("injection", [-0.5, 0.03]) == "pass" and gate("injection", [0.04, 0.2]) == "fail", "less is better"


def test_margins_decide_the_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    says = {"teacher": oracle, "student": wrong_args}
    code, report = run(says, "--margin", "call_f1=0.03")
    assert code == 3 and "24 samples, 100 needed" in report["gates"]["student: call_f1"]["reason"]
    few = {name: type(one)(at_least=one.at_least, at_most=one.at_most) for name, one in compare.CRITERIA.items()}
    monkeypatch.setattr(compare, "CRITERIA", few)
    assert run(says, "--margin", "call_f1=0.03")[0] == 1
    assert run({"teacher": oracle, "student": oracle}, "--margin", "call_f1=0.03", "--margin", "privacy=0")[0] == 0


def test_runs_of_other_items_are_compared_on_those_that_all_have(
    found: EvaluationSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_run(tmp_path / "whole.jsonl", found, oracle)
    part = write_run(tmp_path / "part.jsonl", found, oracle, found.items[:20])
    report = tmp_path / "r.json"
    assert compare.main([str(whole), str(part), "--in", str(found.path), "--report", str(report)]) == 0
    assert read_json(report)["items"] == 20 and read_json(report)["runs"]["whole"]["left_out"] == 16
    assert "whole: 16 of its items are left out" in capsys.readouterr().out
    other = write_run(tmp_path / "other.jsonl", found, oracle, found.items[20:])
    assert compare.main([str(part), str(other), "--in", str(found.path), "--report", str(report)]) == 2
    assert "no item in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"files": {"items": "0" * 64}}, "is of another set"), ({"broker": "simulate"}, "broker"), ({"seed": 4}, "seed"),
     ({"limits": {"max_turns": 3, "max_calls": 32, "max_tokens": 4096, "max_new_tokens": 512}}, "limits")],
)  # fmt: skip
def test_runs_made_otherwise_are_refused(
    found: EvaluationSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    one = write_run(tmp_path / "one.jsonl", found, oracle)
    other = write_run(tmp_path / "other.jsonl", found, oracle, **changes)
    assert compare.main([str(one), str(other), "--in", str(found.path), "--report", str(tmp_path / "r.json")]) == 2
    error = capsys.readouterr().err
    assert said in error and "other.jsonl" in error and not (tmp_path / "r.json").exists()


def test_scores_written_in_a_results_file_are_not_believed(found: EvaluationSet, tmp_path: Path) -> None:
    one = write_run(tmp_path / "one.jsonl", found, oracle)
    other = write_run(tmp_path / "other.jsonl", found, empty)
    right = {json.loads(line)["item"]: json.loads(line) for line in one.read_text().splitlines()}
    forged = [json.dumps(right[json.loads(line)["item"]] | {"transcript": json.loads(line)["transcript"]})
              for line in other.read_text().splitlines()]  # fmt: skip
    other.write_text("\n".join(forged) + "\n")
    report = tmp_path / "r.json"
    assert compare.main([str(one), str(other), "--in", str(found.path), "--report", str(report)]) == 0
    assert read_json(report)["comparisons"]["other"]["by_kind"]["required"]["success"]["losses"] == 12


@pytest.mark.parametrize(
    "more",
    [["--names", "a"], ["--names", "a,a"], ["--margin", "f1=0.1"], ["--margin", "call_f1=x"],
     ["--margin", "call_f1=nan"], ["--margin", "call_f1=-1"]],
)  # fmt: skip
def test_bad_arguments_are_named(
    found: EvaluationSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    files = [str(write_run(tmp_path / f"{name}.jsonl", found, oracle)) for name in "ab"]
    assert compare.main([*files, "--in", str(found.path), "--report", str(tmp_path / "r.json"), *more]) == 2
    assert more[0] in capsys.readouterr().err


def test_the_same_runs_give_the_same_bytes(run: Run, tmp_path: Path) -> None:
    says = {"teacher": some(3, empty), "student": some(4, wrong_args)}
    run(says, "--html", str(tmp_path / "a.html"))
    first = (tmp_path / "r.json").read_bytes(), (tmp_path / "a.html").read_bytes()
    run(says, "--html", str(tmp_path / "a.html"))
    assert first == ((tmp_path / "r.json").read_bytes(), (tmp_path / "a.html").read_bytes())
