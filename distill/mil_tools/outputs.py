"""A function's outputs as arrays, a classifier's labels, and which output of a module is which of a package."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from distill.errors import PackageError
from distill.mil import Function, TensorType, ValueType
from distill.mil_tools.compare import as_array


def class_labels(function: Function) -> list[int | str]:
    """A classifier's labels in the order of its scores; empty where there is none or they are computed."""
    op = next((op for op in function.block.walk() if op.type == "classify"), None)
    constants = [function.constant(b) for b in op.inputs.get("classes", [])] if op else []
    found: list[Any] = []
    try:
        for constant in constants:
            if constant is None:
                return []
            parts = [constant] if isinstance(constant.type, TensorType) else list(constant.items)
            for part in parts:
                found += part.numpy().reshape(-1).tolist()
    except (PackageError, ValueError, AttributeError):
        return []  # running the package says what is wrong with them
    return [label if isinstance(label, str) else int(label) for label in found]


def scores(value: Any) -> np.ndarray:
    """As an array; a classifier's probabilities in the order of its scores."""
    return np.array(list(value.values())) if isinstance(value, dict) else as_array(value)


class Pairing(NamedTuple):
    """Outputs of a package with the module's, and in words what has no partner."""

    pairs: list[tuple[str, np.ndarray]]
    alone: list[str]


def pair(function: Function, outputs: list[tuple[str, np.ndarray]]) -> Pairing:
    """By name (of a dictionary), else by position; probabilities with the last output of as many floats.

    Where one side has more outputs, each takes the next one of its size.
    """
    features = {f.name: f.kind for f in function.outputs}
    names = [name for name, kind in features.items() if kind not in ("label", "probabilities")]
    labels = [label.removeprefix("output.") for label, _ in outputs]
    if labels and set(labels) <= features.keys():
        pairs = [(label, array) for label, (_, array) in zip(labels, outputs) if features[label] != "label"]
        return Pairing(pairs, _alone(features, pairs, []))
    rest, pairs = list(outputs), []
    count = len(class_labels(function))
    for probabilities in (name for name, kind in features.items() if kind == "probabilities"):
        for at in reversed(range(len(rest))):
            if rest[at][1].dtype.kind == "f" and rest[at][1].size == count:
                pairs.append((probabilities, rest.pop(at)[1]))
                break
    types = {f.name: f.type for f in function.outputs}
    uneven = len(names) != len(rest)
    for name in names:
        fitting = [i for i, (_, array) in enumerate(rest) if not uneven or _fits(types[name], array)]
        if fitting:
            pairs.append((name, rest.pop(fitting[0])[1]))
    return Pairing(pairs, _alone(features, pairs, [label for label, _ in rest]))


def _fits(declared: ValueType, array: np.ndarray) -> bool:
    count = declared.count if isinstance(declared, TensorType) else None
    floats = declared.dtype in ("fp16", "fp32")
    return floats == (array.dtype.kind == "f") and count in (None, array.size)


def _alone(features: dict[str, str], pairs: list[tuple[str, np.ndarray]], unused: list[str]) -> list[str]:
    paired = {name for name, _ in pairs}
    labelled = any(features[name] == "probabilities" for name in paired)  # the label follows from them
    alone = [name for name, kind in features.items() if name not in paired and not (kind == "label" and labelled)]
    return [f"output {name} of the package" for name in alone] + [f"{label} of the module" for label in unused]
