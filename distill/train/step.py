"""One step: the window's loss and its gradient, and the same sums without gradient for held-out evaluation.

Every sum is divided once, by the target tokens of the whole window (each counted by its span's weight), so the result
does not depend on how the window is cut up into micro-batches, nor on how many processes share them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from distill.data.batches import Batch
from distill.model import Student
from distill.train.distributed import ALONE, World
from distill.train.divergence import Losses
from distill.train.objective import Objective, Sums
from distill.train.sharded import Model, inside


def gradients(model: Model, window: Sequence[Batch], objective: Objective, world: World = ALONE) -> Sums:
    """Add the window's gradient to the parameters' `.grad` and return its sums.

    `window` is this process's share of the step; gradient and sums are those of all of it.
    """
    shares = world.gather((objective.weight(window), len(window)))
    denominator = math.fsum(weight for weight, _ in shares) or 1.0
    found = []
    for batch in window:
        losses = inside(model, partial(_losses, batch=batch, objective=objective, denominator=denominator))
        losses.total.backward()
        found.append(objective.sums(losses, batch))
    for _ in range(max(n for _, n in shares) - len(window)):
        inside(model, _nothing).backward()
    return Sums.add_up([part for parts in world.gather(found) for part in parts])


@torch.no_grad()
def evaluate(
    model: Model, batches: Iterable[Batch], objective: Objective, world: World = ALONE, rounds: int = 0
) -> Sums:
    """The sums over `batches`, without gradients; all spans alike, whatever they weigh in training.

    `batches` are this process's share; `rounds`: the most that any process has.
    """
    training, found, objective = model.training, [], objective._replace(span_weights={})
    model.eval()
    for batch in batches:
        losses = inside(model, partial(_losses, batch=batch, objective=objective, denominator=batch.targets))
        found.append(objective.sums(losses, batch))
    for _ in range(rounds - len(found)):
        inside(model, _nothing)
    model.train(training)
    return Sums.add_up([part for parts in world.gather(found) for part in parts])


def _losses(student: Student, batch: Batch, objective: Objective, denominator: float) -> Losses:
    hidden_ND = _hidden(student, batch, objective)
    return objective.losses(hidden_ND, student.lm_head.weight, batch, denominator)


def _nothing(student: Student) -> Tensor:
    """0, with a gradient of 0 for every parameter: what a process adds while others still have a micro-batch, since
    shards are put together by all of them or not at all."""
    token = torch.zeros(1, 1, dtype=torch.long, device=student.lm_head.weight.device)
    return (student.hidden(token) @ student.lm_head.weight.T).sum() * 0.0


def _hidden(student: Student, batch: Batch, objective: Objective) -> Tensor:
    """The hidden states that the targets are predicted from, [N, D]."""
    with precision(objective.dtype, batch.ids_T.device):
        hidden_TD = student.hidden(batch.ids_T[None], lengths=batch.lengths)[0]
    return hidden_TD.index_select(0, batch.positions_N)


@contextlib.contextmanager
def precision(dtype: str, device: torch.device, *, keep_copies: bool = False) -> Iterator[None]:
    """bf16 matrix products over fp32 weights; fp32 leaves everything as it is. `keep_copies`: the weights' bf16 copies
    stay until the end, for many passes over the same weights."""
    if dtype == "fp32":
        yield
        return
    with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=keep_copies):
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
