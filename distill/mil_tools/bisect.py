"""Run a package against a PyTorch module; name the first point that diverges and the operations before it.

A point is what a submodule returns or is given (of a traced or exported graph: what a node computes). It is found in
the package by the names given with --points, or recorded in the package's contract, else by its values: the package's
value of the same sizes, in any layout, that is nearest. One that is far from every value was fused away and says
nothing. A point that agrees clears every operation that its value was computed from. The suspects are the operations
that lead to the first point that diverges and are not cleared.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill import mil
from distill.errors import InputError
from distill.mil import Function, Operation, Program
from distill.mil_tools import feeds
from distill.mil_tools.compare import Difference, Tolerance, compare
from distill.mil_tools.diff import add_tolerance, tolerance_of
from distill.mil_tools.outputs import pair, scores
from distill.mil_tools.tables import plain, printable, table

TOLERANCE = Tolerance(1e-5, 2e-3)
"""fp32 arithmetic on constants that fp16 rounds in the package, perhaps after folding, and before it in the module."""
_RELATED = 0.5
"""A value further away than this share of a point's norm is not that point gone wrong but something else."""
_CLOSE = 0.05
"""Nearer than this, it is that point gone wrong even where values computed from it agree again."""
_SUSPECTS = 20


@dataclass
class Point:
    """A tensor of the module, and the value of the package that it was found to be."""

    name: str
    array: np.ndarray = field(repr=False)
    value: str | None = None
    given: bool = False  # the value is known by name, not by likeness
    difference: Difference | None = None
    agreeing: list[str] = field(default_factory=list)
    status: str = "not found"  # agrees | diverges | not found
    norm: float = 0.0

    def offer(self, value: str, found: np.ndarray, norm: float, tolerance: Tolerance) -> None:
        """Take a value as this point if it is the nearest so far."""
        if not self.given and not abs(norm - self.norm) <= _RELATED * self.norm:
            return  # the distance is no less than the difference of the norms
        difference = compare(self.array, found, tolerance)
        if difference.agrees:
            self.agreeing.append(value)
        if self.given or difference.relative < (self.difference.relative if self.difference else _RELATED):
            self.value, self.difference = value, difference


@dataclass
class Report:
    """What was found. `suspects` are in the order of execution; empty where everything agrees."""

    points: list[Point]
    outputs: list[Point]
    first: Point | None
    suspects: list[Operation]
    tolerance: Tolerance
    alone: list[str] = field(default_factory=list)
    """Outputs without a partner, in words."""

    @property
    def compared(self) -> list[Point]:
        """The points that say something."""
        return [p for p in [*self.points, *self.outputs] if p.status != "not found" and p.difference is not None]


def bisect(
    program: Program,
    inputs: Mapping[str, Any],
    points: list[tuple[str, np.ndarray]],
    outputs: list[tuple[str, np.ndarray]],
    *,
    known: Mapping[str, str] | None = None,
    function: str | None = None,
    policy: str = "fp32",
    tolerance: Tolerance = TOLERANCE,
    state: Any = None,
) -> Report:
    """Compare a module's tensors, in the order that it computes them, with a package's values.

    InputError where nothing could be compared.
    """
    chosen = program.function(function)
    known = known or {}
    inner = [Point(n, a, known.get(n), n in known, norm=_norm(a)) for n, a in points]
    inner = [p for p in inner if p.given or (p.array.size > 1 and 0 < p.norm < math.inf)]
    pairing = pair(chosen, outputs)
    ends = [Point(f"output {name}", array, name, True) for name, array in pairing.pairs]
    made = {out.name for op in chosen.block.operations for out in op.outputs}
    if any(point.value not in made for point in ends):  # an input or a constant: no operation's, so not in the trace
        results = program.predict(inputs, function, state.copy() if state else None, policy)
        for point in ends:
            if point.value not in made:
                point.offer(str(point.value), scores(results[str(point.value)]), math.nan, tolerance)
    for step in program.trace(inputs, function, state, policy):
        for name, value in step.outputs.items():
            found = scores(value)
            norm = _norm(found)
            for point in _candidates(inner, name, found):
                point.offer(name, found, norm, tolerance)
            for point in ends:
                if point.value == name:
                    point.offer(name, found, norm, tolerance)
    missing = [p for p in inner if p.given and p.difference is None]
    if missing:
        raise InputError(f"{program.path}: computes no value {missing[0].value!r} (point {missing[0].name})")
    report = judge(chosen, inner, ends, tolerance)
    report.alone = pairing.alone
    if not report.compared:
        raise InputError(
            f"{program.path}: nothing could be compared: none of the module's {len(points)} points was found, and none "
            f"of its {len(outputs)} outputs has a partner among {', '.join(f.name for f in chosen.outputs)}"
        )
    return report


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64))) if array.dtype.kind == "f" else math.nan


def _candidates(points: list[Point], name: str, found: np.ndarray) -> Iterable[Point]:
    for point in points:
        if point.given:
            if point.value == name:
                yield point
        elif found.dtype.kind == "f" and found.size == point.array.size:
            yield point


def judge(function: Function, inner: list[Point], ends: list[Point], tolerance: Tolerance) -> Report:
    """Say of each point whether it agrees, diverges or is not there; collect the suspects before the first."""
    parents = parents_of(function)
    good = {name for point in [*inner, *ends] for name in point.agreeing}
    cleared = ancestors(parents, good)
    for point in [*inner, *ends]:
        if point.agreeing:
            point.status = "agrees"
        elif point.difference is not None and (point.given or _gone_wrong(point, point.difference, good, cleared)):
            point.status = "diverges"
    wrong = [p for p in [*inner, *ends] if p.status == "diverges"]
    if not wrong:
        return Report(inner, ends, None, [], tolerance)
    order = {out.name: index for index, op in enumerate(function.block.operations) for out in op.outputs}
    first = min(wrong, key=lambda p: order.get(p.value or "", math.inf))
    # what agrees although it was computed from the wrong value clears nothing: the error has faded there
    before = good - descendants(parents, first.value or "")
    leading = ancestors(parents, [first.value or ""]) - ancestors(parents, before)
    suspects = [op for op in function.block.operations if _computes(op) and any(o.name in leading for o in op.outputs)]
    return Report(inner, ends, first, suspects, tolerance)


def _gone_wrong(point: Point, difference: Difference, good: set[str], cleared: set[str]) -> bool:
    """Whether the nearest value is this point with an error, rather than another tensor that is alike."""
    if point.value in good:
        return False
    return point.value not in cleared or difference.relative < _CLOSE


def _computes(op: Operation) -> bool:
    return op.type != "const" and not op.type.startswith("constexpr_")


def parents_of(function: Function) -> dict[str, set[str]]:
    """For each value, the values that its operation reads; a state that was written passes on what was written."""
    parents: dict[str, set[str]] = {}
    written: dict[str, set[str]] = {}
    for op in function.block.operations:
        reads = {b for bindings in op.inputs.values() for b in bindings if isinstance(b, str)}
        for block in op.blocks:
            for nested in block.walk():
                reads |= {b for bindings in nested.inputs.values() for b in bindings if isinstance(b, str)}
        if op.type == "write_state":
            state = next((b for b in op.inputs.get("input", []) if isinstance(b, str)), "")
            written[state] = written.get(state, set()) | reads
        reads |= {name for state in reads for name in written.get(state, ())}
        for out in op.outputs:
            parents[out.name] = reads
    return parents


def ancestors(parents: Mapping[str, set[str]], names: Iterable[str]) -> set[str]:
    """The names and everything that they were computed from."""
    seen: set[str] = set()
    stack = list(names)
    while stack:
        name = stack.pop()
        if name not in seen:
            seen.add(name)
            stack.extend(parents.get(name, ()))
    return seen


def descendants(parents: Mapping[str, set[str]], name: str) -> set[str]:
    """The name and everything that was computed from it; `parents` is in the order of execution."""
    seen = {name}
    for value, reads in parents.items():
        if reads & seen:
            seen.add(value)
    return seen


def contract_points(program: Program) -> dict[str, str]:
    """Module path -> value, where this project's conversion recorded it in the package."""
    from distill.convert.package import CONTRACT_KEY

    try:
        data = json.loads(program.metadata.get(CONTRACT_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    probes = data.get("probes") if isinstance(data, dict) else None
    if not isinstance(probes, dict):
        return {}
    return {k: v for k, v in probes.items() if isinstance(k, str) and isinstance(v, str)}


def parse_points(specs: list[str]) -> dict[str, str]:
    """`MODULE=VALUE` flags."""
    out = {}
    for spec in specs:
        name, equals, value = spec.partition("=")
        if not equals or not name or not value:
            raise InputError(f"--points {spec}: expected MODULE=VALUE")
        out[name] = value
    return out


def render(report: Report) -> str:
    """The points that say something, the verdict, the suspects."""
    lost = sum(p.status == "not found" for p in report.points)
    rows = [
        (
            p.name,
            p.status,
            p.value,
            p.difference.max_error,
            p.difference.relative,
            p.difference.excess,
            p.difference.note,
        )
        for p in report.compared
        if p.difference is not None
    ]
    lines = [
        table(("point", "", "value", "max error", "relative", "of allowed", ""), rows),
        f"{len(rows)} points compared; {lost} not found: fused away, or further off than {_RELATED:.0%}",
        f"tolerance: {report.tolerance}",
        *(printable(f"not compared: {what}") for what in report.alone),
    ]
    if report.first is None:
        both = sum(bool(p.difference and p.difference.both_nan) for p in report.compared)
        but = [f"{both} points are NaN on both sides"] if both else []
        but += [f"{len(report.alone)} outputs have no partner"] if report.alone else []
        return "\n".join([*lines, "equal: nothing that was compared diverges" + "".join(f"; but {b}" for b in but)])
    lines.append(printable(f"first point to diverge: {report.first.name} (value {report.first.value!r})"))
    lines.append(f"{len(report.suspects)} operations between it and the points that agree:")
    lines += [printable(f"  {op.type} {op.output_name!r}") for op in report.suspects[:_SUSPECTS]]
    if len(report.suspects) > _SUSPECTS:
        lines.append(f"  and {len(report.suspects) - _SUSPECTS} more")
    return "\n".join(lines)


def to_json(report: Report) -> dict[str, Any]:
    """Plain values."""
    return {
        "equal": report.first is None,
        "first": report.first.name if report.first else None,
        "suspects": [{"operator": op.type, "value": op.output_name} for op in report.suspects],
        "not_compared": report.alone,
        "tolerance": report.tolerance._asdict(),
        "points": [
            {"name": p.name, "status": p.status, "value": p.value}
            | (p.difference._asdict() if p.difference is not None else {})
            for p in [*report.points, *report.outputs]
        ],
    }


def make_parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="distill mil bisect", description=lines[0], epilog=" ".join(lines[2:]))
    parser.add_argument("package", type=Path, help="X.mlpackage")
    parser.add_argument(
        "--module",
        required=True,
        metavar="SPEC",
        help="package.module:callable or file.py:callable, a torch.nn.Module or what returns one; or a TorchScript "
        "file, which is code: only with --sha256, or with the contract of `distill export` beside it. Pickled modules "
        "and .pt2 files are refused, since reading one can run anything. An image reaches the module as floats "
        "(1, C, H, W) from 0 to 255: it applies the package's scale and bias itself",
    )
    parser.add_argument("--sha256", metavar="HEX", help="the TorchScript file that you trust")
    parser.add_argument(
        "--points",
        action="append",
        default=[],
        metavar="MODULE=VALUE",
        help="the value of a submodule. May be repeated",
    )
    feeds.add_flags(parser, policy="fp32", seed=0)
    add_tolerance(parser, f"{TOLERANCE}")
    parser.add_argument("--json", action="store_true", help="print every point as JSON instead")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compare and print; 1 where something diverges."""
    from distill.mil_tools import torch_points

    tolerance = tolerance_of(args, TOLERANCE)
    program = mil.load(args.package)
    function = program.function(args.function)
    inputs = feeds.collect(args, function)
    state = feeds.make_state(program, function, args.state_in)
    module = torch_points.load_module(args.module, args.sha256)
    if any(out.dtype == "fp16" for op in function.block.operations for out in op.outputs):
        torch_points.round_to_half(module)
    found = torch_points.record(args.module, module, feeds.as_program_sees(program, function, inputs))
    given = parse_points(args.points)
    names = {name for name, _ in found.inner}
    if unknown := sorted(given.keys() - names):
        raise InputError(
            f"--points {unknown[0]}=...: the module has no such point; there are {', '.join(sorted(names))}"
        )
    made = {out.name for op in function.block.operations for out in op.outputs}
    recorded = {k: v for k, v in contract_points(program).items() if k in names and v in made}
    report = bisect(
        program, inputs, found.inner, found.outputs, known=recorded | given, function=args.function,
        policy=args.policy, tolerance=tolerance, state=state,
    )  # fmt: skip
    print(json.dumps(plain(to_json(report)), indent=2) if args.json else render(report))
    return 0 if report.first is None else 1
