"""The golden conversation of a generator: one sequence of tokens, and what PyTorch makes of it.

A prompt, and the training model's greedy continuation of it. However a package cuts these tokens into calls, it must
find the same logits, keys and values at every one of them. They are kept at some rows and vocabulary entries only, keys
and values as products with seeded random directions: a wrong vector has the right products by an unlikely chance.

`logits`, `kv` come from the training model in fp32; `logits_half`, `kv_half` from the twin with every constant rounded
to fp16, still computed in fp32: what the package must reproduce when its arithmetic is not rounded.

Shapes: n tokens, P of them prompt, R rows, M entries of the vocabulary, Q directions; L, K, C, N, D as in twin.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.export.goldens import ProbeRecorder, Reference, embedding_check, is_point, random_state
from distill.export.tolerance import fp16_sigma, relative_error
from distill.export.twin import CachedTwin, round_to_half
from distill.model import LayerCache, Student

STEPS = 128
"""Greedy tokens after the prompt, where the context has room for them."""
_COLUMNS = 1024
_DIRECTIONS = 2
_SEED = 20261124
_ROWS = 24
"""Of the prompt; the rows of the greedy tokens are all kept."""
FAR = 3
"""Positions of each function, up to its last one, tried over a state full of random keys and values."""


def alone(seq: int, n: int) -> list[int]:
    """Where a function of `seq` tokens is called to judge it alone; the second call overlaps where n < 2 seq."""
    if seq == 1:
        return list(range(min(_ROWS, n)))
    return [0] if n <= seq else [0, min(seq, n - seq)]


def prompt_length(context: int, chunks: Sequence[int]) -> int:
    """Enough for two of the longest chunks and a rest that fills none, if the greedy tokens leave room for it."""
    most = max(context - STEPS, context // 2)
    wanted = min(most, 2 * max(chunks) + min(chunks) // 2 + 1)
    return max(1, wanted - 1 if wanted % min(chunks) == 0 else wanted)


@torch.no_grad()
def conversation(
    reference: Reference, context: int, chunks: Mapping[str, int], material: list[int]
) -> dict[str, Tensor]:
    """The goldens. `chunks`: tokens of each prefill function; `material`: text whose end is the prompt."""
    student, tokenizer, gain = reference
    p = prompt_length(context, list(chunks.values()))
    generator = torch.Generator().manual_seed(context)
    filled = torch.randint(0, tokenizer.vocab_size, (p,), generator=generator).tolist()
    prompt = (filled + material)[-p:]
    tokens = student.generate(prompt, min(STEPS, context - p), set())
    ids = torch.tensor([prompt + tokens])
    n, columns = ids.shape[1], kept_columns(student.config.vocab_size)
    rows = kept_rows(p, n, list(chunks.values()))
    cache: list[LayerCache] = []
    inputs = _AttentionInputs(student)
    hidden = student.hidden(ids, cache=cache)[0]
    inputs.remove()
    greedy_logits = student.lm_head(hidden[p - 1 :]).float()
    best = greedy_logits.topk(2, dim=-1)
    sigma = fp16_sigma(student, hidden, gain)
    kv = torch.stack([part[0] for layer in cache for part in layer])  # (2L,K,n,N)
    last = student.hidden(torch.tensor([repeated(ids[0].tolist(), context)]))[0, -1:]
    following = [*tokens, int(best.indices[-1, 0])]
    return {
        "input_ids": ids.int(),
        "prompt": torch.tensor([p], dtype=torch.int32),
        "columns": columns,
        "rows": rows,
        "logits": student.lm_head(hidden[rows]).float()[:, columns],
        "fp16_sigma": sigma[rows],
        "greedy": torch.tensor(following, dtype=torch.int32),
        "margins": best.values[:, 0] - best.values[:, 1],
        "kv": kv @ directions(student.config.head_dim).T,
        "kv_sigma": inputs.sigma(kv, gain),
        "end.logits": student.lm_head(last).float()[:, columns],
        "end.fp16_sigma": fp16_sigma(student, last, gain),
    } | _of_twin(student, context, chunks, ids.int(), rows, columns)


def repeated(ids: list[int], context: int) -> list[int]:
    """The conversation again and again, up to the end of the context."""
    return (ids * (context // len(ids) + 1))[:context]


def directions(width: int) -> Tensor:
    """Unit vectors [Q, N] that keys and values are multiplied with."""
    drawn = np.random.default_rng(_SEED).standard_normal((_DIRECTIONS, width))
    return torch.from_numpy(drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).float()


def kept_columns(vocab: int) -> Tensor:
    return torch.linspace(0, vocab - 1, min(_COLUMNS, vocab)).round().int().unique()


def kept_rows(p: int, n: int, chunks: list[int]) -> Tensor:
    """Where logits are kept: spread over the prompt, on both sides of every function's borders, and the greedy rows."""
    kept = (
        set(range(min(_ROWS, n))) | set(torch.linspace(0, p - 1, _ROWS).round().int().tolist()) | set(range(p - 1, n))
    )
    for seq in chunks:
        for first in alone(seq, n):
            kept |= {first, first + 1, first + seq - 2, first + seq - 1}
    return torch.tensor(sorted(row for row in kept if 0 <= row < n), dtype=torch.int32)


class _AttentionInputs:
    """Norms of what enters each block's attention, and of its keys before their own norm."""

    def __init__(self, student: Student) -> None:
        self.student = student
        self.entering: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.handles = []
        for block in student.model.layers:
            self.handles.append(block.input_layernorm.register_forward_hook(self._keep(self.entering)))
            self.handles.append(block.self_attn.k_proj.register_forward_hook(self._keep(self.keys)))

    def _keep(self, into: list[Tensor]) -> Any:
        def hook(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
            into.append(out[0].float())

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def sigma(self, kv: Tensor, gain: float) -> Tensor:
        """Derived standard deviation [2L, n] of a key's or value's product with a unit vector, in fp16.

        As `fp16_sigma`: an isotropic relative error eps of what enters, |x| of it, moves an element by
        eps |x| |w| / sqrt(D). To it comes the rounding of the element itself, a bias may be large.
        """
        out = []
        for layer, block in enumerate(self.student.model.layers):
            eps = gain * relative_error(layer + 1)
            entering = self.entering[layer].norm(dim=-1) / math.sqrt(self.student.config.hidden_size)  # [n]
            for row, projection in ((2 * layer, block.self_attn.k_proj), (2 * layer + 1, block.self_attn.v_proj)):
                sigma = eps * entering * projection.weight.float().square().sum(1).mean().sqrt()
                size = kv[row].square().mean(-1).sqrt().amax(0)  # [n], of the largest head
                if self.student.config.qk_norm and row % 2 == 0:
                    raw = self.keys[layer].unflatten(-1, kv[row, :, 0].shape).square().mean(-1).sqrt().amin(-1)
                    sigma = sigma / raw * size
                out.append((sigma.square() + (2.0**-11 * size).square()).sqrt())
        return torch.stack(out)


def _of_twin(
    student: Student, context: int, chunks: Mapping[str, int], ids: Tensor, rows: Tensor, columns: Tensor
) -> dict[str, Tensor]:
    base, n = deepcopy(student), ids.shape[1]
    twin = round_to_half(CachedTwin(base, n, n))
    recorder = ProbeRecorder(twin)
    x = twin.states(ids, torch.tensor([0], dtype=torch.int32))
    twin.final_norm(x)  # recorded, at every row
    out = {
        "logits_half": twin.logits(x[..., rows])[0][:, columns],
        "kv_half": twin.kv @ directions(student.config.head_dim).T,
        "embed_check": embedding_check(twin.embed.weight),
    }
    points = sorted({0, *(row for seq in chunks.values() for row in (seq // 2, seq - 1))})
    out["probe_rows"] = torch.tensor([row for row in points if row < n], dtype=torch.int32)
    probes = {name: value for name, value in recorder.values.items() if is_point(name)}
    out |= {f"probe.{name}": value[..., out["probe_rows"]].contiguous() for name, value in probes.items()}
    for name, seq in {"decode": 1, **chunks}.items():
        out |= {f"far.{name}.{key}": value for key, value in _far(base, context, seq, columns).items()}
    return out


def _far(base: Student, context: int, seq: int, columns: Tensor) -> dict[str, Tensor]:
    """Single calls far into the context, the last one at its end, each over a state of random keys and values, those
    after it included: they reach tables and mask where no prompt does, and what a token may not see is not zero."""
    twin = round_to_half(CachedTwin(base, context, seq))
    at = torch.linspace((context - seq) // 2, context - seq, FAR).round().int().unique()
    ids = (torch.arange(len(at) * seq, dtype=torch.int32) * 7 % base.config.vocab_size).reshape(len(at), seq)
    filled = torch.from_numpy(random_state(tuple(twin.kv.shape)))
    logits, rows = [], []
    for tokens, first in zip(ids, at, strict=True):
        twin.kv.copy_(filled)
        x = twin.states(tokens[None], first.view(1))
        logits.append(twin.logits(x[..., [0, seq - 1]])[0][:, columns])
        rows.append(twin.kv[:, :, int(first) : int(first) + seq] @ directions(base.config.head_dim).T)
    return {"ids": ids, "at": at, "logits_half": torch.stack(logits), "kv_half": torch.stack(rows)}
