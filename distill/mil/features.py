"""The model description: what an application sees as inputs, outputs and states, joined with the program's
types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill.errors import PackageError
from distill.mil import dtypes
from distill.mil.program import Feature, NamedType, Shape, StateType, ValueType

# ArrayFeatureType.ArrayDataType in FeatureTypes.proto
_ARRAY_TYPES = {65568: "fp32", 65600: "fp64", 131104: "int32", 131080: "int8", 65552: "fp16"}
_Fail = Callable[[str], PackageError]


def parse_features(
    description: Any, inputs: Sequence[NamedType], outputs: Mapping[str, ValueType], fail: _Fail
) -> tuple[list[Feature], list[Feature], list[Feature]]:
    """(inputs, outputs, states) in the description's order; every one must exist in the program and the
    reverse.
    """
    declared = {i.name: i.type for i in inputs if not isinstance(i.type, StateType)}
    states = {i.name: i.type for i in inputs if isinstance(i.type, StateType)}
    return (
        _features(description.input, declared, "input", fail),
        _features(description.output, outputs, "output", fail),
        _features(description.state, states, "state", fail),
    )


def _features(described: Sequence[Any], types: Mapping[str, ValueType], role: str, fail: _Fail) -> list[Feature]:
    features: dict[str, Feature] = {}
    for proto in described:
        if proto.name in features:
            raise fail(f"{role} {proto.name!r} is described twice")
        if proto.name not in types:
            raise fail(f"{role} {proto.name!r} of the model description is not in the program")
        features[proto.name] = _feature(proto, types[proto.name], fail)
    for name in types:
        if name not in features and role != "output":
            raise fail(f"the program's {role} {name!r} is not in the model description")
    return list(features.values())


def _feature(proto: Any, declared: ValueType, fail: _Fail) -> Feature:
    kind = proto.type.WhichOneof("Type")
    optional = proto.type.isOptional
    if kind == "imageType":
        return _image(proto, declared, optional)
    if kind == "stateType":
        return _tensor(proto.name, proto.type.stateType.arrayType, declared, optional, fail)
    if kind == "multiArrayType":
        return _tensor(proto.name, proto.type.multiArrayType, declared, optional, fail)
    return Feature(proto.name, declared.dtype, declared.shape, declared, kind="other", optional=optional)


def _tensor(name: str, array: Any, declared: ValueType, optional: bool, fail: _Fail) -> Feature:
    if array.dataType not in _ARRAY_TYPES:
        raise fail(f"feature {name!r} has unknown data type {array.dataType}")
    shape: Shape = tuple(array.shape) or declared.shape
    enumerated = tuple(tuple(s.shape) for s in array.enumeratedShapes.shapes)
    ranges = tuple((r.lowerBound, None if r.upperBound < 0 else r.upperBound) for r in array.shapeRange.sizeRanges)
    for each in (shape, *enumerated):
        if any(d is not None and not 0 <= d <= dtypes.MAX_ELEMENTS for d in each):
            raise fail(f"feature {name!r} has shape {list(each)}")
    default = array.WhichOneof("defaultOptionalValue")
    return Feature(
        name,
        _ARRAY_TYPES[array.dataType],
        shape,
        declared,
        enumerated=enumerated,
        ranges=ranges,
        optional=optional,
        default=float(getattr(array, default)) if default else 0.0,
    )


def _image(proto: Any, declared: ValueType, optional: bool) -> Feature:
    """An image is described by width and height; the program takes it as (1, channels, height, width)."""
    return Feature(proto.name, declared.dtype, declared.shape, declared, kind="image", optional=optional)
