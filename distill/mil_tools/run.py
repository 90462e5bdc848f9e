"""Run a package once: each output's shape and range, saved as arrays where asked."""

from __future__ import annotations

import argparse
import fnmatch
import json
from pathlib import Path
from typing import Any

import numpy as np

from distill import mil
from distill.mil import Program
from distill.mil_tools import feeds
from distill.mil_tools.compare import as_array
from distill.mil_tools.tables import plain, table

_COLUMNS = ("shape", "dtype", "min", "max", "mean", "nan", "inf")


def summary(value: Any, dtype: str) -> dict[str, Any]:
    """Shape, and for numbers the range, the mean of the finite elements, and how many are NaN or infinite."""
    array = as_array(value)
    out: dict[str, Any] = {"shape": list(array.shape), "dtype": dtype}
    if array.dtype.kind not in "biuf":
        return out | dict.fromkeys(_COLUMNS[2:], "")
    finite = array[np.isfinite(array)].astype(np.float64)
    low, high, mean = (float(finite.min()), float(finite.max()), float(finite.mean())) if finite.size else (np.nan,) * 3
    return out | {
        "min": low, "max": high, "mean": mean, "nan": int(np.isnan(array).sum()), "inf": int(np.isinf(array).sum()),
    }  # fmt: skip


def print_trace(program: Program, feed: dict[str, Any], pattern: str, args: argparse.Namespace, state: Any) -> None:
    """One line for each value whose name or operator matches the pattern, as it is computed."""
    print("trace")
    for number, step in enumerate(program.trace(feed, args.function, state, args.policy)):
        types = {out.name: out for out in step.op.outputs}
        for name, array in step.outputs.items():
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(step.op.type, pattern):
                cells = summary(array, types[name].dtype)
                print(table(("",) * 9, [(number, step.op.type, name, *_cells(cells))]).split("\n")[-1])


def _cells(found: dict[str, Any]) -> list[Any]:
    return [found[name] for name in _COLUMNS]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distill mil run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", type=Path, help="X.mlpackage")
    feeds.add_flags(parser, policy="ieee16", seed=None)
    parser.add_argument("--state-out", type=Path, metavar="FILE.npz", help="save the states afterwards")
    parser.add_argument("--out", type=Path, metavar="FILE.npz", help="save the outputs, fp16 as float32")
    parser.add_argument(
        "--trace",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="also print every intermediate value, or those whose name or operator matches (e.g. '*attn*', softmax)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def run(args: argparse.Namespace) -> int:
    """Predict, print, save."""
    program = mil.load(args.package)
    function = program.function(args.function)
    feed = feeds.collect(args, function)
    state = feeds.make_state(program, function, args.state_in)
    if args.trace is not None:
        print_trace(program, feed, args.trace, args, state.copy() if state else None)
    outputs = program.predict(feed, args.function, state, args.policy)
    found = {f.name: summary(outputs[f.name], f.type.dtype) for f in function.outputs}
    findings = program.findings if args.policy == "strict" else []
    if args.json:
        print(json.dumps(plain({"outputs": found, "findings": [_finding(f) for f in findings]}), indent=2))
    else:
        print(table(("output", *_COLUMNS), [(name, *_cells(cells)) for name, cells in found.items()]))
        if args.policy == "strict":
            print_findings(findings)
    if args.out is not None:
        feeds.save_arrays(args.out, {name: as_array(value) for name, value in outputs.items()})
    if args.state_out is not None:
        feeds.save_arrays(args.state_out, {name: state.read(name) for name in state.names} if state else {})
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
