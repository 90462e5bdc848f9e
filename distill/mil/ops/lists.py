"""Lists of tensors. A list is a value like any other: writing makes a new list and leaves the old one as it was.

Elements have one shape and type. An element that was never written is zero. A list of dynamic length grows to
hold what is written behind its end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.run import Run
from distill.mil.values import RUNTIME, check_size

_MAX_LENGTH = 2**20  # an index is data: without a limit one write could fill the memory
# In arithmetic operations: what a list does takes time that torch does not see.
_REFERENCE = 2**8  # an element's place, made or copied
_INDEX = 2**17  # an element read or written, as a tensor of its own
_REFERENCE_BYTES = 8


@dataclass(frozen=True, slots=True, weakref_slot=True)
class TensorList:
    """`shape` is that of an element: -1 where only run time tells, None where the package says nothing."""

    elements: list[Tensor | None]  # None: not written yet
    dtype: torch.dtype
    shape: tuple[int, ...] | None
    dynamic: bool

    def zero(self) -> Tensor:
        """What an unwritten element holds; one number, repeated without taking memory."""
        shape = [max(n, 0) for n in self.shape or ()]
        if self.shape is None or -1 in self.shape:
            shape = next((list(e.shape) for e in self.elements if e is not None), shape)
        return torch.zeros((), dtype=self.dtype).expand(shape)

    def read(self, index: int) -> Tensor:
        if not 0 <= index < len(self.elements):
            raise IndexError(f"index {index} in a list of {len(self.elements)}")
        found = self.elements[index]
        return self.zero() if found is None else found

    def write(self, run: Run, indices: list[int], values: list[Tensor]) -> TensorList:
        """A new list with these elements replaced, in order; longer where need be."""
        length = max(len(self.elements), *(i + 1 for i in indices)) if indices else len(self.elements)
        if indices and (min(indices) < 0 or length > (_MAX_LENGTH if self.dynamic else len(self.elements))):
            raise IndexError(f"writing at {indices[:8]} in a list of {len(self.elements)}")
        run.work(_INDEX * len(indices))
        pay(run, length)
        elements = self.elements + [None] * (length - len(self.elements))
        for index, value in zip(indices, values, strict=True):
            elements[index] = run.keep(self.checked(value))
        return held(run, replace(self, elements=elements))

    def checked(self, value: Tensor) -> Tensor:
        wanted = list(value.shape) if self.shape is None else list(self.shape)
        if value.dim() != len(wanted) or any(n not in (-1, m) for n, m in zip(wanted, value.shape)):
            raise ValueError(f"an element of shape {list(value.shape)} in a list of {wanted}")
        return value.to(self.dtype)


def pay(run: Run, length: int) -> None:
    """For a list of `length`, before it is made."""
    run.work(_REFERENCE * length)
    run.reserve(_REFERENCE_BYTES * length)


def held(run: Run, made: TensorList) -> TensorList:
    """A list counts as memory while it lives."""
    if run.guard is not None:
        run.guard.ledger.follow(made, _REFERENCE_BYTES * len(made.elements))
    return made


def whole(indices: Tensor) -> list[int]:
    return [int(n) for n in indices.reshape(-1).tolist()]


def tensor_list(ls: Any) -> TensorList:
    if not isinstance(ls, TensorList):
        raise TypeError("'ls' is not a list")
    return ls


@op("make_list")
def make_list(
    run: Run,
    elem_shape: list[Any] | None = None,
    init_length: int = 1,
    dynamic_length: bool = True,
    dtype: str = "fp32",
) -> TensorList:
    """A size of `elem_shape` that is a name, not a number, is known at run time only."""
    if dtype not in RUNTIME:
        raise ValueError(f"elements of unknown type {dtype!r}")
    if not 0 <= init_length <= _MAX_LENGTH:
        raise ValueError(f"refusing to make a list of {init_length}")
    shape = None if elem_shape is None else tuple(-1 if isinstance(n, str) else int(n) for n in elem_shape)
    check_size([max(n, 0) for n in shape or ()])
    pay(run, init_length)
    return held(run, TensorList([None] * init_length, RUNTIME[dtype], shape, dynamic_length))


@op("list_length")
def list_length(ls: Any) -> Tensor:
    return torch.tensor(len(tensor_list(ls).elements), dtype=torch.int32)


@op("list_read", exact=True)
def list_read(ls: Any, index: int) -> Tensor:
    return tensor_list(ls).read(index)


@op("list_write", exact=True)
def list_write(run: Run, ls: Any, index: int, value: Tensor) -> TensorList:
    return tensor_list(ls).write(run, [index], [value])


@op("list_gather", exact=True, fresh=True)
def list_gather(run: Run, ls: Any, indices: Tensor) -> Tensor:
    """(len(indices), *element)."""
    source = tensor_list(ls)
    run.work(_INDEX * indices.numel())
    numbers = whole(indices)
    element = source.read(numbers[0]) if numbers else source.zero()
    check_size([len(numbers), *element.shape])
    if not numbers:
        return torch.zeros([0, *element.shape], dtype=source.dtype)
    return torch.stack([source.read(i) for i in numbers])


@op("list_scatter", exact=True)
def list_scatter(run: Run, ls: Any, indices: Tensor, value: Tensor) -> TensorList:
    """`value` (len(indices), *element) goes to the elements at `indices`; of equal indices the last one stays."""
    if value.dim() == 0 or len(value) != indices.numel():
        raise ValueError(f"a value of shape {list(value.shape)} for {indices.numel()} indices")
    return tensor_list(ls).write(run, whole(indices), list(value))
