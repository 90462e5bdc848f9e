"""Matching of calls has no partial credit, and arguments are judged by their schema."""

from __future__ import annotations

import pytest

from distill.chat import ToolCall
from distill.data.toy_material import TOOLS
from distill.tools import arguments_problem, call_f1, same_call


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
        ({}, "state is missing"),
        ({"state": "dim"}, "state is not one of its enum"),
        ({"state": "on", "room": 1}, "room is not in the schema"),
    ],
)
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
