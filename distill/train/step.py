"""One step: the window's loss and its gradient, and the same sums without gradient for held-out evaluation.

Every sum is divided once, by the target tokens of the whole window (each counted by its span's weight), so the result
does not depend on how the window is cut up into micro-batches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from distill.data.batches import Batch
from distill.model import Student
from distill.train.objective import Objective, Sums


def gradients(student: Student, window: Sequence[Batch], objective: Objective) -> Sums:
    """Add the window's gradient to the parameters' `.grad` and return its sums."""
    denominator = objective.denominator(window)
    found = []
    for batch in window:
        hidden_ND = _hidden(student, batch, objective)
        losses = objective.losses(hidden_ND, student.lm_head.weight, batch, denominator)
        losses.total.backward()
        found.append(objective.sums(losses, batch))
    return Sums.add_up(found)


@torch.no_grad()
def evaluate(student: Student, batches: Iterable[Batch], objective: Objective) -> Sums:
    """The sums over `batches`, without gradients; all spans alike, whatever they weigh in training."""
    training, found, objective = student.training, [], objective._replace(span_weights={})
    student.eval()
    for batch in batches:
        losses = objective.losses(_hidden(student, batch, objective), student.lm_head.weight, batch, batch.targets)
        found.append(objective.sums(losses, batch))
    student.train(training)
    return Sums.add_up(found)


def _hidden(student: Student, batch: Batch, objective: Objective) -> Tensor:
    """The hidden states that the targets are predicted from, [N, D]."""
    with precision(objective.dtype, batch.ids_T.device):
        hidden_TD = student.hidden(batch.ids_T[None], lengths=batch.lengths)[0]
    return hidden_TD.index_select(0, batch.positions_N)


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
