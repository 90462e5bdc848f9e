"""The stateful twin in chunks is the student, and its keys and values are what numpy computes by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from distill.export.twin import CachedTwin
from distill.model import Student
from tests.unit.test_export_twin import SEQ, close, ids, student

__all__ = ["student"]  # the fixture: every family

CUTTINGS = [[1] * SEQ, [8, 8, 8], [8, 1, 8, 1, 1, 5], [5, 8, 8, 3], [24], [1, 8, 8, 7]]


def feed(student: Student, sizes: Sequence[int], context: int = 40, calls: dict[int, int] | None = None) -> tuple:
    """Logits and state after feeding `ids()` in parts; a part of fewer than 8 tokens is padded to 8, but one of 1."""
    kv, at, found = None, 0, []
    for size in sizes:
        length = size if size in (1, 8, 24) else 8
        twin = CachedTwin(student, context, length)
        if kv is not None:
            twin.kv.copy_(kv)
        part = torch.full((1, length), 11, dtype=torch.int32)
        part[:, :size] = ids()[:, at : at + size]
        found.append(twin(part, torch.tensor([at], dtype=torch.int32))[:, :size])
        kv, at = twin.kv.clone(), at + size
    assert kv is not None
    return torch.cat(found, 1), kv


@torch.no_grad()
@pytest.mark.parametrize("sizes", CUTTINGS, ids=str)
def test_the_student_s_logits_come_out_however_the_tokens_are_cut(student: Student, sizes: list[int]) -> None:
    assert close(feed(student, sizes)[0], student(ids().long()))


@torch.no_grad()
def test_the_state_holds_the_keys_and_values_that_numpy_computes(student: Student) -> None:
    """Layer by layer from what enters each block, with RoPE written out as complex rotations."""
    kv = feed(student, [8, 1, 8, 1, 1, 5])[1].numpy()
    entering: list[torch.Tensor] = []
    handles = [b.register_forward_pre_hook(lambda _m, args: entering.append(args[0])) for b in student.model.layers]
    student(ids().long())
    for handle in handles:
        handle.remove()
    for layer, x in enumerate(entering):
        keys, values = _by_hand(student, layer, x[0].numpy().astype(np.float64))
        np.testing.assert_allclose(kv[2 * layer, :, :SEQ], keys, rtol=0, atol=1e-4 * np.abs(keys).max())
        np.testing.assert_allclose(kv[2 * layer + 1, :, :SEQ], values, rtol=0, atol=1e-4 * np.abs(values).max())


def _by_hand(student: Student, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    config, attention = student.config, student.model.layers[layer].self_attn

    def norm(v: np.ndarray, weight: torch.Tensor) -> np.ndarray:
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight.detach().numpy()

    def project(v: np.ndarray, linear: torch.nn.Linear) -> np.ndarray:
        out = v @ linear.weight.detach().numpy().T + (0 if linear.bias is None else linear.bias.detach().numpy())
        return out.reshape(len(v), config.num_key_value_heads, config.head_dim)

    entering = norm(x, student.model.layers[layer].input_layernorm.weight)
    keys, values = project(entering, attention.k_proj), project(entering, attention.v_proj)
    if config.qk_norm:
        keys = norm(keys, attention.k_norm.weight)
    return _turned(student, keys), values.transpose(1, 0, 2)


def _turned(student: Student, keys: np.ndarray) -> np.ndarray:
    from distill.model import rope_frequencies

    frequencies, factor = rope_frequencies(student.config)
    half = student.config.head_dim // 2
    out = np.empty((keys.shape[1], keys.shape[0], 2 * half))
    for position in range(keys.shape[0]):
        turn = factor * np.exp(1j * position * frequencies.numpy().astype(np.float64))
        for head in range(keys.shape[1]):
            turned = (keys[position, head, :half] + 1j * keys[position, head, half:]) * turn
            out[head, position] = np.concatenate([turned.real, turned.imag])
    return out


@torch.no_grad()
def test_padding_behind_the_last_token_is_overwritten_before_any_token_sees_it(student: Student) -> None:
    """Logits and the rows of all tokens are bit for bit those with other padding; rows after them may differ."""
    first, at = CachedTwin(student, 40, 8), torch.zeros(1, dtype=torch.int32)
    results = []
    for pad in (11, 60):
        first.kv.zero_()
        part = torch.full((1, 8), pad, dtype=torch.int32)
        part[:, :5] = ids()[:, :5]
        found = [first(part, at)[:, :5]]
        step = CachedTwin(student, 40)
        step.kv.copy_(first.kv)
        for i in range(5, 12):
            found.append(step(ids()[:, i : i + 1], torch.tensor([i], dtype=torch.int32)))
        results.append((torch.cat(found, 1), step.kv.clone()))
    (a, kv_a), (b, kv_b) = results
    assert torch.equal(a, b) and torch.equal(kv_a[:, :, :12], kv_b[:, :, :12])
    assert close(a, student(ids()[:, :12].long()))


@torch.no_grad()
def test_a_chunk_at_the_end_of_the_context_is_the_student_s(student: Student) -> None:
    assert close(feed(student, [8, 8, 8], context=SEQ)[0], student(ids().long()))


@torch.no_grad()
def test_a_chunk_writes_its_own_rows_only(student: Student) -> None:
    twin = CachedTwin(student, 40, 8)
    twin.kv.fill_(3.0)
    twin(ids()[:, :8], torch.tensor([9], dtype=torch.int32))
    rest = torch.cat([twin.kv[:, :, :9], twin.kv[:, :, 17:]], 2)
    assert bool((rest == 3.0).all()) and not bool((twin.kv[:, :, 9:17] == 3.0).any())
