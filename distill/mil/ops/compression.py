"""Compressed constants (constexpr_*), from MIL's documentation.

A constexpr is evaluated once, and its result kept with the program. What is looked up or spread goes through
numpy: its fancy and boolean indexing needs no 64-bit copy of the indices. Arithmetic is in place, on one float32
copy. So decoding a weight takes less than three times its float32 size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distill.mil import dtypes
from distill.mil.ops.quantization import over_axis
from distill.mil.ops.registry import op
from distill.mil.run import Run
from distill.mil.values import check_size, to_dtype

_WIDTHS = (1, 2, 3, 4, 6, 8)  # bits of an index


@op("constexpr_affine_dequantize")
def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int) -> Tensor:
    """scale * (data - zero_point), in float32; scalars, or one of each along `axis`."""
    values = quantized_data.to(torch.float32, copy=True)
    return values.sub_(over_axis(zero_point.float(), values, axis)).mul_(over_axis(scale, values, axis))


@op("constexpr_blockwise_shift_scale")
def constexpr_blockwise_shift_scale(run: Run, data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """scale * (data - offset), one scale and offset a block.

    MIL does not say where an fp16 result is rounded. As in coremltools, the data and the difference are rounded
    too: it matters only where the data or the offset are floats.
    """
    halves = run.policy.rounds
    values = data.to(torch.float32, copy=True)
    if halves and data.is_floating_point():
        values.copy_(values.half())
    blocks = in_blocks(values, scale.shape)
    if offset is not None:
        if offset.shape != scale.shape:
            raise ValueError(f"offsets of shape {list(offset.shape)} for scales of shape {list(scale.shape)}")
        blocks.sub_(per_block(offset.float()))
        if halves and (data.is_floating_point() or offset.is_floating_point()):
            blocks.copy_(blocks.half())
    return blocks.mul_(per_block(scale)).reshape(data.shape)


@op("constexpr_sparse_blockwise_shift_scale")
def constexpr_sparse_blockwise_shift_scale(
    run: Run, data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(mask, values): blockwise_shift_scale of the values that the mask keeps."""
    data = spread(nonzero_data, data_mask)
    return data_mask, kept(constexpr_blockwise_shift_scale(run, data, scale, offset), data_mask)


@op("constexpr_cast")
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    return to_dtype(source_val, output_dtype)


@op("constexpr_lut_to_dense", exact=True)
def constexpr_lut_to_dense(
    run: Run, indices: Tensor, lut: Tensor, shape: list[int] | None = None, vector_axis: int | None = None
) -> Tensor:
    """iOS 16: one palette, its indices packed into bytes, and `shape`. iOS 18: see `looked_up`."""
    if shape is None:
        return looked_up(run, indices, lut, vector_axis)
    bits = lut.numel().bit_length() - 1
    if lut.numel() != 2**bits or bits not in _WIDTHS:
        raise ValueError(f"a palette of {lut.numel()} values")
    return torch.from_numpy(lut.reshape(-1).numpy()[unpacked(indices, bits, shape)])


@op("constexpr_lut_to_sparse", exact=True)
def constexpr_lut_to_sparse(
    run: Run, indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """(mask, values): what lut_to_dense gives, where the mask is set. A vector repeats its bit of the mask."""
    dense = looked_up(run, spread(indices_nonzero_data, indices_mask), lut, vector_axis)
    width = lut.shape[-1]
    mask = indices_mask if width == 1 else indices_mask.repeat_interleave(width, vector_axis)
    return mask, kept(dense, mask)


@op("constexpr_sparse_to_dense", exact=True)
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: list[int] | None = None) -> Tensor:
    """iOS 16: a mask packed into bytes, and `shape`. iOS 18: the mask is a uint1 tensor."""
    return spread(nonzero_data, mask if shape is None else torch.from_numpy(unpacked(mask, 1, shape)))


def in_blocks(x: Tensor, counts: Sequence[int]) -> Tensor:
    """`x` with each dimension in two, (blocks, block size): counts[i] blocks along dimension i."""
    if x.dim() != len(counts) or any(c == 0 or n % c for n, c in zip(x.shape, counts)):
        raise ValueError(f"blocks of shape {list(counts)} do not divide {list(x.shape)}")
    return x.reshape([part for n, c in zip(x.shape, counts) for part in (c, n // c)])


def per_block(values: Tensor) -> Tensor:
    """One value a block, shaped to broadcast against `in_blocks`."""
    return values.reshape([part for c in values.shape for part in (c, 1)])


def looked_up(run: Run, indices: Tensor, lut: Tensor, vector_axis: int | None) -> Tensor:
    """`lut` has the rank of `indices` plus two: a table of (palettes, vector) for each block of indices.

    The elements of a vector follow each other along `vector_axis`.
    """
    *tables, palettes, width = lut.shape
    rows = in_blocks(indices, tables)
    if indices.dtype is not torch.uint8:
        raise ValueError(f"indices of type {indices.dtype}")
    if indices.numel() and int(indices.max()) >= palettes:
        raise ValueError(f"index {int(indices.max())} into {palettes} palettes")
    count = math.prod(tables)
    if count > 1:
        kind = next(k for k in (torch.int16, torch.int32, torch.int64) if count * palettes <= torch.iinfo(k).max)
        rows = rows.to(kind).add_(per_block(torch.arange(0, count * palettes, palettes, dtype=kind).reshape(tables)))
    if width == 1:
        return torch.from_numpy(lut.reshape(-1).numpy()[rows.numpy()]).reshape(indices.shape)
    if vector_axis is None or not -indices.dim() <= vector_axis < indices.dim():
        raise ValueError(f"vectors of {width} along axis {vector_axis} of {indices.dim()}")
    check_size([*indices.shape, width])
    run.reserve(indices.numel() * width * lut.element_size())  # numpy's memory is not seen otherwise
    dense = torch.from_numpy(lut.reshape(-1, width).numpy()[rows.numpy()]).reshape(*indices.shape, width)
    axis = vector_axis % indices.dim()
    return dense.movedim(-1, axis + 1).flatten(axis, axis + 1)


def unpacked(packed: Tensor, bits: int, shape: Sequence[int]) -> np.ndarray:
    """Unsigned integers of `bits` bits, packed into bytes, as an array of `shape`."""
    count = math.prod(check_size(shape))
    if packed.dtype is not torch.uint8 or packed.numel() != dtypes.packed_size(f"uint{bits}", count):
        raise ValueError(f"{packed.numel()} bytes of {bits}-bit integers for shape {list(shape)}")
    return np.array(dtypes.unpack(f"uint{bits}", packed.reshape(-1).numpy(), count)).reshape(shape)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is set, in row-major order; zeros elsewhere."""
    where = mask.numpy() != 0
    if values.numel() != np.count_nonzero(where):
        raise ValueError(f"{values.numel()} values for {np.count_nonzero(where)} set bits")
    dense = np.zeros(where.shape, values.numpy().dtype)
    dense[where] = values.reshape(-1).numpy()
    return torch.from_numpy(dense)


def kept(dense: Tensor, mask: Tensor) -> Tensor:
    """The inverse of `spread`."""
    return torch.from_numpy(dense.numpy()[mask.numpy() != 0])
