"""The table of the ANE lint: rules, their severity and sources; here those on shapes, sizes and types.

An error: part of the program cannot run on the Neural Engine, or gives wrong numbers there, and no source
contradicts it for Core ML. A warning: sources disagree, or one report stands alone. Info is advice.
The rules on operators, numerics, state and compressed weights are in ane_op_rules.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from distill.mil.program import Operation, TensorType
from distill.verify import ane_ops
from distill.verify.ane_ops import CML_LLM, FunctionView, Limits, View

Severity = Literal["error", "warning", "info"]

APPLE_RULES = "apple/coreai-models skills/skills/model-authoring/references/neural_engine_rules.md"
APPLE_GUIDANCE = "apple/coreai-models skills/skills/working-with-coreai/references/guidance.md"
FLEXIBLE = "apple.github.io/coremltools/docs-guides/source/flexible-inputs.html"
TYPED = "apple.github.io/coremltools/docs-guides/source/typed-execution.html"
ANE_BOOK = "alvaro-videla.com/ane-book"


class Hit(NamedTuple):
    """One violation, before the rule's own words are added."""

    message: str
    function: str = ""
    operation: Operation | None = None
    tensor: str = ""


Check = Callable[[View, Limits], Iterator[Hit]]


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    id: str
    severity: Severity
    title: str
    source: str
    conflict: str
    check: Check


RULES: dict[str, Rule] = {}


def rule(id: str, severity: Severity, title: str, source: str, conflict: str = "") -> Callable[[Check], Check]:
    """Enter a check into the table; an id twice is a mistake."""

    def enter(check: Check) -> Check:
        if id in RULES:
            raise ValueError(f"ANE rule {id!r} is registered twice")
        RULES[id] = Rule(id, severity, title, source, conflict, check)
        return check

    return enter


def at(f: FunctionView, op: Operation, message: str) -> Hit:
    """A hit at an operation."""
    return Hit(message, f.name, op, op.output_name)


# Shapes and layout


@rule("rank", "error", "a tensor has more than 5 axes", f"{APPLE_RULES}: rank 6 and above is rejected")
def rank(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op, name, type_ in view.tensors():
        if len(type_.shape) > limits.max_rank:
            yield Hit(f"{type_} has rank {len(type_.shape)}", f.name, op, name)


@rule(
    "layout", "info", "work outside the (batch, channels, 1, sequence) layout", f"{APPLE_RULES}: BC1S format",
    f"{ANE_BOOK} ch. 1 prescribes (1, C, T, 1), against the last-axis rule",
)  # fmt: skip
def layout(view: View, limits: Limits) -> Iterator[Hit]:
    for f in view.functions:
        off = [o for o in f.operations if any(t.dtype == "fp16" and len(t.shape) != 4 for t in o.outputs)]
        if off:
            count = f"{len(off)} of {len(f.operations)} operations"
            yield at(f, off[0], f"{count} make fp16 tensors of rank other than 4")


@rule(
    "linear", "info", "a linear or matmul by constant weights instead of a 1x1 convolution",
    f"{APPLE_RULES}: Conv2d instead of Linear",
    f"{ane_ops.ANEFORGE}: linear is native, folded to convolution",
)  # fmt: skip
def linear(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations("linear", "matmul"):
        if op.type == "linear" or not all(f.is_runtime(f.input(op, p)) for p in "xy"):
            yield at(f, op, f"weights {f.type_of(f.input(op, 'weight' if op.type == 'linear' else 'y'))}")


@rule(
    "dynamic-range", "error", "an input has a range of shapes: at most its default shape runs on the ANE",
    f"developer.apple.com/forums/thread/724930 (Apple); {APPLE_RULES}: fully static shapes; executorch "
    "docs/source/backends/coreml/coreml-partitioner.md; apple/coremltools#1909 shows the default shape",
)  # fmt: skip
def dynamic_range(view: View, limits: Limits) -> Iterator[Hit]:
    for f in view.functions:
        for i in f.function.inputs:
            ranges = [f"{lo}..{'unbounded' if hi is None else hi}" for lo, hi in i.ranges if lo != hi]
            if not i.enumerated and (ranges or None in i.type.shape):
                message = f"input {i.name!r} is {i.type}, range {', '.join(ranges) or 'unknown'}"
                yield Hit(message, f.name, None, i.name)


@rule(
    "enumerated", "warning", "an input has enumerated shapes",
    f"{APPLE_RULES}: one function per static shape; apple/coremltools#1909: layer_norm under enumerated "
    "shapes left it",
    "developer.apple.com/forums/thread/724930 (Apple): each enumerated shape should run on the ANE",
)  # fmt: skip
def enumerated(view: View, limits: Limits) -> Iterator[Hit]:
    for f in view.functions:
        for i in f.function.inputs:
            if i.enumerated:
                yield Hit(f"input {i.name!r} has {len(i.enumerated)} shapes", f.name, None, i.name)


@rule(
    "enumerated-limit", "error", "more enumerated shapes than Core ML takes",
    f"{FLEXIBLE}: at most 128; several inputs: iOS 18",
)  # fmt: skip
def enumerated_limit(view: View, limits: Limits) -> Iterator[Hit]:
    for f in view.functions:
        inputs = [i for i in f.function.inputs if i.enumerated]
        for i in inputs:
            if len(i.enumerated) > limits.max_enumerated:
                yield Hit(f"input {i.name!r} has {len(i.enumerated)} shapes", f.name, None, i.name)
        if len(inputs) > 1 and view.program.specification_version < 9:
            version = view.program.specification_version
            yield Hit(f"{len(inputs)} enumerated inputs, specification version {version} (iOS 18: 9)", f.name)


@rule(
    "last-axis", "warning", "an input or output has a short last axis, padded to 64 bytes",
    f"{APPLE_RULES}: at least 32 fp16 elements, never 1; skyfallsin/apple-neural-engine-field-guide: W < "
    "32 on raw surfaces is silent garbage",
    "a decode graph has S = 1 by construction; whether padding S pays is unknown",
)  # fmt: skip
def last_axis(view: View, limits: Limits) -> Iterator[Hit]:
    for f in view.functions:
        for i in [*f.function.inputs, *f.function.outputs]:
            if _is_narrow(i.type, limits):
                note = ", 32 times the memory" if i.type.shape[-1] == 1 else ""
                yield Hit(f"{i.name!r} is {i.type}: last axis {i.type.shape[-1]}{note}", f.name, None, i.name)


@rule(
    "last-axis-inner", "info", "intermediates with a short last axis",
    f"{APPLE_RULES}: those in L2 cache may tolerate it",
)  # fmt: skip
def last_axis_inner(view: View, limits: Limits) -> Iterator[Hit]:
    for f in view.functions:
        narrow = [o for o in f.operations if any(_is_narrow(t.type, limits) for t in o.outputs)]
        if narrow:
            first = narrow[0].outputs[0].type
            yield at(f, narrow[0], f"{len(narrow)} of {len(f.operations)} operations; the first makes {first}")


def _is_narrow(type_: object, limits: Limits) -> bool:
    if not isinstance(type_, TensorType) or type_.dtype not in ane_ops.FLOATING or not type_.shape:
        return False
    last = type_.shape[-1]
    return last is not None and last < limits.min_last_axis


@rule(
    "dim-16384", "warning", "an axis is longer than 16,384",
    "Anemll anemll/models/llama_model.py; 0seba/coremlmodels src/coremlmodels/export_utils.py:61",
    f"{CML_LLM}SESSION_2026_04_28_LMSPLIT_FINALISE: 2304 -> 262,144 in one convolution ran on the ANE, "
    "4.6 % faster than split; ANEForge docs/capabilities.md: 16,384 holds through A15, 65,536 from A16 "
    "and for channels",
)  # fmt: skip
def long_axis(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op, name, type_ in view.tensors():
        longest = max((d for d in type_.shape if d is not None), default=0)
        if longest > limits.max_dim:
            yield Hit(f"{type_} has an axis of {longest}", f.name, op, name)


# Sizes: bands, so that a package has at most one finding


def _size_rule(id: str, title: str, source: str, conflict: str, low: str, high: str | None) -> None:
    def check(view: View, limits: Limits) -> Iterator[Hit]:
        size, above = view.package_bytes, getattr(limits, low)
        if above < size and (high is None or size <= getattr(limits, high)):
            yield Hit(f"the package has {size / 1e6:,.0f} MB, more than {above / 1e6:,.0f} MB")

    rule(id, "warning", title, source, conflict)(check)


_size_rule(
    "size-2gb", "the package is over 2 GB",
    f"{APPLE_GUIDANCE}: under 2 GB on iOS; Anemll: about 2 GB a file on macOS", "", "max_bytes", None,
)  # fmt: skip
_size_rule(
    "size-1gb", "the package is over 1 GB",
    f"Anemll: about 1 GB a file on iOS; {ANE_BOOK} ch. 4: error -14 from 1 GB", f"{APPLE_GUIDANCE}: 2 GB",
    "ios_bytes", "max_bytes",
)  # fmt: skip
_size_rule(
    "size-chunk", "the package is over 250 MB: consider chunks",
    f"{ANE_BOOK} ch. 4: about 250 MB a package is reliable",
    f"{CML_LLM}EXPERIMENTS.md: fewer chunks are faster (4 -> 3: +8.2 %)", "chunk_bytes", "ios_bytes",
)  # fmt: skip


@rule(
    "size-floor", "info", "a tiny model: eligible, but Core ML may place none of it",
    "ask-meridian.uk/blog/apple-neural-engine-eligibility-vs-placement: 2 layers of 128 were 0 % placed, "
    "6 of 384 (20.4 MB) 100 %",
)  # fmt: skip
def size_floor(view: View, limits: Limits) -> Iterator[Hit]:
    if 0 < view.package_bytes < limits.floor_bytes:
        size, floor = view.package_bytes / 1e6, limits.floor_bytes / 1e6
        yield Hit(f"the package has {size:,.2f} MB, less than {floor:,.0f} MB")


# Types


@rule(
    "fp32-compute", "error", "an operation computes in fp32 and leaves the ANE",
    f"{APPLE_RULES}: fp32 falls back; {TYPED}",
    "ANEForge docs/capabilities.md takes fp32 between casts, on the private path only",
)  # fmt: skip
def fp32_compute(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations():
        types = [t for _, t in f.runtime_inputs(op)] + [out.type for out in op.outputs]
        if op.type != "cast" and any(t.dtype == "fp32" for t in types):
            yield at(f, op, f"{op.type} takes or makes {next(str(t) for t in types if t.dtype == 'fp32')}")


@rule(
    "fp32-io", "warning", "an input or output is fp32: a cast runs at the boundary",
    f"{APPLE_RULES}; {TYPED}",
)  # fmt: skip
def fp32_io(view: View, limits: Limits) -> Iterator[Hit]:
    for f in view.functions:
        for i in [*f.function.inputs, *f.function.outputs]:
            if i.type.dtype == "fp32":
                yield Hit(f"{i.name!r} is {i.type}", f.name, None, i.name)


@rule("dtype", "error", "a tensor has a type the ANE does not take", f"{APPLE_RULES}: fp16, int8, int16")
def dtype(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op, name, type_ in view.tensors():
        if type_.dtype not in ane_ops.RUNTIME_DTYPES:
            yield Hit(f"{name!r} is {type_}", f.name, op, name)


_INDEXED = ("slice_by_index", "slice_by_size", "slice_update", "gather", "gather_nd", "gather_along_axis")


@rule(
    "int-ops", "warning", "an operation on 32-bit integers; a few for token ids and positions are normal",
    f"{APPLE_RULES}: fp16, int8, int16 only; ANEForge docs/capabilities.md: int32 is rejected; "
    "apple/coremltools#2365: such operations are forced on the CPU",
)  # fmt: skip
def int_ops(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations():
        types = [t for _, t in f.runtime_inputs(op)] + [out.type for out in op.outputs]
        indexed = op.type in _INDEXED and op.outputs[0].dtype not in ane_ops.INT32
        if not indexed and any(t.dtype in ane_ops.INT32 for t in types):
            wide = next(t for t in types if t.dtype in ane_ops.INT32)
            yield at(f, op, f"{op.type} takes or makes {wide}")


@rule(
    "dynamic-index", "warning", "indices or offsets that are computed at run time",
    f"{APPLE_RULES}: no table indexed by position in the graph; hollance/neural-engine "
    "docs/unsupported-layers.md: gather; ANEForge docs/capabilities.md: no index by tensor data",
    f"{CML_LLM}MLSTATE_PATTERN.md: slice_update at an int32 position ran on an iPhone 17 Pro's ANE; "
    f"{ane_ops.ANEFORGE}: gather and slice_update are native",
)  # fmt: skip
def dynamic_index(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations(*_INDEXED):
        for parameter, type_ in f.runtime_inputs(op):
            if parameter in ("begin", "end", "size", "indices"):
                yield at(f, op, f"{op.type}: {parameter} is {type_}")
                break


def _tables(view: View) -> Iterator[tuple[FunctionView, Operation, int, str]]:
    """Gathers at run-time indices: rows of the table and the type of the indices."""
    for f, op in view.operations("gather"):
        table, indices = f.type_of(f.input(op, "x")), f.type_of(f.input(op, "indices"))
        axis = f.constant(op, "axis")
        if table and indices and f.is_runtime(f.input(op, "indices")):
            yield f, op, table.shape[int(axis) if axis is not None else 0] or 0, indices.dtype


@rule(
    "vocab-uint16", "warning", "token ids beyond 65,535 do not fit the 16-bit ids of the ANE",
    "pytorch/executorch#7616",
    "apple/coremltools casts ids only where the table is small enough, and leaves larger ones to int32 on "
    "the CPU",
)  # fmt: skip
def vocab_uint16(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op, rows, ids in _tables(view):
        if rows > limits.max_token_id + 1:
            yield at(f, op, f"a table of {rows:,} rows, indices in {ids}")


@rule(
    "index-width", "error", "an index type too narrow for its table",
    "arithmetic; see apple/coremltools#2222",
)  # fmt: skip
def index_width(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op, rows, ids in _tables(view):
        if ids in ("int8", "uint8", "int16", "uint16") and rows - 1 > np.iinfo(ids).max:
            yield at(f, op, f"{ids} indices reach {np.iinfo(ids).max:,} of {rows:,} rows")
