"""The range of every float value over prompts, and the head-room that fp16 leaves above it, least first."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill import mil
from distill.artifacts import read_text
from distill.errors import DatasetError, InputError
from distill.mil.ranges import Range
from distill.mil_tools import feeds
from distill.mil_tools.tables import plain, table

_COLUMNS = ("value", "operator", "dtype", "min", "max", "max_abs", "smallest", "nonfinite", "headroom", "bits")


def read_prompts(path: Path) -> Iterator[Any]:
    """A JSON object a line: input name -> number or nested lists; or a list of such objects, which share a state."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path}:{number}: not valid JSON: {error}") from error
        steps = item if isinstance(item, list) else [item]
        if not steps or not all(isinstance(step, dict) for step in steps):
            raise DatasetError(f"{path}:{number}: neither an object of inputs nor a list of them")
        yield item


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
    items = [feeds.collect(args, function)] if args.prompts is None else read_prompts(args.prompts)
    found = program.ranges(items, args.function, state, args.policy)
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


def _row(found: Range) -> tuple[Any, ...]:
    return (
        found.name, found.op_type, found.dtype, found.min, found.max, found.max_abs, found.smallest, found.nonfinite,
        found.headroom, found.headroom_bits,
    )  # fmt: skip
