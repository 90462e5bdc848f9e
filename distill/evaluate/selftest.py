"""The self-test of every run: the oracle must be right on every item, every cheat must fail at the gate named for it.

If not, set or gates are broken, and no verdict on a model means anything: the report's status is `error`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from distill.evaluate.criteria import Criterion, EvaluationConfig, judge
from distill.evaluate.episode import Limits, play
from distill.evaluate.fixtures import EpisodeBroker
from distill.evaluate.items import Item
from distill.evaluate.metrics import metrics
from distill.evaluate.policies import CHEATS, Position, oracle, reply
from distill.evaluate.scoring import Score, score
from distill.evaluate.sets import EvaluationSet

MOST_NAMED = 10


class Check(msgspec.Struct, frozen=True, omit_defaults=True):
    """A policy, and whether the gates saw through it."""

    policy: str
    gate: str
    status: str
    """`pass`: seen through; `fail`; `skipped`: the set has nothing that this gate counts."""
    observed: float | None = None
    n: int | None = None
    reason: str | None = None


def self_test(
    found: EvaluationSet, config: EvaluationConfig, criteria: dict[str, Criterion] | None = None
) -> list[Check]:
    """Try the oracle on all items, and each cheat on some of every kind. Offline, and without a model."""
    criteria = criteria or config.criteria()
    anyhow = {name: msgspec.structs.replace(one, n_min=1) for name, one in criteria.items()}
    checks = [_oracle(found, config.limits, anyhow)]
    sample = chosen(found.items, config.self_test_items)
    for name, cheat in CHEATS.items():
        scores = run(cheat.play, found, sample, config.limits)
        gates = judge(metrics(scores, 0, samples=0), {cheat.gate: anyhow[cheat.gate]})
        gate = gates[cheat.gate]
        observed = gate.observed if isinstance(gate.observed, float) else None
        status = {"fail": "pass", "inconclusive": "skipped"}.get(gate.status, "fail")
        reason = {"skipped": "the set has no item that this gate counts", "fail": "the gate let it through"}.get(status)
        checks.append(Check(name, cheat.gate, status, observed, gate.n, reason))
    return checks


def passed(checks: Sequence[Check]) -> bool:
    """Whether verdicts can be trusted."""
    return all(check.status != "fail" for check in checks)


def chosen(items: Sequence[Item], per_kind: int) -> list[Item]:
    """So many items of each kind, the same for the same set."""
    out: list[Item] = []
    for kind in sorted({item.kind for item in items}):
        ranked = sorted((item for item in items if item.kind == kind), key=lambda item: _hash(item.id))
        out += ranked[:per_kind]
    return out


def run(policy: Callable[[Position], str], found: EvaluationSet, items: Sequence[Item], limits: Limits) -> list[Score]:
    """A policy's scores."""
    out = []
    for item in items:
        playing = play(item, EpisodeBroker(item, found.fixtures), limits)
        request = next(playing)
        while True:
            try:
                request = playing.send(reply(policy, item, request.messages, len(request.replies)))
            except StopIteration as end:
                out.append(score(end.value, found.covered))
                break
    return out


def _oracle(found: EvaluationSet, limits: Limits, criteria: dict[str, Criterion]) -> Check:
    scores = run(oracle, found, found.items, limits)
    wrong = [one for one in scores if one.failures]
    gates = judge(metrics(scores, 0, samples=0), criteria)
    failed = sorted(name for name, gate in gates.items() if gate.status == "fail")
    if wrong or failed:
        shown = "; ".join(
            f"{one.item}: {one.failures[0].gate}: {one.failures[0].excerpt}" for one in wrong[:MOST_NAMED]
        )
        reason = f"{len(wrong)} of {len(scores)} items' own right answers are not right: {shown}"
        return Check("oracle", ", ".join(failed) or "all", "fail", n=len(scores), reason=reason)
    return Check("oracle", "all", "pass", n=len(scores))


def _hash(item: str) -> bytes:
    return hashlib.sha256(b"eval-self-test/1\n" + item.encode()).digest()


def to_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """For a report."""
    return msgspec.to_builtins(list(checks))
