"""Runs of one evaluation set, item against item: what each run does better and worse than the first, the baseline.

    distill eval-compare teacher.jsonl student.jsonl --in data/contextual_final.jsonl --names teacher,student \\
      --report eval/reports/compare.json --html eval/reports/compare.html --margin call_f1=0.03

Only items that every run has a score for are compared, and both runs' metrics are resampled with the same items, so an
interval is of the difference. --margin: how much worse than the baseline a metric may be; it must be shown (the whole
interval keeps it), over as many samples as its gate wants. Exit code 0: compared, and every margin kept; 1: one is
broken; 3: one can be neither shown nor ruled out; 2: an error of input.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill import gates
from distill.artifacts import provenance, write_json, write_text
from distill.errors import InputError, stage_main
from distill.evaluate import results
from distill.evaluate.compare_page import page
from distill.evaluate.criteria import CRITERIA
from distill.evaluate.metrics import METRICS, Sampled, interval, resampled, sampled
from distill.evaluate.report import Played, play_back
from distill.evaluate.results import RunHeader
from distill.evaluate.scoring import Score
from distill.evaluate.sets import EvaluationSet, load
from distill.gates import Gate

SAMPLES = 1000
FEWEST = 10
"""Below so many samples a bootstrap's interval says nothing."""
_DIGITS = 9
"""Of a resampled value: what comes after depends on the order of summation."""


class Run(NamedTuple):
    """A run that is compared."""

    name: str
    path: Path
    header: RunHeader
    played: Played


def read_runs(paths: Sequence[Path], names: Sequence[str], found: EvaluationSet) -> list[Run]:
    """The runs, played anew; InputError where they are not of this set, or not to be compared with the first."""
    items = {item.id: item for item in found.items}
    runs: list[Run] = []
    for name, path in zip(names, paths, strict=True):
        header, transcripts = results.read(path, items)
        if header.files != found.sha256s:
            raise InputError(f"{path}: is of another set than {found.path}")
        for what in ("broker", "limits", "seed"):
            mine, first = getattr(header, what), getattr(runs[0].header if runs else header, what)
            if mine != first:
                raise InputError(f"{path}: {what} {mine} is not the {first} of {runs[0].path}: not to be compared")
        runs.append(Run(name, path, header, play_back(found, header, transcripts)))
    return runs


def compare(runs: Sequence[Run], seed: int = 0) -> dict[str, Any]:
    """The report, without gates and `made_by`; InputError where the runs have no item in common."""
    common = sorted(set.intersection(*(set(run.played.scores) for run in runs)))
    if not common:
        raise InputError("the runs have no item in common")
    scores = {run.name: [run.played.scores[name] for name in common] for run in runs}
    baseline, *others = runs
    return {
        "schema": "eval-compare/1",
        "baseline": baseline.name,
        "items": len(common),
        "runs": {
            run.name: {
                "file": run.path.name, "model": run.header.model,
                "left_out": len(run.played.episodes) - len(common),
                "failed": sum(bool(one.failures) for one in scores[run.name]),
            }
            for run in runs
        },
        "comparisons": {run.name: _against(scores[baseline.name], scores[run.name], seed) for run in others},
    }  # fmt: skip


def _against(a: Sequence[Score], b: Sequence[Score], seed: int) -> dict[str, Any]:
    """B against the baseline A: the same items in the same order."""
    kinds = sorted({one.kind for one in a})
    of_kind = {kind: [i for i, one in enumerate(a) if one.kind == kind] for kind in kinds}
    parts = {kind: ([a[i] for i in where], [b[i] for i in where]) for kind, where in of_kind.items()}
    return {
        "metrics": differences(a, b, seed),
        "success": success(a, b),
        "triggers": triggers(a, b, seed),
        "by_kind": {kind: {"success": success(*part), "metrics": _counted(differences(*part, seed))}
                    for kind, part in parts.items()},
        "changed": {
            "worse": [one.item for one, other in zip(a, b) if not one.failures and other.failures],
            "better": [one.item for one, other in zip(a, b) if one.failures and not other.failures],
        },
    }  # fmt: skip


def differences(a: Sequence[Score], b: Sequence[Score], seed: int, samples: int = SAMPLES) -> dict[str, dict[str, Any]]:
    """Of every metric: A's, B's, B - A with its paired 95% interval, and the verdict in words."""
    weights = resampled(len(a), samples, seed)
    of_a, of_b = sampled(a, weights), sampled(b, weights)
    return {name: _difference(name, of_a[name], of_b[name]) for name in METRICS}


def _difference(name: str, a: Sampled, b: Sampled) -> dict[str, Any]:
    out: dict[str, Any] = {"baseline": _value(a), "run": _value(b), "difference": None, "ci95": None,
                           "verdict": "not counted"}  # fmt: skip
    if not a.den or not b.den:
        return out
    both = (a.dens > 0) & (b.dens > 0)
    ends = interval(b.nums[both] / b.dens[both] - a.nums[both] / a.dens[both])
    out["difference"] = float(Fraction(b.num, b.den) - Fraction(a.num, a.den))
    if ends is None or min(a.n, b.n) < FEWEST:
        return out | {"verdict": "too few samples"}
    low, high = (-end for end in reversed(ends)) if lower_is_better(name) else ends
    verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
    return out | {"ci95": _rounded(ends), "verdict": verdict}


def _rounded(ends: tuple[float, float] | None) -> list[float] | None:
    return None if ends is None else [round(end, _DIGITS) for end in ends]


def lower_is_better(metric: str) -> bool:
    """Whether the metric counts what should not happen."""
    return metric in CRITERIA and CRITERIA[metric].at_most is not None


def _value(one: Sampled) -> dict[str, Any]:
    value = float(Fraction(one.num, one.den)) if one.den else None
    return {"num": one.num, "den": one.den, "value": value, "n": one.n}


def _counted(found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: one for name, one in found.items() if one["difference"] is not None}


def success(a: Sequence[Score], b: Sequence[Score]) -> dict[str, Any]:
    """Items without any failure, A against B, with McNemar's exact test."""
    right = [(not one.failures, not other.failures) for one, other in zip(a, b, strict=True)]
    wins, losses = right.count((False, True)), right.count((True, False))
    return {"n": len(right), "baseline": sum(one for one, _ in right), "run": sum(other for _, other in right),
            "wins": wins, "losses": losses, "ties": len(right) - wins - losses, "p": mcnemar(wins, losses)}  # fmt: skip


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p: how likely so uneven a split, or a more uneven one, is by fair coin."""
    n, fewer = wins + losses, min(wins, losses)
    ways = term = 1
    for i in range(fewer):
        term = term * (n - i) // (i + 1)
        ways += term
    return min(1.0, float(Fraction(2 * ways, 2**n)))


def triggers(a: Sequence[Score], b: Sequence[Score], seed: int, samples: int = SAMPLES) -> dict[str, Any]:
    """Whether a tool was called at all: F1 of B's items against A's, with its interval."""
    called = np.array([(bool(one.attempted), bool(other.attempted)) for one, other in zip(a, b, strict=True)], bool)
    rows = np.stack([2.0 * called.all(1), called.sum(1)], 1)
    num, den = map(int, rows.sum(0))
    drawn = resampled(len(rows), samples, seed) @ rows
    ends = interval(drawn[drawn[:, 1] > 0, 0] / drawn[drawn[:, 1] > 0, 1])
    both = int(called.all(1).sum())
    return {
        "f1": float(Fraction(num, den)) if den else None, "ci95": _rounded(ends),
        "both": both, "baseline_only": int(called[:, 0].sum()) - both, "run_only": int(called[:, 1].sum()) - both,
        "neither": int((~called.any(1)).sum()),
    }  # fmt: skip


def judge(result: Mapping[str, Any], margins: Mapping[str, float]) -> dict[str, Gate]:
    """For each run and margin: is the metric shown to be no worse than the baseline's by more than the margin."""
    return {
        f"{name}: {metric}": _gate(metric, found["metrics"][metric], margin)
        for name, found in result["comparisons"].items()
        for metric, margin in margins.items()
    }


def _gate(metric: str, found: Mapping[str, Any], margin: float) -> Gate:
    wrong_way = lower_is_better(metric)
    if found["ci95"] is None:
        threshold = margin if wrong_way else -margin
        return Gate("inconclusive", threshold=threshold, reason="one of the two has nothing to count")
    n = min(found["baseline"]["n"], found["run"]["n"])
    wanted = CRITERIA[metric].n_min if metric in CRITERIA else CRITERIA["call_f1"].n_min
    too_few = f"{n} samples, {wanted} needed" if n < wanted else None
    low, high = found["ci95"]
    return gates.within(found["difference"], (low, high), at_most=margin if wrong_way else None,
                        at_least=None if wrong_way else -margin, too_few=too_few)  # fmt: skip


def table(result: Mapping[str, Any]) -> str:
    """For the terminal."""
    lines: list[str] = []
    width, first = max(map(len, METRICS)), result["baseline"]
    for name, found in result["comparisons"].items():
        lines.append(f"{name} against {first}, over {result['items']} items")
        for metric, one in found["metrics"].items():
            shown = [f"{_short(one[which]['value'])} (n {one[which]['n']})" for which in ("baseline", "run")]
            ends = "{:+.4f} [{:+.4f}, {:+.4f}]".format(one["difference"], *one["ci95"]) if one["ci95"] else ""
            lines.append(f"  {metric:{width}}  {shown[0]:>16} {shown[1]:>16}  {ends:28}  {one['verdict']}")
        for kind, one in [("all items", found["success"]), *((k, v["success"]) for k, v in found["by_kind"].items())]:
            lines.append(f"  {kind:{width}}  {one['baseline']:>9} of {one['n']:<4}{one['run']:>9} of {one['n']:<4} "
                         f"without failure; {one['wins']} won, {one['losses']} lost, p {one['p']:.3g}")  # fmt: skip
        agreed = found["triggers"]
        lines.append(f"  calls a tool at all: F1 {_short(agreed['f1'])}; both {agreed['both']}, "
                     f"only {first} {agreed['baseline_only']}, only {name} {agreed['run_only']}, "
                     f"neither {agreed['neither']}")  # fmt: skip
    for name, run in result["runs"].items():
        if run["left_out"]:
            lines.append(f"{name}: {run['left_out']} of its items are left out: not every run has a score for them")
    return "\n".join(lines)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _names(given: str | None, paths: Sequence[Path]) -> list[str]:
    names = given.split(",") if given is not None else [path.stem for path in paths]
    if len(names) != len(paths) or len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise InputError(f"--names {','.join(names)}: {len(paths)} different names are needed, one for each file")
    return names


def _margins(given: Sequence[str]) -> dict[str, float]:
    out: dict[str, float] = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in METRICS:
            raise InputError(f"--margin {text}: no metric {name!r}; {', '.join(METRICS)}")
        try:
            out[name] = float(number)
        except ValueError:
            raise InputError(f"--margin {text}: such as {name}=0.03") from None
        if not (math.isfinite(out[name]) and 0 <= out[name] < 1):
            raise InputError(f"--margin {text}: from 0 to less than 1")
    return out


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Compare, write the report and the page, print the table."""
    parser = argparse.ArgumentParser(prog="distill eval-compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("results", type=Path, nargs="+", help="results of runs (--out of distill eval); the first is the baseline")
    add("--in", dest="data", type=Path, default=Path("data/contextual_final.jsonl"), help="the set that they are of")
    add("--fixtures", type=Path, help="recorded results in place of the set's own, if the runs had them")
    add("--report", type=Path, required=True, help="JSON report")
    add("--html", type=Path, help="page for people, with the episodes that changed")
    add("--names", help="of the runs, with commas; default: their files' names")
    add("--margin", action="append", default=[], metavar="METRIC=0.03", help="no worse than this; may be repeated")
    args = parser.parse_args(argv)
    if len(args.results) < 2:
        raise InputError("at least two results are needed, the baseline's first")
    names, margins = _names(args.names, args.results), _margins(args.margin)
    found = load(args.data, args.fixtures)
    runs = read_runs(args.results, names, found)
    result = compare(runs)
    verdicts = judge(result, margins)
    files = {"set": args.data, **{f"results of {name}": path for name, path in zip(names, args.results)}}
    made = provenance({"margins": margins, "samples": SAMPLES, "seed": 0}, files)
    result |= {"gates": gates.to_json(verdicts), "made_by": made}
    write_json(args.report, result)
    if args.html is not None:
        write_text(args.html, page(result, {run.name: run.played for run in runs}))
    print(table(result))
    if not verdicts:
        return 0
    print(gates.table(verdicts))
    print(gates.summary(verdicts))
    return gates.exit_code(verdicts)
