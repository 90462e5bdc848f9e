"""Quantize and dequantize at run time: activations in 8 bits."""

from __future__ import annotations

from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.values import to_dtype

_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


def over_axis(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A scalar, or a vector along `axis`, shaped to broadcast against `x`."""
    if values.dim() == 0:
        return values
    if values.dim() != 1 or axis is None or not -x.dim() <= axis < x.dim():
        raise ValueError(f"values of shape {list(values.shape)} along axis {axis} of {list(x.shape)}")
    if len(values) not in (1, x.shape[axis]):
        raise ValueError(f"{len(values)} values along axis {axis} of {list(x.shape)}")
    return values.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


@op("dequantize", fresh=True)
def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None) -> Tensor:
    """scale * (input - zero_point); scalars, or one of each along `axis`."""
    if zero_point is None:
        return input.float() * over_axis(scale, input, axis)
    shifted = input.float() - over_axis(zero_point.float(), input, axis)
    return shifted.mul_(over_axis(scale, input, axis))


@op("quantize", fresh=True)
def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """clip(round(input / scale) + zero_point); a tie rounds to the even integer."""
    if output_dtype not in _RANGES:
        raise ValueError(f"no quantized type {output_dtype!r}; there are {', '.join(sorted(_RANGES))}")
    steps = (input / over_axis(scale, input, axis)).round_()
    if zero_point is not None:
        steps += over_axis(zero_point.float(), input, axis)
    return to_dtype(steps.clamp_(*_RANGES[output_dtype]), output_dtype)
