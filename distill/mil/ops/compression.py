"""Compressed constants (constexpr_*), and quantize/dequantize of activations.

Written from MIL's documentation. The interpreter evaluates a constexpr once and keeps the result with the
program.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from distill.mil import dtypes
from distill.mil.ops.registry import op
from distill.mil.values import check_size, to_dtype


def over_axis(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A scalar, or a vector along `axis`, shaped to broadcast against `x`."""
    if values.dim() == 0 or axis is None:
        return values
    return values.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


def blockwise(values: Tensor, x: Tensor) -> Tensor:
    """Repeat each value over its block: the block size is x.shape[i] / values.shape[i]."""
    if values.dim() != x.dim() or any(v == 0 or n % v for n, v in zip(x.shape, values.shape)):
        raise ValueError(f"blocks of shape {list(values.shape)} do not divide {list(x.shape)}")
    for axis, (n, v) in enumerate(zip(x.shape, values.shape)):
        if v not in (1, n):
            values = values.repeat_interleave(n // v, axis)
    return values


@op("constexpr_affine_dequantize", fresh=True)
def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int) -> Tensor:
    """scale * (data - zero_point)."""
    shift = over_axis(zero_point.float(), quantized_data, axis)
    return over_axis(scale, quantized_data, axis) * (quantized_data.float() - shift)


@op("constexpr_blockwise_shift_scale", fresh=True)
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """scale * (data - offset), one scale and offset a block."""
    shifted = data.float() if offset is None else data.float() - blockwise(offset.float(), data)
    return blockwise(scale, data) * shifted


@op("constexpr_cast")
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    return to_dtype(source_val, output_dtype)


@op("constexpr_lut_to_dense", exact=True, fresh=True)
def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, shape: list[int] | None = None, vector_axis: int | None = None
) -> Tensor:
    """iOS 16: a vector of palettes, indices packed into bytes, `shape`. iOS 18: see `lut_blocks`."""
    if shape is None:
        return lut_blocks(indices, lut, vector_axis)
    bits = int(math.log2(lut.numel()))
    count = math.prod(check_size(shape))
    if lut.numel() != 2**bits or indices.numel() != (count * bits + 7) // 8:
        raise ValueError(f"{indices.numel()} bytes of {bits}-bit indices for shape {shape}")
    return lut[unpacked(indices, bits, count).long()].reshape(shape)


def unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    name = "uint8" if bits == 8 else f"uint{bits}"
    return torch.from_numpy(np.array(dtypes.unpack(name, packed.numpy(), count)))


def lut_blocks(indices: Tensor, lut: Tensor, vector_axis: int | None) -> Tensor:
    """`lut` has the rank of `indices` plus two: one table of (palettes, vector) for each block of indices.

    A vector of more than one element is laid out along `vector_axis`.
    """
    rank = indices.dim()
    *blocks, palettes, width = lut.shape
    if len(blocks) != rank or any(b == 0 or n % b for n, b in zip(indices.shape, blocks)):
        raise ValueError(f"tables of shape {list(lut.shape)} for indices of shape {list(indices.shape)}")
    if indices.numel() and int(indices.max()) >= palettes:
        raise ValueError(f"index {int(indices.max())} into {palettes} palettes")
    table = torch.arange(math.prod(blocks)).reshape(blocks)
    rows = blockwise(table, indices) * palettes + indices.long()
    dense = lut.reshape(-1, width)[rows]  # (*indices.shape, width)
    if vector_axis is None or width == 1:
        if width != 1:
            raise ValueError(f"vectors of {width} without a vector_axis")
        return dense.squeeze(-1)
    axis = vector_axis % rank
    return dense.movedim(-1, axis + 1).flatten(axis, axis + 1)


@op("constexpr_sparse_to_dense", exact=True, fresh=True)
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: list[int] | None = None) -> Tensor:
    """iOS 16: a packed mask and `shape`; iOS 18: the mask is a uint1 tensor."""
    if shape is not None:
        mask = unpacked(mask, 1, math.prod(check_size(shape))).reshape(shape)
    where = mask != 0
    if int(where.sum()) != nonzero_data.numel():
        raise ValueError(f"{nonzero_data.numel()} values for {int(where.sum())} set bits")
    dense = torch.zeros(where.shape, dtype=nonzero_data.dtype)
    dense[where] = nonzero_data
    return dense


@op("constexpr_lut_to_sparse", exact=True, fresh=True)
def constexpr_lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """(mask, values): what lut_to_dense gives, where the mask is set."""
    indices = constexpr_sparse_to_dense(indices_nonzero_data, indices_mask)
    dense = lut_blocks(indices, lut, vector_axis)
    mask = indices_mask
    if vector_axis is not None:
        mask = mask.repeat_interleave(lut.shape[-1], vector_axis)
    return mask, dense[mask != 0]


@op("constexpr_sparse_blockwise_shift_scale", fresh=True)
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(mask, values): blockwise_shift_scale of the values that the mask keeps."""
    data = constexpr_sparse_to_dense(nonzero_data, data_mask)
    return data_mask, constexpr_blockwise_shift_scale(data, scale, offset)[data_mask != 0]


@op("dequantize", fresh=True)
def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None) -> Tensor:
    """scale * (input - zero_point)."""
    shifted = input.float() if zero_point is None else input.float() - over_axis(zero_point.float(), input, axis)
    return over_axis(scale, input, axis) * shifted


@op("quantize", fresh=True)
def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """clip(round(input / scale) + zero_point)."""
    low, high = (-128, 127) if output_dtype == "int8" else (0, 255)
    steps = (input / over_axis(scale, input, axis)).round()
    steps = steps if zero_point is None else steps + over_axis(zero_point.float(), input, axis)
    return to_dtype(steps.clamp(low, high), output_dtype)
