"""Convolutions, and the padding rules that they share with pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from distill.mil.ops.activation import per_channel
from distill.mil.ops.registry import op
from distill.mil.run import Run
from distill.mil.values import check_size


@op("conv", fresh=True)
def conv(
    run: Run,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """(N, C, *spatial) with (O, C / groups, *kernel)."""
    strides, dilations = per_dimension(x, weight, strides, "strides"), per_dimension(x, weight, dilations, "dilations")
    if groups < 1 or x.shape[1] != weight.shape[1] * groups:
        raise ValueError(f"{x.shape[1]} channels, weight {list(weight.shape)} and groups = {groups} do not agree")
    reach = extents(weight, dilations)
    pads = padding(x.shape[2:], reach, strides, pad_type, pad)
    if any(e > n + a + b for e, n, (a, b) in zip(reach, x.shape[2:], pads)):
        raise ValueError(f"a kernel that reaches {reach} over {list(x.shape[2:])}, padded by {pads}")
    pointwise = weight[0, 0].numel() == 1 and set(strides) == {1} and groups == 1
    if pointwise and not any(before or after for before, after in pads):
        product = run.policy.matmul(weight.reshape(weight.shape[0], -1), x.flatten(2))  # a 1x1 kernel: one matmul
        product = product.reshape(x.shape[0], -1, *x.shape[2:])
    else:
        product = run.policy.conv(padded(x, pads), weight, strides, dilations, groups)
    return product if bias is None else product + per_channel(bias, product)


@op("conv_transpose", fresh=True)
def conv_transpose(
    run: Run,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: list[int] | None = None,
    output_shape: list[int] | None = None,
    pad_type: str = "valid",
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """(N, C, *spatial) with (C, O / groups, *kernel): a convolution of `x` with zeros between its elements.

    Padding removes from the result what `conv` would have added to its input.
    """
    strides, dilations = per_dimension(x, weight, strides, "strides"), per_dimension(x, weight, dilations, "dilations")
    if groups < 1 or x.shape[1] != weight.shape[0] or x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} channels, weight {list(weight.shape)} and groups = {groups} do not agree")
    reach = extents(weight, dilations)
    sizes = transposed_sizes(x, reach, strides, pad_type, pad, output_shape)
    crops = padding(sizes, reach, strides, pad_type, pad)
    stuffed = spread(x, strides)
    pads = []
    for size, have, extent, (before, _) in zip(sizes, stuffed.shape[2:], reach, crops):
        left = extent - 1 - before
        pads.append((left, size + extent - 1 - have - left))
    product = run.policy.conv(padded(stuffed, pads), mirrored(weight, groups), [1] * len(sizes), dilations, groups)
    return product if bias is None else product + per_channel(bias, product)


@op("conv_quantized", fresh=True)
def conv_quantized(
    run: Run,
    x: Tensor,
    weight: Tensor,
    quantization_type: str,
    quant_scale: Tensor,
    quant_bias: Tensor,
    bias: Tensor | None = None,
    nbits: int = 8,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """conv with weight * quant_scale + quant_bias, one scale or one for each output channel."""
    if quantization_type != "linear":
        raise ValueError(f"quantization_type {quantization_type!r}: only 'linear' has a documented meaning")
    scale, shift = (q.reshape([-1] + [1] * (weight.dim() - 1)) for q in (quant_scale, quant_bias))
    return conv(run, x, weight * scale + shift, bias, strides, pad_type, pad, dilations, groups)


def per_dimension(x: Tensor, weight: Tensor, values: list[int] | None, name: str) -> list[int]:
    """One positive number for each spatial dimension; all ones where none are given."""
    rank = x.dim() - 2
    if not 1 <= rank <= 3 or weight.dim() != x.dim():
        raise ValueError(f"{x.dim()} dimensions with a kernel of {weight.dim()}: 3 to 5, the same in both")
    values = values or [1] * rank
    if len(values) != rank or min(values) < 1:
        raise ValueError(f"{name} {values}: expected {rank} positive numbers")
    return values


def extents(weight: Tensor, dilations: Sequence[int]) -> list[int]:
    """How far a dilated kernel reaches in each spatial dimension."""
    return [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations)]


def padding(
    sizes: Sequence[int],
    extents: Sequence[int],
    strides: Sequence[int],
    pad_type: str,
    pad: Sequence[int] | None,
) -> list[tuple[int, int]]:
    """Elements to add before and after each spatial dimension."""
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type == "custom":
        pad = pad or [0] * 2 * len(sizes)
        if len(pad) != 2 * len(sizes):
            raise ValueError(f"pad {list(pad)}: expected {2 * len(sizes)} numbers")
        return list(zip(pad[::2], pad[1::2]))
    if pad_type not in ("same", "same_lower"):
        raise ValueError(f"unknown pad_type {pad_type!r}")
    pairs = []
    for size, extent, stride in zip(sizes, extents, strides):
        total = max(0, (math.ceil(size / stride) - 1) * stride + extent - size)
        small, large = total // 2, total - total // 2
        pairs.append((small, large) if pad_type == "same" else (large, small))
    return pairs


def padded(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """`x` with its spatial dimensions padded, or cropped where a number is negative."""
    if not any(before or after for before, after in pads):
        return x
    check_size([*x.shape[:2], *(max(0, n + before + after) for n, (before, after) in zip(x.shape[2:], pads))])
    return F.pad(x, [n for pair in reversed(pads) for n in pair], value=value)


def transposed_sizes(
    x: Tensor,
    extents: Sequence[int],
    strides: Sequence[int],
    pad_type: str,
    pad: Sequence[int] | None,
    output_shape: Sequence[int] | None,
) -> list[int]:
    """The spatial dimensions of a transposed convolution."""
    if output_shape:
        if len(output_shape) != x.dim():
            raise ValueError(f"output_shape {list(output_shape)} for an input of {x.dim()} dimensions")
        sizes = list(output_shape[2:])
    elif pad_type in ("same", "same_lower"):
        sizes = [n * s for n, s in zip(x.shape[2:], strides)]
    else:
        pads = padding(x.shape[2:], extents, strides, pad_type, pad)
        sizes = [(n - 1) * s + e - b - a for n, e, s, (b, a) in zip(x.shape[2:], extents, strides, pads)]
    if min(sizes) < 1:
        raise ValueError(f"the result would have size {sizes}")
    return sizes


def spread(x: Tensor, strides: Sequence[int]) -> Tensor:
    """`x` with stride - 1 zeros between neighbours."""
    if set(strides) == {1}:
        return x
    shape = [*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], strides))]
    out = x.new_zeros(check_size(shape))
    out[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
    return out


def mirrored(weight: Tensor, groups: int) -> Tensor:
    """(C, O / groups, *kernel) as the (O, C / groups, *kernel), reversed, of the equal convolution."""
    inputs, outputs, *kernel = weight.shape
    grouped = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
    return grouped.reshape(groups * outputs, inputs // groups, *kernel).flip(list(range(2, weight.dim())))
