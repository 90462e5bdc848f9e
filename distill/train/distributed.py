"""The processes that train one run: `torchrun --nproc-per-node 8 -m training.distill_kd --config ...`, one a device.

They hold shards of one student (distill/train/sharded.py) and take a step together. Its micro-batches are dealt out,
number i to process i % size: what a step learns from, and its one denominator, do not depend on how many they are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from distill.errors import DistillError, Paused

Value = TypeVar("Value")


class World(NamedTuple):
    """This process among those of its run."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that reports, and writes what there is one of."""
        return self.rank == 0

    def mine(self, parts: Sequence[Value]) -> Sequence[Value]:
        """This process's share."""
        return parts[self.rank :: self.size]

    def gather(self, value: Value) -> list[Value]:
        """What each process has, by rank. All of them call it, and wait for each other."""
        if self.size == 1:
            return [value]
        found: list[Value | None] = [None] * self.size
        dist.all_gather_object(found, value)  # pickled, between processes of one run
        return found  # type: ignore[return-value]

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What the first process makes, on all of them."""
        if self.size == 1:
            return make()
        made: list[Value | None] = [make() if self.first else None]
        dist.broadcast_object_list(made, src=0)
        return made[0]  # type: ignore[return-value]


ALONE = World()


def launched() -> World:
    """This process among those that torchrun has started; alone without it."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return ALONE
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def local_device(kind: str) -> torch.device:
    """This process's device: its GPU among those of its machine."""
    if kind == "cuda" and launched().size > 1:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(kind)


@contextlib.contextmanager
def open_world(device: torch.device) -> Iterator[World]:
    """Meet the other processes, if there are any."""
    world = launched()
    if world.size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield world
    except (Paused, SystemExit):  # all of them stop
        dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise
        raise DistillError("another process of this run has ended, and this one with it; its own message says why"
                           ) from error  # fmt: skip
    dist.destroy_process_group()  # after an error torchrun ends the others, who may be waiting for this one
