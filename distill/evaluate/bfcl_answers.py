"""Answers to a question of BFCL whose worth is known: its right calls, value by value, and the same with a fault."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

from distill.chat import ToolCall
from distill.draw import Draw
from distill.evaluate.bfcl_data import Case
from distill.evaluate.bfcl_judge import loosened
from distill.evaluate.bfcl_literals import write
from distill.evaluate.items import GoldCall, Matcher
from distill.evaluate.matching import json_equal
from distill.evaluate.transcripts import RawCall, Reply

Calls = list[ToolCall]
"""With values; `reply_of` writes them in the question's language."""


def reply_of(case: Case, calls: Calls) -> Reply:
    """A reply that makes the calls."""
    return Reply("", tuple(RawCall(one.name, json.dumps(written(case, one))) for one in calls))


def written(case: Case, call: ToolCall) -> dict[str, Any]:
    """A call's arguments, those of Java and JavaScript as source text."""
    if case.language == "python":
        return call.arguments
    types = case.types.get(call.name, {})
    return {key: write(value, *types.get(key, ("any", "any")), case.language) for key, value in call.arguments.items()}


def answers(case: Case, seed: int) -> Iterator[tuple[str, Calls]]:
    """Right answers with every possible value of every argument, one without what may be absent, then the faults."""
    gold = case.item.calls
    first = [_drawn(one, 0) for one in gold]
    most = max((len(one.enum or ()) for call in gold for one in call.arguments.values()), default=1)
    for number in range(max(1, most)):
        yield "right", [_drawn(one, number) for one in gold]
    if any(matcher.optional and matcher.enum for one in gold for matcher in one.arguments.values()):
        yield "right, nothing optional", [_drawn(one, 0, least=True) for one in gold]
    for name, change in CHANGES.items():
        changed = change(
            case, [ToolCall(one.name, dict(one.arguments)) for one in first], Draw(seed, case.item.id, name)
        )
        if changed is not None:
            yield name, changed


def _drawn(gold: GoldCall, number: int, least: bool = False) -> ToolCall:
    return ToolCall(gold.name, {
        key: matcher.enum[number % len(matcher.enum)]
        for key, matcher in gold.arguments.items() if matcher.enum and not (least and matcher.optional)
    })  # fmt: skip


def _possible(matcher: Matcher, value: Any) -> bool:
    """Whether a value is right, however leniently it is compared."""
    return any(json_equal(loosened(choice), loosened(value)) for choice in matcher.enum or ())


def _with_another(
    case: Case, calls: Calls, draw: Draw, change: Callable[[Any], Any], worth: Literal["equal", "loose", "wrong"]
) -> Calls | None:
    """One argument changed: to a value that is a possible answer too, only as BFCL compares texts, or not at all."""
    for at in draw.shuffle(range(len(calls))):
        gold = case.item.calls[at]
        for key in draw.shuffle(sorted(calls[at].arguments)):
            value, matcher = calls[at].arguments[key], gold.arguments[key]
            other = change(value)
            equal = any(json_equal(choice, other) for choice in matcher.enum or ())
            found = "equal" if equal else "loose" if _possible(matcher, other) else "wrong"
            if found == worth and (type(other) is not type(value) or other != value):
                calls[at].arguments[key] = other
                return calls
    return None


def _wrong_value(case: Case, calls: Calls, draw: Draw) -> Calls | None:
    return _with_another(case, calls, draw, _other, "wrong")


def _other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 17
    if isinstance(value, str):
        return f"{value} x17"
    if isinstance(value, list):
        return [*value, _other(value[0]) if value else 17]
    if isinstance(value, dict) and value:
        key = min(value)
        return {**value, key: _other(value[key])}
    return value


def _wrong_type(case: Case, calls: Calls, draw: Draw) -> Calls | None:
    return _with_another(case, calls, draw, lambda value: _retyped(value, case.language == "python"), "wrong")


def _retyped(value: Any, quoted: bool) -> Any:
    """`quoted`: whether a number as a text is another value; in source text it is the same."""
    if isinstance(value, list) and value:
        return value[0]
    return json.dumps(value) if quoted and not isinstance(value, str) else [value]


def _unpunctuated(value: Any) -> Any:
    """A text such as 1.5, -5 or 2024-1-11 as 15, 5 or 2024111."""
    return re.sub(r"[.-](?=\d)", "", value) if isinstance(value, str) else value


def _swapped(case: Case, calls: Calls, draw: Draw) -> Calls | None:
    """Two arguments of a call, of one type, change places."""
    for at in draw.shuffle(range(len(calls))):
        arguments, gold = calls[at].arguments, case.item.calls[at].arguments
        for one in sorted(arguments):
            for two in sorted(arguments):
                a, b = arguments[one], arguments[two]
                if one < two and type(a) is type(b) and not (_possible(gold[one], b) and _possible(gold[two], a)):
                    arguments[one], arguments[two] = b, a
                    return calls
    return None


def _missing(case: Case, calls: Calls, draw: Draw) -> Calls | None:
    for at in draw.shuffle(range(len(calls))):
        needed = [key for key, one in case.item.calls[at].arguments.items() if not one.optional]
        if needed:
            del calls[at].arguments[draw.choice(needed)]
            return calls
    return None


def _extra(case: Case, calls: Calls, draw: Draw) -> Calls:
    draw.choice(calls).arguments["undeclared_argument"] = "1"
    return calls


def _wrong_function(case: Case, calls: Calls, draw: Draw) -> Calls:
    at = draw.below(len(calls))
    used = {one.name for one in case.item.calls}
    others = [tool["name"] for tool in case.item.tools if tool["name"] not in used]
    calls[at] = ToolCall(draw.choice(others) if others else f"{calls[at].name}_other", calls[at].arguments)
    return calls


def _number_written_otherwise(kind: type) -> Callable[[Case, Calls, Draw], Calls | None]:
    other: type = float if kind is int else int

    def change(case: Case, calls: Calls, draw: Draw) -> Calls | None:
        def convert(value: Any) -> Any:
            return other(value) if type(value) is kind and other(value) == value else value

        return None if case.language != "python" else _with_another(case, calls, draw, convert, "equal")

    return change


RECASED, REPUNCTUATED = "other case", "a number's point or sign dropped"
CHANGES: dict[str, Callable[[Case, Calls, Draw], Calls | None]] = {
    "reversed order": lambda case, calls, draw: calls[::-1] if len(calls) > 1 else None,
    "5.0 for 5": _number_written_otherwise(int),
    "5 for 5.0": _number_written_otherwise(float),
    RECASED: lambda case, calls, draw: _with_another(
        case, calls, draw, lambda value: value.swapcase() if isinstance(value, str) else value, "loose"
    ),
    REPUNCTUATED: lambda case, calls, draw: _with_another(case, calls, draw, _unpunctuated, "loose"),
    "wrong value": _wrong_value,
    "wrong type": _wrong_type,
    "swapped values": _swapped,
    "missing argument": _missing,
    "undeclared argument": _extra,
    "wrong function": _wrong_function,
    "dropped call": lambda case, calls, draw: calls[:-1],
    "added call": lambda case, calls, draw: [*calls, calls[-1]],
}
RIGHT = ("right", "right, nothing optional", "reversed order", "5.0 for 5", "5 for 5.0")
"""Right by JSON equality; all other changes are faults."""
