"""Operators that make or search tensors: fill, range, one_hot, topk, cumsum, ..."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.values import check_size, to_dtype


@op("shape", fresh=True)
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@op("fill", exact=True, fresh=True)
def fill(shape: list[int], value: Tensor | None = None) -> Tensor:
    value = torch.tensor(0.0) if value is None else value
    return value.reshape(()).expand(check_size(shape)).clone()


@op("fill_like", exact=True, fresh=True)
def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    return fill(list(ref_tensor.shape), value)


@op("range_1d", fresh=True)
def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    """start, start + step, ... below `end`."""
    kind = start.dtype
    count = max(0, math.ceil((end.item() - start.item()) / step.item()))
    check_size([count])
    steps = torch.arange(count, dtype=torch.float64 if kind.is_floating_point else torch.int64)
    return (start.item() + step.item() * steps).to(kind)


@op("one_hot", exact=True, fresh=True)
def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    """An index outside the vector gives a row of `off_value`."""
    check_size([*indices.shape, one_hot_vector_size])
    axis = axis + indices.dim() + 1 if axis < 0 else axis
    positions = torch.arange(one_hot_vector_size).reshape([-1] + [1] * (indices.dim() - axis))
    hot = indices.unsqueeze(axis) == positions
    on = torch.tensor(1, dtype=torch.int32) if on_value is None else on_value
    off = torch.tensor(0, dtype=on.dtype) if off_value is None else off_value
    return torch.where(hot, on, off)


@op("non_zero", fresh=True)
def non_zero(x: Tensor) -> Tensor:
    """One row of coordinates for each element that is not zero."""
    return x.nonzero().to(torch.int32)


@op("cumsum", fresh=True)
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    if reverse:
        return cumsum(x.flip(axis), axis, exclusive).flip(axis)
    total = x.cumsum(axis).to(x.dtype)
    return total - x if exclusive and not x.is_floating_point() else shifted(total, axis) if exclusive else total


def shifted(total: Tensor, axis: int) -> Tensor:
    """One step later, a zero first: exact where subtracting again would not be."""
    zero = torch.zeros_like(total.narrow(axis, 0, 1))
    return torch.cat([zero, total.narrow(axis, 0, total.shape[axis] - 1)], axis)


@op("topk", fresh=True, by_shape=True)
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Tensor | tuple[Tensor, Tensor]:
    """Equal values keep their order. k = -1 takes all (iOS 17)."""
    k = x.shape[axis] if k == -1 else k
    if not 0 <= k <= x.shape[axis]:
        raise ValueError(f"k = {k} of {x.shape[axis]} elements")
    ordered = torch.sort(x, dim=axis, descending=not ascending, stable=True)
    values, indices = ordered.values.narrow(axis, 0, k), ordered.indices.narrow(axis, 0, k)
    return (values, to_dtype(indices, output_indices_dtype)) if return_indices else values


@op("argsort", fresh=True)
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return torch.sort(x, dim=axis, descending=not ascending, stable=True).indices.to(torch.int32)


@op("band_part", exact=True, fresh=True, by_shape=True)
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Keeps `lower` diagonals below and `upper` above the main one; negative keeps all."""
    m, n = x.shape[-2:]
    below = torch.arange(m).unsqueeze(1) - torch.arange(n)
    keep = torch.ones(m, n, dtype=torch.bool)
    keep = keep & (below <= lower) if lower >= 0 else keep
    keep = keep & (-below <= upper) if upper >= 0 else keep
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype))
