"""The end of a classifier."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill.mil.ops.registry import op


@op("classify")
def classify(probabilities: Tensor, classes: list[Any]) -> tuple[int | str, dict[int | str, float]]:
    """The most probable label (of equals the first) and the probability of each, as plain Python values."""
    labels = [c if isinstance(c, str) else int(c) for part in classes for c in part]
    if not labels or len(labels) != probabilities.numel():
        raise ValueError(f"{probabilities.numel()} probabilities for {len(labels)} classes")
    flat = probabilities.reshape(-1)
    return labels[int(flat.argmax())], dict(zip(labels, flat.tolist()))
