"""The scripted teacher itself: it says the same whatever it is asked through, and its ledger forgets nothing."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

import pytest

from distill.data.teacher.events import StreamReader
from distill.data.teacher.wire import Reply, read_reply
from distill.tools import arguments_problem
from tests.unit import faults, teacher_answers
from tests.unit.fault_teacher import Chaos, FaultTeacher, completion

TOOL = {"name": "weather_forecast", "description": "The weather of a city on some days.", "parameters": {
    "type": "object", "required": ["city", "days"], "additionalProperties": False, "properties": {
        "city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "unit": {"enum": ["C", "F"]},
        "hours": {"type": "array", "items": {"type": "number"}, "minItems": 2}}}}  # fmt: skip


def asked(number: int, **more: Any) -> dict[str, Any]:
    text = f"Question {number}: what is the weather like in Oslo, days and city?"
    return {"model": "stub-1", "messages": [{"role": "user", "content": text}], "seed": number} | more


def post(teacher: FaultTeacher, body: dict[str, Any]) -> tuple[int, bytes]:
    """By urllib, which closes the connection every time; 0 for no answer."""
    request = urllib.request.Request(f"{teacher.url}/v1/chat/completions", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except (OSError, HTTPException):
        return 0, b""


def said(reply: Reply) -> object:
    return reply.content, reply.reasoning, [(c.name, c.arguments) for c in reply.calls], reply.finish, reply.usage


def test_streamed_or_not_the_answer_is_the_same_and_its_ids_are_not() -> None:
    with FaultTeacher() as teacher:
        for number in range(60):
            body = asked(number, tools=[{"type": "function", "function": TOOL}])
            _, plain = post(teacher, body)
            _, again = post(teacher, body)
            reader = StreamReader()
            reader.feed(post(teacher, body | {"stream": True, "stream_options": {"include_usage": True}})[1])
            assert said(read_reply(plain)) == said(read_reply(reader.finish())) == said(read_reply(again))
            assert json.loads(plain)["id"] != json.loads(again)["id"]
        assert set(teacher.quiet().whole.values()) == {3}


def test_most_answers_are_sound_and_every_way_of_breaking_occurs() -> None:
    texts = [teacher_answers.speak(asked(n)) for n in range(600)]
    assert {"stop", "length", "content_filter"} == {t.finish for t in texts}
    assert sum(t.finish == "stop" and "<" not in t.content and bool(t.content.strip()) for t in texts) > 500
    called = [teacher_answers.speak(asked(n, tools=[{"function": TOOL}])) for n in range(600)]
    assert {len(c.calls) for c in called} == {1, 2}
    assert {c.calls[0][0] for c in called} == {TOOL["name"], "no_such_tool"}


def test_its_arguments_are_what_the_schema_admits() -> None:
    from distill.chat import ToolCall

    for number in range(100):
        body = asked(number, tools=[{"function": TOOL}])
        ((name, arguments), *_) = teacher_answers.speak(body, quirks=False).calls
        assert arguments_problem(ToolCall(name, json.loads(arguments)), TOOL) is None


@pytest.mark.parametrize("kind", faults.PASSING)
def test_a_fault_passes_and_is_in_the_ledger(kind: str) -> None:
    with FaultTeacher(faults=[kind], silence=0.1) as teacher:
        post(teacher, asked(1) | {"stream": kind == "stream-twice"})
        for task in teacher.restarts:
            while not task.done():
                pass
        status, body = post(teacher, asked(1))
        assert status == 200 and read_reply(body).content
        ledger = teacher.quiet()
        assert ledger.given == {kind: 1} and len(ledger.arrivals) == 2
        refused = kind in faults.STATUSES or kind.startswith("429") or kind == "reset-before"
        assert len(ledger.served) == (1 if refused else 2)
        assert sum(ledger.whole.values()) == (2 if kind in faults.SOUND else 1)
        assert ledger.tokens == sum(row.prompt + row.completion for row in ledger.served) > 0


def test_chaos_is_drawn_by_the_number_of_the_request() -> None:
    chaos = Chaos(seed=3, share=0.5)
    drawn = [chaos.fault(n) for n in range(400)]
    assert drawn == [chaos.fault(n) for n in range(400)]
    assert 150 < sum(item is not None for item in drawn) < 250


def test_what_max_tokens_cuts_off_says_so() -> None:
    with FaultTeacher() as teacher:
        _, body = post(teacher, asked(1, max_tokens=3))
        reply = read_reply(body)
    assert reply.finish == "length" and reply.usage is not None and reply.usage.completion <= 3
    assert completion(teacher_answers.Spoken("x"), {}, {"prompt_tokens": 1, "completion_tokens": 1}, False)["choices"]
