"""A model in `transformers` as a transport: batches, seeds, refusals, memory, stopping; on a tiny random Llama."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import pytest

from distill.data.schema import Teacher
from distill.data.teacher.hf_transport import Completion, HfTransport, WhiteBox, sample
from distill.data.teacher.transport import Exchange
from distill.tokenizer import TURN_END, toy_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IDENTITY = Teacher("hf", "tiny", text_engine="transformers")


class Counted(transformers.LlamaForCausalLM):
    """Remembers the size of every batch; as if memory were short, refuses those above `most`."""

    most, broken = 1000, False

    def generate(self, ids_BT: Any, **more: Any) -> Any:
        self.batches = [*getattr(self, "batches", []), len(ids_BT)]
        if self.broken:
            raise RuntimeError("expected scalar type Half but found Float")
        if len(ids_BT) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().generate(ids_BT, **more)


@pytest.fixture
def box() -> WhiteBox:
    tokenizer = toy_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size + 27, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=96,
    )  # fmt: skip
    model = Counted(config).eval()
    model.lm_head.weight.data *= 30  # sharp enough to be worth sampling from
    model.generation_config.repetition_penalty = 50.0  # as some folders bring one
    return WhiteBox(model, tokenizer, "cpu")


def body(i: int, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "What is " + "one and " * (i % 5) + "one?", "max_tokens": 12, "temperature": 0.8,
            "top_p": 0.9, "seed": 100 + i, "stop": [TURN_END]} | more  # fmt: skip


def ask(box: WhiteBox, bodies: Sequence[dict[str, Any]], *, batch: int = 4) -> list[Exchange]:
    async def run() -> list[Exchange]:
        transport = HfTransport(box, IDENTITY, batch=batch)
        out = await asyncio.gather(*map(transport.post, bodies))
        await transport.close()
        return list(out)

    return asyncio.run(run())


def texts(exchanges: Sequence[Exchange]) -> list[str]:
    assert {exchange.status for exchange in exchanges} == {200}
    return [json.loads(exchange.body)["choices"][0]["text"] for exchange in exchanges]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_does_not_depend_on_the_requests_beside_it(box: WhiteBox, temperature: float) -> None:
    bodies = [body(i, temperature=temperature) for i in range(9)]
    alone = texts(ask(box, bodies, batch=1))
    assert texts(ask(box, bodies, batch=9)) == alone
    assert texts(ask(box, bodies[::-1], batch=4))[::-1] == alone
    assert len(set(alone)) >= 3


def test_each_request_keeps_its_own_seed_temperature_and_length_within_a_batch(box: WhiteBox) -> None:
    mixed = [body(0), body(0, seed=5), body(0, temperature=0.0), body(0, max_tokens=3), body(0, top_p=0.1)]
    assert texts(ask(box, mixed, batch=5)) == texts(ask(box, mixed, batch=1))
    first, other, _, short, _ = texts(ask(box, mixed))
    assert first != other and first.startswith(short) and len(short) < len(first)


def test_waiting_requests_form_the_next_batch(box: WhiteBox) -> None:
    texts(ask(box, [body(i) for i in range(9)], batch=4))
    assert box.model.batches == [4, 4, 1]


def test_a_greedy_answer_is_that_of_transformers_itself(box: WhiteBox) -> None:
    [text] = texts(ask(box, [body(1, temperature=0.0)]))
    ids = torch.tensor([box.tokenizer.encode(body(1)["prompt"])])
    out: list[int] = []
    while len(out) < 12:
        with torch.no_grad():
            row = box.model(torch.cat([ids, torch.tensor([out], dtype=torch.long)], 1)).logits[0, -1]
        token = int(row[: box.tokenizer.vocab_size].argmax())
        if token in box.tokenizer.stop_ids:
            break
        out.append(token)
    assert text == box.tokenizer.decode(out)


def test_usage_and_finish_reason_are_counted_as_servers_count_them(box: WhiteBox) -> None:
    prompt = box.tokenizer.encode("What is one?")
    row = [json.loads(x.body) for x in ask(box, [body(0, max_tokens=80), body(0, max_tokens=2, prompt=prompt)])]
    assert row[1]["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 2, "total_tokens": len(prompt) + 2}
    assert row[1]["choices"][0]["finish_reason"] == "length"
    stop = int(torch.argmax(box.model.lm_head.weight.norm(dim=1)))
    box.model.lm_head.weight.data[box.tokenizer.turn_end] = 3 * box.model.lm_head.weight.data[stop]
    ended = [json.loads(x.body) for x in ask(box, [body(i, max_tokens=60) for i in range(4)])]
    for answer in ended:
        tokens = len(box.tokenizer.encode(answer["choices"][0]["text"]))
        if answer["choices"][0]["finish_reason"] == "stop":
            assert answer["usage"]["completion_tokens"] >= min(tokens, 1)
    assert any(answer["choices"][0]["finish_reason"] == "stop" for answer in ended)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"prompt": "one " * 200}, "the model reads 96"),
        ({"prompt": ""}, "empty"),
        ({"prompt": [5, 10**6]}, "vocabulary"),
        ({"stop": ["and then"]}, "not one token"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"logprobs": 5}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_cannot_be_asked_is_refused_as_a_server_refuses_it(
    box: WhiteBox, wrong: dict[str, Any], named: str
) -> None:
    [exchange] = ask(box, [body(0, **wrong)])
    assert exchange.status == 400 and named in json.loads(exchange.body)["error"]["message"]


def test_an_answer_ends_where_the_model_does(box: WhiteBox) -> None:
    prompt = box.tokenizer.encode("one " * 90)[:90]
    [exchange] = ask(box, [body(0, prompt=prompt, max_tokens=50, temperature=1.5, top_p=1.0)])
    answer = json.loads(exchange.body)
    assert answer["usage"]["total_tokens"] <= 96 and answer["choices"][0]["finish_reason"] == "length"


def test_where_memory_is_short_batches_get_smaller_and_answers_stay(box: WhiteBox) -> None:
    bodies = [body(i) for i in range(10)]
    expected = texts(ask(box, bodies))
    box.model.most, box.model.batches = 2, []
    assert texts(ask(box, bodies, batch=8)) == expected
    assert box.model.batches == [8, 4, 2, 2, 4, 2, 2, 2]


def test_a_request_that_does_not_fit_alone_is_refused_for_good(box: WhiteBox) -> None:
    box.model.most = 0
    exchanges = ask(box, [body(0), body(1)])
    assert [exchange.status for exchange in exchanges] == [413, 413] and b"out of memory" in exchanges[0].body


def test_a_failure_of_the_model_is_a_problem_not_an_exception(box: WhiteBox) -> None:
    box.model.broken = True
    [exchange] = ask(box, [body(0)])
    assert exchange.status == 0 and "scalar type" in exchange.problem and exchange.sent


def test_closing_stops_at_the_next_token_and_tells_those_who_wait(box: WhiteBox) -> None:
    class Slow(type(box.model)):  # type: ignore[misc]
        def forward(self, *args: Any, **more: Any) -> Any:
            time.sleep(0.05)
            return super().forward(*args, **more)

    box.model.__class__ = Slow

    async def run() -> tuple[list[Any], float]:
        transport = HfTransport(box, IDENTITY, batch=2)
        asking = [asyncio.ensure_future(transport.post(body(i, max_tokens=60, top_p=1.0))) for i in range(5)]
        await asyncio.sleep(0.3)
        began = time.monotonic()
        await transport.close()
        late = await transport.post(body(9))
        return [*await asyncio.gather(*asking), late], time.monotonic() - began

    exchanges, seconds = asyncio.run(run())
    assert seconds < 1 and {exchange.status for exchange in exchanges} == {0}
    assert [exchange.sent for exchange in exchanges] == [True, True, False, False, False, False]


def test_a_request_that_was_cancelled_leaves_the_others_alone(box: WhiteBox) -> None:
    async def run() -> list[Any]:
        transport = HfTransport(box, IDENTITY, batch=2)
        asking = [asyncio.ensure_future(transport.post(body(i))) for i in range(4)]
        await asyncio.sleep(0.01)
        asking[0].cancel()
        asking[3].cancel()
        out = await asyncio.gather(*asking, return_exceptions=True)
        await transport.close()
        return list(out)

    out = asyncio.run(run())
    assert isinstance(out[0], asyncio.CancelledError) and isinstance(out[3], asyncio.CancelledError)
    assert texts(out[1:3]) == texts(ask(box, [body(1), body(2)]))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 0.5), (0.3, 1.0)])
def test_evenly_spaced_draws_give_each_token_as_often_as_transformers_own_sampler(
    temperature: float, top_p: float
) -> None:
    torch.manual_seed(1)
    logits_1V = torch.randn(1, 40) * 2
    warped_1V = transformers.TemperatureLogitsWarper(temperature)(None, logits_1V.double())
    expected_V = transformers.TopPLogitsWarper(top_p)(None, warped_1V).softmax(-1)[0]
    n = 4000
    bodies = [Completion("", 1, temperature=temperature, top_p=top_p)] * n
    drawn = sample(logits_1V.expand(n, -1), bodies, [(i + 0.5) / n for i in range(n)])
    counts_V = torch.bincount(drawn, minlength=40)
    assert torch.all((counts_V - n * expected_V).abs() <= 1.01)


def test_ties_at_the_edge_of_the_nucleus_and_extreme_logits_still_give_a_token() -> None:
    rows = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e4, -1e4, 0.0, 0.0], [-torch.inf, 3.0, -torch.inf, -torch.inf]])
    for draw in (0.0, 0.25, 0.999999999):
        for top_p in (1e-9, 0.5, 1.0):
            drawn = sample(rows, [Completion("", 1, temperature=0.01, top_p=top_p)] * 3, [draw] * 3)
            assert 0 <= drawn[0] < 4 and drawn[1:].tolist() == [0, 1]
