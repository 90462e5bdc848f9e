"""The program as the package stores it: functions, blocks, operations, constants. Plain data, no execution.

Names follow MIL.proto. `load()` in package.py makes a Program; `predict`, `trace` and `make_state` run it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.errors import InputError, PackageError
from distill.mil import dtypes
from distill.mil.blob import BlobReader
from distill.mil.limits import DEFAULT, Limits

if TYPE_CHECKING:
    from distill.mil.interpreter import Step
    from distill.mil.policy import Finding, Policy
    from distill.mil.ranges import Range
    from distill.mil.state import State

Shape = tuple[int | None, ...]
POLICIES = ("ieee16", "fp32", "acc16", "strict")  # how results are rounded (policy.py)


@dataclass(frozen=True, slots=True)
class TensorType:
    """`dtype` is MIL's name ('fp16', 'int32', 'uint4', 'bool', 'string'); None in `shape` is a dynamic
    dimension.
    """

    dtype: str
    shape: Shape
    variadic: bool = False  # the rank itself is unknown

    @property
    def count(self) -> int | None:
        """Number of elements; None where a dimension is dynamic."""
        if self.variadic or None in self.shape:
            return None
        return math.prod(d for d in self.shape if d is not None)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if d is None else str(d) for d in self.shape)}]"


@dataclass(frozen=True, slots=True)
class ListType:
    """MIL's list: `length` is None where dynamic."""

    element: ValueType
    length: int | None

    @property
    def dtype(self) -> str:
        return "list"

    @property
    def shape(self) -> Shape:
        return (self.length,)


@dataclass(frozen=True, slots=True)
class StateType:
    """A mutable tensor that outlives a prediction (iOS 18)."""

    wrapped: TensorType

    @property
    def dtype(self) -> str:
        return self.wrapped.dtype

    @property
    def shape(self) -> Shape:
        return self.wrapped.shape


@dataclass(frozen=True, slots=True)
class OtherType:
    """A tuple or a dictionary: attributes and classifier outputs only."""

    dtype: str

    @property
    def shape(self) -> Shape:
        return ()


ValueType = TensorType | ListType | StateType | OtherType


class Value:
    """A constant: immediate (in the protobuf) or in a weight file. Decoded when asked for."""

    __slots__ = ("_reader", "_source", "offset", "type")

    def __init__(
        self,
        type: ValueType,
        source: Any = None,
        *,
        reader: BlobReader | None = None,
        offset: int = 0,
    ) -> None:
        self.type = type
        self._source = source  # np.ndarray | list[Value] | dict[str, Value]
        self._reader = reader
        self.offset = offset

    @property
    def key(self) -> tuple[str, int, str, Shape] | None:
        """Identity of a file-backed constant (file, offset, dtype, shape); None for an immediate."""
        if self._reader is None:
            return None
        return (str(self._reader.path), self.offset, self.type.dtype, self.type.shape)

    @property
    def is_blob(self) -> bool:
        return self._reader is not None

    @property
    def is_copied(self) -> bool:
        """Whether decoding it takes memory beyond the mapped file."""
        return self._reader is not None and dtypes.unpacks(self.type.dtype)

    @property
    def items(self) -> list[Value] | dict[Any, Value]:
        """The members of a list, tuple or dictionary constant."""
        if isinstance(self._source, list | dict):
            return self._source
        raise PackageError(f"constant of type {self.type.dtype} has no members")

    def view(self) -> np.ndarray:
        """Like `numpy()`, writable where the memory is: for wrapping in torch without a copy. Never write to
        it.
        """
        if self._reader is not None:
            assert isinstance(self.type, TensorType) and self.type.count is not None
            flat = self._reader.read(self.offset, self.type.dtype, self.type.count)
            return flat.reshape([d or 0 for d in self.type.shape])
        if isinstance(self._source, np.ndarray):
            return self._source
        if isinstance(self._source, list):
            return np.array([item.view() for item in self._source])
        raise PackageError(f"constant of type {self.type.dtype} is not a tensor")

    def numpy(self) -> np.ndarray:
        """The constant, read-only. Sub-byte integers come as (u)int8, bf16 and fp8 as float32, strings as
        objects.
        """
        view = self.view().view()
        view.flags.writeable = False
        return view

    def __repr__(self) -> str:
        where = f" at {self.offset}" if self.is_blob else ""
        return f"<Value {self.type}{where}>"


# What an operator's input holds: the name of another value, or a constant given in place.
Binding = str | Value


@dataclass(frozen=True, slots=True)
class NamedType:
    """A name with its declared type: an operation's output, a block's input."""

    name: str
    type: ValueType

    @property
    def dtype(self) -> str:
        return self.type.dtype

    @property
    def shape(self) -> Shape:
        return self.type.shape


@dataclass(slots=True)
class Operation:
    """One operation; `name` is its 'name' attribute, or its first output where it has none."""

    type: str
    name: str
    inputs: dict[str, list[Binding]]
    outputs: list[NamedType]
    attributes: dict[str, Value] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)

    @property
    def output_name(self) -> str:
        return self.outputs[0].name if self.outputs else self.name

    def held(self) -> Iterator[tuple[str, Value]]:
        """The constants that it holds itself, by attribute or argument: compressed ones are written in place."""
        yield from self.attributes.items()
        for argument, bindings in self.inputs.items():
            yield from ((argument, binding) for binding in bindings if isinstance(binding, Value))


@dataclass(slots=True)
class Block:
    """Operations in execution order; `outputs` are names of values."""

    inputs: list[NamedType]
    operations: list[Operation]
    outputs: list[str]

    def walk(self) -> Iterator[Operation]:
        """Every operation, nested blocks included, in order."""
        for operation in self.operations:
            yield operation
            for block in operation.blocks:
                yield from block.walk()


@dataclass(frozen=True, slots=True)
class Feature:
    """One input, output or state as the model description shows it to an application.

    `shape` is the default shape; `enumerated` and `ranges` say what else is allowed (empty: nothing else).
    An image's is (1, channels, height, width). `type` is the program's own type for it.
    """

    name: str
    dtype: str
    shape: Shape
    type: ValueType
    kind: str = "tensor"  # tensor | image | label (of a classifier) | probabilities (label -> number)
    color: str = ""  # of an image: RGB | BGR | GRAYSCALE | GRAYSCALE_FLOAT16
    enumerated: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int | None], ...] = ()  # per dimension, upper None = unbounded
    optional: bool = False
    default: float = 0.0  # what an absent optional input holds


@dataclass
class Function:
    """One entry point. `block` is the specialisation for `opset`."""

    name: str
    inputs: list[Feature]
    outputs: list[Feature]
    states: list[Feature]
    opset: str
    block: Block

    @cached_property
    def constants(self) -> dict[str, Value]:
        """Every `const` of the function by name, nested blocks included."""
        return {op.output_name: op.attributes["val"] for op in self.block.walk() if op.type == "const"}

    @cached_property
    def stored(self) -> dict[Any, Value]:
        """Every constant in weight files, each once, by where it lies."""
        return {value.key: value for op in self.block.walk() for _, value in op.held() if value.is_blob}

    def constant(self, binding: Binding) -> Value | None:
        """The constant that a binding stands for; None when it is computed."""
        return self.constants.get(binding) if isinstance(binding, str) else binding

    @cached_property
    def producers(self) -> dict[str, Operation]:
        """Which operation makes each value."""
        return {out.name: op for op in self.block.walk() for out in op.outputs}


@dataclass
class Program:
    """A loaded package. Decoded weights are kept here and shared by its functions."""

    path: Path
    functions: dict[str, Function]
    default_function: str
    metadata: dict[str, str]  # user-defined metadata
    specification_version: int
    weight_files: list[Path]
    description: dict[str, str] = field(default_factory=dict)  # author, license, version, description
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    limits: Limits = DEFAULT
    size: int = 0  # bytes of its files

    def function(self, name: str | None = None) -> Function:
        """The named function, or the default one."""
        wanted = self.default_function if name is None else name
        if wanted not in self.functions:
            raise InputError(f"{self.path}: no function {wanted!r}; it has {', '.join(sorted(self.functions))}")
        return self.functions[wanted]

    def predict(
        self,
        inputs: Mapping[str, Any],
        function: str | None = None,
        state: State | None = None,
        policy: str | Policy = "ieee16",
    ) -> dict[str, Any]:
        """Run a function; outputs by name, fp16 ones as float32 (as Core ML returns them). An image is taken as
        a PIL image or as an array, and is returned as an array (images.to_pil makes an image of it). A
        classifier's label is an int or a str, its probabilities a dict.
        """
        from distill.mil import interpreter  # loads torch

        return interpreter.predict(self, inputs, function, state, policy)

    def trace(
        self,
        inputs: Mapping[str, Any],
        function: str | None = None,
        state: State | None = None,
        policy: str | Policy = "ieee16",
    ) -> Iterator[Step]:
        """Run a function one operation at a time, yielding every intermediate in order."""
        from distill.mil import interpreter

        return interpreter.trace(self, inputs, function, state, policy)

    def ranges(
        self,
        inputs: Iterable[Mapping[str, Any] | Iterable[Mapping[str, Any]]],
        function: str | None = None,
        state: State | None = None,
        policy: str | Policy = "fp32",
    ) -> list[Range]:
        """Every float value's range over many inputs, the one nearest to fp16's limit of 65504 first.

        An item is the inputs of one prediction, or a conversation: several that share a state. Each begins with
        zeros, unless `state` is given: then all go on with that one. Under `fp32`, the default, values are those
        that the program asks for; under `ieee16` those that fp16 leaves of them.
        """
        from distill.mil.ranges import observe

        return observe(self, inputs, function, state, policy)

    def make_state(self, function: str | None = None) -> State:
        """Fresh (zero) buffers for a function's states."""
        from distill.mil.state import State

        return State.of(self.function(function))

    @property
    def findings(self) -> list[Finding]:
        """What the last run under `strict` recorded."""
        strict = self.cache.get("policy:strict")
        return list(strict.findings) if strict else []
