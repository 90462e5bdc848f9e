"""Run a package once: each output's shape and range, saved as arrays where asked."""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distill import mil
from distill.errors import InputError
from distill.mil import Program
from distill.mil_tools import feeds
from distill.mil_tools.outputs import scores
from distill.mil_tools.tables import plain, printable, table

_COLUMNS = ("shape", "dtype", "min", "max", "mean", "nan", "inf")
_TOP = 5
"""Labels of a classifier that are shown."""


def summary(value: Any, dtype: str) -> dict[str, Any]:
    """Shape, and for numbers the range, the mean of the finite elements, and how many are NaN or infinite; of a
    classifier the label, and the most probable labels.
    """
    array = scores(value)
    out: dict[str, Any] = {"shape": list(array.shape), "dtype": dtype}
    if isinstance(value, int | str):
        return out | {"label": value}
    if isinstance(value, dict):
        top = sorted(value.items(), key=lambda item: -item[1])[:_TOP]
        out["top"] = [{"label": label, "probability": p} for label, p in top]
    if array.dtype.kind not in "biuf":
        return out
    finite = array[np.isfinite(array)].astype(np.float64)
    low, high, mean = (float(finite.min()), float(finite.max()), float(finite.mean())) if finite.size else (np.nan,) * 3
    return out | {
        "min": low, "max": high, "mean": mean, "nan": int(np.isnan(array).sum()), "inf": int(np.isinf(array).sum()),
    }  # fmt: skip


def trace(
    program: Program, feed: dict[str, Any], pattern: str, args: argparse.Namespace, state: Any
) -> Iterator[dict[str, Any]]:
    """Each value whose name or operator holds the pattern."""
    within = f"*{pattern}*"
    for number, step in enumerate(program.trace(feed, args.function, state, args.policy)):
        types = {out.name: out for out in step.op.outputs}
        for name, array in step.outputs.items():
            if fnmatch.fnmatchcase(name, within) or fnmatch.fnmatchcase(step.op.type, within):
                about = {"step": number, "operator": step.op.type, "value": name}
                yield about | summary(array, types[name].dtype)


def print_trace(rows: Iterable[dict[str, Any]], pattern: str) -> None:
    """A table; what was computed before an error is printed too."""
    seen: list[dict[str, Any]] = []
    try:
        for row in rows:
            seen.append(row)
    finally:
        if seen:
            cells = [(row["step"], row["operator"], row["value"], *_cells(row)) for row in seen]
            print("trace", table(("step", "operator", "value", *_COLUMNS), cells), sep="\n")
    if not seen:
        print(printable(f"trace: no operator and no value has {pattern!r} in its name"))


def _cells(found: dict[str, Any]) -> list[Any]:
    return [found.get(name, "") for name in _COLUMNS]


def print_labels(found: dict[str, dict[str, Any]]) -> None:
    """A classifier's answer."""
    for name, cells in found.items():
        if "label" in cells:
            print(printable(f"  {name}: {cells['label']}"))
        if "top" in cells:
            top = ", ".join(f"{t['label']} {t['probability']:.4g}" for t in cells["top"])
            print(printable(f"  {name}: {top}" + (", ..." if cells["shape"][0] > _TOP else "")))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distill mil run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", type=Path, help="X.mlpackage")
    feeds.add_flags(parser, policy="ieee16", seed=None)
    parser.add_argument("--state-out", type=Path, metavar="FILE.npz", help="save the states afterwards")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.npz",
        help="save the outputs, fp16 as float32; a classifier's labels as NAME.labels",
    )
    parser.add_argument(
        "--trace",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="also print every intermediate value, or those that have this in their name or their operator's; * and ? "
        "stand for anything (e.g. softmax, 'layer?.attn', 'pool*')",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def run(args: argparse.Namespace) -> int:
    """Predict, print, save."""
    program = mil.load(args.package)
    function = program.function(args.function)
    feed = feeds.collect(args, function)
    state = feeds.make_state(program, function, args.state_in)
    if args.state_out is not None and state is None:
        raise InputError(f"--state-out {args.state_out}: function {function.name} keeps no state")
    traced: list[dict[str, Any]] = []
    if args.trace is not None:
        rows = trace(program, feed, args.trace, args, state.copy() if state else None)
        if args.json:
            traced = list(rows)
        else:
            print_trace(rows, args.trace)
    outputs = program.predict(feed, args.function, state, args.policy)
    found = {f.name: summary(outputs[f.name], f.type.dtype) for f in function.outputs}
    findings = program.findings if args.policy == "strict" else []
    if args.json:
        everything = {"outputs": found, "findings": [_finding(f) for f in findings]}
        print(json.dumps(plain(everything | ({} if args.trace is None else {"trace": traced})), indent=2))
    else:
        print(table(("output", *_COLUMNS), [(name, *_cells(cells)) for name, cells in found.items()]))
        print_labels(found)
        if args.policy == "strict":
            print_findings(findings)
    if args.out is not None:
        labels = {f"{name}.labels": np.array(list(v)) for name, v in outputs.items() if isinstance(v, dict)}
        feeds.save_arrays(args.out, labels | {name: scores(value) for name, value in outputs.items()})
    if args.state_out is not None and state is not None:
        feeds.save_arrays(args.state_out, {name: state.read(name) for name in state.names})
    return 0


def print_findings(findings: list[Any]) -> None:
    """What `strict` recorded, in the order of execution."""
    if not findings:
        print("strict: nothing overflows, is subnormal, or is NaN")
        return
    print(f"strict: {len(findings)} findings")
    rows = [(f.kind, f.op_type, f.name, f"{f.count} of {f.size}", f.worst) for f in findings]
    print(table(("kind", "operator", "value", "elements", "largest"), rows))


def _finding(finding: Any) -> dict[str, Any]:
    return {name: getattr(finding, name) for name in ("kind", "op_type", "name", "count", "size", "worst")}
