"""How far two arrays are apart, and when they agree.

An element agrees where |a - b| <= atol + rtol (|a| + rms), rms being the root mean square of all of a: an element that
is small by cancellation is judged by the size of its neighbours. Integers must be equal.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np


class Tolerance(NamedTuple):
    """Absolute and relative tolerance."""

    atol: float
    rtol: float

    def __str__(self) -> str:
        return f"atol {self.atol:g}, rtol {self.rtol:g}"


class Difference(NamedTuple):
    """`found` against `reference`."""

    max_error: float
    relative: float
    """||difference|| / ||reference||"""
    excess: float
    """The largest error in units of what is allowed: at most 1 agrees. NaN: the shapes cannot be compared."""
    note: str = ""
    both_nan: int = 0
    """Elements that are NaN on both sides, which counts as equal."""

    @property
    def agrees(self) -> bool:
        return self.excess <= 1

    @property
    def diverges(self) -> bool:
        return self.excess > 1


def as_array(value: Any) -> np.ndarray:
    """What an operation made, as an array: a classifier's label, its probabilities in the order of their labels."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, dict):
        return np.array([value[label] for label in sorted(value, key=str)])
    return np.array(value if isinstance(value, int | float | str) else repr(value))


def compare(one: Any, other: Any, tolerance: Tolerance) -> Difference:
    """Compare two values; a layout that differs by a permutation or by dimensions of 1 is no difference."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() != other.keys():
        return Difference(math.inf, math.inf, math.inf, "other labels")
    reference, found = as_array(one), as_array(other)
    aligned, note = align(reference, found)
    if aligned is None:
        shapes = f"shapes {list(reference.shape)} and {list(found.shape)}"
        return Difference(math.nan, math.nan, math.nan, shapes)
    if reference.dtype.kind not in "biuf" or aligned.dtype.kind not in "biuf":
        same = bool(np.array_equal(reference, aligned))
        return Difference(0.0, 0.0, 0.0, note) if same else Difference(math.inf, math.inf, math.inf, note)
    return _numbers(reference, aligned, tolerance, note)


def _numbers(reference: np.ndarray, found: np.ndarray, tolerance: Tolerance, note: str) -> Difference:
    if not reference.size:
        return Difference(0.0, 0.0, 0.0, note)
    exact = reference.dtype.kind != "f" and found.dtype.kind != "f"
    a, b = reference.astype(np.float64), found.astype(np.float64)
    nan = np.isnan(a) & np.isnan(b)
    equal, both = (a == b) | nan, int(nan.sum())
    note = "; ".join(part for part in (note, f"NaN in both: {both} of {a.size}" if both else "") if part)
    finite = np.isfinite(a) & np.isfinite(b)
    if not (equal | finite).all():
        return Difference(math.inf, math.inf, math.inf, note or "infinite or NaN on one side only", both)
    a, b = np.where(finite, a, 0), np.where(finite, b, 0)
    error = np.abs(a - b)
    norm = float(np.linalg.norm(a))
    top = float(error.max())
    relative = float(np.linalg.norm(error)) / norm if norm else (math.inf if top else 0.0)
    if top == 0:
        return Difference(0.0, 0.0, 0.0, note, both)
    if exact:
        return Difference(top, relative, math.inf, note, both)
    allowed = tolerance.atol + tolerance.rtol * (np.abs(a) + norm / math.sqrt(a.size))
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(error > 0, error / allowed, 0)
    return Difference(top, relative, float(excess.max()), note, both)


def align(reference: np.ndarray, found: np.ndarray) -> tuple[np.ndarray | None, str]:
    """`found` in the layout of `reference`, and how it was brought there; None where the shapes do not allow it."""
    if reference.shape == found.shape:
        return found, ""
    if reference.size != found.size:
        return None, ""
    target, squeezed = reference.squeeze().shape, found.squeeze()
    if target == squeezed.shape:
        return squeezed.reshape(reference.shape), ""
    if sorted(target) != sorted(squeezed.shape) or len(target) > 5:
        return None, ""
    orders = [
        order for order in itertools.permutations(range(len(target))) if squeezed.transpose(order).shape == target
    ]
    if len(orders) > 1 and reference.dtype.kind in "biuf" and found.dtype.kind in "biuf":
        orders.sort(key=lambda order: _distance(reference.reshape(target), squeezed.transpose(order)))
    return squeezed.transpose(orders[0]).reshape(reference.shape), f"permuted {list(orders[0])}"


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    distance = float(np.linalg.norm(a.astype(np.float64) - b))
    return distance if math.isfinite(distance) else math.inf
