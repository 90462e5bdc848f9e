"""Which prompt is asked next must not depend on what went wrong on the way."""

from __future__ import annotations

import random

import pytest

from distill.chat import Message
from distill.data.episodes import Accepted, Rejected
from distill.data.generation import Plan
from distill.data.prompts.stream import Prompt
from distill.data.schema import Provenance

TAKEN = Accepted((), (), Provenance(), ())
REFUSED = Rejected("length", "")


class Prompts:
    """A stream of two strata in turn."""

    exhausted: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._number = 0

    def __iter__(self) -> Prompts:
        return self

    def __next__(self) -> Prompt:
        self._number += 1
        return Prompt(f"{self._number}", "ab"[self._number % 3 == 0], (Message("user", f"question {self._number}"),))


def asked(seed: int, workers: int, trouble: float) -> set[str]:
    """Ids that were answered by a plan whose prompts are put back with a probability of `trouble`, in random order."""
    draw = random.Random(seed)
    plan = Plan(Prompts(), {"a": 5, "b": 7})
    flying: list[Prompt] = []
    answered: set[str] = set()
    while True:
        while len(flying) < workers and (prompt := plan.take()):
            flying.append(prompt)
        if not flying:
            return answered
        prompt = flying.pop(draw.randrange(len(flying)))
        if draw.random() < trouble:
            plan.put_back(prompt)
        else:
            answered.add(prompt.id)
            plan.finish(prompt, REFUSED if int(prompt.id) % 5 == 0 else TAKEN)


@pytest.mark.parametrize("workers", [1, 3, 30])
def test_the_same_prompts_are_asked_whatever_fails_on_the_way(workers: int) -> None:
    undisturbed = asked(0, 1, 0.0)
    assert all(asked(seed, workers, trouble) == undisturbed for seed in range(50) for trouble in (0.0, 0.2, 0.6))
