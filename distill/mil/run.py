"""What a handler may know about the run it is part of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.mil.policy import Policy
from distill.mil.state import State


@dataclass(slots=True)
class Run:
    """One prediction: its policy, its state, and the values computed so far."""

    policy: Policy
    state: State | None
    values: list[Any] = field(default_factory=list)


# A nested block, ready to run: takes its block inputs, returns its outputs.
Body = Callable[[Run, Sequence[Any]], list[Any]]
