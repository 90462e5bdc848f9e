"""What a package holds: functions, inputs, outputs, states, operators, weights, deployment target."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from distill import mil
from distill.mil import Binding, Feature, Function, Operation, Program, TensorType, Value
from distill.mil.dtypes import DTYPES, packed_size
from distill.mil_tools.outputs import class_labels
from distill.mil_tools.tables import plain, printable, size, table

TARGETS = {
    6: ("iOS 15", "macOS 12"),
    7: ("iOS 16", "macOS 13"),
    8: ("iOS 17", "macOS 14"),
    9: ("iOS 18", "macOS 15"),
    10: ("iOS 26", "macOS 26"),
}
"""Specification version -> the first systems that load it (Apple's table of format versions)."""
_SHOWN = 100
"""Characters of a metadata entry that the text shows; --json gives it whole."""


def describe(program: Program, function: str | None = None) -> dict[str, Any]:
    """Everything the tool shows, as plain values."""
    functions = [program.function(function)] if function is not None else list(program.functions.values())
    return {
        "package": str(program.path),
        "specification_version": program.specification_version,
        "target": list(TARGETS.get(program.specification_version, ())),
        "description": {k: v for k, v in program.description.items() if v},
        "metadata": dict(program.metadata),
        "default_function": program.default_function,
        "functions": {f.name: _function(f) for f in functions},
        "weights": weights(functions),
        "weight_file_bytes": sum(path.stat().st_size for path in program.weight_files),
        "missing_operators": missing_operators(functions),
    }


def _function(function: Function) -> dict[str, Any]:
    types = Counter(op.type for op in function.block.walk() if op.type != "const")
    return {
        "opset": function.opset,
        "inputs": [_feature(f) for f in function.inputs],
        "outputs": [
            _feature(f) | ({"labels": class_labels(function)} if f.kind == "label" else {}) for f in function.outputs
        ],
        "states": [_feature(f) for f in function.states],
        "operators": dict(sorted(types.items(), key=lambda item: (-item[1], item[0]))),
    }


def _feature(feature: Feature) -> dict[str, Any]:
    out: dict[str, Any] = {"name": feature.name, "dtype": feature.dtype, "shape": list(feature.shape)}
    if feature.kind != "tensor":
        out["kind"] = feature.kind
    if feature.color:
        out["color"] = feature.color
    if feature.enumerated:
        out["enumerated"] = [list(shape) for shape in feature.enumerated]
    if feature.ranges:
        out["ranges"] = [list(pair) for pair in feature.ranges]
    if feature.optional:
        out |= {"optional": True, "default": feature.default}
    if feature.type.dtype != feature.dtype:
        out["program_dtype"] = feature.type.dtype
    return out


def weights(functions: list[Function]) -> dict[str, Any]:
    """Constants by type, each one in the file counted once whoever uses it, and what decompression makes of them."""
    stored: dict[Any, tuple[str, int, int]] = {}
    dense: dict[Any, int] = {}
    for number, function in enumerate(functions):
        packed, unpacked = _compressed(function, number)
        dense |= unpacked
        for where, value in _constants(function):
            if not isinstance(value.type, TensorType) or value.type.dtype not in DTYPES or value.type.count is None:
                continue
            key = value.key or (number, where)
            stored[key] = (value.type.dtype, value.type.count, packed_size(value.type.dtype, value.type.count))
            if key not in packed:
                dense[key] = stored[key][2]
    rows: list[dict[str, Any]] = [
        {
            "dtype": dtype,
            "tensors": sum(d == dtype for d, _, _ in stored.values()),
            "elements": sum(n for d, n, _ in stored.values() if d == dtype),
            "bytes": sum(b for d, _, b in stored.values() if d == dtype),
        }
        for dtype in sorted({d for d, _, _ in stored.values()})
    ]
    total, full = sum(row["bytes"] for row in rows), sum(dense.values())
    return {
        "by_dtype": sorted(rows, key=lambda row: -row["bytes"]),
        "bytes": total,
        "dense_bytes": full,
        "compression": full / total if total else 1.0,
    }


def _constants(function: Function) -> list[tuple[str, Value]]:
    """Every constant with a name that is its own within the function: `const`s, and values given in place."""
    out = [(name, value) for name, value in function.constants.items()]
    for op in function.block.walk():
        if op.type != "const":
            out += [
                (f"{op.output_name}.{parameter}.{index}", binding)
                for parameter, bindings in _arguments(op).items()
                for index, binding in enumerate(bindings)
                if isinstance(binding, Value)
            ]
    return out


def _arguments(op: Operation) -> dict[str, list[Binding]]:
    """Inputs; iOS 16 writes those of a constexpr as attributes."""
    found: dict[str, list[Binding]] = dict(op.inputs)
    if op.type.startswith("constexpr_"):
        found |= {name: [value] for name, value in op.attributes.items()}
    return found


def _compressed(function: Function, number: int) -> tuple[set[Any], dict[Any, int]]:
    """Keys of constants that only decompression reads, and the dense bytes of what it makes in the end."""
    packed: set[Any] = set()
    results: dict[str, tuple[Any, int]] = {}
    inner: set[str] = set()
    for op in function.block.walk():
        if not op.type.startswith("constexpr_"):
            continue
        keys = []
        for parameter, bindings in _arguments(op).items():
            for index, binding in enumerate(bindings):
                value = function.constant(binding)
                if value is not None:
                    where = binding if isinstance(binding, str) else f"{op.output_name}.{parameter}.{index}"
                    keys.append(value.key or (number, where))
                elif isinstance(binding, str):
                    inner.add(binding)
        packed.update(keys)
        for out in op.outputs:
            if isinstance(out.type, TensorType) and out.type.count is not None and out.type.dtype in DTYPES:
                # the same constants make the same weight, whichever function asks
                key = ("dense", op.type, *keys) if keys else ("dense", number, out.name)
                results[out.name] = (key, packed_size(out.type.dtype, out.type.count))
    return packed, {key: count for name, (key, count) in results.items() if name not in inner}


def missing_operators(functions: list[Function]) -> list[str]:
    """Operators that the executor cannot run."""
    import distill.mil.ops  # noqa: F401  (fills the operator table; loads torch)
    from distill.mil.ops.registry import TABLE

    return sorted({op.type for f in functions for op in f.block.walk()} - TABLE.keys() - {"const"})


def render(found: dict[str, Any]) -> str:
    """The description as text."""
    target = " / ".join(found["target"]) or "unknown systems"
    lines = [found["package"], f"  ML Program, specification version {found['specification_version']} ({target})"]
    lines += [f"  {key}: {_short(value)}" for key, value in found["description"].items()]
    for name, function in found["functions"].items():
        mark = " (default)" if name == found["default_function"] and len(found["functions"]) > 1 else ""
        lines += ["", f"function {printable(name)}{mark}, opset {function['opset']}"]
        rows = [
            (role, f["name"], _type(f), _allowed(f))
            for role in ("input", "output", "state")
            for f in function[f"{role}s"]
        ]
        lines.append(table(("", "name", "type", "allowed"), rows))
    lines += ["", "operators", _operators(found["functions"])]
    lines += ["", "weights", _weights(found)]
    if found["metadata"]:
        lines += ["", "metadata", *(f"  {printable(k)}: {_short(v)}" for k, v in found["metadata"].items())]
    missing = found["missing_operators"]
    lines += ["", f"not runnable here: no implementation of {', '.join(missing)}" if missing else "runnable here: yes"]
    return "\n".join(lines)


def _type(feature: dict[str, Any]) -> str:
    if feature.get("kind") == "probabilities":
        return "label to number"
    shape = "" if feature.get("kind") == "label" else f"[{_dims(feature['shape'])}]"
    return f"{feature['dtype']}{shape}"


def _dims(shape: list[int | None]) -> str:
    return ", ".join("?" if n is None else str(n) for n in shape)


def _allowed(feature: dict[str, Any]) -> str:
    notes = []
    if feature.get("kind"):
        notes.append(f"{feature['color']} image" if feature.get("color") else feature["kind"])
    if feature.get("labels"):
        notes[-1] = f"{len(feature['labels'])} labels: {_short(', '.join(map(str, feature['labels'])))}"
    if feature.get("enumerated"):
        notes.append(" or ".join(f"[{_dims(shape)}]" for shape in feature["enumerated"]))
    if feature.get("ranges"):
        parts = [
            str(low) if low == high else f"{low}..{'' if high is None else high}" for low, high in feature["ranges"]
        ]
        notes.append(f"[{', '.join(parts)}]")
    if feature.get("optional"):
        notes.append(f"optional, else {feature['default']:g}")
    if feature.get("program_dtype"):
        notes.append(f"{feature['program_dtype']} in the program")
    return "; ".join(notes)


def _operators(functions: dict[str, Any]) -> str:
    total: Counter[str] = Counter()
    for function in functions.values():
        total.update(function["operators"])
    names = list(functions) if len(functions) > 1 else []
    rows = [(op, count, *(functions[n]["operators"].get(op, 0) for n in names)) for op, count in total.most_common()]
    rows.append(("all", total.total(), *(sum(functions[n]["operators"].values()) for n in names)))
    return table(("type", "count", *names), rows)


def _weights(found: dict[str, Any]) -> str:
    weights = found["weights"]
    rows = [(row["dtype"], row["tensors"], row["elements"], size(row["bytes"])) for row in weights["by_dtype"]]
    rows.append(("all", sum(r[1] for r in rows), sum(r[2] for r in rows), size(weights["bytes"])))
    text = table(("dtype", "tensors", "elements", "bytes"), rows)
    if weights["dense_bytes"] != weights["bytes"]:
        text += f"\n  decompressed {size(weights['dense_bytes'])}: {weights['compression']:.2f} times as much"
    return f"{text}\n  weight files {size(found['weight_file_bytes'])}"


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distill mil info", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", type=Path, help="X.mlpackage")
    parser.add_argument("--function", metavar="F", help="only this function (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the description."""
    found = describe(mil.load(args.package), args.function)
    print(json.dumps(plain(found), indent=2) if args.json else render(found))
    return 0
