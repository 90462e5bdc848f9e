"""Slices: by index, by size, and writing into one."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.mil.ops.registry import op


def solve(
    shape: list[int],
    begin: list[int],
    end: list[int],
    stride: list[int] | None,
    begin_mask: list[bool] | None,
    end_mask: list[bool] | None,
    squeeze_mask: list[bool] | None,
) -> list[slice]:
    """Python slices. A mask ignores its bound; a squeezed dimension takes the one element at `begin`."""
    rank = len(shape)
    stride = stride or [1] * rank
    no = [False] * rank
    begin_mask, end_mask, squeeze_mask = begin_mask or no, end_mask or no, squeeze_mask or no
    if not rank == len(begin) == len(end) == len(stride):
        raise ValueError(f"begin {begin}, end {end}, stride {stride} for a tensor of rank {rank}")
    slices = []
    for i in range(rank):
        if squeeze_mask[i]:
            at = 0 if begin_mask[i] else begin[i]
            if not -shape[i] <= at < shape[i]:
                raise IndexError(f"index {at} in dimension {i} of size {shape[i]}")
            slices.append(slice(at, at + 1 or None))
        else:
            slices.append(slice(None if begin_mask[i] else begin[i], None if end_mask[i] else end[i], stride[i]))
    return slices


def take(x: Tensor, slices: list[slice]) -> Tensor:
    """`x[slices]`, a view; torch has no negative steps, so those dimensions are gathered."""
    plain = [slice(None) if s.step is not None and s.step < 0 else s for s in slices]
    out = x[tuple(plain)]
    for axis, s in enumerate(slices):
        if s.step is not None and s.step < 0:
            wanted = range(*s.indices(x.shape[axis]))
            out = out.index_select(axis, torch.arange(len(wanted)) * wanted.step + wanted.start)
    return out


@op("slice_by_index", exact=True, by_shape=True)
def slice_by_index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    out = take(x, solve(list(x.shape), begin, end, stride, begin_mask, end_mask, squeeze_mask))
    dropped = [i for i, squeezed in enumerate(squeeze_mask or []) if squeezed]
    return out.squeeze(dropped) if dropped else out


@op("slice_by_size", exact=True, by_shape=True)
def slice_by_size(x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    """A size of -1 takes all that remains."""
    starts = [b + n if b < 0 else b for b, n in zip(begin, x.shape)]
    for b, s, n in zip(starts, size, x.shape):
        if not (0 <= b <= n and (s == -1 or 0 <= s <= n - b)):
            raise IndexError(f"begin {begin}, size {size} in a tensor of shape {list(x.shape)}")
    return x[tuple(slice(b, None if s == -1 else b + s) for b, s in zip(starts, size))]


@op("slice_update", exact=True, fresh=True, by_shape=True)
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """A copy of `x` with the slice replaced."""
    return update_in_place(x.clone(), update, begin, end, stride, begin_mask, end_mask, squeeze_mask)


def update_in_place(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """slice_update where the plan has proved that nobody reads `x` again."""
    return write(x, update, solve(list(x.shape), begin, end, stride, begin_mask, end_mask, squeeze_mask))


def overwritten(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """The part of `x` that update_in_place will write, as a view."""
    return forward(x, solve(list(x.shape), begin, end, stride, begin_mask, end_mask, squeeze_mask))[0]


def forward(x: Tensor, slices: list[slice]) -> tuple[Tensor, list[int]]:
    """`x[slices]` as a view whose steps all go forwards, and the axes along which they did not."""
    reversed_axes = [i for i, s in enumerate(slices) if s.step is not None and s.step < 0]
    turned = list(slices)
    for axis in reversed_axes:
        wanted = range(*slices[axis].indices(x.shape[axis]))
        turned[axis] = slice(wanted[-1], wanted[0] + 1, -wanted.step) if wanted else slice(0, 0)
    return x[tuple(turned)], reversed_axes


def write(x: Tensor, update: Tensor, slices: list[slice]) -> Tensor:
    """Write into `x` itself."""
    target, reversed_axes = forward(x, slices)
    value = update.reshape(target.shape)
    target.copy_(value.flip(reversed_axes) if reversed_axes else value)
    return x
