"""What the ONNX frontend and the surgery share: the guarded import, reading an untrusted file, constants.

An ONNX file is untrusted: whatever is wrong with one ends in an `InputError` of one line that names it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError

from distill.errors import InputError

if TYPE_CHECKING:
    import onnx


@functools.cache
def _import_onnx() -> ModuleType:
    # A folder of outputs named onnx/ in the working directory would import as an empty namespace package.
    try:
        importlib.metadata.version("onnx")
    except importlib.metadata.PackageNotFoundError:
        raise InputError("the package onnx is not installed: pip install 'distill[onnx]'") from None
    for name in ("onnx.inliner", "onnx.reference"):
        importlib.import_module(name)
    return importlib.import_module("onnx")


class _OnnxExtra:
    """Stands for the module `onnx`, which is imported when it is first used."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_import_onnx(), name)


if not TYPE_CHECKING:
    onnx = _OnnxExtra()

OLDEST_OPSET = 13
LARGE_TENSOR_BYTES = 4096  # above this, a weight is not shown to the checker or to shape inference
MAX_RANK = 16
MAX_ELEMENTS = 2**40

# Operators whose value `fold` computes when all inputs are known.
# fmt: off
_BROADCASTING = frozenset(
    [
        "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min",
        "Mod", "Mul", "Or", "Pow", "Sub", "Where", "Xor",
    ]
)
_NOT_GROWING = frozenset(
    [
        "Abs", "ArgMax", "Cast", "CastLike", "Ceil", "Clip", "Concat", "Cos", "CumSum", "Erf", "Exp",
        "Flatten", "Floor", "GatherElements", "Identity", "IsNaN", "Log", "Neg", "Not", "Reciprocal",
        "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu", "Reshape",
        "ScatterND", "Shape", "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax", "Split", "Sqrt",
        "Squeeze", "Tanh", "Transpose", "Trilu", "Unsqueeze",
    ]
)
# fmt: on
_GROWING = frozenset(["Constant", "ConstantOfShape", "Expand", "Gather", "MatMul", "Range", "Tile"])
FOLDABLE = _BROADCASTING | _NOT_GROWING | _GROWING


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def opsets(model: onnx.ModelProto) -> dict[str, int]:
    """Domain to version; the two spellings of the default domain are one."""
    return {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def captured(node: onnx.NodeProto) -> set[str]:
    """Names that the bodies of If, Loop and Scan read; outer values among them are uses of this node."""
    names: set[str] = set()
    for graph in subgraphs(node):
        names.update(o.name for o in graph.output)
        for inner in graph.node:
            names.update(inner.input)
            names |= captured(inner)
    return names


def _node_tensors(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for graph in subgraphs(node):
            yield from graph.initializer
            yield from _node_tensors(graph.node)


def all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    yield from _node_tensors(model.graph.node)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _check_tensor_size(tensor: onnx.TensorProto, file: str) -> None:
    """The declared shape and the bytes agree: the checker is not shown large weights."""
    dims = list(tensor.dims)
    if any(d < 0 for d in dims) or len(dims) > MAX_RANK or math.prod(dims) > MAX_ELEMENTS:
        raise InputError(f"{file}: tensor {tensor.name!r} has the absurd shape {dims[:MAX_RANK]}")
    if not tensor.HasField("raw_data"):
        return
    try:
        item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        raise InputError(f"{file}: tensor {tensor.name!r} has the unknown type {tensor.data_type}") from None
    packed = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    expected = (math.prod(dims) + 1) // 2 if packed else math.prod(dims) * item
    if len(tensor.raw_data) != expected:
        had = f"needs {expected} bytes and has {len(tensor.raw_data)}"
        raise InputError(f"{file}: tensor {tensor.name!r} of shape {dims} {had}")


def _external_number(entries: Mapping[str, str], key: str, default: int, where: str) -> int:
    text = entries.get(key, str(default))
    if not text.isdecimal():
        raise InputError(f"{where}: external data {key} {text[:40]!r} is not a number")
    return int(text)


def _load_external(tensor: onnx.TensorProto, path: Path) -> None:
    """ONNX IR, external data: location is relative and must stay in the folder of the model."""
    where = f"{path}: tensor {tensor.name!r}"
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    folder = path.parent.resolve()
    if not location or "\0" in location or Path(location).is_absolute():
        raise InputError(f"{where}: external data location {location[:80]!r} is not a relative path")
    target = (folder / location).resolve()
    if not target.is_relative_to(folder):
        raise InputError(f"{where}: external data location {location[:80]!r} leaves the folder of the model")
    if not target.is_file():
        raise InputError(f"{where}: external data file {location[:80]!r} is missing")
    size = target.stat().st_size
    offset = _external_number(entries, "offset", 0, where)
    length = _external_number(entries, "length", max(size - offset, 0), where)
    if offset + length > size:
        raise InputError(f"{where}: external data ends at byte {offset + length} of a file of {size}")
    with target.open("rb") as stream:
        stream.seek(offset)
        tensor.raw_data = stream.read(length)
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]


def read(path: Path) -> onnx.ModelProto:
    """Parse and check an untrusted .onnx file, its external data included."""
    _import_onnx()
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise InputError(f"{path}: not an ONNX file, or truncated ({one_line(error)})") from None
    for tensor in all_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _load_external(tensor, path)
    check(model, str(path))
    return model


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with large weights turned into graph inputs: protobuf cannot serialise more than 2 GiB."""
    bare = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            part = getattr(bare, field.name)
            if hasattr(part, "extend"):
                part.extend(value)
            else:
                setattr(bare, field.name, value)
    graph = model.graph
    bare.graph.name = graph.name
    bare.graph.node.extend(graph.node)
    bare.graph.input.extend(graph.input)
    bare.graph.output.extend(graph.output)
    bare.graph.value_info.extend(graph.value_info)
    given = {i.name for i in graph.input}
    for tensor in graph.initializer:
        if len(tensor.raw_data) <= LARGE_TENSOR_BYTES:
            bare.graph.initializer.append(tensor)
        elif tensor.name not in given:
            bare.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    return bare


def _check_text(message: Any, file: str) -> None:
    """protobuf gives a string that is not UTF-8 as bytes."""
    for field, value in message.ListFields():
        parts = [value] if isinstance(value, (str, bytes)) or hasattr(value, "ListFields") else value
        if field.type == field.TYPE_STRING and not all(isinstance(part, str) for part in parts):
            raise InputError(f"{file}: its {field.full_name} is not UTF-8 text")
        if field.type == field.TYPE_MESSAGE:
            for part in parts:
                _check_text(part, file)


def check(model: onnx.ModelProto, file: str) -> None:
    """onnx.checker and what it does not see. Operators without a schema are the lowering's to report."""
    if not model.HasField("graph") or not model.graph.output:
        raise InputError(f"{file}: not an ONNX model: it has no graph with outputs")
    _check_text(model, file)
    for tensor in all_tensors(model):
        _check_tensor_size(tensor, file)
    opset = opsets(model).get("", 0)
    if opset < OLDEST_OPSET:
        raise InputError(f"{file}: opset {opset}; export again with opset {OLDEST_OPSET} or later")
    bare = _skeleton(model)
    for node in bare.graph.node:
        if not node.domain and not onnx.defs.has(node.op_type):
            node.domain = "unregistered"  # the checker then still checks the rest of the graph
    bare.opset_import.append(onnx.helper.make_opsetid("unregistered", 1))
    try:
        onnx.checker.check_model(bare)
    except onnx.checker.ValidationError as error:
        raise InputError(f"{file}: {one_line(error)}") from None


def _has_body(op_type: str, opset: int) -> bool:
    if not onnx.defs.has(op_type):
        return False
    schema: Any = onnx.defs.get_schema(op_type, opset)
    return schema.has_function or schema.has_context_dependent_function


def inline(model: onnx.ModelProto, known: Collection[str], file: str) -> list[onnx.NodeProto]:
    """The nodes, with local functions and standard functions not in `known` replaced by their bodies."""
    inliner: Any = importlib.import_module("onnx.inliner")
    opset, done = opsets(model)[""], set(known)
    bare = _skeleton(model)
    while True:
        standard = {n.op_type for n in bare.graph.node if n.domain in ("", "ai.onnx")} - done
        bodies = [("", op) for op in sorted(standard) if _has_body(op, opset)]
        try:
            if bare.functions:
                bare = inliner.inline_local_functions(bare)
            elif bodies:
                bare = inliner.inline_selected_functions(bare, bodies, inline_schema_functions=True)
                done |= standard
            else:
                return list(bare.graph.node)
        except (onnx.checker.ValidationError, RuntimeError) as error:
            raise InputError(f"{file}: {one_line(error)}") from None


def infer(model: onnx.ModelProto, file: str) -> None:
    """onnx.shape_inference in place: types and shapes of every value into value_info and the outputs."""
    bare = _skeleton(model)
    del bare.graph.value_info[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise InputError(f"{file}: {one_line(error)}") from None
    del model.graph.value_info[:]
    model.graph.value_info.extend(sorted(inferred.graph.value_info, key=lambda v: v.name))
    for mine, theirs in zip(model.graph.output, inferred.graph.output, strict=True):
        mine.CopyFrom(theirs)


def static_shape(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    """The shape when every dimension is a number, else None."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or any(not d.HasField("dim_value") for d in tensor.shape.dim):
        return None
    return tuple(d.dim_value for d in tensor.shape.dim)


def _result_elements(node: onnx.NodeProto, arrays: Sequence[np.ndarray | None]) -> int:
    """How many elements the result of a foldable node has at most, found without making it."""
    known = [a for a in arrays if a is not None]
    op = node.op_type
    if op in _BROADCASTING:
        return math.prod(np.broadcast_shapes(*(a.shape for a in known)))
    if op == "MatMul":
        left, right = known
        batch = math.prod(np.broadcast_shapes(left.shape[:-2], right.shape[:-2]))
        return batch * math.prod(left.shape[-2:-1]) * math.prod(right.shape[-1:] if right.ndim > 1 else ())
    if op == "ConstantOfShape":
        return math.prod(int(d) for d in known[0].tolist())
    if op == "Expand":
        return max(known[0].size, 1) * math.prod(int(d) for d in known[1].tolist())
    if op == "Tile":
        return known[0].size * math.prod(int(d) for d in known[1].tolist())
    if op == "Range":
        start, limit, delta = (a.item() for a in known)
        return max(math.ceil((limit - start) / delta), 0)
    if op == "Split" and attributes(node).get("num_outputs", len(node.output)) != len(node.output):
        raise ValueError("num_outputs is not the number of its outputs")
    if op == "Gather":
        return known[0].size * max(known[1].size, 1)
    return sum(a.size for a in known)


def foldable(node: onnx.NodeProto) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in FOLDABLE


def fold(
    node: onnx.NodeProto, arrays: Sequence[np.ndarray | None], opsets: Mapping[str, int], max_elements: int
) -> list[np.ndarray] | None:
    """The outputs of a node whose inputs are all known, or None where it is not ours to compute."""
    if not foldable(node):
        return None
    try:
        if _result_elements(node, arrays) > max_elements:
            return None
        session = importlib.import_module("onnx.reference").ReferenceEvaluator(node, opsets=dict(opsets))
        feeds = {name: array for name, array in zip(node.input, arrays) if name}
        with np.errstate(all="ignore"):
            results: Any = session.run(None, feeds)
    except (ValueError, TypeError, IndexError, ArithmeticError, RuntimeError) as error:
        name = node.name or node.output[0]
        raise InputError(f"{node.op_type} {name!r} cannot be computed: {one_line(error)}") from None
    return [np.asarray(r) for r in results]
