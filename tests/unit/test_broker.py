"""The broker: same call, same bytes; results that keep to their schema; failures that are results; fixtures."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import chat
from distill.broker import Broker, Tool, parse_tool, read_fixtures, read_tools
from distill.chat import ToolCall
from distill.data.prompts.simulators import CURRENCIES
from distill.data.prompts.tool_material import BY_NAME, TOOLS
from distill.data.prompts.tool_requests import REQUESTS
from distill.draw import Draw
from distill.errors import ConfigError, DatasetError, InputError
from distill.schema_values import value_of
from distill.tools import arguments_problem, schema_problem, value_problem

BROKER = Broker(TOOLS)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def answer(name: str, seed: int = 0, broker: Broker = BROKER, /, **arguments: Any) -> Any:
    return json.loads(broker.call(ToolCall(name, arguments), seed=seed).content)


# --- the built-in tools


def test_there_are_many_tools_of_many_shapes() -> None:
    text = json.dumps([tool.function for tool in TOOLS])
    assert len(TOOLS) >= 24 and len(BY_NAME) == len(TOOLS)
    for keyword in ('"enum"', '"array"', '"minimum"', '"pattern"', '"minItems"', '"format": "date"', '"maxLength"'):
        assert keyword in text
    assert set(REQUESTS) <= set(BY_NAME)
    for tool in TOOLS:
        assert schema_problem(tool.function["parameters"]) is None and schema_problem(tool.returns or {}) is None
        assert "x-" not in json.dumps(tool.function["parameters"]), "what only the broker reads is not for a model"


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.sampled_from(TOOLS), st.integers(0, 2**31))
def test_a_result_keeps_to_its_schema_and_comes_back_the_same(tool: Tool, seed: int) -> None:
    arguments = value_of(tool.function["parameters"], Draw("arguments", seed), {})
    call = ToolCall(tool.name, arguments)
    assert arguments_problem(call, tool.function) is None
    result = BROKER.call(call, seed=seed)
    value = json.loads(result.content)
    if result.error:
        assert set(value) == {"error"} and set(value["error"]) == {"type", "message"}
        assert value["error"]["type"] not in ("internal", "invalid_arguments", "unknown_tool")
    else:
        assert value_problem(value, tool.returns or {}) is None
    assert result.content == json.dumps(value, ensure_ascii=False)
    again = dict(reversed(list(arguments.items())))
    assert Broker(TOOLS).call(ToolCall(tool.name, again), seed=seed) == result, "the order of the arguments is nothing"


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.sampled_from([*BY_NAME, "no_such_tool", ""]), st.dictionaries(st.text(max_size=8), JSON, max_size=3))
def test_whatever_a_model_writes_gets_a_result(name: str, arguments: dict[str, Any]) -> None:
    result = BROKER.call(ToolCall(name, arguments), seed=1)
    assert isinstance(json.loads(result.content), dict)
    result.content.encode()
    chat.render([chat.Message("user", "x"), chat.Message("tool", result.content)])
    if name not in BY_NAME and not _odd(arguments):
        assert json.loads(result.content)["error"]["type"] == "unknown_tool"


def _odd(arguments: dict[str, Any]) -> bool:
    try:
        return not json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        return True


def test_seeds_give_different_results_and_some_are_empty_and_some_are_errors() -> None:
    results = [BROKER.call(ToolCall("web_search", {"query": "rain"}), seed=seed) for seed in range(300)]
    values = [json.loads(result.content) for result in results]
    assert len({result.content for result in results}) > 100
    assert any(value.get("results") == [] for value in values)
    assert 0 < sum(bool(result.error) for result in results) < 40
    assert len({result.sha256 for result in results}) == len({result.content for result in results})


def test_results_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "from distill.broker import Broker; from distill.data.prompts.tool_material import TOOLS;"
        "from distill.chat import ToolCall;"
        "from distill.draw import Draw; from distill.schema_values import value_of;"
        "drawn = [ToolCall(t.name, value_of(t.function['parameters'], Draw(t.name), {})) for t in TOOLS];"
        "print([Broker(TOOLS).call(call, seed=7).sha256 for call in drawn])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and len(runs[0]) > 64 * len(TOOLS)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("calculate", {"operation": "divide", "operands": [7, 2]}, {"value": 3.5}),
        ("calculate", {"operation": "average", "operands": [1, 2, 3]}, {"value": 2}),
        ("calculate", {"operation": "power", "operands": [2, 10]}, {"value": 1024}),
        ("calculate", {"operation": "subtract", "operands": [10, 4, 1], "round_to": 0}, {"value": 5}),
        ("convert_units", {"value": 212, "from_unit": "fahrenheit", "to_unit": "celsius"},
         {"value": 100, "unit": "celsius"}),
        ("convert_units", {"value": -40, "from_unit": "celsius", "to_unit": "fahrenheit"},
         {"value": -40, "unit": "fahrenheit"}),
        ("convert_units", {"value": 1, "from_unit": "mile", "to_unit": "km"}, {"value": 1.6093, "unit": "km"}),
        ("date_difference", {"start": "2028-02-28", "end": "2028-03-01"},
         {"value": 2, "unit": "days", "weekday_of_end": "Wednesday"}),
        ("translate", {"text": "Good morning!", "target": "de"}, {"translation": "guten Morgen", "target": "de"}),
    ],
)  # fmt: skip
def test_what_follows_from_the_arguments_is_right(name: str, arguments: dict[str, Any], expected: Any) -> None:
    assert answer(name, **arguments) == expected


@pytest.mark.parametrize(
    ("name", "arguments", "kind"),
    [
        ("calculate", {"operation": "divide", "operands": [1, 0]}, "math_error"),
        ("calculate", {"operation": "power", "operands": [1e300, 9]}, "math_error"),
        ("calculate", {"operation": "power", "operands": [-1, 0.5]}, "math_error"),
        ("calculate", {"operation": "add", "operands": [10**400, 1]}, "math_error"),
        ("convert_units", {"value": 10**400, "from_unit": "kg", "to_unit": "g"}, "math_error"),
        ("convert_currency", {"amount": 10**400, "from": "EUR", "to": "USD"}, "math_error"),
        ("convert_units", {"value": 1, "from_unit": "kg", "to_unit": "m"}, "incompatible_units"),
        ("date_difference", {"start": "2027-02-30", "end": "2027-03-01"}, "invalid_date"),
        ("find_events", {"range": {"start": "2027-02-03", "end": "2027-02-01"}}, "invalid_range"),
        ("search_flights", {"from": "OSL", "to": "OSL", "date": "2027-02-03"}, "invalid_route"),
        ("get_weather", {}, "invalid_arguments"),
        ("get_weather", {"city": "Oslo", "units": "kelvin"}, "invalid_arguments"),
        ("get_weather", {"city": "Oslo", "country": "NO"}, "invalid_arguments"),
        ("get_wether", {"city": "Oslo"}, "unknown_tool"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_a_typed_error(name: str, arguments: dict[str, Any], kind: str) -> None:
    result = BROKER.call(ToolCall(name, arguments), seed=3)
    assert result.error and json.loads(result.content)["error"]["type"] == kind


def test_results_repeat_what_was_asked_for() -> None:
    for seed in range(40):
        found = answer("get_order", seed, order_id="ORD-123456")
        assert found.get("order_id", "ORD-123456") == "ORD-123456"
        rate = answer("convert_currency", seed, BROKER, amount=100, **{"from": "EUR", "to": "SEK"})
        if "rate" in rate:
            assert abs(rate["rate"] / CURRENCIES["SEK"] - 1) < 0.03
            assert rate["amount"] == pytest.approx(100 * rate["rate"], rel=1e-4)


# --- faults


def test_a_fault_once_spares_the_second_call_and_a_lasting_one_does_not() -> None:
    call, other = ToolCall("get_weather", {"city": "Oslo"}), ToolCall("set_timer", {"minutes": 5})
    for seed in range(50):
        first = BROKER.call(call, seed=seed, fault="once")
        assert first.error and json.loads(first.content)["error"]["type"] != "permission_denied"
        assert BROKER.call(call, seed=seed, nth=1, fault="once") == BROKER.call(call, seed=seed)
        lasting = [json.loads(BROKER.call(c, seed=seed, nth=n, fault="always").content)
                   for n, c in enumerate((call, other, call))]  # fmt: skip
        assert len({value["error"]["type"] for value in lasting}) == 1
    assert json.loads(BROKER.call(ToolCall("x", {}), seed=1, fault="always").content)["error"]["type"] == "unknown_tool"


# --- tools and fixtures from files

STOCK = {
    "name": "stock_level",
    "description": "How many are left.",
    "parameters": {"type": "object", "properties": {"item": {"type": "string"}, "size": {"type": "integer"}},
                   "required": ["item"]},
    "returns": {"type": "object", "properties": {"left": {"type": "integer", "minimum": 0, "maximum": 9},
                                                 "item": {"type": "string", "x-argument": "item"}},
                "required": ["left", "item"], "additionalProperties": False},
}  # fmt: skip
LOOKUP = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object", "properties": {"q": {}}}}}


def write(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_a_tool_from_a_file_is_simulated_by_its_schema(tmp_path: Path) -> None:
    tools = read_tools(write(tmp_path / "tools.jsonl", STOCK))
    broker = Broker(tools)
    values = [answer("stock_level", seed, broker, item="bolt") for seed in range(60)]
    assert {value["item"] for value in values} == {"bolt"} and {value["left"] for value in values} == set(range(10))
    assert "returns" not in tools[0].function
    listed = tmp_path / "tools.json"
    listed.write_text(json.dumps([STOCK, LOOKUP | {"returns": {"type": "string"}}], indent=1))
    assert [tool.name for tool in read_tools(listed)] == ["stock_level", "lookup"]


def test_a_fixture_answers_its_arguments_and_no_others(tmp_path: Path) -> None:
    tools = read_tools(write(tmp_path / "tools.jsonl", STOCK, LOOKUP))
    path = write(
        tmp_path / "fixtures.jsonl",
        {"tool": "stock_level", "args": {"item": "nut", "size": 3}, "result": {"left": 4, "item": "nut"}, "id": "f1"},
        {
            "tool": "stock_level",
            "args": {"item": "nut"},
            "error": {"type": "closed", "message": "no stock-taking today"},
        },
        {"tool": "lookup", "args": {"q": [1, {"b": None}]}, "result": "über"},
        {"tool": "lookup", "args": {}, "result": None},
    )
    broker = Broker(tools, read_fixtures([path], tools))
    assert answer("stock_level", 1, broker, size=3, item="nut") == {"left": 4, "item": "nut"}
    closed = broker.call(ToolCall("stock_level", {"item": "nut"}), seed=5)
    assert closed.error and "no stock-taking" in closed.content
    assert answer("lookup", 9, broker, q=[1, {"b": None}]) == "über" and answer("lookup", 9, broker) is None
    for arguments in ({"item": "nut", "size": 4}, {"item": "Nut"}):
        assert answer("stock_level", 1, broker, **arguments)["error"]["type"] == "fixture_miss"
    assert answer("lookup", 1, broker, q=[1.0, {"b": None}])["error"]["type"] == "fixture_miss"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "not JSON"),
        (['{"tool": "lookup", "args": {}, "result": 1}', "[]"], "expected a JSON object"),
        ([{"tool": "look", "args": {}, "result": 1}], "unknown tool 'look'"),
        ([{"tool": "stock_level", "args": {"item": 4}, "result": {"left": 1, "item": "x"}}], "args: "),
        ([{"tool": "stock_level", "args": {"item": "x", "y": 1}, "result": {"left": 1, "item": "x"}}], "args: "),
        ([{"tool": "stock_level", "args": {"item": "x"}, "result": {"left": 99, "item": "x"}}], "result: "),
        ([{"tool": "lookup", "args": {"q": 1}, "result": 1}, {"tool": "lookup", "args": {"q": 1}, "result": 2}],
         "twice"),
        ([{"tool": "lookup", "args": {}}], "either a result or an error"),
        ([{"tool": "lookup", "args": {}, "result": 1, "error": {"type": "a", "message": "b"}}], "either a result"),
        ([{"tool": "lookup", "args": {}, "results": 1}], "results"),
        ([{"tool": "lookup", "args": {}, "result": "<|im_end|>"}], "control token"),
        ([{"tool": "lookup", "args": {}, "result": "x" * 300_000}], "too long"),
        (["\ud800"], "UTF-8"),
        (['{"tool": "lookup", "args": {}, "result": NaN}'], "not JSON"),
    ],
)  # fmt: skip
def test_a_bad_fixture_is_refused_by_file_and_line(tmp_path: Path, rows: list[object], message: str) -> None:
    tools = read_tools(write(tmp_path / "tools.jsonl", STOCK, LOOKUP))
    path = tmp_path / "fixtures.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with pytest.raises(DatasetError, match=re.escape(f"{path}:{len(rows)}: ")) as caught:
        read_fixtures([path], tools)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "1 to 64"),
        ({"name": "rm -rf"}, "1 to 64"),
        ({"name": 5}, "1 to 64"),
        ({"description": 5}, "description"),
        ({"parameters": {"type": "nonsense"}}, "parameters of stock_level"),
        ({"parameters": [1]}, "not a JSON object"),
        ({"parameters": {"properties": {"a": {"pattern": "(?=x)"}}}}, "parameters of"),
        ({"returns": {"type": "integer", "minimum": 5, "maximum": 3}}, "returns of"),
        ({"returns": {"type": "string", "pattern": "^a{5000}$"}}, "returns of"),
        ({"returns": {"$ref": "https://example.com/schema"}}, "returns of"),
        ({"returns": {"$ref": "#"}}, "returns of"),
        ({"returns": {"not": {}}}, "returns of"),
        ({"description": "<|im_start|>system"}, "control token"),
        ({"returns": {"const": "ok"}, "returned": 1}, "no key 'returned'"),
    ],
)
def test_a_bad_tool_is_refused_by_file_and_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "tools.jsonl", LOOKUP, STOCK | change)
    with pytest.raises(DatasetError, match=re.escape(str(path))) as caught:
        read_tools(path)
    assert message in str(caught.value) and ":2: " in str(caught.value)


def test_a_tool_that_nothing_can_answer_for_is_refused(tmp_path: Path) -> None:
    tools = read_tools(write(tmp_path / "tools.jsonl", LOOKUP))
    with pytest.raises(ConfigError, match="lookup has neither fixtures nor `returns`"):
        Broker(tools)
    with pytest.raises(ConfigError, match="get_weather is defined twice"):
        Broker([*TOOLS, TOOLS[0]])
    with pytest.raises(DatasetError, match="defined twice"):
        read_tools(write(tmp_path / "twice.jsonl", STOCK, STOCK))


def test_a_result_with_a_control_token_is_not_passed_on() -> None:
    result = BROKER.call(ToolCall("set_reminder", {"text": "<|im_end|>", "when": {"date": "2027-01-01",
    "time": "10:00"}}),
                         seed=1)  # fmt: skip
    assert result.error and "<|im_end|>" not in result.content


# --- values made from a schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": r"^(GET|POST) /v\d/[a-z_]{2,9}(\?x=\w+)?$"},
        {"type": "string", "pattern": r"^[^aeiou\s]{3}[^x]\S$"},
        {"type": "string", "minLength": 30, "maxLength": 34},
        {"type": "string", "format": "uuid"},
        {"type": ["integer", "null"], "minimum": -5, "maximum": -3},
        {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6, "multipleOf": 2},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
        {"type": "number", "maximum": -1e6},
        {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 3, "maxItems": 3},
        {"type": "array", "prefixItems": [{"const": "a"}, {"type": "integer"}], "minItems": 2, "maxItems": 2},
        {"anyOf": [{"type": "boolean"}, {"type": "string", "format": "date"}]},
        {"$defs": {"tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/leaf"}}, "required": ["left"]},
                   "leaf": {"const": 1}}, "$ref": "#/$defs/tree"},
        {"properties": {"a": {"type": "integer", "minimum": 1}, "b": {"type": "null"}}, "required": ["a"]},
    ],
)  # fmt: skip
def test_a_value_satisfies_its_schema(schema: dict[str, Any]) -> None:
    for seed in range(60):
        value = value_of(schema, Draw(seed), {})
        assert value_problem(value, schema) is None, value
        assert value == value_of(schema, Draw(seed), {})


def test_a_schema_without_end_is_refused_quickly() -> None:
    endless = {"type": "array", "items": {"$ref": "#"}, "minItems": 3, "maxItems": 3}
    with pytest.raises(InputError, match="too large or too deeply nested"):
        value_of(endless, Draw(1), {})
    with pytest.raises(DatasetError, match="returns of"):
        parse_tool(STOCK | {"returns": endless}, "here")
    for pattern in ("(){1000000000}", "((){4000}){4000}", "(a{1000}){1000}", "(" * 2000 + ")" * 2000):
        with pytest.raises(InputError, match=r"pattern|schema"):
            value_of({"type": "string", "pattern": pattern}, Draw(1), {})
