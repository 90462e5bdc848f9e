"""Gather and scatter.

Until iOS 16 a negative index counts from the end; from iOS 17 it is out of bounds, as is one that is too
large: an error with `validate_indices`, else undefined but memory safe. Undefined is: a gather counts
negative ones from the end and clamps the rest, a scatter leaves them out; the policy `strict` is told of
both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.run import Run
from distill.mil.values import check_size


def dimension(axis: int, x: Tensor) -> int:
    """`axis` counted from the start."""
    if not -x.dim() <= axis < x.dim():
        raise IndexError(f"axis {axis} of {x.dim()} dimensions")
    return axis % x.dim()


def normalise(run: Run, indices: Tensor, size: int, validate: bool | None) -> Tensor:
    """Indices into a dimension of `size`, as int64 in [0, size). `validate` is None before iOS 17."""
    indices = indices.long()
    if indices.numel() == 0:
        return indices
    low, high = (int(v) for v in torch.aminmax(indices))
    if validate and (low < 0 or high >= size):
        raise IndexError(f"index {low if low < 0 else high} is out of bounds for a dimension of size {size}")
    if size == 0:
        raise IndexError("an index into a dimension of size 0")
    lowest = -size if validate is None else 0
    if low < lowest or high >= size:
        outside = int(((indices < lowest) | (indices >= size)).sum())
        run.policy.report("index", "gather/scatter", "indices", outside, indices.numel())
    if low < 0:
        indices = torch.where(indices < 0, indices + size, indices)
    return indices if -size <= low and high < size else indices.clamp(0, size - 1)


@op("gather", exact=True, fresh=True, by_shape=True)
def gather(
    run: Run,
    x: Tensor,
    indices: Tensor,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool | None = None,
) -> Tensor:
    """x.shape[:axis] + indices.shape[batch_dims:] + x.shape[axis + 1:]; the first `batch_dims` go in step."""
    axis = dimension(axis, x)
    indices = normalise(run, indices, x.shape[axis], validate_indices)
    if batch_dims == 0:
        picked = x.index_select(axis, indices.reshape(-1))
        return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])
    leading, between = x.shape[:batch_dims], x.shape[batch_dims:axis]
    if indices.shape[:batch_dims] != leading or axis < batch_dims:
        raise ValueError(f"{batch_dims} batch dimensions before axis {axis}")
    rows = x.reshape(math.prod(leading), math.prod(between), x.shape[axis], math.prod(x.shape[axis + 1 :]))
    wanted = indices.reshape(math.prod(leading), math.prod(indices.shape[batch_dims:]))
    batch = torch.arange(len(wanted)).reshape(-1, 1)
    picked = rows.movedim(1, 2)[batch, wanted].movedim(2, 1)  # (batch, between, wanted, rest)
    return picked.reshape(x.shape[:axis] + indices.shape[batch_dims:] + x.shape[axis + 1 :])


@op("gather_along_axis", exact=True, fresh=True, by_shape=True)
def gather_along_axis(
    run: Run, x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool | None = None
) -> Tensor:
    """As numpy's take_along_axis: the other dimensions broadcast."""
    axis = dimension(axis, x)
    indices = normalise(run, indices, x.shape[axis], validate_indices)
    return torch.take_along_dim(x, indices, axis)


@op("gather_nd", exact=True, fresh=True, by_shape=True)
def gather_nd(
    run: Run, x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool | None = None
) -> Tensor:
    """The last dimension of `indices` is a coordinate into x.shape[batch_dims:]."""
    depth = indices.shape[-1]
    coordinates = [normalise(run, indices[..., i], x.shape[batch_dims + i], validate_indices) for i in range(depth)]
    leading = indices.shape[:-1]
    for d in range(batch_dims):
        counter = torch.arange(x.shape[d]).reshape([-1 if i == d else 1 for i in range(len(leading))])
        coordinates.insert(d, counter.expand(leading))
    if not coordinates:
        return x.expand(check_size([*leading, *x.shape])).clone()
    picked = x[tuple(coordinates)]
    return picked if leading else picked.clone()  # one coordinate is a view for torch


_REDUCE = {"add": "sum", "sub": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def inside(run: Run, indices: Tensor, size: int, validate: bool | None) -> tuple[Tensor, Tensor]:
    """(indices, which of them are in bounds)."""
    if validate is not False:
        indices = normalise(run, indices, size, validate)
        return indices, torch.ones(indices.shape, dtype=torch.bool)
    keep = (indices >= 0) & (indices < size)
    if not keep.all():
        run.policy.report("index", "scatter", "indices", int((~keep).sum()), indices.numel())
    return indices.long(), keep


def scattered(data: Tensor, axis: int, index: Tensor, updates: Tensor, mode: str) -> Tensor:
    """Element-wise scatter along one axis; `index` has the shape of `updates`."""
    if mode == "update":
        return data.scatter(axis, index, updates)
    if mode == "div":
        divisor = torch.ones(data.shape, dtype=torch.float64)
        divisor.scatter_reduce_(axis, index, updates.double(), "prod")
        return (data / divisor).to(data.dtype)
    if mode not in _REDUCE:
        raise ValueError(f"unknown mode {mode!r}")
    return data.scatter_reduce(axis, index, -updates if mode == "sub" else updates, _REDUCE[mode])


@op("scatter", fresh=True, by_shape=True)
def scatter(
    run: Run,
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool | None = None,
) -> Tensor:
    """Whole slices: updates.shape = data.shape[:axis] + indices.shape + data.shape[axis + 1:]."""
    axis = dimension(axis, data)
    indices, keep = inside(run, indices.reshape(-1), data.shape[axis], validate_indices)
    updates = updates.reshape(data.shape[:axis] + indices.shape + data.shape[axis + 1 :])
    updates = updates.index_select(axis, keep.nonzero().reshape(-1))
    index = indices[keep].reshape([-1 if d == axis else 1 for d in range(data.dim())])
    return scattered(data, axis, index.expand(updates.shape), updates, mode)


@op("scatter_along_axis", fresh=True, by_shape=True)
def scatter_along_axis(
    run: Run,
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool | None = None,
) -> Tensor:
    """Element by element; every element's place in the flat array is worked out first."""
    axis = dimension(axis, data)
    if any(n > size for d, (n, size) in enumerate(zip(indices.shape, data.shape)) if d != axis):
        raise ValueError(f"indices of shape {list(indices.shape)} into data of shape {list(data.shape)}")
    indices, keep = inside(run, indices, data.shape[axis], validate_indices)
    place = torch.zeros_like(indices)
    for d, size in enumerate(data.shape):
        counter = torch.arange(indices.shape[d]).reshape([-1 if i == d else 1 for i in range(data.dim())])
        place = place * size + (indices if d == axis else counter)
    return scattered(data.reshape(-1), 0, place[keep], updates[keep], mode).reshape(data.shape)


@op("scatter_nd", fresh=True, by_shape=True)
def scatter_nd(
    run: Run,
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    mode: str = "add",
    validate_indices: bool | None = None,
) -> Tensor:
    """The last dimension of `indices` is a coordinate; `updates` holds the slices that it points at."""
    depth = indices.shape[-1]
    row = torch.zeros(indices.shape[:-1], dtype=torch.long)
    keep = torch.ones(row.shape, dtype=torch.bool)
    for i in range(depth):
        coordinate, good = inside(run, indices[..., i], data.shape[i], validate_indices)
        row, keep = row * data.shape[i] + coordinate, keep & good
    width = math.prod(data.shape[depth:])
    flat = data.reshape(-1, width)
    index = row[keep].reshape(-1, 1).expand(-1, width)
    wanted = updates.reshape(*row.shape, width)[keep]
    return scattered(flat, 0, index, wanted, mode).reshape(data.shape)
