"""Lifetimes: when a value is dead, and when a state may be overwritten where it lies."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distill.mil.ops.slicing import update_in_place
from distill.mil.run import Run

if TYPE_CHECKING:
    from distill.mil.plan import Instruction

_PINNED = "pinned"
STATE_OPS = ("read_state", "write_state")
_SHARING_OPS = ("slice_update", "write_state")
_MOST_STEPS = 2**23  # the proof takes time in proportion to updates and instructions; a decoder takes 2**18


def free_dead(instructions: Sequence[Instruction], inputs: Sequence[int], outputs: Sequence[int]) -> None:
    """Give each instruction the slots of this block that nobody reads after it."""
    own = set(inputs) | {slot for i in instructions for slot in i.writes}
    last = {slot: n for n, i in enumerate(instructions) for slot in (*i.writes, *i.used)}
    kept = set(outputs)
    for slot, n in last.items():
        if slot in own and slot not in kept:
            instructions[n].frees.append(slot)


def share_states(instructions: Sequence[Instruction], inputs: Sequence[int], outputs: Sequence[Any]) -> None:
    """Let `slice_update` write into a state where no one can see the difference; else states are copied.

    Values that may share memory form one group: an operator that is not `fresh` joins its outputs to its
    inputs, and reading or writing a state joins the value to that state. Function inputs, outputs and
    constants pin their group. An update may happen in place when every earlier member of the group of `x` is
    dead after it, the group is not pinned, and each state in the group is next written, not read.
    """
    updates = sum(i.handler.name in _SHARING_OPS for i in instructions)
    if any(i.bodies for i in instructions) or updates * len(instructions) > _MOST_STEPS:
        copy_writes(instructions)
        return
    groups = _Groups()
    for slot in (*inputs, *(o for o in outputs if type(o) is int)):
        groups.join(slot, _PINNED)
    for i in instructions:
        if i.handler.name in STATE_OPS:
            for slot in (*i.writes, *_tensors(i)):
                groups.join(slot, _state(i))
        elif not i.handler.fresh:
            for slot in (*i.writes, *_tensors(i)):
                groups.join(slot, _anchor(i))
            if any(isinstance(v, Tensor) for v in i.fixed.values()) or i.gathers:
                groups.join(_anchor(i), _PINNED)
    last = {slot: n for n, i in enumerate(instructions) for slot in (*i.writes, *i.used)}
    born = {slot: n for n, i in enumerate(instructions) for slot in i.writes}
    accesses: dict[str, list[tuple[int, str]]] = {}
    for n, i in enumerate(instructions):
        if i.handler.name in STATE_OPS:
            accesses.setdefault(_state(i), []).append((n, i.handler.name))
    for n, i in enumerate(instructions):
        if i.handler.name == "slice_update":
            _try_in_place(n, i, accesses, groups, last, born)
    for i in instructions:
        if i.handler.name == "write_state" and not _exclusive(i, groups):
            i.function = _write_copy


def owned_outputs(instructions: Sequence[Instruction], outputs: Sequence[Any]) -> frozenset[int]:
    """Which outputs of a function without states the caller may have as they are: those whose memory a `fresh`
    operator made, or views of it, and that no other output shares.
    """
    makers = {slot: i for i in instructions for slot in i.writes}
    origins: list[int | None] = []
    for slot in outputs:
        maker = makers.get(slot) if type(slot) is int else None
        while maker is not None and not maker.handler.fresh:
            tensors = _tensors(maker)
            constants = any(isinstance(value, Tensor) for value in maker.fixed.values())
            maker = makers.get(tensors[0]) if len(tensors) == 1 and not constants and not maker.bodies else None
        origins.append(id(maker) if maker is not None and not maker.bodies and maker.in_place is None else None)
    return frozenset(n for n, origin in enumerate(origins) if origin is not None and origins.count(origin) == 1)


def copy_writes(instructions: Sequence[Instruction]) -> None:
    """Where nothing is proved, every value written to a state is copied."""
    for i in instructions:
        if i.handler.name == "write_state":
            i.function = _write_copy
        for body in i.bodies:
            copy_writes(body.instructions)


def _tensors(i: Instruction) -> list[int]:
    """The slots that are passed as tensors; the others become plain numbers, which share no memory."""
    single = [slot for _, slot, convert in i.reads if convert is None]
    return single + [p for _, parts, flatten in i.gathers if not flatten for p in parts if type(p) is int]


def _anchor(i: Instruction) -> int | str:
    return next(iter((*i.writes, *_tensors(i))), _PINNED)


def _state(i: Instruction) -> str:
    return f"state:{i.fixed['input']}"


def _try_in_place(
    n: int,
    i: Instruction,
    accesses: Mapping[str, Sequence[tuple[int, str]]],
    groups: _Groups,
    last: dict[int, int],
    born: dict[int, int],
) -> None:
    read = {name: slot for name, slot, _ in i.reads}
    if "x" not in read:
        return
    members = groups.members(read["x"])
    if _PINNED in members or read.get("update") in members:
        return
    earlier = [m for m in members if type(m) is int and born.get(m, -1) < n]
    states = [m for m in members if type(m) is str]
    if all(last.get(m, -1) <= n for m in earlier) and all(_next_is_write(accesses.get(s, ()), n) for s in states):
        i.in_place = update_in_place
        groups.join(i.writes[0], read["x"])


def _next_is_write(accesses: Sequence[tuple[int, str]], n: int) -> bool:
    """Whether a state is written before it is read again; `accesses` are in order."""
    later = bisect_right(accesses, n, key=lambda access: access[0])
    return later < len(accesses) and accesses[later][1] != "read_state"


def _exclusive(i: Instruction, groups: _Groups) -> bool:
    """Whether the value written shares memory with nothing but this state."""
    if not _tensors(i):
        return False
    members = groups.members(_tensors(i)[0])
    return all(type(m) is int or m == _state(i) for m in members)


def _write_copy(run: Run, input: str, data: Tensor) -> tuple[()]:
    assert run.state is not None
    run.state.set(input, data.clone())
    return ()


class _Groups:
    """Disjoint sets of slots, state names and the mark `pinned`."""

    def __init__(self) -> None:
        self._group: dict[int | str, set[int | str]] = {}

    def join(self, a: int | str, b: int | str) -> None:
        left, right = self._group.setdefault(a, {a}), self._group.setdefault(b, {b})
        if left is not right:
            if len(left) < len(right):
                left, right = right, left
            left |= right
            for member in right:
                self._group[member] = left

    def members(self, a: int | str) -> set[int | str]:
        return self._group.get(a, {a})
