"""In which constants two operations differ, said in words."""

from __future__ import annotations

import numpy as np

from distill.mil import Binding, Function, Value
from distill.mil_tools.compare import Tolerance, compare


def constant_changes(first: Function, second: Function, value: str, partner: str) -> list[str]:
    """How the constants of two operations differ, a line each."""
    x, y = first.producers[value], second.producers[partner]
    out = [] if x.type == y.type else [f"operator {x.type} here, {y.type} there"]
    for parameter in sorted(x.inputs.keys() | y.inputs.keys()):
        mine, theirs = x.inputs.get(parameter, []), y.inputs.get(parameter, [])
        if len(mine) != len(theirs):
            out.append(f"{parameter}: {len(mine)} values here, {len(theirs)} there")
            continue
        texts = (_binding_change(first, one, second, other) for one, other in zip(mine, theirs))
        out += [f"{parameter}: {text}" for text in texts if text]
    return out


def _binding_change(first: Function, one: Binding, second: Function, other: Binding) -> str:
    a, b = first.constant(one), second.constant(other)
    if a is not None and b is not None:
        return _change(a, b)
    makers = [_maker(first, one), _maker(second, other)]
    constexpr = any(maker.startswith("constexpr_") for maker in makers)
    return f"made by {makers[0]} here, {makers[1]} there" if makers[0] != makers[1] or constexpr else ""


def _maker(function: Function, binding: Binding) -> str:
    if not isinstance(binding, str):
        return "const"
    return function.producers[binding].type if binding in function.producers else "an input"


def _change(a: Value, b: Value) -> str:
    """In words, how two constants differ; empty where they hold the same."""
    if a.type.dtype in ("list", "tuple", "dictionary") or b.type.dtype in ("list", "tuple", "dictionary"):
        return ""
    x, y = a.numpy(), b.numpy()
    if x.shape != y.shape:
        return f"shape {list(x.shape)} here, {list(y.shape)} there"
    if np.array_equal(x, y):
        return ""
    if x.size <= 8:
        return f"{x.tolist()} here, {y.tolist()} there"
    where = np.flatnonzero((x != y).reshape(-1))
    text = f"{where.size} of {x.size} elements differ"
    if x.dtype.kind == "f" == y.dtype.kind:
        found = compare(x, y, Tolerance(0, 0))
        text += f", max error {found.max_error:.3g}, relative {found.relative:.3g}"
    return text
