"""Distances between distributions against numpy by hand, their intervals, the limits, and the verdict they give."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import gates
from distill.config import load
from distill.data.store.distributions import capture
from distill.errors import ConfigError
from distill.formats import Formats
from distill.verify import distances
from distill.verify.distances import Estimate, Records, log_probabilities
from distill.verify.distribution import judge
from distill.verify.limits import Limits, LimitsConfig

SHIPPED = Path(__file__).parents[2] / "configs/limits.yaml"
LIMITS = Limits(["*"], 0.1, 1.0, 0.8, 0.8, 1.1)


def random_logits(seed: int, n: int = 12, vocab: int = 9, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, vocab)) * scale


def by_hand(logits: np.ndarray) -> np.ndarray:
    """Probabilities, one token at a time."""
    return np.array([[math.exp(x) / math.fsum(math.exp(y) for y in row) for x in row] for row in logits.tolist()])


def of(p: np.ndarray, q: np.ndarray, k: int = 3) -> distances.Distances:
    return distances.distances(log_probabilities(torch.tensor(p)), log_probabilities(torch.tensor(q)), k)


# what each number is


def test_every_distance_is_its_formula_s() -> None:
    a = random_logits(0, n=40)
    b = a + random_logits(1, n=40, scale=2.0)
    p, q = by_hand(a), by_hand(b)
    found = of(a, b)
    for token in range(len(a)):
        kl = math.fsum(x * math.log(x / y) for x, y in zip(p[token].tolist(), q[token].tolist()))
        ours, theirs = (sorted(range(9), key=lambda v: (-logits[token][v], v))[:3] for logits in (a, b))
        assert found.kl[token] == pytest.approx(kl, rel=1e-12)
        assert found.top1[token] == (ours[0] == theirs[0])
        assert found.topk[token] == pytest.approx(len(set(ours) & set(theirs)) / 3)
        assert found.top1_in_topk[token] == (ours[0] in theirs)
    assert 0 < found.top1.mean() < found.top1_in_topk.mean() < 1  # the sample tells them apart


def test_nll_is_minus_the_log_of_the_text_s_probability() -> None:
    logits, labels = random_logits(2), [0, 3, 8, 1, 2, 4, 5, 6, 7, 0, 1, 2]
    found = distances.negative_log_likelihood(log_probabilities(torch.tensor(logits)), torch.tensor(labels))
    assert found == pytest.approx([-math.log(row[label]) for row, label in zip(by_hand(logits), labels)], rel=1e-12)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_kl_from_a_stored_distribution_counts_all_other_tokens_as_one(k: int) -> None:
    teacher, model = random_logits(3), random_logits(4)
    kept = capture(teacher, k)
    found = distances.kl_from_stored(*(torch.from_numpy(np.asarray(x)) for x in kept),
                                     log_probabilities(torch.tensor(model)))  # fmt: skip
    whole = of(teacher, model).kl
    for token, (t, q) in enumerate(zip(by_hand(teacher), by_hand(model))):
        ids = np.argsort(-t)[:k]
        pairs = [(t[i], q[i]) for i in ids] + ([(1 - t[ids].sum(), 1 - q[ids].sum())] if k < 9 else [])
        assert found[token] == pytest.approx(sum(a * math.log(a / b) for a, b in pairs), rel=1e-5)
        assert found[token] <= whole[token] + 1e-6


def test_padding_of_a_stored_distribution_adds_nothing() -> None:
    log_q = log_probabilities(torch.tensor(random_logits(5, n=1)))
    ids, logprobs, tail = torch.tensor([[4, 2]]), torch.tensor([[-0.5, -1.5]]), torch.tensor([math.log(0.17)])
    padded = torch.tensor([[4, 2, -1, -1]]), torch.tensor([[-0.5, -1.5, -math.inf, -math.inf]])
    assert distances.kl_from_stored(*padded, tail, log_q) == distances.kl_from_stored(ids, logprobs, tail, log_q)


# what must hold of any logits

SEEDS = st.integers(0, 10**6)


@settings(max_examples=60, deadline=None)
@given(SEEDS, SEEDS, st.floats(0.01, 40))
def test_kl_is_not_negative_and_zero_only_for_equals(one: int, other: int, scale: float) -> None:
    p, q = random_logits(one, scale=scale), random_logits(other + 10**6 + 1, scale=scale)
    assert (of(p, q).kl > -1e-12).all() and of(p, q).kl.max() > 0
    same = of(p, p)
    assert (same.kl == 0).all() and (same.top1 == 1).all() and (same.topk == 1).all()


@settings(max_examples=60, deadline=None)
@given(SEEDS, SEEDS, st.floats(-500, 500))
def test_neither_a_constant_nor_the_order_of_the_vocabulary_matters(one: int, other: int, constant: float) -> None:
    p, q = random_logits(one), random_logits(other)
    order = np.random.default_rng(one).permutation(9)
    expected = of(p, q)
    for found in (of(p + constant, q), of(p, q - constant), of(p[:, order], q[:, order])):
        for mine, theirs in zip(found, expected):
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-10)


def test_logits_at_the_end_of_fp16_keep_their_digits() -> None:
    """In fp32 log softmax of such logits loses them."""
    p = np.array([[65504.0, 65504.0 - 2.0, 65504.0 - 8.0]])
    q = p - np.array([[0.0, 0.25, 0.0]])
    small = of(p - 65504.0, q - 65504.0, 2).kl
    assert of(p, q, 2).kl == pytest.approx(small, rel=1e-12) and small[0] > 1e-4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_agrees_with_nothing(value: float) -> None:
    p, q = random_logits(6, n=2), random_logits(6, n=2)
    q[1, 4] = value
    found = of(p, q)
    assert found.kl[0] == 0 and found.kl[1] == math.inf
    assert [found.top1[1], found.topk[1], found.top1_in_topk[1]] == [0, 0, 0]
    log_q = log_probabilities(torch.tensor(q))
    assert distances.negative_log_likelihood(log_q, torch.tensor([0, 0]))[1] == math.inf


def test_a_tie_goes_to_the_lowest_id_as_in_greedy_decoding() -> None:
    """So equal logits everywhere agree with a real distribution once in V tokens, not always."""
    p, flat = random_logits(7, n=400), np.zeros((400, 9))
    assert distances.best(torch.zeros(1, 9), 3).tolist() == [[0, 1, 2]]
    assert of(p, flat).top1.mean() == pytest.approx(1 / 9, abs=0.06)


# from tokens to all text like it


def test_an_interval_comes_from_records_drawn_anew() -> None:
    """Tokens of a record are alike here: an interval over tokens would be five times too narrow."""
    record = np.repeat(np.arange(40), 25)
    values = np.repeat(np.random.default_rng(0).normal(size=40), 25) + 3
    found = Records(record).mean(values)
    expected = 1.96 * values[::25].std() / math.sqrt(40)
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.15)
    assert found == Records(record).mean(values)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Uneven records: of 200 samples of 40 records, 95% intervals of the mean per token, whose truth is known."""
    generator, inside = np.random.default_rng(1), 0
    for _ in range(200):
        sizes = generator.integers(1, 30, size=40)
        each = generator.normal(size=40) + 2
        record = np.repeat(np.arange(40), sizes)
        found = Records(record).mean(each[record] + generator.normal(size=len(record)))
        inside += found.low <= 2 <= found.high
    assert 0.88 <= inside / 200 <= 0.99


def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed() -> None:
    generator = np.random.default_rng(2)
    for n in (1, 7, 100, 101, 1000):
        values = generator.normal(size=n)
        found = Records(np.arange(n) % 10).percentile(values, 99)
        expected = next(x for x in sorted(values) if 100 * sum(values <= x) >= 99 * n)
        assert found.value == expected and found.low <= found.value <= found.high
    endless = Records(np.arange(50)).percentile(np.where(np.arange(50) < 5, math.inf, 0.0), 99)
    assert endless.value == math.inf and not math.isnan(endless.low)


def test_a_ratio_of_perplexities_is_exp_of_the_mean_difference() -> None:
    record, mine, theirs = np.array([0, 0, 1]), np.array([1.0, 2.0, 4.0]), np.array([1.5, 2.0, 3.0])
    found = Records(record).ratio(mine - theirs)
    assert found.value == pytest.approx(math.exp(mine.mean()) / math.exp(theirs.mean()))
    assert Records(record).ratio(np.array([0.0, math.inf, 0.0])).value == math.inf


# limits and verdicts


def estimates(**given: tuple[float, float, float]) -> dict[str, Estimate]:
    sound = {"kl_mean": (0.01, 0.005, 0.02), "kl_p99": (0.1, 0.05, 0.2), "top1_agreement": (0.95, 0.93, 0.97),
             "topk_agreement": (0.95, 0.93, 0.97), "perplexity_ratio": (1.01, 1.0, 1.02)}  # fmt: skip
    return {name: Estimate(*values) for name, values in (sound | given).items()}


@pytest.mark.parametrize(("name", "values", "status"), [
    ("kl_mean", (0.1, 0.05, 0.1), "pass"), ("kl_mean", (0.09, 0.05, 0.11), "inconclusive"),
    ("kl_mean", (0.2, 0.11, 0.3), "fail"), ("kl_p99", (2.0, 1.1, 3.0), "fail"),
    ("kl_mean", (math.inf, math.inf, math.inf), "fail"), ("perplexity_ratio", (1.2, 1.11, 1.3), "fail"),
    ("top1_agreement", (0.8, 0.8, 0.9), "pass"), ("top1_agreement", (0.8, 0.7, 0.9), "inconclusive"),
    ("topk_agreement", (0.7, 0.6, 0.79), "fail"),
])  # fmt: skip
def test_a_limit_is_kept_by_the_whole_interval_or_broken_by_all_of_it(
    name: str, values: tuple[float, float, float], status: str
) -> None:
    found = judge(estimates(**{name: values}), LIMITS, None, "executor")
    assert {key: gate.status for key, gate in found.items()} == dict.fromkeys(found, "pass") | {name: status}
    assert found[name].threshold == getattr(LIMITS, name) and found[name].backend == "executor"


def test_too_few_samples_decide_nothing_but_that_a_logit_is_not_finite() -> None:
    endless = (math.inf, math.inf, math.inf)
    found = judge(estimates(kl_mean=endless), LIMITS, "3 records, 20 needed", "executor")
    assert found.pop("kl_mean").status == "fail"
    assert {gate.status for gate in found.values()} == {"inconclusive"}
    assert all("3 records, 20 needed" in str(gate.reason) for gate in found.values())
    assert gates.exit_code(found) == 3


@pytest.mark.parametrize(("formats", "finest"), [
    (None, "fp16"), (Formats(), "fp16"), (Formats("int8", "int8"), "int8*"), (Formats("int8", "fp16"), "int8*"),
    (Formats("fp16", "lut6/16"), "lut6*"), (Formats("int4/32", "int8"), "int4*"),
    (Formats("int8", "int8", "lut4"), "int4*"), (Formats("lut4/16", "lut3"), "lut3*"), (Formats("lut1"), "lut1*"),
])  # fmt: skip
def test_the_coarsest_part_decides_what_a_package_may_lose(formats: Formats | None, finest: str) -> None:
    assert load(SHIPPED, LimitsConfig).rule(formats).formats[0] == finest


def test_the_shipped_limits_follow_from_their_kl_as_the_file_says() -> None:
    for rule in load(SHIPPED, LimitsConfig).rules:
        kl = rule.kl_mean
        assert rule.kl_p99 == pytest.approx(10 * kl)
        assert rule.top1_agreement == rule.topk_agreement == pytest.approx(1 - math.sqrt(kl / 2), abs=0.006)
        if rule.formats != ["fp16"]:
            assert rule.perplexity_ratio == pytest.approx(math.exp(kl), abs=0.006)


FINE = dict(formats=["fp16"], kl_mean=0.1, kl_p99=1.0, top1_agreement=0.9, topk_agreement=0.9, perplexity_ratio=1.1)


@pytest.mark.parametrize(("change", "message"), [
    ({"top1_agreement": 1.5}, "top1_agreement of fp16: 1.5 is no limit"), ({"kl_mean": -1}, "kl_mean of fp16"),
    ({"perplexity_ratio": ".inf"}, "perplexity_ratio of fp16"), ({"formats": []}, "none is named"),
    ({"kl": 1}, "unknown key 'rules[].kl'"),
])  # fmt: skip
def test_a_wrong_limit_is_one_line_that_names_it(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "limits.yaml"
    rows = [f"{key}: {value}" for key, value in (FINE | change).items()]
    path.write_text("rules:\n  - {" + ", ".join(rows) + "}\n")
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load(path, LimitsConfig)


def test_a_coarser_format_may_not_have_a_tighter_limit() -> None:
    coarse = FINE | {"formats": ["int8*"], "kl_p99": 0.5}
    with pytest.raises(msgspec.ValidationError, match="kl_p99 of int8\\* is tighter"):
        msgspec.convert({"rules": [FINE, coarse]}, LimitsConfig)
    with pytest.raises(ConfigError, match="no rule names the weight format lut4"):
        msgspec.convert({"rules": [FINE]}, LimitsConfig).rule(Formats("lut4"))
