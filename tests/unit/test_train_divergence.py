"""The divergence operator against the plain computation in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.train.divergence import linear_divergence
from distill.train.divergences import Divergence, Kind
from distill.train.targets import Dense, Sampled, Target, TopK
from tests.unit.divergence_oracle import Answer, Case, error, plainly, sampled, top_k

KINDS: tuple[Kind, ...] = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")
N, D, V, PADDING = 48, 32, 700, 20


def operator(case: Case, chunk: int | None = 16, scale: float = 1.0) -> Answer:
    hidden = case.hidden_ND.detach().clone().requires_grad_()
    weight = case.weight_VD.detach().clone().requires_grad_()
    found = linear_divergence(
        hidden, weight, target=case.target, divergence=case.how, divergence_weight_N=case.divergence_weight_N,
        labels_N=case.labels_N, cross_entropy_weight_N=case.cross_entropy_weight_N, vocabulary=case.vocabulary,
        chunk=chunk,
    )  # fmt: skip
    (found.total * scale).backward()
    assert hidden.grad is not None and weight.grad is not None
    return Answer(found.total.detach(), hidden.grad, weight.grad)


def a_case(kind: Kind, form: str, *, distance: float = 1.0, temperature: float = 1.0, ce: bool = False,
           mix: float | None = None, seed: int = 0) -> Case:  # fmt: skip
    """A student whose logits differ from the teacher's by about `distance`; some tokens weigh nothing."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V + PADDING, D, generator=g) * 0.5
    theirs = weight + distance * torch.randn(weight.shape, generator=g) / D**0.5
    theirs = torch.cat([theirs[:V], torch.randn(PADDING + 7, D, generator=g)])  # padding of its own
    logits = (hidden @ theirs.T)[:, :V] / temperature
    target: Target = Dense(hidden.clone(), theirs)
    if form == "top_k":
        target = top_k(logits, 12)
    elif form == "sampled":
        target = sampled(logits, 24, g)
    weights = torch.rand(2, N, generator=g) / N
    weights[0, :7], weights[1, 4:11] = 0, 0
    labels = torch.randint(0, V, (N,), generator=g) if ce else None
    return Case(hidden, weight, target, Divergence(kind, mix, temperature), weights[0], labels, weights[1], V)


def cases() -> list[tuple[Kind, str]]:
    return [(kind, form) for form in ("dense", "top_k") for kind in KINDS] + [("forward_kl", "sampled")]


@pytest.mark.parametrize("distance", [1e-2, 0.3, 3.0])
@pytest.mark.parametrize(("kind", "form"), cases())
def test_gradients_are_as_exact_as_the_naive_computation(kind: Kind, form: str, distance: float) -> None:
    ours, naive = [], []  # over some students: one sign of s - t more or less is all that total variation has of error
    for seed in range(4):
        case = a_case(kind, form, distance=distance, seed=seed)
        exact, plain, found = plainly(case, torch.float64), plainly(case, torch.float32), operator(case)
        ours.append((error(found.hidden, exact.hidden), error(found.weight, exact.weight)))
        naive.append((error(plain.hidden, exact.hidden), error(plain.weight, exact.weight)))
        assert abs(found.loss - exact.loss) <= 2e-6 * abs(exact.loss) + 1e-7 * float(case.divergence_weight_N.sum())
    floor = 1e-7  # of fp32 itself
    for mine, theirs in zip(torch.tensor(ours).square().mean(0).sqrt(), torch.tensor(naive).square().mean(0).sqrt()):
        assert mine <= 1.5 * max(theirs, floor)


UNEVEN: list[tuple[Kind, float | None]] = [
    ("skew_kl", None), ("skew_kl", 0.01), ("skew_kl", 0.9), ("jsd", 0.001), ("jsd", 0.999), ("skew_reverse_kl", 0.01),
]  # fmt: skip


@pytest.mark.parametrize("distance", [0.1, 10.0, 25.0])
@pytest.mark.parametrize("form", ["dense", "top_k"])
@pytest.mark.parametrize(("kind", "mix"), UNEVEN)
def test_uneven_mixtures_and_far_students_are_as_exact(kind: Kind, mix: float, form: str, distance: float) -> None:
    """A share of t in m of nearly 0 or 1, t / m of nearly 0: what a difference from 1 would lose."""
    ours, naive = [], []
    for seed in range(4):
        case = a_case(kind, form, distance=distance, seed=seed, mix=mix)
        exact, plain, found = plainly(case, torch.float64), plainly(case, torch.float32), operator(case)
        ours.append((error(found.hidden, exact.hidden), error(found.weight, exact.weight)))
        naive.append((error(plain.hidden, exact.hidden), error(plain.weight, exact.weight)))
    most = 1.5
    for mine, theirs in zip(torch.tensor(ours).median(0).values, torch.tensor(naive).median(0).values):
        assert mine <= most * max(theirs, 2e-7)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("ce", [False, True])
@pytest.mark.parametrize(("kind", "form"), cases())
def test_temperature_and_cross_entropy_in_the_same_pass(kind: Kind, form: str, ce: bool, temperature: float) -> None:
    case = a_case(kind, form, distance=1.0, temperature=temperature, ce=ce)
    exact, found = plainly(case, torch.float64), operator(case)
    assert error(found.hidden, exact.hidden) < 4e-6
    assert error(found.weight, exact.weight) < 4e-6
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("kind", "form"), cases())
def test_in_fp64_the_formulae_are_exact(kind: Kind, form: str) -> None:
    wide = a_case(kind, form, distance=0.5, ce=True, mix=0.3 if kind in ("jsd", "skew_kl", "skew_reverse_kl") else None)
    hidden, weight = wide.hidden_ND.double(), wide.weight_VD.double()
    case = wide._replace(hidden_ND=hidden, weight_VD=weight)
    exact, found = plainly(case, torch.float64), operator(case)
    assert error(found.hidden, exact.hidden) < 1e-13 and error(found.weight, exact.weight) < 1e-13
    torch.testing.assert_close(found.loss, exact.loss, rtol=1e-13, atol=0)


@given(chunk=st.integers(1, 60), cut=st.integers(0, N), seed=st.integers(0, 9), which=st.sampled_from(cases()))
@settings(deadline=None, max_examples=40)
def test_loss_and_gradient_do_not_depend_on_how_the_tokens_are_cut_up(
    chunk: int, cut: int, seed: int, which: tuple[Kind, str]
) -> None:
    case = a_case(*which, seed=seed, ce=True)
    whole = operator(case, chunk=None)
    parts = [operator(only(case, part), chunk) for part in (slice(0, cut), slice(cut, N)) if part.stop - part.start]
    assert error(sum(p.loss for p in parts), whole.loss.double()) < 1e-6  # type: ignore[arg-type]
    assert error(torch.cat([p.hidden for p in parts]), whole.hidden.double()) < 1e-6
    assert error(sum(p.weight for p in parts), whole.weight.double()) < 1e-6  # type: ignore[arg-type]


def only(case: Case, part: slice) -> Case:
    """Some of its tokens."""
    target: Target | None = case.target
    if isinstance(target, Dense):
        target = target._replace(hidden_NE=target.hidden_NE[part])
    elif target is not None:
        target = type(target)(*(x[part] for x in target))
    assert case.labels_N is not None
    return case._replace(
        hidden_ND=case.hidden_ND[part], target=target, labels_N=case.labels_N[part],
        divergence_weight_N=case.divergence_weight_N[part], cross_entropy_weight_N=case.cross_entropy_weight_N[part],
    )  # fmt: skip


def test_padding_rows_of_the_vocabulary_get_no_probability_and_no_gradient() -> None:
    case = a_case("forward_kl", "dense", ce=True)
    loud = case.weight_VD.clone()
    loud[V:] = 30.0
    found = operator(case._replace(weight_VD=loud))
    assert torch.equal(found.loss, operator(case).loss)
    assert not found.weight[V:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(kind: Kind) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    case = Case(hidden, weight, Dense(hidden, weight), Divergence(kind), torch.ones(N), None, torch.ones(N), V)
    found = operator(case)
    assert float(found.loss) == 0.0 and not found.hidden.any() and not found.weight.any()


def test_padding_of_a_row_and_rows_without_distribution_change_nothing() -> None:
    case = a_case("forward_kl", "top_k", ce=True)
    assert isinstance(case.target, TopK)
    ids, lp, tail = case.target
    wider = TopK(torch.cat([ids, torch.full((N, 3), -1)], 1), torch.cat([lp, torch.full((N, 3), -torch.inf)], 1), tail)
    assert error(operator(case._replace(target=wider)).weight, operator(case).weight.double()) < 1e-6
    nothing = TopK(torch.full_like(ids, -1), torch.full_like(lp, -torch.inf), torch.full_like(tail, -torch.inf))
    quiet = case._replace(target=nothing, divergence_weight_N=torch.zeros(N))
    alone = case._replace(target=None)
    torch.testing.assert_close(operator(quiet).weight, operator(alone).weight, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_far_students_and_vanished_masses_stay_finite(kind: Kind) -> None:
    case = a_case(kind, "top_k", distance=0.1, ce=True)
    assert isinstance(case.target, TopK)
    for factor in (200.0, -200.0):
        for tail in (case.target.tail_N, torch.full((N,), -torch.inf)):
            found = operator(case._replace(weight_VD=case.weight_VD * factor, target=case.target._replace(tail_N=tail)))
            assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_of_the_whole_vocabulary_is_the_dense_target(kind: Kind) -> None:
    case = a_case(kind, "dense")
    assert isinstance(case.target, Dense)
    logits = (case.target.hidden_NE @ case.target.weight_VE.T)[:, :V]
    everything = top_k(logits, V)
    assert bool((everything.tail_N == -torch.inf).all())
    a, b = operator(case), operator(case._replace(target=everything))
    assert error(b.hidden, a.hidden.double()) < 2e-6 and error(b.weight, a.weight.double()) < 2e-6


def test_the_gradient_is_scaled_in_the_backward_pass_and_taken_once() -> None:
    case = a_case("jsd", "dense")
    once, thrice = operator(case), operator(case, scale=3.0)
    torch.testing.assert_close(thrice.weight, 3 * once.weight)
    hidden = case.hidden_ND.clone().requires_grad_()
    found = linear_divergence(hidden, case.weight_VD, target=case.target, vocabulary=V)
    found.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken already"):
        found.total.backward()


def test_sampled_targets_have_the_gradient_of_the_whole_distribution_on_average() -> None:
    case = a_case("forward_kl", "dense", distance=0.5)
    assert isinstance(case.target, Dense)
    logits = (case.target.hidden_NE @ case.target.weight_VE.T)[:, :V]
    exact = plainly(case, torch.float64)
    g = torch.Generator().manual_seed(1)
    found = [operator(case._replace(target=sampled(logits, 32, g))) for _ in range(64)]
    few, many = (error(torch.stack([f.hidden for f in found[:n]]).mean(0), exact.hidden) for n in (4, 64))
    assert many < few / 3  # as the square root of 16
    losses = torch.stack([f.loss for f in found])
    assert abs(losses.mean() - exact.loss) < 4 * losses.std() / 8


def test_bf16_inputs_lose_nothing_but_their_own_rounding() -> None:
    case = a_case("forward_kl", "dense", ce=True)
    narrow = case._replace(hidden_ND=case.hidden_ND.bfloat16(), weight_VD=case.weight_VD.bfloat16())
    exact, found = plainly(narrow, torch.float64), operator(narrow)
    assert found.hidden.dtype == torch.bfloat16 and found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=2e-6, atol=0)
    assert error(found.weight, exact.weight) < 3e-3  # bf16 itself: 2**-9


def test_facts_of_each_token_add_up_to_the_loss() -> None:
    case = a_case("reverse_kl", "top_k", ce=True)
    found = linear_divergence(
        case.hidden_ND, case.weight_VD, target=case.target, divergence=case.how, vocabulary=V, labels_N=case.labels_N,
        divergence_weight_N=case.divergence_weight_N, cross_entropy_weight_N=case.cross_entropy_weight_N,
    )  # fmt: skip
    assert found.divergence_N is not None and found.cross_entropy_N is not None and found.support_N is not None
    together = found.divergence_N @ case.divergence_weight_N + found.cross_entropy_N @ case.cross_entropy_weight_N
    torch.testing.assert_close(found.total, together)
    assert not found.divergence_N[:7].any() and bool((found.support_N <= 1).all())
    assert isinstance(case.target, TopK)
    s = (case.hidden_ND @ case.weight_VD.T)[:, :V].softmax(-1).gather(1, case.target.ids_NK).sum(1)
    torch.testing.assert_close(found.support_N[11:], s[11:], rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_named() -> None:
    case = a_case("forward_kl", "sampled")
    hidden, weight = case.hidden_ND, case.weight_VD
    with pytest.raises(ValueError, match="sampled target estimates forward_kl only, not tvd"):
        linear_divergence(hidden, weight, target=case.target, divergence=Divergence("tvd"))
    with pytest.raises(ValueError, match="nothing to compare with"):
        linear_divergence(hidden, weight)
    with pytest.raises(ValueError, match="labels are for 3 tokens"):
        linear_divergence(hidden, weight, labels_N=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="vocabulary 99999"):
        linear_divergence(hidden, weight, labels_N=torch.zeros(N, dtype=torch.long), vocabulary=99999)
    with pytest.raises(ValueError, match="forward_kl mixes nothing"):
        linear_divergence(hidden, weight, target=case.target, divergence=Divergence("forward_kl", 0.5))
    with pytest.raises(ValueError, match="between 0 and 1"):
        linear_divergence(hidden, weight, target=case.target, divergence=Divergence("jsd", 1.0))


def test_padding_may_stand_anywhere_in_a_row() -> None:
    case = a_case("forward_kl", "top_k")
    assert isinstance(case.target, TopK)
    pad_N1 = torch.full((N, 1), -1)
    for padding_id in (pad_N1, pad_N1 * 0):  # no id, or an id that the store has too
        first = TopK(torch.cat([padding_id, case.target.ids_NK], 1),
                     torch.cat([pad_N1 * torch.inf, case.target.logprobs_NK], 1), case.target.tail_N)  # fmt: skip
        found, plain = operator(case._replace(target=first)), operator(case)
        assert error(found.weight, plain.weight.double()) < 1e-6 and found.loss == pytest.approx(float(plain.loss))


def test_a_stored_nan_is_no_padding() -> None:
    case = a_case("forward_kl", "top_k")
    assert isinstance(case.target, TopK)
    logprobs = case.target.logprobs_NK.clone()
    logprobs[20, 3] = torch.nan
    assert operator(case._replace(target=case.target._replace(logprobs_NK=logprobs))).loss.isnan()


def test_a_label_without_weight_may_be_no_id_beside_a_divergence() -> None:
    case = a_case("forward_kl", "dense", ce=True)
    assert case.labels_N is not None
    labels = torch.where(case.cross_entropy_weight_N == 0, -100, case.labels_N)
    assert torch.equal(operator(case._replace(labels_N=labels)).weight, operator(case).weight)


def test_a_token_that_weighs_nothing_may_hold_anything() -> None:
    case = a_case("forward_kl", "dense", ce=True)
    assert case.labels_N is not None
    hidden, labels = case.hidden_ND.clone(), case.labels_N.clone()
    silent = (case.divergence_weight_N == 0) & (case.cross_entropy_weight_N == 0)
    assert bool(silent.any())
    hidden[silent], labels[silent] = torch.nan, -100
    found, plain = operator(case._replace(hidden_ND=hidden, labels_N=labels)), operator(case)
    assert torch.equal(found.weight, plain.weight) and not found.hidden[silent].any()


def test_an_empty_selection_is_zero_and_keeps_the_graph() -> None:
    case = a_case("forward_kl", "dense")
    found = operator(case._replace(divergence_weight_N=torch.zeros(N)))
    assert float(found.loss) == 0 and not found.hidden.any() and not found.weight.any()


def test_a_wrong_factor_would_be_seen() -> None:
    case = a_case("forward_kl", "sampled", distance=1.0, temperature=2.0)
    assert isinstance(case.target, Sampled)
    unscaled = case._replace(target=case.target._replace(weights_NK=case.target.weights_NK / 4))
    exact, found = plainly(case, torch.float64), operator(unscaled)
    assert error(found.hidden, exact.hidden) > 0.1
