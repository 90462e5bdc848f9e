"""What the cost of an instruction depends on, so that those that are alike are measured once."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from distill.mil.plan import Instruction

_SHORT = 64  # characters of a constant that are kept as they are


def used_slots(made: Instruction) -> list[int]:
    """Slots that an instruction reads, inside its nested blocks too; each once, in the order of the parameters."""
    used = [slot for _, slot, _ in made.reads]
    used += [p for _, parts, _ in made.gathers for p in parts if type(p) is int]
    for plan in made.bodies:
        used += [s for instruction in plan.instructions for s in instruction.used]
        used += [o for o in plan.outputs if type(o) is int]
    return list(dict.fromkeys(used))


def signature(made: Instruction) -> Hashable:
    """Equal for instructions that do the same with operands of the same shapes; None where values decide."""
    numbers_read = any(r[2] is not None for r in made.reads) or any(g[2] for g in made.gathers)
    if made.bodies or (numbers_read and not made.handler.by_shape):
        return None
    slots = {slot: n for n, slot in enumerate(made.used)}
    reads = tuple((name, slots[slot]) for name, slot, _ in made.reads)
    gathers = tuple((n, tuple(slots[p] if type(p) is int else shape(p) for p in parts)) for n, parts, _ in made.gathers)
    fixed = tuple((name, shape(value)) for name, value in made.fixed.items())
    outputs = tuple((o.type.dtype, o.type.shape) for o in made.op.outputs)
    return made.op.type, reads, gathers, fixed, outputs


def shape(value: Any) -> Hashable:
    """What the cost of working with a constant depends on: a tensor's shape, anything else itself. What is long
    is not copied: many operations may share it.
    """
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, str) and len(value) > _SHORT:
        return "constant", id(value)  # which lives as long as the plan
    if isinstance(value, list):
        if any(isinstance(item, Tensor | list | str) for item in value):
            return tuple(shape(item) for item in value) if len(value) <= _SHORT else ("constant", id(value))
        value = repr(value)
        return value if len(value) <= _SHORT else hashlib.blake2b(value.encode(), digest_size=16).digest()
    return type(value), repr(value)
