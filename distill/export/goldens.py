"""Golden inputs with their outputs, and what greedy decoding says: the witness that travels with an export.

`logits` come from the training model in fp32. `logits_half` come from the twin with every constant rounded to fp16,
still computed in fp32: what the package must reproduce, to fp32 rounding, when its arithmetic is not rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from distill import chat
from distill.artifacts import atomic_file
from distill.export.tolerance import fp16_sigma, tolerance_factor
from distill.export.twin import CachedTwin, PrefillTwin, round_to_half
from distill.model import Student
from distill.tokenizer import Tokenizer
from distill.tools import EvalItem

_VALUES = 1 << 21
"""Budget of logits kept per golden: 8 MiB in fp32."""
DECODE_STEPS = 24
FAR_STEPS = 8
"""Decode steps over a context full of random keys and values, up to its last position."""
_SEED = 20261123


class Reference(NamedTuple):
    """The trained model that a package is measured against."""

    student: Student
    tokenizer: Tokenizer
    gain: float
    """distill.export.tolerance.fp16_gain of the student."""


class Greedy(NamedTuple):
    """Greedy continuation of a prompt and how sure the model was of each token."""

    tokens: list[int]
    margins: list[float]
    """Best logit minus second best, at each token (the stop token's included)."""
    tolerance: list[float]
    """Derived fp16 error of the logits there."""


@torch.no_grad()
def greedy(reference: Reference, prompt_ids: list[int], max_new_tokens: int) -> Greedy:
    """Greedy decoding with the training model; tokens end with the stop token where one came."""
    student, tokenizer, gain = reference
    tokens = student.generate(prompt_ids, max_new_tokens, tokenizer.stop_ids)
    ids = torch.tensor([prompt_ids + tokens])
    hidden = student.hidden(ids)[0, len(prompt_ids) - 1 :]
    logits = student.lm_head(hidden)
    if len(tokens) < max_new_tokens:
        tokens.append(int(logits[-1].argmax()))
    n = len(tokens)
    best = logits[:n].float().topk(2, dim=-1).values
    sigma = fp16_sigma(student, hidden[:n], gain)[:, 0] * tolerance_factor(student.config.vocab_size)
    return Greedy(tokens, (best[:, 0] - best[:, 1]).tolist(), sigma.tolist())


def evaluation(reference: Reference, items: Sequence[EvalItem], seq: int) -> dict[str, Any]:
    """The evaluation sidecar: prompts, targets and PyTorch's greedy tokens, for every item that fits `seq` tokens."""
    rows: list[dict[str, Any]] = []
    too_long = 0
    for item in items:
        prompt_ids = chat.encode(reference.tokenizer, item.messages, item.tools, add_generation_prompt=True).ids
        room = min(item.max_new_tokens, seq - len(prompt_ids))
        if room < item.min_room:
            too_long += 1
            continue
        found = greedy(reference, prompt_ids, room)
        rows.append(
            {
                "id": item.id,
                "prompt_ids": prompt_ids,
                "max_new_tokens": room,
                "gold_calls": None
                if item.gold_calls is None
                else [{"name": call.name, "arguments": call.arguments} for call in item.gold_calls],
                "gold_text": item.gold_text,
                "greedy": found._asdict(),
            }
        )
    return {"schema": "distill-evaluation/1", "items": rows, "too_long": too_long}


def golden_positions(mode: str, longest: int, vocab_size: int) -> int:
    """How many positions the goldens hold: the verification wants no fewer."""
    if mode == "decode":
        return min(DECODE_STEPS, longest)
    return max(2, min(longest, _VALUES // (2 * vocab_size)))


@torch.no_grad()
def prefill_goldens(reference: Reference, seq: int, prompt_ids: list[int]) -> dict[str, Tensor]:
    """Two golden inputs (the prompt, padded, and seeded random ids) with logits at spread positions."""
    student, tokenizer, gain = reference
    generator = torch.Generator().manual_seed(seq)
    ids = torch.full((2, seq), tokenizer.pad, dtype=torch.int32)
    kept = prompt_ids[:seq]
    ids[0, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    ids[1] = torch.randint(0, tokenizer.vocab_size, (seq,), generator=generator, dtype=torch.int32)
    count = golden_positions("prefill", seq, student.config.vocab_size)
    positions = torch.linspace(0, seq - 1, count).round().int().unique()
    hidden = student.hidden(ids.long())[:, positions]
    half = round_to_half(PrefillTwin(student, seq, copy=True))
    recorder = ProbeRecorder(half)
    logits_half = torch.stack([half(row[None])[0, positions] for row in ids])
    return {
        "input_ids": ids,
        "positions": positions,
        "logits": student.lm_head(hidden).float(),
        "logits_half": logits_half,
        "fp16_sigma": fp16_sigma(student, hidden, gain),
        "embed_check": embedding_check(half.embed.weight),
    } | {f"probe.{name}": value[..., positions] for name, value in recorder.values.items() if is_point(name)}


@torch.no_grad()
def decode_goldens(reference: Reference, context: int, prompt_ids: list[int]) -> dict[str, Tensor]:
    """One teacher-forced sequence fed token by token, logits at every step, and the state at the end.

    Then single steps far into the context, each over a state of random keys and values (`random_state`), those after
    it included: they reach the tables and the mask where no prompt does, and what a step may not see is not zero.
    """
    student, tokenizer, gain = reference
    generator = torch.Generator().manual_seed(context)
    n = golden_positions("decode", context, student.config.vocab_size)
    ids = torch.randint(0, tokenizer.vocab_size, (n,), generator=generator, dtype=torch.int32)
    kept = prompt_ids[: n // 2]
    ids[: len(kept)] = torch.tensor(kept, dtype=torch.int32)
    hidden = student.hidden(ids.long()[None])[0]
    half = round_to_half(CachedTwin(student, context, copy=True))
    steps = [half(ids[i].view(1, 1), torch.tensor([i], dtype=torch.int32))[0] for i in range(n)]
    return {
        "input_ids": ids[None],
        "positions": torch.arange(n, dtype=torch.int32),
        "logits": student.lm_head(hidden).float()[None],
        "logits_half": torch.cat(steps)[None],
        "fp16_sigma": fp16_sigma(student, hidden, gain)[None],
        "kv": half.kv[:, :, :n].clone(),
        "embed_check": embedding_check(half.embed.weight),
    } | _far_steps(half, context, n)


def _far_steps(half: CachedTwin, context: int, near: int) -> dict[str, Tensor]:
    positions = torch.linspace(min(near, context - 1), context - 1, FAR_STEPS).round().int().unique()
    ids = torch.arange(len(positions), dtype=torch.int32) % half.config.vocab_size
    filled = torch.from_numpy(random_state(tuple(half.kv.shape)))
    logits, rows = [], []
    for token, position in zip(ids, positions, strict=True):
        half.kv.copy_(filled)
        logits.append(half(token.view(1, 1), position.view(1))[0, 0])
        rows.append(half.kv[:, :, int(position)].clone())
    return {
        "far_ids": ids,
        "far_positions": positions,
        "far_logits_half": torch.stack(logits),
        "far_kv": torch.stack(rows),
    }


def random_state(shape: tuple[int, ...]) -> np.ndarray:
    """Seeded normal keys and values, exact in fp16, in fp32: the same here and in the verification."""
    values = np.random.default_rng(_SEED).standard_normal(shape, dtype=np.float32)
    return values.astype(np.float16).astype(np.float32)


def embedding_check(embedding_VD: Tensor) -> Tensor:
    """Each row of the embedding times one seeded random vector, [V]: says whether any row is another.

    Prompts read few rows; this reads all.
    """
    direction = np.random.default_rng(_SEED).standard_normal(embedding_VD.shape[1])
    return (embedding_VD.detach().double() @ torch.from_numpy(direction)).float()


class ProbeRecorder:
    """Keeps the output of every submodule of a twin at its first call, by module path."""

    def __init__(self, twin: nn.Module) -> None:
        self.values: dict[str, Tensor] = {}
        for name, module in twin.named_modules():
            if name:
                module.register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, _module: nn.Module, _inputs: object, out: Tensor) -> None:
        self.values.setdefault(name, out.detach())  # returns None: a hook's value would replace the output


def is_point(name: str) -> bool:
    """The named points of the contract: each block's output and the final norm."""
    return name == "final_norm" or (name.startswith("block_") and "." not in name)


def write_goldens(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Write goldens as safetensors, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(save({name: value.contiguous() for name, value in tensors.items()}))
    return path
