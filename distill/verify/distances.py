"""How far one next-token distribution is from another, token by token; and what that says of all text like it.

With p the reference's distribution and q the other's, both softmax of logits, in float64 and in nats:

    KL              sum over v of p_v (log p_v - log q_v)
    top-1           1 where the best token of p is the best of q
    top-k           share of the k best tokens of p that are among the k best of q
    top-1 in top-k  1 where the best token of p is among the k best of q
    NLL             -log of what a model gives the text's token; perplexity is exp of its mean, and the ratio of two
                    perplexities exp of the mean difference

A tie goes to the lowest id, as in greedy decoding. A row of q with a logit that is not finite gives no distribution:
its KL and NLL are infinite, and it agrees with nothing.

Tokens of one record depend on one another, so intervals come from drawing records anew (Efron 1979, the percentile
interval), each time as many as there are; every statistic sees the same draws.

Shapes: N target tokens, V vocabulary, K kept entries, R records, B draws.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DRAWS = 2000
CONFIDENCE = 0.95
_SEED = 20261123

Floats = NDArray[np.float64]


class Distances(NamedTuple):
    """Of each target token [N], between two models."""

    kl: Floats
    top1: Floats
    topk: Floats
    top1_in_topk: Floats


class Estimate(NamedTuple):
    """A statistic and its 95% interval over records."""

    value: float
    low: float
    high: float


def log_probabilities(logits_NV: Tensor) -> Tensor:
    """log softmax in float64; rows with a logit that is not finite are NaN."""
    logits = logits_NV.double()
    return logits.masked_fill(~logits.isfinite().all(1, keepdim=True), math.nan).log_softmax(1)


def best(log_q_NV: Tensor, k: int) -> Tensor:
    """Ids [N, k] of the likeliest tokens in order; of equals, the lowest id first."""
    rest, ids = log_q_NV.clone(), []
    for _ in range(k):
        ids.append(rest.argmax(1))
        rest.scatter_(1, ids[-1][:, None], -math.inf)
    return torch.stack(ids, 1)


def distances(log_p_NV: Tensor, log_q_NV: Tensor, k: int) -> Distances:
    """From the reference's log-probabilities to the other's."""
    broken_N = log_q_NV[:, 0].isnan()
    kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(1).masked_fill(broken_N, math.inf)
    p_Nk, q_Nk = best(log_p_NV, k), best(log_q_NV, k)
    both_Nkk = (p_Nk[:, :, None] == q_Nk[:, None, :]) & ~broken_N[:, None, None]
    agree = both_Nkk[:, 0, 0], both_Nkk.any(2).double().mean(1), both_Nkk[:, 0].any(1)
    return Distances(kl_N.numpy(), *(found.double().numpy() for found in agree))


def negative_log_likelihood(log_q_NV: Tensor, labels_N: Tensor) -> Floats:
    """NLL [N] of the text's tokens."""
    nll_N = -log_q_NV.gather(1, labels_N[:, None])[:, 0]
    out: Floats = nll_N.masked_fill(nll_N.isnan(), math.inf).numpy()
    return out


def kl_from_stored(ids_NK: Tensor, logprobs_NK: Tensor, tail_N: Tensor, log_q_NV: Tensor) -> Floats:
    """KL(teacher || q) [N] over K + 1 classes: each kept id (those below 0 are padding), and all others as one.

    The teacher's entries are divided by their sum, which storing them rounded. Never more than over single tokens.
    """
    kept_NK = ids_NK >= 0
    ids = torch.where(kept_NK, ids_NK, ids_NK[:, :1]).clamp(min=0)
    rest_N = log_q_NV.scatter(1, ids, -math.inf).logsumexp(1)
    log_q = torch.cat([log_q_NV.gather(1, ids), rest_N[:, None]], 1)
    log_t = torch.cat([logprobs_NK.double().masked_fill(~kept_NK, -math.inf), tail_N.double()[:, None]], 1)
    log_t = log_t.log_softmax(1)
    terms = torch.where(log_t > -math.inf, log_t.exp() * (log_t - log_q), 0.0)
    kl_N = terms.sum(1)
    out: Floats = kl_N.masked_fill(log_q_NV[:, 0].isnan(), math.inf).numpy()
    return out


class Records:
    """The records that tokens come from, drawn anew with replacement: the same draws for every statistic of theirs."""

    def __init__(self, record_N: NDArray[np.int64]) -> None:
        _, self.of_N = np.unique(record_N, return_inverse=True)
        self.tokens_R = np.bincount(self.of_N)
        records = len(self.tokens_R)
        generator = np.random.default_rng(_SEED)
        self.drawn_BR = generator.multinomial(records, np.full(records, 1 / records), size=DRAWS)

    def sums(self, values_N: Floats) -> Floats:
        """[R]."""
        return np.bincount(self.of_N, values_N).astype(np.float64)

    def mean(self, values_N: Floats) -> Estimate:
        """Over tokens; infinite where one of them is."""
        if not np.isfinite(values_N).all():
            return Estimate(math.inf, math.inf, math.inf)
        means_B = self.drawn_BR @ self.sums(values_N) / (self.drawn_BR @ self.tokens_R)
        return self._estimate(float(values_N.mean()), means_B)

    def ratio(self, difference_N: Floats) -> Estimate:
        """exp of the mean: of two perplexities, from the difference of their NLL."""
        return Estimate(*(math.exp(bound) if bound < 700 else math.inf for bound in self.mean(difference_N)))

    def percentile(self, values_N: Floats, percent: int) -> Estimate:
        """The least value that at least so many percent of tokens do not exceed."""
        order = np.argsort(values_N, kind="stable")
        values, of = values_N[order], self.of_N[order]

        def found(weight_N: NDArray[np.int64]) -> float:
            cumulative = np.cumsum(weight_N)
            return float(values[np.searchsorted(cumulative, -(-percent * cumulative[-1] // 100))])

        return self._estimate(found(np.ones_like(of)), np.array([found(drawn_R[of]) for drawn_R in self.drawn_BR]))

    def _estimate(self, value: float, values_B: Floats) -> Estimate:
        values_B = np.sort(values_B)  # np.quantile interpolates, and makes NaN of two infinities
        outside = (1 - CONFIDENCE) / 2 * len(values_B)
        return Estimate(value, float(values_B[int(outside)]), float(values_B[-1 - int(outside)]))
