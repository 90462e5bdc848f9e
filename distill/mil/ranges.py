"""What range each value takes over real inputs, and how much room fp16 leaves above it.

program.ranges(prompts)[0] is the value that comes nearest to fp16's largest number, 65504.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.mil.dtypes import FLOATS
from distill.mil.program import Function, NamedType, Program, TensorType

if TYPE_CHECKING:
    from distill.mil.policy import Policy
    from distill.mil.state import State

LARGEST16 = 65504.0


@dataclass(slots=True)
class Range:
    """One value, as it was seen; `op_type` is 'input' for a function's input. Extremes are over finite elements, NaN
    where there was none.
    """

    name: str
    op_type: str
    dtype: str
    min: float = math.nan
    max: float = math.nan
    smallest: float = math.nan  # least magnitude that is not zero
    nonfinite: int = 0  # elements that were infinite or NaN
    count: int = 0  # elements seen

    @property
    def max_abs(self) -> float:
        return max(abs(self.min), abs(self.max))

    @property
    def headroom(self) -> float:
        """65504 over the largest magnitude: below 1 it does not fit fp16. 0 where something was not finite."""
        if self.nonfinite:
            return 0.0
        return LARGEST16 / self.max_abs if self.max_abs > 0 else math.inf

    @property
    def headroom_bits(self) -> float:
        """The head-room as a power of two."""
        return math.log2(self.headroom) if self.headroom else -math.inf

    def see(self, array: np.ndarray) -> None:
        """Widen by one more array."""
        self.count += array.size
        finite = array[np.isfinite(array)]
        self.nonfinite += array.size - finite.size
        if not finite.size:
            return
        self.min, self.max = float(np.fmin(self.min, finite.min())), float(np.fmax(self.max, finite.max()))
        magnitude = np.abs(finite[finite != 0])
        if magnitude.size:
            self.smallest = float(np.fmin(self.smallest, magnitude.min()))


def observe(
    program: Program,
    inputs: Iterable[Mapping[str, Any] | Iterable[Mapping[str, Any]]],
    function: str | None,
    state: State | None,
    policy: str | Policy,
) -> list[Range]:
    """Run every item, one operation's outputs in memory at a time; least head-room first."""
    from distill.mil.inputs import to_array  # loads torch

    chosen = program.function(function)
    seen = {f.name: Range(f.name, "input", f.type.dtype) for f in chosen.inputs if f.type.dtype in FLOATS}
    declared = _declared(chosen)
    for item in inputs:
        steps = [item] if isinstance(item, Mapping) else item
        kept = state or (program.make_state(function) if chosen.states else None)
        for feed in steps:
            trace = program.trace(feed, function, kept, policy)  # checks the inputs
            for feature in chosen.inputs:
                if feature.name in feed and feature.name in seen:
                    seen[feature.name].see(to_array(feature, feed[feature.name], str(program.path)))
            for step in trace:
                for name, array in step.outputs.items():
                    if name in declared:
                        seen.setdefault(name, Range(name, step.op.type, declared[name].dtype)).see(array)
    return sorted(seen.values(), key=lambda r: (r.headroom, -r.nonfinite))


def _declared(function: Function) -> dict[str, NamedType]:
    outputs = (out for op in function.block.operations for out in op.outputs)
    return {out.name: out for out in outputs if isinstance(out.type, TensorType) and out.dtype in FLOATS}
