"""Protobuf -> Program. The file is not trusted: every name, shape, size and offset is checked on the way."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from distill.errors import ModelTypeError, PackageError
from distill.mil import dtypes
from distill.mil.features import parse_features
from distill.mil.limits import refusal
from distill.mil.package import Package, clip
from distill.mil.program import (
    Binding,
    Block,
    Feature,
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
from distill.mil.protos import Model_pb2

_DEFAULT_FUNCTION = "main"
_MAX_RANK = 16
_SMALL = 128  # bytes of an immediate constant that is kept to be shared
_MAX_NAME = 4096
_MAX_NODES = 2**21  # operations, bindings, types and constants of a program: some 700 bytes each


def parse_model(package: Package) -> Program:
    """The whole model; the entry point of this file."""
    model = Model_pb2.Model()
    try:
        model.ParseFromString(package.read_model())
    except (DecodeError, OSError) as error:
        raise PackageError(f"{package.model}: not a Core ML model: {error}") from error
    kind = model.WhichOneof("Type")
    if kind != "mlProgram":
        raise ModelTypeError(f"{package.path}: the model is of type {kind}, not an ML Program")
    if not model.mlProgram.functions:
        raise PackageError(f"{package.path}: the ML Program has no functions")
    description = model.description
    walker = _Walker(package)
    described = {function.name: function for function in description.functions}
    functions = {}
    for name, proto in sorted(model.mlProgram.functions.items()):
        # a multifunction package describes each function; another describes its only one at the top
        if described and name not in described:
            raise PackageError(f"{package.path}: the model description lacks function {clip(name)}")
        functions[name] = walker.function(name, proto, described.get(name, description))
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
        limits=package.limits,
        size=package.size,
    )


class _Place(NamedTuple):
    """Where in the program: 'function main: add 'add_3': x'. Written out only in messages."""

    outer: _Place | None
    text: str

    def __str__(self) -> str:
        return self.text if self.outer is None else f"{self.outer}: {self.text}"


class _Walker:
    """Walks one program. Every step counts, so that a program of millions of tiny parts is refused."""

    def __init__(self, package: Package) -> None:
        self.package = package
        self.nodes = 0
        self.types: dict[bytes, TensorType] = {}  # few types serve thousands of values
        self.small: dict[bytes, Value] = {}

    def fail(self, place: _Place, message: str) -> PackageError:
        return PackageError(f"{self.package.path}: {place}: {message}")

    def count(self, place: _Place) -> None:
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            raise self.fail(place, f"the program has more than {_MAX_NODES} parts")

    def name(self, name: str, place: _Place) -> str:
        if len(name) > _MAX_NAME:
            raise self.fail(place, f"a name of {len(name)} characters: {clip(name)}")
        return name

    def function(self, name: str, proto: Any, description: Any) -> Function:
        place = _Place(None, f"function {self.name(name, _Place(None, 'a function'))}")
        if proto.opset not in proto.block_specializations:
            raise self.fail(place, f"no block for its opset {clip(proto.opset)}")
        inputs = [self.named(i, place) for i in proto.inputs]
        scope: dict[str, ValueType] = {}
        self.define(scope, inputs, place)
        block = self.block(proto.block_specializations[proto.opset], scope, place)
        types = {out: scope[out] for out in block.outputs}
        features = parse_features(description, inputs, types, lambda message: self.fail(place, message))
        self.check_memory(features[0], features[2], place)
        return Function(name, *features, proto.opset, block)

    def check_memory(self, inputs: Iterable[Feature], states: Iterable[Feature], place: _Place) -> None:
        """States, and inputs that may be absent, are made by us."""
        made = [*states, *(i for i in inputs if i.optional)]
        need = 8 * sum(math.prod(d or 1 for d in (*feature.shape, 1)) for feature in made)
        limit = self.package.limits.memory_for(self.package.size)
        if need > limit:
            raise self.fail(place, f"states and optional inputs: {refusal(need, limit)}")

    def named(self, proto: Any, place: _Place) -> NamedType:
        name = self.name(proto.name, place)
        return NamedType(name, self.value_type(proto.type, _Place(place, name)))

    def define(self, scope: dict[str, ValueType], names: Iterable[NamedType], place: _Place) -> None:
        for named in names:
            if not named.name:
                raise self.fail(place, "a value without a name")
            if named.name in scope:
                raise self.fail(place, f"{named.name!r} is defined twice")
            scope[named.name] = named.type

    def block(self, proto: Any, scope: dict[str, ValueType], place: _Place) -> Block:
        """One block. Names must be defined before they are used, which also rules out cycles."""
        self.count(place)
        inputs = [self.named(i, place) for i in proto.inputs]
        self.define(scope, inputs, place)
        operations = [self.operation(op, scope, place) for op in proto.operations]
        for name in proto.outputs:
            if name not in scope:
                raise self.fail(place, f"block output {clip(name)} is never defined")
        return Block(inputs, operations, list(proto.outputs))

    def nested(self, proto: Any, scope: dict[str, ValueType], place: _Place) -> Block:
        """A block that sees the names around it; its own end with it."""
        size = len(scope)
        block = self.block(proto, scope, place)
        while len(scope) > size:
            scope.popitem()
        return block

    def operation(self, proto: Any, scope: dict[str, ValueType], outer: _Place) -> Operation:
        self.count(outer)
        kind = self.name(proto.type, outer)
        first = self.name(proto.outputs[0].name, outer) if proto.outputs else ""
        place = _Place(outer, f"{kind or '?'} {first!r}")
        if not kind:
            raise self.fail(place, "an operation without a type")
        inputs = {
            self.name(k, place): [self.binding(b, k, scope, place) for b in a.arguments]
            for k, a in sorted(proto.inputs.items())  # a protobuf map has an order of its own in each process
        }
        blocks = [self.nested(b, scope, place) for b in proto.blocks]
        outputs = [self.named(o, place) for o in proto.outputs]
        given = dict(proto.attributes)
        name = self.label(given.pop("name", None), first, place)
        attributes = {self.name(k, place): self.value(v, _Place(place, k)) for k, v in given.items()}
        if proto.type == "const":
            self.check_const(attributes, outputs, place)
        self.define(scope, outputs, place)
        return Operation(proto.type, name, inputs, outputs, attributes, blocks)

    def label(self, proto: Any, first: str, place: _Place) -> str:
        """The attribute 'name' of an operation; `first` where it has none."""
        strings: Any = proto.immediateValue.tensor.strings.values if proto is not None else ()
        return self.name(strings[0], place) if len(strings) == 1 else first

    def check_const(self, attributes: dict[str, Value], outputs: list[NamedType], place: _Place) -> None:
        if "val" not in attributes or len(outputs) != 1:
            raise self.fail(place, "a const needs a 'val' and one output")
        value, declared = attributes["val"].type, outputs[0].type
        same = (value.dtype, value.shape) == (declared.dtype, declared.shape)
        if isinstance(declared, TensorType) and not same:
            raise self.fail(place, f"declared {declared}, but its value is {value}")

    def binding(self, proto: Any, parameter: str, scope: dict[str, ValueType], place: _Place) -> Binding:
        self.count(place)
        kind = proto.WhichOneof("binding")
        if kind == "value":
            return self.value(proto.value, _Place(place, parameter))
        if kind != "name":
            raise self.fail(place, f"input {parameter!r} is empty")
        if proto.name not in scope:
            raise self.fail(place, f"input {parameter!r} uses {clip(proto.name)}, which is not defined before it")
        return str(proto.name)

    def value_type(self, proto: Any, place: _Place) -> ValueType:
        self.count(place)
        kind = proto.WhichOneof("type")
        if kind == "tensorType":
            key = proto.SerializeToString()
            if key not in self.types:
                self.types[key] = self.tensor_type(proto.tensorType, place)
            return self.types[key]
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

    def tensor_type(self, proto: Any, place: _Place) -> TensorType:
        if len(proto.dimensions) > _MAX_RANK:
            raise self.fail(place, f"a tensor of rank {len(proto.dimensions)}")
        if proto.dataType not in dtypes.BY_PROTO:
            raise self.fail(place, f"unknown data type {proto.dataType}")
        dtype = dtypes.BY_PROTO[proto.dataType]
        variadic = any(d.WhichOneof("dimension") == "unknown" and d.unknown.variadic for d in proto.dimensions)
        if proto.rank != len(proto.dimensions) and not variadic and proto.rank >= 0:
            raise self.fail(place, f"rank {proto.rank} with {len(proto.dimensions)} dimensions")
        shape = tuple(self.dimension(d, place) for d in proto.dimensions)
        if math.prod(d for d in shape if d) > dtypes.MAX_ELEMENTS:
            raise self.fail(place, f"shape {list(shape)} is beyond {dtypes.MAX_ELEMENTS} elements")
        return TensorType(dtype, shape, variadic or proto.rank < 0)

    def dimension(self, proto: Any, place: _Place) -> int | None:
        if proto.WhichOneof("dimension") != "constant":
            return None
        if proto.constant.size > dtypes.MAX_ELEMENTS:
            raise self.fail(place, f"a dimension of {proto.constant.size}")
        return int(proto.constant.size)

    def value(self, proto: Any, place: _Place) -> Value:
        kind = self.value_type(proto.type, place)
        where = proto.WhichOneof("value")
        if where == "blobFileValue":
            return self.blob_value(proto.blobFileValue, kind, place)
        if where != "immediateValue":
            raise self.fail(place, "a constant without a value")
        immediate = proto.immediateValue
        what = immediate.WhichOneof("value")
        if what == "tensor" and isinstance(kind, TensorType):
            return self.tensor_value(proto, kind, place)
        if what in ("list", "tuple") and not isinstance(kind, TensorType | StateType):
            return Value(kind, [self.value(v, place) for v in getattr(immediate, what).values])
        if what == "dictionary":
            pairs = immediate.dictionary.values
            return Value(kind, {self.key(p.key, place): self.value(p.value, place) for p in pairs})
        raise self.fail(place, f"a {what} value for type {kind}")

    def key(self, proto: Any, place: _Place) -> Any:
        """A key of a dictionary: one number or string."""
        key = self.value(proto, place)
        if not isinstance(key.type, TensorType) or key.type.count != 1:
            raise self.fail(place, f"a key of type {key.type} in a dictionary")
        return key.numpy().item()

    def tensor_value(self, proto: Any, kind: TensorType, place: _Place) -> Value:
        """An immediate tensor. Small ones are few and used everywhere: an axis, a flag, an epsilon."""
        tensor = proto.immediateValue.tensor
        if proto.ByteSize() > _SMALL:
            return Value(kind, self.immediate_tensor(tensor, kind, place))
        key = proto.SerializeToString()
        if key not in self.small:
            self.small[key] = Value(kind, self.immediate_tensor(tensor, kind, place))
        return self.small[key]

    def blob_value(self, proto: Any, kind: ValueType, place: _Place) -> Value:
        if not isinstance(kind, TensorType) or kind.count is None or kind.dtype not in dtypes.DTYPES:
            raise self.fail(place, f"a value in a weight file cannot be {kind}")
        try:
            reader = self.package.reader(proto.fileName)
            reader.check(proto.offset, kind.dtype, kind.count)
        except PackageError as error:
            raise PackageError(f"{error} ({place})") from error
        return Value(kind, reader=reader, offset=proto.offset)

    def immediate_tensor(self, proto: Any, kind: TensorType, place: _Place) -> np.ndarray:
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
        return np.dtype(object) if dtype == dtypes.STRING else dtypes.DTYPES[dtype].numpy

    def from_bytes(self, raw: bytes, dtype: str, count: int, place: _Place) -> np.ndarray:
        if dtype not in dtypes.DTYPES or len(raw) != dtypes.packed_size(dtype, count):
            raise self.fail(place, f"{len(raw)} bytes for {count} elements of {dtype}")
        return dtypes.unpack(dtype, np.frombuffer(bytearray(raw), dtype=np.uint8), count)

    def from_numbers(self, values: Any, kind: TensorType, place: _Place) -> np.ndarray:
        try:
            if kind.dtype == dtypes.STRING:
                # objects: a numpy array of `str` gives every string the room of the longest
                return np.array([*map(str, values), None], dtype=object)[:-1]
            return np.array(values, dtype=self.numpy_type(kind.dtype))
        except (ValueError, TypeError, OverflowError) as error:
            raise self.fail(place, f"values that do not fit {kind}: {error}") from error
