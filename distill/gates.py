"""Verdicts: the one place where a check becomes pass, fail, inconclusive, skipped or error.

In JSON: `gates {name: {status, observed, threshold, backend, reason}}`. Only `pass` counts as passed.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

Status = Literal["pass", "fail", "inconclusive", "skipped", "error"]
STATUSES: tuple[Status, ...] = ("pass", "fail", "inconclusive", "skipped", "error")


class Gate(msgspec.Struct, frozen=True, omit_defaults=True):
    """One check's verdict. `observed` and `threshold` are plain JSON values."""

    status: Status
    observed: Any = None
    threshold: Any = None
    backend: str | None = None
    reason: str | None = None


def at_most(observed: float, threshold: float, *, backend: str | None = None, reason: str | None = None) -> Gate:
    """Pass iff `observed` is finite and <= `threshold`. NaN and infinities fail."""
    ok = math.isfinite(observed) and observed <= threshold
    return Gate("pass" if ok else "fail", _plain(observed), threshold, backend, reason)


def at_least(
    observed: float, threshold: float, *, n: int, n_min: int = 1, backend: str | None = None, reason: str | None = None
) -> Gate:
    """Pass iff `observed` is finite and >= `threshold` over at least `n_min` samples; fewer: inconclusive."""
    if n < n_min:
        return Gate("inconclusive", _plain(observed), threshold, backend, f"{n} samples, {n_min} needed")
    ok = math.isfinite(observed) and observed >= threshold
    return Gate("pass" if ok else "fail", _plain(observed), threshold, backend, reason)


def within(
    observed: float,
    interval: tuple[float, float],
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    too_few: str | None = None,
    backend: str | None = None,
) -> Gate:
    """Pass iff the whole confidence interval keeps the limit, fail iff none of it does; else inconclusive.

    Exactly one limit is given. `too_few` says why there are too few samples to judge by: inconclusive. NaN and
    infinities fail however few there are.
    """
    low, high = interval
    if at_most is not None:
        threshold, inside, outside = at_most, high <= at_most, low > at_most
    else:
        assert at_least is not None
        threshold, inside, outside = at_least, low >= at_least, high < at_least
    status: Status = "pass" if inside else "fail" if outside else "inconclusive"
    reason = f"interval {low:.4g} to {high:.4g}"
    if not math.isfinite(observed):
        status, reason = "fail", "not finite"
    elif too_few:
        status, reason = "inconclusive", f"{too_few}; {reason}"
    return Gate(status, _plain(observed), threshold, backend, reason)


def holds(
    ok: bool, *, observed: Any = None, threshold: Any = None, backend: str | None = None, reason: str | None = None
) -> Gate:
    """Pass iff `ok`. `reason` should say what was wrong when it is not."""
    return Gate("pass" if ok else "fail", _plain(observed), threshold, backend, reason)


def skipped(reason: str, *, backend: str | None = None) -> Gate:
    """A check that cannot be made here."""
    return Gate("skipped", backend=backend, reason=reason)


def failed(reason: str, *, backend: str | None = None) -> Gate:
    """A check that could not even be completed because of what it checks."""
    return Gate("fail", backend=backend, reason=reason)


def count(gates: dict[str, Gate]) -> dict[Status, int]:
    """How many gates have each status."""
    return {status: sum(gate.status == status for gate in gates.values()) for status in STATUSES}


def exit_code(gates: dict[str, Gate], *, strict: bool = False) -> int:
    """0 all passed (skips named); 1 a check failed; 3 inconclusive, or skipped under --strict."""
    n = count(gates)
    if n["fail"] or n["error"]:
        return 1
    if n["inconclusive"] or (strict and n["skipped"]):
        return 3
    return 0 if n["pass"] else 3


def summary(gates: dict[str, Gate]) -> str:
    """The closing line: how many of each, and why those that were skipped were: named, unless it is all of them."""
    n = count(gates)
    line = ", ".join(f"{n[status]} {status}" for status in STATUSES if n[status]) or "no checks"
    names: dict[str, list[str]] = {}
    for name, gate in gates.items():
        if gate.status == "skipped":
            names.setdefault(str(gate.reason), []).append(name)
    skips = (why if len(which) == len(gates) > 1 else f"{', '.join(which)}: {why}" for why, which in names.items())
    return f"{line} ({'; '.join(skips)})" if names else line


def table(gates: dict[str, Gate]) -> str:
    """A line a gate: status, name, observed against threshold, reason."""
    width = max((len(name) for name in gates), default=0)
    rows = []
    for name, gate in gates.items():
        parts = [f"{gate.status.upper():12s} {name:{width}s}"]
        if gate.observed is not None:
            parts.append(f"observed {_short(gate.observed)}")
        if gate.threshold is not None:
            parts.append(f"threshold {_short(gate.threshold)}")
        if gate.reason:
            parts.append(f"({gate.reason})")
        rows.append("  ".join(parts))
    return "\n".join(rows)


def to_json(gates: dict[str, Gate]) -> dict[str, Any]:
    """The gates as plain values for a report."""
    return msgspec.to_builtins(gates)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinities: they are text in a report."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
