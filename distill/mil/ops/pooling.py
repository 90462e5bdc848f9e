"""Pooling over windows of the spatial dimensions of (N, C, *spatial), one dimension after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.mil.ops.conv import padded, padding
from distill.mil.ops.registry import op
from distill.mil.run import Run


class Windows(NamedTuple):
    """The windows of one spatial dimension, and what is added to the input for them."""

    size: int
    kernel: int
    stride: int
    before: int
    after: int
    beyond: int  # added by ceil_mode to fill the last window


@op("max_pool", exact=True, fresh=True)
def max_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Padding never wins."""
    layout = windows(x, kernel_sizes, pad_type, strides, pad, ceil_mode)
    x = widened(x, layout, -math.inf)
    for dim, one in enumerate(layout, 2):
        x = x.unfold(dim, one.kernel, one.stride).amax(-1)
    return x


@op("avg_pool", fresh=True)
def avg_pool(
    run: Run,
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    """What ceil_mode adds is never counted, padding unless it is excluded."""
    layout = windows(x, kernel_sizes, pad_type, strides, pad, ceil_mode)
    total = window_sum(run, widened(x, layout, 0.0), layout)
    for dim, one in enumerate(layout, 2):
        counts = torch.zeros(one.size + one.before + one.after + one.beyond)
        inside = one.size if exclude_padding_from_average else one.size + one.before + one.after
        counts.narrow(0, one.before if exclude_padding_from_average else 0, inside).fill_(1)
        count = counts.unfold(0, one.kernel, one.stride).sum(-1).clamp(min=1)
        total = total / count.reshape([-1] + [1] * (x.dim() - dim - 1))
    return total


@op("l2_pool", fresh=True)
def l2_pool(
    run: Run,
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """The square root of the sum of squares."""
    layout = windows(x, kernel_sizes, pad_type, strides, pad, ceil_mode)
    return window_sum(run, widened(x * x, layout, 0.0), layout).sqrt()


def window_sum(run: Run, x: Tensor, layout: Sequence[Windows]) -> Tensor:
    for dim, one in enumerate(layout, 2):
        x = run.policy.sum(x.unfold(dim, one.kernel, one.stride), [-1], False)
    return x


def widened(x: Tensor, layout: Sequence[Windows], value: float) -> Tensor:
    return padded(x, [(one.before, one.after + one.beyond) for one in layout], value)


def windows(
    x: Tensor, kernel_sizes: list[int], pad_type: str, strides: list[int] | None, pad: list[int] | None, ceil_mode: bool
) -> list[Windows]:
    rank = x.dim() - 2
    strides = strides or [1] * rank
    if not 1 <= rank <= 3 or len(kernel_sizes) != rank or len(strides) != rank:
        raise ValueError(f"kernel_sizes {kernel_sizes} and strides {strides} for an input of {x.dim()} dimensions")
    if min(kernel_sizes) < 1 or min(strides) < 1:
        raise ValueError(f"kernel_sizes {kernel_sizes} and strides {strides} must be positive")
    pads = padding(x.shape[2:], kernel_sizes, strides, pad_type, pad)
    if any(before < 0 or after < 0 for before, after in pads):
        raise ValueError(f"pad {pad} must not be negative")
    layout = []
    for size, kernel, stride, (before, after) in zip(x.shape[2:], kernel_sizes, strides, pads):
        beyond = overhang(size, kernel, stride, before, after) if ceil_mode else 0
        layout.append(Windows(size, kernel, stride, before, after, beyond))
    return layout


def overhang(size: int, kernel: int, stride: int, before: int, after: int) -> int:
    """How far the last window of ceil_mode reaches beyond the padded input."""
    count = math.ceil((size + before + after - kernel) / stride) + 1
    if (count - 1) * stride >= size + before and before + after > 0:
        count -= 1  # the last window would lie in the padding
    return max(0, (count - 1) * stride + kernel - size - before - after)
