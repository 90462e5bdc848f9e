"""ONNX operators as Core ML's MIL: elementwise arithmetic, comparisons, activations and casts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var, types

from distill.convert.onnx_graph import onnx
from distill.convert.onnx_ops import Node, Value, cast, expand, lowers, same_type, shape_of
from distill.errors import InputError

_SAME_NAME = ("Abs", "Atan", "Ceil", "Cos", "Erf", "Exp", "Floor", "Relu", "Round", "Sigmoid", "Sign", "Sin")
_UNARY = {name: name.lower() for name in (*_SAME_NAME, "Softplus", "Sqrt", "Tan", "Tanh")} | {"Not": "logical_not"}
_BINARY = {
    "Add": "add",
    "And": "logical_and",
    "Greater": "greater",
    "GreaterOrEqual": "greater_equal",
    "Less": "less",
    "LessOrEqual": "less_equal",
    "Or": "logical_or",
    "Sub": "sub",
    "Xor": "logical_xor",
}


@lowers(*_UNARY)
def _unary(n: Node) -> Value:
    return getattr(mb, _UNARY[n.proto.op_type])(x=n.var(0))


@lowers(*_BINARY)
def _binary(n: Node) -> Value:
    return getattr(mb, _BINARY[n.proto.op_type])(x=n.var(0), y=n.var(1))


@lowers("Equal")
def _equal(n: Node) -> Value:
    x, y = n.var(0), n.var(1)
    if x.dtype == types.bool:  # MIL compares numbers
        x, y = cast(x, "int32"), cast(y, "int32")
    return mb.equal(x=x, y=y)


@lowers("Sum", "Min", "Max")
def _variadic(n: Node) -> Value:
    op = {"Sum": mb.add, "Min": mb.minimum, "Max": mb.maximum}[n.proto.op_type]
    return functools.reduce(lambda x, y: op(x=x, y=y), n.vars())


@lowers("Neg")
def _neg(n: Node) -> Value:
    return mb.mul(x=n.var(0), y=same_type(-1, n.var(0)))


@lowers("Log")
def _log(n: Node) -> Value:
    return mb.log(x=n.var(0), epsilon=same_type(0, n.var(0)))


def rms_norm(x: Var, axes: Sequence[int], epsilon: float) -> Var:
    """x / sqrt(mean(x^2) + epsilon), as layer_norm of [x, -x]: its mean is zero and fp16 does not overflow.

    MIL's own rms_norm is wrong in coremltools 9.0 (#2821)."""
    rank, axis = x.rank, axes[-1]
    both = mb.concat(values=[x, mb.mul(x=x, y=same_type(-1, x))], axis=axis)
    normed = mb.layer_norm(x=both, axes=list(axes), epsilon=same_type(epsilon, x))
    return mb.slice_by_index(x=normed, begin=[0] * rank, end=list(shape_of(x)))


def _made_by(x: Var, op_type: str) -> Any:
    return x.op if x.op is not None and x.op.op_type == op_type else None


def _as_rms_norm(x: Var, factor: Var, root: str) -> Var | None:
    """x * rsqrt(mean(x * x) + epsilon), as exporters write RMSNorm: in fp16 its square overflows at 256."""
    outer = _made_by(factor, root)
    total = outer and _made_by(outer.x, "add")
    mean = total and _made_by(total.x, "reduce_mean")
    square = mean and _made_by(mean.x, "mul")
    if not square or square.x is not x or square.y is not x or not mean.keep_dims.val:
        return None
    axes = sorted(int(a) % x.rank for a in mean.axes.val)
    epsilon = total.y.val
    if epsilon is None or np.size(epsilon) != 1 or axes != list(range(axes[0], axes[0] + len(axes))):
        return None
    return rms_norm(x, axes, float(np.asarray(epsilon).item()))


def _reciprocal_of(x: Var) -> Var:
    """1/x; of a square root, MIL's rsqrt, which is what its layer-norm fusion looks for."""
    if x.op is not None and x.op.op_type == "sqrt":
        return mb.rsqrt(x=x.op.x, epsilon=same_type(0, x))
    return mb.real_div(x=same_type(1, x), y=x)


@lowers("Reciprocal")
def _reciprocal(n: Node) -> Value:
    return _reciprocal_of(n.var(0))


@lowers("Div")
def _div(n: Node) -> Value:
    """Integer division truncates towards zero; MIL's floor_div rounds down."""
    x, y = n.var(0), n.var(1)
    if x.dtype != types.int32:
        normed = _as_rms_norm(x, y, "sqrt")
        if normed is not None:
            return normed
        one = x.val is not None and np.size(x.val) == 1 and np.all(x.val == 1) and x.rank <= y.rank
        return _reciprocal_of(y) if one else mb.real_div(x=x, y=y)
    quotient = mb.floor_div(x=x, y=y)
    inexact = mb.not_equal(x=mb.mul(x=quotient, y=y), y=x)
    opposite = mb.logical_xor(x=mb.less(x=x, y=np.int32(0)), y=mb.less(x=y, y=np.int32(0)))
    return mb.add(x=quotient, y=cast(mb.logical_and(x=inexact, y=opposite), "int32"))


@lowers("Mul")
def _mul(n: Node) -> Value:
    x, y = n.var(0), n.var(1)
    for a, b in ((x, y), (y, x)):
        normed = _as_rms_norm(a, b, "rsqrt")
        if normed is not None:
            return normed
    return mb.mul(x=x, y=y)


@lowers("Mod")
def _mod(n: Node) -> Value:
    """fmod=0: the sign of the divisor, as MIL's mod; fmod=1: the sign of the dividend, as C."""
    x, y = n.var(0), n.var(1)
    if not n.attributes.get("fmod", 0):
        return mb.mod(x=x, y=y)
    if x.dtype == types.int32:
        raise InputError(f"{n}: fmod=1 on integers has no lowering")
    return mb.mul(x=mb.sign(x=x), y=mb.mod(x=mb.abs(x=x), y=mb.abs(x=y)))


@lowers("Pow")
def _pow(n: Node) -> Value:
    """The exponent may have another type; the result has the type of the base."""
    x, y = n.var(0), n.var(1)
    if y.val is not None and np.size(y.val) == 1 and y.rank <= x.rank:
        exponent = float(np.asarray(y.val).item())
        if exponent == 2:
            return mb.mul(x=x, y=x)
        if exponent == 0.5 and x.dtype != types.int32:
            return mb.sqrt(x=x)
    return mb.pow(x=x, y=cast(y, types.builtin_to_string(x.dtype)))


@lowers("IsNaN")
def _isnan(n: Node) -> Value:
    return mb.not_equal(x=n.var(0), y=n.var(0))


@lowers("Where")
def _where(n: Node) -> Value:
    """coremltools infers the shape of select from a and b alone, so one of them is made full."""
    cond, a, b = n.vars()
    full = np.broadcast_shapes(*(shape_of(v) for v in (cond, a, b)))
    if np.broadcast_shapes(shape_of(a), shape_of(b)) != full:
        if b.val is not None:
            b = expand(b, full)
        else:
            a = expand(a, full)
    return mb.select(cond=cond, a=a, b=b)


@lowers("Clip")
def _clip(n: Node) -> Value:
    x = n.var(0)
    if n.has(1):
        x = mb.maximum(x=x, y=n.var(1))
    return mb.minimum(x=x, y=n.var(2)) if n.has(2) else x


@lowers("Gelu")
def _gelu(n: Node) -> Value:
    tanh = n.attributes.get("approximate", b"none") == b"tanh"
    return mb.gelu(x=n.var(0), mode="TANH_APPROXIMATION" if tanh else "EXACT")


@lowers("Swish", "QuickGelu")
def _swish(n: Node) -> Value:
    """x * sigmoid(alpha * x)."""
    x = n.var(0)
    alpha = float(n.attributes.get("alpha", 1.0 if n.proto.op_type == "Swish" else 1.702))
    return mb.silu(x=x) if alpha == 1 else mb.mul(x=x, y=mb.sigmoid(x=mb.mul(x=x, y=same_type(alpha, x))))


@lowers("LeakyRelu", "Elu")
def _alpha_activation(n: Node) -> Value:
    leaky = n.proto.op_type == "LeakyRelu"
    op = mb.leaky_relu if leaky else mb.elu
    return op(x=n.var(0), alpha=same_type(n.attributes.get("alpha", 0.01 if leaky else 1.0), n.var(0)))


@lowers("HardSigmoid")
def _hard_sigmoid(n: Node) -> Value:
    x, alpha, beta = n.var(0), n.attributes.get("alpha", 0.2), n.attributes.get("beta", 0.5)
    return mb.sigmoid_hard(x=x, alpha=same_type(alpha, x), beta=same_type(beta, x))


_MIL_TYPES = {1: "fp32", 6: "int32", 7: "int32", 9: "bool", 10: "fp16", 11: "fp32", 16: "fp32"}


@lowers("Cast", "CastLike")
def _cast(n: Node) -> Value:
    """int64 computes as int32, double and bfloat16 as fp32."""
    if n.proto.op_type == "CastLike":
        return cast(n.var(0), types.builtin_to_string(n.var(1).dtype))
    to = int(n.attributes["to"])
    if to not in _MIL_TYPES:
        raise InputError(f"{n}: Core ML has no arithmetic in {onnx.TensorProto.DataType.Name(to)}")
    return cast(n.var(0), _MIL_TYPES[to])
