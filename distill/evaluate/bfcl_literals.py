"""Values as Java and JavaScript write them, and back: BFCL's arguments in these languages are source text.

What is no literal of its declared type, such as the name of a variable, stands for itself, as a text.
"""

from __future__ import annotations

import re
from typing import Any, Literal

Language = Literal["python", "java", "javascript"]
_LISTS = ("Array", "ArrayList", "array")
_OBJECTS = ("HashMap", "dict")
_NUMBERS = {  # pattern of the text, and what it ends with
    ("java", "byte"): (r"-?\d+", ""),
    ("java", "short"): (r"-?\d+", ""),
    ("java", "integer"): (r"-?\d+", ""),
    ("java", "long"): (r"-?\d+[lL]", "L"),
    ("java", "float"): (r"-?\d+(\.\d+)?([eE][+-]?\d+)?[fF]", "f"),
    ("java", "double"): (r"-?\d+(\.\d+)?([eE][+-]?\d+)?", ""),
    ("javascript", "integer"): (r"-?\d+", ""),
    ("javascript", "float"): (r"-?\d+(\.\d+)?", ""),
    ("javascript", "Bigint"): (r"-?\d+n", "n"),
}
_FORM = re.compile(r"-?\d{1,400}(\.\d{1,400})?([eE][+-]?\d{1,3})?[lLfFdDn]?")
_OPENINGS = {
    "java": re.compile(r"new\s+\w+\s*\[\s*\]\s*(?=\{)|(?:Arrays\.asList|List\.of|Set\.of)\s*(?=\()"),
    "javascript": re.compile(r"(?:new\s+Array\s*)?(?=[\[(])"),
}
_WRAPPED = re.compile(r"new\s+(?:ArrayList|HashMap)\s*<[^<>()]*>\s*(?=\()")
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_JAVA_ITEMS = {"integer": "int", "long": "long", "double": "double", "float": "float", "char": "char",
               "boolean": "boolean", "String": "String"}  # fmt: skip
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
_LONGEST = 1 << 16
_DEEPEST = 8


def read(text: str, kind: str, items: str, language: Language) -> Any:
    """The value of a text of a declared type; the text itself where it is no literal of it."""
    if len(text) > _LONGEST:
        return text
    whole = text.strip()
    if (language, kind) in _NUMBERS:
        number = _number(whole) if re.fullmatch(_NUMBERS[language, kind][0], whole) else None
        return text if number is None else number
    if kind in ("boolean", "Boolean"):
        return whole == "true" if whole in ("true", "false") else text
    if kind == "String" and language == "javascript":
        inner = _unquoted(whole)
        return text if inner is None else inner
    if kind in _LISTS:
        found = _list(whole, items, language, _DEEPEST)
        return text if found is None else found
    if kind in _OBJECTS:
        members = _object(whole, language, _DEEPEST)
        return text if members is None else members
    return text


def write(value: Any, kind: str, items: str, language: Language) -> str:
    """A text that `read` takes for the value."""
    if isinstance(value, list):
        if kind == "ArrayList":
            return f"new ArrayList<>(Arrays.asList({_joined(value, items, language)}))"
        if language == "java":
            return f"new {_JAVA_ITEMS.get(items, 'Object')}[]{{{_joined(value, items, language)}}}"
        return f"[{_joined(value, items, language)}]"
    if isinstance(value, dict):
        if language == "java":
            puts = " ".join(f"put({_quoted(key)}, {_item(one, 'any', language)});" for key, one in value.items())
            return f"new HashMap<String, Object>() {{{{ {puts} }}}}" if puts else "new HashMap<String, Object>()"
        return "{" + ", ".join(f"{_quoted(key)}: {_item(one, 'any', language)}" for key, one in value.items()) + "}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (int, float)):
        return f"{value}{_NUMBERS.get((language, kind), ('', ''))[1]}"
    return str(value)


def _joined(values: list[Any], items: str, language: Language) -> str:
    return ", ".join(_item(one, items, language) for one in values)


def _item(value: Any, kind: str, language: Language) -> str:
    """A value inside a list or an object, where a text needs quotes."""
    if isinstance(value, str):
        return f"'{value}'" if kind == "char" and len(value) == 1 else _quoted(value)
    return write(value, "ArrayList" if language == "java" and isinstance(value, list) else kind, "any", language)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _unquoted(text: str) -> str | None:
    """What is between the quotes of one quoted text."""
    if len(text) < 2 or text[0] not in "\"'" or text[-1] != text[0] or _end(text, 0) != len(text):
        return None
    return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found.group(1), found.group(1)), text[1:-1], flags=re.DOTALL)


def _number(text: str) -> int | float | None:
    if not _FORM.fullmatch(text):
        return None
    plain = text.rstrip("lLfFdDn")
    value = int(plain) if plain.lstrip("-").isdigit() else float(plain)
    return value if abs(value) < float("inf") else None


def _any(text: str, language: Language, depth: int) -> Any:
    """A value by its form."""
    if (inner := _unquoted(text)) is not None:
        return inner
    if text in ("true", "false"):
        return text == "true"
    if text == "null":
        return None
    for found in (_number(text), _list(text, "any", language, depth), _object(text, language, depth)):
        if found is not None:
            return found
    return text


def _list(text: str, items: str, language: Language, depth: int) -> list[Any] | None:
    if depth == 0:
        return None
    if language == "java" and (wrapped := _WRAPPED.match(text)) and "HashMap" not in wrapped.group():
        inside = _inside(text[wrapped.end() :])
        if inside is not None:
            return _list(inside, items, language, depth - 1) if inside else []
    opening = _OPENINGS[language].match(text)
    inside = _inside(text[opening.end() :]) if opening else None
    if inside is None or (language == "javascript" and text[0] == "("):
        return None
    typed = items in ("String", "char", "any") or items == ""
    return [_any(one, language, depth - 1) if typed else read(one, items, "any", language) for one in _parts(inside)]


def _object(text: str, language: Language, depth: int) -> dict[str, Any] | None:
    if depth == 0:
        return None
    pairs: list[list[str]] = []
    if language == "javascript":
        inside = _inside(text) if text.startswith("{") else None
        if inside is None:
            return None
        pairs = [_parts(one, ":") for one in _parts(inside)]
    elif (wrapped := _WRAPPED.match(text)) and "HashMap" in wrapped.group():
        body = text[wrapped.end() :].removeprefix("(").lstrip().removeprefix(")").strip()
        inside = _inside(body) if body else ""
        inner = inside if not inside else _inside(inside)
        if inner is None:
            return None
        statements = [one.strip() for one in _parts(inner, ";")]
        if not all(re.match(r"put\s*\(", one) for one in statements):
            return None
        pairs = [_parts(_inside(one[one.index("(") :]) or "") for one in statements]
    else:
        return None
    if not all(len(pair) == 2 for pair in pairs):
        return None
    keys = [_unquoted(key) if key[:1] in "\"'" else key for key, _ in pairs]
    return {str(key): _any(value, language, depth - 1) for key, (_, value) in zip(keys, pairs)}


def _inside(text: str) -> str | None:
    """What is between the brackets, if the text is one bracketed whole."""
    text = text.strip()
    return text[1:-1].strip() if text[:1] in _PAIRS and _end(text, 0) == len(text) else None


def _parts(text: str, separator: str = ",") -> list[str]:
    """Cut at the separators that are in no quotes and no brackets; what is opened and never closed is one piece."""
    parts, start, at = [], 0, 0
    while at < len(text):
        if text[at] == separator:
            parts.append(text[start:at].strip())
            start = at = at + 1
        else:
            at = _end(text, at) or len(text)
    rest = text[start:].strip()
    return [*parts, rest] if rest else parts


def _end(text: str, at: int) -> int:
    """Where the quoted or bracketed piece, or the one character, that begins at `at` ends; 0 if it never does."""
    closing: list[str] = []
    while at < len(text):
        character = text[at]
        if character in "\"'":
            at += 1
            while at < len(text) and text[at] != character:
                at += 2 if text[at] == "\\" else 1
            if at >= len(text):
                return 0
        elif character in _PAIRS:
            closing.append(_PAIRS[character])
        elif closing and character == closing[-1]:
            closing.pop()
        at += 1
        if not closing:
            return at
    return 0
