"""A function made ready to run: instructions with their handlers, constants bound, values numbered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from distill.errors import PackageError
from distill.mil.ops.registry import Handler
from distill.mil.policy import Policy
from distill.mil.program import Operation, TensorType
from distill.mil.run import Run
from distill.mil.values import RUNTIME

# What a kernel raises when a package asks for something impossible.
KERNEL_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    PackageError,
    RuntimeError,
    TypeError,
    ValueError,
)


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

    def run(self, run: Run, may_overwrite: bool) -> None:
        """Compute the outputs into run.values."""
        values = run.values
        arguments = dict(self.fixed)
        for name, slot, convert in self.reads:
            arguments[name] = values[slot] if convert is None else convert(values[slot])
        for name, parts, flatten in self.gathers:
            items = [values[part] if type(part) is int else part for part in parts]
            arguments[name] = [n for item in items for n in numbers(item)] if flatten else items
        if self.handler.wants_run:
            arguments["run"] = run
        function = self.in_place if may_overwrite and self.in_place is not None else self.function
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
    if value.dtype is not RUNTIME[declared.dtype]:
        value = value.to(RUNTIME[declared.dtype])
    if declared.dtype == "fp16" and not handler.exact:
        value = policy.settle(value, handler.name, name)
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

    def execute(self, run: Run, arguments: Sequence[Any], may_overwrite: bool) -> list[Any]:
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
            instruction.run(run, may_overwrite)
        except KERNEL_ERRORS as error:
            op = instruction.op
            what = ", ".join(f"{name} {shape_of(run.values[slot])}" for name, slot, _ in instruction.reads)
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PackageError(f"{self.place}: {op.type} {op.output_name!r} failed: {message} ({what})") from error

    def results(self, run: Run) -> list[Any]:
        return [run.values[o] if type(o) is int else o for o in self.outputs]


def shape_of(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else repr(value)


def numbers(value: Any) -> list[Any]:
    """A tensor's elements as Python numbers."""
    if isinstance(value, Tensor):
        return value.reshape(-1).tolist()
    return list(value) if isinstance(value, list) else [value]
