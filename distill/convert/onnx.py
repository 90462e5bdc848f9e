"""ONNX to Core ML: the frontend that coremltools lost in version 6, on its MIL builder.

    program = lower(read(Path("toy.onnx")))        # coremltools.converters.mil Program
    package = convert(Path("toy.onnx"))            # coremltools.models.MLModel, in memory

MIL values keep their ONNX names; in the package those are written as `mil_name` says, and at fp16 a value `v`
may appear as `v_cast_fp16`. What Core ML computes from constants alone is folded away.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Operation, Program, Var, types
from coremltools.converters.mil.mil.passes.defs.preprocess import NameSanitizer

from distill.convert import onnx_ops_math, onnx_ops_nn, surgery
from distill.convert.onnx_graph import (
    MAX_ELEMENTS,
    attributes,
    check,
    fold,
    foldable,
    inline,
    one_line,
    onnx,
    opsets,
    read,
    static_shape,
)
from distill.convert.onnx_ops import TABLE, Node, Value, cast, to_core_ml
from distill.errors import InputError, UnsupportedOpError

__all__ = ["convert", "lower", "mil_name", "read"]

FAMILIES = (onnx_ops_math, onnx_ops_nn)  # importing them fills the table
CONTRIB = frozenset(["Gelu", "QuickGelu", "SimplifiedLayerNormalization"])  # com.microsoft, same meaning
MAX_FOLDED_ELEMENTS = 2**26
_INPUT_TYPES = {1: types.fp32, 6: types.int32, 7: types.int32, 9: types.int32, 10: types.fp16, 11: types.fp32}


def mil_name(name: str) -> str:
    """How a package spells an ONNX value name: MIL names are [A-Za-z_][A-Za-z0-9_]*."""
    return NameSanitizer(prefix="var_").sanitize_name(name)


def _op_name(node: onnx.NodeProto) -> str:
    standard = node.domain in ("", "ai.onnx") or (node.domain == "com.microsoft" and node.op_type in CONTRIB)
    return node.op_type if standard else f"{node.domain}.{node.op_type}"


def _placeholder(value: onnx.ValueInfoProto, file: str) -> Var:
    where = f"{file}: input {value.name!r}"
    if not value.type.HasField("tensor_type") or value.type.tensor_type.elem_type not in _INPUT_TYPES:
        raise InputError(f"{where} is not a tensor of float, float16, int32, int64 or bool")
    shape = static_shape(value)
    if shape is None:
        dims = enumerate(value.type.tensor_type.shape.dim)
        loose = [f"{i} ({d.dim_param or 'unnamed'})" for i, d in dims if not d.HasField("dim_value")]
        raise InputError(f"{where} has dynamic dimensions: {', '.join(loose) or 'all'}; fix its shape first")
    if any(d < 1 for d in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise InputError(f"{where} has the shape {shape}, which no tensor can have")
    dtype = _INPUT_TYPES[value.type.tensor_type.elem_type]
    return mb.placeholder(shape=shape or (1,), dtype=dtype, name=value.name)


def _inputs(model: onnx.ModelProto, file: str) -> dict[str, Var]:
    given = {t.name for t in model.graph.initializer}
    inputs = {v.name: _placeholder(v, file) for v in model.graph.input if v.name not in given}
    if not inputs:
        raise InputError(f"{file}: the graph has no inputs")
    return inputs


def _as_typed(value: onnx.ValueInfoProto, x: Var) -> Var:
    """Core ML's interface has neither bool nor rank 0: they come in as int32 and as shape (1,)."""
    if static_shape(value) == ():
        x = mb.squeeze(x=x, axes=[0])
    return cast(x, "bool") if value.type.tensor_type.elem_type == onnx.TensorProto.BOOL else x


def _check_shape(value: Var, where: str) -> None:
    if not all(isinstance(d, (int, np.integer)) for d in value.shape):
        raise InputError(f"{where} has a shape that depends on data: {value.shape}")
    if math.prod(value.shape) > MAX_ELEMENTS:
        raise InputError(f"{where} has the absurd shape {value.shape}")


def _lower_node(node: Node, versions: Mapping[str, int], file: str) -> Sequence[Value]:
    """One node: folded if its inputs are known, else by the table. An error says which node it was."""
    try:
        if all(v is None or isinstance(v, np.ndarray) for v in node.inputs):
            arrays = [v if isinstance(v, np.ndarray) else None for v in node.inputs]
            limit = max(MAX_FOLDED_ELEMENTS, sum(a.size for a in arrays if a is not None))
            folded = fold(node.proto, arrays, versions, limit)
            if folded is not None:
                return folded
            if foldable(node.proto):
                raise InputError(f"{node}: the constant it makes is absurdly large")
        result = TABLE[node.proto.op_type](node)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
        raise InputError(f"{file}: {node}: {one_line(error)}") from error
    return list(result) if isinstance(result, (list, tuple)) else [result]


def _outputs(model: onnx.ModelProto, values: Mapping[str, Value], names: dict[Var, str], file: str) -> list[Var]:
    """The graph's outputs: each its own variable under its own name, and int32 where ONNX says bool."""
    outputs = []
    for info in model.graph.output:
        if info.name not in values:
            raise InputError(f"{file}: output {info.name!r} is computed by no node")
        value = values[info.name]
        if not isinstance(value, Var):
            value = mb.const(val=to_core_ml(value, info.name)[()])
        if value.dtype == types.bool:
            if names.get(value) == info.name:
                names[value] = f"{info.name}__bool"
            value = cast(value, "int32")
        elif names.get(value) != info.name:
            value = mb.identity(x=value)
        names[value] = info.name
        outputs.append(value)
    return outputs


def _rename(function: Function, names: Mapping[Var, str], constants: Mapping[str, Var]) -> None:
    """Values get their ONNX names; what a lowering made on the way is named after the value it led to."""
    kept = set(constants.values())
    taken = set(names.values()) | set(constants)
    pending: list[Operation] = []

    def name_pending(base: str) -> None:
        for index, op in enumerate(pending):
            name = f"{base}__{op.op_type}_{index}"
            while name in taken:
                name += "_"
            taken.add(name)
            for i, out in enumerate(op.outputs):
                out.name = name if len(op.outputs) == 1 else f"{name}_{i}"
            op.name = name
        pending.clear()

    for op in function.operations:
        named = [out for out in op.outputs if out in names]
        if not named:
            if not kept.intersection(op.outputs):
                pending.append(op)
            continue
        name_pending(names[named[0]])
        for out in named:
            out.name = names[out]
        op.name = names[named[0]]
    name_pending("unused")


def lower(
    model: onnx.ModelProto,
    *,
    file: str = "the ONNX model",
    target: ct.target = ct.target.iOS18,
    half: bool = False,
) -> Program:
    """A Core ML program of the model. Operators without a lowering are all named before any is lowered.

    `half` says that it will compute in fp16: constants out of its range are made finite."""
    check(model, file)
    nodes = inline(model, TABLE, file)
    missing = {_op_name(n) for n in nodes} - TABLE.keys()
    if missing:
        raise UnsupportedOpError(file, missing, TABLE)
    program, versions = Program(), opsets(model)
    values: dict[str, Value] = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    names: dict[Var, str] = {}
    constants: dict[str, Var] = {}
    with Function(_inputs(model, file), opset_version=target) as function:
        for info in model.graph.input:
            if info.name in function.inputs:
                names[function.inputs[info.name]] = info.name
                values[info.name] = _as_typed(info, function.inputs[info.name])
        for proto in nodes:
            arguments = [values[name] if name else None for name in proto.input]
            node = Node(proto, versions[""], arguments, attributes(proto), constants, half)
            results = _lower_node(node, versions, file)
            for name, value in zip(proto.output, results):
                values[name] = value
                if isinstance(value, Var):
                    names.setdefault(value, name)
                    _check_shape(value, f"{file}: {name!r}")
        function.set_outputs(_outputs(model, values, names, file))
        _rename(function, names, constants)
    program.add_function("main", function)
    return program


def _reserve_names(program: Program) -> None:
    """The passes of coremltools number their own values (add_0, ...): let them begin after the ONNX names."""
    for op in program.functions["main"].operations:
        for out in op.outputs:
            match = re.fullmatch(r"(.+)_(\d{1,9})", out.name)
            if match:
                prefix, number = match[1], int(match[2])
                mb.name_count[prefix] = max(mb.name_count[prefix], number + 1)


_PRECISIONS = {"fp16": ct.precision.FLOAT16, "fp32": ct.precision.FLOAT32}
_TARGETS = {name: getattr(ct.target, name) for name in ("iOS15", "iOS16", "iOS17", "iOS18")}


def _choice(options: Mapping[str, object], key: str, what: str) -> object:
    if key not in options:
        raise InputError(f"{what} {key!r}: choose from {', '.join(options)}")
    return options[key]


def convert(
    onnx_path: Path,
    *,
    compute_precision: str = "fp16",
    minimum_deployment_target: str = "iOS18",
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> ct.models.MLModel:
    """Read, check, lower and convert. The interface is the graph's: float as float32, integers as int32."""
    precision = _choice(_PRECISIONS, compute_precision, "compute_precision")
    target = _choice(_TARGETS, minimum_deployment_target, "minimum_deployment_target")
    model = read(onnx_path)
    if shapes:
        surgery.static_shapes(model, shapes, file=str(onnx_path))
    program = lower(model, file=str(onnx_path), target=target, half=compute_precision == "fp16")
    _reserve_names(program)
    run = functools.partial(ct.convert, source="milinternal", convert_to="mlprogram", skip_model_load=True)
    try:
        return run(program, compute_precision=precision, minimum_deployment_target=target)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"{onnx_path}: coremltools: {one_line(error)}") from error
