"""ONNX operators as Core ML's MIL: products, norms, reductions, indexing and convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var, types

from distill.convert.onnx_ops import (
    Node,
    Value,
    cast,
    lowers,
    require_modest,
    reshape,
    same_type,
    shape_of,
)
from distill.convert.onnx_ops_math import rms_norm
from distill.errors import InputError


def _weight_of(n: Node, index: int, transpose: bool) -> Var:
    """The const of a weight as (out, in), which is what `linear` takes; one for all users of the tensor."""
    if not transpose:
        return n.var(index)
    key = f"{n.proto.input[index]}.T"
    if key not in n.constants:
        n.constants[key] = mb.const(val=np.ascontiguousarray(n.constant(index).T), name=key)
    return n.constants[key]


def _is_weight(n: Node, index: int) -> bool:
    value = n.inputs[index]
    return isinstance(value, np.ndarray) and value.ndim == 2


# --- products ------------------------------------------------------------------------------------------


@lowers("MatMul")
def _matmul(n: Node) -> Value:
    """numpy.matmul; with a constant matrix on the right it is MIL's linear, the form that compresses best."""
    x = n.var(0)
    if _is_weight(n, 1) and 1 <= x.rank <= 3 and x.val is None:
        return mb.linear(x=x, weight=_weight_of(n, 1, transpose=True))
    y = n.var(1)
    left, right = x.rank == 1, y.rank == 1
    if left:
        x = mb.expand_dims(x=x, axes=[0])
    if right:
        y = mb.expand_dims(x=y, axes=[1])
    product = mb.matmul(x=x, y=y)
    shape = list(shape_of(product))
    if right:
        del shape[-1]
    if left:
        del shape[-1 if right else -2]
    return reshape(product, shape)


@lowers("Gemm")
def _gemm(n: Node) -> Value:
    """alpha * A' B' + beta * C."""
    a = n.attributes
    alpha, beta = float(a.get("alpha", 1.0)), float(a.get("beta", 1.0))
    bias = n.inputs[2] if n.has(2) else None
    x = mb.transpose(x=n.var(0), perm=[1, 0]) if a.get("transA", 0) else n.var(0)
    vector = bias is None or (isinstance(bias, np.ndarray) and bias.ndim == 1 and bias.size > 1)
    if _is_weight(n, 1) and alpha == beta == 1 and vector and x.val is None:
        extra: dict[str, Var] = {} if bias is None else {"bias": n.var(2)}
        return mb.linear(x=x, weight=_weight_of(n, 1, transpose=not a.get("transB", 0)), **extra)
    product = mb.matmul(x=x, y=n.var(1), transpose_y=bool(a.get("transB", 0)))
    if alpha != 1:
        product = mb.mul(x=product, y=same_type(alpha, product))
    if bias is None or beta == 0:
        return product
    c = n.var(2) if beta == 1 else mb.mul(x=n.var(2), y=same_type(beta, product))
    return mb.add(x=product, y=c)


@lowers("Conv")
def _conv(n: Node) -> Value:
    a, x, weight = n.attributes, n.var(0), n.var(1)
    spatial = x.rank - 2
    begin_end: Any = a.get("pads", [0] * (2 * spatial))
    mode = a.get("auto_pad", b"NOTSET")
    extra: dict[str, Any] = {"bias": n.var(2)} if n.has(2) else {}
    if mode in (b"NOTSET", b"VALID"):
        pads = [0] * (2 * spatial) if mode == b"VALID" else begin_end
        extra["pad_type"] = "custom"
        extra["pad"] = [int(pads[i + end]) for i in range(spatial) for end in (0, spatial)]
    else:
        extra["pad_type"] = {b"SAME_UPPER": "same", b"SAME_LOWER": "same_lower"}[mode]
    return mb.conv(
        x=x,
        weight=weight,
        strides=list(a.get("strides", [1] * spatial)),
        dilations=list(a.get("dilations", [1] * spatial)),
        groups=int(a.get("group", 1)),
        **extra,
    )


# --- norms and softmax ---------------------------------------------------------------------------------


@lowers("Softmax")
def _softmax(n: Node) -> Value:
    return mb.softmax(x=n.var(0), axis=n.axis(-1, n.var(0).rank))


@lowers("LogSoftmax")
def _log_softmax(n: Node) -> Value:
    """By way of x - max: log(softmax(x)) is -inf for small probabilities (coremltools #2728)."""
    x = n.var(0)
    axes = [n.axis(-1, x.rank)]
    shifted = mb.sub(x=x, y=mb.reduce_max(x=x, axes=axes, keep_dims=True))
    total = mb.reduce_sum(x=mb.exp(x=shifted), axes=axes, keep_dims=True)
    return mb.sub(x=shifted, y=mb.log(x=total, epsilon=same_type(0, x)))


def _only_first_output(n: Node) -> None:
    if any(n.proto.output[1:]):
        raise InputError(f"{n}: only its first output has a lowering, not {list(n.proto.output[1:])}")


@lowers("LayerNormalization")
def _layer_norm(n: Node) -> Value:
    """Normalises over axis and all later ones; Scale and B have the shape of those axes."""
    _only_first_output(n)
    x = n.var(0)
    axes = list(range(n.axis(-1, x.rank), x.rank))
    epsilon = same_type(n.attributes.get("epsilon", 1e-5), x)
    inner = shape_of(x)[axes[0] :]
    affine = [v for i, v in enumerate(n.inputs[1:], 1) if n.has(i)]
    if all(isinstance(v, np.ndarray) and v.shape == inner for v in affine):
        extra: dict[str, Var] = {"beta": n.var(2)} if n.has(2) else {}
        return mb.layer_norm(x=x, axes=axes, epsilon=epsilon, gamma=n.var(1), **extra)
    y = mb.mul(x=mb.layer_norm(x=x, axes=axes, epsilon=epsilon), y=n.var(1))
    return mb.add(x=y, y=n.var(2)) if n.has(2) else y


@lowers("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(n: Node) -> Value:
    _only_first_output(n)
    x = n.var(0)
    axes = list(range(n.axis(-1, x.rank), x.rank))
    return mb.mul(x=rms_norm(x, axes, float(n.attributes.get("epsilon", 1e-5))), y=n.var(1))


# --- reductions ----------------------------------------------------------------------------------------

_REDUCTIONS = {
    "ReduceMean": mb.reduce_mean,
    "ReduceSum": mb.reduce_sum,
    "ReduceMax": mb.reduce_max,
    "ReduceMin": mb.reduce_min,
    "ReduceProd": mb.reduce_prod,
    "ReduceL1": mb.reduce_l1_norm,
    "ReduceL2": mb.reduce_l2_norm,
    "ReduceSumSquare": mb.reduce_sum_square,
    "ReduceLogSumExp": mb.reduce_log_sum_exp,
}


@lowers(*_REDUCTIONS)
def _reduce(n: Node) -> Value:
    """axes is an attribute before opset 18 (ReduceSum: 13) and an input since; none means all of them."""
    x, axes = n.var(0), n.ints(1, "axes")
    if not axes:
        if n.attributes.get("noop_with_empty_axes", 0):
            raise InputError(f"{n}: noop_with_empty_axes without axes has no lowering")
        axes = list(range(x.rank))
    axes = sorted(a % x.rank for a in axes) if x.rank else []
    return _REDUCTIONS[n.proto.op_type](x=x, axes=axes, keep_dims=bool(n.attributes.get("keepdims", 1)))


@lowers("ArgMax", "ArgMin")
def _arg_max(n: Node) -> Value:
    if n.attributes.get("select_last_index", 0):
        raise InputError(f"{n}: select_last_index has no lowering; Core ML gives the first")
    op = mb.reduce_argmax if n.proto.op_type == "ArgMax" else mb.reduce_argmin
    x = n.var(0)
    return op(x=x, axis=n.axis(0, x.rank), keep_dims=bool(n.attributes.get("keepdims", 1)))


@lowers("CumSum")
def _cumsum(n: Node) -> Value:
    x, flag = n.var(0), n.attributes.get
    axis = int(n.known(1).item()) % x.rank
    return mb.cumsum(x=x, axis=axis, exclusive=bool(flag("exclusive", 0)), reverse=bool(flag("reverse", 0)))


@lowers("TopK")
def _topk(n: Node) -> Value | Sequence[Value]:
    x, k = n.var(0), int(n.known(1).item())
    largest = bool(n.attributes.get("largest", 1))
    return mb.topk(x=x, k=k, axis=n.axis(-1, x.rank), ascending=not largest)


# --- indexing ------------------------------------------------------------------------------------------


def _wrapped(n: Node, index: int, size: np.ndarray | int) -> Var:
    """Indices with ONNX's negative ones made positive, which Core ML needs since iOS 17."""
    value = n.inputs[index]
    if isinstance(value, np.ndarray):
        if np.all(value >= 0):
            return n.var(index)
        return mb.const(val=np.where(value < 0, value + size, value).astype(np.int32)[()])
    x = n.var(index)
    moved = mb.add(x=x, y=np.asarray(size, np.int32)[()])
    return mb.select(cond=mb.greater_equal(x=x, y=np.int32(0)), a=x, b=moved)


@lowers("Gather")
def _gather(n: Node) -> Value:
    """coremltools guards run-time indices of gather and gather_nd against negatives; of no other op."""
    x = n.var(0)
    axis = n.axis(0, x.rank)
    fixed = isinstance(n.inputs[1], np.ndarray)
    indices = _wrapped(n, 1, shape_of(x)[axis]) if fixed else n.var(1)
    if x.dtype == types.bool:
        return cast(mb.gather(x=cast(x, "int32"), indices=indices, axis=axis), "bool")
    return mb.gather(x=x, indices=indices, axis=axis)


@lowers("GatherElements")
def _gather_elements(n: Node) -> Value:
    """MIL's gather_along_axis; other axes may be longer in data than in indices, and are cut first."""
    x = n.var(0)
    axis = n.axis(0, x.rank)
    indices = _wrapped(n, 1, shape_of(x)[axis])
    want = [d if i == axis else shape_of(indices)[i] for i, d in enumerate(shape_of(x))]
    if tuple(want) != shape_of(x):
        x = mb.slice_by_index(x=x, begin=[0] * x.rank, end=want)
    return mb.gather_along_axis(x=x, indices=indices, axis=axis)


@lowers("GatherND")
def _gather_nd(n: Node) -> Value:
    x, batch = n.var(0), int(n.attributes.get("batch_dims", 0))
    value = n.inputs[1]
    depth = shape_of(n.var(1))[-1]
    sizes = np.array(shape_of(x)[batch : batch + depth])
    indices = _wrapped(n, 1, sizes) if isinstance(value, np.ndarray) or batch else n.var(1)
    return mb.gather_nd(x=x, indices=indices, batch_dims=batch)


_SCATTER_MODES = {b"none": "update", b"add": "add", b"mul": "mul", b"max": "max", b"min": "min"}


@lowers("ScatterND")
def _scatter_nd(n: Node) -> Value:
    x, mode = n.var(0), _SCATTER_MODES[n.attributes.get("reduction", b"none")]
    depth = shape_of(n.var(1))[-1]
    indices = _wrapped(n, 1, np.array(shape_of(x)[:depth]))
    return mb.scatter_nd(data=x, indices=indices, updates=n.var(2), mode=mode)


@lowers("ScatterElements")
def _scatter_elements(n: Node) -> Value:
    x, mode = n.var(0), _SCATTER_MODES[n.attributes.get("reduction", b"none")]
    axis = n.axis(0, x.rank)
    indices = _wrapped(n, 1, shape_of(x)[axis])
    return mb.scatter_along_axis(data=x, indices=indices, updates=n.var(2), axis=axis, mode=mode)


def _clamped(start: int, end: int, step: int, size: int) -> tuple[int, int]:
    """Slice: starts and ends count from the end when negative and are clamped to the tensor."""
    low, high = (0, size) if step > 0 else (-1, size - 1)
    start, end = (i + size if i < 0 else i for i in (start, end))
    return min(max(start, 0), high), min(max(end, low), high)


@lowers("Slice")
def _slice(n: Node) -> Value:
    x = n.var(0)
    starts, ends = n.ints(1) or [], n.ints(2) or []
    axes = n.ints(3) or list(range(len(starts)))
    steps = n.ints(4) or [1] * len(starts)
    begin, end, stride, open_end = [0] * x.rank, list(shape_of(x)), [1] * x.rank, [False] * x.rank
    for start, stop, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= x.rank
        begin[axis], end[axis] = _clamped(start, stop, step, shape_of(x)[axis])
        stride[axis], open_end[axis] = step, end[axis] < 0
        if (end[axis] - begin[axis]) * step <= 0:
            raise InputError(f"{n}: the slice {start}:{stop}:{step} of axis {axis} is empty")
    if begin == [0] * x.rank and tuple(end) == shape_of(x) and stride == [1] * x.rank:
        return x
    return mb.slice_by_index(x=x, begin=begin, end=end, stride=stride, end_mask=open_end)


@lowers("Trilu")
def _trilu(n: Node) -> Value:
    """Keeps the upper (default) or lower triangle of the last two axes, the diagonal shifted by k."""
    x, k = n.var(0), int(n.known(1).item()) if n.has(1) else 0
    require_modest(shape_of(x)[-2:], n)
    ones = np.ones(shape_of(x)[-2:], bool)
    mask = np.triu(ones, k) if n.attributes.get("upper", 1) else np.tril(ones, k)
    if x.dtype == types.bool:
        return mb.logical_and(x=x, y=mask)
    return mb.select(cond=mask, a=x, b=same_type(0, x))


@lowers("Pad")
def _pad(n: Node) -> Value:
    x, pads = n.var(0), n.ints(1) or []
    axes = [a % x.rank for a in n.ints(3) or range(x.rank)]
    full = np.zeros((x.rank, 2), np.int32)
    for i, axis in enumerate(axes):
        full[axis] = pads[i], pads[i + len(axes)]
    modes = {b"constant": "constant", b"reflect": "reflect", b"edge": "replicate"}
    mode = modes.get(n.attributes.get("mode", b"constant"))
    if mode is None or (full < 0).any():
        raise InputError(f"{n}: {'negative pads' if mode else 'mode wrap'} has no lowering")
    if x.val is not None:
        require_modest([d + int(pad.sum()) for d, pad in zip(shape_of(x), full)], n)
    value = same_type(n.known(2).item() if n.has(2) else 0, x)
    return mb.pad(x=x, pad=full.reshape(-1), mode=mode, constant_val=value)
