"""The objective of a run: which divergence, what each component weighs, and the sums that a step reports.

Names of the components are fixed: kl_div (whatever the divergence is), ce_teacher, ce_ground_truth; total is their
weighted sum over one denominator, the target tokens of the whole step.

Shapes: N target tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.data.batches import Batch
from distill.train.divergence import Losses, linear_divergence
from distill.train.divergences import Divergence
from distill.train.targets import TopK

COMPONENTS = ("kl_div", "ce_teacher", "ce_ground_truth")
TOTAL = "total"


class Objective(NamedTuple):
    """How a batch becomes a loss: components of weight 0 are not computed.

    The student's softmax is over every row of its head, as it will be when it is deployed: rows that no token has learn
    to stay silent.
    """

    weights: dict[str, float]
    divergence: Divergence = Divergence()
    dtype: str = "fp32"
    chunk: int | None = None
    """Tokens whose logits exist at one time; None: the operator's choice."""

    def losses(self, hidden_ND: Tensor, head_VD: Tensor, batch: Batch, denominator: float) -> Losses:
        """The losses of a batch's targets, each divided by the step's denominator."""
        share = {name: weight / denominator for name, weight in self.weights.items() if weight}
        masks = {"ce_teacher": batch.teacher_N, "ce_ground_truth": batch.ground_truth_N}
        ce_weight_N = sum((share[name] * mask_N for name, mask_N in masks.items() if name in share), torch.zeros(()))
        divergence = "kl_div" in share and bool(batch.has_distribution_N.any())
        target = TopK(batch.topk_ids_NK, batch.topk_logprobs_NK, batch.tail_logprob_N) if divergence else None
        return linear_divergence(
            hidden_ND, head_VD, target=target, divergence=self.divergence,
            divergence_weight_N=share["kl_div"] * batch.has_distribution_N if divergence else None,
            labels_N=batch.labels_N, cross_entropy_weight_N=ce_weight_N.expand(len(batch.labels_N)),
            chunk=self.chunk, operands=torch.bfloat16 if self.dtype == "bf16" else None,
        )  # fmt: skip

    def sums(self, losses: Losses, batch: Batch) -> Sums:
        """The components' plain sums."""
        of = {
            "kl_div": (losses.divergence_N, batch.has_distribution_N),
            "ce_teacher": (losses.cross_entropy_N, batch.teacher_N),
            "ce_ground_truth": (losses.cross_entropy_N, batch.ground_truth_N),
        }
        found = {
            name: (float(value_N[mask_N].sum(dtype=torch.float64)), int(mask_N.sum()))
            for name, (value_N, mask_N) in of.items()
            if self.weights.get(name) and value_N is not None and bool(mask_N.any())
        }
        return Sums({k: total for k, (total, _) in found.items()}, {k: n for k, (_, n) in found.items()}, batch.targets)


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

    @staticmethod
    def add_up(parts: Sequence[Sums]) -> Sums:
        """Those of several batches."""
        names = [name for name in COMPONENTS if any(name in part.sums for part in parts)]
        sums = {name: math.fsum(part.sums.get(name, 0.0) for part in parts) for name in names}
        counts = {name: sum(part.counts.get(name, 0) for part in parts) for name in names}
        return Sums(sums, counts, sum(part.tokens for part in parts))
