"""How a prompt is cut into calls, and what a generator's contract may say."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from distill.contract import Contract, Function, TensorSpec, parse_contract
from distill.errors import InputError
from distill.model import ModelConfig
from distill.verify.runner import Cut, cut

SIZES = {"decode": 1, "prefill_8": 8, "prefill_32": 32}


@pytest.mark.parametrize(
    ("first", "count", "context", "expected"),
    [
        (0, 1, 64, ["decode"]),
        (0, 8, 64, ["prefill_8"]),
        (0, 5, 64, ["prefill_8"]),
        (0, 40, 64, ["prefill_32", "prefill_8"]),
        (0, 41, 64, ["prefill_32", "prefill_8", "decode"]),
        (0, 45, 64, ["prefill_32", "prefill_8", "prefill_8"]),
        (0, 64, 64, ["prefill_32", "prefill_32"]),
        (40, 24, 64, ["prefill_8"] * 3),
        (58, 5, 64, ["decode"] * 5),
        (57, 7, 64, ["decode"] * 7),
        (56, 7, 64, ["prefill_8"]),
        (10, 0, 64, []),
    ],
)
def test_tokens_are_cut_into_the_longest_chunks_that_fit(
    first: int, count: int, context: int, expected: list[str]
) -> None:
    assert [part.function for part in cut(first, count, context, SIZES)] == expected


def test_every_cutting_feeds_each_token_once_and_stays_inside_the_context() -> None:
    context = 50
    for first in range(context):
        for count in range(context - first + 1):
            at = first
            for function, tokens in cut(first, count, context, SIZES):
                assert 0 < tokens <= SIZES[function] and at + SIZES[function] <= context
                at += tokens
            assert at == first + count


def test_a_decode_package_is_fed_one_by_one() -> None:
    assert cut(3, 4, 64, {"main": 1}) == [Cut("main", 1)] * 4


MODEL = ModelConfig(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
                    num_key_value_heads=2)  # fmt: skip


def _function(tokens: int) -> Function:
    return Function(
        [TensorSpec("input_ids", [1, tokens], "int32"), TensorSpec("position", [1], "int32")],
        [TensorSpec("logits", [1, tokens, 97], "float16")],
        [TensorSpec("kv", [4, 2, 64, 8], "float16")],
    )


def _generator() -> dict[str, Any]:
    decode = _function(1)
    contract = Contract(
        schema="distill-package/1", name="x", mode="generator", file=None, inputs=decode.inputs,
        outputs=decode.outputs, states=decode.states, enumerated_T=[64], shape_validation={}, model_config=MODEL,
        kv_layout=None, rope="", mask="", tokenizer_sha256="", chat_template_sha256="", weights_sha256="",
        fp16_gain=1.0, sidecar={}, probes={}, made_by={}, versions={},
        functions={"decode": decode, "prefill_8": _function(8)},
    )  # fmt: skip
    data: dict[str, Any] = msgspec.to_builtins(contract)
    return data


def test_a_generator_s_contract_survives_json() -> None:
    read = parse_contract(msgspec.json.decode(msgspec.json.encode(_generator())), "x")
    assert {name: function.tokens() for name, function in read.functions.items()} == {"decode": 1, "prefill_8": 8}
    assert read.sequence() == 1


def test_an_older_contract_without_functions_is_read() -> None:
    data = _generator() | {"mode": "decode"}
    del data["functions"]
    assert parse_contract(data, "x").functions == {}


def _renamed(functions: dict[str, Any]) -> None:
    functions["prefill_9"] = functions.pop("prefill_8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("decode"), "one of them is decode"),
        (lambda f: f.clear(), "one of them is decode"),
        (_renamed, "prefill_9 takes 8 tokens"),
        (lambda f: f["prefill_8"]["outputs"][0].update(shape=[1, 4, 97]), "outputs of function prefill_8"),
        (lambda f: f["prefill_8"]["states"][0].update(shape=[4, 2, 32, 8]), "states of function prefill_8"),
        (lambda f: f["prefill_8"].update(states=[]), "states of function prefill_8"),
        (lambda f: f["prefill_8"].update(inputs=[]), "prefill_8 takes 0 tokens"),
        (lambda f: f["prefill_8"]["inputs"][1].update(dtype="int64"), "inputs of function prefill_8"),
        (lambda f: f["prefill_8"].update(more=1), "more"),
    ],
)  # fmt: skip
def test_functions_that_do_not_belong_together_are_refused(change: Any, message: str) -> None:
    data = _generator()
    change(data["functions"])
    with pytest.raises(InputError, match=message):
        parse_contract(data, "x")
