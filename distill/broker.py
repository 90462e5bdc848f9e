"""The deterministic broker: answers tool calls from fixtures or seeded simulators. Nothing is executed, no network.

A result is a function of the tool, the arguments and the seed, so that an episode played again is the same episode.
What goes wrong is a result too, `{"error": {"type", "message"}}`: a tool reports its failures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from distill.artifacts import canonical_json, sha256_text
from distill.chat import ToolCall
from distill.draw import Draw
from distill.errors import ConfigError, DatasetError, InputError
from distill.jsonlines import read_objects
from distill.schema_values import value_of
from distill.tokenizer import CALL_END, CALL_START, END_OF_TEXT, TURN_END, TURN_START
from distill.tools import arguments_problem, schema_problem, value_problem

Fault = Literal["", "once", "always"]
"""Whether an episode's calls fail: never on purpose, its first one, or all."""

FIXTURE_MISS = "fixture_miss"
"""Type of the error where no fixture answers: nothing that may be learned."""
MAX_RESULT = 1 << 18  # characters
_MARKS = (END_OF_TEXT, TURN_START, TURN_END, CALL_START, CALL_END, "<think>", "</think>")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ERROR_RATE = 0.04  # of calls to a tool that declares errors
_PASSING = (
    ("timeout", "the service did not answer within 10 seconds"),
    ("rate_limited", "too many requests; try again"),
    ("unavailable", "the service is restarting; try again"),
    ("connection_reset", "the connection was closed before the answer was complete"),
)
_LASTING = (
    ("permission_denied", "this account may not use {tool}"),
    ("unavailable", "{tool} is down for maintenance until tomorrow morning"),
    ("quota_exceeded", "the daily quota of {tool} is used up"),
    ("authentication_required", "the session of {tool} has expired; the user must sign in again"),
)


class ToolError(Exception):
    """What a simulator raises to report an error as its result."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Tool(msgspec.Struct, frozen=True):
    """A tool that the broker can answer for."""

    function: dict[str, Any]
    """`name`, `description`, `parameters`: what a model is shown."""
    returns: dict[str, Any] | None = None
    """JSON schema of its results."""
    simulate: Callable[[Mapping[str, Any], Draw], Any] | None = None
    """A result for arguments; None draws one from `returns`."""
    errors: tuple[tuple[str, str], ...] = ()
    """(type, message) of what a simulated call reports now and then; `{name}` is an argument."""

    @property
    def name(self) -> str:
        """The function's name."""
        return str(self.function["name"])

    @property
    def offer(self) -> dict[str, Any]:
        """As a request to a model lists it."""
        return {"type": "function", "function": self.function}


class Result(NamedTuple):
    """What a call gives."""

    content: str
    """JSON text."""
    sha256: str
    """Of the call and its result."""
    error: str = ""
    """Type of the error that it is; empty where it is none."""


Fixtures = dict[str, dict[str, Any]]
"""By tool and canonical arguments: `{"result": ...}` or `{"error": {"type", "message"}}`."""


class Broker:
    """Answers calls. A tool with fixtures replays them and nothing else; another one is simulated."""

    def __init__(self, tools: Iterable[Tool], fixtures: Fixtures | None = None) -> None:
        self.tools: dict[str, Tool] = {}
        self._fixtures = dict(fixtures or {})
        self._replayed = {json.loads(key)[0] for key in self._fixtures}
        for tool in tools:
            if tool.name in self.tools:
                raise ConfigError(f"tool {tool.name} is defined twice")
            if tool.returns is None and tool.name not in self._replayed:
                raise ConfigError(f"tool {tool.name} has neither fixtures nor `returns`: nothing can answer its calls")
            self.tools[tool.name] = tool

    def call(self, call: ToolCall, *, seed: int, nth: int = 0, fault: Fault = "") -> Result:
        """The result of one call. `nth` calls of the episode came before it; `fault` makes it fail (Prompt.fault)."""
        try:
            arguments = canonical_json(call.arguments)
            arguments.encode()
            value = self._answer(call, arguments, seed, fault == "always" or (fault == "once" and nth == 0), fault)
        except ToolError as error:
            value = _error(error.kind, str(error))
        except (ValueError, RecursionError):  # NaN, a lone surrogate, bottomless nesting
            value, arguments = _error("invalid_arguments", "the arguments are not JSON"), ""
        content = json.dumps(value, ensure_ascii=False)
        if not passable(content):
            value = _error("invalid_arguments", "the arguments hold text that cannot be passed on")
            content = json.dumps(value, ensure_ascii=False)
        failed = isinstance(value, dict) and set(value) == {"error"}
        return Result(content, _sha256(call.name, arguments, content), str(value["error"]["type"]) if failed else "")

    def _answer(self, call: ToolCall, arguments: str, seed: int, failing: bool, fault: Fault) -> Any:
        tool = self.tools.get(call.name)
        if tool is None:
            raise ToolError("unknown_tool", "there is no such tool")
        if problem := arguments_problem(call, tool.function):
            raise ToolError("invalid_arguments", problem)
        if failing:
            # an error that lasts is the same for every call of the episode
            draw = Draw("fault", seed, *(() if fault == "always" else (call.name, arguments)))
            kind, message = draw.choice(_LASTING if fault == "always" else _PASSING)
            raise ToolError(kind, message.format(tool=call.name))
        if call.name in self._replayed:
            found = self._fixtures.get(fixture_key(call.name, call.arguments))
            if found is None:
                raise ToolError(FIXTURE_MISS, "nothing is recorded for these arguments")
            return found["result"] if "result" in found else {"error": found["error"]}
        return simulated(tool, call.arguments, Draw("broker/1", seed, call.name, arguments))


def passable(content: str) -> bool:
    """Whether a result's JSON text can be shown to a model: not too long, and no mark of the chat template."""
    return len(content) <= MAX_RESULT and not any(mark in content for mark in _MARKS)


def fixture_sha256(call: ToolCall, content: str) -> str:
    """Of a call and the result that it was given: what `Result.sha256` is."""
    return _sha256(call.name, canonical_json(call.arguments), content)


def _sha256(name: str, arguments: str, content: str) -> str:
    return sha256_text(f"kd-fixture/1\n{json.dumps(name)}\n{arguments}\n{content}")


def simulated(tool: Tool, arguments: Mapping[str, Any], draw: Draw) -> Any:
    """A drawn result that satisfies the tool's `returns`; ToolError is one, too."""
    if tool.errors and draw.chance(_ERROR_RATE):
        kind, message = draw.choice(tool.errors)
        raise ToolError(kind, message.format_map(_Shown(arguments)))
    try:
        value = tool.simulate(arguments, draw) if tool.simulate else value_of(tool.returns, draw, arguments)
    except InputError as error:
        raise ToolError("internal", f"{tool.name} made no result: {error}") from error
    except ArithmeticError as error:
        raise ToolError("math_error", "a number is too large") from error
    if tool.returns is not None and (problem := value_problem(value, tool.returns)):
        raise ToolError("internal", f"{tool.name} made no valid result: {problem}")
    return value


def fixture_key(tool: str, arguments: Mapping[str, Any]) -> str:
    """Under what a fixture is found: equal for equal JSON arguments, in whatever order."""
    return canonical_json([tool, arguments])


def read_tools(path: str | Path) -> list[Tool]:
    """Tools from a file: JSON functions, one a line or a list, bare or as `{"type": "function", "function": ...}`,
    each with `returns` where it is to be simulated. DatasetError names the line."""
    tools: list[Tool] = []
    for where, row in read_objects(path):
        tools.append(parse_tool(row, where))
        if tools[-1].name in {tool.name for tool in tools[:-1]}:
            raise DatasetError(f"{where}: tool {tools[-1].name} is defined twice")
    return tools


def parse_tool(row: Mapping[str, Any], where: str) -> Tool:
    """One tool from outside, checked: its name, its schemas, and that a result can be drawn."""
    wrapped = row.get("function")
    function = dict(wrapped if isinstance(wrapped, dict) else row)
    returns = function.pop("returns", row.get("returns"))
    unknown = set(function) - {"name", "description", "parameters", "strict"}
    if isinstance(wrapped, dict):
        unknown |= set(row) - {"type", "function", "returns"}
    if unknown:
        raise DatasetError(f"{where}: a function has no key {min(unknown)!r}; name, description, parameters, returns")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DatasetError(f"{where}: a function's name has 1 to 64 letters, digits, _ and -")
    if not isinstance(function.get("description", ""), str):
        raise DatasetError(f"{where}: the description of {name} must be text")
    function.setdefault("parameters", {"type": "object", "properties": {}})
    for what, schema in (("parameters", function["parameters"]), ("returns", returns)):
        if schema is None and what == "returns":
            continue
        problem = schema_problem(schema) if isinstance(schema, dict) else "not a JSON object"
        if problem:
            raise DatasetError(f"{where}: {what} of {name}: {problem}")
    if any(mark in json.dumps(function, ensure_ascii=False) for mark in _MARKS):
        raise DatasetError(f"{where}: {name} holds a control token of the chat template")
    tool = Tool(function, returns)
    if returns is not None:
        _try_out(tool, where)
    return tool


def read_fixtures(paths: Iterable[str | Path], tools: Iterable[Tool]) -> Fixtures:
    """Recorded results: lines `{"tool", "args", "result" or "error": {"type", "message"}}`. Refused, by file and line:
    an unknown tool, arguments or a result that break its schema, and the same call given twice."""
    known = {tool.name: tool for tool in tools}
    out: Fixtures = {}
    for path in paths:
        for where, row in read_objects(path):
            fixture = _fixture(row, where)
            tool = known.get(fixture.tool)
            if tool is None:
                raise DatasetError(f"{where}: unknown tool {fixture.tool!r}; known: {', '.join(sorted(known))}")
            if problem := arguments_problem(ToolCall(fixture.tool, fixture.args), tool.function):
                raise DatasetError(f"{where}: args: {problem}")
            if fixture.error is None and (problem := value_problem(fixture.result, tool.returns or {})):
                raise DatasetError(f"{where}: result: {problem}")
            key = fixture_key(fixture.tool, fixture.args)
            if key in out:
                raise DatasetError(f"{where}: a result for this call of {fixture.tool} is given twice")
            error = fixture.error
            out[key] = {"error": msgspec.to_builtins(error)} if error else {"result": fixture.result}
            content = json.dumps(out[key], ensure_ascii=False)
            if not passable(content):
                raise DatasetError(f"{where}: the result is too long or holds a control token of the chat template")
    return out


class _Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    message: str


class _Fixture(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tool: str
    args: dict[str, Any]
    result: Any = msgspec.UNSET  # null is a result
    error: _Failure | None = None
    id: str | None = None
    """For people: nothing reads it."""

    def __post_init__(self) -> None:
        if (self.result is msgspec.UNSET) == (self.error is None):
            raise ValueError("a fixture has either a result or an error")


def _fixture(row: dict[str, Any], where: str) -> _Fixture:
    try:
        return msgspec.convert(row, _Fixture)
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise DatasetError(f"{where}: {error}") from error


class _Shown(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return key


def _try_out(tool: Tool, where: str) -> None:
    """Refuse, before any money is spent, a `returns` for which nothing can be drawn."""
    for seed in range(16):
        try:
            simulated(tool, {}, Draw("try", seed))
        except ToolError as error:
            raise DatasetError(f"{where}: returns of {tool.name}: {error}") from error


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message}}
