"""Is a reply to a question of BFCL right: by exact values, and beside it as leniently as BFCL compares them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from distill.chat import ToolCall
from distill.evaluate.bfcl_data import Case
from distill.evaluate.bfcl_literals import read
from distill.evaluate.episode import read_calls
from distill.evaluate.items import GoldCall
from distill.evaluate.matching import match
from distill.evaluate.transcripts import Reply

# each argument must be one of the gold call's own values: a schema could only refuse what the gold allows, and some
# of BFCL's function documents do contradict its answers
_ANY_VALUES = {"parameters": {"type": "object", "additionalProperties": True}}
_IGNORED = re.compile(r"[ ,./\-_*^]")
_DEEPEST = 16


class Verdict(NamedTuple):
    """Two answers that are never mixed."""

    exact: bool
    """JSON equality with a possible answer; every attempt at a call counts, readable or not."""
    bfcl: bool
    """As BFCL compares: texts without case, spaces and some punctuation, and an unreadable call is no call where none
    is wanted."""
    why: str
    """Why it is not exactly right, or empty."""


def judge(case: Case, reply: Reply) -> Verdict:
    """Whether a reply is right."""
    _, made = read_calls(reply, {tool["name"]: tool for tool in case.item.tools})
    calls = [one.call for one in made if one.call is not None]
    unreadable = len(made) - len(calls)
    if case.expects == "no_call":
        why = "a call where none is wanted" if calls else "an unreadable call" if unreadable else ""
        return Verdict(not made, not calls, why)
    if unreadable and case.expects == "calls":
        return Verdict(False, False, "an unreadable call")
    if case.expects == "some_call":
        problem = "no call" if not made else next((one.problem for one in made if one.problem), "")
        return Verdict(not problem, bool(calls), problem)
    if len(calls) != len(case.item.calls):
        return Verdict(False, False, f"{len(calls)} calls where {len(case.item.calls)} are wanted")
    values = [valued(case, call) for call in calls]
    exact = _all_match(case.item.calls, values)
    loose = exact or _all_match([_loosened(gold) for gold in case.item.calls], [_loose_call(one) for one in values])
    return Verdict(exact, loose, "" if exact else "other functions or arguments than wanted")


def valued(case: Case, call: ToolCall) -> ToolCall | None:
    """The call with what its arguments stand for; None where Java's or JavaScript's are not texts."""
    if case.language == "python":
        return call
    if not all(isinstance(value, str) for value in call.arguments.values()):
        return None
    types = case.types.get(call.name, {})
    return ToolCall(call.name, {
        key: read(value, *types.get(key, ("any", "any")), case.language) for key, value in call.arguments.items()
    })  # fmt: skip


def loosened(value: Any, depth: int = _DEEPEST) -> Any:
    """A value with its texts as BFCL compares them."""
    if isinstance(value, str):
        return _IGNORED.sub("", value).lower().replace("'", '"')
    if depth and isinstance(value, list):
        return [loosened(one, depth - 1) for one in value]
    if depth and isinstance(value, dict):
        return {key: loosened(one, depth - 1) for key, one in value.items()}
    return value


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95% interval of a rate (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    middle = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def _loose_call(call: ToolCall | None) -> ToolCall | None:
    return None if call is None else ToolCall(call.name, loosened(call.arguments))


def _loosened(gold: GoldCall) -> GoldCall:
    arguments = {
        key: msgspec.structs.replace(matcher, enum=tuple(map(loosened, matcher.enum or ())))
        for key, matcher in gold.arguments.items()
    }
    return msgspec.structs.replace(gold, arguments=arguments)


def _all_match(gold: Sequence[GoldCall], calls: Sequence[ToolCall | None]) -> bool:
    readable = [(call, _ANY_VALUES) for call in calls if call is not None]
    return len(readable) == len(gold) and match(gold, readable).true_positive == len(gold)
