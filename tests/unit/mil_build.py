"""Small Core ML packages for the tests of distill.mil, built with coremltools' own MIL builder."""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.proto import MIL_pb2, Model_pb2

from distill import mil

Spec = Any
DTYPES = {"fp16": types.fp16, "fp32": types.fp32, "int32": types.int32, "bool": types.bool}


def tensor(shape: tuple[int, ...], dtype: str = "fp32") -> Spec:
    return mb.TensorSpec(shape, dtype=DTYPES[dtype])


def state(shape: tuple[int, ...]) -> Spec:
    return mb.StateTensorSpec(shape, dtype=types.fp16)


def build(path: Path, specs: list[Spec], body: Callable[..., Any], precision: str = "fp16", **options: Any) -> Path:
    """Convert a MIL function and save it. Its inputs are called x0, x1, ... unless `body` names them."""
    program = mb.program(input_specs=specs, opset_version=ct.target.iOS18)(body)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16 if precision == "fp16" else ct.precision.FLOAT32,
        skip_model_load=True,
        **options,
    )
    model.save(str(path))
    return path


def load(
    path: Path, specs: list[Spec], body: Callable[..., Any], precision: str = "fp16", **options: Any
) -> mil.Program:
    return mil.load(build(path, specs, body, precision, **options))


# A package written by hand: for programs that coremltools would refuse to write.

_ARRAY = {"fp32": 65568, "fp16": 65552, "int32": 131104, "int8": 131080}
_MIL = {
    "int8": MIL_pb2.INT8,
    "fp32": MIL_pb2.FLOAT32,
    "fp16": MIL_pb2.FLOAT16,
    "int32": MIL_pb2.INT32,
    "uint4": MIL_pb2.UINT4,
}


def set_type(proto: Any, dtype: str, shape: tuple[int, ...]) -> None:
    tensor_type = proto.tensorType
    tensor_type.dataType = _MIL[dtype]
    tensor_type.rank = len(shape)
    for size in shape:
        tensor_type.dimensions.add().constant.size = size


def raw_model(dtype: str = "fp32", shape: tuple[int, ...] = (2,)) -> Any:
    """x -> add_op(x, x) -> y, as a protobuf to be spoilt."""
    model = Model_pb2.Model(specificationVersion=9)
    for features, name in ((model.description.input, "x"), (model.description.output, "y")):
        feature = features.add(name=name)
        feature.type.multiArrayType.dataType = _ARRAY[dtype]
        feature.type.multiArrayType.shape.extend(shape)
    function = model.mlProgram.functions["main"]
    function.opset = "CoreML8"
    set_type(function.inputs.add(name="x").type, dtype, shape)
    block = function.block_specializations["CoreML8"]
    op = block.operations.add(type="add")
    for parameter in ("x", "y"):
        op.inputs[parameter].arguments.add(name="x")
    set_type(op.outputs.add(name="y").type, dtype, shape)
    block.outputs.append("y")
    return model


def operations(model: Any) -> Any:
    return model.mlProgram.functions["main"].block_specializations["CoreML8"].operations


def add_blob_const(model: Any, name: str, dtype: str, shape: tuple[int, ...], offset: int) -> Any:
    """A const in weight.bin, before the first operation."""
    ops = operations(model)
    rest = [type(o).FromString(o.SerializeToString()) for o in ops]
    del ops[:]
    const = ops.add(type="const")
    set_type(const.outputs.add(name=name).type, dtype, shape)
    value = const.attributes["val"]
    set_type(value.type, dtype, shape)
    value.blobFileValue.fileName = "@model_path/weights/weight.bin"
    value.blobFileValue.offset = offset
    ops.extend(rest)
    return value


def weight_bin(code: int, data: bytes, size: int | None = None, data_offset: int = 128) -> bytes:
    """A weight file with one blob at offset 64."""
    header = struct.pack("<II", 1, 2).ljust(64, b"\0")
    record = struct.pack("<IIQQQ", 0xDEADBEEF, code, len(data) if size is None else size, data_offset, 0)
    return header + record.ljust(64, b"\0") + data


def write_package(
    path: Path, model: Any, weights: bytes | None = None, entry: str = "com.apple.CoreML/model.mlmodel"
) -> Path:
    folder = path / "Data" / "com.apple.CoreML"
    (folder / "weights").mkdir(parents=True)
    raw = model if isinstance(model, bytes) else model.SerializeToString()
    (folder / "model.mlmodel").write_bytes(raw)
    if weights is not None:
        (folder / "weights" / "weight.bin").write_bytes(weights)
    root = str(uuid.uuid4())
    items = {root: {"author": "com.apple.CoreML", "name": "model.mlmodel", "path": entry}}
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": root}
    (path / "Manifest.json").write_text(json.dumps(manifest))
    return path


def random(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)
