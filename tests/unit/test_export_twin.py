"""The static twin is the student: prefill and decode, for every family that the student knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.export.tolerance import fp16_gain
from distill.export.twin import CachedTwin, PrefillTwin, round_to_half
from distill.model import ModelConfig, RopeScaling, Student

BASE: dict[str, Any] = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                            num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128)  # fmt: skip
LLAMA3 = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=16)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, every bias": {"attention_bias": True, "output_bias": True, "mlp_bias": True},
    "llama, one KV head": {"num_key_value_heads": 1},
    "llama, no groups": {"num_key_value_heads": 6},
    "llama, wide heads, tied": {"head_dim": 20, "tie_word_embeddings": True},
    "llama 3 rope": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "linear rope": {"rope_scaling": RopeScaling("linear", factor=4.0)},
    "yarn rope": {"rope_scaling": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=32)},
    "qwen2": {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "qwen3": {"qk_norm": True, "head_dim": 16, "rms_norm_eps": 1e-6},
    "mistral": {"sliding_window": 5},
    "mistral, a window wider than the text": {"sliding_window": 64},
}
SEQ = 24


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def student(request: pytest.FixtureRequest) -> Student:
    """Random weights, norms and biases too, large enough for every one of them to matter."""
    student = Student(ModelConfig(**BASE | FAMILIES[request.param])).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in student.named_parameters():
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        parameter.data = centre + 0.2 * torch.randn(parameter.shape, generator=generator)
    return student


def ids(count: int = SEQ) -> torch.Tensor:
    return torch.randint(0, 97, (1, count), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max())))


@torch.no_grad()
def test_prefill_gives_the_student_s_logits(student: Student) -> None:
    assert close(PrefillTwin(student, SEQ)(ids()), student(ids().long()))


@torch.no_grad()
def test_tokens_right_of_the_prompt_change_nothing_inside_it(student: Student) -> None:
    other = ids().clone()
    other[0, 10:] = 3
    twin = PrefillTwin(student, SEQ)
    assert torch.equal(twin(other)[:, :10], twin(ids())[:, :10])


@torch.no_grad()
def test_decode_gives_the_student_s_logits_token_by_token(student: Student) -> None:
    """Up to the last place of the context."""
    twin = CachedTwin(student, SEQ)
    steps = [twin(ids()[:, i : i + 1], torch.tensor([i], dtype=torch.int32))[0] for i in range(SEQ)]
    assert close(torch.cat(steps)[None], student(ids().long()))


@torch.no_grad()
def test_what_an_earlier_conversation_left_in_the_state_is_not_seen(student: Student) -> None:
    twin = CachedTwin(student, SEQ)
    for i in range(SEQ):
        twin(ids()[:, i : i + 1], torch.tensor([i], dtype=torch.int32))
    steps = [twin(ids()[:, i : i + 1], torch.tensor([i], dtype=torch.int32))[0] for i in range(6)]
    assert close(torch.cat(steps)[None], student(ids(SEQ)[:, :6].long()))


def test_building_a_twin_leaves_the_student_as_it_was(student: Student) -> None:
    before = {name: value.clone() for name, value in student.state_dict().items()}
    flags = [p.requires_grad for p in student.parameters()]
    round_to_half(PrefillTwin(student, SEQ, copy=True))
    assert [p.requires_grad for p in student.parameters()] == flags
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


@torch.no_grad()
def test_rounding_to_half_changes_constants_by_half_a_unit_at_most(student: Student) -> None:
    exact, rounded = PrefillTwin(student, SEQ), round_to_half(PrefillTwin(student, SEQ, copy=True))
    for (name, a), (_, b) in zip(exact.named_parameters(), rounded.named_parameters(), strict=True):
        assert ((a - b).abs() <= 2.0**-11 * a.abs() + 2.0**-25).all(), name


def test_the_amplification_of_rounding_is_finite_and_at_least_one(student: Student) -> None:
    assert 1.0 <= fp16_gain(student) < 10.0


def test_a_student_that_overflows_gets_no_allowance_for_it() -> None:
    """An infinite gain would excuse any error, and JSON could not hold it."""
    student = Student(ModelConfig(**BASE)).init_weights(0).eval()
    student.model.layers[0].mlp.up_proj.weight.data *= 1e8
    assert fp16_gain(student) == 1.0
