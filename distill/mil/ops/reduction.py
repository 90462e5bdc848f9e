"""Reductions. Without `axes`, over all of them."""

from __future__ import annotations

import math

from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.run import Run
from distill.mil.values import to_dtype


def every(x: Tensor, axes: list[int] | None) -> list[int]:
    return list(range(x.dim())) if axes is None else sorted(a % x.dim() for a in axes)


@op("reduce_sum")
def reduce_sum(run: Run, x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return run.policy.sum(x, every(x, axes), keep_dims)


@op("reduce_mean")
def reduce_mean(run: Run, x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    dims = every(x, axes)
    return run.policy.sum(x, dims, keep_dims) / math.prod(x.shape[d] for d in dims)


@op("reduce_max")
def reduce_max(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return x if axes == [] else x.amax(every(x, axes), keepdim=keep_dims)  # torch takes [] for all


@op("reduce_min")
def reduce_min(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return x if axes == [] else x.amin(every(x, axes), keepdim=keep_dims)


@op("reduce_prod")
def reduce_prod(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    for axis in reversed(every(x, axes)):
        x = x.prod(axis, keepdim=keep_dims)
    return x


@op("reduce_l1_norm")
def reduce_l1_norm(run: Run, x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return run.policy.sum(x.abs(), every(x, axes), keep_dims)


@op("reduce_l2_norm")
def reduce_l2_norm(run: Run, x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return run.policy.sum(x * x, every(x, axes), keep_dims).sqrt()


@op("reduce_sum_square")
def reduce_sum_square(run: Run, x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return run.policy.sum(x * x, every(x, axes), keep_dims)


@op("reduce_log_sum")
def reduce_log_sum(run: Run, x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return run.policy.sum(x, every(x, axes), keep_dims).log()


@op("reduce_log_sum_exp")
def reduce_log_sum_exp(run: Run, x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return run.policy.logsumexp(x.float(), every(x, axes), keep_dims)


@op("reduce_argmax")
def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """Ties go to the first, though MIL does not promise that."""
    return to_dtype(first_index(x, axis, keep_dims, largest=True), output_dtype)


@op("reduce_argmin")
def reduce_argmin(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    return to_dtype(first_index(x, axis, keep_dims, largest=False), output_dtype)


def first_index(x: Tensor, axis: int, keep: bool, largest: bool) -> Tensor:
    return x.argmax(axis, keepdim=keep) if largest else x.argmin(axis, keepdim=keep)
