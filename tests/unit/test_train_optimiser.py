"""The optimiser with 8-bit moments: near AdamW, a quarter of its memory, and resumed to the same bits.

A whole student's steps run uncompiled here (a compilation for each shape takes seconds); those of two shapes, and those
of tests/unit/test_train_adapters.py, run as a user's do.
"""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill import checkpoint
from distill.errors import CheckpointError, InputError
from distill.model import Student
from distill.tokenizer import toy_tokenizer
from distill.train.config import TrainConfig
from distill.train.optimiser import (
    make_optimiser,
    optimiser_bytes,
    optimiser_state,
    restore_optimiser,
    set_learning_rate,
)
from distill.train.toy import toy_model
from tests.unit.train_sets import config

EIGHT = "adamw8bit"


@pytest.fixture
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def _settings(kind: str = EIGHT, **changes: Any) -> TrainConfig:
    return config(Path("unused"), Path("unused"), optimiser=kind, lr=1e-2, **changes)


class _Two(nn.Module):
    """A matrix whose moments are kept in 8 bits and a vector whose are not, as AdamW8bit divides them."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
        self.small = nn.Parameter(torch.ones(30))


def _gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) + 0.5


def _stepped(kind: str, steps: int, lr: float = 1e-2) -> tuple[_Two, torch.optim.Optimizer]:
    model = _Two()
    optimiser = make_optimiser(model, _settings(kind))
    for step in range(steps):
        _gradients(model, step)
        set_learning_rate(optimiser, lr)
        optimiser.step()
    return model, optimiser


def test_small_parameters_get_adamw_and_large_ones_adamw_to_within_their_8_bits(uncompiled: None) -> None:
    exact, ours = _stepped("adamw", 20)[0], _stepped(EIGHT, 20)[0]
    torch.testing.assert_close(ours.small, exact.small, rtol=1e-5, atol=1e-6)
    moved = float((exact.large - _Two().large).detach().norm())
    assert 0 < float((ours.large - exact.large).detach().norm()) < 0.03 * moved


def test_a_saved_moment_is_its_codes_among_the_levels_and_the_largest_of_each_block(uncompiled: None) -> None:
    model, optimiser = _stepped(EIGHT, 1)
    saved = optimiser_state(optimiser)["state"][0]
    truth = 0.1 * model.large.grad.numpy().reshape(-1, 256)  # beta 0.9: a tenth of the first gradient
    largest = np.abs(truth).max(1)
    np.testing.assert_allclose(saved["exp_avg"]["scale"].numpy(), largest, rtol=1e-6)
    levels = optimiser.state[model.large]["exp_avg"].qmap.numpy()
    told = levels[saved["exp_avg"]["codes"].numpy().reshape(-1, 256)] * largest[:, None]
    nearest = levels[np.abs(levels[None, None] - (truth / largest[:, None])[..., None]).argmin(-1)] * largest[:, None]
    assert np.mean(np.abs(told - nearest) > 1e-6 * largest[:, None]) < 1e-3  # but for ties
    assert np.abs(told - truth).max() < 0.01 * largest.max()


def test_moments_take_2_bytes_a_weight_and_not_8(uncompiled: None) -> None:
    n = 64 * 128
    assert optimiser_bytes(_stepped("adamw", 1)[1]) == 8 * (n + 30)
    assert optimiser_bytes(_stepped(EIGHT, 1)[1]) == 2 * (n + 4 * n // 256) + 8 * 30


def _save(optimiser: torch.optim.Optimizer, path: Path) -> dict[str, Any]:
    torch.save(optimiser_state(optimiser), path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in _leaves(inner)]
    return [leaf for inner in value for leaf in _leaves(inner)] if isinstance(value, list | tuple) else [value]


def test_compiled_steps_after_a_restore_are_those_of_an_undisturbed_run_bit_for_bit(tmp_path: Path) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler: the step cannot be compiled")
    model, optimiser = _stepped(EIGHT, 3)
    saved = _save(optimiser, tmp_path / "o.pt")
    assert {type(leaf) for leaf in _leaves(saved)} <= {Tensor, float, int, bool, type(None)}
    other = copy.deepcopy(model)
    resumed = make_optimiser(other, _settings())
    restore_optimiser(resumed, [saved])
    for step in range(3, 6):
        for each, its in ((model, optimiser), (other, resumed)):
            _gradients(each, step)
            set_learning_rate(its, 1e-3)
            its.step()
    assert torch.equal(model.large, other.large) and torch.equal(model.small, other.small)
    forgot = copy.deepcopy(other)
    fresh = make_optimiser(forgot, _settings())
    _gradients(forgot, 6), _gradients(other, 6)
    fresh.step(), resumed.step()
    assert not torch.equal(forgot.large, other.large)  # the moments matter


def test_the_learning_rate_of_each_step_counts(uncompiled: None) -> None:
    for kind in ("adamw", EIGHT):
        slow, fast = _stepped(kind, 1, lr=1e-4)[0], _stepped(kind, 1, lr=1e-2)[0]
        moved = [(m.small.detach() - 1).abs().mean() for m in (slow, fast)]
        assert float(moved[1] / moved[0]) == pytest.approx(100, rel=1e-2)


def _spoil_codes(kept: dict[str, Any]) -> None:
    kept["exp_avg"]["codes"] = kept["exp_avg"]["codes"].view(128, 64)


def _spoil_kind(kept: dict[str, Any]) -> None:
    kept["exp_avg"]["codes"] = kept["exp_avg"]["codes"].float()


def _spoil_scale(kept: dict[str, Any]) -> None:
    kept["exp_avg_sq"]["scale"] = kept["exp_avg_sq"]["scale"][1:]


def _spoil_class(kept: dict[str, Any]) -> None:
    from torchao.optim.subclass_8bit import OptimState8bit

    kept["exp_avg"] = OptimState8bit.zeros((64, 128))


@pytest.mark.parametrize("spoil", [_spoil_codes, _spoil_kind, _spoil_scale, _spoil_class, lambda kept: kept.clear()])
def test_moments_that_do_not_fit_are_refused(uncompiled: None, spoil: Any) -> None:
    saved = optimiser_state(_stepped(EIGHT, 1)[1])
    spoil(saved["state"][0])
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        restore_optimiser(make_optimiser(_Two(), _settings()), [saved])


def test_moments_of_the_other_optimiser_are_refused_by_adamw(uncompiled: None) -> None:
    saved = optimiser_state(_stepped(EIGHT, 1)[1])
    with pytest.raises(TypeError, match="a dict"):
        restore_optimiser(make_optimiser(_Two(), _settings("adamw")), [saved])


def test_a_checkpoint_with_weights_of_torchao_s_class_is_refused(tmp_path: Path) -> None:
    from torchao.optim.subclass_8bit import OptimState8bit

    student = Student(toy_model(32, 1)).init_weights(0)
    data = checkpoint.contents(student, toy_tokenizer(), step=0, loss=0.0, stage="init")
    data["model"]["model.embed_tokens.weight"] = OptimState8bit.zeros(
        student.model.embed_tokens.weight.shape, dtype=torch.float32
    )
    torch.save(data, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a dense tensor of floats"):
        checkpoint.load(tmp_path / "x.pt")


def test_weight_decay_is_for_matrices_only_and_what_is_frozen_is_left_out() -> None:
    model = _Two()
    for kind in ("adamw", EIGHT):
        decayed, plain = make_optimiser(model, _settings(kind)).param_groups
        assert decayed["params"] == [model.large] and decayed["weight_decay"] == 0.1
        assert plain["params"] == [model.small] and plain["weight_decay"] == 0.0
    model.small.requires_grad_(False)
    assert [group["params"] for group in make_optimiser(model, _settings("adamw")).param_groups] == [[model.large], []]


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(InputError) as caught:
        make_optimiser(_Two(), _settings())
    assert str(caught.value) == (
        "optimiser: adamw8bit: the package torchao is not installed: pip install 'distill[scale]'"
    )


def test_a_missing_compiler_is_one_line_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(InputError, match=r"adamw8bit.* needs a C\+\+ compiler"):
        make_optimiser(_Two(), _settings())
