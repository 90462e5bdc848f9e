"""A student in shards, one a process (FSDP2, Zhao et al. 2023): weights, gradients and moments are divided by the
number of processes; a block is put together when it is needed, and its gradient is added up and divided again.

The head is needed where the loss is (distill/train/divergence.py multiplies with it), outside of any block. So the
student is called inside a root module whose own shards (embedding, final norm, head) are whole for the while:

    losses = inside(model, lambda student: ... student.hidden(...), student.lm_head.weight ...)
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distill.model import Student
from distill.train.distributed import World

Value = TypeVar("Value")


class Sharded(nn.Module):
    """The root: runs what it is given with the student whose head is whole."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, call: Callable[[Student], Value]) -> Value:
        return call(self.student)


Model = Student | Sharded
"""A student, or its shards."""


def inside(model: Model, call: Callable[[Student], Value]) -> Value:
    """`call(student)`, where its weights may be used."""
    return model(call) if isinstance(model, Sharded) else call(model)


def outline(student: Student) -> Student:
    """The same modules, tied where they are, with parameters that have no storage."""
    return _with(student, {name: torch.empty_like(p, device="meta") for name, p in student.named_parameters()})


def shard(blank: Student, weights: dict[str, Tensor], world: World, device: torch.device) -> Sharded:
    """Put shards of `weights` on each process's device; only the first process needs to have them.

    Everything travels in fp32, so that a step computes what it would in one process.
    """
    model = Sharded(_with(blank, dict(blank.named_parameters())))
    mesh = init_device_mesh(device.type, (world.size,))
    for block in model.student.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients are added up: the loss has its denominator already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # it warns of in-place changes to views among a block's outputs: nothing changes keys and values
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    model.to_empty(device=device)
    with torch.no_grad():
        for name, p in model.student.named_parameters():
            whole = weights[name].to(device) if world.first else torch.empty(p.shape, dtype=p.dtype, device=device)
            p.copy_(distribute_tensor(whole, mesh, p.placements))  # type: ignore[attr-defined]
    return model


def whole(model: Model, blank: Student, device: torch.device, *, keep: bool = True) -> Student:
    """A plain student on `device` with the present weights, in which shards are put together; where `keep` is False,
    only help the others to one. All processes call it. A student that is whole is given back as it is."""
    if not isinstance(model, Sharded):
        return model
    found = {}
    for name, p in model.student.named_parameters():
        value = full(p.detach())
        if keep:
            found[name] = value.to(device)
    return _with(blank, found).train(model.training) if keep else blank


def trained(model: Model) -> dict[str, Tensor]:
    """The parameters that train, by their names in the student; not copies."""
    student = model.student if isinstance(model, Sharded) else model
    return {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}


def local(value: Any) -> Any:
    """The process's own part of a shard; anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def full(value: Tensor) -> Tensor:
    """A sharded tensor put together; any other as it is. All processes call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def rows(parts: list[Tensor], like: Tensor) -> Tensor:
    """Those rows of a tensor, saved in `parts` by as many processes, that belong to this process's shard `like`.

    ValueError where the tensor is not of the same shape and type.
    """
    kinds = {(part.dtype, *part.shape[1:]) for part in parts}
    n_rows = sum(part.shape[0] if part.ndim else 1 for part in parts)
    if not like.ndim or kinds != {(like.dtype, *like.shape[1:])} or n_rows != like.shape[0]:
        found = [f"{part.dtype} {tuple(part.shape)}" for part in parts]
        raise ValueError(f"{', '.join(found)} in place of {like.dtype} {tuple(like.shape)}")
    first, n = _place(like)
    taken, start = [], 0
    for part in parts:
        low, high = max(first - start, 0), min(first + n - start, len(part))
        if low < high:
            taken.append(part[low:high])
        start += len(part)
    mine = torch.cat(taken) if taken else parts[0][:0]
    return as_shard(mine.to(local(like).device), like)


def as_shard(mine: Tensor, like: Tensor) -> Tensor:
    """This process's part, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return mine
    return DTensor.from_local(mine, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def _place(like: Tensor) -> tuple[int, int]:
    """First row and number of rows of this process's shard."""
    if not isinstance(like, DTensor):
        return 0, like.shape[0]
    each = -(-like.shape[0] // like.device_mesh.size())  # as torch.chunk divides
    return min(each * like.device_mesh.get_local_rank(), like.shape[0]), like.to_local().shape[0]


def _with(student: Student, parameters: dict[str, Tensor]) -> Student:
    """A copy of the modules with these parameters in place of theirs, tied where theirs are."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(parameters[name].detach(), requires_grad=p.requires_grad)
        for name, p in student.named_parameters()
    }
    return copy.deepcopy(student, memo)
