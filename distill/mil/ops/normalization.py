"""Normalisation: layer, batch, instance, l2, local response."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.mil.ops.activation import per_channel
from distill.mil.ops.registry import op
from distill.mil.run import Run


def standardise(run: Run, x: Tensor, axes: list[int], epsilon: float) -> Tensor:
    """(x - mean) / sqrt(var + epsilon), with the biased variance."""
    count = math.prod(x.shape[a] for a in axes)
    centred = x - run.policy.sum(x, axes, True) / count
    variance = run.policy.sum(centred * centred, axes, True) / count
    return centred * torch.rsqrt(variance + epsilon)


@op("layer_norm", fresh=True)
def layer_norm(
    run: Run,
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """`gamma` and `beta` have the shape of the normalised axes, which need not be the last ones."""
    dims = sorted(a % x.dim() for a in axes) if axes is not None else list(range(x.dim()))
    out = standardise(run, x, dims, epsilon)
    shape = [n if d in dims else 1 for d, n in enumerate(x.shape)]
    if gamma is not None:
        out = out * gamma.reshape(shape)
    return out if beta is None else out + beta.reshape(shape)


@op("batch_norm", fresh=True)
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    scale = torch.rsqrt(variance + epsilon)
    scale = scale if gamma is None else scale * gamma
    out = (x - per_channel(mean, x)) * per_channel(scale, x)
    return out if beta is None else out + per_channel(beta, x)


@op("instance_norm", fresh=True)
def instance_norm(
    run: Run, x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    out = standardise(run, x, list(range(2, x.dim())), epsilon)
    out = out if gamma is None else out * per_channel(gamma, x)
    return out if beta is None else out + per_channel(beta, x)


@op("l2_norm", fresh=True)
def l2_norm(run: Run, x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Over the last three dimensions; those before are batch."""
    return x * torch.rsqrt(run.policy.sum(x * x, [-3, -2, -1], True) + epsilon)


@op("local_response_norm", fresh=True)
def local_response_norm(
    run: Run, x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """x / (k + alpha / size * sum of squares over `size` neighbouring channels) ** beta."""
    squares = F.pad((x * x).movedim(1, -1), (size // 2, (size - 1) // 2))
    total = run.policy.sum(squares.unfold(-1, size, 1), [-1], False).movedim(-1, 1)
    return x / (k + alpha / size * total) ** beta
