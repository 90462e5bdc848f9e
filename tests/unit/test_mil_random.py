"""distill.mil: random operators by statistics; the seeds are fixed, so the outcome is too."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb

from distill import mil
from distill.errors import PackageError
from distill.mil.ops.registry import TABLE
from tests.unit import mil_build as b

N = 20_000
NOTHING = {"x0": np.zeros(1, np.float32)}


def draw(op: str, seed: int, **arguments) -> np.ndarray:
    return TABLE[op].function(seed=seed, **arguments).numpy()


def kolmogorov_smirnov(sample: np.ndarray, cumulative: np.ndarray) -> float:
    """The largest distance between the empirical distribution and the true one, times sqrt(n). Above 1.95 has a
    probability of 0.1 %.
    """
    n = len(sample)
    steps = np.arange(n + 1) / n
    distance = max(np.abs(cumulative - steps[1:]).max(), np.abs(cumulative - steps[:-1]).max())
    return float(distance * math.sqrt(n))


def test_uniform_numbers_are_uniform():
    sample = np.sort(draw("random_uniform", 3, shape=[N], low=-2.0, high=3.0))
    assert sample[0] >= -2 and sample[-1] < 3
    assert kolmogorov_smirnov(sample, (sample + 2) / 5) < 1.95


def test_an_empty_interval_gives_its_only_value():
    assert (draw("random_uniform", 1, shape=[4], low=2.5, high=2.5) == 2.5).all()


def test_normal_numbers_are_normal():
    sample = np.sort(draw("random_normal", 5, shape=[N], mean=1.0, stddev=2.0))
    assert kolmogorov_smirnov(sample, torch.special.ndtr(torch.from_numpy(sample - 1) / 2).numpy()) < 1.95


@pytest.mark.parametrize("prob", [0.0, 0.2, 1.0])
def test_bernoulli_numbers_are_ones_with_the_given_probability(prob):
    sample = draw("random_bernoulli", 7, shape=[N], prob=prob)
    assert set(np.unique(sample)) <= {0.0, 1.0}
    assert abs(sample.mean() - prob) <= 3.3 * math.sqrt(prob * (1 - prob) / N)


@pytest.mark.parametrize("mode", ["probs", "logits"])
def test_categorical_numbers_follow_each_row(mode):
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
    x = probabilities if mode == "probs" else probabilities.log() + 3  # logits need not be normalised
    sample = draw("random_categorical", 11, x=x, mode=mode, size=N)
    assert sample.shape == (2, N)
    for row, expected in zip(sample, probabilities.numpy() * N):
        seen = np.bincount(row.astype(int), minlength=4)
        assert ((seen - expected) ** 2 / expected).sum() < 16.27  # chi-square, 3 degrees of freedom, 0.1 %


def random_program(path, seed: int) -> mil.Program:
    def body(x0):
        n = mb.random_normal(shape=np.array([3, 4], np.int32), seed=seed, mean=0.0, stddev=1.0)
        return mb.add(x=x0, y=0.0), n

    return b.load(path, [b.tensor((1,))], body, "fp32")


def numbers(program: mil.Program) -> np.ndarray:
    return next(v for v in program.predict(NOTHING).values() if v.size == 12)


def test_a_seed_gives_the_same_numbers_at_every_prediction(tmp_path):
    program = random_program(tmp_path / "m.mlpackage", 9)
    torch.manual_seed(0)
    first = numbers(program)
    torch.manual_seed(1)
    np.testing.assert_array_equal(numbers(program), first)
    assert not np.array_equal(numbers(random_program(tmp_path / "n.mlpackage", 10)), first)


def test_without_a_seed_numbers_are_fresh_and_torch_can_repeat_them(tmp_path):
    program = random_program(tmp_path / "m.mlpackage", -1)
    torch.manual_seed(0)
    first = numbers(program)
    assert not np.array_equal(numbers(program), first)
    torch.manual_seed(0)
    np.testing.assert_array_equal(numbers(program), first)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("random_uniform", {"shape": [2], "low": 2.0, "high": 1.0}),
        ("random_normal", {"shape": [2**20, 2**20]}),
        ("random_bernoulli", {"shape": [-1]}),
        ("random_bernoulli", {"shape": [2], "prob": 1.5}),
        ("random_categorical", {"x": torch.ones(3), "size": 0}),
        ("random_categorical", {"x": torch.ones(3), "mode": "odds"}),
        ("random_categorical", {"x": torch.zeros(3), "mode": "probs"}),
    ],
)
def test_impossible_random_arguments_are_refused(op, arguments):
    with pytest.raises((ValueError, RuntimeError, PackageError)):
        TABLE[op].function(**arguments)
