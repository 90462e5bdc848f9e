"""The range of every float value over prompts, and the head-room that fp16 leaves above it, least first."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distill import mil
from distill.artifacts import read_text
from distill.errors import DatasetError, InputError
from distill.mil import Function, Program
from distill.mil.ranges import Range
from distill.mil_tools import feeds
from distill.mil_tools.tables import plain, table

_COLUMNS = ("value", "operator", "dtype", "min", "max", "max_abs", "smallest", "nonfinite", "headroom", "bits")


class Prompts:
    """A JSON object a line: input name -> number or nested lists; or a list of such objects, which share a state."""

    def __init__(self, path: Path, function: Function) -> None:
        self.path, self.features, self.line = path, {f.name: f for f in function.inputs}, 0

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for number, line in enumerate(read_text(self.path).splitlines(), 1):
            self.line = number
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DatasetError(f"{self.place}: not valid JSON: {error}") from error
            steps = item if isinstance(item, list) else [item]
            if not steps or not all(isinstance(step, dict) for step in steps):
                raise DatasetError(f"{self.place}: neither an object of inputs nor a list of them")
            yield [{name: self._value(name, value) for name, value in step.items()} for step in steps]

    def _value(self, name: str, value: Any) -> Any:
        """Numbers take the input's shape, as --input's do; what is none is left for the executor to refuse."""
        numbers = value if isinstance(value, list) else [value]
        if name in self.features and numbers and all(isinstance(n, int | float) for n in numbers):
            return feeds.shaped(self.features[name], np.array(numbers))
        return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distill mil ranges", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", type=Path, help="X.mlpackage")
    feeds.add_flags(parser, policy="fp32", seed=None)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help="instead of --input: a line holds the inputs of one prediction as a JSON object, or a list of objects, "
        "predictions that share a state",
    )
    parser.add_argument("--top", type=int, default=20, metavar="N", help="rows to print (default: 20; 0: all)")
    parser.add_argument("--json", action="store_true", help="print every row as JSON instead")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if args.top < 0:
        raise InputError(f"--top must not be negative, not {args.top}")
    program = mil.load(args.package)
    function = program.function(args.function)
    if args.prompts is not None and (args.input or args.seed is not None):
        raise InputError("--prompts takes the place of --input and --seed")
    state = feeds.make_state(program, function, args.state_in) if args.state_in else None
    if args.prompts is None:
        found = program.ranges([feeds.collect(args, function)], args.function, state, args.policy)
    else:
        found = over_prompts(program, Prompts(args.prompts, function), args, state)
    if not any(r.count for r in found):
        raise InputError(f"{args.prompts}: holds no prompt")
    rows = [dict(zip(_COLUMNS, _row(r))) for r in found]
    if args.json:
        print(json.dumps(plain(rows), indent=2))
        return 0
    shown = rows[: args.top or None]
    print(table(_COLUMNS, [list(row.values()) for row in shown]))
    low = sum(r.headroom < 1 for r in found)
    print(f"{len(found)} values, {len(rows) - len(shown)} not shown; {low} do not fit fp16 (head-room below 1)")
    return 0


def over_prompts(program: Program, prompts: Prompts, args: argparse.Namespace, state: Any) -> list[Range]:
    """What the executor refuses is told with its line of the file."""
    try:
        return program.ranges(prompts, args.function, state, args.policy)
    except InputError as error:
        if type(error) is not InputError or not prompts.line:  # the package's own fault
            raise
        raise DatasetError(f"{prompts.place}: {error}") from error


def _row(found: Range) -> tuple[Any, ...]:
    return (
        found.name, found.op_type, found.dtype, found.min, found.max, found.max_abs, found.smallest, found.nonfinite,
        found.headroom, found.headroom_bits,
    )  # fmt: skip
