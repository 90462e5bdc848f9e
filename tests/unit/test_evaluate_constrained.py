"""Constrained decoding: what it lets through is a valid call, and it changes nothing that was valid already."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill import chat
from distill.artifacts import canonical_json
from distill.chat import Message, ToolCall, call_text
from distill.data.prompts.tool_material import TOOLS as BUILT_IN
from distill.errors import InputError
from distill.evaluate.constrained import Grammars
from distill.evaluate.episode import Request
from distill.evaluate.runners import Settings
from distill.evaluate.runners.templated import TemplatedModel
from distill.tokenizer import CALL_END, CALL_START, toy_tokenizer
from distill.tools import arguments_problem
from tests.unit.test_evaluate_runners import item, model_of, student

pytest.importorskip("llguidance")
TOKENIZER = toy_tokenizer()
FREE = Grammars(TOKENIZER)
FORCED = Grammars(TOKENIZER, must_call=True)
WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "required": ["city"], "properties": {
        "city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "where": {"type": "object", "required": ["lat"], "properties": {
            "lat": {"type": "number"}, "on": {"type": "boolean"}}},
    }},
}  # fmt: skip
TIMER = {"name": "timer", "parameters": {"type": "object", "properties": {"unit": {"enum": ["s", "Stück", None]}}}}


def ids_of(text: str) -> list[list[int]]:
    """A text as its tokens, and byte by byte: a model may write it in either way."""
    return [TOKENIZER.encode(text), [TOKENIZER.ids_by_bytes[bytes([one])] for one in text.encode()]]


def allows(text: str, tools: Sequence[dict[str, Any]], grammars: Grammars = FREE) -> bool:
    """Whether a model that wants to say just this, and then end, may."""
    found = set()
    for ids in ids_of(text):
        constraint = grammars.begin(tools)
        wanted = [*ids, TOKENIZER.turn_end]
        found.add(all(constraint.choose(_wants(token)) == token for token in wanted))
    assert len(found) == 1, "tokens and bytes part"
    return found.pop()


def _wants(token: int) -> np.ndarray:
    logits = np.zeros(TOKENIZER.vocab_size, np.float32)
    logits[token] = 9.0
    return logits


def call(name: str, arguments: str) -> str:
    return f'{CALL_START}{{"name": "{name}", "arguments": {arguments}}}{CALL_END}'


@pytest.mark.parametrize("text", [
    "", "It rains.", "a < b, <tool_cal and 12 \u20ac\n\nmore", "<think>\nhm\n</think>\n\nYes.", '{"name": "weather"}',
    call("weather", '{"city": "Oslo"}'), "First: " + call("weather", '{"days": 3, "city": "\u00c5s \\"x\\" \\n"}'),
    call("weather", '{"where": {"on": true, "lat": -1.5e3}, "city": ""}'),
    call("timer", "{}") + call("timer", '{"unit": "St\u00fcck"}') + call("weather", '{"city": "a"}'),
    call("timer", '{"unit": null}'), "<think>\nIt is late.\n</think>\n\nSo " + call("timer", "{}"),
])  # fmt: skip
def test_what_is_right_may_be_said(text: str) -> None:
    assert allows(text, [WEATHER, TIMER])
    parsed = chat.parse(text)
    assert not parsed.malformed and text.count(CALL_START) == len(parsed.calls)


@pytest.mark.parametrize("text", [
    CALL_START, "x " + CALL_END, call("weather", "{}"), call("weather", '{"city": 1}'), call("wether", '{"city": "a"}'),
    call("weather", '{"city": "a", "days": 8}'), call("weather", '{"city": "a", "city": "b"}'),
    call("weather", '{"city": "a", "extra": 1}'), call("weather", '{"city": "a"'), call("timer", '{"unit": "min"}'),
    call("weather", '{"city":"a"}'), call("timer", "{}") + " and more",
    call("weather", '{"city": "a", "where": {"lat": 1e999}}'),
    call("weather", '{"city": "a</tool_call>"}'), call("weather", '{"city": "<tool_call>"}'),
    call("weather", '{"city": "<|im_end|>"}'), "so<|im_start|>", call("timer", "[]"), call("timer", "{}") * 17,
])  # fmt: skip
def test_what_is_wrong_cannot_be_said(text: str) -> None:
    assert not allows(text, [WEATHER, TIMER])


def test_without_tools_there_are_no_calls() -> None:
    assert allows("Hello.", []) and not allows(call("weather", "{}"), [])


def test_a_forced_turn_begins_with_a_call() -> None:
    assert allows(call("timer", "{}"), [TIMER], FORCED)
    assert not allows("Hello.", [TIMER], FORCED) and not allows("", [TIMER], FORCED)


def test_properties_come_in_any_order() -> None:
    values = {"city": '"a"', "days": "2", "where": '{"on": false, "lat": 0}'}
    for n in (1, 2, 3):
        for names in itertools.permutations(values, n):
            arguments = "{" + ", ".join(f'"{name}": {values[name]}' for name in names) + "}"
            assert allows(call("weather", arguments), [WEATHER]) == ("city" in names)


# -- what a student with random weights says

_names = st.sampled_from(["city", "n", "flag", "Größe", "a b", 'q"', "list", "where"])


def _bounded(depth: int) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of values with an end, which a model of random weights finds, too."""
    leaves = st.one_of(
        st.just({"type": "boolean"}), st.just({"type": "null"}),
        st.lists(st.one_of(st.text("aé\"\\ <>/", max_size=6), st.integers(-99, 99), st.none()), min_size=1, max_size=4,
                 unique_by=repr).map(lambda values: {"enum": values}),
        st.tuples(st.integers(-50, 0), st.integers(1, 999)).map(
            lambda ends: {"type": "integer", "minimum": ends[0], "maximum": ends[1]}),
        st.integers(0, 8).map(lambda n: {"type": "string", "maxLength": n}),
        st.just({"type": "string", "pattern": "^[a-c]{2,5}$"}), st.just({"type": ["boolean", "null"]}),
        st.just({"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 2}]}),
    )  # fmt: skip
    if not depth:
        return leaves
    inner = _bounded(depth - 1)
    arrays = st.tuples(inner, st.integers(0, 3)).map(lambda of: {"type": "array", "items": of[0], "maxItems": of[1]})
    return st.one_of(leaves, leaves, arrays, _object(inner))


@st.composite
def _object(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    properties = draw(st.dictionaries(_names, inner, min_size=1, max_size=4))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    if draw(st.booleans()):
        schema["additionalProperties"] = False
    return schema


def _in_a_hurry(seed: int) -> TemplatedModel:
    """A student of random weights to whom the end of a turn means much, in either direction."""
    made = student(seed, context=4096, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with torch.no_grad():
        made.lm_head.weight[TOKENIZER.turn_end] *= 4.0
    return model_of(made, max_new_tokens=4000, constrained=True, must_call=True)


def test_a_student_of_random_weights_makes_valid_calls_only() -> None:
    students = [_in_a_hurry(seed) for seed in range(10)]
    seen: Counter[str] = Counter()

    @settings(max_examples=140, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(_object(_bounded(1)), min_size=2, max_size=4), st.sampled_from(students))
    def each(schemas: list[dict[str, Any]], model: TemplatedModel) -> None:
        tools = [{"name": f"f{index}", "parameters": schema} for index, schema in enumerate(schemas)]
        one = item("a", "Do it.", tools)
        reply = model.reply(one, one.messages, ())
        parsed = chat.parse(reply.text)
        assert reply.stop == "stop" and parsed.calls and not parsed.malformed and not parsed.content
        for made in parsed.calls:
            assert arguments_problem(made, tools[int(made.name[1:])]) is None
        # the template's own form, but for zero
        assert "".join(map(call_text, parsed.calls)) == reply.text.replace("-0", "0")
        assert model.identity()["decoding"]["unconstrained_tools"] == {}
        seen.update(calls=len(parsed.calls), schemas=len(schemas))

    each()
    assert seen["schemas"] >= 200 and seen["calls"] >= 200


class _Noise:
    """An engine that wants another token every time, and those that end something a little more."""

    capacity, together = 1 << 20, 1

    def __init__(self, seed: int) -> None:
        self._draw = np.random.default_rng(seed)
        ends = [data[:1] in (b'"', b"@", b".") for _, data in sorted(TOKENIZER.bytes_by_id.items())]
        self._wish = 3.0 * np.array(ends, np.float32)

    def start(self) -> Any:
        return type("Context", (), {"ids": [], "cut": lambda self, length: None})()

    def feed(self, contexts: Sequence[Any], ids: Sequence[Sequence[int]]) -> np.ndarray:
        return self._draw.standard_normal((1, TOKENIZER.vocab_size), np.float32) + self._wish


def test_the_built_in_tools_are_called_rightly() -> None:
    """Free text, lists and nested objects included, whatever an engine of noise wants to write into them."""
    functions = [tool.function for tool in BUILT_IN]
    done = set()
    for index, function in enumerate(functions):
        how = Settings(max_new_tokens=20_000, constrained=True, must_call=True, tools=(function,))
        model = TemplatedModel(_Noise(index), TOKENIZER, how, {})
        one = item("a", "?", [function])
        reply = model.reply(one, one.messages, ())
        parsed = chat.parse(reply.text)
        assert reply.stop == "stop" and parsed.calls and not parsed.malformed
        assert [arguments_problem(made, function) for made in parsed.calls] == [None] * len(parsed.calls)
        assert model.identity()["decoding"]["unconstrained_tools"] == {}
        done.add(function["name"])
    assert len(done) == len(functions) >= 20


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 5000), st.lists(_object(_bounded(1)), min_size=1, max_size=2), st.integers(0, 60))
def test_what_is_allowed_is_never_altered(seed: int, schemas: list[dict[str, Any]], length: int) -> None:
    """A model that says a valid turn says the same turn under the constraint: every argmax stays."""
    tools = [{"name": f"f{index}", "parameters": schema} for index, schema in enumerate(schemas)]
    model = TemplatedModel(_Noise(seed), TOKENIZER, Settings(max_new_tokens=4000, constrained=True, must_call=True), {})
    one = item("a", "?", tools)
    calls = chat.parse(model.reply(one, one.messages, ()).text).calls
    turned = [ToolCall(made.name, dict(reversed(made.arguments.items()))) for made in calls[:16]]
    text = "Well \u2013 " * (length % 3) + "".join(map(call_text, turned))
    assert allows(text, tools)


def test_an_unconstrained_reply_that_the_grammar_allows_is_the_constrained_one() -> None:
    same = 0
    for seed in range(40):
        made = student(seed)
        free, constrained = model_of(made, max_new_tokens=4), model_of(made, max_new_tokens=4, constrained=True)
        one = item("a", f"Hello there, number {seed}?")
        request = Request(one, one.messages, ())
        said = free.reply(*request)
        if "\ufffd" not in said.text and "<" not in said.text:
            assert constrained.reply(*request) == said
            same += 1
    assert same >= 5


# -- schemas that cannot be had


def test_a_schema_that_cannot_be_constrained_is_named_and_its_tool_takes_any_object() -> None:
    odd = {"name": "odd", "parameters": {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}}
    grammars = Grammars(TOKENIZER)
    assert grammars.identity()["unconstrained_tools"] == {}
    grammars.look_at([odd, TIMER, {"type": "function", "function": WEATHER}])
    (name, reason), *others = grammars.identity()["unconstrained_tools"].items()
    assert (name, others) == ("odd", []) and "not" in reason and "\n" not in reason
    assert allows(call("odd", '{"a": [1, {"b": null}]}'), [odd, TIMER], grammars)
    assert not allows(call("odd", "[1]"), [odd], grammars) and not allows(
        call("timer", '{"x": 1}'), [odd, TIMER], grammars
    )


def test_a_schema_whose_parts_add_up_cannot_be_closed_and_is_named() -> None:
    """No list of its own properties says what `anyOf` allows: left open, it would let extras through."""
    parts = {"type": "object", "anyOf": [{"properties": {"a": {"type": "null"}}}, {"required": ["b"]}]}
    grammars = Grammars(TOKENIZER)
    grammars.look_at([{"name": "parts", "parameters": parts}])
    assert set(grammars.identity()["unconstrained_tools"]) == {"parts"}


@pytest.mark.parametrize(
    ("parameters", "right", "wrong"),
    [
        (None, "{}", '{"a": 1}'),
        ({}, "{}", '{"a": 1}'),
        ({"type": "object"}, "{}", '{"a": 1}'),
        ({"properties": {"a": {}}}, '{"a": [null, 1.5]}', '{"b": 1}'),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, '{"a": 1}', '{"a": "x"}'),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": "boolean"}}},
         '{"a": true}', '{"a": 1}'),
        ({"type": "object", "properties": {"a": {"type": "string", "format": "date", "description": "x"}}},
         '{"a": "any day"}', '{"a": 5}'),
        ({"type": "object", "properties": {"a": {"type": "array", "items": {
            "type": "object", "properties": {"x": {"type": "null"}, "y": {"type": "null"}}}}}},
         '{"a": [{"y": null, "x": null}]}', '{"a": [{"z": 1}]}'),
        ({"type": "object", "properties": {"a": {"type": "object"}}}, '{"a": {"z": [1, "b"]}}', '{"a": 1}'),
        ({"type": "object", "properties": {"a": True, "b": False}}, '{"a": 1}', '{"b": 1}'),
        ({"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(70)}},
         '{"p3": null}', '{"p70": 1}'),
    ],
)  # fmt: skip
def test_schemas_are_closed_as_scoring_closes_them(parameters: Any, right: str, wrong: str) -> None:
    function = {"name": "f"} | ({} if parameters is None else {"parameters": parameters})
    assert arguments_problem(ToolCall("f", json.loads(right)), function) is None
    assert allows(call("f", right), [function]) and not allows(call("f", wrong), [function])
    if "z" not in wrong:  # an undeclared property within a list is valid, and still not offered
        assert arguments_problem(ToolCall("f", json.loads(wrong)), function) is not None


def test_names_that_are_no_words_are_written_as_json() -> None:
    name = 'a.b "é" \\ ::_ %if'
    function = {"name": name, "parameters": {"type": "object", "properties": {name: {"const": name}}}}
    text = call_text(ToolCall(name, {name: name}))
    assert allows(text, [function]) and chat.parse(text).calls == [ToolCall(name, {name: name})]


def test_a_grammar_too_large_is_one_line() -> None:
    huge = {"name": "f", "parameters": {"type": "object", "properties": {
        f"p{i}": {"type": "string", "pattern": "(a|b){0,300}"} for i in range(60)}}}  # fmt: skip
    with pytest.raises(InputError, match="of the 300 tools offered") as caught:
        FREE.begin([huge] * 300)
    assert "\n" not in str(caught.value)


def test_identity_names_the_grammar() -> None:
    model = model_of(student(), constrained=True)
    decoding = model.identity()["decoding"]
    assert decoding["constrained"] is True and decoding["grammar"].startswith("llguidance ")
    assert canonical_json(decoding) and model.reply(*Request(item("a", "x"), (Message("user", "x"),), ())) is not None
