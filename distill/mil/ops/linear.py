"""Products: matmul, linear, einsum, attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.run import Run


def product(run: Run, x: Tensor, y: Tensor) -> Tensor:
    """From iOS 17 integers may meet floats."""
    if x.is_floating_point() != y.is_floating_point():
        x, y = x.float(), y.float()
    return run.policy.matmul(x, y)


@op("matmul", fresh=True)
def matmul(run: Run, x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """Transposition has no effect on a vector."""
    if transpose_x and x.dim() > 1:
        x = x.transpose(-1, -2)
    if transpose_y and y.dim() > 1:
        y = y.transpose(-1, -2)
    return product(run, x, y)


@op("linear", fresh=True)
def linear(run: Run, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = product(run, x, weight.t())
    return out if bias is None else out + bias


# "nchw,nwhu->nchu" and "chw,whr->chr" with letters numbered as they come, by rank
_EINSUM: dict[int, list[int | str]] = {
    4: [0, 1, 2, 3, ",", 0, 3, 2, 4, "-", ">", 0, 1, 2, 4],
    3: [0, 1, 2, ",", 2, 1, 3, "-", ">", 0, 1, 3],
}


@op("einsum", fresh=True)
def einsum(run: Run, values: list[Tensor], equation: str) -> Tensor:
    """MIL allows "nchw,nwhu->nchu" and "chw,whr->chr", in any letters: a matmul over axis -1 and -3, batched over
    the others.
    """
    x, y = values
    letters = {letter: name for name, letter in enumerate(dict.fromkeys(c for c in equation if c.isalpha()))}
    pattern = [letters.get(c, c) for c in equation.replace(" ", "")]
    if pattern != _EINSUM.get(x.dim()):
        raise ValueError(f"equation {equation!r} for {x.dim()} dimensions: not one that MIL allows")
    return run.policy.matmul(x.transpose(-3, -2), y.transpose(-3, -2)).transpose(-3, -2)


@op("scaled_dot_product_attention", fresh=True)
def scaled_dot_product_attention(
    run: Run, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(E) + mask) V; a boolean mask says what takes part."""
    scores = run.policy.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return run.policy.matmul(run.policy.softmax(scores, -1), value)
