"""The loss of a step: what components and kinds of span weigh, against autograd; it depends on nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.data.batches import Batch, Examples
from distill.data.records import Dataset
from distill.data.spans import KINDS
from distill.model import Student
from distill.tokenizer import toy_tokenizer
from distill.train.objective import COMPONENTS, Objective, Sums
from distill.train.step import evaluate, gradients
from distill.train.toy import toy_model
from tests.unit.kd_sets import episode
from tests.unit.train_sets import random_distribution, write_records

WEIGHTS = {"kl_div": 0.5, "ce_teacher": 0.3, "ce_ground_truth": 0.2}
SPANS = dict(zip(KINDS, (0.5, 1.0, 0.0, 0.7, 3.0, 2.5, 4.0)))
PRECISE = Objective(WEIGHTS, span_weights=SPANS)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    """Episodes with every kind of span, most with distributions."""
    records = [episode(index, size=6, tokenizer=toy_tokenizer(), val_share=0) for index in range(8)]
    items = [random_distribution(record, seed=seed) if seed != 2 else None for seed, record in enumerate(records)]
    path = write_records(tmp_path_factory.mktemp("set") / "d.jsonl", records, items)
    return Examples(Dataset.open(path), toy_tokenizer(), "train", max_length=4096)


@pytest.fixture(scope="module")
def student() -> Student:
    return Student(toy_model(32, 1)).init_weights(1).train()


def _gradient(student: Student, window: list[Batch], objective: Objective) -> tuple[Sums, Tensor]:
    student.zero_grad()
    sums = gradients(student, window, objective)
    return sums, torch.cat([p.grad.flatten() for p in student.parameters()])


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_the_set_of_these_tests_has_every_kind_of_span(examples: Examples) -> None:
    assert set(examples.spans) == set(KINDS) and len(examples) == 8
    assert sum(examples.spans.values()) == sum(e.targets for e in examples.items)


_ORDERS = st.permutations(range(8))
_CUTS = st.sets(st.integers(1, 7), max_size=7)


@settings(deadline=None, max_examples=25)
@given(_ORDERS, _CUTS, st.sampled_from([None, 7, 64]), st.sampled_from([SPANS, {}]))
def test_loss_and_gradient_do_not_depend_on_order_packing_and_micro_batches(
    examples, student, order, cuts, chunk, spans
) -> None:
    objective = PRECISE._replace(span_weights=spans)
    expected_sums, expected = _gradient(student, [examples.batch(list(range(8)))], objective)
    edges = [0, *sorted(cuts), 8]
    window = [examples.batch(order[a:b]) for a, b in itertools.pairwise(edges)]
    sums, gradient = _gradient(student, window, objective._replace(chunk=chunk))
    assert _apart(gradient, expected) < 1e-6
    assert sums.total(WEIGHTS) == pytest.approx(expected_sums.total(WEIGHTS), rel=1e-6)
    assert sums.counts == expected_sums.counts and sums.weight == pytest.approx(expected_sums.weight, rel=1e-12)


def test_a_mean_of_micro_batch_means_would_be_caught(examples: Examples, student: Student) -> None:
    _, expected = _gradient(student, [examples.batch(list(range(8)))], PRECISE)
    parts = [_gradient(student, [examples.batch([i])], PRECISE)[1] for i in range(8)]
    assert _apart(sum(parts) / 8, expected) > 1e-2
    tokens = [examples[i].targets for i in range(8)]  # weighted by tokens instead of by their weights
    assert _apart(sum(n * part for n, part in zip(tokens, parts)) / sum(tokens), expected) > 1e-4


def _plain_losses(student: Student, batch: Batch) -> dict[str, Tensor]:
    """Each component of each target in fp64, written out over the whole vocabulary; 0 where a target lacks it."""
    hidden = student.hidden(batch.ids_T[None], lengths=batch.lengths)[0][batch.positions_N]
    log_q = (hidden.double() @ student.lm_head.weight.double().T).log_softmax(-1)
    nll = -log_q.gather(1, batch.labels_N[:, None])[:, 0]
    has = batch.has_distribution_N
    kept, lp, tail = batch.topk_ids_NK.clamp(min=0), batch.topk_logprobs_NK.double(), batch.tail_logprob_N.double()
    rest = log_q.scatter(1, kept, -torch.inf).logsumexp(-1)
    kl = (lp.exp() * (lp - log_q.gather(1, kept))).sum(-1) + tail.exp() * (tail - rest)
    return {
        "kl_div": torch.where(has, kl, 0.0), "ce_teacher": nll * batch.teacher_N,
        "ce_ground_truth": nll * batch.ground_truth_N,
    }  # fmt: skip


def test_the_gradient_is_autograd_s_of_the_weighted_losses_over_the_sum_of_weights(
    examples: Examples, student: Student
) -> None:
    batch = examples.batch([3, 1, 4])
    sums, ours = _gradient(student, [batch], PRECISE)
    weight = torch.tensor([SPANS[KINDS[kind]] for kind in batch.span_N.tolist()], dtype=torch.float64)
    student.zero_grad()
    losses = _plain_losses(student, batch)
    total = sum(WEIGHTS[name] * (weight * loss).sum() for name, loss in losses.items()) / weight.sum()
    total.backward()
    theirs = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert _apart(ours, theirs) < 1e-4
    assert sums.total(WEIGHTS) == pytest.approx(float(total.detach()), rel=1e-5)
    assert sums.weight == pytest.approx(float(weight.sum()), rel=1e-6)


def test_spans_of_weight_zero_teach_nothing(examples: Examples, student: Student) -> None:
    batch = examples.batch([0, 1])
    only = dict.fromkeys(KINDS, 0.0) | {"tool_args": 1.0}
    sums, gradient = _gradient(student, [batch], PRECISE._replace(span_weights=only))
    student.zero_grad()
    mask = batch.span_N == KINDS.index("tool_args")
    losses = _plain_losses(student, batch)
    (sum(WEIGHTS[name] * loss[mask].sum() for name, loss in losses.items()) / mask.sum()).backward()
    assert _apart(gradient, torch.cat([p.grad.flatten() for p in student.parameters()])) < 1e-4
    assert set(sums.span_means) == {"kl_div/tool_args", "ce_teacher/tool_args"} and sums.weight == int(mask.sum())
    nothing = PRECISE._replace(span_weights=dict.fromkeys(KINDS, 0.0))
    sums, gradient = _gradient(student, [batch], nothing)
    assert sums.means == {} and sums.total(WEIGHTS) == 0 and not gradient.any()


def test_equal_weights_are_no_weights_whatever_they_are(examples: Examples, student: Student) -> None:
    window = [examples.batch([0, 5]), examples.batch([2])]
    plain_sums, plain = _gradient(student, window, Objective(WEIGHTS))
    ones_sums, ones = _gradient(student, window, Objective(WEIGHTS, span_weights=dict.fromkeys(KINDS, 1.0)))
    assert torch.equal(plain, ones) and plain_sums == ones_sums
    assert plain_sums.weight == sum(batch.targets for batch in window)
    sevens_sums, sevens = _gradient(student, window, Objective(WEIGHTS, span_weights=dict.fromkeys(KINDS, 7.0)))
    assert _apart(sevens, plain) < 1e-6
    assert sevens_sums.total(WEIGHTS) == pytest.approx(plain_sums.total(WEIGHTS), rel=1e-6)


def test_sums_by_span_are_the_losses_of_those_tokens_and_add_up(examples: Examples, student: Student) -> None:
    batches = [examples.batch([0, 2, 7]), examples.batch([1])]
    sums = evaluate(student, batches, PRECISE)
    plain = [(batch, _plain_losses(student, batch)) for batch in batches]
    carries = {"kl_div": "has_distribution_N", "ce_teacher": "teacher_N"}
    for name, field in carries.items():
        for index, kind in enumerate(KINDS):
            chosen = [loss[name][(b.span_N == index) & getattr(b, field)] for b, loss in plain]
            found = torch.cat(chosen).detach()
            assert sums.counts[f"{name}/{kind}"] == len(found)  # evaluation sees all spans, of weight 0 too
            assert sums.span_means[f"{name}/{kind}"] == pytest.approx(float(found.mean()), rel=1e-4)
        parts = [key for key in sums.sums if key.startswith(f"{name}/")]
        assert sum(sums.counts[key] for key in parts) == sums.counts[name]
        assert sum(sums.sums[key] for key in parts) == pytest.approx(sums.sums[name], rel=1e-9)
    assert set(sums.means) == {"kl_div", "ce_teacher"} and set(sums.means).isdisjoint(sums.span_means)


def test_reported_means_are_plain_whatever_the_spans_weigh(examples: Examples, student: Student) -> None:
    batch, spans = examples.batch([0, 1]), dict.fromkeys(KINDS, 2.0) | {"tool_name": 50.0}
    weighted, plain = (_gradient(student, [batch], Objective(WEIGHTS, span_weights=w))[0] for w in (spans, {}))
    assert weighted.means == plain.means and weighted.span_means == plain.span_means
    assert weighted.total(WEIGHTS) != pytest.approx(plain.total(WEIGHTS), rel=1e-3)


def test_components_come_in_their_fixed_order(examples: Examples, student: Student) -> None:
    sums = Sums.add_up([evaluate(student, [examples.batch([i])], PRECISE) for i in (2, 0)])  # 2 has no distributions
    assert list(sums.means) == [name for name in COMPONENTS if name in sums.means]
    assert [name for name in sums.sums if "/" in name] == [f"{c}/{k}" for c in sums.means for k in KINDS]
