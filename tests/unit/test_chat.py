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
from distill.errors import InputError
from distill.tokenizer import toy_tokenizer

words = st.text(st.characters(exclude_categories=("Cs",)), max_size=20).filter(
    lambda text: not chat._THOUGHT_MARK.search(text)
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
calls = st.builds(ToolCall, words, st.dictionaries(words, values, max_size=3))
turns = st.one_of(
    st.builds(Message, st.just("user"), words),
    st.builds(Message, st.just("tool"), words),
    st.builds(Message, st.just("assistant"), words, st.lists(calls, max_size=2).map(tuple), words),
)
tools = st.lists(
    st.fixed_dictionaries({"name": words, "parameters": st.dictionaries(words, values, max_size=2)}), max_size=2
)
conversations = st.tuples(
    st.lists(st.builds(Message, st.just("system"), words), max_size=1), st.lists(turns, min_size=1, max_size=4)
).map(lambda parts: parts[0] + parts[1])


def _jinja(messages: list[Message], offered: list[dict[str, Any]], generate: bool, field: str = "reasoning") -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers sets it up
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    plain = [
        {"role": m.role, "content": m.content, field: m.reasoning,
         "tool_calls": [{"function": {"name": c.name, "arguments": c.arguments}} for c in m.tool_calls]}
        for m in messages
    ]  # fmt: skip
    return environment.from_string(chat.JINJA).render(messages=plain, tools=offered, add_generation_prompt=generate)


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
@given(conversations, tools, st.booleans())
def test_the_jinja_template_renders_the_same_text(field, messages, offered, generate) -> None:
    rendered = chat.render(messages, offered, add_generation_prompt=generate)
    assert _jinja(messages, offered, generate, field) == rendered


@given(words, st.lists(calls, max_size=3), words)
def test_parsing_an_assistants_turn_gives_back_reasoning_content_and_calls(content, made, reasoning) -> None:
    turn = Message("assistant", content, tuple(made), reasoning)
    (body,) = [piece.text for piece in chat.segments([turn]) if piece.target]
    parsed = chat.parse(body)
    assert parsed.malformed == [] and parsed.content == content.strip() and parsed.reasoning == reasoning
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


@given(conversations, tools, st.sets(st.integers(0, 4)))
def test_only_the_turns_that_are_learned_are_targets(messages, offered, learned) -> None:
    tokenizer = toy_tokenizer()
    encoded = chat.encode(tokenizer, messages, offered, learned=learned)
    pieces = [p for p in chat.segments(messages, offered) if p.target and p.message in learned]
    assert encoded.ids == chat.encode(tokenizer, messages, offered).ids
    found = [i for i, target in zip(encoded.ids, encoded.target, strict=True) if target]
    assert found == [i for piece in pieces for i in tokenizer.encode(piece.text)]


@given(conversations, tools)
def test_a_segment_names_the_message_whose_words_it_holds(messages, offered) -> None:
    for piece in chat.segments(messages, offered):
        if piece.message is not None:
            message = messages[piece.message]
            assert message.content in piece.text and piece.target == (message.role == "assistant")


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_a_control_token_is_refused_wherever_it_hides(token: str) -> None:
    sneaky = f"x{token}\n<|im_start"
    for messages, offered in (
        ([Message("user", sneaky)], []),
        ([Message("tool", sneaky)], []),
        ([Message("assistant", "", (ToolCall("f", {"a": sneaky}),))], []),
        ([Message("assistant", "", (ToolCall(sneaky, {}),))], []),
        ([Message("assistant", "", (), sneaky)], []),
        ([Message("user", "x")], [{"name": "f", "description": sneaky}]),
    ):
        with pytest.raises(InputError, match="control token"):
            chat.render(messages, offered)


def test_arguments_cannot_end_their_own_call() -> None:
    with pytest.raises(InputError, match="tool_call"):
        chat.render([Message("assistant", "", (ToolCall("f", {"a": "</tool_call>"}),))])


@pytest.mark.parametrize("mark", ["<think>", "</think>", "<tool_call>", "</tool_call>"])
def test_reasoning_cannot_end_itself(mark: str) -> None:
    with pytest.raises(InputError, match=r"the reasoning of message 0.*" + mark):
        chat.render([Message("assistant", "x", (), f"so {mark} then")])


def test_reasoning_that_is_not_at_the_beginning_is_text() -> None:
    parsed = chat.parse("Well. <think>\nhm\n</think>\n\nYes")
    assert parsed.reasoning == "" and parsed.content.startswith("Well. <think>")


def test_a_turn_as_written_renders_like_its_parts() -> None:
    turn = Message("assistant", "Sure.", (ToolCall("f", {"a": 1}),), "They ask.")
    written = Message("assistant", chat.thought_text(turn) + "Sure." + chat.call_text(turn.tool_calls[0]))
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


def test_a_user_cannot_call_tools_or_reason_and_roles_are_known() -> None:
    with pytest.raises(ValueError, match="cannot call"):
        Message("user", "", (ToolCall("f", {}),))
    with pytest.raises(ValueError, match="or reason"):
        Message("tool", "", (), "hm")
    with pytest.raises(ValueError, match="role 'root'"):
        Message("root", "")
