"""State access. A state's tensor is never changed except by `slice_update` where the plan has proved that
nobody else can see it (liveness.py).
"""

from __future__ import annotations

from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.run import Run
from distill.mil.values import overlaps


@op("read_state", exact=True)
def read_state(run: Run, input: str) -> Tensor:
    assert run.state is not None, "the function has no states"
    return run.state.get(input)


@op("write_state", exact=True)
def write_state(run: Run, input: str, data: Tensor) -> tuple[()]:
    assert run.state is not None, "the function has no states"
    run.state.set(input, data.clone() if overlaps(data) else data)  # slice_update will write into it
    return ()
