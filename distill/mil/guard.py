"""Measure a torch call before it is made, so that no operator, however it is written, can take all memory or all
time.

Measuring takes longer than a small operator, so an instruction is measured when it runs with new shapes, and
its cost is remembered.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from distill.errors import PackageError
from distill.mil.costs import plain
from distill.mil.limits import Limits, refusal

# The cost of things in arithmetic operations.
_CALL = 2**20  # any call, however small its tensors
_ELEMENT = 32  # an element read or written
_PIECE = 2**17  # one of the tensors that a call makes
_SLOW_PRODUCT = 16  # a product of integers or doubles, which has no fast kernel
_MOST_PIECES = 2**20
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd  # calls that are made of others
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


# Calls that make many small tensors, which take more than their elements.
_PIECES = {
    torch.ops.aten.unbind.int: lambda args: args[0].shape[args[1] if len(args) > 1 else 0] if args[0].dim() else 0,
    torch.ops.aten.split.Tensor: lambda args: max((0, *args[0].shape)) // max(1, args[1]),
    torch.ops.aten.chunk.default: lambda args: args[1],
}


class OverLimit(PackageError):
    """A refusal that does not say where: who catches it knows."""


class Ledger:
    """Bytes that are held now: constants of a program, values of its runs. Tensors are followed until they die."""

    def __init__(self) -> None:
        self.held = 0
        self._known: set[int] = set()
        self.costs: dict[Hashable, tuple[int, int]] = {}  # bytes and operations of instructions measured so far

    def hold(self, tensor: Tensor) -> None:
        if id(tensor) not in self._known:
            self.follow(tensor, min(nbytes(tensor), tensor.untyped_storage().nbytes()))

    def follow(self, thing: Any, size: int) -> None:
        """Count `size` bytes until `thing` dies."""
        self._known.add(id(thing))
        self.held += size
        weakref.finalize(thing, self._release, id(thing), size).atexit = False

    def remember(self, key: Hashable, cost: tuple[int, int], most: int) -> None:
        """At most `most` costs: the oldest goes, for shapes change with time."""
        if len(self.costs) >= most and self.costs:
            del self.costs[next(iter(self.costs))]
        self.costs[key] = cost

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


class Guard(TorchDispatchMode):
    """Refuses a call that would exceed the limits of one prediction; `size` is what backs it, in bytes."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to mark this class as not compiled

    def __init__(self, ledger: Ledger, limits: Limits, size: int) -> None:
        super().__init__()
        self.ledger = ledger
        self.memory = limits.memory_for(size)
        self.work = limits.work_for(size)
        self.spent = 0
        self.peak = 0  # the most that was held, since this was last set to 0
        self.data_dependent = False

    def spend(self, work: int) -> None:
        self.spent += work
        if self.spent > self.work:
            raise OverLimit(f"more than {self.work:.1e} operations in one prediction (limits= of mil.load raises it)")

    def admit(self, need: int) -> None:
        """Refuse what would hold `need` more bytes than allowed."""
        held = self.ledger.held + need
        self.peak = max(self.peak, held)
        if held > self.memory:
            raise OverLimit(refusal(held, self.memory))

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        cost = foreseen(func, args, kwargs)
        self.data_dependent |= cost.guessed or not _DATA_DEPENDENT.isdisjoint(func.tags)
        self.admit(cost.memory)
        self.spend(cost.work)
        out = func(*args, **kwargs)
        if isinstance(out, list | tuple):
            self.spend(_PIECE * len(out))
        for tensor in tensors(out):
            if nbytes(tensor) > self.memory:  # a view that repeats its elements
                raise OverLimit(refusal(nbytes(tensor), self.memory))
            self.ledger.hold(tensor)
        return out


class Cost(NamedTuple):
    """What a call takes: bytes, as if nothing were freed on the way, and operations."""

    memory: int
    work: int
    guessed: bool = False


class Meter(TorchDispatchMode):
    """Adds up what the calls take that a call is made of, on tensors without data."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to mark this class as not compiled

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost(0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE):
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        out = func(*args, **kwargs)
        memory, work = self.cost.memory, self.cost.work + _CALL
        if not func.is_view:
            results = list(tensors(out))
            memory += 0 if func._schema.is_mutable else sum(map(nbytes, results)) + workspace(func, args)
            work += _ELEMENT * sum(t.numel() for t in [*tensors([*args, *kwargs.values()]), *results])
            work += products(func, args, results)
        self.cost = Cost(memory, work)
        return out


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def shadow(value: Any) -> Any:
    """The same arguments without data."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, list | tuple):
        return type(value)(shadow(item) for item in value)
    return value


def foreseen(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Cost:
    """What a call will take, found by making it without data."""
    if func in _PIECES and _PIECES[func](args) > _MOST_PIECES:
        raise OverLimit(f"{_PIECES[func](args)} pieces of one tensor")
    common = plain(func, args)
    if common is not None:
        memory, elements, multiplications = common
        return Cost(memory, _CALL + _ELEMENT * elements + multiplications)
    options = {name: shadow(value) for name, value in kwargs.items()}
    if any(a.name == "device" for a in func._schema.arguments):
        options["device"] = torch.device("meta")
    meter = Meter()
    try:
        with meter:
            func(*(shadow(a) for a in args), **options)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError):
        # The shape depends on data, as nonzero's does, or the call itself is about to fail: coordinates of
        # every element are the most that such a call makes.
        most = sum(t.numel() * max(1, t.dim()) for t in tensors([*args, *kwargs.values()]))
        return Cost(8 * most, _CALL + _ELEMENT * most, guessed=True)
    return meter.cost


def products(func: Any, args: Sequence[Any], results: list[Tensor]) -> int:
    """Multiplications of a matrix product, a convolution or a pooling window."""
    name = func._overloadpacket
    if not results:
        return 0
    if "pool" in str(name) and len(args) > 1 and isinstance(args[1], list | tuple):
        window = 1
        for n in args[1]:
            window *= int(n)
        return _ELEMENT * results[0].numel() * max(1, window)
    if name not in flop_registry:
        return 0
    slow = 1 if results[0].dtype == torch.float32 else _SLOW_PRODUCT
    return slow * int(flop_registry[name](*args, out_val=results[0]))


def workspace(func: Any, args: Sequence[Any]) -> int:
    """Bytes that a convolution takes beside its result where torch unfolds the input (all but float32)."""
    if func._overloadpacket is not torch.ops.aten.convolution or args[0].dtype == torch.float32:
        return 0
    return 8 * args[0].numel() * args[1][0, 0].numel()
