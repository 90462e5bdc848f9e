"""The report of an evaluation: `eval-report/1`. A pure function of the set, the transcripts and the configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

import distill
from distill import chat
from distill.artifacts import canonical_json, code_version, sha256_text
from distill.errors import DatasetError
from distill.evaluate.criteria import EvalGate, EvaluationConfig, describe, judge, overall
from distill.evaluate.episode import Episode, Limits, replay
from distill.evaluate.fixtures import EpisodeBroker, Mode
from distill.evaluate.items import FixtureRow, Item
from distill.evaluate.metrics import Metric, by_kind, metrics
from distill.evaluate.results import RunHeader
from distill.evaluate.scoring import Score, score
from distill.evaluate.selftest import Check, chosen, passed
from distill.evaluate.selftest import to_json as checks_to_json
from distill.evaluate.sets import EvaluationSet, counts
from distill.evaluate.transcripts import Transcript

MOST_FAILURES = 500
_DIGITS = 9
"""Of a resampled interval: what comes after depends on the order of summation."""


_PARTS = ("items", "matching", "fixtures", "sets", "episode", "atoms", "locales", "claims", "grounding", "privacy",
          "answers", "scoring", "metrics", "criteria")  # fmt: skip
_SCORER = ("chat.py", "tools.py", "broker.py", "data/atoms.py", "data/rules/secrets.py",
           *(f"evaluate/{name}.py" for name in _PARTS))  # fmt: skip


class Played(NamedTuple):
    """Episodes with what they count for, by item."""

    episodes: dict[str, Episode]
    scores: dict[str, Score]
    recorded: tuple[FixtureRow, ...] = ()
    """Of a run that records: what was simulated."""


def play_back(found: EvaluationSet, header: RunHeader, transcripts: Mapping[str, Transcript]) -> Played:
    """Episodes and scores of transcripts; those that met a provider's fault have no score."""
    limits = msgspec.convert(header.limits, Limits)
    items = {item.id: item for item in found.items}
    episodes: dict[str, Episode] = {}
    scores: dict[str, Score] = {}
    recorded: list[FixtureRow] = []
    for name in sorted(transcripts):
        broker = EpisodeBroker(items[name], found.fixtures, mode_of(header), header.seed)
        episodes[name] = replay(items[name], transcripts[name], broker, limits)
        recorded += broker.recorded
        if episodes[name].end != "fault":
            scores[name] = score(episodes[name], found.covered)
    return Played(episodes, scores, tuple(recorded))


def mode_of(header: RunHeader) -> Mode:
    """How the run's broker answered: what was recorded is simulated again, to the same values."""
    if header.broker not in ("replay", "record", "simulate"):
        raise DatasetError(f"a run's broker is replay, record or simulate, not {header.broker!r}")
    return header.broker  # type: ignore[return-value]


def expected_items(found: EvaluationSet, header: RunHeader) -> list[Item]:
    """The items that a run, with all its shards, has to play."""
    if header.items is None:
        return list(found.items)
    kinds = counts(found.items)
    each = -(-header.items // len(kinds))
    picked = chosen(found.items, each)
    return sorted(picked, key=lambda item: item.id)[: header.items] if len(picked) > header.items else picked


def build(
    found: EvaluationSet, header: RunHeader, transcripts: Mapping[str, Transcript], played: Played,
    config: EvaluationConfig, checks: Sequence[Check],
) -> dict[str, Any]:  # fmt: skip
    """The report."""
    ordered = [played.scores[name] for name in sorted(played.scores)]
    criteria = config.criteria()
    values = metrics(ordered, config.bootstrap.seed, config.bootstrap.samples)
    prints = fingerprints(found, header, config)
    gates = judge(values, criteria, ordered)
    gates["fingerprints"] = _fingerprint_gate(found, prints)
    gates["complete"] = _complete_gate(found, header, transcripts)
    gates["self_test"] = _self_test_gate(checks)
    return {
        "schema": "eval-report/1",
        "overall": overall(gates),
        "gates": msgspec.to_builtins(gates),
        "metrics": {name: _metric(one) for name, one in values.items()},
        "counts": {"items": len(ordered), "by_kind": by_kind(ordered), "ends": _ends(played)},
        "tokens": {"generated": sum(one.tokens for one in ordered), "turns": sum(one.turns for one in ordered)},
        "self_test": checks_to_json(checks),
        "failures": _failures(ordered),
        "harness_errors": [{"item": name, "error": transcripts[name].fault} for name in _faults(transcripts)],
        "header": {
            "fingerprints": prints, "model": header.model, "broker": header.broker, "seed": header.seed,
            "items": header.items, "criteria": describe(config), "limits": header.limits,
        },
        "made_by": {"made_by": f"distill {distill.__version__}", "code": code_version(), "inputs": header.inputs},
    }  # fmt: skip


def fingerprints(found: EvaluationSet, header: RunHeader, config: EvaluationConfig) -> dict[str, str | None]:
    """Everything that the report's numbers depend on, by hash."""
    model = header.model
    return {
        "dataset": found.sha256s.get("items"),
        "fixtures": found.sha256s.get("fixtures.jsonl"),
        "tools": found.sha256s.get("tools.jsonl"),
        "template": model.get("template"),
        "tokenizer": model.get("tokenizer"),
        "model_weights": model.get("weights"),
        "runner": model.get("runner"),
        "decoding": sha256_text(canonical_json(model.get("decoding"))) if model.get("decoding") else None,
        "criteria": sha256_text(canonical_json(msgspec.to_builtins(config))),
        "scorer_code": scorer_sha256(),
    }


@cache
def scorer_sha256() -> str:
    """Of the modules that play, score and judge."""
    digest = hashlib.sha256()
    for name in _SCORER:
        digest.update(name.encode() + b"\n" + (Path(__file__).parent.parent / name).read_bytes())
    return digest.hexdigest()


def _fingerprint_gate(found: EvaluationSet, prints: Mapping[str, str | None]) -> EvalGate:
    """Everything is known, and the set's files are what its header says."""
    if found.header is None:
        return EvalGate("fail", reason=f"{found.path.name}.d/header.json is missing: nothing says what the set was")
    names = {"items": "dataset", "fixtures.jsonl": "fixtures", "tools.jsonl": "tools"}
    wrong = [name for name, sha256 in found.header.files.items() if found.sha256s.get(name) != sha256]
    wrong += [name for name in names if name not in found.header.files]
    if wrong:
        return EvalGate("fail", reason=f"not as the set's header says: {', '.join(sorted(wrong))}")
    if found.header.template_sha256 != chat.template_sha256():
        return EvalGate("fail", reason="the set was made for another chat template")
    if prints["template"] not in (None, chat.template_sha256()):
        return EvalGate("fail", reason="the model was asked with another chat template")
    if missing := [name for name, value in prints.items() if value is None]:
        return EvalGate("inconclusive", reason=f"not known: {', '.join(missing)}")
    return EvalGate("pass", len(prints))


def _complete_gate(found: EvaluationSet, header: RunHeader, transcripts: Mapping[str, Transcript]) -> EvalGate:
    wanted = {item.id for item in expected_items(found, header)}
    faults = _faults(transcripts)
    missing = sorted(wanted - set(transcripts))
    n = len(wanted)
    if faults:
        return EvalGate("error", n=n, reason=f"{len(faults)} items could not be asked: {transcripts[faults[0]].fault}",
                        evidence=tuple(faults[:MOST_FAILURES]))  # fmt: skip
    if missing:
        return EvalGate("inconclusive", n=n, reason=f"{len(missing)} of {n} items are in other shards",
                        evidence=tuple(missing[:20]))  # fmt: skip
    return EvalGate("pass", 1.0, n=n)


def _faults(transcripts: Mapping[str, Transcript]) -> list[str]:
    return sorted(name for name, one in transcripts.items() if one.fault is not None)


def _self_test_gate(checks: Sequence[Check]) -> EvalGate:
    if not checks:
        return EvalGate("error", reason="not run")
    if not passed(checks):
        wrong = [check for check in checks if check.status == "fail"]
        return EvalGate("error", n=len(checks), reason="; ".join(f"{one.policy}: {one.reason}" for one in wrong))
    skipped = [check.policy for check in checks if check.status == "skipped"]
    reason = f"not tried, the set has nothing for them: {', '.join(skipped)}" if skipped else None
    return EvalGate("inconclusive" if skipped else "pass", len(checks) - len(skipped), n=len(checks), reason=reason)


def _metric(one: Metric) -> dict[str, Any]:
    value = one.exact
    return {"num": one.num, "den": one.den, "value": None if value is None else float(value), "n": one.n,
            "ci95": None if one.ci95 is None else [round(end, _DIGITS) for end in one.ci95]}  # fmt: skip


def _ends(played: Played) -> dict[str, int]:
    out: dict[str, int] = {}
    for episode in played.episodes.values():
        out[episode.end] = out.get(episode.end, 0) + 1
    return dict(sorted(out.items()))


def _failures(ordered: Sequence[Score]) -> list[dict[str, Any]]:
    out = [{"item": one.item, "kind": one.kind, "gate": failure.gate, "excerpt": failure.excerpt,
            "pointers": list(failure.pointers)}
           for one in ordered for failure in one.failures]  # fmt: skip
    return out[:MOST_FAILURES]
