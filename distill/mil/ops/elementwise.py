"""Elementwise operators: unary, binary, comparison, logic, cast, select."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.values import to_dtype


@op("identity", exact=True)
def identity(x: Tensor) -> Tensor:
    return x


@op("abs", fresh=True)
def abs_(x: Tensor) -> Tensor:
    return x.abs()


@op("acos", fresh=True)
def acos(x: Tensor) -> Tensor:
    return x.acos()


@op("asin", fresh=True)
def asin(x: Tensor) -> Tensor:
    return x.asin()


@op("atan", fresh=True)
def atan(x: Tensor) -> Tensor:
    return x.atan()


@op("atanh", fresh=True)
def atanh(x: Tensor) -> Tensor:
    return x.atanh()


@op("ceil", fresh=True)
def ceil(x: Tensor) -> Tensor:
    return x.ceil()


@op("clip", fresh=True)
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


@op("cos", fresh=True)
def cos(x: Tensor) -> Tensor:
    return x.cos()


@op("cosh", fresh=True)
def cosh(x: Tensor) -> Tensor:
    return x.cosh()


@op("erf", fresh=True)
def erf(x: Tensor) -> Tensor:
    return x.erf()


@op("exp", fresh=True)
def exp(x: Tensor) -> Tensor:
    return x.exp()


@op("exp2", fresh=True)
def exp2(x: Tensor) -> Tensor:
    return x.float().exp2()


@op("floor", fresh=True)
def floor(x: Tensor) -> Tensor:
    return x.floor()


@op("inverse", fresh=True)
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return (x + epsilon).reciprocal()


@op("log", fresh=True)
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return (x + epsilon).log()


@op("logical_not", fresh=True)
def logical_not(x: Tensor) -> Tensor:
    return x.logical_not()


@op("round", fresh=True)
def round_(x: Tensor) -> Tensor:
    return x.round()  # half to even: "0.5 is rounded to 0"


@op("rsqrt", fresh=True)
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return (x + epsilon).rsqrt()


@op("sign", fresh=True)
def sign(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, x.sign()) if x.is_floating_point() else x.sign()


@op("sin", fresh=True)
def sin(x: Tensor) -> Tensor:
    return x.sin()


@op("sinh", fresh=True)
def sinh(x: Tensor) -> Tensor:
    return x.sinh()


@op("sqrt", fresh=True)
def sqrt(x: Tensor) -> Tensor:
    return x.sqrt()


@op("square", fresh=True)
def square(x: Tensor) -> Tensor:
    return x * x


@op("tan", fresh=True)
def tan(x: Tensor) -> Tensor:
    return x.tan()


@op("tanh", fresh=True)
def tanh(x: Tensor) -> Tensor:
    return x.tanh()


@op("threshold", fresh=True)
def threshold(x: Tensor, alpha: float) -> Tensor:
    return x.clamp(min=alpha)


@op("add", fresh=True)
def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@op("sub", fresh=True)
def sub(x: Tensor, y: Tensor) -> Tensor:
    return x - y


@op("mul", fresh=True)
def mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


@op("real_div", fresh=True)
def real_div(x: Tensor, y: Tensor) -> Tensor:
    if x.is_floating_point():
        return x / y
    minus = y == -1  # the smallest integer divided by -1 is a processor trap
    return torch.where(minus, -x, torch.div(x, torch.where(minus, 1, y), rounding_mode="trunc"))


@op("floor_div", fresh=True)
def floor_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")


@op("mod", fresh=True)
def mod(x: Tensor, y: Tensor) -> Tensor:
    return torch.remainder(x, y)  # the sign of the divisor, as Python's %


@op("pow", fresh=True)
def pow_(x: Tensor, y: Tensor) -> Tensor:
    """Integers wrap around, as in a product; a negative power of one truncates."""
    if x.is_floating_point() or y.is_floating_point():
        return torch.pow(x, y)
    base, exponent = x.long(), y.long()
    power = torch.pow(base, exponent.abs())
    return torch.where(exponent < 0, torch.where(base.abs() == 1, power, 0), power)


@op("maximum", fresh=True)
def maximum(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y)


@op("minimum", fresh=True)
def minimum(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(x, y)


@op("equal", fresh=True)
def equal(x: Tensor, y: Tensor) -> Tensor:
    return x == y


@op("not_equal", fresh=True)
def not_equal(x: Tensor, y: Tensor) -> Tensor:
    return x != y


@op("greater", fresh=True)
def greater(x: Tensor, y: Tensor) -> Tensor:
    return x > y


@op("greater_equal", fresh=True)
def greater_equal(x: Tensor, y: Tensor) -> Tensor:
    return x >= y


@op("less", fresh=True)
def less(x: Tensor, y: Tensor) -> Tensor:
    return x < y


@op("less_equal", fresh=True)
def less_equal(x: Tensor, y: Tensor) -> Tensor:
    return x <= y


@op("logical_and", fresh=True)
def logical_and(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_and(x, y)


@op("logical_or", fresh=True)
def logical_or(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_or(x, y)


@op("logical_xor", fresh=True)
def logical_xor(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_xor(x, y)


@op("select", exact=True)
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a` where `cond`, else `b`; all three broadcast."""
    return torch.where(cond, a, b)


@op("cast")
def cast(x: Tensor, dtype: str) -> Tensor:
    """Floats truncate towards zero into integers; fp16 rounds to nearest even and overflows to infinity."""
    return to_dtype(x, dtype)
