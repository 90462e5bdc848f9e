"""Tool calls as data: exact matching and micro-F1. Nothing is executed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from distill.chat import Message, ToolCall


class F1(NamedTuple):
    """Counts over calls, and F1 = 2TP / (2TP + FP + FN)."""

    true_positive: int
    false_positive: int
    false_negative: int

    @property
    def value(self) -> float:
        """Micro-F1; 0 where there was nothing to find and nothing found."""
        total = 2 * self.true_positive + self.false_positive + self.false_negative
        return 2 * self.true_positive / total if total else 0.0


def same_call(a: ToolCall, b: ToolCall) -> bool:
    """Equal names and equal JSON arguments, types included: 1, 1.0, true and "1" all differ."""
    return a.name == b.name and _typed(a.arguments) == _typed(b.arguments)


def call_f1(pairs: Iterable[tuple[Sequence[ToolCall], Sequence[ToolCall], int]]) -> F1:
    """Micro-F1 over (predicted calls, gold calls, malformed calls) of each item. A malformed call is a false
    positive. Equality is an equivalence, so matching greedily is matching maximally."""
    true_positive = false_positive = false_negative = 0
    for predicted, gold, malformed in pairs:
        left = list(gold)
        for call in predicted:
            match = next((i for i, g in enumerate(left) if same_call(call, g)), None)
            if match is None:
                false_positive += 1
            else:
                del left[match]
                true_positive += 1
        false_positive += malformed
        false_negative += len(left)
    return F1(true_positive, false_positive, false_negative)


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "object": (dict,),
    "array": (list,), "null": (type(None),),
}  # fmt: skip


def arguments_problem(call: ToolCall, schema: dict[str, Any]) -> str | None:
    """Why a call's arguments break the tool's JSON schema, or None: required and unknown names, types, enums."""
    parameters = schema.get("parameters", {})
    properties = parameters.get("properties", {}) if isinstance(parameters, dict) else None
    if not isinstance(properties, dict) or not all(isinstance(rule, dict) for rule in properties.values()):
        return "the tool's parameters are not a JSON schema"
    for name in parameters.get("required", []):
        if name not in call.arguments:
            return f"argument {name} is missing"
    for name, value in call.arguments.items():
        if name not in properties:
            return f"argument {name} is not in the schema"
        rule = properties[name]
        if "enum" in rule and not any(_typed(value) == _typed(choice) for choice in rule["enum"]):
            return f"argument {name} is not one of its enum"
        wanted = rule.get("type")
        kinds = [wanted] if isinstance(wanted, str) else wanted or []
        if kinds and not any(_is_type(value, kind) for kind in kinds):
            return f"argument {name} is not of type {' or '.join(kinds)}"
    return None


def _is_type(value: object, kind: str) -> bool:
    return isinstance(value, _JSON_TYPES.get(kind, (object,))) and (kind == "boolean" or not isinstance(value, bool))


def _typed(value: object) -> object:
    if isinstance(value, dict):
        return ("object", frozenset((key, _typed(item)) for key, item in value.items()))
    if isinstance(value, list):
        return ("array", tuple(_typed(item) for item in value))
    return (type(value).__name__, value)


class EvalItem(NamedTuple):
    """A prompt to generate from, with what a right answer holds."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    gold_calls: tuple[ToolCall, ...] | None = None
    """The calls that the answer must make, () for none; None where calls are not judged."""
    gold_text: str | None = None
    max_new_tokens: int = 48
    min_room: int = 8
    """Tokens that must be left for the answer, or the item does not fit the package."""
