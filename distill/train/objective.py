"""The objective of a run: which divergence, what each component and each kind of span weighs, and a step's sums.

Names of the components are fixed: kl_div (whatever the divergence is), ce_teacher, ce_ground_truth; total is their
weighted sum over one denominator, the target tokens of the whole step, each counted by its span's weight.

Shapes: N target tokens, D hidden, V vocabulary, S kinds of span.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.data.batches import Batch
from distill.data.spans import KINDS
from distill.train.alignment import Aligned, aligned_divergence
from distill.train.divergence import Losses, linear_divergence
from distill.train.divergences import Divergence
from distill.train.targets import Target, TopK

COMPONENTS = ("kl_div", "ce_teacher", "ce_ground_truth")
TOTAL = "total"
SUPPORT = "support"
"""The student's mass on the stored ids, per token that has some."""
_NAMES = (*COMPONENTS, SUPPORT, *(f"{component}/{kind}" for component in COMPONENTS for kind in KINDS))


class Objective(NamedTuple):
    """How a batch becomes a loss: components of weight 0, and tokens in spans of weight 0, are not computed.

    The student's softmax is over every row of its head, as it will be when it is deployed: rows that no token has learn
    to stay silent.
    """

    weights: dict[str, float]
    divergence: Divergence = Divergence()
    dtype: str = "fp32"
    chunk: int | None = None
    """Tokens whose logits exist at one time; None: the operator's choice."""
    span_weights: Mapping[str, float] = {}
    """Of a target token, by its kind of span; 1 where none is given."""
    teacher: Callable[[Batch], Target | Aligned] | None = None
    """Gives every target token its distribution, in place of those that are stored."""

    def weight(self, window: Sequence[Batch]) -> float:
        """Target tokens of a window, each counted by its span's weight."""
        return math.fsum(float(self._span_weight_N(batch).sum(dtype=torch.float64)) for batch in window)

    def losses(self, hidden_ND: Tensor, head_VD: Tensor, batch: Batch, denominator: float) -> Losses:
        """The losses of a batch's targets, each divided by the step's denominator."""
        share = {name: weight / denominator for name, weight in self.weights.items() if weight}
        span_weight_N = self._span_weight_N(batch).to(hidden_ND.device)
        masks = {"ce_teacher": batch.teacher_N, "ce_ground_truth": batch.ground_truth_N}
        ce_weight_N = sum((share[name] * mask_N for name, mask_N in masks.items() if name in share), torch.zeros(()))
        carries_N = self._carries_N(batch)
        target = self._target(batch) if "kl_div" in share and bool(carries_N.any()) else None
        operands = torch.bfloat16 if self.dtype == "bf16" else None
        if isinstance(target, Aligned):
            return aligned_divergence(
                hidden_ND, head_VD, target=target, labels_N=batch.labels_N, divergence=self.divergence,
                divergence_weight_N=share["kl_div"] * span_weight_N,
                cross_entropy_weight_N=ce_weight_N * span_weight_N, chunk=self.chunk, operands=operands,
            )  # fmt: skip
        return linear_divergence(
            hidden_ND, head_VD, target=target, divergence=self.divergence,
            divergence_weight_N=share["kl_div"] * carries_N * span_weight_N if target is not None else None,
            labels_N=batch.labels_N, cross_entropy_weight_N=ce_weight_N * span_weight_N,
            chunk=self.chunk, operands=operands,
        )  # fmt: skip

    def sums(self, losses: Losses, batch: Batch) -> Sums:
        """The components' sums over the tokens that weigh something."""
        weight_N = self._span_weight_N(batch)
        found = Sums({}, {}, {}, float(weight_N.sum(dtype=torch.float64)))
        for name, value_N, carries_N in (
            ("kl_div", losses.divergence_N, self._carries_N(batch)),
            ("ce_teacher", losses.cross_entropy_N, batch.teacher_N),
            ("ce_ground_truth", losses.cross_entropy_N, batch.ground_truth_N),
        ):
            mask_N = carries_N.cpu() & (weight_N != 0)
            if self.weights.get(name) and value_N is not None and bool(mask_N.any()):
                found.add(name, value_N.cpu()[mask_N].double(), batch.span_N.cpu()[mask_N], weight_N[mask_N])
        if losses.support_N is not None:
            mask_N = self._carries_N(batch).cpu() & (weight_N != 0)
            found.sums[SUPPORT] = float(losses.support_N.cpu()[mask_N].sum(dtype=torch.float64))
            found.counts[SUPPORT] = int(mask_N.sum())
        return found

    def _target(self, batch: Batch) -> Target | Aligned:
        if self.teacher is not None:
            return self.teacher(batch)
        return TopK(batch.topk_ids_NK, batch.topk_logprobs_NK, batch.tail_logprob_N)

    def _carries_N(self, batch: Batch) -> Tensor:
        """Which tokens carry kl_div."""
        return batch.has_distribution_N if self.teacher is None else torch.ones_like(batch.has_distribution_N)

    def _span_weight_N(self, batch: Batch) -> Tensor:
        """On the CPU."""
        return torch.tensor([self.span_weights.get(kind, 1.0) for kind in KINDS])[batch.span_N.cpu()]


class Sums(NamedTuple):
    """Sums of each component over a window and the tokens in each, also by kind of span as `kl_div/tool_name`."""

    sums: dict[str, float]
    counts: dict[str, int]
    weighted: dict[str, float]
    """Sums of the components, each token times its span's weight."""
    weight: float
    """The window's target tokens, each counted by its span's weight."""

    def add(self, name: str, value_M: Tensor, span_M: Tensor, weight_M: Tensor) -> None:
        """Set a component from the M tokens that carry it."""
        sum_S = torch.zeros(len(KINDS), dtype=value_M.dtype).index_add_(0, span_M, value_M).tolist()
        count_S = torch.bincount(span_M, minlength=len(KINDS)).tolist()
        self.sums[name], self.counts[name] = float(value_M.sum()), len(value_M)
        self.weighted[name] = float((value_M * weight_M).sum())
        for kind, total, n in zip(KINDS, sum_S, count_S):
            if n:
                self.sums[f"{name}/{kind}"], self.counts[f"{name}/{kind}"] = total, n

    @property
    def means(self) -> dict[str, float]:
        """Each component per token that carries it; one that no token carries is absent, not zero."""
        return {name: self.sums[name] / n for name, n in self.counts.items() if name in COMPONENTS}

    @property
    def span_means(self) -> dict[str, float]:
        """The same by kind of span."""
        return {name: self.sums[name] / n for name, n in self.counts.items() if "/" in name}

    @property
    def shown(self) -> dict[str, float]:
        """All there is to show: components, by kind of span, and the student's mass on the stored ids."""
        support = {SUPPORT: self.sums[SUPPORT] / n} if (n := self.counts.get(SUPPORT, 0)) else {}
        return self.means | self.span_means | support

    def total(self, weights: dict[str, float]) -> float:
        """The objective: weighted sums over the window's denominator."""
        return sum(weights[name] * value for name, value in self.weighted.items()) / (self.weight or 1.0)

    @staticmethod
    def add_up(parts: Sequence[Sums]) -> Sums:
        """Those of several batches."""
        sums = _added([part.sums for part in parts])
        counts = {name: int(n) for name, n in _added([part.counts for part in parts]).items()}
        weighted = _added([part.weighted for part in parts])
        return Sums(sums, counts, weighted, math.fsum(part.weight for part in parts))


def _added(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = [name for name in _NAMES if any(name in part for part in parts)]
    return {name: math.fsum(part.get(name, 0.0) for part in parts) for name in names}
