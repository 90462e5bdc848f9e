"""Divergences written plainly from their definitions, for autograd: the oracle in fp64, the naive form in fp32."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distill.train.divergences import Divergence
from distill.train.targets import Dense, Sampled, Target, TopK


class Case(NamedTuple):
    """A loss over N tokens: both weights are per token."""

    hidden_ND: Tensor
    weight_VD: Tensor
    target: Target | None
    how: Divergence
    divergence_weight_N: Tensor
    labels_N: Tensor | None
    cross_entropy_weight_N: Tensor
    vocabulary: int


class Answer(NamedTuple):
    """The loss and its gradients."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mixture(log_p: Tensor, log_q: Tensor, share_of_p: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(share_of_p), log_q + math.log(1 - share_of_p))


def by_definition(how: Divergence, log_t: Tensor, log_s: Tensor) -> Tensor:
    """The divergence of each row, with T squared (not for tvd)."""
    a, squared = how.share, how.temperature**2
    match how.kind:
        case "forward_kl":
            return kl(log_t, log_s) * squared
        case "reverse_kl":
            return kl(log_s, log_t) * squared
        case "jsd":
            m = mixture(log_t, log_s, a)
            return (a * kl(log_t, m) + (1 - a) * kl(log_s, m)) * squared
        case "skew_kl":
            return kl(log_t, mixture(log_t, log_s, a)) * squared
        case "skew_reverse_kl":
            return kl(log_s, mixture(log_s, log_t, a)) * squared
        case "tvd":
            return (log_t.exp() - log_s.exp()).abs().sum(-1) / 2


def with_rest(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the ids and, last, of all others together."""
    rest = logits.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(1, ids), rest], 1).log_softmax(-1)


def divergence_of(case: Case, z: Tensor) -> Tensor:
    """The divergence of each token, from the student's logits."""
    how, target, temperature = case.how, case.target, case.how.temperature
    if isinstance(target, Dense):
        teacher = (target.hidden_NE.to(z.dtype) @ target.weight_VE.to(z.dtype).T)[:, : case.vocabulary]
        return by_definition(how, (teacher / temperature).log_softmax(-1), (z / temperature).log_softmax(-1))
    if isinstance(target, TopK):
        log_t = torch.cat([target.logprobs_NK, target.tail_N[:, None]], 1).to(z.dtype)
        return by_definition(how, log_t, with_rest(z / temperature, target.ids_NK))
    assert isinstance(target, Sampled)
    log_s = (z / temperature).log_softmax(-1).gather(1, target.ids_NK)
    return (target.weights_NK * (target.logprobs_NK - log_s)).sum(-1) * temperature**2


def plainly(case: Case, dtype: torch.dtype) -> Answer:
    """Loss and gradients by autograd over the whole logits."""
    hidden = case.hidden_ND.detach().to(dtype).requires_grad_()
    weight = case.weight_VD.detach().to(dtype).requires_grad_()
    z = (hidden @ weight.T)[:, : case.vocabulary]
    loss = z.new_zeros(())
    if case.target is not None:
        loss = loss + (divergence_of(case, z) * case.divergence_weight_N).sum()
    if case.labels_N is not None:
        ce = torch.nn.functional.cross_entropy(z, case.labels_N, reduction="none")
        loss = loss + (ce * case.cross_entropy_weight_N).sum()
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return Answer(loss.detach(), hidden.grad, weight.grad)


def top_k(logits: Tensor, k: int) -> TopK:
    """The likeliest k and the mass of the others, computed in fp64."""
    log_p = logits.double().log_softmax(-1)
    values, ids = log_p.topk(k)
    tail = log_p.scatter(1, ids, -torch.inf).logsumexp(-1)
    return TopK(ids, values.float(), tail.float())


def sampled(logits: Tensor, draws: int, generator: torch.Generator) -> Sampled:
    """Draws with replacement, each counting 1 / draws."""
    log_p = logits.log_softmax(-1)
    ids = torch.multinomial(log_p.exp(), draws, replacement=True, generator=generator)
    return Sampled(ids, log_p.gather(1, ids), torch.full(ids.shape, 1 / draws))


def error(found: Tensor | None, exact: Tensor) -> float:
    """Normwise relative error."""
    assert found is not None
    return float((found.double() - exact).norm() / exact.norm())
