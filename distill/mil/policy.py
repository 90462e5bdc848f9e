"""Numeric policies: how results are rounded and how sums are accumulated. Chosen once per run.

    ieee16   each operation in float32, its result rounded to its declared type (default)
    fp32     fp16 is ignored: what is declared fp16 stays float32; separates precision from semantics. A weight stays
             what the device holds: one that is stored compressed is rounded to its declared type
    acc16    as ieee16, but matmul, conv, linear and reductions accumulate in fp16, block by block
    strict   as ieee16, and every overflow, NaN and subnormal is recorded with the operation that made it
None of them claims to be bit-exact with a chip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import InputError
from distill.mil.program import POLICIES

SMALLEST_NORMAL = {"fp16": 2.0**-14, "bf16": 2.0**-126, "fp32": 2.0**-126, "fp64": 2.0**-1022}
_BLOCK = 32
_CHUNK = 2**20  # elements rounded at once: what lies in the cache


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in a tensor that fp16 hardware may not survive. `count` elements of `size`; `worst` is the
    largest.
    """

    kind: str  # overflow | infinite | nan | subnormal | underflow | index
    op_type: str
    name: str
    count: int
    size: int
    worst: float


def round16(x: Tensor) -> Tensor:
    """IEEE round to nearest even, held in float32; beyond 65504 it overflows to infinity."""
    return x.half().float()


class Policy:
    """The default, ieee16, and the base of the others."""

    name = "ieee16"
    rounds = True  # whether fp16 is honoured
    records = False

    def settle(self, x: Tensor, op_type: str, name: str, ours: bool = False) -> Tensor:
        """A float32 result that is declared fp16. `ours`: nobody else can see its memory."""
        if ours and x.is_contiguous():
            for part in x.reshape(-1).split(_CHUNK) if x.numel() > _CHUNK else (x,):
                part.copy_(part.half())
            return x
        return round16(x)

    def look(self, x: Tensor, dtype: str, op_type: str, name: str) -> None:
        """A result that is not rounded; only `strict` looks."""

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(x, y)

    def conv(
        self,
        x: Tensor,
        weight: Tensor,
        strides: Sequence[int],
        dilations: Sequence[int],
        groups: int,
    ) -> Tensor:
        """A convolution of an input that is padded already."""
        kernel = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        return kernel(x, weight, None, list(strides), 0, list(dilations), groups)

    def sum(self, x: Tensor, axes: Sequence[int], keep: bool) -> Tensor:
        return x.sum(list(axes), keepdim=keep) if axes else x

    def softmax(self, x: Tensor, axis: int) -> Tensor:
        return torch.softmax(x, axis)

    def logsumexp(self, x: Tensor, axes: Sequence[int], keep: bool) -> Tensor:
        return torch.logsumexp(x, list(axes), keepdim=keep) if axes else x

    def report(self, kind: str, op_type: str, name: str, count: int, size: int) -> None:
        """A remark from a handler; only `strict` keeps it."""


class Fp32(Policy):
    name = "fp32"
    rounds = False

    def settle(self, x: Tensor, op_type: str, name: str, ours: bool = False) -> Tensor:
        return x


class Acc16(Policy):
    """Partial sums of 32 products in float32, then an fp16 accumulator: a pessimistic picture of fp16
    hardware.
    """

    name = "acc16"

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        if not x.is_floating_point():
            return torch.matmul(x, y)
        total: Tensor | None = None
        contracted = -2 if y.dim() > 1 else -1
        for start in range(0, x.shape[-1], _BLOCK):
            width = min(_BLOCK, x.shape[-1] - start)
            part = round16(torch.matmul(x.narrow(-1, start, width), y.narrow(contracted, start, width)))
            total = part if total is None else round16(total + part)
        return torch.matmul(x, y) if total is None else total

    def conv(
        self,
        x: Tensor,
        weight: Tensor,
        strides: Sequence[int],
        dilations: Sequence[int],
        groups: int,
    ) -> Tensor:
        if groups > 1:
            parts = zip(x.chunk(groups, 1), weight.chunk(groups, 0))
            return torch.cat([self.conv(a, w, strides, dilations, 1) for a, w in parts], 1)
        width = max(1, _BLOCK // max(1, weight[0, 0].numel()))
        total: Tensor | None = None
        for a, w in zip(x.split(width, 1), weight.split(width, 1)):
            part = round16(super().conv(a, w, strides, dilations, 1))
            total = part if total is None else round16(total + part)
        assert total is not None
        return total

    def sum(self, x: Tensor, axes: Sequence[int], keep: bool) -> Tensor:
        if not x.is_floating_point() or not axes:
            return super().sum(x, axes, keep)
        dims = sorted(a % x.dim() for a in axes)
        rest = [d for d in range(x.dim()) if d not in dims]
        flat = x.permute(*rest, *dims).reshape([*(x.shape[d] for d in rest), math.prod(x.shape[d] for d in dims)])
        total = torch.zeros(flat.shape[:-1])
        for part in flat.split(_BLOCK, -1):
            total = round16(total + round16(part.sum(-1)))
        return total.reshape([1 if d in dims else n for d, n in enumerate(x.shape)]) if keep else total

    def softmax(self, x: Tensor, axis: int) -> Tensor:
        powers = (x - x.amax(axis, keepdim=True)).exp()
        return powers / self.sum(powers, [axis], True)

    def logsumexp(self, x: Tensor, axes: Sequence[int], keep: bool) -> Tensor:
        if not axes:
            return x
        highest = x.amax(list(axes), keepdim=True)
        highest = torch.where(highest.isfinite(), highest, 0.0)
        total = self.sum((x - highest).exp(), axes, True).log() + highest
        return total if keep else total.squeeze(list(axes))


class Strict(Policy):
    """Keeps its findings until the next run begins: one for each kind, operator and value, however often it ran."""

    name = "strict"
    records = True

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], Finding] = {}

    @property
    def findings(self) -> list[Finding]:
        return list(self._found.values())

    def settle(self, x: Tensor, op_type: str, name: str, ours: bool = False) -> Tensor:
        rounded = round16(x)
        small = (x != 0) & (x.abs() < SMALLEST_NORMAL["fp16"])
        self.keep("overflow", x.isfinite() & rounded.isinf(), x, op_type, name)
        self.keep("infinite", x.isinf(), x, op_type, name)
        self.keep("nan", x.isnan(), x, op_type, name)
        self.keep("underflow", small & (rounded == 0), x, op_type, name)
        self.keep("subnormal", small & (rounded != 0), x, op_type, name)
        return rounded

    def look(self, x: Tensor, dtype: str, op_type: str, name: str) -> None:
        self.keep("infinite", x.isinf(), x, op_type, name)
        self.keep("nan", x.isnan(), x, op_type, name)
        self.keep("subnormal", (x != 0) & (x.abs() < SMALLEST_NORMAL[dtype]), x, op_type, name)

    def keep(self, kind: str, where: Tensor, x: Tensor, op_type: str, name: str) -> None:
        if count := int(where.sum()):
            self.add(Finding(kind, op_type, name, count, x.numel(), float(x.abs()[where].max())))

    def report(self, kind: str, op_type: str, name: str, count: int, size: int) -> None:
        self.add(Finding(kind, op_type, name, count, size, 0.0))

    def add(self, new: Finding) -> None:
        key = new.kind, new.op_type, new.name
        old = self._found.get(key)
        if old is not None:
            worst = max(old.worst, new.worst)
            new = replace(old, count=old.count + new.count, size=old.size + new.size, worst=worst)
        self._found[key] = new


_POLICIES: dict[str, type[Policy]] = dict(zip(POLICIES, (Policy, Fp32, Acc16, Strict), strict=True))


def make_policy(name: str) -> Policy:
    """A policy by name."""
    if name not in _POLICIES:
        raise InputError(f"no numeric policy {name!r}; there are {', '.join(sorted(_POLICIES))}")
    return _POLICIES[name]()
