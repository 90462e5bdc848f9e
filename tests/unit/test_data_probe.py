"""The probe against the habits of each kind of server, as their trackers and references describe them."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.data.teacher.probe import MOST_CALLS, Capabilities, probe
from distill.data.teacher.wire import Exchange
from distill.errors import InputError


class Endpoint:
    """A chat endpoint with the habits given; `asked` holds what it was sent."""

    def __init__(self, *, calls: int = 2, most_logprobs: int = 20, reasoning: str | None = None, streams: bool = True,
                 stream_usage: bool = True, usage: bool = True, refuses: Any = None, drops: Any = None,
                 others: Sequence[dict[str, Any]] = ()) -> None:  # fmt: skip
        self.calls, self.most, self.reasoning, self.streams = calls, most_logprobs, reasoning, streams
        self.stream_usage, self.usage = stream_usage, usage
        self.refuses = refuses or (lambda body: None)
        self.drops = drops or (lambda body: ())
        self.others = list(others)
        self.asked: list[dict[str, Any]] = []
        self.lapses: set[int] = set()
        """Numbers of the answers that lack their usage."""

    async def post(self, body: dict[str, Any], stream: bool) -> Exchange:
        self.asked.append({**body, "stream": stream})
        refusal = self.refuses(self.asked[-1])
        if refusal is None and body.get("top_logprobs", 0) > self.most > 0:
            refusal = f"top_logprobs must be between 0 and {self.most}, inclusive"
        if refusal:
            status, message = refusal if isinstance(refusal, tuple) else (400, refusal)
            return Exchange(status, {}, json.dumps({"error": {"message": message, "code": status}}).encode(), "", True)
        drops = self.drops(self.asked[-1])
        message: dict[str, Any] = {"content": "It rains."}
        if self.reasoning == "content":
            message["content"] = "<think>hm</think>It rains."
        elif self.reasoning:
            message[self.reasoning] = "hm"
        if "tools" in body and "calls" not in drops:
            call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
            message["tool_calls"] = [call] * self.calls
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "stop"}
        if body.get("logprobs") and self.most and "logprobs" not in drops:
            top = [{"token": str(n), "logprob": -float(n)} for n in range(body["top_logprobs"])]
            choice["logprobs"] = {"content": [{"token": "0", "logprob": 0.0, "top_logprobs": top}]}
        answer: dict[str, Any] = {"choices": [*self.others, choice]}
        lapse = len(self.asked) - 1 in self.lapses
        if self.usage and not lapse and (not stream or (self.stream_usage and body.get("stream_options"))):
            answer["usage"] = {"prompt_tokens": 9, "completion_tokens": 5}
        kind = "text/event-stream" if stream and self.streams else "application/json"
        return Exchange(200, {"content-type": kind}, json.dumps(answer).encode(), "", True)


def probed(endpoint: Endpoint) -> Capabilities:
    found = asyncio.run(probe(endpoint.post, "m"))
    assert len(endpoint.asked) <= MOST_CALLS
    assert all(body.get("max_tokens", body.get("max_completion_tokens")) <= 256 for body in endpoint.asked)
    return found


def test_a_server_that_can_everything_is_known_after_two_calls() -> None:
    endpoint = Endpoint(reasoning="reasoning_content")
    assert probed(endpoint) == Capabilities(
        streaming=True, stream_usage=True, tools=True, parallel_calls=True, reasoning_field="reasoning_content",
        top_logprobs=20, logprobs_with_tools=True, logprobs_in_stream=True, usage=True,
    )  # fmt: skip
    assert len(endpoint.asked) == 2 and [body["stream"] for body in endpoint.asked] == [False, True]
    assert "tool_choice" not in endpoint.asked[0]


def test_llama_cpp_refuses_log_probabilities_with_tools_in_a_stream() -> None:
    def refuses(body: dict[str, Any]) -> str | None:
        all_three = body["stream"] and "tools" in body and "logprobs" in body
        return "logprobs is not supported with tools + stream" if all_three else None

    found = probed(Endpoint(refuses=refuses))
    assert found.top_logprobs == 20 and found.logprobs_with_tools and not found.logprobs_in_stream
    assert found.streaming and found.stream_usage and found.tools
    assert any("tools + stream" in words for words in found.refusals.values())


def test_llama_cpp_without_jinja_answers_500_to_tools() -> None:
    found = probed(
        Endpoint(refuses=lambda body: (500, "tools param requires --jinja flag") if "tools" in body else None)
    )
    assert not found.tools and found.top_logprobs == 20 and found.logprobs_in_stream and found.streaming


def test_sglang_loses_log_probabilities_where_tools_are_parsed() -> None:
    found = probed(Endpoint(drops=lambda body: ("logprobs",) if "tools" in body else ()))
    assert found.tools and found.top_logprobs == 20 and not found.logprobs_with_tools


def test_ollama_loses_the_calls_where_log_probabilities_are_asked_for() -> None:
    found = probed(Endpoint(drops=lambda body: ("calls",) if "logprobs" in body else ()))
    assert found.tools and found.top_logprobs == 20 and not found.logprobs_with_tools and found.streaming


def test_vllm_says_how_many_it_allows() -> None:
    def refuses(body: dict[str, Any]) -> str | None:
        if body.get("top_logprobs", 0) > 5:
            return f"Requested sample logprobs of {body['top_logprobs']}, which is greater than max allowed: 5"
        return None

    assert probed(Endpoint(refuses=refuses)).top_logprobs == 5
    assert probed(Endpoint(most_logprobs=8)).top_logprobs == 8


def test_openais_thinking_models_take_another_field_and_give_no_distributions() -> None:
    def refuses(body: dict[str, Any]) -> str | None:
        if "max_tokens" in body:
            return ("Unsupported parameter: 'max_tokens' is not supported with this model. "
                    "Use 'max_completion_tokens' instead.")  # fmt: skip
        if "temperature" in body:
            return "Unsupported value: 'temperature' does not support 0 with this model. Only 1 is supported."
        return "You are not allowed to request logprobs from this model" if "logprobs" in body else None

    found = probed(Endpoint(refuses=refuses))
    assert found.max_tokens_field == "max_completion_tokens" and found.top_logprobs == 0 and found.tools
    assert "temperature 0 is refused" in found.notes
    assert any(line == "distributions: none: text only" for line in found.lines())


def test_a_thinking_api_that_ignores_log_probabilities_is_text_only() -> None:
    found = probed(Endpoint(most_logprobs=0, reasoning="reasoning_content"))
    assert found.top_logprobs == 0 and not found.logprobs_with_tools and found.tools and found.streaming


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "content", None])
def test_the_reasoning_field_is_named(field: str | None) -> None:
    assert probed(Endpoint(reasoning=field)).reasoning_field == field


def test_parallel_calls_streams_and_usage_are_told_apart() -> None:
    assert probed(Endpoint(calls=1)).tools and not probed(Endpoint(calls=1)).parallel_calls
    none = probed(Endpoint(calls=0))
    assert not none.tools and "tools are accepted, but the teacher made no call when asked to" in none.notes
    assert not probed(Endpoint(streams=False)).streaming
    assert not probed(Endpoint(stream_usage=False)).stream_usage
    assert not probed(Endpoint(usage=False)).usage
    refuses = probed(
        Endpoint(refuses=lambda body: "Unknown field stream_options" if "stream_options" in body else None)
    )
    assert refuses.streaming and not refuses.stream_usage
    refuses = probed(Endpoint(refuses=lambda body: "no streaming here" if body["stream"] else None))
    assert not refuses.streaming and refuses.tools and refuses.top_logprobs == 20


def test_an_answer_that_lacks_its_usage_once_is_asked_for_again() -> None:
    """What a header tells of a server must not depend on an accident."""
    sound = Endpoint()
    expected = probed(sound)
    for accident in range(len(sound.asked)):
        endpoint = Endpoint()
        endpoint.lapses = {accident}
        assert probed(endpoint) == expected


def test_a_servers_words_are_shown_but_are_no_fact() -> None:
    numbers = itertools.count()

    def refuses(body: dict[str, Any]) -> str | None:
        return f"no tools here, request {next(numbers)}" if "tools" in body else None

    one, two = probed(Endpoint(refuses=refuses)), probed(Endpoint(refuses=refuses))
    assert one != two and one.facts() == two.facts()
    assert any("request 0" in line for line in one.lines()) and "tools: refused" in one.facts()["notes"]


def test_the_reasoning_field_is_that_of_the_first_choice_by_index() -> None:
    other = {"index": 1, "message": {"content": "no"}, "finish_reason": "stop"}
    assert probed(Endpoint(reasoning="reasoning_content", others=[other])).reasoning_field == "reasoning_content"


@pytest.mark.parametrize("status", [400, 500])
def test_no_usable_answer_at_all_is_an_input_error(status: int) -> None:
    endpoint = Endpoint(refuses=lambda body: (status, "no such model"))
    with pytest.raises(InputError, match=r"no usable answer.*no such model"):
        probed(endpoint)
    assert len(endpoint.asked) <= MOST_CALLS


def test_a_key_that_is_refused_ends_the_probe_at_once() -> None:
    endpoint = Endpoint(refuses=lambda body: (401, "bad key"))
    with pytest.raises(InputError, match="refuses"):
        probed(endpoint)
    assert len(endpoint.asked) == 1


features = ["tools", "logprobs", "stream", "stream_options", "temperature", "max_tokens"]
refusals = st.lists(st.tuples(st.sets(st.sampled_from(features), min_size=1, max_size=3), st.sampled_from(
    [400, 422, 500]), st.sampled_from(["logprobs", "tools", "temperature", "nothing named", "max_completion_tokens",
                                       "logprobs: at most 3", "stream_options"])), max_size=3)  # fmt: skip


@given(refusals, st.sampled_from([0, 5, 20]), st.integers(0, 2))
def test_whatever_a_server_refuses_five_calls_are_enough_and_nothing_is_invented(
    rules: list[tuple[set[str], int, str]], most: int, calls: int
) -> None:
    def refuses(body: dict[str, Any]) -> tuple[int, str] | None:
        present = {name for name in features if body.get(name) not in (None, False)}
        return next(((status, text) for wanted, status, text in rules if wanted <= present), None)

    found = []
    for _ in range(2):
        endpoint = Endpoint(refuses=refuses, most_logprobs=most, calls=calls)
        try:
            found.append(probed(endpoint))
        except InputError:
            assert len(endpoint.asked) <= MOST_CALLS
            return
        tried = [body for body in endpoint.asked if refuses(body) is None]
        assert found[-1].tools <= any("tools" in body and calls for body in tried)
        assert found[-1].top_logprobs <= most
        assert found[-1].streaming <= any(body["stream"] for body in tried)
    assert found[0] == found[1]
    assert msgspec.convert(msgspec.to_builtins(found[0]), Capabilities) == found[0]


def test_what_was_found_is_told_in_plain_lines() -> None:
    for streams, tools, logprobs in itertools.product((True, False), repeat=3):
        found = Capabilities(streaming=streams, tools=tools, top_logprobs=20 * logprobs, notes=("x",))
        lines = found.lines()
        assert len(lines) == 6 and all("\n" not in line and len(line) < 100 for line in lines)
        assert ("distributions: none: text only" in lines) == (not logprobs)
    everything = Capabilities(streaming=True, stream_usage=True, tools=True, parallel_calls=True, usage=True,
                              reasoning_field="reasoning", top_logprobs=20, logprobs_with_tools=True,
                              logprobs_in_stream=True)  # fmt: skip
    assert everything.lines() == [
        "streams: yes, with usage", "tool calls: yes, several at once", "reasoning: in reasoning",
        "distributions: top 20 of a token", "usage: counted by the server",
    ]  # fmt: skip
