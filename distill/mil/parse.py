"""Protobuf -> Program. The file is not trusted: every name, shape, size and offset is checked on the way."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from coremltools.proto import Model_pb2
from google.protobuf.message import DecodeError

from distill.errors import PackageError
from distill.mil import dtypes
from distill.mil.features import parse_features
from distill.mil.package import Package
from distill.mil.program import (
    Binding,
    Block,
    Function,
    ListType,
    NamedType,
    Operation,
    OtherType,
    Program,
    StateType,
    TensorType,
    Value,
    ValueType,
)

_DEFAULT_FUNCTION = "main"


def parse_model(package: Package) -> Program:
    """The whole model; the entry point of this file."""
    model = Model_pb2.Model()
    try:
        model.ParseFromString(package.read_model())
    except (DecodeError, OSError) as error:
        raise PackageError(f"{package.model}: not a Core ML model: {error}") from error
    kind = model.WhichOneof("Type")
    if kind != "mlProgram":
        raise PackageError(f"{package.path}: the model is of type {kind}, not an ML Program")
    if not model.mlProgram.functions:
        raise PackageError(f"{package.path}: the ML Program has no functions")
    description = model.description
    walker = _Walker(package)
    functions = {}
    for name, proto in model.mlProgram.functions.items():
        functions[name] = walker.function(name, proto, _function_description(package, description, name))
    default = description.defaultFunctionName or (
        _DEFAULT_FUNCTION if _DEFAULT_FUNCTION in functions or len(functions) > 1 else next(iter(functions))
    )
    if default not in functions:
        raise PackageError(f"{package.path}: default function {default!r} is not in the program")
    meta = description.metadata
    return Program(
        path=package.path,
        functions=functions,
        default_function=default,
        metadata=dict(meta.userDefined),
        specification_version=model.specificationVersion,
        weight_files=package.weight_files,
        description={
            "description": meta.shortDescription,
            "author": meta.author,
            "version": meta.versionString,
            "license": meta.license,
        },
    )


def _function_description(package: Package, description: Any, name: str) -> Any:
    """A multifunction package describes each function; another describes its only one at the top."""
    if not description.functions:
        return description
    for function in description.functions:
        if function.name == name:
            return function
    raise PackageError(f"{package.path}: the model description lacks function {name!r}")


class _Walker:
    """Walks one program; `place` in messages is 'function main: add_3'."""

    def __init__(self, package: Package) -> None:
        self.package = package

    def fail(self, place: str, message: str) -> PackageError:
        return PackageError(f"{self.package.path}: {place}: {message}")

    def function(self, name: str, proto: Any, description: Any) -> Function:
        place = f"function {name}"
        if proto.opset not in proto.block_specializations:
            raise self.fail(place, f"no block for its opset {proto.opset!r}")
        inputs = [NamedType(i.name, self.value_type(i.type, f"{place}: {i.name}")) for i in proto.inputs]
        scope: dict[str, ValueType] = {}
        self.define(scope, inputs, place)
        block = self.block(proto.block_specializations[proto.opset], scope, place)
        types = {out: scope[out] for out in block.outputs}
        features = parse_features(description, inputs, types, lambda message: self.fail(place, message))
        return Function(name, *features, proto.opset, block)

    def define(self, scope: dict[str, ValueType], names: Iterable[NamedType], place: str) -> None:
        for named in names:
            if not named.name:
                raise self.fail(place, "a value without a name")
            if named.name in scope:
                raise self.fail(place, f"{named.name!r} is defined twice")
            scope[named.name] = named.type

    def block(self, proto: Any, scope: dict[str, ValueType], place: str) -> Block:
        """One block. Names must be defined before they are used, which also rules out cycles."""
        inputs = [NamedType(i.name, self.value_type(i.type, f"{place}: {i.name}")) for i in proto.inputs]
        self.define(scope, inputs, place)
        operations = [self.operation(op, scope, place) for op in proto.operations]
        for name in proto.outputs:
            if name not in scope:
                raise self.fail(place, f"block output {name!r} is never defined")
        return Block(inputs, operations, list(proto.outputs))

    def operation(self, proto: Any, scope: dict[str, ValueType], place: str) -> Operation:
        first = proto.outputs[0].name if proto.outputs else ""
        place = f"{place}: {proto.type or '?'} {first!r}"
        if not proto.type:
            raise self.fail(place, "an operation without a type")
        inputs = {k: [self.binding(b, k, scope, place) for b in a.arguments] for k, a in proto.inputs.items()}
        blocks = [self.block(b, dict(scope), place) for b in proto.blocks]
        outputs = [NamedType(o.name, self.value_type(o.type, place)) for o in proto.outputs]
        attributes = {k: self.value(v, f"{place}: {k}") for k, v in proto.attributes.items()}
        if proto.type == "const":
            self.check_const(attributes, outputs, place)
        self.define(scope, outputs, place)
        label = attributes.get("name")
        name = str(label.numpy()) if label is not None and label.type.dtype == dtypes.STRING else first
        return Operation(proto.type, name, inputs, outputs, attributes, blocks)

    def check_const(self, attributes: dict[str, Value], outputs: list[NamedType], place: str) -> None:
        if "val" not in attributes or len(outputs) != 1:
            raise self.fail(place, "a const needs a 'val' and one output")
        value, declared = attributes["val"].type, outputs[0].type
        same = (value.dtype, value.shape) == (declared.dtype, declared.shape)
        if isinstance(declared, TensorType) and not same:
            raise self.fail(place, f"declared {declared}, but its value is {value}")

    def binding(self, proto: Any, parameter: str, scope: dict[str, ValueType], place: str) -> Binding:
        kind = proto.WhichOneof("binding")
        if kind == "value":
            return self.value(proto.value, f"{place}: {parameter}")
        if kind != "name":
            raise self.fail(place, f"input {parameter!r} is empty")
        if proto.name not in scope:
            raise self.fail(place, f"input {parameter!r} uses {proto.name!r}, which is not defined before it")
        return str(proto.name)

    def value_type(self, proto: Any, place: str) -> ValueType:
        kind = proto.WhichOneof("type")
        if kind == "tensorType":
            return self.tensor_type(proto.tensorType, place)
        if kind == "stateType":
            wrapped = self.value_type(proto.stateType.wrappedType, place)
            if not isinstance(wrapped, TensorType):
                raise self.fail(place, "a state wraps something other than a tensor")
            return StateType(wrapped)
        if kind == "listType":
            return ListType(self.value_type(proto.listType.type, place), self.dimension(proto.listType.length, place))
        if kind in ("tupleType", "dictionaryType"):
            return OtherType(kind.removesuffix("Type"))
        raise self.fail(place, "a value without a type")

    def tensor_type(self, proto: Any, place: str) -> TensorType:
        if proto.dataType not in dtypes.BY_PROTO:
            raise self.fail(place, f"unknown data type {proto.dataType}")
        dtype = dtypes.BY_PROTO[proto.dataType]
        variadic = any(d.unknown.variadic for d in proto.dimensions)
        if proto.rank != len(proto.dimensions) and not variadic and proto.rank >= 0:
            raise self.fail(place, f"rank {proto.rank} with {len(proto.dimensions)} dimensions")
        shape = tuple(self.dimension(d, place) for d in proto.dimensions)
        if math.prod(d for d in shape if d) > dtypes.MAX_ELEMENTS:
            raise self.fail(place, f"shape {list(shape)} is beyond {dtypes.MAX_ELEMENTS} elements")
        return TensorType(dtype, shape, variadic or proto.rank < 0)

    def dimension(self, proto: Any, place: str) -> int | None:
        if proto.WhichOneof("dimension") != "constant":
            return None
        if proto.constant.size > dtypes.MAX_ELEMENTS:
            raise self.fail(place, f"a dimension of {proto.constant.size}")
        return int(proto.constant.size)

    def value(self, proto: Any, place: str) -> Value:
        kind = self.value_type(proto.type, place)
        where = proto.WhichOneof("value")
        if where == "blobFileValue":
            return self.blob_value(proto.blobFileValue, kind, place)
        if where != "immediateValue":
            raise self.fail(place, "a constant without a value")
        immediate = proto.immediateValue
        what = immediate.WhichOneof("value")
        if what == "tensor" and isinstance(kind, TensorType):
            return Value(kind, self.immediate_tensor(immediate.tensor, kind, place))
        if what in ("list", "tuple"):
            return Value(kind, [self.value(v, place) for v in getattr(immediate, what).values])
        if what == "dictionary":
            pairs = [(self.value(p.key, place), self.value(p.value, place)) for p in immediate.dictionary.values]
            return Value(kind, {k.numpy().item() if k.numpy().size == 1 else str(k): v for k, v in pairs})
        raise self.fail(place, f"a {what} value for type {kind}")

    def blob_value(self, proto: Any, kind: ValueType, place: str) -> Value:
        if not isinstance(kind, TensorType) or kind.count is None or kind.dtype not in dtypes.DTYPES:
            raise self.fail(place, f"a value in a weight file cannot be {kind}")
        try:
            reader = self.package.reader(proto.fileName)
            reader.check(proto.offset, kind.dtype, kind.count)
        except PackageError as error:
            raise PackageError(f"{error} ({place})") from error
        return Value(kind, reader=reader, offset=proto.offset)

    def immediate_tensor(self, proto: Any, kind: TensorType, place: str) -> np.ndarray:
        count = kind.count
        if count is None:
            raise self.fail(place, f"a constant of dynamic shape {kind}")
        field = proto.WhichOneof("value")
        if field is None and count == 0:
            flat: np.ndarray = np.empty(0, self.numpy_type(kind.dtype))
        elif field == "bytes":
            flat = self.from_bytes(proto.bytes.values, kind.dtype, count, place)
        elif field is None:
            raise self.fail(place, "an immediate constant without values")
        else:
            flat = self.from_numbers(getattr(proto, field).values, kind, place)
        if flat.size != count:
            raise self.fail(place, f"{flat.size} values for {kind}")
        return flat.reshape([d or 0 for d in kind.shape])

    def numpy_type(self, dtype: str) -> np.dtype:
        return np.dtype(str) if dtype == dtypes.STRING else dtypes.DTYPES[dtype].numpy

    def from_bytes(self, raw: bytes, dtype: str, count: int, place: str) -> np.ndarray:
        if dtype not in dtypes.DTYPES or len(raw) != dtypes.packed_size(dtype, count):
            raise self.fail(place, f"{len(raw)} bytes for {count} elements of {dtype}")
        return dtypes.unpack(dtype, np.frombuffer(bytearray(raw), dtype=np.uint8), count)

    def from_numbers(self, values: Any, kind: TensorType, place: str) -> np.ndarray:
        try:
            if kind.dtype == dtypes.STRING:
                return np.array([str(v) for v in values], dtype=str)
            return np.array(values, dtype=self.numpy_type(kind.dtype))
        except (ValueError, TypeError, OverflowError) as error:
            raise self.fail(place, f"values that do not fit {kind}: {error}") from error
