"""Activation functions. Formulas as MIL's documentation gives them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.run import Run


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """A vector over axis 1, shaped to broadcast against `x`."""
    return values.reshape([-1 if d == 1 else 1 for d in range(x.dim())])


@op("relu", fresh=True)
def relu(x: Tensor) -> Tensor:
    return x.relu()


@op("relu6", fresh=True)
def relu6(x: Tensor) -> Tensor:
    return x.clamp(0, 6)


@op("clamped_relu", fresh=True)
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


@op("thresholded_relu", fresh=True)
def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= alpha, x, 0.0)


@op("leaky_relu", fresh=True)
def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


@op("prelu", fresh=True)
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, per_channel(alpha, x) * x)


@op("elu", fresh=True)
def elu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x))


@op("gelu", fresh=True)
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "EXACT":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"unknown mode {mode!r}")


@op("sigmoid", fresh=True)
def sigmoid(x: Tensor) -> Tensor:
    return x.sigmoid()


@op("sigmoid_hard", fresh=True)
def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


@op("silu", fresh=True)
def silu(x: Tensor) -> Tensor:
    return F.silu(x)


@op("softplus", fresh=True)
def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


@op("softplus_parametric", fresh=True)
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return per_channel(alpha, x) * softplus(per_channel(beta, x) * x)


@op("softsign", fresh=True)
def softsign(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


@op("scaled_tanh", fresh=True)
def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


@op("linear_activation", fresh=True)
def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


@op("softmax", fresh=True)
def softmax(run: Run, x: Tensor, axis: int = -1) -> Tensor:
    return run.policy.softmax(x, axis)
