"""The model description: what an application sees as inputs, outputs and states, joined with the program's
types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from distill.errors import PackageError
from distill.mil import dtypes
from distill.mil.program import Feature, NamedType, Shape, StateType, TensorType, ValueType

# ArrayFeatureType.ArrayDataType in FeatureTypes.proto
_ARRAY_TYPES = {65568: "fp32", 65600: "fp64", 131104: "int32", 131080: "int8", 65552: "fp16"}
# ImageFeatureType.ColorSpace: its name and its channels
_COLORS = {10: ("GRAYSCALE", 1), 20: ("RGB", 3), 30: ("BGR", 3), 40: ("GRAYSCALE_FLOAT16", 1)}
_CLASSIFIER = {"int64Type": "label", "stringType": "label", "dictionaryType": "probabilities"}
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
        if proto.name in features and role == "output":
            continue  # coremltools describes a tensor that is returned twice so
        if proto.name in features:
            raise fail(f"{role} {proto.name!r} is described twice")
        if proto.name not in types:
            raise fail(f"{role} {proto.name!r} of the model description is not in the program")
        features[proto.name] = _feature(proto, types[proto.name], role, fail)
    for name in types:
        if name not in features and role != "output":
            raise fail(f"the program's {role} {name!r} is not in the model description")
    return list(features.values())


def _feature(proto: Any, declared: ValueType, role: str, fail: _Fail) -> Feature:
    kind = proto.type.WhichOneof("Type")
    optional = proto.type.isOptional
    if kind == "stateType":
        return _tensor(proto.name, proto.type.stateType.arrayType, declared, role, optional, fail)
    if kind == "imageType":
        return _image(proto.name, proto.type.imageType, declared, optional, fail)
    if kind == "multiArrayType":
        return _tensor(proto.name, proto.type.multiArrayType, declared, role, optional, fail)
    if kind in _CLASSIFIER and role == "output":
        return Feature(proto.name, declared.dtype, declared.shape, declared, kind=_CLASSIFIER[kind])
    raise fail(f"{role} {proto.name!r} is a {kind or 'feature without a type'}, which an ML Program does not take")


def _tensor(name: str, array: Any, declared: ValueType, role: str, optional: bool, fail: _Fail) -> Feature:
    if array.dataType not in _ARRAY_TYPES:
        raise fail(f"feature {name!r} has unknown data type {array.dataType}")
    wanted = StateType if role == "state" else TensorType
    if not isinstance(declared, wanted) or declared.dtype not in dtypes.DTYPES:
        raise fail(f"{role} {name!r} is an array, but {declared} in the program")
    shape: Shape = tuple(array.shape) or declared.shape
    enumerated = tuple(tuple(s.shape) for s in array.enumeratedShapes.shapes)
    ranges = tuple(_range(r) for r in array.shapeRange.sizeRanges)
    _check_sizes(name, (shape, *enumerated), fail)
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


def _image(name: str, image: Any, declared: ValueType, optional: bool, fail: _Fail) -> Feature:
    """An image is described by width and height; the program takes and makes (1, channels, height, width)."""
    if image.colorSpace not in _COLORS:
        raise fail(f"image {name!r} has unknown colour space {image.colorSpace}")
    color, channels = _COLORS[image.colorSpace]
    shape = (1, channels, image.height, image.width)
    if not isinstance(declared, TensorType) or not _allows(declared, shape[:2]):
        raise fail(f"image {name!r} has {channels} channels, but is {declared} in the program")
    enumerated = tuple((1, channels, s.height, s.width) for s in image.enumeratedSizes.sizes)
    _check_sizes(name, (shape, *enumerated), fail)
    flexible = image.WhichOneof("SizeFlexibility") == "imageSizeRange"
    sizes = (image.imageSizeRange.heightRange, image.imageSizeRange.widthRange)
    ranges = ((1, 1), (channels, channels), *map(_range, sizes)) if flexible else ()
    return Feature(
        name, declared.dtype, shape, declared, "image", color, enumerated=enumerated, ranges=ranges, optional=optional
    )


def _allows(declared: TensorType, batch_and_channels: Sequence[int]) -> bool:
    if declared.variadic:
        return True
    sizes = zip(batch_and_channels, declared.shape)
    return len(declared.shape) == 4 and all(d is None or d == n for n, d in sizes)


def _range(proto: Any) -> tuple[int, int | None]:
    return proto.lowerBound, None if proto.upperBound < 0 else proto.upperBound


def _check_sizes(name: str, shapes: Iterable[Shape], fail: _Fail) -> None:
    for shape in shapes:
        sizes = [d for d in shape if d is not None]
        if any(d < 0 for d in sizes) or math.prod(sizes) > dtypes.MAX_ELEMENTS:
            raise fail(f"feature {name!r} has shape {list(shape)}")
