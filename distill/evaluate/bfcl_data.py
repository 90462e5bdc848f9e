"""BFCL v4's single-turn categories, read from the package `bfcl-eval` as it is on PyPI: a wheel, or a folder it is in.

Nothing of the package is imported or executed here, and every file is held against the package's own RECORD.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import itertools
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from distill.chat import Message
from distill.errors import DatasetError, InputError
from distill.evaluate.bfcl_literals import Language, write
from distill.evaluate.items import GoldCall, Item, Matcher

PACKAGE = "bfcl_eval"
PREFIX = "BFCL_v4_"
Expects = Literal["calls", "no_call", "some_call"]
CATEGORIES: dict[str, tuple[Language, Expects]] = {
    "simple_python": ("python", "calls"),
    "multiple": ("python", "calls"),
    "parallel": ("python", "calls"),
    "parallel_multiple": ("python", "calls"),
    "simple_java": ("java", "calls"),
    "simple_javascript": ("javascript", "calls"),
    "irrelevance": ("python", "no_call"),
    "live_simple": ("python", "calls"),
    "live_multiple": ("python", "calls"),
    "live_parallel": ("python", "calls"),
    "live_parallel_multiple": ("python", "calls"),
    "live_irrelevance": ("python", "no_call"),
    "live_relevance": ("python", "some_call"),
}
"""Language of the arguments, and what a right reply does."""
OUT_OF_SCOPE = {
    "multi_turn_base": "runs the package's own simulators",
    "multi_turn_miss_func": "runs the package's own simulators",
    "multi_turn_miss_param": "runs the package's own simulators",
    "multi_turn_long_context": "runs the package's own simulators",
    "memory": "runs the package's own stores, one of them with an embedding model to be downloaded",
    "web_search": "searches the live web",
    "format_sensitivity": "asks for other output formats than the template's; not scored by BFCL either",
}
_TYPES = {
    "string": "string", "integer": "integer", "number": "number", "float": "number", "boolean": "boolean",
    "array": "array", "tuple": "array", "dict": "object", "object": "object",
}  # fmt: skip
TEXTS = ("string", "String", "any", "char")
"""Declared types of arguments that are texts."""
_KEPT = ("description", "default", "format", "minimum", "maximum", "minItems", "maxItems")
_MOST_BYTES = 64 << 20
_MOST_CHOICES = 4096
_TEXT_ALONE = "(no text is judged)"


class Case(NamedTuple):
    """One question of BFCL with its right calls."""

    category: str
    language: Language
    expects: Expects
    item: Item
    """Its matchers hold values; of Java and JavaScript, what the text of an argument stands for."""
    types: dict[str, dict[str, tuple[str, str]]]
    """Declared type of each function's parameters, and of the items of a list."""
    functions: tuple[dict[str, Any], ...]
    """As the package has them, for its own checker."""
    gold: tuple[dict[str, Any], ...]
    """The same."""


class Source:
    """An unpacked, installed or still packed bfcl-eval. InputError where it is none."""

    def __init__(self, data: str | Path) -> None:
        given = Path(data)
        wheels = sorted(given.glob("bfcl_eval-*.whl")) if given.is_dir() else []
        self.path = wheels[-1] if wheels else given
        self._root = self._open()
        infos = [one for one in self._root.iterdir() if one.name.startswith(f"{PACKAGE}-")] if self._root else []
        infos = [one for one in infos if one.name.endswith(".dist-info")]
        if len(infos) != 1 or self._root is None:
            raise InputError(f"{data}: holds no bfcl-eval: make bfcl-data, or pip download --no-deps bfcl-eval")
        self.version = infos[0].name.removeprefix(f"{PACKAGE}-").removesuffix(".dist-info")
        self._record = {row[0]: row[1] for row in csv.reader(_text(infos[0] / "RECORD").splitlines()) if len(row) == 3}
        self.sha256s: dict[str, str] = {}
        """Of every file read so far."""

    def _open(self) -> Any:
        if self.path.suffix == ".whl" and zipfile.is_zipfile(self.path):
            return zipfile.Path(self.path)
        return self.path if self.path.is_dir() else None

    def text(self, name: str) -> str:
        """A file of the package. DatasetError where it is missing or not the one that was packed."""
        where = self._root
        for part in name.split("/"):
            where = where / part
        text = _text(where)
        digest = hashlib.sha256(text.encode())
        packed = base64.urlsafe_b64encode(digest.digest()).decode().rstrip("=")
        if self._record.get(name) != f"sha256={packed}":
            raise DatasetError(f"{where}: not the file that bfcl-eval {self.version} was packed with")
        self.sha256s[name] = digest.hexdigest()
        return text

    def rows(self, name: str) -> list[dict[str, Any]]:
        """JSON objects, one a line."""
        rows = []
        for number, line in enumerate(self.text(name).splitlines(), 1):
            try:
                rows.append(msgspec.json.decode(line, type=dict[str, Any]))
            except (msgspec.DecodeError, RecursionError) as error:
                raise DatasetError(f"{self.path}: {name}:{number}: not a JSON object: {error}") from error
        return rows

    def cases(self, category: str) -> list[Case]:
        """Every question of a category. Questions and answers go together by line: some ids are spelt otherwise."""
        expects = CATEGORIES[category][1]
        questions = self.rows(f"{PACKAGE}/data/{PREFIX}{category}.json")
        golds: list[dict[str, Any]] = [{"ground_truth": []}] * len(questions)
        if expects == "calls":
            golds = self.rows(f"{PACKAGE}/data/possible_answer/{PREFIX}{category}.json")
        if len(questions) != len(golds):
            raise DatasetError(f"{self.path}: {category}: {len(questions)} questions, {len(golds)} answers")
        cases = []
        for row, gold in zip(questions, golds):
            try:
                cases.append(case_of(category, row, gold["ground_truth"]))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                where = str(row.get("id"))[:80]
                raise DatasetError(f"{self.path}: {category}, {where}: not a question of BFCL: {error!r}") from error
        return cases


def case_of(category: str, row: Mapping[str, Any], truth: Sequence[Mapping[str, Any]]) -> Case:
    """A question in the package's form. KeyError, TypeError, ValueError where it is not."""
    language, expects = CATEGORIES[category]
    functions = tuple(row["function"])
    types = {tool_name(one["name"]): _declared(one["parameters"]) for one in functions}
    calls = tuple(_gold(f"c{i}", one, types, language) for i, one in enumerate(truth))
    if len(row["question"]) != 1 or bool(calls) != (expects == "calls"):
        raise ValueError("more than one turn, or an answer where there should be none")
    item = Item(
        id=row["id"],
        # without gold calls no other kind is possible; `expects` says what the item is
        kind="control" if not calls else "multi" if len(calls) > 1 else "required",
        stratum=category,
        messages=tuple(Message(one["role"], one["content"]) for one in row["question"][0]),
        tools=tuple(offered(one, language) for one in functions),
        calls=calls,
        answer=_TEXT_ALONE,
    )
    return Case(category, language, expects, item, types, functions, tuple(dict(one) for one in truth))


def tool_name(name: str) -> str:
    """A function's name as it is offered: servers of OpenAI's protocol refuse dots, and so does BFCL with them."""
    return name.replace(".", "_")


def offered(function: Mapping[str, Any], language: Language) -> dict[str, Any]:
    """The function as a tool with a JSON schema. Arguments of Java and JavaScript are source text, as in BFCL."""
    parameters = function["parameters"]
    if language == "python":
        schema = _schema(parameters)
    else:
        name = "Java" if language == "java" else "JavaScript"
        texts = {key: _source_text(rule, name) for key, rule in parameters["properties"].items()}
        schema = {"type": "object", "properties": texts, "required": list(parameters.get("required", ()))}
    return {"name": tool_name(function["name"]), "description": function["description"], "parameters": schema}


def _schema(rule: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {key: rule[key] for key in _KEPT if key in rule}
    kind = _TYPES.get(rule.get("type", ""))  # `any`: whatever
    enum = rule.get("enum")
    items = rule.get("items")
    if kind == "array" and enum and not any(isinstance(one, list) for one in enum):
        items, enum = {**(items or {}), "enum": enum}, None  # meant of its items
    nullable = "default" in rule and rule["default"] is None
    if kind is not None:
        out["type"] = [kind, "null"] if nullable else kind
    if enum:
        out["enum"] = [*enum, None] if nullable and None not in enum else list(enum)
    if isinstance(items, Mapping):
        out["items"] = _schema(items)
    if isinstance(rule.get("properties"), Mapping):
        out["properties"] = {key: _schema(one) for key, one in rule["properties"].items()}
        out["required"] = [key for key in rule.get("required", ()) if key in out["properties"]]
    return out


def _source_text(rule: Mapping[str, Any], language: str) -> dict[str, Any]:
    kind, items = rule.get("type") or "any", (rule.get("items") or {}).get("type")
    said = f"{language} source text of type {kind}" + (f", with items of type {items}." if items else ".")
    if rule.get("properties"):
        said += f" Fields: {msgspec.json.encode(rule['properties']).decode()}"
    return {"type": "string", "description": f"{rule.get('description', '')} {said}".strip()}


def _declared(parameters: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    return {
        key: (rule.get("type", "any"), (rule.get("items") or {}).get("type", "any"))
        for key, rule in parameters["properties"].items()
    }


def _gold(
    name: str, one: Mapping[str, Any], types: Mapping[str, Mapping[str, tuple[str, str]]], language: Language
) -> GoldCall:
    """A right call. Its possible answers, nested ones multiplied out, are values of an enum."""
    ((function, answers),) = one.items()
    declared = types[tool_name(function)]
    matchers: dict[str, Matcher] = {}
    example: dict[str, Any] = {}
    for key, choices in answers.items():
        kind, items = declared.get(key, ("any", "any"))
        # an empty text says that the argument may be absent, and of a text that it may be empty
        values = expanded([choice for choice in choices if choice != "" or kind in TEXTS])
        # no answer that is possible: it has to be absent
        matchers[key] = Matcher(enum=tuple(values), optional="" in choices or not choices)
        if values and "" not in choices:
            example[key] = values[0] if language == "python" else write(values[0], kind, items, language)
    return GoldCall(id=name, name=tool_name(function), arguments=matchers, example=example)


def expanded(choices: Sequence[Any]) -> list[Any]:
    """Every value that a list of possible answers allows: a dict in it has possible answers for each of its fields."""
    values: list[Any] = []
    for choice in choices:
        if isinstance(choice, dict):
            values += _objects(choice)
        elif isinstance(choice, list) and any(isinstance(one, dict) for one in choice):
            each = [_objects(one) if isinstance(one, dict) else [one] for one in choice]
            values += [list(one) for one in _product(each)]
        else:
            values.append(choice)
    return values


_ABSENT = object()


def _objects(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An empty text among a field's answers says that it may be absent, and beside texts that it may be empty."""
    each = []
    for choices in fields.values():
        choices = choices if isinstance(choices, list) else [choices]
        others = [one for one in choices if one != ""]
        text = all(isinstance(one, str) for one in others)
        each.append(others + ([_ABSENT, ""] if text else [_ABSENT]) * ("" in choices))
    return [{key: value for key, value in zip(fields, values) if value is not _ABSENT} for values in _product(each)]


def _product(each: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    total = 1
    for one in each:
        total *= len(one)
    if total > _MOST_CHOICES:
        raise ValueError(f"more than {_MOST_CHOICES} possible values of one argument")
    return list(itertools.product(*each))


def _text(path: Any) -> str:
    """Of a file in a folder or a wheel, whatever size its archive claims."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, KeyError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise DatasetError(f"cannot read {path}: {error}") from error
    if len(data) > _MOST_BYTES:
        raise DatasetError(f"{path}: larger than {_MOST_BYTES >> 20} MiB")
    try:
        return str(data.decode())
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 text") from error
