"""Constrained decoding: a turn of the student as a grammar over its tokens, by llguidance.

A turn is text without call marks, then calls in exactly the template's form: names among the offered tools, arguments
by the tool's schema, closed as distill.tools.arguments_checker judges, an object's properties in any order. What the
constraint lets through is judged by scoring all the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from distill.errors import InputError
from distill.tokenizer import CALL_END, CALL_START, END_OF_TEXT, TURN_END, TURN_START, Tokenizer

MOST_CALLS = 16
"""Calls in a turn."""
_DEEPEST = 8
"""Nested objects whose properties may come in any order; below, in the order of the schema."""
_MOST_PROPERTIES = 64
"""Of an object whose properties may come in any order: each is a bit of the grammar's parameter."""
_MOST_ITEMS = 64
"""Of a list whose items' properties may come in any order."""
_NOTES = {"title", "description", "default", "examples", "$schema", "$comment", "$id", "deprecated", "strict"}
_PLAIN_OBJECT = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_IN_PLACE = {"$ref", "allOf", "anyOf", "oneOf", "if", "not", "dependencies"}
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_VALUES = ("enum", "const", "required", "default", "examples")
_LIMITS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_LARGEST = 10**15
_AS_TEMPLATE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_CONTROL = [mark.encode() for mark in (END_OF_TEXT, TURN_START, TURN_END)]
_LONGEST_MARK = max(map(len, _CONTROL))
_START, _END = CALL_START.encode(), CALL_END.encode()
# the model chooses its own tokens of a text, also where the text is settled; NUMBER: a reader can hold it, unlike 1e999
_COMMON = r"""
%llguidance {"no_forcing": true}
TEXT: /(?s:.*)/ & ~/(?s:.*)<\/?tool_call>(?s:.*)/
lead[lazy]: LEAD
LEAD: /(?s:.*)<tool_call>/ & ~/(?s:.*)<\/tool_call>(?s:.*)/
NUMBER: /-?(0|[1-9][0-9]{0,39})(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,2})?/
STRING: /"([^"\\\x00-\x1f\x7f]|\\["\\\/bfnrt])*"/
any: STRING | NUMBER | "true" | "false" | "null" | any_list | any_object
any_list: "[" (any (", " any)*)? "]"
any_object: "{" (any_member (", " any_member)*)? "}"
any_member: STRING ": " any
"""


class Grammars:
    """Makes the constraint of each turn."""

    def __init__(self, tokenizer: Tokenizer, *, must_call: bool = False) -> None:
        """`must_call`: a turn is calls, without text. InputError where the tokenizer is not byte-level."""
        if not tokenizer.bytes_by_id:
            raise InputError(f"{tokenizer.source}: constrained decoding needs a byte-level tokenizer")
        self._must_call, self._stop_ids = must_call, tokenizer.stop_ids
        self._bytes = [tokenizer.bytes_by_id.get(identity, b"") for identity in range(tokenizer.vocab_size)]
        self._llguidance = _llguidance()
        wrapper = self._llguidance.TokenizerWrapper(_Vocabulary(tokenizer, self._bytes))
        self._tokenizer = self._llguidance.LLTokenizer(wrapper, eos_token=sorted(tokenizer.stop_ids))
        self._takes: dict[bytes, bool] = {}
        self._unconstrained: dict[str, str] = {}

    def identity(self) -> dict[str, Any]:
        """What a report says of it. A tool that was never offered or looked at is not known yet."""
        return {
            "grammar": f"llguidance {self._llguidance.__version__}",
            "must_call": self._must_call,
            "unconstrained_tools": dict(sorted(self._unconstrained.items())),
        }

    def look_at(self, tools: Iterable[Mapping[str, Any]]) -> None:
        """See which of them can be constrained."""
        for tool in tools:
            self._can_take(tool.get("function", tool))

    def begin(self, tools: Sequence[Mapping[str, Any]]) -> Constraint:
        """The constraint of one turn in which these functions are offered."""
        calls = []
        lines: list[str] = []
        for index, tool in enumerate(tools):
            function = tool.get("function", tool)
            rules = _Rules(f"t{index}", function)
            arguments = rules.arguments() if self._can_take(function) else "any_object"
            lines += rules.lines
            head = f'{{"name": {_json(function["name"])}, "arguments": '
            calls.append(f"{_literal(head)} {arguments} {_literal('}' + CALL_END)}")
        if not calls:
            turn = "TEXT"
        else:
            lines.append("call: " + "\n  | ".join(calls))
            more = f"call ({_literal(CALL_START)} call){{0,{MOST_CALLS - 1}}}"
            turn = f"{_literal(CALL_START)} {more}" if self._must_call else f"TEXT | lead {more}"
        grammar = "\n".join([_COMMON, f"start: {turn}", *lines])
        matcher = self._llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = _one_line(matcher.get_error())
            raise InputError(f"constrained decoding: no grammar of the {len(calls)} tools offered: {reason}")
        return Constraint(matcher, self._bytes, self._stop_ids)

    def _can_take(self, function: Mapping[str, Any]) -> bool:
        """Whether llguidance takes the function's schema; another function may have any JSON object as arguments."""
        key = msgspec.json.encode(function, order="sorted")
        if key not in self._takes:
            rules = _Rules("t", function)
            grammar = "\n".join([_COMMON, f"start: {rules.arguments()}", *rules.lines])
            matcher = self._llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
            self._takes[key] = not matcher.is_error()
            if matcher.is_error():
                self._unconstrained[str(function["name"])] = _one_line(matcher.get_error())
        return self._takes[key]


class Constraint:
    """Which tokens one turn may go on with."""

    def __init__(self, matcher: Any, bytes_by_id: Sequence[bytes], stop_ids: set[int]) -> None:
        self._matcher, self._bytes, self._stop_ids = matcher, bytes_by_id, stop_ids
        self._open = b""
        """What was said since the last call was closed."""

    def choose(self, logits_V: np.ndarray) -> int:
        """The likeliest token that the grammar allows, taken as said; ties go to the lowest id."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed_V = np.zeros(len(logits_V), bool)
        mask = np.unpackbits(bits, bitorder="little")[: min(len(logits_V), len(self._bytes))]
        allowed_V[: len(mask)] = mask.astype(bool)
        scores_V = np.where(allowed_V, logits_V, -np.inf)
        first = token = int(scores_V.argmax())
        while token not in self._stop_ids and self._spoils(token):
            scores_V[token] = -np.inf
            token = int(scores_V.argmax())
            if scores_V[token] == -np.inf:  # nothing else is left: scoring will find it
                token = first
                break
        if token not in self._stop_ids:
            self._matcher.consume_token(token)
            self._open = _after_calls(self._open + self._bytes[token])
        return token

    def _spoils(self, token: int) -> bool:
        """Whether a mark of the template would come to stand, letter by letter, where it is none: within a string. A
        reader cuts the turn at marks before it reads JSON, and no schema can forbid them."""
        text = self._open + self._bytes[token]
        if any(mark in text[max(len(self._open) - _LONGEST_MARK, 0) :] for mark in _CONTROL):
            return True
        body = text.partition(_START)[2]
        inner, end, _ = body.partition(_END)
        return _START in inner or (bool(end) and not _is_json(inner))


class _Vocabulary:
    """Our tokenizer as llguidance wants it: call marks are text, since not every tokenizer has them as tokens."""

    def __init__(self, tokenizer: Tokenizer, bytes_by_id: list[bytes]) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.turn_end, None
        self.tokens = bytes_by_id
        self.special_token_ids = sorted(tokenizer.stop_ids.union(tokenizer.encode(TURN_START)))
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace"))


class _Rules:
    """The rules of one function's arguments, in llguidance's dialect of Lark."""

    def __init__(self, prefix: str, function: Mapping[str, Any]) -> None:
        self._prefix = prefix
        parameters = function.get("parameters")
        root: Any = {} if parameters is None else parameters
        self._root = _without_notes(root) if isinstance(root, dict) else {"not": {}}
        self._defs = {name: self._root[name] for name in ("$defs", "definitions") if name in self._root}
        self.lines: list[str] = []
        self._named = 0

    def arguments(self) -> str:
        """The rule of the whole; what it calls is in `lines`."""
        root = {"type": "object", **self._root}
        if not {"additionalProperties", "unevaluatedProperties"} & root.keys():
            root["unevaluatedProperties" if _IN_PLACE & root.keys() else "additionalProperties"] = False
        return self._value(root, 0)

    def _value(self, schema: Any, depth: int) -> str:
        if schema is True or schema == {}:
            return "any"
        if isinstance(schema, dict):
            kind = schema.get("type")
            if kind == "object" and depth < _DEEPEST and _is_plain_object(schema):
                return self._object(schema, depth)
            if schema == {"type": "object"}:
                return "any_object"
            if schema == {"type": "number"}:
                return "NUMBER"
            if kind == "array" and depth < _DEEPEST and _is_plain_list(schema):
                return self._list(schema, depth)
            schema = {**schema, **(self._defs if '"$ref"' in _json(schema) else {}), "x-guidance": _AS_TEMPLATE}
            schema = _bounded(schema)
        return self._rule(f"%json {_json(schema)}")

    def _object(self, schema: Mapping[str, Any], depth: int) -> str:
        """Each property once at most, in any order: bit i is set when property i was written, the required first."""
        required = dict.fromkeys(schema.get("required", ()))
        properties = {name: value for name, value in schema.get("properties", {}).items() if value is not False}
        names = [*required, *(name for name in properties if name not in required)]
        values = [self._value(properties[name], depth + 1) for name in names]
        if not names:
            return self._rule(_literal("{}"))
        here = self._name()
        end = f'"" %if is_ones([0:{len(required)}])' if required else '""'
        for rule, separator in ((f"{here}_first", ""), (f"{here}_more", ", ")):
            options = [
                f"{_literal(f'{separator}{_json(name)}: ')} {value} {here}_more::set_bit({bit}) %if bit_clear({bit})"
                for bit, (name, value) in enumerate(zip(names, values))
            ]
            self.lines.append(f"{rule}::_ : " + "\n  | ".join([end, *options]))
        self.lines.append(f'{here}: "{{" {here}_first::0x0 "}}"')
        return here

    def _list(self, schema: Mapping[str, Any], depth: int) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return self._rule(_literal("[]"))
        item = self._value(schema["items"], depth + 1)
        more = "" if most == 1 else f'(", " {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        return self._rule(f'"[" {item} {more} "]"' if least else f'"[" ({item} {more})? "]"')

    def _rule(self, body: str) -> str:
        name = self._name()
        self.lines.append(f"{name}: {body}")
        return name

    def _name(self) -> str:
        self._named += 1
        return f"{self._prefix}_{self._named}"


def _is_plain_object(schema: Mapping[str, Any]) -> bool:
    """An object of named properties and no others, which any order may write."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if properties is None and schema.get("additionalProperties") is not False:
        return False
    properties = {} if properties is None else properties
    return (
        schema.keys() <= _PLAIN_OBJECT
        and schema.get("additionalProperties", False) is False
        and isinstance(properties, dict)
        and isinstance(required, list)
        and all(isinstance(name, str) and properties.get(name, False) is not False for name in required)
        and len(properties) <= _MOST_PROPERTIES
    )


def _is_plain_list(schema: Mapping[str, Any]) -> bool:
    """A list of alike items, so many at least and at most."""
    least, most = schema.get("minItems", 0), schema.get("maxItems", _MOST_ITEMS)
    counts = isinstance(least, int) and isinstance(most, int) and 0 <= least <= most <= _MOST_ITEMS
    return counts and {"items"} <= schema.keys() <= {"type", "items", "minItems", "maxItems"}


def _without_notes(schema: Any) -> Any:
    """A schema without what says nothing about a value, `format` included, which is not judged."""
    if isinstance(schema, list):
        return [_without_notes(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            out[key] = {name: _without_notes(part) for name, part in value.items()}
        elif key not in _NOTES and key != "format":
            out[key] = value if key in _VALUES else _without_notes(value)
    return out


def _bounded(schema: Any) -> Any:
    """A schema with limits to numbers that have none, as llguidance alone would write 1e999, which no reader holds."""
    if isinstance(schema, list):
        return [_bounded(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {
        key: {name: _bounded(part) for name, part in value.items()} if key in _NAMED and isinstance(value, dict)
        else value if key in _VALUES else _bounded(value)
        for key, value in schema.items()
    }  # fmt: skip
    if "number" in (out.get("type"), *_types(out)) and not _LIMITS & out.keys():
        out |= {"minimum": -_LARGEST, "maximum": _LARGEST}
    return out


def _types(schema: Mapping[str, Any]) -> list[Any]:
    kinds = schema.get("type")
    return kinds if isinstance(kinds, list) else []


def _after_calls(text: bytes) -> bytes:
    """What follows the last closed call."""
    return text.rpartition(_END)[2]


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return False
    return True


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _literal(text: str) -> str:
    """A text in Lark."""
    return json.dumps(text, ensure_ascii=False)


def _one_line(error: str) -> str:
    """The reason, without the picture of the grammar."""
    return " ".join(error.split("\n")[0].split())[:200]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise InputError(f"constrained decoding needs llguidance: pip install 'distill[evaluate]' ({error})") from error
    return llguidance
