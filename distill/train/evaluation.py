"""The student on held-out records while it trains: its losses, and what it writes. A stop signal ends either."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import msgspec
import torch

from distill import chat
from distill.data.batches import Batch, micro_batches
from distill.train.alignment import Aligned
from distill.train.divergences import Divergence
from distill.train.objective import COMPONENTS, Sums
from distill.train.prepare import Run, Teacher
from distill.train.step import evaluate
from distill.train.targets import Target
from distill.train.teacher import OnlineTeacher

_SAMPLES = 3
"""Held-out conversations continued at each evaluation."""
_SAMPLE_TOKENS = 64

Item = TypeVar("Item")


class Interrupted(Exception):
    """A signal came: there is no evaluation."""


def held_out(it: Run, stop: list[int]) -> Sums:
    """Sums over the held-out records, in fp32 at temperature 1, all components; empty where there are none."""
    stage = it.config.stages()[-1]
    stage = msgspec.structs.replace(stage, batch_tokens=stage.largest)
    parts = list(micro_batches(range(len(it.val)), it.val.lengths, stage))
    batches = (it.val.batch(part).to(it.device) for part in _until(stop, it.world.mine(parts)))
    every = it.objective._replace(weights=dict.fromkeys(COMPONENTS, 1.0), divergence=Divergence(), dtype="fp32",
                                  teacher=_exact(it.teacher))  # fmt: skip
    return evaluate(it.model, batches, every, it.world, -(-len(parts) // it.world.size))


def _exact(teacher: Teacher | None) -> Callable[[Batch], Target | Aligned] | None:
    """Its whole distribution, whatever the run learns from."""
    if teacher is None:
        return None
    return teacher.dense if isinstance(teacher, OnlineTeacher) else teacher.target


def samples(it: Run, stop: list[int]) -> dict[str, str]:
    """Greedy continuations of the first held-out conversations, by the last message before them; the first process's
    work."""
    device = it.device if it.world.size == 1 else torch.device("cpu")  # beside a shard there may be no room for it
    student, tokenizer = it.whole(keep=it.world.first, device=device), it.start.tokenizer
    training, found = student.training, {}
    records = list(dict.fromkeys(example.record for example in it.val.items))[:_SAMPLES]
    if not it.world.first:
        return {}
    student.eval()
    for index in _until(stop, records):
        record = it.val.dataset[index]
        prompt = chat.encode(tokenizer, record.context, record.tools, add_generation_prompt=True).ids
        room = min(_SAMPLE_TOKENS, student.config.max_position_embeddings - len(prompt))
        found[record.context[-1].content] = tokenizer.decode(student.generate(prompt, room, tokenizer.stop_ids))
    student.train(training)
    return found


def _until(stop: list[int], items: Iterable[Item]) -> Iterator[Item]:
    for item in items:
        if stop:
            raise Interrupted
        yield item
