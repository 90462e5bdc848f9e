"""Check and convert what the caller passes, against what the model description allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.errors import InputError
from distill.mil import images
from distill.mil.policy import Policy
from distill.mil.program import Feature, Function, Program
from distill.mil.values import RUNTIME, from_numpy

_INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "int64")


def check_inputs(program: Program, function: Function, given: Mapping[str, Any], policy: Policy) -> list[Tensor]:
    """The arguments in the order of function.inputs."""
    place = f"{program.path}: function {function.name}"
    if not isinstance(given, Mapping):
        raise InputError(f"{place} takes its inputs as a dictionary of arrays by name, not a {type(given).__name__}")
    names = [f.name for f in function.inputs]
    unknown = [str(n) for n in given if n not in names]
    if unknown:
        raise InputError(f"{place} has no input {', '.join(unknown)}; it takes {', '.join(names) or 'none'}")
    missing = [f.name for f in function.inputs if f.name not in given and not f.optional]
    if missing:
        raise InputError(f"{place} needs input {', '.join(missing)}")
    arrays = {f.name: to_array(f, given[f.name], place) for f in function.inputs if f.name in given}
    for feature in function.inputs:
        if feature.name not in arrays:
            shape = tuple(d or 1 for d in feature.shape)
            arrays[feature.name] = np.broadcast_to(np.float64(feature.default), shape)
    for feature in function.inputs:
        arrays[feature.name] = check_shape(feature, arrays[feature.name], place)
    check_pairing(function, arrays, place)
    return [to_tensor(f, arrays[f.name], policy, place) for f in function.inputs]


def to_array(feature: Feature, value: Any, place: str) -> np.ndarray:
    if images.is_pil(value):
        return images.from_pil(feature, value, place)
    try:
        array = from_torch(value) if isinstance(value, Tensor) else np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{place}: input {feature.name!r} is not an array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise InputError(f"{place}: input {feature.name!r} is an array of {array.dtype}, not of numbers")
    if array.dtype.itemsize > np.dtype(np.float64).itemsize:
        return array.astype(np.float64)  # longdouble, which torch does not know
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def from_torch(tensor: Tensor) -> np.ndarray:
    if tensor.dtype is torch.bfloat16:  # which numpy does not know
        tensor = tensor.float()
    array: np.ndarray = tensor.detach().cpu().resolve_conj().resolve_neg().numpy()
    return array


def check_shape(feature: Feature, array: np.ndarray, place: str) -> np.ndarray:
    """One of the enumerated shapes, within the ranges, or the default shape."""
    if feature.type.shape == () and array.size == 1:
        return array.reshape(())  # a scalar is shown to applications as a vector of one
    words = ""
    if feature.enumerated:
        good = array.shape in feature.enumerated
        wanted = "one of " + ", ".join(str(list(s)) for s in feature.enumerated)
        words = f"MultiArray Shape ({' x '.join(map(str, array.shape))}) was not in enumerated set of allowed shapes"
    elif feature.ranges:
        out = [i for i, (n, r) in enumerate(zip(array.shape, feature.ranges)) if not within(n, r)]
        good = array.ndim == len(feature.ranges) and not out
        wanted = "[" + ", ".join(range_text(r) for r in feature.ranges) + "]"
        if out:
            allowed = range_text(feature.ranges[out[0]])
            words = f"Size ({array.shape[out[0]]}) of dimension ({out[0]}) is not in allowed range ({allowed})"
    else:
        fixed = feature.shape
        good = array.ndim == len(fixed) and all(d is None or d == n for n, d in zip(array.shape, fixed))
        wanted = str(list(fixed))
    if not good:
        known_as = f"; in Core ML's words: {words}" if words else ""  # what an application may look for
        raise InputError(f"{place}: input {feature.name!r} has shape {list(array.shape)}, expected {wanted}{known_as}")
    return array


def within(size: int, bounds: tuple[int, int | None]) -> bool:
    low, high = bounds
    return low <= size and (high is None or size <= high)


def range_text(bounds: tuple[int, int | None]) -> str:
    low, high = bounds
    return f"{low}..{'' if high is None else high}"


def check_pairing(function: Function, arrays: Mapping[str, np.ndarray], place: str) -> None:
    """Several enumerated inputs go together by position: all take their i-th shape."""
    flexible = [f for f in function.inputs if len(f.enumerated) > 1]
    if len(flexible) < 2:
        return
    options = [{i for i, s in enumerate(f.enumerated) if s == arrays[f.name].shape} for f in flexible]
    if not set.intersection(*options):
        shapes = ", ".join(f"{f.name} {list(arrays[f.name].shape)}" for f in flexible)
        raise InputError(f"{place}: these enumerated shapes do not belong together: {shapes}")


def to_tensor(feature: Feature, array: np.ndarray, policy: Policy, place: str) -> Tensor:
    """Core ML casts numbers to the declared type; a value that an integer type cannot hold is refused."""
    dtype = feature.type.dtype
    if dtype in _INTEGERS and array.size:
        info = np.iinfo(dtype)
        whole = array.dtype.kind != "f" or bool((np.isfinite(array) & (np.trunc(array) == array)).all())
        if not whole or array.min() < info.min or array.max() > info.max:
            bad = array.flat[0] if whole else next(v for v in array.flat if not float(v).is_integer())
            bad = array.max() if whole and array.max() > info.max else array.min() if whole else bad
            raise InputError(f"{place}: input {feature.name!r} takes {dtype}, got {bad}")
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    if not array.flags.writeable:
        array = array.copy()  # torch warns about wrapping read-only memory
    tensor = from_numpy(array, dtype) if dtype in RUNTIME else torch.from_numpy(array)
    return policy.settle(tensor, "input", feature.name) if dtype == "fp16" else tensor
