"""What a handler may know about the run it is part of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from distill.mil.guard import Guard
from distill.mil.limits import DEFAULT
from distill.mil.policy import Policy
from distill.mil.state import State

VALUE = 2**14  # what handing on one value costs, in arithmetic operations


@dataclass(slots=True)
class Run:
    """One prediction: its policy, its state, and the values computed so far."""

    policy: Policy
    state: State | None
    values: list[Any] = field(default_factory=list)
    guard: Guard | None = None  # measures what operators take
    iterations: int = DEFAULT.iterations  # that loops may still make
    undo: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # parts of states overwritten: what they held

    def restore(self, states: Mapping[str, Tensor]) -> None:
        """Give the states back what they held before a prediction that failed."""
        for part, old in reversed(self.undo):
            part.copy_(old)
        for name, tensor in states.items():
            if self.state is not None:
                self.state.set(name, tensor)

    def spend(self, iterations: int) -> None:
        """Loop iterations; a hostile package must not loop for ever."""
        self.iterations -= iterations
        if self.iterations < 0:
            raise ValueError("too many loop iterations in one prediction (limits= of mil.load allows more)")

    def work(self, operations: int) -> None:
        """Charge for what is done outside torch."""
        if self.guard is not None:
            self.guard.spend(operations)

    def reserve(self, memory: int) -> None:
        """Ask for bytes that are taken outside torch, before they are."""
        if self.guard is not None:
            self.guard.admit(memory)

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that outlives the values of the plan: a loop may put many into a list."""
        if self.guard is not None:
            self.guard.ledger.hold(tensor)
            self.guard.admit(0)
        return tensor


# A nested block, ready to run: takes its block inputs, returns its outputs.
Body = Callable[[Run, Sequence[Any]], list[Any]]
