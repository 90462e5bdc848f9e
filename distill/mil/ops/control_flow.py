"""Control flow. Nested blocks return values that are settled already: there is nothing left to round."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.run import VALUE, Body, Run


@op("cond", exact=True)
def cond(run: Run, blocks: list[Body], pred: bool) -> tuple[Any, ...]:
    if len(blocks) != 2:
        raise ValueError(f"{len(blocks)} blocks, not two")
    return tuple(blocks[0 if pred else 1](run, []))


@op("while_loop", exact=True)
def while_loop(run: Run, blocks: list[Body], loop_vars: list[Tensor] | None = None) -> tuple[Any, ...]:
    """Block 0 says whether to go on, block 1 makes the next loop variables. A prediction has a budget of
    iterations, shared by all its loops, so that nested loops end too.
    """
    if len(blocks) != 2:
        raise ValueError(f"{len(blocks)} blocks, not two")
    condition, body = blocks
    carried: list[Any] = list(loop_vars or [])
    while going_on(condition(run, carried)):
        run.spend(1)
        run.work(VALUE * len(carried))
        made = body(run, carried)
        if len(made) != len(carried):
            raise ValueError(f"the loop's body returns {len(made)} values for {len(carried)} loop variables")
        carried = made
    return tuple(carried)


def going_on(results: list[Any]) -> bool:
    if len(results) != 1 or not isinstance(results[0], Tensor) or results[0].numel() != 1:
        raise ValueError("the loop's condition is not one value")
    return bool(results[0])
