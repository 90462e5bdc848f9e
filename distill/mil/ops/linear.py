"""Products: matmul, linear, einsum, convolution, attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.mil.ops.activation import per_channel
from distill.mil.ops.registry import op
from distill.mil.run import Run


@op("matmul", fresh=True)
def matmul(run: Run, x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """Transposition has no effect on a vector."""
    if transpose_x and x.dim() > 1:
        x = x.transpose(-1, -2)
    if transpose_y and y.dim() > 1:
        y = y.transpose(-1, -2)
    return run.policy.matmul(x, y)


@op("linear", fresh=True)
def linear(run: Run, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = run.policy.matmul(x, weight.t())
    return product if bias is None else product + bias


@op("einsum", fresh=True)
def einsum(run: Run, values: list[Tensor], equation: str) -> Tensor:
    """MIL allows "nchw,nwhu->nchu" and "chw,whr->chr": a matmul over axis -1 and -3, batched over the
    others.
    """
    x, y = values
    return run.policy.matmul(x.transpose(-3, -2), y.transpose(-3, -2)).transpose(-3, -2)


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
    ones = [1] * (x.dim() - 2)
    strides, dilations = strides or ones, dilations or ones
    unpadded = pad_type != "custom" or not any(pad or [])
    if weight[0, 0].numel() == 1 and strides == ones and groups == 1 and unpadded:
        product = run.policy.matmul(weight.reshape(weight.shape[0], -1), x.flatten(2))  # a 1x1 kernel: one matmul
        product = product.reshape(x.shape[0], -1, *x.shape[2:])
    else:
        x = F.pad(x, padding(x, weight, strides, pad_type, pad, dilations))
        product = run.policy.conv(x, weight, strides, dilations, groups)
    return product if bias is None else product + per_channel(bias, product)


def padding(
    x: Tensor, weight: Tensor, strides: list[int], pad_type: str, pad: list[int] | None, dilations: list[int]
) -> list[int]:
    """Zeros to add, in torch's order (last dimension first)."""
    pairs = []
    for i, size in enumerate(x.shape[2:]):
        if pad_type == "valid":
            pair = (0, 0)
        elif pad_type == "custom":
            assert pad is not None
            pair = (pad[2 * i], pad[2 * i + 1])
        elif pad_type in ("same", "same_lower"):
            kernel = (weight.shape[2 + i] - 1) * dilations[i] + 1
            total = max(0, (math.ceil(size / strides[i]) - 1) * strides[i] + kernel - size)
            small, large = total // 2, total - total // 2
            pair = (small, large) if pad_type == "same" else (large, small)
        else:
            raise ValueError(f"unknown pad_type {pad_type!r}")
        pairs.append(pair)
    return [n for pair in reversed(pairs) for n in pair]


@op("scaled_dot_product_attention", fresh=True)
def scaled_dot_product_attention(
    run: Run, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(E) + mask) V; a boolean mask says what takes part."""
    scores = run.policy.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return run.policy.matmul(torch.softmax(scores, -1), value)
