"""Run two packages on the same inputs; name the first operation whose value diverges.

Values are matched by name (what casting passes append apart), then between common names by operator and order. An
element agrees where |a - b| <= atol + rtol (|a| + rms of a); a permuted layout is no difference.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distill import mil
from distill.errors import InputError
from distill.mil import Function, Operation, Program
from distill.mil_tools import feeds
from distill.mil_tools.compare import Difference, Tolerance, as_array, compare
from distill.mil_tools.constants import constant_changes
from distill.mil_tools.match import Pairs, computed, pair_values
from distill.mil_tools.tables import plain, printable, table

if TYPE_CHECKING:
    from distill.mil.state import State

SAME_GRAPH = Tolerance(0.0, 1e-6)
"""Two programs of the same operations do the same arithmetic in the same order: more than this is a difference."""
OTHER_GRAPH = Tolerance(1e-6, 1e-3)
"""Other operations sum in another order, and round constants elsewhere."""


class Row(NamedTuple):
    """One value of A with its partner in B."""

    step: int
    """Place in A's order of execution; -1 for what is not computed by an operation of A's main block."""
    op_type: str
    value: str
    partner: str
    found_by: str
    """name, structure, output or state."""
    difference: Difference
    inherited: float
    """The largest relative difference among the operation's inputs."""


@dataclass
class Report:
    """What was compared. Rows are in A's order of execution; outputs and states come last."""

    rows: list[Row]
    tolerance: Tolerance
    same_graph: bool
    unmatched: tuple[int, int]
    """Computed values of A and of B without a partner."""
    causes: list[str]
    """In which constants the first operation that diverges differs from its partner."""

    @property
    def first(self) -> Row | None:
        """The first value that diverges."""
        return next((row for row in self.rows if _fails(row)), None)

    @property
    def outputs_agree(self) -> bool:
        return not any(_fails(row) for row in self.rows if row.found_by in ("output", "state"))


def _fails(row: Row) -> bool:
    """An output of another shape is different; an intermediate one cannot be judged."""
    return not row.difference.agrees if row.found_by in ("output", "state") else row.difference.diverges


def diff(
    a: Program,
    b: Program,
    inputs: Mapping[str, Any],
    *,
    function: str | None = None,
    policy: str = "fp32",
    tolerance: Tolerance | None = None,
    states: tuple[State | None, State | None] | None = None,
) -> Report:
    """Compare two programs on one set of inputs, named as A names them. InputError if B cannot take them."""
    first, second = a.function(function), b.function(function)
    renamed, ends = _inputs(first, second, b), _outputs(first, second, b)
    same = same_graph(first, second)
    tolerance = tolerance or (SAME_GRAPH if same else OTHER_GRAPH)
    kept = states or (_zeros(a, first), _zeros(b, second))
    sides = (
        _Side(a, first, inputs, kept[0], policy),
        _Side(b, second, {renamed[name]: value for name, value in inputs.items() if name in renamed}, kept[1], policy),
    )
    run = _Lockstep(sides, pair_values(first, second), ends, tolerance)
    run.go()
    done = {row.value for row in run.rows}
    counts = [sum(len(op.outputs) for op in computed(f)) - len(done) for f in (first, second)]
    rows = [*sorted(run.rows, key=lambda row: row.step), *run.outputs(), *_state_rows(kept, tolerance)]
    report = Report(rows, tolerance, same, (counts[0], counts[1]), [])
    if (row := report.first) is not None and row.value in first.producers and row.partner in second.producers:
        report.causes = constant_changes(first, second, row.value, row.partner)
    return report


def _zeros(program: Program, function: Function) -> State | None:
    return program.make_state(function.name) if function.states else None


def _inputs(first: Function, second: Function, b: Program) -> dict[str, str]:
    """Names of A's inputs -> B's: the same names, else by position where there are as many."""
    mine, theirs = [f.name for f in first.inputs], [f.name for f in second.inputs]
    common = {name: name for name in mine if name in theirs}
    if {f.name for f in second.inputs if not f.optional} <= common.keys():
        return common
    if len(mine) == len(theirs):
        return common | dict(zip((n for n in mine if n not in common), (n for n in theirs if n not in common)))
    raise InputError(f"{b.path}: takes {', '.join(theirs)}, the other package {', '.join(mine) or 'no input'}")


def _outputs(first: Function, second: Function, b: Program) -> dict[str, str]:
    """Names of A's outputs -> B's: those of the same name, and the others by position where there are as many."""
    mine, theirs = [f.name for f in first.outputs], [f.name for f in second.outputs]
    common = {name: name for name in mine if name in theirs}
    if len(mine) == len(theirs):
        common |= dict(zip((n for n in mine if n not in common), (n for n in theirs if n not in common)))
    if not common:
        raise InputError(f"{b.path}: gives {', '.join(theirs)}, the other package {', '.join(mine)}")
    return common


def same_graph(first: Function, second: Function) -> bool:
    """Whether both are the same operations on the same types, whatever their names and constants."""

    def shape(function: Function) -> list[Any]:
        return [(op.type, [(out.dtype, out.shape) for out in op.outputs]) for op in function.block.walk()]

    return shape(first) == shape(second)


class _Side(NamedTuple):
    """One of the two programs with all that it takes to run it."""

    program: Program
    function: Function
    inputs: Mapping[str, Any]
    state: State | None
    policy: str

    def trace(self) -> Iterator[Any]:
        return self.program.trace(self.inputs, self.function.name, self.state, self.policy)

    def predict(self) -> dict[str, Any]:
        """All outputs; the state stays as it is."""
        state = self.state.copy() if self.state else None
        return self.program.predict(self.inputs, self.function.name, state, self.policy)


class _Lockstep:
    """Two traces side by side. A value is kept only until its partner has been computed."""

    def __init__(self, sides: tuple[_Side, _Side], pairs: Pairs, ends: dict[str, str], tolerance: Tolerance) -> None:
        self.sides, self.pairs, self.ends, self.tolerance = sides, pairs, ends, tolerance
        self.partners = {theirs: mine for mine, theirs in pairs.values.items()}
        self.waiting: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        self.kept: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        self.relative: dict[str, float] = {}
        self.steps: dict[str, tuple[int, Operation]] = {}
        self.rows: list[Row] = []

    def go(self) -> None:
        """Advance B after each operation of A until A's values have met their partners."""
        theirs = self.sides[1].trace()
        for number, step in enumerate(self.sides[0].trace()):
            self._keep(0, step, self.ends.keys())
            for name, value in step.outputs.items():
                self.steps[name] = (number, step.op)
                if name not in self.pairs.values:
                    self.relative[name] = self._inherited(step.op)
                    continue
                self.waiting[0][name] = value
                partner = self.pairs.values[name]
                while partner not in self.waiting[1] and (other := next(theirs, None)) is not None:
                    self._arrive(other)
                if partner in self.waiting[1]:
                    self._compare(name)
        for other in theirs:
            self._arrive(other)

    def _arrive(self, step: Any) -> None:
        self._keep(1, step, self.ends.values())
        self.waiting[1].update({name: value for name, value in step.outputs.items() if name in self.partners})

    def _keep(self, side: int, step: Any, names: Collection[str]) -> None:
        self.kept[side].update({name: value for name, value in step.outputs.items() if name in names})

    def _inherited(self, op: Operation) -> float:
        names = (b for bindings in op.inputs.values() for b in bindings if isinstance(b, str))
        return max((self.relative.get(name, 0.0) for name in names), default=0.0)

    def _compare(self, name: str) -> None:
        partner = self.pairs.values[name]
        number, op = self.steps[name]
        found = compare(self.waiting[0].pop(name), self.waiting[1].pop(partner), self.tolerance)
        inherited = self._inherited(op)
        self.relative[name] = inherited if math.isnan(found.relative) else found.relative
        how = "name" if name in self.pairs.by_name else "structure"
        self.rows.append(Row(number, op.type, name, partner, how, found, inherited))

    def outputs(self) -> list[Row]:
        """The functions' outputs; those that are an input or a constant, no operation's, are asked for."""
        a, b = self.kept
        if self.ends.keys() - a.keys():
            a = self.sides[0].predict()
        if set(self.ends.values()) - b.keys():
            b = self.sides[1].predict()
        rows = []
        for mine, theirs in self.ends.items():
            number, op = self.steps.get(mine, (-1, None))
            found = _same_shape(a[mine], b[theirs], self.tolerance)
            rows.append(Row(number, op.type if op else "", mine, theirs, "output", found, 0.0))
        return rows


def _same_shape(one: Any, other: Any, tolerance: Tolerance) -> Difference:
    """An interface is not free in its layout."""
    a, b = as_array(one), as_array(other)
    if a.shape != b.shape:
        return Difference(math.nan, math.nan, math.nan, f"shapes {list(a.shape)} and {list(b.shape)}")
    return compare(one, other, tolerance)


def _state_rows(states: tuple[State | None, State | None], tolerance: Tolerance) -> list[Row]:
    if states[0] is None or states[1] is None:
        return []
    return [
        Row(-1, "", n, n, "state", _same_shape(states[0].read(n), states[1].read(n), tolerance), 0.0)
        for n in states[0].names
        if n in states[1].names
    ]


def render(report: Report, top: int) -> str:
    """The worst values, the verdict, and what the verdict rests on."""
    worst = sorted((r for r in report.rows if r.difference.excess != 0), key=lambda row: -_badness(row.difference))
    rows = [
        (
            row.step if row.step >= 0 else "", row.op_type, row.value, row.found_by, row.difference.max_error,
            row.difference.relative, row.inherited, row.difference.excess, row.difference.note,
        )
        for row in worst[:top]
    ]  # fmt: skip
    header = ("step", "operator", "value", "found by", "max error", "relative", "inherited", "of allowed", "")
    kinds = [sum(row.found_by == kind for row in report.rows) for kind in ("name", "structure")]
    unlike = sum(math.isnan(row.difference.excess) for row in report.rows)
    lines = [
        f"{len(report.rows)} values compared, {len(worst)} not the same to the last bit",
        *([table(header, rows)] if rows else []),
        f"{kinds[0]} values matched by name, {kinds[1]} by structure; without partner {report.unmatched[0]} and "
        f"{report.unmatched[1]}" + (f"; {unlike} of shapes that cannot be compared" if unlike else ""),
        f"tolerance: {report.tolerance} ({'the same' if report.same_graph else 'different'} operations)",
        *verdict(report),
    ]
    return "\n".join(lines)


def verdict(report: Report) -> list[str]:
    """Which operation or output diverges first, in one line, and in which constants it differs."""
    row = report.first
    both = [r for r in report.rows if r.difference.both_nan]
    nan = [printable(f"NaN on both sides in {len(both)} values, the first {both[0].value!r}")] if both else []
    if row is None:
        return [*nan, "equal: nothing that was compared diverges" + ("; but NaN is no result" if both else "")]
    what = f"{row.op_type} {row.value!r}" if row.found_by in ("name", "structure") else f"{row.found_by} {row.value!r}"
    partner = "" if row.partner == row.value else f" (there {row.partner!r})"
    size = row.difference.note or f"relative {row.difference.relative:.3g}, its inputs {row.inherited:.3g}"
    lines = [*nan, printable(f"first to diverge: {what}{partner}: {size}")]
    lines += [printable(f"  {cause}") for cause in report.causes]
    agree = "agree" if report.outputs_agree else "differ"
    return [*lines, f"different: the outputs {agree}"]


def _badness(difference: Difference) -> float:
    return difference.excess if not math.isnan(difference.excess) else -1.0


def to_json(report: Report) -> dict[str, Any]:
    """Plain values, every row."""
    rows = [row._asdict() | {"difference": row.difference._asdict()} for row in report.rows]
    return {
        "equal": report.first is None,
        "first": report.first.value if report.first else None,
        "causes": report.causes,
        "outputs_agree": report.outputs_agree,
        "tolerance": report.tolerance._asdict(),
        "same_graph": report.same_graph,
        "unmatched": report.unmatched,
        "values": rows,
    }


def add_tolerance(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--atol", type=float, metavar="X", help=f"absolute tolerance (default: {default})")
    parser.add_argument("--rtol", type=float, metavar="X", help="relative tolerance, of the element and of the rms")


def tolerance_of(args: argparse.Namespace, default: Tolerance) -> Tolerance:
    """The flags, each over its default."""
    given = [default.atol if args.atol is None else args.atol, default.rtol if args.rtol is None else args.rtol]
    for name, value in zip(("--atol", "--rtol"), given):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} must be a number that is not negative, not {value}")
    return Tolerance(*given)


def make_parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="distill mil diff", description=lines[0], epilog=" ".join(lines[2:]))
    parser.add_argument("package", type=Path, help="A.mlpackage")
    parser.add_argument("other", type=Path, help="B.mlpackage")
    feeds.add_flags(parser, policy="fp32", seed=0)
    add_tolerance(parser, "0 and 1e-6 where both are the same operations, else 1e-6 and 1e-3")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="rows to print (default: 10)")
    parser.add_argument("--json", action="store_true", help="print every row as JSON instead")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compare and print; 1 where something diverges."""
    a, b = mil.load(args.package), mil.load(args.other)
    first, second = a.function(args.function), b.function(args.function)
    default = SAME_GRAPH if same_graph(first, second) else OTHER_GRAPH
    tolerance = tolerance_of(args, default)
    inputs = feeds.collect(args, first)
    states = (feeds.make_state(a, first, args.state_in), feeds.make_state(b, second, args.state_in))
    report = diff(a, b, inputs, function=args.function, policy=args.policy, tolerance=tolerance, states=states)
    print(json.dumps(plain(to_json(report)), indent=2) if args.json else render(report, args.top))
    return 0 if report.first is None else 1
