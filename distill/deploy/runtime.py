"""runtime_config.json: what a runner must know to feed the package, derived from its contract and tokenizer alone.

`distill deploy verify` derives it again and compares the bytes, so no number in it can differ from the package's.
"""

from __future__ import annotations

from typing import Any

import msgspec

from distill import chat
from distill.contract import SIDECAR_NAMES, Contract, TensorSpec
from distill.deploy.config import Sampling
from distill.errors import InputError
from distill.tokenizer import CALL_END, CALL_START, TURN_END, TURN_START, Tokenizer

RUNTIME = "runtime_config.json"
DECODE = "decode"
"""The function of one token."""
PADDING = (
    "A prompt goes through the functions from its first token on: the longest chunk that the rest fills, again and "
    "again; a rest that fills none goes into the shortest chunk, filled up with pad_id behind its last true token. "
    "What is computed there counts for nothing, and the next call, at the position behind the last true token, "
    "overwrites it. position + tokens must not exceed the context: near its end tokens go one by one."
)


def runtime_config(contract: Contract, package: str, tokenizer: Tokenizer, sampling: Sampling) -> dict[str, Any]:
    """Names, shapes, types, limits, stop tokens, sampling and the form of tool calls, as plain JSON values.

    InputError for a package that does not generate.
    """
    if contract.mode != "generator" or len(contract.states) != 1:
        raise InputError(f"{package}: is a {contract.mode} package; a bundle holds one that distill package makes")
    functions = {name: _interface(f.inputs, f.outputs) for name, f in contract.functions.items()}
    context = contract.states[0].shape[2]
    return {
        "schema": "distill-runtime/1",
        "package": package,
        "functions": functions,
        "decode_function": DECODE,
        "state": {**_tensor(contract.states[0]), "layout": contract.kv_layout, "starts_as": "zeros"},
        "context": context,
        "prefill": {
            "chunk_lengths": sorted(f.tokens() for f in contract.functions.values() if f.tokens() > 1),
            "padding": PADDING,
        },
        "position": "of the first token of the call, from 0",
        "mask": f"in the graph: {contract.mask}",
        "rope": f"in the graph: {contract.rope}",
        "limits": {
            "max_prompt_tokens": context - 1,
            "at_the_end_of_the_context": "stop: the state holds no further token",
        },
        "sampling": msgspec.to_builtins(sampling) | {"max_new_tokens": min(sampling.max_new_tokens, context - 1)},
        "tokenizer": {
            "file": SIDECAR_NAMES["tokenizer"],
            "sha256": contract.tokenizer_sha256,
            "vocab_size": tokenizer.vocab_size,
            "logits": contract.outputs[0].shape[-1],
            "add_special_tokens": False,
            "pad_id": tokenizer.pad,
            "stop_ids": sorted(tokenizer.stop_ids),
        },
        "chat_template": {
            "file": SIDECAR_NAMES["chat_template"],
            "sha256": contract.chat_template_sha256,
            "turn_start": TURN_START,
            "turn_end": TURN_END,
            "roles": list(chat.ROLES),
        },
        "tool_calls": {
            "start": CALL_START,
            "end": CALL_END,
            "body": "one JSON object: name (text) and arguments (an object); no other key",
            "example": chat.call_text(chat.ToolCall("name", {"argument": "value"})),
            "result_role": "tool",
        },
    }


def _interface(inputs: list[TensorSpec], outputs: list[TensorSpec]) -> dict[str, Any]:
    return {
        "tokens": inputs[0].shape[-1],
        "inputs": [_tensor(spec) for spec in inputs],
        "outputs": [_tensor(spec) for spec in outputs],
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}
