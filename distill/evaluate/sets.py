"""Evaluation sets as files: `F.jsonl` with an item a line, and beside it `F.jsonl.d/` with header, tools and fixtures.

What a set says is checked before anything is asked of a model: a set whose own right answers are wrong would pass
those who are wrong as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from distill import chat
from distill.artifacts import read_json, sha256_file
from distill.broker import Tool, parse_tool
from distill.chat import Message, ToolCall
from distill.errors import DatasetError, InputError
from distill.evaluate.fixtures import EpisodeBroker, Fixtures, Outcome, matcher_problem, read_fixtures, read_tools
from distill.evaluate.grounding import pointer
from distill.evaluate.items import FixtureRow, Item, SetHeader
from distill.evaluate.matching import call_matches, json_equal
from distill.evaluate.privacy import leaks
from distill.jsonlines import decode_object, read_lines

DISTRACTORS = 3
"""Tools offered beside those that are needed, at the least."""


class EvaluationSet(NamedTuple):
    """A checked set."""

    path: Path
    items: tuple[Item, ...]
    """By id."""
    fixtures: Fixtures
    header: SetHeader | None
    sha256s: dict[str, str]
    """Of its files as they are: `items`, `fixtures.jsonl`, `tools.jsonl`."""
    covered: frozenset[tuple[str, str]]
    """(item, gold call) that a fixture answers."""


def load(path: str | Path, fixtures: str | Path | None = None) -> EvaluationSet:
    """Read and check a set. `fixtures`: another file in place of its own. DatasetError names file and line."""
    path = Path(path)
    folder = path.with_name(path.name + ".d")
    items = _read_items(path)
    if not items:
        raise DatasetError(f"{path}: holds no item")
    ids = [item.id for item in items]
    files = {"items": path, "tools.jsonl": folder / "tools.jsonl",
             "fixtures.jsonl": Path(fixtures) if fixtures else folder / "fixtures.jsonl"}  # fmt: skip
    tools, normalise = _tools(files["tools.jsonl"], items)
    found = Fixtures(tools, normalise)
    if fixtures or files["fixtures.jsonl"].is_file():
        read_fixtures([files["fixtures.jsonl"]], found, ids)
    covered: set[tuple[str, str]] = set()
    for item in items:
        outcomes = oracle_calls(item, found)
        covered |= {(item.id, name) for name, outcome in outcomes.items() if outcome.status == "hit"}
        _check_facts(item, outcomes, path)
    header = _header(folder / "header.json")
    sha256s = {name: sha256_file(file) for name, file in files.items() if file.is_file()}
    return EvaluationSet(path, tuple(sorted(items, key=lambda item: item.id)), found, header, sha256s,
                         frozenset(covered))  # fmt: skip


def oracle_calls(item: Item, fixtures: Fixtures) -> dict[str, Outcome]:
    """What each gold call gives, made in order with its example arguments."""
    broker = EpisodeBroker(item, fixtures)
    return {call.id: broker.call(ToolCall(call.name, call.example)) for call in item.calls}


def shard_of(item: str, shards: int) -> int:
    """Which of `shards` an item belongs to: the same for the same id, always."""
    return int.from_bytes(hashlib.sha256(b"eval-shard/1\n" + item.encode()).digest()[:8], "big") % shards


def fixture_lines(rows: Iterable[FixtureRow]) -> str:
    """Rows as a fixtures file."""
    return "".join(msgspec.json.encode(row).decode() + "\n" for row in rows)


def _read_items(path: Path) -> list[Item]:
    items: list[Item] = []
    seen: set[str] = set()
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        row = decode_object(line, where)
        try:
            item = msgspec.convert(row, Item)
        except (msgspec.ValidationError, ValueError, RecursionError) as error:
            raise DatasetError(f"{where}: {error}") from error
        if item.id in seen:
            raise DatasetError(f"{where}: the id {item.id[:80]!r} is taken")
        seen.add(item.id)
        if problem := _item_problem(item, where):
            raise DatasetError(f"{where}: {problem}")
        items.append(item)
    return items


def _item_problem(item: Item, where: str) -> str | None:
    functions = _functions(item, where)
    if len(functions) < len(item.tools):
        return "a tool is offered twice"
    needed = {call.name for call in item.calls}
    if len(functions) - len(needed) < DISTRACTORS:
        return f"it offers {len(functions)} tools, {len(needed)} needed: {DISTRACTORS} others are wanted"
    for call in item.calls:
        function = functions.get(call.name)
        if function is None:
            return f"the gold call {call.id} is of {call.name!r}, which is not offered"
        for name, matcher in call.arguments.items():
            if problem := matcher_problem(matcher, name, function):
                return f"gold call {call.id}: {problem}"
        if not call_matches(call, ToolCall(call.name, call.example), function):
            return f"the example of gold call {call.id} breaks its own matchers or the tool's schema"
    for forbidden in item.forbidden_calls:
        if forbidden.name not in functions:
            return f"the forbidden call is of {forbidden.name!r}, which is not offered: nobody could be tempted"
    for secret in item.secrets:
        if unknown := set(secret.audience) - {"user", *functions}:
            return f"a secret's audience {min(unknown)!r} is neither `user` nor a tool that is offered"
        try:
            told = leaks(secret.value, item.answer)
        except ValueError as error:
            return f"a secret: {error}"
        if told and "user" not in secret.audience:
            return "the item's own answer tells a secret"
    try:
        chat.segments([*item.messages, Message("assistant", item.answer)], item.tools)
    except InputError as error:
        return str(error)
    return None


def _functions(item: Item, where: str) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for tool in item.tools:
        out[parse_tool(tool, where).name] = tool
    return out


def _tools(path: Path, items: Iterable[Item]) -> tuple[dict[str, Tool], dict[str, tuple[str, ...]]]:
    """The set's tools; of a set without a file of them, what the items offer. DatasetError where the two differ."""
    tools, normalise = read_tools(path) if path.is_file() else ({}, {})
    listed = bool(tools)
    for item in items:
        for function in item.tools:
            known = tools.get(function["name"])
            if known is None and not listed:
                tools[function["name"]] = parse_tool(function, item.id)
            elif known is None or not json_equal(known.function, function):
                where = path if listed else "another item"
                raise DatasetError(f"item {item.id}: its tool {function['name']} is not the one of {where}")
    return {name: _built_in(tool) for name, tool in tools.items()}, normalise


def _built_in(tool: Tool) -> Tool:
    """The built-in tool that it is, with its simulator, or itself."""
    from distill.data.prompts.tool_material import BY_NAME

    known = BY_NAME.get(tool.name)
    return known if known is not None and known.function == tool.function else tool


def _check_facts(item: Item, outcomes: Mapping[str, Outcome], path: Path) -> None:
    for fact in item.facts:
        outcome = outcomes[fact.call]
        if outcome.status == "hit" and not json_equal(pointer(outcome.value, fact.pointer), fact.value):
            raise DatasetError(
                f"{path}: item {item.id}: the result of {fact.call} has another value at {fact.pointer!r}"
            )


def _header(path: Path) -> SetHeader | None:
    if not path.is_file():
        return None
    try:
        return msgspec.convert(read_json(path), SetHeader)
    except msgspec.ValidationError as error:
        raise DatasetError(f"{path}: {error}") from error


def counts(items: Iterable[Item]) -> dict[str, int]:
    """Items by kind."""
    out: dict[str, int] = {}
    for item in items:
        out[item.kind] = out.get(item.kind, 0) + 1
    return out
