"""Students of every family and conversations with tools, for the tests of `distill port`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from distill import chat, checkpoint
from distill.chat import Message, ToolCall
from distill.model import ModelConfig, RopeScaling, Student
from distill.tokenizer import Tokenizer
from tests.unit.port_texts import texts

BASE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512)  # fmt: skip
BIASES = dict(attention_bias=True, output_bias=True, mlp_bias=True)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, wide heads": {"tie_word_embeddings": True, "head_dim": 24},
    "llama, biases": BIASES,
    "llama3 rope": {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 64), "rope_theta": 5e5},
    "linear rope": {"rope_scaling": RopeScaling("linear", 4.0)},
    "yarn rope": {"rope_scaling": RopeScaling("yarn", 4.0, original_max_position_embeddings=64)},
    "yarn rope, own factor": {"rope_scaling": RopeScaling("yarn", 4.0, 1.0, 4.0, 64, 1.3)},
    "qwen2": {"attention_bias": True, "rope_theta": 1e6},
    "qwen3": {"qk_norm": True, "head_dim": 24, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 300, "head_dim": 16},
}
TOOLS = [{"name": "lights", "description": "Switch the lights.", "parameters": {
    "type": "object", "properties": {"state": {"enum": ["on", "off"]}}, "required": ["state"]}}]  # fmt: skip
CALL = Message("assistant", "", (ToolCall("lights", {"state": "off", "rooms": ["kitchen", "Küche"]}),))
CONVERSATIONS: list[tuple[list[Message], list[dict[str, Any]]]] = [
    ([Message("user", "Hello.")], []),
    ([Message("system", "Be brief."), Message("user", "It's 7 < 8 & \"true\".\nWhy?")], []),
    ([Message("user", "Lights off, please.")], TOOLS),
    ([Message("system", "You help."), Message("user", "Lights off."), CALL, Message("tool", '{"ok": true}')], TOOLS),
    ([Message("user", "Why?"), Message("assistant", "So.", (), "Let me see."), Message("user", "Oh, 123.")], []),
]  # fmt: skip


def student(family: str, tokenizer: Tokenizer, *, rows: int = 0) -> Student:
    """A random one; biases and norms too, and larger weights than at birth, so that every part counts."""
    config = ModelConfig(vocab_size=rows or tokenizer.vocab_size + 6, **BASE | FAMILIES[family])
    made = Student(config).init_weights(0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim < 2:
                parameter.normal_(float("norm" in name), 0.3, generator=generator)
            else:
                parameter.mul_(2.0)
    return made


def saved(made: Student, tokenizer: Tokenizer, path: Path, **facts: Any) -> Path:
    """Its checkpoint."""
    return checkpoint.save(path, made, tokenizer, step=1, loss=1.0, stage="toy", **facts)


def prompt_ids(tokenizer: Tokenizer, conversation: tuple[list[Message], list[dict[str, Any]]]) -> list[int]:
    """What the student is fed."""
    return chat.encode(tokenizer, *conversation, add_generation_prompt=True).ids


def as_requests(messages: list[Message], *, spelt: bool = False) -> list[dict[str, Any]]:
    """Messages as chat templates and servers take them; `spelt`: arguments as a string, as OpenAI's API has them."""
    out = []
    for message in messages:
        calls = [
            {"id": "call_0", "type": "function", "function": {
                "name": c.name,
                "arguments": json.dumps(c.arguments, ensure_ascii=False) if spelt else c.arguments}}
            for c in message.tool_calls
        ]  # fmt: skip
        plain: dict[str, Any] = {"role": message.role, "content": message.content}
        plain |= {"tool_calls": calls} if calls else {}
        out.append(plain | ({"reasoning_content": message.reasoning} if message.reasoning else {}))
    return out


def as_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools as OpenAI's API has them."""
    return [{"type": "function", "function": tool} for tool in tools]


class Divergence(Exception):
    """Greedy tokens that differ where it is no tie."""


@torch.no_grad()
def require_same_tokens(made: Student, prompt: list[int], found: list[int], tie: float) -> int:
    """How many tokens of a greedy continuation were compared, until a tie within `tie`; Divergence where they differ
    elsewhere."""
    logits = made(torch.tensor([prompt + found]))[0, len(prompt) - 1 : -1].float()
    for index, token in enumerate(found):
        best = float(logits[index].max())
        margin = best - float(logits[index, token])
        if margin > tie:
            raise Divergence(f"token {index}: {token} is {margin:.4f} below the student's best")
        if int(logits[index].argmax()) != token:
            return index
    return len(found)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _by_expression(expression: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(expression), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


PRE: dict[str, tuple[list[Any], bool]] = {
    "gpt-2": ([pre_tokenizers.ByteLevel(add_prefix_space=False)], False),
    "smollm": ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)], False),
    "llama-bpe": (_by_expression(LLAMA3), True),
    "smaug-bpe": (_by_expression(LLAMA3), False),
    "qwen2": (_by_expression(LLAMA3.replace("{1,3}", "")), False),
}
"""By llama.cpp's name: the steps of the pre-tokenizer, as the models' own tokenizer.json have them; ignore_merges."""


@cache
def trained_tokenizer(kind: str) -> Tokenizer:
    """A small byte-level tokenizer of that kind, trained on the texts that the tests then tokenise."""
    steps, skips = PRE[kind]
    inner = tokenizers.Tokenizer(models.BPE(ignore_merges=skips))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        inner.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    inner.train_from_iterator(texts() * 2, trainer)
    inner.add_tokens([AddedToken(token, normalized=False) for token in ("<tool_call>", "</tool_call>")])
    return Tokenizer(inner, f"{kind} tokenizer")
