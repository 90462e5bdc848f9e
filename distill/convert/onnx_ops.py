"""ONNX operators as Core ML's MIL: the table, what every lowering uses, and the shape operators.

A lowering takes a `Node` and returns its outputs: MIL variables, or arrays where the value is known already.
What it must do is the operator's page in onnx/docs/Operators.md. `onnx_ops_math` and `onnx_ops_nn` hold the
other families.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var, types

from distill.convert.onnx_graph import onnx
from distill.errors import InputError

Value: TypeAlias = "Var | np.ndarray"
Lowering: TypeAlias = "Callable[[Node], Value | Sequence[Value]]"
TABLE: dict[str, Lowering] = {}
INT32 = np.iinfo(np.int32)
MAX_CONSTANT_ELEMENTS = 2**30
HALF_MAX = np.float32(np.finfo(np.float16).max)
MASK = -4e4


def lowers(*op_types: str) -> Callable[[Lowering], Lowering]:
    """Enter a lowering into the table under these ONNX operators."""

    def register(lowering: Lowering) -> Lowering:
        for op_type in op_types:
            if op_type in TABLE:
                raise ValueError(f"{op_type} has a lowering already")
            TABLE[op_type] = lowering
        return lowering

    return register


def to_core_ml(array: np.ndarray, name: str) -> np.ndarray:
    """The value as a type that Core ML computes with: bool, int32, fp16 or fp32. Integers must fit."""
    if array.size == 0:
        raise InputError(f"tensor {name!r} is empty (shape {array.shape}): Core ML has no empty tensors")
    if array.dtype in (np.bool_, np.int32, np.float16, np.float32):
        return array
    if array.dtype.kind in "iu":
        low, high = array.min(), array.max()
        if low < INT32.min or high > INT32.max:
            worst = low if low < INT32.min else high
            raise InputError(f"tensor {name!r}: {worst} does not fit int32, the widest integer of Core ML")
        return array.astype(np.int32)
    if array.dtype == np.float64 or array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    raise InputError(f"tensor {name!r} is {array.dtype}, which Core ML cannot hold")


def same_type(value: float, x: Var) -> np.generic:
    return types.nptype_from_builtin(x.dtype)(value)


def within_half(array: np.ndarray) -> np.ndarray:
    """Constants that fp16 would make infinite, as finite ones: 0 * -inf is NaN where 0 * mask was 0.

    Too low is a mask: -4e4 leaves its sums with scores finite as well, as the Neural Engine wants them."""
    if array.dtype != np.float32:
        return array
    return np.where(array < -HALF_MAX, np.float32(MASK), np.minimum(array, HALF_MAX))


@dataclass
class Node:
    """One ONNX node while it is lowered: its attributes, and its inputs as arrays where they are known."""

    proto: onnx.NodeProto
    opset: int
    inputs: Sequence[Value | None]
    attributes: dict[str, Any]
    constants: dict[str, Var]
    half: bool = False

    def __str__(self) -> str:
        return f"{self.proto.op_type} {self.proto.name or self.proto.output[0]!r}"

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def var(self, index: int) -> Var:
        """An input as a MIL variable; a known array becomes one const, shared by all its users."""
        value = self.inputs[index]
        if isinstance(value, Var):
            return value
        if value is None:
            raise InputError(f"{self}: input {index} is required")
        name = self.proto.input[index]
        if name not in self.constants:
            self.constants[name] = mb.const(val=self.constant(index)[()], name=name)
        return self.constants[name]

    def constant(self, index: int) -> np.ndarray:
        """A known input as Core ML will hold it."""
        array = to_core_ml(self.known(index), self.proto.input[index])
        return within_half(array) if self.half else array

    def vars(self) -> list[Var]:
        return [self.var(i) for i in range(len(self.inputs))]

    def known(self, index: int) -> np.ndarray:
        """An input whose value the graph must fix, such as a shape or an axis."""
        value = self.inputs[index]
        if isinstance(value, np.ndarray):
            return value
        if value is not None and value.val is not None:
            return np.asarray(value.val)
        name = self.proto.input[index]
        raise InputError(f"{self}: its input {name!r} is computed at run time and must be fixed")

    def ints(self, index: int, name: str = "") -> list[int] | None:
        """Integers given as an input, or before some opset as an attribute; None when absent."""
        if name in self.attributes:
            return [int(i) for i in np.atleast_1d(self.attributes[name])]
        return [int(i) for i in np.atleast_1d(self.known(index))] if self.has(index) else None

    def axis(self, default: int, rank: int) -> int:
        axis = int(self.attributes.get("axis", default))
        if not -rank <= axis < max(rank, 1):
            raise InputError(f"{self}: axis {axis} is outside a tensor of rank {rank}")
        return axis % rank if rank else 0


def require_modest(shape: Sequence[int], what: object) -> None:
    """A hostile shape must not become an array before anyone looks at it."""
    if math.prod(shape) > MAX_CONSTANT_ELEMENTS:
        raise InputError(f"{what}: a constant of shape {tuple(shape)} is absurdly large")


def shape_of(value: Value) -> tuple[int, ...]:
    return tuple(int(d) for d in value.shape)


def reshape(x: Var, shape: Sequence[int]) -> Var:
    if shape_of(x) == tuple(shape):
        return x
    if not shape:
        return mb.squeeze(x=x)
    if x.rank == 0:
        return mb.expand_dims(x=x, axes=list(range(len(shape))))
    return mb.reshape(x=x, shape=list(shape))


def expand(x: Var, shape: Sequence[int]) -> Var:
    """numpy.broadcast_to."""
    if x.val is not None:
        require_modest(shape, x.name)
        full = np.broadcast_to(x.val, shape)
        return x if full.shape == shape_of(x) else mb.const(val=np.ascontiguousarray(full)[()])
    x = reshape(x, (1,) * (len(shape) - x.rank) + shape_of(x))
    reps = [want // have for want, have in zip(shape, shape_of(x))]
    return x if all(r == 1 for r in reps) else mb.tile(x=x, reps=reps)


def cast(x: Var, dtype: str) -> Var:
    return x if types.builtin_to_string(x.dtype) == dtype else mb.cast(x=x, dtype=dtype)


# --- shape ---------------------------------------------------------------------------------------------


@lowers("Identity", "Dropout")
def _identity(n: Node) -> Value:
    """Dropout at inference is the identity; its mask has no value there."""
    if n.has(2) and bool(n.known(2)):
        raise InputError(f"{n}: training_mode is on; export the model in eval mode")
    if len(n.proto.output) > 1 and n.proto.output[1]:
        raise InputError(f"{n}: its mask output has no lowering")
    value = n.inputs[0]
    return value if value is not None else n.var(0)


@lowers("Constant")
def _constant(n: Node) -> Value:
    raise InputError(f"{n}: only tensors and numbers can be constants, not {sorted(n.attributes)}")


@lowers("Shape")
def _shape(n: Node) -> Value:
    start, end = n.attributes.get("start", 0), n.attributes.get("end")
    return np.array(shape_of(n.var(0))[start:end], np.int64)


@lowers("Size")
def _size(n: Node) -> Value:
    return np.array(math.prod(shape_of(n.var(0))), np.int64)


@lowers("ConstantOfShape", "Range")
def _constant_only(n: Node) -> Value:
    """Folded when its inputs are known; the size of the result must be."""
    raise InputError(f"{n}: its inputs {list(n.proto.input)} are computed at run time and must be fixed")


@lowers("Reshape")
def _reshape(n: Node) -> Value:
    """0 copies a dimension (unless allowzero), -1 is inferred."""
    x, want = n.var(0), n.ints(1) or []
    have = shape_of(x)
    if not n.attributes.get("allowzero", 0):
        if any(d == 0 and i >= len(have) for i, d in enumerate(want)):
            raise InputError(f"{n}: shape {want} copies a dimension that {have} lacks")
        want = [have[i] if d == 0 else d for i, d in enumerate(want)]
    if want.count(-1) == 1:
        rest = -math.prod(want)
        want[want.index(-1)] = math.prod(have) // rest if rest else -1
    if any(d < 0 for d in want) or math.prod(want) != math.prod(have):
        raise InputError(f"{n}: cannot reshape {have} to {want}")
    return reshape(x, want)


@lowers("Flatten")
def _flatten(n: Node) -> Value:
    shape, axis = shape_of(n.var(0)), int(n.attributes.get("axis", 1))
    return reshape(n.var(0), [math.prod(shape[:axis]), math.prod(shape[axis:])])


@lowers("Transpose")
def _transpose(n: Node) -> Value:
    x = n.var(0)
    perm = [int(i) for i in n.attributes.get("perm", range(x.rank)[::-1])]
    return x if perm == list(range(x.rank)) else mb.transpose(x=x, perm=perm)


@lowers("Squeeze")
def _squeeze(n: Node) -> Value:
    x, axes = n.var(0), n.ints(1)
    gone = {i for i, d in enumerate(shape_of(x)) if d == 1} if axes is None else {a % x.rank for a in axes}
    keep = [d for i, d in enumerate(shape_of(x)) if i not in gone]
    return x if not gone else mb.squeeze(x=x, axes=sorted(gone)) if keep else reshape(x, [])


@lowers("Unsqueeze")
def _unsqueeze(n: Node) -> Value:
    x, axes = n.var(0), n.ints(1) or []
    return mb.expand_dims(x=x, axes=sorted(a % (x.rank + len(axes)) for a in axes))


@lowers("Concat")
def _concat(n: Node) -> Value:
    """Parts of size zero, such as a cache that starts empty, vanish."""
    axis = int(n.attributes["axis"])
    parts = [i for i, v in enumerate(n.inputs) if v is not None and shape_of(v)[axis] != 0]
    return mb.concat(values=[n.var(i) for i in parts], axis=axis) if len(parts) > 1 else n.var(parts[0])


@lowers("Split")
def _split(n: Node) -> Value | Sequence[Value]:
    """Sizes, or num_outputs equal parts of which the last may be smaller (opset 18)."""
    x = n.var(0)
    axis, count = n.axis(0, x.rank), len(n.proto.output)
    sizes = n.ints(1)
    if sizes is None:
        length = shape_of(x)[axis]
        part = -(-length // count)
        sizes = [part] * (count - 1) + [length - part * (count - 1)]
    return mb.split(x=x, split_sizes=sizes, axis=axis) if len(sizes) > 1 else x


@lowers("Expand")
def _expand(n: Node) -> Value:
    x, shape = n.var(0), n.ints(1) or []
    return expand(x, np.broadcast_shapes(shape_of(x), tuple(shape)))


@lowers("Tile")
def _tile(n: Node) -> Value:
    return mb.tile(x=n.var(0), reps=n.ints(1) or [])
