"""What the tools feed to a package: the flags, arrays from files and numbers, random inputs, states."""

from __future__ import annotations

import argparse
import math
import sys
import zipfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.artifacts import atomic_file, require_regular
from distill.errors import InputError, describe_os_error
from distill.mil import Binding, Feature, Function, Operation, Program
from distill.mil.limits import DEFAULT
from distill.mil.program import POLICIES

if TYPE_CHECKING:
    from distill.mil.state import State

_PASSES_INDEX_ON = frozenset(
    {"add", "cast", "concat", "expand_dims", "identity", "reshape", "select", "slice_by_index", "squeeze", "transpose"}
)
"""Operators through which a token id or a position reaches the table that it indexes."""


def add_flags(parser: argparse.ArgumentParser, *, policy: str, seed: int | None) -> None:
    """The flags that say what to run, on what, and how."""
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an input: NAME=FILE.npy, NAME=FILE.npz, an image file, or numbers as in position=3 and "
        "input_ids=1,2,3, which take the input's shape; FILE.npz alone gives every input in it. May be repeated",
    )
    parser.add_argument("--function", metavar="F", help="entry point of a multifunction package (default: its default)")
    parser.add_argument("--policy", default=policy, help=f"{', '.join(POLICIES)} (default: {policy})")
    parser.add_argument(
        "--seed",
        type=int,
        default=seed,
        metavar="N",
        help="random values for the inputs not given: normal floats, integers within the table that they index, "
        "0 to 255 for the pixels of an image "
        + (f"(default: {seed})" if seed is not None else "(default: none; every input must be given)"),
    )
    parser.add_argument(
        "--state-in", type=Path, metavar="FILE.npz", help="the states to begin with, by name (default: zeros)"
    )


def collect(args: argparse.Namespace, function: Function) -> dict[str, Any]:
    """The inputs that the flags describe. What is drawn at random is told on stderr."""
    if args.seed is not None and args.seed < 0:
        raise InputError(f"--seed must not be negative, not {args.seed}")
    given = parse_inputs(args.input, function)
    if args.seed is None:
        return given
    drawn = draw(function, given, args.seed)
    return given | drawn


def as_program_sees(program: Program, function: Function, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Checked, an image as (1, C, H, W), numbers of the kind that the program takes."""
    from distill.mil.inputs import check_shape, to_array  # loads torch

    place, out = f"{program.path}: function {function.name}", {}
    for feature in function.inputs:
        if feature.name in inputs:
            array = to_array(feature, inputs[feature.name], place)
            check_shape(feature, array, place)
            kind = "i" if feature.type.dtype.startswith(("int", "uint")) else "f"
            if array.dtype.kind != kind and feature.type.dtype != "bool":
                array = array.astype(np.int64 if kind == "i" else np.float32)
            out[feature.name] = array
    return out


def parse_inputs(specs: list[str], function: Function) -> dict[str, Any]:
    """`NAME=VALUE` and `FILE.npz` as arrays by input name."""
    features = {f.name: f for f in function.inputs}
    out: dict[str, Any] = {}
    for spec in specs:
        name, equals, text = spec.partition("=")
        if not equals or (name not in features and spec.endswith(".npz") and Path(spec).is_file()):
            found = {n: a for n, a in _read_arrays(Path(spec)).items() if n in features}
            if not found:
                raise InputError(
                    f"--input {spec}: names none of the inputs {', '.join(features) or '(there are none)'}"
                )
        elif name not in features:
            raise InputError(f"--input {spec}: no input {name!r}; there are {', '.join(features) or 'none'}")
        else:
            found = {name: _value(features[name], text, spec)}
        if twice := sorted(out.keys() & found.keys()):
            raise InputError(f"--input {spec}: {twice[0]} is given twice")
        out |= found
    return out


def _value(feature: Feature, text: str, spec: str) -> Any:
    try:
        numbers = np.array([float(part) if _is_float(part) else int(part) for part in text.split(",")])
    except (ValueError, OverflowError):
        pass
    else:
        return shaped(feature, numbers)
    path = Path(text)
    if feature.kind == "image" and path.suffix not in (".npy", ".npz"):
        return _read_image(path)
    if path.is_file() and path.stat().st_size and not _holds_arrays(path):
        raise InputError(f"--input {spec}: {feature.name} takes an array, and {path} is neither .npy nor .npz")
    arrays = _read_arrays(path)
    if feature.name in arrays:
        return arrays[feature.name]
    if len(arrays) != 1:
        raise InputError(f"--input {spec}: {path} holds {', '.join(arrays) or 'nothing'}, none called {feature.name}")
    return next(iter(arrays.values()))


def _holds_arrays(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6).startswith((b"\x93NUMPY", b"PK\x03\x04", b"PK\x05\x06"))


def _read_image(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(f"{path}: reading an image file needs Pillow (pip install pillow); or give a .npy") from error
    try:
        with Image.open(path) as image:
            return image.copy()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not an image that can be read: {error}") from error


def _is_float(text: str) -> bool:
    return any(c in text.lower() for c in ".en")  # 1.5, 1e-3, nan, inf


def shaped(feature: Feature, numbers: np.ndarray) -> np.ndarray:
    """Numbers in the one shape of the input that holds as many; unchanged where there is none, or a choice."""
    shapes: list[tuple[int, ...]] = [tuple(s) for s in feature.enumerated]
    if not shapes and feature.ranges:
        fixed = [low if low == high else None for low, high in feature.ranges]
        rest = math.prod(n for n in fixed if n is not None)
        if fixed.count(None) == 1 and rest and numbers.size % rest == 0:
            shapes = [tuple(numbers.size // rest if n is None else n for n in fixed)]
    if not shapes:
        shapes = [tuple(n or 1 for n in feature.shape)]
    fitting = [shape for shape in shapes if math.prod(shape) == numbers.size]
    return numbers.reshape(fitting[0]) if len(fitting) == 1 else numbers


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz, or the one of a .npy under the name ''. Nothing is unpickled."""
    if not path.exists():
        raise InputError(f"{path}: neither numbers nor a file that exists")
    require_regular(path)
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise InputError(f"cannot read {describe_os_error(error, path)}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise InputError(f"{path}: not an array that can be read safely: {str(error).splitlines()[0]}") from error


def draw(function: Function, given: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random arrays for the inputs that are not given and not optional; says what it drew."""
    out = {}
    for number, feature in enumerate(function.inputs):
        if feature.name in given or feature.optional:
            continue
        random = np.random.default_rng([seed, number])
        shape = _shape_for(feature, function, given)
        if 8 * math.prod(shape) > DEFAULT.memory:
            raise InputError(f"input {feature.name!r} of shape {list(shape)} is too large to be drawn at random")
        if feature.kind == "image" and feature.color != "GRAYSCALE_FLOAT16":
            out[feature.name], what = random.integers(0, 256, shape), "integers below 256"
        elif feature.type.dtype.startswith(("int", "uint")):
            limit = index_limit(function, feature.name)
            out[feature.name], what = random.integers(0, limit, shape), f"integers below {limit}"
        elif feature.type.dtype == "bool":
            out[feature.name], what = random.integers(0, 2, shape), "zeros and ones"
        else:
            out[feature.name], what = random.standard_normal(shape).astype(np.float32), "normal"
        print(f"input {feature.name} {list(shape)}: random {what} (seed {seed})", file=sys.stderr)
    return out


def _shape_for(feature: Feature, function: Function, given: Mapping[str, Any]) -> tuple[int, ...]:
    """The default shape; among enumerated ones, that which goes with the shapes already given."""
    if not feature.enumerated:
        return tuple(n or 1 for n in feature.shape)
    for other in function.inputs:
        if other.name in given and len(other.enumerated) == len(feature.enumerated):
            shapes = [tuple(s) for s in other.enumerated]
            if np.shape(given[other.name]) in shapes:
                return tuple(feature.enumerated[shapes.index(np.shape(given[other.name]))])
    return tuple(n or 1 for n in feature.shape)


def index_limit(function: Function, name: str) -> int:
    """How large an integer input may be: the shortest table that a gather looks it up in; 2 where none does."""
    consumers: dict[str, list[Operation]] = {}
    for op in function.block.walk():
        for bindings in op.inputs.values():
            for binding in bindings:
                if isinstance(binding, str):
                    consumers.setdefault(binding, []).append(op)
    seen, queue, limits = {name}, deque([name]), []
    while queue:
        value = queue.popleft()
        for op in consumers.get(value, []):
            if op.type.startswith("gather") and value in op.inputs.get("indices", []):
                limits += _table_length(function, op)
            elif op.type in _PASSES_INDEX_ON:
                fresh = [out.name for out in op.outputs if out.name not in seen]
                seen.update(fresh)
                queue.extend(fresh)
    return max(1, min(limits, default=2))


def _table_length(function: Function, op: Operation) -> list[int]:
    x = next(iter(op.inputs.get("x", ())), "")
    constant = function.constant(x)
    shape = constant.type.shape if constant else _declared(function, x)
    axis = function.constant(op.inputs["axis"][0]) if op.inputs.get("axis") else None
    at = int(axis.numpy().reshape(-1)[0]) if axis is not None and axis.type.dtype == "int32" else 0
    size = shape[at] if -len(shape) <= at < len(shape) else None
    return [size] if size else []


def _declared(function: Function, name: Binding) -> tuple[int | None, ...]:
    if not isinstance(name, str) or name not in function.producers:
        return ()
    return next(out.shape for out in function.producers[name].outputs if out.name == name)


def make_state(program: Program, function: Function, path: Path | None) -> State | None:
    """The states to run with: zeros, or those of a file; None for a function without."""
    if not function.states:
        if path is not None:
            raise InputError(f"--state-in {path}: function {function.name} keeps no state")
        return None
    state = program.make_state(function.name)
    if path is not None:
        arrays = _read_arrays(path)
        if set(arrays) != set(state.names):
            raise InputError(
                f"--state-in {path}: holds {', '.join(arrays) or 'nothing'}, the states are {', '.join(state.names)}"
            )
        for name, array in arrays.items():
            if array.dtype.kind not in "biuf":
                raise InputError(f"--state-in {path}: {name!r} is an array of {array.dtype}, not of numbers")
            state.write(name, array)
    return state


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a .npz, whole or not at all. (numpy.savez refuses some names that a package may use.)"""
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
