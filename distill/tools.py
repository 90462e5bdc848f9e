"""Tool calls as data: exact matching, micro-F1, and JSON schemas. Nothing is executed, nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote

import msgspec

from distill.chat import Message, ToolCall
from distill.errors import InputError


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


_LONGEST_TEXT = 200
LARGEST_SCHEMA = 256 << 10
"""Bytes of a schema's JSON."""
_MOST_SUBSCHEMAS = 20_000  # with every reference written out
_DEEPEST = 64
_MOST_WORK = 10**8
_UNSUPPORTED = ("$dynamicRef", "$recursiveRef")
_IN_PLACE = {"$ref", "allOf", "anyOf", "oneOf", "if", "not", "dependencies"}


def arguments_problem(call: ToolCall, function: dict[str, Any]) -> str | None:
    """Why a call's arguments break the function's `parameters`, or None.

    An argument that the schema does not name is wrong even where it does not say `additionalProperties: false`.
    """
    return arguments_checker(function)(call.arguments)


def arguments_checker(function: dict[str, Any]) -> Callable[[dict[str, Any]], str | None]:
    """`arguments_problem` of many calls of one function."""
    parameters = function.get("parameters")
    try:
        checker = _checker({} if parameters is None else parameters, closed=True)
    except InputError as error:
        unusable = str(error)
        return lambda arguments: unusable
    return lambda arguments: _problem(arguments, checker)


def value_problem(value: Any, schema: dict[str, Any] | bool) -> str | None:
    """Why a JSON value, such as a tool's result, breaks a JSON schema, or None."""
    try:
        return _problem(value, _checker(schema))
    except InputError as error:
        return str(error)


def schema_problem(schema: dict[str, Any] | bool) -> str | None:
    """Why a JSON schema (draft 2020-12, or 7 and others by `$schema`) cannot be used, or None.

    References must be local, `#/...`; a pattern must be a regular expression without look-around and back-references.
    """
    try:
        _checker(schema)
    except InputError as error:
        return str(error)
    return None


class _Checker(NamedTuple):
    validator: Any
    work: int
    """Subschemas that a value is held against."""
    loops: int
    """References to a schema from within itself: each multiplies the work at every level of a value."""


def _problem(value: Any, checker: _Checker) -> str | None:
    nodes, depth = _extent(value)
    if depth > _DEEPEST or checker.work * nodes * checker.loops**depth > _MOST_WORK:
        return "it is too large or too deeply nested to be checked"
    try:
        error = next(checker.validator.iter_errors(value), None)
    except ValueError as wrong:  # a lone surrogate
        return f"it is not JSON: {wrong}"[:_LONGEST_TEXT]
    return None if error is None else _describe(error)[:_LONGEST_TEXT]


def _describe(error: Any) -> str:
    """One line with the JSON pointer, without the value itself."""
    where = "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in error.instance_path)
    if error.kind.name == "required":
        return f"{where}/{error.kind.property} is missing"
    if error.kind.name in ("unevaluatedProperties", "additionalProperties"):
        return f"{where}/{error.kind.unexpected[0]} is not in the schema"
    return f"{where or 'the whole'}: {error.message.splitlines()[0]}"


def _checker(schema: Any, *, closed: bool = False) -> _Checker:
    if not isinstance(schema, (dict, bool)):
        raise InputError("not a JSON schema: neither an object nor a boolean")
    try:
        return _compiled(msgspec.json.encode(schema, order="deterministic"), closed)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"not a JSON schema: {error}") from error


@lru_cache(maxsize=1024)
def _compiled(text: bytes, closed: bool) -> _Checker:
    """The validator of a canonical schema. Patterns run in a linear-time engine, and nothing is fetched."""
    import jsonschema_rs

    if len(text) > LARGEST_SCHEMA:
        raise InputError(f"the schema is larger than {LARGEST_SCHEMA >> 10} KiB")
    schema = msgspec.json.decode(text)
    work, loops = _expanse(schema)
    options: dict[str, Any] = {
        "offline": True, "validate_formats": False, "mask": "the value",
        "pattern_options": jsonschema_rs.RegexOptions(size_limit=1 << 20, dfa_size_limit=1 << 20),
    }  # fmt: skip
    try:
        validator = jsonschema_rs.validator_for(schema, **options)
    except ValueError as error:
        if isinstance(schema, bool) or "$schema" in schema:
            raise InputError(_unusable(error)) from error
        try:  # draft 7 without saying so: `items` as a list
            schema = schema | {"$schema": "http://json-schema.org/draft-07/schema#"}
            validator = jsonschema_rs.validator_for(schema, **options)
        except ValueError:
            raise InputError(_unusable(error)) from error
    if closed and isinstance(schema, dict) and not {"additionalProperties", "unevaluatedProperties"} & schema.keys():
        recent = isinstance(validator, (jsonschema_rs.Draft202012Validator, jsonschema_rs.Draft201909Validator))
        if recent or not _IN_PLACE & schema.keys():
            shut = schema | {"unevaluatedProperties" if recent else "additionalProperties": False}
            validator = jsonschema_rs.validator_for(shut, **options)
    return _Checker(validator, work, loops)


def _unusable(error: ValueError) -> str:
    where = "/".join(map(str, getattr(error, "instance_path", ())))
    return f"not a usable JSON schema: {f'/{where}: ' if where else ''}{str(error).splitlines()[0]}"[:_LONGEST_TEXT]


def _expanse(schema: Any) -> tuple[int, int]:
    """Subschemas of a schema with its references written out, and how many of these lead back to where they are from.
    InputError where there are too many, or a reference is not local."""
    work = loops = 0
    stack: list[tuple[Any, int, tuple[str, ...]]] = [(schema, 0, ("#",))]
    while stack:
        node, depth, trail = stack.pop()
        work += 1
        if work > _MOST_SUBSCHEMAS or depth > _DEEPEST:
            raise InputError("the schema is too large or too deeply nested, its references written out")
        if isinstance(node, list):
            stack += [(item, depth + 1, trail) for item in node if isinstance(item, (dict, list))]
        elif isinstance(node, dict):
            stack += [(item, depth + 1, trail) for item in node.values() if isinstance(item, (dict, list))]
            if wrong := next((name for name in _UNSUPPORTED if isinstance(node.get(name), str)), None):
                raise InputError(f"the schema uses {wrong}, which is not supported")
            if depth and isinstance(node.get("$id"), str):
                raise InputError("the schema holds an $id below its root, which is not supported")
            reference = node.get("$ref")
            if isinstance(reference, str) and reference in trail:
                loops += 1
            elif isinstance(reference, str):
                stack.append((_resolve(schema, reference), depth + 1, (*trail, reference)))
    return work, max(loops, 1)


def _resolve(schema: Any, reference: str) -> Any:
    """The part of a schema that `#/a/b` points to."""
    if reference != "#" and not reference.startswith("#/"):
        raise InputError(f"the schema refers to {reference[:80]!r}: only references of the form #/... are followed")
    node = schema
    for part in unquote(reference).split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            raise InputError(f"the schema refers to {reference[:80]!r}, which it does not hold")
    return node


def _extent(value: Any) -> tuple[int, int]:
    """Number of nodes of a JSON value, and how deep it is: at most one level more than is allowed."""
    nodes, depth, level = 0, 0, [value]
    while level and depth <= _DEEPEST:
        nodes += len(level)
        depth += 1
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = inner
    return nodes, depth


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
