"""The losses: pure functions of logits and targets that return a sum and how many tokens it is over.

Nothing here divides: the loop divides once a step, by the tokens of its whole accumulation window. Everything is
computed in fp32 or better. Names are fixed: kl_div, ce_teacher, ce_ground_truth, total.

Shapes: N target tokens, V vocabulary, K stored ids a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

COMPONENTS = ("kl_div", "ce_teacher", "ce_ground_truth")
TOTAL = "total"


class Term(NamedTuple):
    """A sum over tokens and the number of tokens in it."""

    total: Tensor
    tokens: int


def kl_topk(
    logits_NV: Tensor, topk_ids_NK: Tensor, topk_logprobs_NK: Tensor, tail_logprob_N: Tensor, temperature: float = 1.0
) -> Term:
    """KL(teacher || student) over K+1 classes: the stored ids, and everything else as one.

    A lower bound of the full divergence with the right fixed point. `topk_logprobs` are natural logarithms; an id
    below 0 or a log-probability of -inf is padding. `tail_logprob` is log(1 - sum of the stored probabilities), -inf
    where nothing is left. The student's tail is a logsumexp over the other ids, never 1 - sum.
    At a temperature other than 1 the teacher's tail would be needed at that temperature: ValueError unless it is empty.
    """
    logits = _wide(logits_NV)
    lp, tail = topk_logprobs_NK.to(logits.dtype), tail_logprob_N.to(logits.dtype)
    if temperature != 1.0:
        if bool((tail > -torch.inf).any()):
            raise ValueError(
                f"temperature {temperature} needs the teacher's tail at that temperature; only T = 1 is stored"
            )
        logits = logits / temperature
        lp = (lp / temperature).log_softmax(-1)
    present = (topk_ids_NK >= 0) & (lp > -torch.inf)
    ids = torch.where(topk_ids_NK >= 0, topk_ids_NK, topk_ids_NK[:, :1]).long()
    log_student_NK, log_rest_N = _split(logits, ids)
    lp = torch.where(present, lp, 0.0)  # inputs, not outputs: 0 * (-inf) would poison the gradient
    kept = torch.where(present, lp.exp() * (lp - log_student_NK), 0.0).sum()
    has_tail = (tail > -torch.inf) & (log_rest_N > -torch.inf)
    tail = torch.where(has_tail, tail, 0.0)
    rest = torch.where(has_tail, tail.exp() * (tail - torch.where(has_tail, log_rest_N, 0.0)), 0.0).sum()
    return Term((kept + rest) * temperature**2, logits.shape[0])


def kl_dense(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0) -> Term:
    """KL(teacher || student) over the whole vocabulary, times temperature squared (Hinton et al. 2015)."""
    log_s = (_wide(student_logits_NV) / temperature).log_softmax(-1)
    log_t = (_wide(teacher_logits_NV) / temperature).log_softmax(-1)
    total = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    return Term(total * temperature**2, log_s.shape[0])


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Term:
    """-log p(target), summed."""
    return Term(F.cross_entropy(_wide(logits_NV), targets_N.long(), reduction="sum"), targets_N.shape[0])


def weighted_total(terms: dict[str, Term], weights: dict[str, float], denominator: int) -> Tensor:
    """The objective: sum over components of weight * sum / denominator, one denominator for all of them."""
    return torch.stack([weights[name] * term.total for name, term in terms.items()]).sum() / denominator


def _split(logits_NV: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The student's log-probabilities of the stored ids [N, K], and of all others together [N] (-inf if none)."""
    support_NK = logits_NV.gather(1, ids_NK)
    others_NV = logits_NV.scatter(1, ids_NK, -torch.inf)
    empty_N = others_NV.detach().amax(-1) == -torch.inf
    if bool(empty_N.any()):  # such a row has no logsumexp gradient (0/0): take it out before, not after
        others_NV = torch.where(empty_N[:, None], 0.0, others_NV)
    lse_others_N = torch.where(empty_N, -torch.inf, others_NV.logsumexp(-1))
    first = torch.ones_like(ids_NK, dtype=torch.bool)
    first[:, 1:] = ids_NK[:, 1:] != ids_NK[:, :1]  # padding repeats the first id: count it once
    lse_support_N = torch.where(first, support_NK, -torch.inf).logsumexp(-1)
    lse_N = _logaddexp(lse_support_N, lse_others_N)
    return support_NK - lse_N[:, None], lse_others_N - lse_N


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b) for finite `a` and `b` finite or -inf, with finite gradients."""
    gone = b == -torch.inf
    return torch.where(gone, a, torch.logaddexp(a, torch.where(gone, a, b)))


def _wide(x: Tensor) -> Tensor:
    """At least fp32; fp64 stays (the tests' oracle)."""
    return x if x.dtype == torch.float64 else x.float()
