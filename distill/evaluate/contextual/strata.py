"""The strata of the set: of each its kind, how many items it has at scale 1, and how one is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from distill.evaluate.contextual import adversarial, failures, long
from distill.evaluate.contextual.absent import ABSENT
from distill.evaluate.contextual.actions import WRITING
from distill.evaluate.contextual.chains import CHAINS, JOINS, SAME, independent
from distill.evaluate.contextual.no_call import CLARIFIES, CONTROLS, DECLINES, Case, filled
from distill.evaluate.contextual.requests import READING, Maker
from distill.evaluate.contextual.scene import Built, Scene, Task
from distill.evaluate.contextual.tongues import ABROAD, TONGUES
from distill.evaluate.contextual.tools import QUIET
from distill.evaluate.contextual.unseen import UNSEEN, UNSEEN_READING
from distill.evaluate.items import Kind

Finish = Callable[..., Built]
Make = Callable[[Scene, Finish, int], Built]
"""Of a scene, what finishes it, and the item's number within its stratum, so that every template has its turn."""


class Stratum(NamedTuple):
    """A row of the table."""

    kind: Kind
    items: int
    """At scale 1."""
    make: Make
    locale: str = "en"


def _one_of(makers: Sequence[Maker]) -> Make:
    return lambda scene, finish, number: finish(makers[number % len(makers)](scene))


def _failing(fail: Callable[[Scene, Task], Task]) -> Make:
    makers = (*READING, *UNSEEN_READING)
    return lambda scene, finish, number: finish(fail(scene, makers[number % len(makers)](scene)), system=failures.AGAIN)


def _case(cases: Sequence[Case], distractors: Sequence[str] = ()) -> Make:
    def make(scene: Scene, finish: Finish, number: int) -> Built:
        case = cases[number % len(cases)]
        return finish(filled(scene, case), tempting=case.tempting, distractors=distractors)

    return make


def _guarded(guard: Callable[[Scene], adversarial.Guarded]) -> Make:
    def make(scene: Scene, finish: Finish, number: int) -> Built:
        task, system = guard(scene)
        return finish(task, system=system)

    return make


def _long(make: Callable[[Scene, float], Task], depth: float) -> Make:
    return lambda scene, finish, number: finish(make(scene, depth))


def _long_conversation(depth: float) -> Make:
    def make(scene: Scene, finish: Finish, number: int) -> Built:
        task, earlier = long.in_conversation(scene, depth)
        return finish(task, earlier=earlier)

    return make


STRATA: dict[str, Stratum] = {
    "single": Stratum("required", 78, _one_of((*READING, *WRITING))),
    "unseen": Stratum("required", 40, _one_of(UNSEEN)),
    "parallel": Stratum("multi", 40, _one_of((independent,))),
    "same_tool": Stratum("multi", 24, _one_of(SAME)),
    "chain": Stratum("multi", 42, _one_of(CHAINS)),
    "join": Stratum("multi", 18, _one_of(JOINS)),
    "no_need": Stratum("control", 140, _case(CONTROLS)),
    "no_tool": Stratum("decline", 70, _case(DECLINES, QUIET)),
    "missing": Stratum("clarify", 70, _case(CLARIFIES, QUIET)),
    "passing_error": Stratum("error_recovery", 44, _failing(failures.once)),
    "lasting_error": Stratum("error_recovery", 16, _failing(failures.for_good)),
    "nothing_found": Stratum("empty_evidence", 55, _one_of(ABSENT)),
    "secret_in_result": Stratum("canary", 66, _guarded(adversarial.in_result)),
    "secret_in_system": Stratum("canary", 24, _guarded(adversarial.in_system)),
    "secret_and_tool": Stratum("canary", 20, _guarded(adversarial.kept_from_tools)),
    "disclosed": Stratum("canary", 92, _guarded(adversarial.disclosed)),
    "handed_on": Stratum("canary", 40, _guarded(adversarial.handed_on)),
    "ordered_call": Stratum("injection", 74, _guarded(adversarial.ordered)),
    "ordered_marker": Stratum("injection", 64, _guarded(adversarial.marked)),
    **{f"locale_{locale}": Stratum("locale", 18, _one_of(ABROAD), locale) for locale in TONGUES},
    **{f"long_page_{name}": Stratum("long_context", 6, _long(long.in_page, at)) for name, at in long.DEPTHS.items()},
    **{f"long_log_{name}": Stratum("long_context", 5, _long(long.in_log, at)) for name, at in long.DEPTHS.items()},
    **{f"long_talk_{name}": Stratum("long_context", 8, _long_conversation(at)) for name, at in long.DEPTHS.items()},
}  # fmt: skip


def build(name: str, scene: Scene, item: str, number: int) -> Built:
    """One item of a stratum."""
    stratum = STRATA[name]
    return stratum.make(scene, partial(scene.finish, item, stratum.kind, name), number)
