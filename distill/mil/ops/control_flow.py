"""Control flow."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.run import Body, Run

_MAX_ITERATIONS = 1_000_000  # a hostile package must not loop for ever


@op("cond")
def cond(run: Run, blocks: list[Body], pred: bool) -> tuple[Any, ...]:
    return tuple(blocks[0 if pred else 1](run, []))


@op("while_loop")
def while_loop(run: Run, blocks: list[Body], loop_vars: list[Tensor]) -> tuple[Any, ...]:
    """Block 0 says whether to go on, block 1 makes the next loop variables."""
    condition, body = blocks
    carried: list[Any] = list(loop_vars)
    for _ in range(_MAX_ITERATIONS):
        if not bool(condition(run, carried)[0]):
            return tuple(carried)
        carried = body(run, carried)
    raise ValueError(f"still looping after {_MAX_ITERATIONS} iterations")
