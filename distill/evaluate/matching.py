"""Is a call the gold call, and how many of an episode's calls are: a maximum matching that keeps the partial order."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import msgspec

from distill.chat import ToolCall
from distill.evaluate.items import GoldCall, Matcher
from distill.tools import arguments_problem, value_problem


def json_equal(a: Any, b: Any) -> bool:
    """Equality of JSON values (JSON Schema 2020-12, 4.2.2): 5 is 5.0, true is not 1, objects have no order."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(json_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(json_equal, a, b))
    return type(a) is type(b) and bool(a == b)


def argument_matches(matcher: Matcher, value: Any) -> bool:
    """Whether an argument that is there is what it must be."""
    if matcher.any:
        return True
    if matcher.enum is not None:
        return any(json_equal(choice, value) for choice in matcher.enum)
    if matcher.num is not None:
        return _near(value, matcher)
    if matcher.regex is not None:
        return isinstance(value, str) and value_problem(value, regex_schema(matcher.regex)) is None
    if matcher.set is not None:
        return isinstance(value, list) and _same_items(list(matcher.set), value)
    if matcher.date is not None:
        return isinstance(value, str) and moment(value) is not None and moment(value) == moment(matcher.date)
    return json_equal(matcher.exact, value)


def arguments_match(gold: Mapping[str, Matcher], arguments: Mapping[str, Any]) -> bool:
    """Every argument that is needed is there, each matches, and there is no other."""
    if not arguments.keys() <= gold.keys():
        return False
    return all(
        argument_matches(matcher, arguments[name]) if name in arguments else matcher.optional
        for name, matcher in gold.items()
    )


def call_matches(gold: GoldCall, call: ToolCall, function: Mapping[str, Any] | None) -> bool:
    """m(g, p): equal names, a function that is offered, arguments that its schema allows and the gold call's."""
    return (
        call.name == gold.name
        and function is not None
        and arguments_match(gold.arguments, call.arguments)
        and arguments_problem(call, dict(function)) is None
    )


class Matched(NamedTuple):
    """A matching of one episode's calls."""

    pairs: tuple[tuple[int, int], ...]
    """(gold, predicted), sorted."""
    true_positive: int
    false_positive: int
    false_negative: int


def match(
    gold: Sequence[GoldCall], predicted: Sequence[tuple[ToolCall, Mapping[str, Any] | None]], malformed: int = 0
) -> Matched:
    """The largest matching in which matched calls come in an order that the gold calls' `after` allow.

    `predicted`: calls as they were made, each with its function if that is offered. Each of `malformed` more is a
    false positive. A matched call may stand before another that it must come after only where one of them is not
    matched. Of equally large matchings the one whose pairs come first.

    Call by call, best[S] is a matching of exactly the gold calls in S; the next call may take g where no call of S has
    to come after g. At most 2^8 sets.
    """
    fits = [[call_matches(one, call, function) for one in gold] for call, function in predicted]
    index = {one.id: i for i, one in enumerate(gold)}
    before = _closure([[index[name] for name in one.after] for one in gold])
    behind = [sum(1 << j for j in range(len(gold)) if before[j] >> i & 1) for i in range(len(gold))]
    best: dict[int, tuple[tuple[int, int], ...]] = {0: ()}
    for p, row in enumerate(fits):
        if not any(row):
            continue
        for taken, pairs in sorted(best.items()):
            for g, fit in enumerate(row):
                now = taken | 1 << g
                if fit and now != taken and not taken & behind[g] and now not in best:
                    best[now] = (*pairs, (g, p))
    pairs = min(best.values(), key=lambda found: (-len(found), tuple(sorted(found))))
    hits = len(pairs)
    return Matched(tuple(sorted(pairs)), hits, len(predicted) + malformed - hits, len(gold) - hits)


def _closure(after: Sequence[Sequence[int]]) -> list[int]:
    """For each gold call, those that come before it, directly or not, as bits: each names only earlier ones."""
    before: list[int] = []
    for direct in after:
        before.append(sum({1 << i for i in direct}) | _any(before[i] for i in direct))
    return before


def _any(masks: Any) -> int:
    out = 0
    for mask in masks:
        out |= mask
    return out


def regex_schema(pattern: str) -> dict[str, Any]:
    """A JSON schema for texts that are wholly a pattern's, for the linear-time engine of tools.py."""
    return {"type": "string", "pattern": f"^(?:{pattern})$"}


def moment(text: str) -> tuple[Any, ...] | None:
    """A day, or a moment to the second with its offset, of a text in ISO 8601; None where it is neither."""
    text = text.strip()
    try:
        if len(text) <= 10 and "T" not in text:
            return (datetime.date.fromisoformat(text),)
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    zone = found.utcoffset()
    # a moment without an offset is a local one: it equals none with an offset
    return (found, None) if zone is None else (found.astimezone(datetime.UTC).replace(tzinfo=None), "UTC")


def _near(value: Any, matcher: Matcher) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or matcher.num is None:
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    # in decimals: 1.1 is within 0.1 of 1.0, which in binary it is not
    near, num, slack, rel = (Fraction(str(x)) for x in (value, matcher.num, matcher.abs, matcher.rel))
    return abs(near - num) <= max(slack, rel * abs(num))


def _same_items(gold: list[Any], value: list[Any]) -> bool:
    if len(gold) != len(value):
        return False
    left = list(gold)
    for item in value:
        found = next((i for i, other in enumerate(left) if json_equal(other, item)), None)
        if found is None:
            return False
        del left[found]
    return True


def matchers_of(rows: Mapping[str, Any]) -> dict[str, Matcher]:
    """Matchers of a fixture's `args`; ValueError where one is none."""
    try:
        return msgspec.convert(dict(rows), dict[str, Matcher])
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
