"""Matching of calls has no partial credit, and arguments are judged by their schema."""

from __future__ import annotations

import time
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.chat import ToolCall
from distill.data.toy_material import TOOLS
from distill.tools import arguments_problem, call_f1, same_call, schema_problem, value_problem


def test_values_of_different_json_types_differ() -> None:
    values = [1, 1.0, True, "1", None, [1], {"a": 1}]
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            assert same_call(ToolCall("f", {"x": a}), ToolCall("f", {"x": b})) == (i == j)


def test_the_order_of_keys_does_not_matter() -> None:
    assert same_call(ToolCall("f", {"a": 1, "b": [2]}), ToolCall("f", {"b": [2], "a": 1}))
    assert not same_call(ToolCall("f", {}), ToolCall("g", {}))


def test_f1_counts_each_call_once() -> None:
    f, g = ToolCall("f", {}), ToolCall("g", {})
    assert call_f1([([f], [f], 0)]).value == 1
    assert call_f1([([f, f], [f], 0)]) == (1, 1, 0)
    assert call_f1([([g], [f], 0)]) == (0, 1, 1)
    assert call_f1([([], [f], 1)]) == (0, 1, 1)
    assert call_f1([([], [], 0)]).value == 0
    assert call_f1([([f], [f], 0), ([g], [], 0)]).value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"state": "on"}, None),
        ({}, "/state is missing"),
        ({"state": "dim"}, '/state: the value is not one of'),
        ({"state": "on", "room": 1}, "/room is not in the schema"),
    ],
)  # fmt: skip
def test_arguments_are_checked_against_the_schema(arguments: dict, problem: str | None) -> None:
    found = arguments_problem(ToolCall("lights", arguments), TOOLS["lights"])
    assert found == problem if problem is None else problem in str(found)


@pytest.mark.parametrize(
    ("kind", "good", "bad"), [("integer", 3, True), ("number", 2.5, "2"), ("boolean", False, 0), ("array", [], {})]
)
def test_json_types_are_not_pythons(kind: str, good: object, bad: object) -> None:
    schema = {"parameters": {"properties": {"x": {"type": kind}}}}
    assert arguments_problem(ToolCall("f", {"x": good}), schema) is None
    assert "type" in str(arguments_problem(ToolCall("f", {"x": bad}), schema))


def _takes(parameters: Any, **arguments: Any) -> bool:
    return arguments_problem(ToolCall("f", arguments), {"parameters": parameters}) is None


def test_an_argument_that_the_schema_does_not_name_is_wrong_unless_it_says_otherwise() -> None:
    named = {"properties": {"a": {}}}
    assert _takes(named, a=1) and not _takes(named, b=1) and not _takes({}, b=1) and _takes({})
    assert _takes(named | {"additionalProperties": {"type": "integer"}}, b=1)
    assert _takes({"patternProperties": {"^x_": {}}}, x_1=1) and not _takes({"patternProperties": {"^x_": {}}}, y=1)
    behind = {"$defs": {"A": named}, "$ref": "#/$defs/A"}
    assert _takes(behind, a=1) and not _takes(behind, b=1)
    one_of = {"oneOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}, "required": ["b"]}]}
    assert _takes(one_of, a=1) and _takes(one_of, b=1) and not _takes(one_of, a=1, c=1)
    draft_7 = {"$schema": "http://json-schema.org/draft-07/schema#"}
    assert _takes(named | draft_7, a=1) and not _takes(named | draft_7, b=1)
    assert not _takes({"properties": {"a": {"items": [{}]}}}, b=1)  # draft 7 without saying so


def test_a_problem_is_a_short_line_with_a_pointer_and_without_the_value() -> None:
    schema = {"properties": {"a/b": {"items": {"properties": {"c": {"type": "integer"}}}}}}
    problem = str(value_problem({"a/b": [{}, {"c": "hunter2" * 100}]}, schema))
    assert problem.startswith("/a~1b/1/c: ") and "hunter2" not in problem
    assert len(str(value_problem("x", {"enum": ["y" * 1000]}))) <= 200


plain = st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from([0.5, 1.0, -2.5]) | st.text("ab1", max_size=3)
values = st.recursive(
    plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from("abc"), v, max_size=3), max_leaves=8
)
kinds = st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])


def _combined(inner: st.SearchStrategy[Any], *refs: str) -> st.SearchStrategy[Any]:
    """Schemas made of others. Only those of a value's parts refer to the whole: a reference to itself on the spot is
    one that the reference implementation never comes back from."""
    deeper = inner | st.just({"$ref": "#"}) if refs else inner
    some = st.lists(inner, min_size=1, max_size=3)
    properties = st.dictionaries(st.sampled_from("abc"), deeper, max_size=3)
    numbers = {
        "minimum": st.integers(-3, 3), "exclusiveMaximum": st.integers(-3, 3), "multipleOf": st.integers(1, 3),
        "minLength": st.integers(0, 3), "maxLength": st.integers(0, 3), "minItems": st.integers(0, 2),
        "maxItems": st.integers(0, 3), "minProperties": st.integers(0, 2),
    }  # fmt: skip
    plain = {
        "type": kinds | st.lists(kinds, min_size=1, max_size=3, unique=True), "const": values,
        "enum": st.lists(values, min_size=1, max_size=3), "pattern": st.sampled_from(["^a", "b$", "[0-9]", "a.b"]),
        "uniqueItems": st.booleans(), "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
        "dependentRequired": st.just({"a": ["b"]}),
    }  # fmt: skip
    plain |= {"$ref": st.sampled_from(refs)} if refs else {}
    nested = {
        "items": deeper, "prefixItems": some, "contains": deeper, "properties": properties, "propertyNames": inner,
        "patternProperties": st.dictionaries(st.sampled_from(["^a", "b"]), inner, max_size=1),
        "additionalProperties": deeper, "unevaluatedProperties": inner, "allOf": some, "anyOf": some, "oneOf": some,
        "not": inner, "if": inner, "then": inner, "else": inner,
    }  # fmt: skip
    return st.fixed_dictionaries({}, optional=numbers | plain | nested)


simple = st.booleans() | st.fixed_dictionaries({"type": kinds})
definitions = st.recursive(simple, _combined, max_leaves=4)
schemas = st.recursive(simple, lambda inner: _combined(inner, "#/$defs/A"), max_leaves=6)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_combined(schemas, "#/$defs/A"), definitions, st.lists(values, min_size=1, max_size=5))
def test_the_verdict_is_that_of_the_reference_implementation(schema, definition, instances) -> None:
    schema = schema | {"$defs": {"A": definition}}
    reference = jsonschema.Draft202012Validator(schema)
    for instance in instances:
        assert (value_problem(instance, schema) is None) == reference.is_valid(instance), (schema, instance)


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"type": "strin"}, "/type"),
        ({"required": "x"}, "required"),
        ({"$ref": "http://127.0.0.1:9/x.json"}, "only references of the form"),
        ({"$ref": "file:///etc/passwd"}, "only references of the form"),
        ({"$ref": "#/$defs/none"}, "does not hold"),
        ({"$dynamicRef": "#x"}, "not supported"),
        ({"properties": {"a": {"$id": "http://x/y"}}}, "$id"),
        ({"$schema": "http://127.0.0.1:9/mine#"}, "meta-schema"),
        ({"pattern": "(?=a)b"}, "pattern"),
        ({"pattern": "(a{1000}){1000}"}, "pattern"),
        ({"description": "x" * (1 << 19)}, "larger than"),
        ("text", "neither an object"),
        (None, "neither an object"),
    ],
)
def test_a_schema_that_cannot_be_used_is_one_short_line(schema: Any, what: str) -> None:
    problem = schema_problem(schema)
    assert problem is not None and what in problem and "\n" not in problem and len(problem) <= 200
    assert value_problem(1, schema) == problem
    assert arguments_problem(ToolCall("f", {}), {"parameters": schema}) in (problem, None)


def test_schemas_that_nest_or_multiply_without_end_are_refused() -> None:
    deep: Any = {"type": "string"}
    for _ in range(100_000):
        deep = {"properties": {"a": deep}}
    assert "deeply" in str(schema_problem(deep)) or "recursion" in str(schema_problem(deep)).lower()
    doubling = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)} | {"a40": {}}
    assert "too large" in str(schema_problem({"$defs": doubling, "$ref": "#/$defs/a0"}))
    tree = {"$defs": {"t": {"properties": {"x": {"allOf": [{"$ref": "#/$defs/t"}] * 2}}}}, "$ref": "#/$defs/t"}
    value: Any = {}
    for _ in range(60):
        value = {"x": value}
    assert "too deeply nested" in str(value_problem(value, tree)) and value_problem({"x": {"x": {}}}, tree) is None


def test_values_that_nest_without_end_are_refused() -> None:
    value: Any = {}
    for _ in range(100_000):
        value = {"a": value}
    assert "deeply nested" in str(value_problem(value, {"additionalProperties": {"$ref": "#"}}))
    assert "deeply nested" in str(value_problem(value, {}))


def test_a_pattern_takes_linear_time() -> None:
    begin = time.perf_counter()
    assert value_problem("a" * 100_000 + "b", {"pattern": "^(a+)+$"}) is not None
    assert time.perf_counter() - begin < 1


def test_a_lone_surrogate_is_no_json() -> None:
    assert "JSON" in str(value_problem("\ud800", {"type": "string"}))


def test_compiled_schemas_are_kept_but_not_for_ever() -> None:
    from distill import tools

    for n in range(2000):
        assert value_problem(n, {"const": n}) is None
    assert tools._compiled.cache_info().currsize <= 1024
