"""One step: the window's loss and its gradient, and the same sums without gradient for held-out evaluation.

The head runs on chunks of target tokens: each chunk's logits are made, turned into gradients of the hidden states and
of the head, and dropped, so that [tokens, vocabulary] never exists as a whole. Every sum is divided once, by the
target tokens of the whole window, so the result does not depend on how the window is cut up.

Shapes: N target tokens, D hidden, V vocabulary, K stored ids a token.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.data.batches import Batch
from distill.model import Student
from distill.train import losses
from distill.train.losses import Term


class Objective(NamedTuple):
    """How a batch becomes a loss: components of weight 0 are not computed."""

    weights: dict[str, float]
    temperature: float = 1.0
    chunk: int = 512
    dtype: str = "fp32"


class Sums(NamedTuple):
    """Sums of each component over a window, the tokens in each, and the window's target tokens."""

    sums: dict[str, float]
    counts: dict[str, int]
    tokens: int

    @property
    def means(self) -> dict[str, float]:
        """Each component per token that carries it; one that no token carries is absent, not zero."""
        return {name: self.sums[name] / n for name, n in self.counts.items() if n}

    def total(self, weights: dict[str, float]) -> float:
        """The objective: weighted sums over the window's target tokens."""
        return sum(weights[name] * value for name, value in self.sums.items()) / self.tokens


def gradients(student: Student, window: Sequence[Batch], objective: Objective) -> Sums:
    """Add the window's gradient to the parameters' `.grad` and return its sums."""
    denominator = sum(len(batch.labels_N) for batch in window)
    return _add_up([_backward(student, batch, objective, denominator) for batch in window], denominator)


def _backward(student: Student, batch: Batch, objective: Objective, denominator: int) -> Sums:
    with precision(objective.dtype, batch.ids_BT.device):
        hidden_BTD = student.hidden(batch.ids_BT)
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, batch.positions_N)
    leaf_ND = hidden_ND.detach().requires_grad_()
    parts = []
    for part in _chunks(len(batch.labels_N), objective.chunk):
        terms = chunk_terms(student, leaf_ND, batch, part, objective)
        losses.weighted_total(terms, objective.weights, denominator).backward()
        parts.append(_numbers(terms))
    hidden_ND.backward(leaf_ND.grad)
    return _add_up(parts, denominator)


@torch.no_grad()
def evaluate(student: Student, batches: Iterable[Batch], objective: Objective) -> Sums:
    """The sums over `batches`, without gradients."""
    training, parts, tokens = student.training, [], 0
    student.eval()
    for batch in batches:
        with precision(objective.dtype, batch.ids_BT.device):
            hidden_ND = student.hidden(batch.ids_BT).flatten(0, 1).index_select(0, batch.positions_N)
        for part in _chunks(len(batch.labels_N), objective.chunk):
            parts.append(_numbers(chunk_terms(student, hidden_ND, batch, part, objective)))
        tokens += len(batch.labels_N)
    student.train(training)
    return _add_up(parts, tokens)


def chunk_terms(
    student: Student, hidden_ND: Tensor, batch: Batch, part: slice, objective: Objective
) -> dict[str, Term]:
    """The components of the target tokens in `part`; one that none of them carries is absent."""
    with precision(objective.dtype, hidden_ND.device):
        logits_NV = student.lm_head(hidden_ND[part])
    logits_NV = logits_NV.float()
    masks = {
        "kl_div": batch.has_distribution_N[part],
        "ce_teacher": batch.teacher_N[part],
        "ce_ground_truth": batch.ground_truth_N[part],
    }
    terms: dict[str, Term] = {}
    for name, mask_N in masks.items():
        if not objective.weights.get(name) or not bool(mask_N.any()):
            continue
        everything = bool(mask_N.all())

        def only(x: Tensor, mask_N: Tensor = mask_N, everything: bool = everything) -> Tensor:
            return x if everything else x[mask_N]

        if name == "kl_div":
            ids, lp = only(batch.topk_ids_NK[part]), only(batch.topk_logprobs_NK[part])
            tail = only(batch.tail_logprob_N[part])
            terms[name] = losses.kl_topk(only(logits_NV), ids, lp, tail, objective.temperature)
        elif name == "ce_ground_truth" and "ce_teacher" in terms and torch.equal(mask_N, masks["ce_teacher"]):
            terms[name] = terms["ce_teacher"]  # one text is both
        else:
            terms[name] = losses.cross_entropy(only(logits_NV), only(batch.labels_N[part]))
    if not terms:  # keeps the graph connected: nothing in this chunk has a weight
        terms["ce_teacher"] = Term(logits_NV.sum() * 0.0, 0)
    return terms


@contextlib.contextmanager
def precision(dtype: str, device: torch.device) -> Iterator[None]:
    """bf16 matrix products over fp32 weights; fp32 leaves everything as it is."""
    if dtype == "fp32":
        yield
        return
    with torch.autocast(device.type, dtype=torch.bfloat16):
        yield


def learning_rate(step: int, total: int, *, peak: float, schedule: str, warmup: float, floor: float) -> float:
    """Linear warm-up over `warmup` of the steps, then down to `floor` of the peak. `step` counts from 0."""
    rising = math.ceil(warmup * total)
    if step < rising:
        return peak * (step + 1) / rising
    if schedule == "constant":
        return peak
    done = (step - rising) / max(1, total - 1 - rising)
    share = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return peak * (floor + (1 - floor) * share)


def _chunks(n: int, size: int) -> Iterator[slice]:
    for first in range(0, n, size):
        yield slice(first, min(first + size, n))


def _numbers(terms: dict[str, Term]) -> Sums:
    return Sums({k: float(t.total.detach()) for k, t in terms.items()}, {k: t.tokens for k, t in terms.items()}, 0)


def _add_up(parts: Sequence[Sums], tokens: int) -> Sums:
    names = [name for name in losses.COMPONENTS if any(name in part.sums for part in parts)]
    sums = {name: math.fsum(part.sums.get(name, 0.0) for part in parts) for name in names}
    counts = {name: sum(part.counts.get(name, 0) for part in parts) for name in names}
    return Sums(sums, counts, tokens)
