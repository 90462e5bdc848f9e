"""What the student is compared with: the teacher's whole distribution, its likeliest ids, or draws from it.

And for each of them the block of a divergence: logits in, weighted gradient out, in their place.

Shapes: R tokens of a block, V vocabulary, K stored ids a token, E the teacher's width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distill.train.divergences import LOG_ZERO, Divergence


class Dense(NamedTuple):
    """The teacher's whole distribution: its hidden states and its head, which may have more or fewer padding rows."""

    hidden_NE: Tensor
    weight_VE: Tensor


class TopK(NamedTuple):
    """The teacher's likeliest ids and the mass of all others, at the divergence's temperature.

    An id below 0 or a log-probability of -inf is padding. Ids of a row are distinct. `tail_N` is the log of the mass
    that is not stored, -inf where nothing is left.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_N: Tensor


class Sampled(NamedTuple):
    """Ids drawn from the teacher and what each counts for: an unbiased target (Anshumann et al. 2025, RS-KD).

    Weights of a row add up to 1 in expectation; 0 is padding. Ids may repeat.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    weights_NK: Tensor


Target = Dense | TopK | Sampled


def block_gradient(
    z_RV: Tensor, teacher_RV: Tensor | None, target: Target, at: slice, how: Divergence, weight_R: Tensor,
    ce_weight_R: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """D and logsumexp of each row, and its mass on the support; over `z_RV`, weight * dD/dz + ce_weight * softmax."""
    if isinstance(target, Dense):
        assert teacher_RV is not None
        return _dense(z_RV, teacher_RV, how, weight_R, ce_weight_R)
    if isinstance(target, TopK):
        return _top_k(z_RV, TopK(*(part[at] for part in target)), how, weight_R, ce_weight_R)
    return _sampled(z_RV, Sampled(*(part[at] for part in target)), how, weight_R, ce_weight_R)


def _dense(
    z_RV: Tensor, teacher_RV: Tensor, how: Divergence, weight_R: Tensor, ce_weight_R: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if how.temperature != 1.0:
        teacher_RV.div_(how.temperature)
    _, log_t, t = _softmax(teacher_RV)
    lse_R, log_s, s = _softmax(z_RV)
    value_R, gradient = how.value_and_gradient(log_t, t, log_s, s)
    torch.mul(gradient, weight_R[:, None], out=z_RV)
    if ce_weight_R is not None:
        z_RV.addcmul_(s, ce_weight_R[:, None])
    return value_R, lse_R, torch.ones_like(lse_R)


def _top_k(
    z_RV: Tensor, target: TopK, how: Divergence, weight_R: Tensor, ce_weight_R: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A dense problem of K + 1 classes: the class of all other ids has their logsumexp for its logit, and hands its
    gradient on to them by softmax. 1 - sum is taken nowhere."""
    lp = target.logprobs_NK.to(z_RV.dtype)
    present = (target.ids_NK >= 0) & (lp != -torch.inf)
    one = present.long().argmax(1, keepdim=True)  # padding repeats an id that is present; where none is, the first
    ids = torch.where(present, target.ids_NK, target.ids_NK.gather(1, one).clamp(min=0)).long()
    counted = present.scatter(1, one, True)
    support = torch.where(counted, z_RV.gather(1, ids), -torch.inf)
    top_R = z_RV.scatter_(1, ids, -torch.inf).amax(1).clamp_(min=torch.finfo(z_RV.dtype).min)
    mass_R = z_RV.sub_(top_R[:, None]).exp_().sum(1)
    lse_R, log_s, s = _softmax(torch.cat([support, (top_R + mass_R.log())[:, None]], 1))
    log_s = log_s.masked_fill_(log_s == -torch.inf, LOG_ZERO)
    tail_R = torch.where(mass_R > 0, target.tail_N.to(z_RV.dtype), -torch.inf)  # no other ids: nothing is left
    log_t = torch.cat([torch.where(present, lp, -torch.inf), tail_R[:, None]], 1)
    log_t = log_t.masked_fill_(log_t == -torch.inf, LOG_ZERO)
    value_R, gradient = how.value_and_gradient(log_t, log_t.exp(), log_s, s)
    gradient.mul_(weight_R[:, None])
    if ce_weight_R is not None:
        gradient.addcmul_(s, ce_weight_R[:, None])
    z_RV.mul_((gradient[:, -1] / mass_R.clamp(min=torch.finfo(z_RV.dtype).tiny))[:, None])
    z_RV.scatter_add_(1, ids, torch.where(counted, gradient[:, :-1], 0))
    return value_R, lse_R, s[:, :-1].sum(1)


def _sampled(
    z_RV: Tensor, target: Sampled, how: Divergence, weight_R: Tensor, ce_weight_R: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward KL with what was drawn in the teacher's place: dD/dz = s - (weights at the drawn ids)."""
    count = target.weights_NK.to(z_RV.dtype)
    ids = torch.where(count != 0, target.ids_NK, 0).long()
    drawn = z_RV.gather(1, ids)
    slope_R = weight_R * (how.scale / how.temperature)
    total_R = slope_R * count.sum(1)
    lse_R = softmax_times(z_RV, total_R if ce_weight_R is None else total_R + ce_weight_R)
    z_RV.scatter_add_(1, ids, -slope_R[:, None] * count)
    log_t = torch.where(count != 0, target.logprobs_NK.to(z_RV.dtype), 0)
    value_R = (count * torch.where(count != 0, log_t - (drawn - lse_R[:, None]), 0)).sum(1) * how.scale
    return value_R, lse_R, torch.ones_like(lse_R)


def _softmax(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logsumexp [R], log-probabilities (over `z`) and probabilities. The largest logit and the logarithm of the sum are
    taken off one after the other: their sum would round at the size of the logits."""
    top = z.amax(1, keepdim=True)
    p = z.sub_(top).exp()
    mass = p.sum(1, keepdim=True)
    log_mass = mass.log()
    return (top + log_mass)[:, 0], z.sub_(log_mass), p.div_(mass)


def softmax_times(z_RV: Tensor, weight_R: Tensor | None) -> Tensor:
    """logsumexp [R]; over `z_RV`, weight * softmax."""
    top_R = z_RV.amax(1)
    mass_R = z_RV.sub_(top_R[:, None]).exp_().sum(1)
    if weight_R is not None:
        z_RV.mul_((weight_R / mass_R)[:, None])
    return top_R + mass_R.log()


def top_k(log_p_NV: Tensor, k: int) -> TopK:
    """The likeliest k of whole distributions, and the mass of all others as a logsumexp of theirs."""
    logprobs_NK, ids_NK = log_p_NV.topk(k)
    return TopK(ids_NK, logprobs_NK, log_p_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1))


def sampled(log_p_NV: Tensor, draws: int, generator: torch.Generator, *, exact: int = 0) -> Sampled:
    """Draws with replacement, each counting 1 / draws; the likeliest `exact` as they are, and draws from all others.

    Unbiased either way; the second varies less.
    """
    p_NV = log_p_NV.exp()
    if not exact:
        ids_NK = torch.multinomial(p_NV, draws, replacement=True, generator=generator)
        return Sampled(ids_NK, log_p_NV.gather(1, ids_NK), torch.full_like(ids_NK, 1 / draws, dtype=p_NV.dtype))
    likeliest = top_k(log_p_NV, exact)
    more_NK = torch.multinomial(p_NV.scatter(1, likeliest.ids_NK, 0.0), draws, replacement=True, generator=generator)
    each_NK = (likeliest.tail_N.exp() / draws)[:, None].expand(-1, draws)
    return Sampled(
        torch.cat([likeliest.ids_NK, more_NK], 1),
        torch.cat([likeliest.logprobs_NK, log_p_NV.gather(1, more_NK)], 1),
        torch.cat([likeliest.logprobs_NK.exp(), each_NK], 1),
    )
