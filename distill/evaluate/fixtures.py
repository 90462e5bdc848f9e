"""What the tools of an episode answer: recorded fixtures, or seeded simulators. Nothing is executed, no network.

A fixture is found by tool and arguments: those of the item before those of any item, exact arguments before matchers,
the row for just this repetition before `*`. What no fixture answers is a miss: a typed error to the model, and never
evidence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from distill.artifacts import canonical_json
from distill.broker import FIXTURE_MISS, Tool, ToolError, fixture_sha256, parse_tool, passable, simulated
from distill.chat import ToolCall
from distill.draw import Draw
from distill.errors import DatasetError
from distill.evaluate.items import FixtureRow, Item, Matcher
from distill.evaluate.matching import arguments_match, matchers_of, regex_schema
from distill.jsonlines import read_objects
from distill.tools import arguments_problem, schema_problem, value_problem

Mode = Literal["replay", "record", "simulate"]
NORMALISERS = ("defaults", "nulls", "whitespace", "casefold")
"""What a tool may say of its arguments, in the order in which they are applied: an absent argument has its schema's
`default`; null is absent; runs of white space are one space; texts have no case."""
Status = Literal["hit", "simulated", "miss", "invalid"]
ANSWERED: tuple[Status, ...] = ("hit", "simulated")


class Outcome(NamedTuple):
    """What a call gave."""

    status: Status
    """`invalid`: an unknown tool, or arguments that break its schema."""
    content: str
    """JSON text, as the model is shown it."""
    value: Any
    """The result; None where it is an error."""
    error: str = ""
    """Type of the error that it is."""
    sha256: str = ""
    """Of the call and its result."""
    latency_ms: int = 0


class _Group:
    """The rows that answer the same calls."""

    def __init__(self, row: FixtureRow, matchers: dict[str, Matcher] | None) -> None:
        self.tool, self.matchers = row.tool, matchers
        self.rows: dict[int | str, FixtureRow] = {}

    def row(self, nth: int) -> FixtureRow | None:
        return self.rows.get(nth) or self.rows.get("*")


class Fixtures:
    """The rows of a fixtures file, by item, tool and arguments."""

    def __init__(self, tools: Mapping[str, Tool], normalise: Mapping[str, Sequence[str]] | None = None) -> None:
        self.tools = tools
        self._normalise = dict(normalise or {})
        self._exact: dict[tuple[str | None, str], _Group] = {}
        self._matching: dict[tuple[str | None, str], list[_Group]] = {}
        self.rows = 0

    def add(self, row: FixtureRow, where: str) -> None:
        """DatasetError: an unknown tool, arguments or a result that break its schema, a call answered twice."""
        tool = self.tools.get(row.tool)
        if tool is None:
            raise DatasetError(f"{where}: unknown tool {row.tool[:80]!r}")
        matchers = None
        if row.match == "matchers":
            try:
                matchers = matchers_of(row.args)
            except ValueError as error:
                raise DatasetError(f"{where}: args: {error}") from error
            for name, matcher in matchers.items():
                if problem := matcher_problem(matcher, name, tool.function):
                    raise DatasetError(f"{where}: args: {problem}")
        elif problem := arguments_problem(ToolCall(row.tool, row.args), tool.function):
            raise DatasetError(f"{where}: args: {problem}")
        if row.error is None and (problem := value_problem(row.result, tool.returns or {})):
            raise DatasetError(f"{where}: result: {problem}")
        if not passable(_content(row)):
            raise DatasetError(f"{where}: the result is too long or holds a control token of the chat template")
        group = self._group(row, matchers)
        if row.nth in group.rows:
            raise DatasetError(f"{where}: a result for this call of {row.tool} is given twice")
        group.rows[row.nth] = row
        self.rows += 1

    def find(self, item: str, call: ToolCall) -> _Group | None:
        """The rows that answer a call; DatasetError where matchers of several rows do."""
        key = self._key(call.name, call.arguments)
        for owner in (item, None):
            if group := self._exact.get((owner, key)):
                return group
            found = [group for group in self._matching.get((owner, call.name), ())
                     if group.matchers is not None and arguments_match(group.matchers, call.arguments)]  # fmt: skip
            if len(found) > 1:
                raise DatasetError(f"item {item}: several fixtures answer the same call of {call.name}")
            if found:
                return found[0]
        return None

    def _group(self, row: FixtureRow, matchers: dict[str, Matcher] | None) -> _Group:
        if matchers is None:
            return self._exact.setdefault((row.item, self._key(row.tool, row.args)), _Group(row, None))
        groups = self._matching.setdefault((row.item, row.tool), [])
        group = next((one for one in groups if one.matchers == matchers), None)
        if group is None:
            group = _Group(row, matchers)
            groups.append(group)
        return group

    def _key(self, tool: str, arguments: Mapping[str, Any]) -> str:
        declared = self._normalise.get(tool, ())
        out: Any = dict(arguments)
        if "nulls" in declared:
            out = {name: value for name, value in out.items() if value is not None}
        if "defaults" in declared:
            properties = self.tools[tool].function["parameters"].get("properties", {})
            defaults = {name: schema["default"] for name, schema in properties.items()
                        if isinstance(schema, dict) and "default" in schema}  # fmt: skip
            out = defaults | out
        if "whitespace" in declared or "casefold" in declared:
            out = _texts(out, "whitespace" in declared, "casefold" in declared)
        return f"{tool}\n{canonical_json(_plain_numbers(out))}"


class EpisodeBroker:
    """Answers the calls of one episode. Two brokers of one item that are asked the same answer the same."""

    def __init__(self, item: Item, fixtures: Fixtures, mode: Mode = "replay", seed: int = 0) -> None:
        self._item, self._fixtures, self._mode, self._seed = item, fixtures, mode, seed
        self._functions = {tool["name"]: tool for tool in item.tools}
        self._count: dict[int | str, int] = {}
        self.clock_ms = 0
        """Virtual: the sum of what the calls took."""
        self.recorded: list[FixtureRow] = []
        """In mode record: what was simulated, as fixtures."""

    def call(self, call: ToolCall) -> Outcome:
        """The result of one call."""
        function = self._functions.get(call.name)
        if function is None:
            return _failure("invalid", "unknown_tool", "there is no such tool")
        try:
            canonical_json(call.arguments).encode()
        except (ValueError, RecursionError):  # NaN, a lone surrogate, bottomless nesting
            return _failure("invalid", "invalid_arguments", "the arguments are not JSON")
        if problem := arguments_problem(call, function):
            return _failure("invalid", "invalid_arguments", problem)
        group = self._fixtures.find(self._item.id, call) if call.name in self._fixtures.tools else None
        if group is not None:
            nth = self._count[id(group)] = self._count.get(id(group), 0) + 1
            if row := group.row(nth):
                self.clock_ms += row.latency_ms
                content = _content(row)
                return Outcome("hit", content, None if row.error else row.result, (row.error or {}).get("type", ""),
                               fixture_sha256(call, content), row.latency_ms)  # fmt: skip
        if self._mode == "replay":
            return _failure("miss", FIXTURE_MISS, "nothing is recorded for these arguments")
        return self._simulate(call)

    def _simulate(self, call: ToolCall) -> Outcome:
        tool = self._fixtures.tools.get(call.name)
        if tool is None or (tool.returns is None and tool.simulate is None):
            return _failure("miss", FIXTURE_MISS, "nothing is recorded, and this tool cannot be simulated")
        arguments = canonical_json(call.arguments)
        draw = Draw("eval-broker/1", self._seed, self._item.id, call.name, arguments)
        more: dict[str, Any]
        try:
            more = {"result": simulated(tool, call.arguments, draw)}
        except ToolError as error:
            more = {"error": {"type": error.kind, "message": str(error)}}
        row = FixtureRow(tool=call.name, args=call.arguments, item=self._item.id, **more)
        content = _content(row)
        if not passable(content):
            return _failure("miss", FIXTURE_MISS, "the simulated result cannot be passed on")
        if self._mode == "record" and all((row.tool, row.args) != (one.tool, one.args) for one in self.recorded):
            self.recorded.append(row)
        return Outcome("simulated", content, more.get("result"), (row.error or {}).get("type", ""),
                       fixture_sha256(call, content))  # fmt: skip


def read_fixtures(paths: Iterable[str | Path], fixtures: Fixtures, items: Iterable[str]) -> None:
    """Add the rows of files; DatasetError names file and line, also where a row's item is not in the set."""
    known = set(items)
    for path in paths:
        for where, row in read_objects(path):
            try:
                parsed = msgspec.convert(row, FixtureRow)
            except (msgspec.ValidationError, ValueError, RecursionError) as error:
                raise DatasetError(f"{where}: {error}") from error
            if parsed.item is not None and parsed.item not in known:
                raise DatasetError(f"{where}: the set has no item {parsed.item[:80]!r}")
            fixtures.add(parsed, where)


def read_tools(path: str | Path) -> tuple[dict[str, Tool], dict[str, tuple[str, ...]]]:
    """Tools of a set, each with `returns` where its results are to be checked or simulated, and with `normalise`, a
    list of NORMALISERS. DatasetError names the line."""
    tools: dict[str, Tool] = {}
    normalise: dict[str, tuple[str, ...]] = {}
    for where, row in read_objects(path):
        declared = row.pop("normalise", [])
        if not isinstance(declared, list) or not set(map(str, declared)) <= set(NORMALISERS):
            raise DatasetError(f"{where}: normalise is a list of {', '.join(NORMALISERS)}")
        tool = parse_tool(row, where)
        if tool.name in tools:
            raise DatasetError(f"{where}: tool {tool.name} is defined twice")
        tools[tool.name], normalise[tool.name] = tool, tuple(declared)
    return tools, normalise


def matcher_problem(matcher: Matcher, name: str, function: Mapping[str, Any]) -> str | None:
    """Why a matcher can match nothing: an argument that the schema does not know, or no regular expression."""
    properties = (function.get("parameters") or {}).get("properties")
    if isinstance(properties, dict) and name not in properties:
        return f"{function['name']} has no parameter {name!r}"
    if matcher.regex is not None and (problem := schema_problem(regex_schema(matcher.regex))):
        return f"{name}: {problem}"
    return None


def _failure(status: Status, kind: str, message: str) -> Outcome:
    return Outcome(status, json.dumps({"error": {"type": kind, "message": message}}, ensure_ascii=False), None, kind)


def _content(row: FixtureRow) -> str:
    value = {"error": row.error} if row.error is not None else row.result
    return json.dumps(value, ensure_ascii=False)


def _texts(value: Any, spaces: bool, case: bool) -> Any:
    if isinstance(value, dict):
        return {key: _texts(item, spaces, case) for key, item in value.items()}
    if isinstance(value, list):
        return [_texts(item, spaces, case) for item in value]
    if isinstance(value, str):
        value = " ".join(value.split()) if spaces else value
        return value.casefold() if case else value
    return value


def _plain_numbers(value: Any) -> Any:
    """5.0 as 5: JSON has one kind of number."""
    if isinstance(value, dict):
        return {key: _plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
