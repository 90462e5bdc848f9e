"""The losses against fp64 NumPy and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.store.distributions import capture
from distill.train.losses import Term, cross_entropy, kl_dense, kl_topk, weighted_total


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _oracle(student: np.ndarray, teacher: np.ndarray, ids: np.ndarray) -> float:
    """KL over K+1 classes in fp64, term by term."""
    total = 0.0
    for s, t, row in zip(_log_softmax(student), _log_softmax(teacher), ids):
        rest = np.setdiff1d(np.arange(len(s)), row)
        total += sum(np.exp(t[i]) * (t[i] - s[i]) for i in row)
        if len(rest):
            p, q = np.exp(t[rest]).sum(), np.exp(s[rest]).sum()
            total += p * (np.log(p) - np.log(q))
    return total


def _stored(teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kept = capture(teacher, k)
    return torch.from_numpy(kept.ids), torch.from_numpy(kept.logprobs), torch.from_numpy(kept.tail)


@pytest.mark.parametrize("k", [1, 3, 12, 16, 17])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_topk_divergence_equals_fp64_over_k_plus_one_classes(k: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(k)
    student, teacher = (torch.randn(5, 17, generator=generator) * scale for _ in range(2))
    ids, logprobs, tail = _stored(teacher, k)
    found = kl_topk(student, ids, logprobs, tail)
    expected = _oracle(student.double().numpy(), teacher.double().numpy(), ids.numpy())
    assert found.tokens == 5
    assert float(found.total) == pytest.approx(expected, rel=2e-5, abs=1e-5)


def test_all_ids_kept_is_the_dense_divergence_with_the_same_gradient() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(4, 9, dtype=torch.float64)
    gradients = []
    for temperature in (1.0, 2.0):
        for which in ("topk", "dense"):
            student = torch.linspace(-2, 2, 36, dtype=torch.float64).reshape(4, 9).requires_grad_()
            if which == "topk":
                lp, ids = teacher.log_softmax(-1).sort(-1, descending=True)
                loss = kl_topk(student, ids, lp, torch.full((4,), -torch.inf), temperature).total
            else:
                loss = kl_dense(student, teacher, temperature).total
            (gradient,) = torch.autograd.grad(loss, student)
            gradients.append((float(loss.detach()), gradient))
    for (a, ga), (b, gb) in (gradients[0:2], gradients[2:4]):
        assert a == pytest.approx(b, rel=1e-12)
        torch.testing.assert_close(ga, gb, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [2, 5, 7])
def test_gradient_of_the_tail_bucket_is_right(k: int) -> None:
    torch.manual_seed(k)
    lp, ids = torch.randn(3, 7, dtype=torch.float64).log_softmax(-1).topk(k)
    tail = torch.log1p(-lp.exp().sum(-1)) if k < 7 else torch.full((3,), -torch.inf, dtype=torch.float64)
    student = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kl_topk(x, ids, lp, tail).total, student)
    s = student.detach().softmax(-1)
    (gradient,) = torch.autograd.grad(kl_topk(student, ids, lp, tail).total, student)
    on = s.gather(1, ids) - lp.exp()  # notes/kd-training.md 3: s - t on the support
    torch.testing.assert_close(gradient.gather(1, ids), on, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 10),
    tail=st.one_of(st.just(-np.inf), st.floats(-80, -1e-6)),
    spread=st.floats(0, 60),
    shift=st.floats(-100, 100),
    gone=st.integers(0, 9),
)
def test_no_edge_of_the_tail_gives_nan_or_a_negative_divergence(
    k: int, tail: float, spread: float, shift: float, gone: int
) -> None:
    torch.manual_seed(k)
    logits = (torch.randn(1, 10) * spread + shift).requires_grad_()
    ids = torch.randperm(10)[None, :k]
    share = torch.randn(k).sort(descending=True).values.log_softmax(-1)[None]
    logprobs = share + (np.log1p(-np.exp(tail)) if tail > -np.inf else 0.0)
    gone = min(gone, k - 1)
    logprobs[:, k - gone :] = -torch.inf
    logprobs = logprobs - logprobs.logsumexp(-1, keepdim=True) + (np.log1p(-np.exp(tail)) if tail > -np.inf else 0.0)
    loss = kl_topk(logits, ids, logprobs, torch.tensor([tail])).total
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    assert float(loss.detach()) >= -1e-4 or (k == 10 and tail > -np.inf)


def test_padded_entries_change_nothing() -> None:
    torch.manual_seed(0)
    student = torch.randn(3, 11, requires_grad=True)
    ids, lp, tail = _stored(torch.randn(3, 11), 4)
    wide_ids = torch.cat([ids, torch.full((3, 2), -1)], 1)
    wide_lp = torch.cat([lp, torch.full((3, 2), -torch.inf)], 1)
    a, b = kl_topk(student, ids, lp, tail).total, kl_topk(student, wide_ids, wide_lp, tail).total
    ga, gb = (torch.autograd.grad(x, student)[0] for x in (a, b))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ga, gb, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("k", [1, 8, 500, 512])
def test_a_student_that_is_its_teacher_scores_zero_with_no_gradient(k: int) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(6, 512) * 4).requires_grad_()
    found = kl_topk(logits, *_stored(logits.detach(), k)).total
    (gradient,) = torch.autograd.grad(found, logits)
    assert abs(float(found.detach())) < 2e-5 and float(gradient.abs().max()) < 1e-6
    assert abs(float(kl_dense(logits, logits, 3.0).total.detach())) < 1e-5


def test_mass_off_the_support_is_seen() -> None:
    """Renormalising both sides would give 0 here."""
    teacher = torch.tensor([[4.0, 4.0, 0.0, 0.0, 0.0]])
    student = torch.tensor([[0.0, 0.0, 6.0, 6.0, 6.0]])
    assert float(kl_topk(student, *_stored(teacher, 2)).total) > 4


def test_a_temperature_needs_an_empty_tail() -> None:
    with pytest.raises(ValueError, match="tail"):
        kl_topk(torch.randn(1, 9), *_stored(torch.randn(1, 9), 3), temperature=2.0)


def test_bf16_logits_are_computed_in_fp32() -> None:
    torch.manual_seed(0)
    low = (torch.randn(64, 300) * 3).bfloat16()
    stored = _stored(torch.randn(64, 300) * 3, 20)
    assert torch.equal(kl_topk(low, *stored).total, kl_topk(low.float(), *stored).total)
    labels = torch.arange(64)
    assert torch.equal(cross_entropy(low, labels).total, cross_entropy(low.float(), labels).total)


def test_total_is_the_weighted_sum_over_one_denominator() -> None:
    terms = {"kl_div": Term(torch.tensor(3.0), 2), "ce_teacher": Term(torch.tensor(8.0), 4)}
    assert float(weighted_total(terms, {"kl_div": 0.5, "ce_teacher": 0.25, "ce_ground_truth": 9.0}, 4)) == 0.875
