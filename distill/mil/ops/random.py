"""Random numbers. A seed gives the same numbers each time the operation runs; seed -1 takes them from torch's
default generator, so `torch.manual_seed` makes a whole prediction reproducible. The numbers are not Core ML's,
which does not document its generator; the distributions are.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from distill.mil.ops.registry import op
from distill.mil.values import check_size

_FRESH = -1


def generator(seed: int) -> Generator | None:
    """None is torch's default generator."""
    return None if seed == _FRESH else Generator().manual_seed(seed)


@op("random_uniform", fresh=True)
def random_uniform(shape: list[int], low: float = 0.0, high: float = 1.0, seed: int = _FRESH) -> Tensor:
    """[low, high) in float32; rounding to fp16 may still reach `high`."""
    if not low <= high:
        raise ValueError(f"low {low} is not below high {high}")
    drawn = low + (high - low) * torch.rand(check_size(shape), generator=generator(seed))
    return torch.where(drawn < high, drawn, _below(high, low))


def _below(high: float, low: float) -> Tensor:
    """The float32 next to `high` towards `low`; `high` itself where they are equal."""
    return torch.nextafter(torch.tensor(high), torch.tensor(low))


@op("random_normal", fresh=True)
def random_normal(shape: list[int], mean: float = 0.0, stddev: float = 1.0, seed: int = _FRESH) -> Tensor:
    return mean + stddev * torch.randn(check_size(shape), generator=generator(seed))


@op("random_bernoulli", exact=True, fresh=True)
def random_bernoulli(shape: list[int], prob: float = 0.5, seed: int = _FRESH) -> Tensor:
    """1 with probability `prob`, else 0."""
    if not 0 <= prob <= 1:
        raise ValueError(f"prob {prob} is not a probability")
    return (torch.rand(check_size(shape), generator=generator(seed)) < prob).float()


@op("random_categorical", fresh=True)
def random_categorical(x: Tensor, mode: str = "logits", size: int = 1, seed: int = _FRESH) -> Tensor:
    """`size` class numbers for each row of x (..., classes), drawn with replacement -> (..., size)."""
    if mode not in ("logits", "probs"):
        raise ValueError(f"mode {mode!r} is neither logits nor probs")
    if x.dim() == 0 or size < 1:
        raise ValueError(f"{size} samples from x of rank {x.dim()}")
    shape = check_size([*x.shape[:-1], size])
    weights = x.float().softmax(-1) if mode == "logits" else x.float()
    rows = weights.reshape(-1, x.shape[-1])
    if not len(rows):
        return torch.zeros(shape)
    return torch.multinomial(rows, size, replacement=True, generator=generator(seed)).float().reshape(shape)
