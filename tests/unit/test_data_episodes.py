"""Episodes: a teacher's turns and the broker's, each refusal typed, nothing repaired, the same on every replay."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from distill import chat
from distill.broker import Broker, fixture_key, parse_tool
from distill.data.episodes import REJECTS, Accepted, Protocol, Rejected, advance, episode, replay
from distill.data.journal import Answer, Dead
from distill.data.prompts.stream import Prompt
from distill.data.prompts.tool_material import TOOLS
from distill.data.schema import Teacher
from distill.data.sender import Request
from distill.data.teacher.spec import Sampling

REPLAYED = parse_tool(
    {"name": "stock", "description": "d", "parameters": {"type": "object", "properties": {"item": {"type": "string"}}}},
    "here",
)
BROKER = Broker([*TOOLS, REPLAYED], {fixture_key("stock", {"item": "nut"}): {"result": {"left": 3}}})
WEATHER = next(tool for tool in TOOLS if "weather" in tool.name)
PROTOCOL = Protocol(Teacher("endpoint", "m", "api", host="h"), "chat", Sampling(100, 0.7, 0.9), seed=3)


def _prompt(*tools: Any, expect: str = "any", text: str = "What is it like in Oslo?") -> Prompt:
    return Prompt("p-1", "s", (chat.Message("user", text),), tuple(tool.offer for tool in tools), expect=expect)  # type: ignore[arg-type]


def _body(content: str | None = "Fine.", calls: list[Any] | None = None, finish: str = "stop", **more: Any) -> Answer:
    message: dict[str, Any] = {"role": "assistant", "content": content} | more
    if calls is not None:
        message["tool_calls"] = [
            {"id": name, "type": "function", "function": {"name": tool, "arguments": arguments}}
            for name, tool, arguments in calls
        ]
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 2}}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return Answer(json.dumps({"model": "m-1", "choices": [choice], "usage": usage}).encode())


def _play(prompt: Prompt, *answers: Answer, protocol: Protocol = PROTOCOL) -> tuple[Any, list[Request]]:
    """The end of an episode that is given these answers, and the requests that it made."""
    play, asked = episode(prompt, protocol, BROKER), []
    step = advance(play)
    for answer in answers:
        assert isinstance(step, Request)
        asked.append(step)
        step = advance(play, answer)
    return step, asked


def _arguments(tool: Any) -> str:
    from distill.draw import Draw
    from distill.schema_values import value_of

    return json.dumps(value_of(tool.function["parameters"], Draw("test"), {}))


def test_a_plain_answer_is_a_record_of_one_turn() -> None:
    end, asked = _play(_prompt(), _body("Cold."))
    assert isinstance(end, Accepted) and [turn.origin for turn in end.messages] == ["dataset", "teacher"]
    assert end.messages[-1].content == "Cold." and end.messages[-1].finish_reason == "stop"
    assert end.usages[0].completion == 5 and end.usages[0].reasoning == 2
    assert end.provenance.request_sha256 == (asked[0].key.hex(),)


def test_calls_are_answered_by_the_broker_and_the_server_gets_its_own_ids_back() -> None:
    text = _arguments(WEATHER)
    calls = [("srv-9", WEATHER.name, text), ("srv-4", WEATHER.name, text)]
    end, asked = _play(_prompt(WEATHER), _body(None, calls, "tool_calls"), _body("It is cold."))
    assert isinstance(end, Accepted)
    assert [turn.origin for turn in end.messages] == ["dataset", "teacher", "broker", "broker", "teacher"]
    assert [call.id for call in end.messages[1].tool_calls] == ["call_0", "call_1"]
    assert [turn.tool_call_id for turn in end.messages[2:4]] == ["call_0", "call_1"]
    sent = asked[1].body["messages"]
    assert (
        [call["id"] for call in sent[1]["tool_calls"]] == ["srv-9", "srv-4"] == [m["tool_call_id"] for m in sent[2:4]]
    )
    assert sent[1]["tool_calls"][0]["function"]["arguments"] == text, "the raw string, not a rewriting of it"
    json.loads(end.messages[2].content)
    assert len(end.provenance.fixture_sha256) == 2 == len(end.provenance.response_sha256)


def test_what_a_server_makes_up_anew_changes_no_key_and_no_turn() -> None:
    ends = []
    for name in ("a", "b"):
        call = [(f"id-{name}", WEATHER.name, _arguments(WEATHER))]
        ends.append(_play(_prompt(WEATHER), _body(None, call, "tool_calls"), _body("Cold.")))
    (one, asked_one), (two, asked_two) = ends
    assert [r.key for r in asked_one] == [r.key for r in asked_two] and one == two._replace(replies=one.replies)


@pytest.mark.parametrize(
    "changed",
    [
        PROTOCOL._replace(seed=4), PROTOCOL._replace(sampling=Sampling(101, 0.7, 0.9)),
        PROTOCOL._replace(identity=Teacher("endpoint", "m", "api", host="other")),
        PROTOCOL._replace(identity=Teacher("endpoint", "other", "api", host="h")),
        PROTOCOL._replace(top_logprobs=5), PROTOCOL._replace(form="completions"),
    ],
)  # fmt: skip
def test_a_key_depends_on_all_that_the_answer_depends_on(changed: Protocol) -> None:
    keys = {advance(episode(_prompt(), protocol, BROKER)).key for protocol in (PROTOCOL, changed)}  # type: ignore[union-attr]
    assert len(keys) == 2
    other = advance(episode(_prompt(text="Another?"), PROTOCOL, BROKER))
    assert isinstance(other, Request) and other.key not in keys


GOOD = _arguments(WEATHER)
MARKED = json.dumps(json.loads(GOOD) | {"city": "Oslo<tool_call>"})
LOST = json.dumps(json.loads(GOOD) | {"city": "Osl\ufffd"})
CALL = [("a", WEATHER.name, GOOD)]


@pytest.mark.parametrize(
    ("reason", "prompt", "answers"),
    [
        ("length", _prompt(), [_body("cut", finish="length")]),
        ("filtered", _prompt(), [_body("", finish="content_filter")]),
        ("finish", _prompt(), [_body("x", finish="error")]),
        ("empty", _prompt(), [_body(" \n")]),
        ("tool_leak", _prompt(), [_body("<|tool_calls_section_begin|> f")]),
        ("tool_leak", _prompt(), [_body('<tool_call>{"name": "f"}</tool_call>')]),
        ("tool_leak", _prompt(), [_body("a <|im_end|> b")]),
        ("tool_leak", _prompt(WEATHER), [_body(None, [("a", WEATHER.name, MARKED)], "tool_calls")]),
        ("lost_bytes", _prompt(), [_body("caf\ufffd")]),
        ("lost_bytes", _prompt(WEATHER), [_body(None, [("a", WEATHER.name, LOST)], "tool_calls")]),
        ("args", _prompt(WEATHER), [_body(None, [("a", WEATHER.name, "{")], "tool_calls")]),
        ("args", _prompt(WEATHER), [_body(None, [("a", WEATHER.name, '{}""')], "tool_calls")]),
        ("args", _prompt(WEATHER), [_body(None, [("a", WEATHER.name, "[1]")], "tool_calls")]),
        ("args", _prompt(WEATHER), [_body(None, [("a", WEATHER.name, json.loads(GOOD))], "tool_calls")]),
        ("finish", _prompt(WEATHER), [_body("Done.", finish="tool_calls")]),
        ("unknown_tool", _prompt(WEATHER), [_body(None, [("a", "rm_rf", "{}")], "tool_calls")]),
        ("unknown_tool", _prompt(), [_body(None, CALL, "tool_calls")]),
        ("schema", _prompt(WEATHER), [_body(None, [("a", WEATHER.name, '{"nonsense": 1}')], "tool_calls")]),
        ("too_many_calls", _prompt(WEATHER), [_body(None, CALL * 17, "tool_calls")]),
        ("no_call", _prompt(WEATHER, expect="call"), [_body("I know: cold.")]),
        ("unexpected_call", _prompt(WEATHER, expect="no_call"), [_body(None, CALL, "tool_calls")]),
        ("too_many_turns", _prompt(WEATHER), [_body(None, CALL, "tool_calls")] * 6),
        ("secret", _prompt(), [_body("use sk-" + "a1B2" * 12)]),
        ("fixture_miss", _prompt(REPLAYED), [_body(None, [("a", "stock", '{"item": "saw"}')], "tool_calls")]),
        ("http", _prompt(), [Answer(b"", Dead("http", "HTTP 400: no"))]),
        ("malformed", _prompt(), [Answer(b"[]")]),
        ("malformed", _prompt(), [Answer(b"", Dead("malformed", "malformed answer: no choices"))]),
        ("unanswered", _prompt(), [Answer(b"", Dead("unanswered", "silent for 3 s"))]),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_refused_by_type(reason: str, prompt: Prompt, answers: list[Answer]) -> None:
    end, _ = _play(prompt, *answers)
    assert isinstance(end, Rejected) and end.reason == reason and reason in REJECTS
    paid = [answer for answer in answers if answer.body.startswith(b"{")]
    assert len(end.usages) == len(paid), "what was paid for is counted, also of a refusal"


def test_every_reason_is_reached_by_a_case() -> None:
    marks = test_what_cannot_be_learned_is_refused_by_type.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in marks[0].args[1]} == set(REJECTS)


def test_an_expected_call_may_be_followed_by_plain_turns() -> None:
    end, _ = _play(_prompt(WEATHER, expect="call"), _body("Let me look.", CALL, "tool_calls"), _body("Cold."))
    assert isinstance(end, Accepted) and end.messages[1].content == "Let me look."


def test_reasoning_is_kept_replayed_and_learned_only_where_asked() -> None:
    thinking = _body(None, CALL, "tool_calls", reasoning_content="I should look.")
    answers = (thinking, _body("Cold.", reasoning_content="It says so."))
    end, asked = _play(_prompt(WEATHER), *answers, protocol=PROTOCOL._replace(replay_reasoning="reasoning_content"))
    assert isinstance(end, Accepted) and not any(turn.reasoning for turn in end.messages)
    assert asked[1].body["messages"][1]["reasoning_content"] == "I should look."
    assert end.replies[-1].reasoning == "It says so."
    end, asked = _play(_prompt(WEATHER), *answers, protocol=PROTOCOL._replace(learn_reasoning=True))
    assert [turn.reasoning for turn in end.messages if turn.origin == "teacher"] == ["I should look.", "It says so."]
    assert "reasoning_content" not in asked[1].body["messages"][1]


def test_our_own_rendering_is_sent_and_read_back_by_our_own_parser() -> None:
    protocol = PROTOCOL._replace(form="completions")
    written = chat.call_text(chat.ToolCall(WEATHER.name, json.loads(GOOD)))
    first = Answer(json.dumps({"choices": [{"text": f"One moment.{written}", "finish_reason": "stop"}]}).encode())
    last = Answer(json.dumps({"choices": [{"text": " Cold.", "finish_reason": "stop"}]}).encode())
    end, asked = _play(_prompt(WEATHER), first, last, protocol=protocol)
    assert isinstance(end, Accepted) and end.messages[1].tool_calls[0].arguments == json.loads(GOOD)
    assert end.messages[-1].content == " Cold.", "bytes are kept"
    rendered = chat.render(end.messages, _prompt(WEATHER).tools)
    assert rendered.startswith(asked[0].body["prompt"]) and rendered.startswith(asked[1].body["prompt"])
    bad = Answer(json.dumps({"choices": [{"text": "<tool_call>{]</tool_call>", "finish_reason": "stop"}]}).encode())
    end, _ = _play(_prompt(WEATHER), bad, protocol=protocol)
    assert isinstance(end, Rejected) and end.reason == "args"


def test_a_replay_stops_at_the_first_unknown_answer() -> None:
    first = _body(None, CALL, "tool_calls")
    end, asked = _play(_prompt(WEATHER), first, _body("Cold."))
    known = {asked[0].key: first}
    step = replay(episode(_prompt(WEATHER), PROTOCOL, BROKER), known.get)
    assert isinstance(step, Request) and step.key == asked[1].key
    known[asked[1].key] = _body("Cold.")
    assert replay(episode(_prompt(WEATHER), PROTOCOL, BROKER), known.get) == end


def test_a_reply_that_was_read_already_is_not_read_again() -> None:
    from distill.data.teacher.wire import read_reply

    body = _body("Cold.").body
    reply = msgspec.structs.replace(read_reply(body), content="Warm.")
    end, _ = _play(_prompt(), Answer(b"never read", reply=reply))
    assert isinstance(end, Accepted) and end.messages[-1].content == "Warm."
