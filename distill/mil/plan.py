"""A function made ready to run: instructions with their handlers, constants bound, values numbered."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from distill.errors import DistillError, PackageError
from distill.mil.dtypes import FLOATS
from distill.mil.guard import OverLimit
from distill.mil.ops.registry import Handler
from distill.mil.ops.slicing import overwritten
from distill.mil.policy import SMALLEST_NORMAL, Finding, Policy
from distill.mil.program import Operation, TensorType
from distill.mil.run import Run
from distill.mil.values import RUNTIME, overlaps

# What a kernel raises when a package asks for something impossible.
KERNEL_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    DistillError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
_MOST_NUMBERS = 2**12  # sizes, axes and the like; those of an image's boxes are the longest
_MOST_TEXT = 1000
_MOST_COSTS = 2**16
# In arithmetic operations, what costs time that torch does not see.
_STEP = 2**17  # an operation that does nothing


@dataclass(slots=True)
class Instruction:
    """One operation, ready to run."""

    op: Operation
    handler: Handler
    function: Callable[..., Any]
    fixed: dict[str, Any]  # constant arguments
    reads: list[tuple[str, int, Callable[[Any], Any] | None]]  # (parameter, slot, conversion)
    gathers: list[tuple[str, list[Any], bool]]  # lists of values: (parameter, slots or constants, flatten)
    writes: list[int]
    used: list[int]  # every slot read, nested blocks included
    bodies: list[Plan]
    in_place: Callable[..., Any] | None = None  # instead of `function`, where nobody can tell
    frees: list[int] = field(default_factory=list)
    signature: Hashable = None  # what the cost depends on beside the operands; None: on data
    measured: Hashable = None  # the operands with which it ran last
    cost: int = 0
    weight: int = _STEP  # what it costs beside its calls of torch

    def guarded(self, run: Run, may_overwrite: bool) -> None:
        """Run; under the guard if the cost is not known from this instruction or one like it. Nested blocks are
        measured one by one.
        """
        guard = run.guard
        if guard is None or self.bodies:
            return self.run(run, may_overwrite)
        operands = self.operands(run)
        if operands is None:
            with guard:
                return self.run(run, may_overwrite)
        if operands == self.measured:
            guard.spend(self.cost)
            return self.run(run, may_overwrite)
        key = self.signature, operands
        if key in guard.ledger.costs:
            memory, self.cost = guard.ledger.costs[key]
            guard.admit(memory)
            guard.spend(self.cost)
            self.run(run, may_overwrite)
            for slot in self.writes:
                if isinstance(run.values[slot], Tensor):
                    guard.ledger.hold(run.values[slot])
            self.measured = operands
            return
        held, before, guard.peak, guard.data_dependent = guard.ledger.held, guard.spent, 0, False
        with guard:
            self.run(run, may_overwrite)
        if self.handler.by_shape or not guard.data_dependent:
            self.measured, self.cost = operands, guard.spent - before
            guard.ledger.remember(key, (max(0, guard.peak - held), self.cost), _MOST_COSTS)

    def operands(self, run: Run) -> Hashable:
        """Policy, and shape, layout and type of each tensor read; None where the cost depends on data."""
        if self.signature is None:
            return None
        found: list[Any] = [run.policy.name]
        for slot in self.used:
            value = run.values[slot]
            if not isinstance(value, Tensor):
                return None
            found += (value.shape, value.stride(), value.dtype)
        return tuple(found)

    def run(self, run: Run, may_overwrite: bool) -> None:
        """Compute the outputs into run.values."""
        values = run.values
        arguments = dict(self.fixed)
        for name, slot, convert in self.reads:
            arguments[name] = values[slot] if convert is None else convert(values[slot])
        for name, parts, flatten in self.gathers:
            items = [values[part] if type(part) is int else part for part in parts]
            arguments[name] = joined(items) if flatten else items
        if self.handler.wants_run:
            arguments["run"] = run
        function = self.function
        if may_overwrite and self.in_place is not None and not overlaps(arguments["x"]):
            function = self.in_place
            part = overwritten(**arguments)
            run.undo.append((part, part.clone()))
        result = function(**arguments)
        results = result if isinstance(result, tuple) else (result,)
        if len(results) != len(self.writes):
            raise ValueError(f"{len(results)} results for {len(self.writes)} outputs")
        for slot, declared, value in zip(self.writes, self.op.outputs, results):
            values[slot] = settle(value, declared.type, run.policy, self.handler, declared.name)


def settle(value: Any, declared: Any, policy: Policy, handler: Handler, name: str) -> Any:
    """A result in its declared type: represented, rounded, and of the declared shape."""
    if not isinstance(declared, TensorType):
        return value
    if not isinstance(value, Tensor):
        if declared.dtype in FLOATS or not isinstance(value, int | str):  # those are a classifier's label
            raise ValueError(f"the result is a {type(value).__name__}, declared is {declared}")
        return value
    if value.dtype is not RUNTIME[declared.dtype]:
        value = value.to(RUNTIME[declared.dtype])
    if declared.dtype == "fp16" and not handler.exact:
        value = policy.settle(value, handler.name, name, handler.fresh)
    elif policy.records and declared.dtype in SMALLEST_NORMAL:
        policy.look(value, declared.dtype, handler.name, name)
    if tuple(value.shape) != declared.shape and not fits(value.shape, declared):
        raise ValueError(f"the result has shape {list(value.shape)}, declared is {declared}")
    return value


def fits(shape: Sequence[int], declared: TensorType) -> bool:
    """Whether a shape is one that the declared type allows."""
    if declared.variadic:
        return True
    return len(shape) == len(declared.shape) and all(d is None or d == n for n, d in zip(shape, declared.shape))


@dataclass(slots=True)
class Plan:
    """A block: its instructions, and where its inputs and outputs live among run.values."""

    instructions: list[Instruction]
    inputs: list[int]
    outputs: list[Any]  # a slot, or a constant
    place: str
    size: int = 0
    owned: frozenset[int] = frozenset()  # positions of outputs in memory that nothing else keeps
    findings: list[Finding] = field(default_factory=list)  # of its constants, under `strict`

    def execute(self, run: Run, arguments: Sequence[Any], may_overwrite: bool) -> list[Any]:
        if len(arguments) != len(self.inputs):
            raise ValueError(f"{self.place}: {len(arguments)} values for a block of {len(self.inputs)} inputs")
        for slot, argument in zip(self.inputs, arguments):
            run.values[slot] = argument
        for instruction in self.instructions:
            self.step(instruction, run, may_overwrite)
            for slot in instruction.frees:
                run.values[slot] = None
        return self.results(run)

    def step(self, instruction: Instruction, run: Run, may_overwrite: bool) -> None:
        """One instruction; a failure says which operation, where, and with what."""
        try:
            if run.guard is not None:
                run.guard.spend(instruction.weight)
            instruction.guarded(run, may_overwrite)
        except KERNEL_ERRORS as error:
            if instruction.bodies and isinstance(error, PackageError) and not isinstance(error, OverLimit):
                raise  # from a nested block, which said where
            op = instruction.op
            what = ", ".join(f"{name} {shape_of(run.values[slot])}" for name, slot, _ in instruction.reads)
            message = f"{self.place}: {op.type} {op.output_name!r} failed: {first_line(error)} ({what})"
            raise PackageError(message) from error

    def results(self, run: Run) -> list[Any]:
        return [run.values[o] if type(o) is int else o for o in self.outputs]


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:_MOST_TEXT] if text else type(error).__name__


def shape_of(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def numbers(value: Any) -> list[Any]:
    """A tensor's elements as Python numbers, which take much more memory."""
    if isinstance(value, Tensor):
        if value.numel() > _MOST_NUMBERS:
            raise ValueError(f"a list of {value.numel()} numbers")
        return value.reshape(-1).tolist()
    return list(value) if isinstance(value, list) else [value]


def joined(parts: Sequence[Any]) -> list[Any]:
    """The elements of several values as one list."""
    found: list[Any] = []
    for part in parts:
        found += numbers(part)
        if len(found) > _MOST_NUMBERS:
            raise ValueError(f"a list of {len(found)} numbers")
    return found
