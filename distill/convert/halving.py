"""coremltools' step from fp32 to fp16, weight by weight: what was fp32 is dropped as soon as its half is there.

The program that comes out is the same. Three things differ on the way: coremltools looks for values beyond fp16 by the
indices of every element, up to 32 bytes for each; it keeps the constants in both types until the whole program is cast;
and the traced program, whose memory the fp32 constants are, lives until the end.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil.passes.defs.quantization import add_fp16_cast as original
from coremltools.converters.mil.mil.passes.helper import block_context_manager
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

_PASS, _REPLACED = "distill::add_fp16_cast", "common::add_fp16_cast"
_LARGEST, _INFINITE = 65504.0, 1e38
"""Coremltools' own bounds: beyond the first an operator stays fp32, beyond the second a value becomes an infinity."""
_LOOKED_AT = 400
_AT_ONCE = 1 << 20
_COLLECTIONS = 4
"""How often Python looks for garbage meanwhile: it frees a weight no earlier."""


def use(passes: Any, consumed: torch.jit.ScriptModule | None = None) -> None:
    """Let a pipeline halve in this way. `consumed`: the program that is converted, if none needs it afterwards."""
    passes.passes = [_PASS if name == _REPLACED else name for name in passes.passes]
    if consumed is not None:
        passes.set_options(_PASS, {"consumed": consumed})


@register_pass(namespace="distill")
class add_fp16_cast(original):  # named as what it stands for
    """Takes the place of `common::add_fp16_cast` in a pipeline."""

    consumed: torch.jit.ScriptModule | None = None

    def apply(self, prog: Any) -> None:
        """Cast every function. From here on the constants alone hold the weights of a consumed program."""
        tensors = [] if self.consumed is None else [*self.consumed.parameters(), *self.consumed.buffers()]
        self.dropped, self.most = 0, sum(tensor.nbytes for tensor in tensors) // _COLLECTIONS
        for tensor in tensors:
            tensor.data = torch.empty(0)
        for function in prog.functions.values():
            self._cast_block(function)
        gc.collect()

    @block_context_manager
    def _cast_block(self, block: Any) -> None:
        """The inherited loop over a block, but that no list keeps the operators that are done with."""
        self._cache_vars.append({})
        left = deque(block.operations)
        while left:
            op = left.popleft()
            for inner in op.blocks:
                self._cast_block(inner)
            if self.is_valid_op(op):
                self.transform_op(op)
        self._cache_vars.pop()

    @staticmethod
    def fp16_overflow(op: Any) -> bool:
        """Does any fp32 constant among the inputs hold a number beyond fp16."""
        return any(_beyond_half(np.asarray(var.val)) for var in _constants(op))

    def transform_op(self, op: Any) -> None:
        """Cast the operator; its constants that no other reads become fp16 at once."""
        own = {var.name: var for var in _constants(op) if len(var.child_ops) == 1}
        super().transform_op(op)
        for name, var in own.items():
            self.current_cache_vars().pop(f"{name}_to_fp16", None)  # nothing will ask for its cast again
            self.dropped += _fold(var)
        if self.dropped > self.most > 0:
            gc.collect()  # a removed operator and its output refer to each other
            self.dropped = 0

    def _check_underflow_to_zero(self, new_var: Any, var: Any) -> None:
        """Inherited: it looks at fewer than 400 elements, but copies what it looks not at to count them."""
        if np.size(var.val) < _LOOKED_AT:
            super()._check_underflow_to_zero(new_var, var)


def _constants(op: Any) -> Iterator[Any]:
    for var in op.get_flattened_inputs():
        if var.op is not None and var.op.op_type == "const" and var.is_tensor_or_scalar_of(dtype="fp32"):
            yield var


def _beyond_half(value: np.ndarray) -> bool:
    flat = value.reshape(-1)
    parts = (np.abs(flat[first : first + _AT_ONCE]) for first in range(0, flat.size, _AT_ONCE))
    return any(bool(((part > _LARGEST) & (part < _INFINITE)).any()) for part in parts)


def _fold(var: Any) -> int:
    """Where a cast is all that reads the constant, both give way to the cast's value; returns the constant's bytes."""
    readers = list(var.child_ops)
    if len(readers) != 1 or readers[0].op_type != "cast" or var.consuming_blocks:
        return 0
    cast, block = readers[0], readers[0].enclosing_block
    out = cast.outputs[0]
    half = mb.const(val=out.val, before_op=cast, name=out.name)
    block.replace_uses_of_var_after_op(anchor_op=cast, old_var=out, new_var=half)
    out.set_name(f"{out.name}_ignored")
    block.remove_ops([cast])
    block.remove_ops([var.op])
    return int(np.asarray(var.val).nbytes)
