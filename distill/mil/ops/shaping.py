"""Operators that move values about without changing them: reshape, transpose, split, concat, ..."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.values import check_size

_MOST_PARTS = 2**16  # of nothing there are as many as one likes


@op("reshape", exact=True, by_shape=True)
def reshape(x: Tensor, shape: list[int]) -> Tensor:
    """One -1 takes what is left. 0 keeps the dimension of `x`, counted from the right; where there is none, it is 1."""
    if x.numel() > 0:
        lead = len(shape) - x.dim()
        shape = [s if s else x.shape[i - lead] if i >= lead else 1 for i, s in enumerate(shape)]
    return x.reshape(shape)


@op("reshape_like", exact=True)
def reshape_like(
    x: Tensor, ref_tensors: list[Tensor], begins: list[int], ends: list[int], end_masks: list[bool]
) -> Tensor:
    """The shape is made of pieces of the shapes of `ref_tensors`."""
    shape: list[int] = []
    for ref, begin, end, masked in zip(ref_tensors, begins, ends, end_masks):
        shape += ref.shape[begin:] if masked else ref.shape[begin:end]
    return x.reshape(shape)


@op("transpose", exact=True)
def transpose(x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


@op("expand_dims", exact=True)
def expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    """Axes are positions in the output."""
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@op("squeeze", exact=True)
def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    """Dimensions that are not 1 are left alone."""
    return x.squeeze() if axes is None else x.squeeze(axes)


@op("flatten2d", exact=True)
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("split", exact=True)
def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> tuple[Tensor, ...]:
    size = x.shape[axis]
    if split_sizes is None:
        if not num_splits or size % num_splits or num_splits > _MOST_PARTS:
            raise ValueError(f"{size} does not divide into {num_splits} parts")
        split_sizes = [size // num_splits] * num_splits
    return torch.split(x, split_sizes, axis)


@op("concat", exact=True, fresh=True)
def concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    """`interleave` deals the slices in turn; scalars become a vector."""
    if values[0].dim() == 0:
        return torch.stack(values)
    if not interleave:
        return torch.cat(values, axis)
    axis %= values[0].dim()
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


@op("stack", exact=True, fresh=True)
def stack(values: list[Tensor], axis: int) -> Tensor:
    return torch.stack(values, axis)


@op("tile", exact=True, fresh=True)
def tile(x: Tensor, reps: list[int]) -> Tensor:
    if len(reps) != x.dim():
        raise ValueError(f"{len(reps)} repetitions for rank {x.dim()}")
    check_size([n * r for n, r in zip(x.shape, reps)])
    return x.repeat(reps)


@op("reverse", exact=True, fresh=True)
def reverse(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.flip(list(range(x.dim())) if axes is None else axes)


@op("reverse_sequence", exact=True, fresh=True, by_shape=True)
def reverse_sequence(x: Tensor, lengths: list[int], seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """The first lengths[i] elements along `seq_axis` of batch member i are reversed."""
    out = x.clone()
    axis = seq_axis % x.dim()
    axis -= axis > batch_axis % x.dim()
    for i, length in enumerate(lengths):
        row = out.select(batch_axis, i)
        row.narrow(axis, 0, length).copy_(x.select(batch_axis, i).narrow(axis, 0, length).flip(axis))
    return out


@op("pad", exact=True)
def pad(x: Tensor, pad: list[int], mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """(before, after) for the last len(pad) / 2 dimensions."""
    pairs = list(zip(pad[::2], pad[1::2]))
    first = x.dim() - len(pairs)
    if first < 0 or len(pad) % 2 or any(n < 0 for n in pad):
        raise ValueError(f"pad {pad} for rank {x.dim()}")
    check_size([n + sum(pairs[d - first]) if d >= first else n for d, n in enumerate(x.shape)])
    if mode == "constant":
        return F.pad(x, [n for pair in reversed(pairs) for n in pair], value=constant_val)
    for axis, (before, after) in enumerate(pairs, first):
        if before or after:
            x = x.index_select(axis, padded_index(x.shape[axis], before, after, mode))
    return x


def padded_index(size: int, before: int, after: int, mode: str) -> Tensor:
    """Where each padded position comes from: mirrored without the edge, or the edge itself."""
    index = torch.arange(-before, size + after)
    if mode == "replicate":
        return index.clamp(0, size - 1)
    if mode != "reflect":
        raise ValueError(f"unknown mode {mode!r}")
    if max(before, after) >= size:
        raise ValueError(f"reflecting {max(before, after)} elements of {size}")
    return size - 1 - (size - 1 - index.abs()).abs()


@op("depth_to_space", exact=True)
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """(N, block row, block column, C, H, W) -> (N, C, H x block, W x block): depth varies slowest within the
    block.
    """
    n, c, h, w = x.shape
    b = block_size
    return x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * b, w * b)


@op("space_to_depth", exact=True)
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    n, c, h, w = x.shape
    b = block_size
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // b, w // b)


@op("space_to_batch", exact=True)
def space_to_batch(x: Tensor, block_shape: list[int], paddings: list[int]) -> Tensor:
    """(N, C, rows x block, columns x block) -> (block row, block column, N, C, rows, columns), the first three
    merged.
    """
    top, bottom, left, right = paddings
    padded = F.pad(x, [left, right, top, bottom])
    n, c, h, w = padded.shape
    rows, columns = block_shape
    split = padded.reshape(n, c, h // rows, rows, w // columns, columns)
    return split.permute(3, 5, 0, 1, 2, 4).reshape(-1, c, h // rows, w // columns)


@op("batch_to_space", exact=True)
def batch_to_space(x: Tensor, block_shape: list[int], crops: list[int]) -> Tensor:
    """The inverse of space_to_batch, then `crops` (top, bottom, left, right) cut off."""
    top, bottom, left, right = crops
    n, c, h, w = x.shape
    rows, columns = block_shape
    split = x.reshape(rows, columns, n // (rows * columns), c, h, w)
    whole = split.permute(2, 3, 4, 0, 5, 1).reshape(-1, c, h * rows, w * columns)
    return whole[:, :, top : h * rows - bottom, left : w * columns - right]


@op("pixel_shuffle", exact=True)
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    return F.pixel_shuffle(x, upscale_factor)


@op("pixel_unshuffle", exact=True)
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, downscale_factor)


@op("sliding_windows", exact=True)
def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    """The windows' elements become a new dimension after `axis`."""
    axis %= x.dim()
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)
