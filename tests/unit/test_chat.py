"""Rendering, parsing and encoding are each other's inverses, and nothing can be smuggled in."""

from __future__ import annotations

import json
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill import chat
from distill.chat import Message, ToolCall
from distill.data.targets import targets_of
from distill.errors import InputError
from distill.tokenizer import toy_tokenizer

words = st.text(st.characters(exclude_categories=("Cs",)), max_size=20).filter(lambda text: not chat._MARK.search(text))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
calls = st.builds(ToolCall, words, st.dictionaries(words, values, max_size=3))
turns = st.one_of(
    st.builds(Message, st.just("user"), words),
    st.builds(Message, st.just("tool"), words),
    st.builds(Message, st.just("assistant"), words, st.lists(calls, max_size=2).map(tuple)),
)
tools = st.lists(
    st.fixed_dictionaries({"name": words, "parameters": st.dictionaries(words, values, max_size=2)}), max_size=2
)
conversations = st.tuples(
    st.lists(st.builds(Message, st.just("system"), words), max_size=1), st.lists(turns, min_size=1, max_size=4)
).map(lambda parts: parts[0] + parts[1])


def _jinja(messages: list[Message], offered: list[dict[str, Any]], generate: bool) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers sets it up
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    plain = [
        {"role": m.role, "content": m.content,
         "tool_calls": [{"function": {"name": c.name, "arguments": c.arguments}} for c in m.tool_calls]}
        for m in messages
    ]  # fmt: skip
    return environment.from_string(chat.JINJA).render(messages=plain, tools=offered, add_generation_prompt=generate)


@given(conversations, tools, st.booleans())
def test_the_jinja_template_renders_the_same_text(messages, offered, generate) -> None:
    assert _jinja(messages, offered, generate) == chat.render(messages, offered, add_generation_prompt=generate)


@given(words, st.lists(calls, max_size=3))
def test_parsing_an_assistants_turn_gives_back_content_and_calls(content, made) -> None:
    turn = Message("assistant", content, tuple(made))
    (body,) = [piece.text for piece in chat.segments([turn]) if piece.target]
    parsed = chat.parse(body)
    assert parsed.malformed == [] and parsed.content == content.strip()
    assert [json.dumps([c.name, c.arguments]) for c in parsed.calls] == [
        json.dumps([c.name, c.arguments]) for c in made
    ]


@given(conversations, tools)
def test_ids_decode_to_the_rendered_text_and_targets_to_the_assistants_words(messages, offered) -> None:
    tokenizer = toy_tokenizer()
    encoded = chat.encode(tokenizer, messages, offered)
    assert tokenizer.decode(encoded.ids) == chat.render(messages, offered)
    learned = [i for i, target in zip(encoded.ids, encoded.target, strict=True) if target]
    expected = "".join(piece.text for piece in chat.segments(messages, offered) if piece.target)
    assert tokenizer.decode(learned) == expected


@given(conversations, tools)
def test_the_ids_of_a_prompt_do_not_depend_on_what_follows(messages, offered) -> None:
    full = chat.encode(toy_tokenizer(), [*messages, Message("assistant", "Yes")], offered).ids
    prompt = chat.encode(toy_tokenizer(), messages, offered, add_generation_prompt=True).ids
    assert full[: len(prompt)] == prompt


@given(words.filter(bool), st.lists(calls, min_size=1, max_size=2))
def test_target_spans_cut_the_call_out_of_the_rendered_text(content, made) -> None:
    messages = [Message("user", content), Message("assistant", content, tuple(made))]
    text = chat.render(messages)
    final, *spans = targets_of(messages)
    assert text[slice(*final.char)] == content
    assert [text[slice(*span.char)] for span in spans] == [chat.call_text(call) for call in made]


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_a_control_token_is_refused_wherever_it_hides(token: str) -> None:
    sneaky = f"x{token}\n<|im_start"
    for messages, offered in (
        ([Message("user", sneaky)], []),
        ([Message("tool", sneaky)], []),
        ([Message("assistant", "", (ToolCall("f", {"a": sneaky}),))], []),
        ([Message("assistant", "", (ToolCall(sneaky, {}),))], []),
        ([Message("user", "x")], [{"name": "f", "description": sneaky}]),
    ):
        with pytest.raises(InputError, match="control token"):
            chat.render(messages, offered)


def test_arguments_cannot_end_their_own_call() -> None:
    with pytest.raises(InputError, match="tool_call"):
        chat.render([Message("assistant", "", (ToolCall("f", {"a": "</tool_call>"}),))])


def test_a_turn_as_written_renders_like_its_parts() -> None:
    turn = Message("assistant", "Sure.", (ToolCall("f", {"a": 1}),))
    written = Message("assistant", "Sure." + chat.call_text(turn.tool_calls[0]))
    assert chat.segments([written]) == chat.segments([turn])


@pytest.mark.parametrize(
    "body",
    ['{"name": "f"}', '{"name": "f", "arguments": []}', '{"name": "f", "arguments": {}, "x": 1}', "{}", "f()",
     '{"name": "f", "arguments": {}}}', '{"name": 1, "arguments": {}}'],
)  # fmt: skip
def test_a_call_that_is_not_exactly_right_is_malformed_and_never_repaired(body: str) -> None:
    parsed = chat.parse(f"<tool_call>{body}</tool_call>")
    assert parsed.calls == [] and len(parsed.malformed) == 1


def test_an_unclosed_call_is_malformed() -> None:
    assert chat.parse('<tool_call>{"name": "f", "arguments": {}}').malformed


def test_a_user_cannot_call_tools_and_roles_are_known() -> None:
    with pytest.raises(ValueError, match="cannot call"):
        Message("user", "", (ToolCall("f", {}),))
    with pytest.raises(ValueError, match="role 'root'"):
        Message("root", "")
