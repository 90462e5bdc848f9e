"""The ANE lint's rules on numerics, operators, state and compressed weights; ane_rules.py has the table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distill.mil.program import Operation, TensorType, Value
from distill.verify import ane_ops
from distill.verify.ane_ops import CML_LLM, FunctionView, Limits, View
from distill.verify.ane_rules import APPLE_GUIDANCE, APPLE_RULES, Hit, Severity, at, rule

# Numerics

_MASK_PATH = ane_ops.names("""
    add sub mul real_div select maximum minimum concat stack fill cast slice_by_index slice_by_size reshape
    expand_dims squeeze transpose tile split gather gather_along_axis softmax scatter scatter_nd slice_update
""")


def _constants(view: View, limits: Limits) -> Iterator[tuple[FunctionView, Operation, str, float]]:
    """Largest magnitude of each floating constant on a mask's way: the weights of layers are not searched."""
    for f, op in view.operations(*_MASK_PATH):
        for parameter, bindings in op.inputs.items():
            for value in filter(None, map(f.function.constant, bindings)):
                if _is_searched(value, limits):
                    numbers = value.numpy()
                    low, high = float(numbers.min()), float(numbers.max())  # NaN comes through both
                    yield f, op, parameter, low if abs(low) >= abs(high) or np.isnan(low) else high


def _is_searched(value: Value, limits: Limits) -> bool:
    count = (value.type.count if isinstance(value.type, TensorType) else None) or 0
    return value.type.dtype in ane_ops.FLOATING and 0 < count <= limits.scan_elements


@rule(
    "mask-inf", "error", "a constant is infinite, NaN or beyond fp16",
    f"{APPLE_RULES}: the ANE does not handle -inf in softmax, use -40000; ml-ane-transformers: -1e4",
    f"{CML_LLM}SESSION_2026_04_25_MASK_VALUE.md saw -inf and -1e4 agree, on a Mac; a finite mask is safe "
    "either way",
)  # fmt: skip
def mask_inf(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op, parameter, worst in _constants(view, limits):
        if not abs(worst) <= 65504:
            yield at(f, op, f"{op.type}: {parameter} holds {worst:g}")


@rule(
    "mask-range", "warning", "a constant so large that adding to it can overflow fp16",
    f"{APPLE_RULES}: -40000; ml-ane-transformers: -1e4",
)  # fmt: skip
def mask_range(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op, parameter, worst in _constants(view, limits):
        if limits.mask_floor < abs(worst) <= 65504:
            yield at(f, op, f"{op.type}: {parameter} holds {worst:g}, beyond {limits.mask_floor:g}")


@rule(
    "fp16-square", "warning", "a sum or mean of squares in fp16: overflows where |x| > 256",
    f"{APPLE_RULES}: prefer the high-level norm; measured: the pow/mean/rsqrt "
    "form of RMSNorm is useless at activations of 400, [x,-x] + layer_norm is right",
)  # fmt: skip
def fp16_square(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations("reduce_mean", "reduce_sum", "reduce_sum_square", "reduce_l2_norm"):
        square = f.producer(f.input(op, "x"))
        squares = square is not None and _is_square(f, square)
        squares = squares or op.type in ("reduce_sum_square", "reduce_l2_norm")
        if squares and op.outputs[0].dtype == "fp16" and not (square and _rescaled(f, square)):
            yield at(f, op, f"{op.type} over the square of {f.type_of(f.input(op, 'x'))}")


def _is_square(f: FunctionView, op: Operation) -> bool:
    if op.type == "pow":
        exponent = f.constant(op, "y")
        return exponent is not None and bool(np.all(exponent == 2))
    return op.type == "square" or (op.type == "mul" and f.input(op, "x") == f.input(op, "y"))


def _rescaled(f: FunctionView, square: Operation) -> Operation | None:
    """The division by max|x| before a square: what coremltools 9.0 makes of rms_norm."""
    scaled = f.producer(f.input(square, "x"))
    if scaled is None or scaled.type != "real_div":
        return None
    largest = f.producer(f.input(scaled, "y"))
    inner = f.producer(f.input(largest, "x")) if largest and largest.type == "reduce_max" else None
    same = inner is not None and inner.type == "abs" and f.input(inner, "x") == f.input(scaled, "x")
    return scaled if same else None


@rule(
    "rms-norm", "error", "RMSNorm as coremltools 9.0 lowers it: the effective epsilon scales with max|x|^2",
    "apple/coremltools#2821, PR #2822; measured: 1.3 % at magnitude 0.02, NaN on "
    "rows of zeros",
)  # fmt: skip
def rms_norm(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations("square", "mul", "pow"):
        if _is_square(f, op) and (scaled := _rescaled(f, op)) is not None:
            yield at(f, op, f"{op.type} of {scaled.output_name!r} = x / max|x|, without eps / max|x|^2 later")


@rule(
    "fp16-logsumexp", "warning", "log-sum-exp or log-softmax in fp16",
    "apple/coremltools#2690: a cliff at log(65504 / C); apple/coremltools#2728: log_softmax returns -inf",
)  # fmt: skip
def logsumexp(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations("reduce_log_sum_exp", "log"):
        inner = f.producer(f.input(op, "x"))
        cliff = op.type != "log" or (inner is not None and inner.type == "softmax")
        if cliff and op.outputs[0].dtype == "fp16":
            yield at(f, op, f"{op.type} of {f.type_of(f.input(op, 'x'))}")


# Operators: the tables of ane_ops.py


@rule("op-off-ane", "error", "an operator that does not run on the ANE", "per operator, in each finding")
def op_off_ane(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations(*ane_ops.OFF_ANE):
        yield at(f, op, f"{op.type}: {ane_ops.OFF_ANE[op.type]}")


@rule(
    "op-disputed", "warning", "an operator that sources place differently", "per operator", "in each finding",
)  # fmt: skip
def op_disputed(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations(*ane_ops.DISPUTED):
        yield at(f, op, f"{op.type}: {ane_ops.DISPUTED[op.type]}")


@rule(
    "op-one-source", "warning", "an operator without a hardware path, says one source",
    f"{ane_ops.ANEFORGE}, direct path",
)  # fmt: skip
def op_one_source(view: View, limits: Limits) -> Iterator[Hit]:
    for f in view.functions:
        for op in (*f.operations, *f.constexprs):
            if op.type in ane_ops.ONE_SOURCE or op.type == "constexpr_cast":
                yield at(f, op, f"{op.type} is 'Unsupported' on M1 to M5")


@rule("op-family", "warning", "an operator that needs a newer chip", ane_ops.ANEFORGE)
def op_family(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations(*ane_ops.FAMILY):
        yield at(f, op, f"{op.type} is native from {ane_ops.FAMILY[op.type]} on")


@rule(
    "unlisted-op", "info", "an operator about which nothing is publicly known",
    "absent from the tables of ane_ops.py",
)  # fmt: skip
def unlisted_op(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations():
        if op.type not in ane_ops.LISTED:
            yield at(f, op, op.type)


@rule(
    "topk-consumer", "warning", "an operation on topk's results follows it to the CPU",
    "roboflow/rf-detr#1495",
)  # fmt: skip
def topk_consumer(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations("topk"):
        for out in op.outputs:
            for user in f.consumers.get(out.name, []):
                yield at(f, user, f"{user.type} reads {out.name!r} of topk {op.output_name!r}")


@rule(
    "depthwise", "warning", "a depthwise convolution over 1024 channels or more",
    f"{CML_LLM}LFM2_CONVERSION_FINDINGS.md",
)  # fmt: skip
def depthwise(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations("conv"):
        x, groups = f.type_of(f.input(op, "x")), f.constant(op, "groups")
        channels = (x.shape[1] or 0) if x and len(x.shape) > 1 else 0
        if groups is not None and int(groups) == channels >= limits.depthwise_channels:
            yield at(f, op, f"groups = channels = {channels}")


@rule(
    "sdpa", "warning", "fused attention instead of a matmul per head",
    f"{APPLE_RULES}: no fused SDPA path; pytorch/executorch#15833: rank 5 gives wrong numbers on iOS 26; "
    "mechramc/Orion#6: masks are ignored on the direct path; apple/coremltools#2650: wrong on GPU from "
    "batch 10", f"{ane_ops.ANEFORGE}: native from the M1 on",
)  # fmt: skip
def sdpa(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations("scaled_dot_product_attention"):
        yield at(f, op, f"query {f.type_of(f.input(op, 'query'))}")


# State

STATEFUL = "apple.github.io/coremltools/docs-guides/source/stateful-models.html"


def _states(view: View) -> Iterator[tuple[FunctionView, str, str, tuple[int | None, ...]]]:
    for f in view.functions:
        yield from ((f, s.name, s.type.dtype, s.type.shape) for s in f.function.states)


@rule("state-opset", "error", "a state before iOS 18", STATEFUL)
def state_opset(view: View, limits: Limits) -> Iterator[Hit]:
    for f, name, _, _ in _states(view):
        if view.program.specification_version < 9:
            version = view.program.specification_version
            yield Hit(f"{name!r} in specification version {version} (iOS 18 is 9)", f.name, None, name)


@rule("state-dtype", "error", "a state that is not fp16", STATEFUL)
def state_dtype(view: View, limits: Limits) -> Iterator[Hit]:
    for f, name, kind, shape in _states(view):
        if kind != "fp16":
            yield Hit(f"{name!r} is {kind}{list(shape)}", f.name, None, name)


@rule(
    "state-dims", "error", "a state whose last axis is not a multiple of 32",
    "apple/coremltools#2631: width 270 fails on the ANE, 256 works (other axes: layers and heads are no "
    f"multiples in {CML_LLM}MLSTATE_PATTERN.md, and run)",
)  # fmt: skip
def state_dims(view: View, limits: Limits) -> Iterator[Hit]:
    for f, name, kind, shape in _states(view):
        if not shape or (shape[-1] or 1) % limits.state_multiple:
            yield Hit(f"{name!r} is {kind}{list(shape)}", f.name, None, name)


def _state_count_rule(id: str, severity: Severity, title: str, conflict: str, low: int, high: int) -> None:
    def check(view: View, limits: Limits) -> Iterator[Hit]:
        for f in view.functions:
            names = [s.name for s in f.function.states]
            if low <= len(names) <= high:
                yield Hit(f"{len(names)} states: {', '.join(names)}", f.name, None, names[0])

    source = f"{CML_LLM}MLSTATE_PATTERN.md: one is safe, two sometimes, three fail with 0x1d"
    rule(id, severity, title, source, conflict)(check)


_state_count_rule(
    "state-two", "warning", "two states in a function", f"{CML_LLM}LFM2 work: fails already at two", 2, 2,
)  # fmt: skip
_state_count_rule("state-many", "error", "three states or more in a function", "", 3, 1 << 30)


@rule(
    "state-transpose", "warning", "a state update that comes out of a transpose: may not load",
    "apple/coremltools#2275, #2278: view + transpose before the write",
)  # fmt: skip
def state_transpose(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations("slice_update", "write_state"):
        update = f.input(op, "update" if op.type == "slice_update" else "data")
        if op.type == "slice_update" and not _leads_to(f, op, "write_state"):
            continue
        source = f.producer(update)
        while source is not None and source.type in ("expand_dims", "squeeze", "reshape", "cast"):
            source = f.producer(f.input(source, "x"))
        if source is not None and source.type == "transpose":
            yield at(f, op, f"{op.type} of {update!r}, from transpose {source.output_name!r}")


def _leads_to(f: FunctionView, op: Operation, kind: str) -> bool:
    """Whether an operation of `kind` reads `op`'s output, through other updates."""
    users = f.consumers.get(op.output_name, [])
    return any(u.type == kind or (u.type == op.type and _leads_to(f, u, kind)) for u in users)


@rule(
    "state-io", "info", "the cache is a state, where Apple's rules for the ANE pass it as input and output",
    f"{APPLE_RULES}: KV cache, read-only pattern; apple/coremltools#2553, #2325: error -14 with states on "
    "the ANE", f"{CML_LLM}MLSTATE_PATTERN.md: one state runs on an iPhone 17 Pro's ANE",
)  # fmt: skip
def state_io(view: View, limits: Limits) -> Iterator[Hit]:
    for f, name, kind, shape in _states(view):
        yield Hit(f"{name!r} is {kind}{list(shape)}", f.name, None, name)


# Compressed weights


@rule(
    "shift-scale-offset", "error", "a scale's offset whose type is not that of the data",
    "developer.apple.com/forums/thread/759608: a floating offset leaves the ANE",
)  # fmt: skip
def shift_scale_offset(view: View, limits: Limits) -> Iterator[Hit]:
    for prefix, parameter in (("blockwise_shift", "data"), ("sparse_blockwise_shift", "nonzero_data")):
        for f, op in view.constexprs(prefix):
            data, offset = f.type_of(f.input(op, parameter)), f.type_of(f.input(op, "offset"))
            if data and offset and data.dtype != offset.dtype:
                yield at(f, op, f"offset is {offset.dtype}, data is {data.dtype}")


@rule(
    "scale-per-block", "warning", "weights scaled per block instead of per channel",
    f"{APPLE_GUIDANCE}: int8 or int4 per channel on iOS; alvaro-videla.com/ane-book ch. 3: int4 per block "
    "goes silently to the CPU on small shards; ExecuTorch: the ANE requires channelwise",
    f"{APPLE_GUIDANCE} recommends int4 per block on macOS; {ane_ops.ANEFORGE}: blocks stream from A15, "
    "fold before",
)  # fmt: skip
def scale_per_block(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.constexprs("blockwise_shift_scale"):
        data, scale = f.type_of(f.input(op, "data")), f.type_of(f.input(op, "scale"))
        if data is None or scale is None:
            continue
        axes = [(n, d) for n, d in zip(scale.shape, data.shape) if n != 1]
        if len(axes) > 1 or any(n != d for n, d in axes):
            yield at(f, op, f"{data} with scales {list(scale.shape)}")


@rule(
    "lut-int8", "warning", "a lookup table with 8-bit entries",
    f"{CML_LLM}SESSION_2026_04_26_ROUND8_INT8_LUT_PROBE.md: residency fell from 92.9 to 86.7 %",
)  # fmt: skip
def lut_int8(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.constexprs("lut_to"):
        table = f.input(op, "lut")
        maker = f.function.producers.get(table) if isinstance(table, str) else None
        type_ = f.type_of(table)
        scaled = maker is not None and maker.type == "constexpr_blockwise_shift_scale"
        if scaled or (type_ is not None and type_.dtype in ("int8", "uint8")):
            yield at(f, op, f"its table is {type_}" + (", itself scaled from 8 bits" if scaled else ""))


@rule(
    "sparse-lut", "warning", "sparse weights with a lookup table",
    f"{CML_LLM}SESSION_2026_04_27_ROUND8_JOINT_SPARSE_PROBE.md",
)  # fmt: skip
def sparse_lut(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.constexprs("lut_to_sparse"):
        yield at(f, op, f"{op.outputs[-1].type}")


@rule(
    "w8a8", "warning", "activations quantised to 8 bits",
    f"{CML_LLM}: ANECCompile failed on an iPhone 17 Pro",
    "Apple's coremltools guide claims a gain on A17 Pro and M4",
)  # fmt: skip
def w8a8(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.operations("quantize", "dequantize"):
        yield at(f, op, f"{op.type} makes {op.outputs[0].type}")


@rule(
    "low-bit", "info", "weights of 2 or 3 bits: gibberish unless trained for it",
    f"{CML_LLM}: W2 and W3 need QAT",
)  # fmt: skip
def low_bit(view: View, limits: Limits) -> Iterator[Hit]:
    for f, op in view.constexprs("lut_to"):
        table = f.type_of(f.input(op, "lut"))
        entries = 0 if table is None else (table.shape[0] if len(table.shape) == 1 else table.shape[-2]) or 0
        if 0 < entries <= 8:
            yield at(f, op, f"a table of {entries} entries")
