"""Training through deployed weights: against autograd at those weights, by hand, and across a resume."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from distill.errors import ConfigError
from distill.formats import Formats, decompress, encode, fit
from distill.model import ModelConfig, Student
from distill.train.divergence import linear_divergence
from distill.train.fake_quantisation import FakeQuantised, input_moments
from distill.train.targets import Dense

MIXES = [
    Formats(blocks="int8", embedding="int8"),
    Formats(blocks="int4/8", embedding="lut6"),
    Formats(blocks="lut4/4", embedding="int4"),
    Formats(blocks="lut2", embedding="lut8/16"),
    Formats(),
]
IDS = torch.arange(40).reshape(2, 20) * 7 % 64


def student(tied: bool = True, seed: int = 0) -> Student:
    config = ModelConfig(64, 32, 48, 2, 4, 2, tie_word_embeddings=tied)
    return Student(config).init_weights(seed)


def loss(model: Student, ids: torch.Tensor = IDS) -> torch.Tensor:
    """As training does it: the head's weight is read outside of any module."""
    hidden = model.hidden(ids[:, :-1]).flatten(0, 1)
    return linear_divergence(hidden, model.lm_head.weight, labels_N=ids[:, 1:].flatten()).total / len(hidden)


def copy_of(model: Student) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("formats", "tied"), list(itertools.product(MIXES, [True, False])))
def test_the_parameters_hold_bit_for_bit_what_is_baked_and_then_the_trained_weights_again(formats, tied) -> None:
    model = student(tied)
    before, fake = copy_of(model), FakeQuantised(model, formats)
    with fake.applied():
        inside = copy_of(model)
        assert tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    baked = fake.bake()
    assert set(baked) == set(inside) == set(before)
    for name, value in inside.items():
        assert torch.equal(value, decompress(baked[name]).float())
        assert str(baked[name].format) == str(formats.of(name, value.ndim))
        assert torch.equal(dict(model.named_parameters())[name], before[name])
    assert any(not torch.equal(inside[name], before[name]) for name in before)


@pytest.mark.parametrize("formats", MIXES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_at_the_deployed_weights_but_zero_outside_the_range(formats, checkpointing) -> None:
    model = student().train()
    model.gradient_checkpointing = checkpointing
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 3.0  # far out: its scale leaves it outside
    importance = {name: torch.ones(p.shape[1]) for name, p in model.named_parameters() if p.ndim == 2}
    fake = FakeQuantised(model, formats, importance)
    other = student()
    other.load_state_dict({name: decompress(stored).float() for name, stored in fake.bake().items()}, strict=False)
    for first in (0, 10):  # two micro-batches
        loss(other, IDS[:, first : first + 10]).backward()
    with fake.applied():
        for first in (0, 10):
            loss(model, IDS[:, first : first + 10]).backward()
    outside = 0
    for (name, p), expected in zip(model.named_parameters(), other.parameters()):
        form, table = formats.of(name, p.ndim), fake.tables[name].float()
        if form.kind == "int":
            step = table.repeat_interleave(p.shape[1] // table.shape[1], 1)
            cut = (p / step > 2 ** (form.bits - 1) - 0.5) | (p / step < -(2 ** (form.bits - 1)) - 0.5)
            outside += int(cut.sum())
            expected.grad[cut] = 0
        assert torch.equal(p.grad, expected.grad), name
    assert outside > 0 or formats.blocks != "int4/8"


def test_a_backward_pass_outside_is_refused_and_an_error_inside_brings_the_weights_back() -> None:
    model = student()
    before, fake = copy_of(model), FakeQuantised(model, MIXES[0])
    with fake.applied():
        value = model(IDS).square().mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    with pytest.raises(ZeroDivisionError), fake.applied():
        raise ZeroDivisionError
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def train(model: Student, fake: FakeQuantised, optimiser: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        if step % 2 == 0:
            fake.refit()
        with fake.applied():
            loss(model, (IDS + step) % 64).backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("formats", MIXES[1:4])
def test_a_run_that_goes_on_from_weights_and_tables_ends_bit_for_bit_where_it_would_have(formats, tmp_path) -> None:
    def begin(tables: dict[str, torch.Tensor] | None = None) -> tuple[Student, FakeQuantised, torch.optim.Optimizer]:
        model = student()
        return model, FakeQuantised(model, formats, tables=tables), torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, fake, optimiser = begin()
    train(model, fake, optimiser, range(3))
    file = tmp_path / "stopped.pt"
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "tables": fake.tables}, file)
    train(model, fake, optimiser, range(3, 7))

    saved = torch.load(file, weights_only=True)
    again, fake_again, optimiser_again = begin(saved["tables"])
    again.load_state_dict(saved["model"])
    optimiser_again.load_state_dict(saved["optimiser"])
    train(again, fake_again, optimiser_again, range(3, 7))
    for name, p in model.named_parameters():
        assert torch.equal(p, dict(again.named_parameters())[name])
        assert torch.equal(fake.tables[name], fake_again.tables[name])


def test_scales_follow_the_weights_and_palettes_take_one_step() -> None:
    model = student()
    formats = Formats(blocks="int4/8", embedding="lut3/16")
    fake = FakeQuantised(model, formats)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3).add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.01)
    stale = dict(fake.tables)
    fake.refit()
    weights = dict(model.named_parameters())
    q, e = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"
    assert torch.equal(fake.tables[q], fit(weights[q], formats.of(q)))
    form = formats.of(e)
    old, new, best = (
        float((decompress(encode(weights[e], form, table)).float() - weights[e].detach()).square().sum())
        for table in (stale[e], fake.tables[e], fit(weights[e], form))
    )
    assert best < new < old
    for row, group in enumerate(weights[e].detach().reshape(4, -1)):  # each entry is the mean of those nearest to it
        nearest = (group[:, None] - stale[e][row].float()).abs().argmin(1)
        means = torch.stack([group[nearest == k].double().mean() for k in range(8)])
        assert torch.allclose(fake.tables[e][row].double(), means, rtol=1e-3)


def test_training_through_two_bit_weights_wins_back_much_of_what_rounding_lost() -> None:
    teacher = student(seed=3)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(2.5 if p.ndim == 2 else 1)
    model, formats = student(seed=3), Formats(blocks="lut2/8", embedding="lut4/8")
    model.load_state_dict(teacher.state_dict())
    fake, optimiser = FakeQuantised(model, formats), torch.optim.Adam(model.parameters(), lr=3e-3)

    def divergence(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = Dense(teacher.hidden(ids).flatten(0, 1), teacher.lm_head.weight)
        losses = linear_divergence(model.hidden(ids).flatten(0, 1), model.lm_head.weight, target=target)
        return losses.total / ids.numel()

    generator = torch.Generator().manual_seed(0)
    held_out = torch.randint(64, (8, 16), generator=generator)
    with fake.applied(), torch.no_grad():
        before = float(divergence(held_out))
    for _ in range(60):
        fake.refit()
        with fake.applied():
            divergence(torch.randint(64, (8, 16), generator=generator)).backward()
        optimiser.step()
        optimiser.zero_grad()
    with fake.applied(), torch.no_grad():
        after = float(divergence(held_out))
    assert after < 0.7 * before


def test_moments_are_the_mean_squares_of_what_each_layer_reads() -> None:
    model = student(tied=False).train()
    got = input_moments(model, IDS.split(1))
    assert model.training and set(got) == {n for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
    hidden = model.hidden(IDS).detach()
    assert torch.allclose(got["lm_head.weight"], hidden.square().mean((0, 1)), rtol=1e-5)
    block = model.model.layers[0]
    x = block.input_layernorm(model.model.embed_tokens(IDS)).detach()
    for name in "qkv":
        assert torch.allclose(got[f"model.layers.0.self_attn.{name}_proj.weight"], x.square().mean((0, 1)), rtol=1e-5)
    assert got["model.layers.1.mlp.down_proj.weight"].shape == (48,)
    assert "lm_head.weight" not in input_moments(student(tied=True), [IDS])
    assert not block.self_attn.q_proj._forward_pre_hooks


def test_calibration_lowers_the_error_of_what_a_layer_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 32, generator=generator) * torch.logspace(0, -2, 32)
    w = torch.randn(48, 32, generator=generator)
    form = Formats(blocks="lut3").of("w")
    plain, calibrated = (
        float((F.linear(x, decompress(encode(w, form, fit(w, form, i))).float() - w)).square().sum())
        for i in (None, x.square().mean(0))
    )
    assert calibrated < 0.92 * plain


def test_what_cannot_be_trained_so_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight: fake quantisation needs weights in fp32"):
        FakeQuantised(student().bfloat16(), MIXES[0])
    with pytest.raises(ConfigError, match=r"head: lut4, but it is tied"):
        FakeQuantised(student(), Formats(head="lut4"))
    with pytest.raises(ConfigError, match="scales and palettes of another student"):
        FakeQuantised(student(), MIXES[0], tables={"w": torch.zeros(1)})
