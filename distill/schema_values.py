"""JSON values that satisfy a JSON schema, drawn from a seed: what a simulated tool returns.

Besides the standard keywords: `examples` are preferred to made-up values; `x-argument: "a/b"` takes the call's argument
at that path where there is one; `x-digits` is the number of decimals.
"""

from __future__ import annotations

import datetime
import math
import re
import re._constants as sre
import re._parser
from collections.abc import Mapping
from typing import Any

from distill.draw import Draw
from distill.errors import InputError

_MOST_VALUES = 2000
_MOST_CHARACTERS = 4096
_MOST_ITEMS = 4  # of an array that sets no limit
_DEEPEST = 24
_PLAIN = "abcdefghijklmnopqrstuvwxyz0123456789"
_CATEGORIES = {
    sre.CATEGORY_DIGIT: "0123456789", sre.CATEGORY_WORD: _PLAIN, sre.CATEGORY_SPACE: " ",
    sre.CATEGORY_NOT_DIGIT: "abcdefghij", sre.CATEGORY_NOT_WORD: "-", sre.CATEGORY_NOT_SPACE: _PLAIN,
}  # fmt: skip
_EPOCH = datetime.datetime(2026, 1, 1)
_WORDS = ("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "harbor", "iris", "juniper", "kelp", "lagoon",
          "maple", "north", "onyx", "pebble", "quartz", "river", "slate", "thistle", "umber", "violet", "willow",
          "yarrow", "zephyr")  # fmt: skip


class _CannotDraw(InputError):
    """The schema asks for what cannot be made up here."""


def value_of(schema: Any, draw: Draw, arguments: Mapping[str, Any]) -> Any:
    """A value for the schema; InputError where it uses what is not supported. Whoever calls checks the value."""
    try:
        return _Maker(schema, draw, arguments).value(schema, 0)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        # a schema may be valid and yet mean nothing to draw from, such as a minimum above the maximum
        raise _CannotDraw(f"no value can be made up for the schema: {error}") from error


class _Maker:
    def __init__(self, root: Any, draw: Draw, arguments: Mapping[str, Any]) -> None:
        self._root, self._draw, self._arguments = root, draw, arguments
        self._made = self._steps = 0  # values and steps through patterns: both bounded

    def value(self, schema: Any, depth: int) -> Any:
        self._made += 1
        if self._made > _MOST_VALUES or depth > _DEEPEST:
            raise _CannotDraw("the schema is too large or too deeply nested for a made-up value")
        if not isinstance(schema, dict):
            return {} if schema is not False else _refuse("false allows no value")
        if "$ref" in schema:
            return self.value(self._target(schema["$ref"]), depth + 1)
        if "const" in schema:
            return schema["const"]
        given = self._given(schema.get("x-argument"))
        if given is not None:
            return given
        for choices in (schema.get("enum"), schema.get("examples")):
            if choices:
                return self._draw.choice(choices)
        for keyword in ("oneOf", "anyOf"):
            if schema.get(keyword):
                return self.value(self._draw.choice(schema[keyword]), depth + 1)
        return self._typed(schema, depth)

    def _typed(self, schema: dict[str, Any], depth: int) -> Any:
        kind = schema.get("type") or ("object" if "properties" in schema else "string")
        if isinstance(kind, list):
            kind = self._draw.choice(kind)
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind == "string":
            return self._text(schema)
        if kind in ("integer", "number"):
            return self._number(schema, kind)
        return self._draw.chance(0.5) if kind == "boolean" else None

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        required = schema.get("required", ())
        return {
            name: self.value(rule, depth + 1)
            for name, rule in schema.get("properties", {}).items()
            if name in required or self._draw.chance(0.7)
        }

    def _array(self, schema: dict[str, Any], depth: int) -> list[Any]:
        low = schema.get("minItems", 0)
        high = schema.get("maxItems", max(low, _MOST_ITEMS))
        items = [self.value(rule, depth + 1) for rule in schema.get("prefixItems", ())]
        length = self._draw.between(low, max(low, min(high, low + 2 * _MOST_ITEMS)))
        for _ in range(4 * length):
            if len(items) >= length:
                break
            item = self.value(schema.get("items", {}), depth + 1)
            if not schema.get("uniqueItems") or item not in items:
                items.append(item)
        return items

    def _number(self, schema: dict[str, Any], kind: str) -> int | float:
        lows = [schema[key] for key in ("minimum", "exclusiveMinimum") if key in schema]
        highs = [schema[key] for key in ("maximum", "exclusiveMaximum") if key in schema]
        low = max(lows) if lows else min(0, min(highs, default=1000) - 1000)
        high = min(highs) if highs else max(1000, low + 1000)
        above, below = schema.get("exclusiveMinimum") == low, schema.get("exclusiveMaximum") == high
        step = schema.get("multipleOf", 1 if kind == "integer" else None)
        if step:
            first, last = math.ceil(low / step), math.floor(high / step)
            return (
                self._draw.between(first + (above and first * step == low), last - (below and last * step == high))
                * step
            )
        value = low + (high - low) * (0.0005 + 0.999 * self._draw.uniform())  # never an end
        rounded = round(value, schema.get("x-digits", 2))
        return rounded if low < rounded < high else value

    def _text(self, schema: dict[str, Any]) -> str:
        moment = _EPOCH + datetime.timedelta(minutes=5 * self._draw.below(150_000))
        form = schema.get("format")
        if form in ("date", "time", "date-time"):
            return {"date": moment.date().isoformat(), "time": f"{moment:%H:%M}:00Z",
                    "date-time": f"{moment:%Y-%m-%dT%H:%M}:00Z"}[form]  # fmt: skip
        word, number = self._draw.choice(_WORDS), self._draw.between(10, 99)
        if form == "email":
            return f"{word}{number}@example.com"
        if form in ("uri", "url"):
            return f"https://example.com/{word}/{number}"
        if form == "uuid":
            text = f"{self._draw.bits():016x}{self._draw.bits():016x}"
            return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-a{text[17:20]}-{text[20:]}"
        if "pattern" in schema:
            return self._matching(schema["pattern"])
        text, most = f"{word} {self._draw.choice(_WORDS)}", schema.get("maxLength", _MOST_CHARACTERS)
        while len(text) < min(schema.get("minLength", 0), _MOST_CHARACTERS):
            text += f" {self._draw.choice(_WORDS)}"
        return text[:most]

    def _matching(self, pattern: str) -> str:
        """A string that the regular expression matches; repeats stay near their least number."""
        try:
            parsed = re._parser.parse(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise _CannotDraw(f"no string can be made up for the pattern {pattern!r}: {error}") from error
        out: list[str] = []
        self._expand(parsed, out, pattern)
        return "".join(out)

    def _expand(self, parts: Any, out: list[str], pattern: str) -> None:
        for operation, detail in parts:
            self._steps += 1
            if self._steps > 10 * _MOST_CHARACTERS or len(out) > _MOST_CHARACTERS:
                raise _CannotDraw(f"the pattern {pattern!r} asks for too long a string")
            if operation is sre.LITERAL:
                out.append(chr(detail))
            elif operation is sre.ANY:
                out.append(self._draw.choice("abcdefghij"))
            elif operation is sre.NOT_LITERAL:
                out.append(self._draw.choice(_PLAIN.replace(chr(detail), "")))
            elif operation is sre.IN:
                out.append(self._member(detail, pattern))
            elif operation in (sre.MAX_REPEAT, sre.MIN_REPEAT):
                low, high, repeated = detail
                if int(low) > _MOST_CHARACTERS:
                    raise _CannotDraw(f"the pattern {pattern!r} asks for too long a string")
                for _ in range(self._draw.between(int(low), min(int(high), int(low) + 4))):
                    self._steps += 1
                    self._expand(repeated, out, pattern)
            elif operation is sre.SUBPATTERN:
                self._expand(detail[-1], out, pattern)
            elif operation is sre.BRANCH:
                self._expand(self._draw.choice(detail[1]), out, pattern)
            elif operation is not sre.AT:
                raise _CannotDraw(f"no string can be made up for the pattern {pattern!r}: it uses {operation}")

    def _member(self, members: Any, pattern: str) -> str:
        choices, negated = "", False
        for operation, detail in members:
            if operation is sre.NEGATE:
                negated = True
            elif operation is sre.LITERAL:
                choices += chr(detail)
            elif operation is sre.RANGE:
                choices += "".join(map(chr, range(detail[0], min(detail[1], detail[0] + 255) + 1)))
            elif operation is sre.CATEGORY:
                choices += _CATEGORIES[detail]
            else:
                raise _CannotDraw(f"no string can be made up for the pattern {pattern!r}: it uses {operation}")
        return self._draw.choice([c for c in _PLAIN if c not in choices] if negated else choices)

    def _given(self, path: str | None) -> Any:
        if path is None:
            return None
        value: Any = self._arguments
        for part in path.split("/"):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def _target(self, reference: Any) -> Any:
        target = self._root
        for part in str(reference).removeprefix("#").strip("/").split("/") if reference != "#" else ():
            target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        return target if target is not None else _refuse(f"the reference {reference!r} leads nowhere")


def _refuse(why: str) -> Any:
    raise _CannotDraw(why)
