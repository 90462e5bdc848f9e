"""The surgery's int64_to_int32: integers of a graph as int32 wherever that is provably the same.

Values that an operator forces to share a type form a group. A group becomes int32 when none of its members
must stay int64 (a Reshape's shape, a graph output, the result of arithmetic that could overflow) and its
constants fit. A graph input is always made int32; where its group stays int64, a Cast follows it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from distill.convert.onnx_graph import captured, onnx

INT32 = np.iinfo(np.int32)

# Operators that only move or compare integers: these inputs and outputs share one type, which may be int32.
# "i" inputs, "o" outputs; other integer inputs (a shape, axes) must stay int64.
_TIED: dict[str, tuple[tuple[int, ...] | None, bool]] = {
    "Concat": (None, True),
    "Equal": ((0, 1), False),
    "Expand": ((0,), True),
    "Flatten": ((0,), True),
    "Gather": ((0,), True),
    "GatherElements": ((0,), True),
    "Greater": ((0, 1), False),
    "GreaterOrEqual": ((0, 1), False),
    "Identity": ((0,), True),
    "Less": ((0, 1), False),
    "LessOrEqual": ((0, 1), False),
    "Max": (None, True),
    "Min": (None, True),
    "Reshape": ((0,), True),
    "Slice": ((0,), True),
    "Squeeze": ((0,), True),
    "Tile": ((0,), True),
    "Transpose": ((0,), True),
    "Unsqueeze": ((0,), True),
    "Where": ((1, 2), True),
}
# Inputs whose integer type is free of every other's.
_FREE: dict[str, tuple[int, ...]] = {"Cast": (0,), "Gather": (1,), "GatherElements": (1,)}


class _Groups:
    """Union-find over value names; a pinned group stays int64."""

    def __init__(self, names: set[str]) -> None:
        self.parent = {name: name for name in names}
        self.pinned: set[str] = set()

    def root(self, name: str) -> str:
        while self.parent[name] != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name

    def join(self, a: str, b: str) -> None:
        self.parent[self.root(a)] = self.root(b)

    def pin(self, name: str) -> None:
        self.pinned.add(name)

    def stays(self) -> set[str]:
        roots = {self.root(name) for name in self.pinned}
        return {name for name in self.parent if self.root(name) in roots}


def _typed(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    for value in (*graph.input, *graph.value_info, *graph.output):
        yield value.name, value.type.tensor_type.elem_type
    for tensor in graph.initializer:
        yield tensor.name, tensor.data_type


def _widens(node: onnx.NodeProto, types: dict[str, int]) -> bool:
    """A Cast to int64 from a narrower type: to int32 it loses nothing either."""
    kind = onnx.TensorProto
    narrow = (kind.BOOL, kind.INT8, kind.INT16, kind.INT32, kind.UINT8, kind.UINT16)
    return node.op_type == "Cast" and types.get(node.input[0]) in narrow


def _visit(node: onnx.NodeProto, groups: _Groups, int64: set[str], types: dict[str, int]) -> None:
    """Join what the node ties together and pin what it needs, or makes, as int64."""
    standard = node.domain in ("", "ai.onnx")
    tied_inputs, tied_output = _TIED.get(node.op_type, ((), False)) if standard else ((), False)
    indices = range(len(node.input)) if tied_inputs is None else tied_inputs
    free = _FREE.get(node.op_type, ()) if standard else ()
    tied = [node.input[i] for i in indices if i < len(node.input) and node.input[i] in int64]
    if tied_output:
        tied += [name for name in node.output if name in int64]
    for a, b in itertools.pairwise(tied):
        groups.join(a, b)
    for i, name in enumerate(node.input):
        if name in int64 and i not in free and i not in indices:
            groups.pin(name)
    for name in node.output:
        if name in int64 and name not in tied and not _widens(node, types):
            groups.pin(name)
    for name in captured(node) & int64:
        groups.pin(name)


def _fits(tensor: onnx.TensorProto) -> bool:
    array = onnx.numpy_helper.to_array(tensor)
    return array.size == 0 or bool(INT32.min <= array.min() and array.max() <= INT32.max)


def _retype(graph: onnx.GraphProto, names: set[str]) -> list[str]:
    changed = []
    for value in (*graph.input, *graph.value_info):
        if value.name in names and value.type.tensor_type.elem_type == onnx.TensorProto.INT64:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT32
            changed.append(value.name)
    for tensor in graph.initializer:
        if tensor.name in names and tensor.data_type == onnx.TensorProto.INT64:
            array = onnx.numpy_helper.to_array(tensor).astype(np.int32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
            changed.append(tensor.name)
    for node in graph.node:
        if node.op_type == "Cast" and node.output[0] in names:
            node.attribute[0].i = onnx.TensorProto.INT32
            changed.append(node.output[0])
    return changed


def _unused_name(base: str, taken: set[str]) -> str:
    while base in taken:
        base += "_"
    taken.add(base)
    return base


def _cast_inputs(graph: onnx.GraphProto, stays: set[str], taken: set[str]) -> list[str]:
    """Graph inputs as int32; readers that need int64 get a Cast of it."""
    given = {t.name for t in graph.initializer}
    outputs = {o.name for o in graph.output}
    casts, renamed = [], {}
    inside = {name for node in graph.node for name in captured(node)}
    for value in graph.input:
        if value.name not in stays or value.name in given | inside | outputs:
            continue
        wide = _unused_name(f"{value.name}_int64", taken)
        value.type.tensor_type.elem_type = onnx.TensorProto.INT32
        casts.append(onnx.helper.make_node("Cast", [value.name], [wide], name=wide, to=onnx.TensorProto.INT64))
        renamed[value.name] = wide
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return list(renamed)


def int64_to_int32(model: onnx.ModelProto) -> list[str]:
    """Integers as int32 where the result cannot differ; a graph's integer inputs always."""
    graph = model.graph
    types = dict(_typed(graph))
    int64 = {name for name, kind in types.items() if kind == onnx.TensorProto.INT64}
    groups = _Groups(int64)
    for node in graph.node:
        _visit(node, groups, int64, types)
        untyped = any(name and name not in types for name in (*node.input, *node.output))
        for name in (*node.input, *node.output):
            if untyped and name in int64:
                groups.pin(name)
    for output in graph.output:
        if output.name in int64:
            groups.pin(output.name)
    for tensor in graph.initializer:
        if tensor.name in int64 and not _fits(tensor):
            groups.pin(tensor.name)
    stays = groups.stays()
    narrowed = int64 - stays
    changed = _cast_inputs(graph, stays, set(types))
    return changed + _retype(graph, narrowed)
