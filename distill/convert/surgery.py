"""ONNX surgery: named rewrites, in order, that make an exported graph static, small and fit for Core ML.

    distill surgery --in a.onnx --out b.onnx [--shape input_ids=1,64]

The result computes what the model computed, in onnxruntime as in Core ML, and doing it twice changes nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from google.protobuf.message import EncodeError
from rich.console import Console
from rich.table import Table

from distill.artifacts import atomic_file
from distill.convert import surgery_int32
from distill.convert.onnx_graph import (
    captured,
    check,
    fold,
    infer,
    inline,
    one_line,
    onnx,
    opsets,
    read,
    static_shape,
)
from distill.errors import InputError, stage_main

MAX_FOLDED_ELEMENTS = 2**20  # a larger constant would weigh more in the file than the node that makes it
MAX_ROUNDS = 10

Rewrite = Callable[[onnx.ModelProto], list[str]]


@dataclass
class SurgeryReport:
    """What each rewrite changed, by the names of the values, and the sizes before and after."""

    changed: dict[str, list[str]] = field(default_factory=dict)
    nodes: tuple[int, int] = (0, 0)
    initializers: tuple[int, int] = (0, 0)

    @property
    def total(self) -> int:
        return sum(len(names) for names in self.changed.values())

    def table(self) -> Table:
        table = Table(title="ONNX surgery")
        for heading in ("rewrite", "changes", "names"):
            table.add_column(heading, justify="right" if heading == "changes" else "left", overflow="fold")
        for rewrite, names in self.changed.items():
            more = f", and {len(names) - 4} more" if len(names) > 4 else ""
            table.add_row(rewrite, str(len(names)), ", ".join(names[:4]) + more)
        table.add_row("nodes", f"{self.nodes[0]} -> {self.nodes[1]}", "")
        table.add_row("initializers", f"{self.initializers[0]} -> {self.initializers[1]}", "")
        return table


def _uses(graph: onnx.GraphProto) -> set[str]:
    used = {o.name for o in graph.output}
    for node in graph.node:
        used.update(node.input)
        used |= captured(node)
    return used


def _set_nodes(graph: onnx.GraphProto, kept: list[onnx.NodeProto]) -> None:
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)


# --- the rewrites --------------------------------------------------------------------------------------


def inline_functions(model: onnx.ModelProto, file: str = "the ONNX model") -> list[str]:
    """Calls of the model's own functions become their bodies."""
    names = [f"{f.domain}.{f.name}" for f in model.functions]
    if names:
        standard = {n.op_type for n in model.graph.node} | {n.op_type for f in model.functions for n in f.node}
        nodes = inline(model, standard, file)
        del model.functions[:], model.graph.node[:]
        model.graph.node.extend(nodes)
    return names


def _known_inputs(model: onnx.ModelProto) -> set[str]:
    given = {t.name for t in model.graph.initializer}
    return {v.name for v in model.graph.input if v.name not in given}


def _fixed_dims(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], file: str) -> dict[str, int]:
    """Named dimension -> size, from shapes given by input name, or by the dimension's own name."""
    sizes: dict[str, int] = {}
    inputs = {v.name: v for v in model.graph.input if v.name in _known_inputs(model)}
    named = {d.dim_param for v in inputs.values() for d in v.type.tensor_type.shape.dim if d.dim_param}
    for name, shape in shapes.items():
        if any(d < 1 for d in shape):
            raise InputError(f"{file}: shape {name}={tuple(shape)}: every dimension must be at least 1")
        if name not in inputs:
            if name not in named or len(shape) != 1:
                known = ", ".join(sorted(inputs.keys() | named))
                raise InputError(f"{file}: no input or dimension {name!r} to shape; there are: {known}")
            sizes[name] = shape[0]
            continue
        dims = inputs[name].type.tensor_type.shape.dim
        if len(dims) != len(shape):
            raise InputError(f"{file}: input {name!r} has rank {len(dims)}, not {len(shape)}")
        for axis, (dim, size) in enumerate(zip(dims, shape)):
            had = dim.dim_value if dim.HasField("dim_value") else sizes.get(dim.dim_param, size)
            if had != size:
                raise InputError(f"{file}: input {name!r} axis {axis} is {had} and cannot be made {size}")
            if dim.dim_param:
                sizes[dim.dim_param] = size
    return sizes


def static_shapes(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], *, file: str = "the ONNX model"
) -> list[str]:
    """Fix the dimensions of inputs (by input, or by the name of a dimension) and infer all shapes anew."""
    sizes = _fixed_dims(model, shapes, file)
    changed = []
    for value in model.graph.input:
        before = value.SerializeToString()
        dims = value.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
            elif value.name in shapes and not dim.HasField("dim_value"):
                dim.dim_value = shapes[value.name][axis]
        if value.SerializeToString() != before:
            changed.append(value.name)
    if changed:
        for value in model.graph.output:
            for dim in value.type.tensor_type.shape.dim:
                dim.ClearField("dim_param")
    infer(model, file)
    return changed


def fold_constants(model: onnx.ModelProto, file: str = "the ONNX model") -> list[str]:
    """Nodes whose inputs are all constant, and shapes of static tensors, become initialisers."""
    graph = model.graph
    numpy_helper, versions = onnx.numpy_helper, opsets(model)
    inputs = _known_inputs(model)
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.name not in inputs}
    shapes = {v.name: static_shape(v) for v in (*graph.input, *graph.value_info, *graph.output)}
    outputs = {o.name for o in graph.output}
    folded, kept = [], []
    for node in graph.node:
        results = None
        if not outputs.intersection(node.output):
            known = {name: arrays[name] for name in node.input if name in arrays}
            shape = shapes.get(node.input[0]) if node.op_type in ("Shape", "Size") else None
            if shape is not None:
                known[node.input[0]] = np.broadcast_to(np.float32(0), shape)
            if all(name in known for name in node.input if name):
                feeds = [known.get(name) for name in node.input]
                limit = sys.maxsize if shape is not None else MAX_FOLDED_ELEMENTS
                try:
                    results = fold(node, feeds, versions, limit)
                except InputError as error:
                    raise InputError(f"{file}: {error}") from None
        if results is None:
            kept.append(node)
            continue
        for name, array in zip(node.output, results):
            arrays[name] = array
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
            folded.append(name)
    _set_nodes(graph, kept)
    return folded


def _is_noop(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Identity":
        return True
    if node.op_type != "Dropout" or any(node.output[1:]):
        return False
    training = node.input[2] if len(node.input) > 2 else ""
    return not training or (training in weights and not onnx.numpy_helper.to_array(weights[training]).any())


def remove_identity(model: onnx.ModelProto) -> list[str]:
    """Identity, and Dropout as it is at inference, give way to their inputs."""
    graph = model.graph
    weights = {t.name: t for t in graph.initializer}
    sources = weights.keys() | {v.name for v in graph.input}
    outputs = {o.name for o in graph.output}
    inside = {name for node in graph.node for name in captured(node)}
    renamed: dict[str, str] = {}
    removed: list[str] = []
    kept = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        kept.append(node)
        if not _is_noop(node, weights) or node.output[0] in inside:
            continue
        source, result = node.input[0], node.output[0]
        if result not in outputs:
            renamed[result] = source
        elif source in sources or source in outputs or source in inside:
            # An output must keep its own name, and so must a weight, an input and another output.
            if node.op_type == "Dropout":
                node.CopyFrom(onnx.helper.make_node("Identity", [source], [result], name=node.name))
                removed.append(result)
            continue
        else:
            for other in graph.node:
                for names in (other.input, other.output):
                    for i, name in enumerate(names):
                        if name == source:
                            names[i] = result
            renamed = {k: result if v == source else v for k, v in renamed.items()}
        removed.append(result)
        kept.pop()
    _set_nodes(graph, kept)
    return removed


def remove_dead_nodes(model: onnx.ModelProto) -> list[str]:
    """Nodes that no output depends on."""
    graph = model.graph
    needed = {o.name for o in graph.output}
    dead = []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            dead.append(node.output[0])
        else:
            needed |= captured(node)
            needed.update(node.input)
    _set_nodes(graph, [n for n in graph.node if not needed.isdisjoint(n.output)])
    return dead[::-1]


def remove_unused_initializers(model: onnx.ModelProto) -> list[str]:
    """Weights that nothing reads."""
    graph, used = model.graph, _uses(model.graph)
    unused = [t.name for t in graph.initializer if t.name not in used]
    if unused:
        kept = [t for t in graph.initializer if t.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
    return unused


# --- all of them ---------------------------------------------------------------------------------------


def sanitize(
    model: onnx.ModelProto,
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    file: str = "the ONNX model",
) -> SurgeryReport:
    """Every rewrite in order, in place, until none of them finds anything more to do."""
    rewrites: dict[str, Rewrite] = {
        "inline_functions": lambda m: inline_functions(m, file),
        "static_shapes": lambda m: static_shapes(m, shapes or {}, file=file),
        "remove_identity": remove_identity,
        "fold_constants": lambda m: fold_constants(m, file),
        "remove_dead_nodes": remove_dead_nodes,
        "remove_unused_initializers": remove_unused_initializers,
        "int64_to_int32": surgery_int32.int64_to_int32,
    }
    graph, report = model.graph, SurgeryReport(changed={name: [] for name in rewrites})
    nodes, initializers = len(graph.node), len(graph.initializer)
    for _ in range(MAX_ROUNDS):
        before = report.total
        for name, rewrite in rewrites.items():
            report.changed[name] += rewrite(model)
        if report.total == before:
            break
    infer(model, file)
    check(model, file)
    report.nodes = (nodes, len(graph.node))
    report.initializers = (initializers, len(graph.initializer))
    return report


def write(model: onnx.ModelProto, path: Path) -> None:
    try:
        data = model.SerializeToString()
    except (ValueError, EncodeError) as error:
        raise InputError(f"{path}: protobuf cannot hold this model ({one_line(error)})") from None
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def _shape_argument(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, dims = text.rpartition("=")
    parts = dims.split(",")
    if not name or not all(p.strip().isdecimal() for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=D,D,... with whole numbers")
    return name, tuple(int(p) for p in parts)


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Rewrite an ONNX file and print what changed."""
    parser = argparse.ArgumentParser(prog="distill surgery", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--in", dest="source", type=Path, required=True, help="the ONNX model")
    parser.add_argument("--out", type=Path, required=True, help="where the rewritten model goes")
    parser.add_argument(
        "--shape", type=_shape_argument, action="append", default=[], help="fix an input, e.g. input_ids=1,64"
    )
    args = parser.parse_args(argv)
    model = read(args.source)
    report = sanitize(model, dict(args.shape), file=str(args.source))
    write(model, args.out)
    Console().print(report.table())
    return 0
