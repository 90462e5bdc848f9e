"""Gather and scatter.

Until iOS 16 a negative index counts from the end; from iOS 17 it is out of bounds, as is one that is too
large: an error with `validate_indices`, else undefined but memory safe. Undefined is: negative ones still
count from the end, the rest is clamped, and the policy `strict` is told.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.run import Run


def normalise(run: Run, indices: Tensor, size: int, validate: bool) -> Tensor:
    """Indices into a dimension of `size`, as int64 in [0, size)."""
    indices = indices.long()
    if indices.numel() == 0:
        return indices
    low, high = (int(v) for v in torch.aminmax(indices))
    if validate and (low < 0 or high >= size):
        raise IndexError(f"index {low if low < 0 else high} is out of bounds for a dimension of size {size}")
    if size == 0:
        raise IndexError("an index into a dimension of size 0")
    if low < 0:
        indices = torch.where(indices < 0, indices + size, indices)
    if low < -size or high >= size:
        outside = int(((indices < 0) | (indices >= size)).sum())
        run.policy.report("index", "gather/scatter", "indices", outside, indices.numel())
        indices = indices.clamp(0, size - 1)
    return indices


@op("gather", exact=True, fresh=True)
def gather(
    run: Run,
    x: Tensor,
    indices: Tensor,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool = False,
) -> Tensor:
    """x.shape[:axis] + indices.shape[batch_dims:] + x.shape[axis + 1:]; the first `batch_dims` go in step."""
    axis %= x.dim()
    indices = normalise(run, indices, x.shape[axis], validate_indices)
    if batch_dims == 0:
        picked = x.index_select(axis, indices.reshape(-1))
        return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])
    batch_shape = x.shape[:batch_dims]
    batch = math.prod(batch_shape)
    rows = x.reshape(batch, *x.shape[batch_dims:])
    wanted = indices.reshape(batch, -1)
    picked = torch.stack([r.index_select(axis - batch_dims, i) for r, i in zip(rows, wanted)])
    return picked.reshape(x.shape[:axis] + indices.shape[batch_dims:] + x.shape[axis + 1 :])


@op("gather_along_axis", exact=True, fresh=True)
def gather_along_axis(
    run: Run, x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False
) -> Tensor:
    """As numpy's take_along_axis: the other dimensions broadcast."""
    indices = normalise(run, indices, x.shape[axis], validate_indices)
    return torch.take_along_dim(x, indices, axis)


@op("gather_nd", exact=True, fresh=True)
def gather_nd(
    run: Run, x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    """The last dimension of `indices` is a coordinate into x.shape[batch_dims:]."""
    depth = indices.shape[-1]
    coordinates = [
        normalise(run, indices[..., i], x.shape[batch_dims + i], validate_indices) for i in range(depth)
    ]
    leading = indices.shape[:-1]
    for d in range(batch_dims):
        counter = torch.arange(x.shape[d]).reshape([-1 if i == d else 1 for i in range(len(leading))])
        coordinates.insert(d, counter.expand(leading))
    return x[tuple(coordinates)] if coordinates else x.expand(*leading, *x.shape).clone()


_REDUCE = {"add": "sum", "sub": "sum", "mul": "prod", "div": "prod", "max": "amax", "min": "amin"}


def scattered(data: Tensor, axis: int, index: Tensor, updates: Tensor, mode: str) -> Tensor:
    """Element-wise scatter along one axis; `index` has the shape of `updates`."""
    if mode == "update":
        return data.scatter(axis, index, updates)
    if mode not in _REDUCE:
        raise ValueError(f"unknown mode {mode!r}")
    if mode == "sub":
        updates = -updates
    if mode == "div":
        updates = 1.0 / updates
        return data.double().scatter_reduce(axis, index, updates.double(), "prod").to(data.dtype)
    return data.scatter_reduce(axis, index, updates, _REDUCE[mode])


@op("scatter", fresh=True)
def scatter(
    run: Run,
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """Whole slices: updates.shape = data.shape[:axis] + indices.shape + data.shape[axis + 1:]."""
    axis %= data.dim()
    indices = normalise(run, indices, data.shape[axis], validate_indices).reshape(-1)
    updates = updates.reshape(data.shape[:axis] + indices.shape + data.shape[axis + 1 :])
    index = indices.reshape([-1 if d == axis else 1 for d in range(data.dim())]).expand(updates.shape)
    return scattered(data, axis, index, updates, mode)


@op("scatter_along_axis", fresh=True)
def scatter_along_axis(
    run: Run,
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    index = normalise(run, indices, data.shape[axis], validate_indices)
    return scattered(data, axis, index, updates, mode)


@op("scatter_nd", fresh=True)
def scatter_nd(
    run: Run,
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """The last dimension of `indices` is a coordinate; `updates` holds the slices that it points at."""
    depth = indices.shape[-1]
    row = torch.zeros(indices.shape[:-1], dtype=torch.long)
    for i in range(depth):
        row = row * data.shape[i] + normalise(run, indices[..., i], data.shape[i], validate_indices)
    width = math.prod(data.shape[depth:])
    flat = data.reshape(-1, width)
    index = row.reshape(-1, 1).expand(-1, width)
    return scattered(flat, 0, index, updates.reshape(-1, width), mode).reshape(data.shape)
