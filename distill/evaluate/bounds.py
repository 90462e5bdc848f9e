"""What no device can beat: the bytes that a call must read and the multiply-adds that it must make, from the package.

Read from the serialized program and weight.bin. Counted is only what is certain: weights once a call as they are
stored, of an embedding only the rows that are looked up, the state once, and the products of matrices. Everything
else, activations and softmax included, costs nothing here, so that the speeds that follow are upper bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from distill import mil
from distill.evaluate.chips import LARGEST_CACHE, Chip
from distill.mil.dtypes import packed_size
from distill.mil.program import Function, Operation, Shape, StateType, TensorType, Value

Users = dict[str, list[tuple[Operation, str]]]
"""Value -> the operations that take it, and as which argument."""


class Cost(NamedTuple):
    """Of one call of a function."""

    tokens: int
    weights: int
    """Bytes of every weight as stored."""
    read: int
    """Those of them that a call reads."""
    state: int
    """Bytes of the KV state."""
    operations: int
    """Two for each multiply-add of a product of matrices."""


class Bound(NamedTuple):
    """Tokens a second on one chip, at most; None where a figure is unknown or does not bind."""

    chip: str
    bandwidth: float | None
    operations: float | None
    """At the Neural Engine's stated rate; GPU and CPU have others."""


def cost(function: Function) -> Cost:
    """What a call costs at least. The tokens are the last dimension of the first input."""
    shapes = dict(_shapes(function))
    stored, read = _weights(function, shapes)
    state = sum(_bytes(feature.type) for feature in function.states)
    operations = sum(_operations(op, shapes, function) for op in function.block.walk())
    tokens = function.inputs[0].shape[-1] if function.inputs and function.inputs[0].shape else None
    return Cost(tokens or 1, stored, read, state, operations)


def costs(program: mil.Program) -> dict[str, Cost]:
    """By function."""
    return {name: cost(function) for name, function in program.functions.items()}


def bound(found: Cost, chip: Chip) -> Bound:
    """No bound by bandwidth where weights and state might stay in a cache."""
    bandwidth = operations = None
    moved = found.read + found.state
    if chip.bandwidth and moved > LARGEST_CACHE:
        bandwidth = found.tokens * chip.bandwidth * 1e9 / moved
    if chip.tops and found.operations:
        operations = found.tokens * chip.tops * 1e12 / found.operations
    return Bound(chip.name, bandwidth, operations)


def _shapes(function: Function) -> Iterator[tuple[str, Shape]]:
    for feature in (*function.inputs, *function.states):
        yield feature.name, feature.type.shape
    for op in function.block.walk():
        for out in op.outputs:
            yield out.name, out.shape


def _shape(op: Operation, name: str, shapes: dict[str, Shape]) -> Shape:
    given = op.inputs[name][0]
    return given.type.shape if isinstance(given, Value) else shapes[given]


def _count(shape: Shape) -> int:
    return math.prod(d or 1 for d in shape)


def _bytes(kind: object) -> int:
    inner = kind.wrapped if isinstance(kind, StateType) else kind
    return packed_size(inner.dtype, _count(inner.shape)) if isinstance(inner, TensorType) else 0


def _weights(function: Function, shapes: dict[str, Shape]) -> tuple[int, int]:
    """Bytes of all constants in weight files, each once; and of them those that a call reads."""
    users: Users = {}
    for op in function.block.walk():
        for argument, bindings in op.inputs.items():
            for binding in bindings:
                if isinstance(binding, str):
                    users.setdefault(binding, []).append((op, argument))
    stored = {key: _bytes(value.type) for key, value in function.stored.items()}
    read: dict[object, float] = {}
    for op in function.block.walk():
        for argument, value in op.held():
            if value.is_blob:
                read[value.key] = min(1.0, read.get(value.key, 0.0) + _share(op, argument, users, shapes))
    return sum(stored.values()), math.ceil(sum(stored[key] * share for key, share in read.items()))


def _share(op: Operation, argument: str, users: Users, shapes: dict[str, Shape]) -> float:
    """How much of an operand is read at least: rows looked up of a table, as much of a constant as of its use."""
    if op.type == "const" or op.type.startswith("constexpr_"):
        uses = users.get(op.outputs[0].name, ())
        return min(1.0, sum(_share(user, name, users, shapes) for user, name in uses))
    if op.type.startswith("gather") and argument == "x":
        return min(1.0, _count(_shape(op, "indices", shapes)) / max(1, _rows(op, shapes)))
    return 1.0


def _rows(op: Operation, shapes: dict[str, Shape]) -> int:
    """Rows of a table that is looked up along its first axis."""
    table = _shape(op, "x", shapes)
    return (table[0] or 1) if table else 1


def _operations(op: Operation, shapes: dict[str, Shape], function: Function) -> int:
    if op.type == "conv":
        return 2 * _count(op.outputs[0].shape) * _count(_shape(op, "weight", shapes)[1:])
    if op.type == "linear":
        return 2 * _count(op.outputs[0].shape) * (_shape(op, "weight", shapes)[-1] or 1)
    if op.type == "matmul":
        transposed = function.constant(op.inputs["transpose_x"][0]) if "transpose_x" in op.inputs else None
        shape = _shape(op, "x", shapes)
        inner = shape[-2] if len(shape) > 1 and transposed is not None and bool(transposed.numpy()) else shape[-1]
        return 2 * _count(op.outputs[0].shape) * (inner or 1)
    if op.type == "scaled_dot_product_attention":
        query, key = _shape(op, "query", shapes), _shape(op, "key", shapes)
        return 2 * _count(query) * (key[-2] or 1) + 2 * _count(op.outputs[0].shape) * (key[-2] or 1)
    return 0
