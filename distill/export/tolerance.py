"""The error that fp16 arithmetic itself must be allowed, derived for the model at hand.

A priori: every op rounds its result, a relative error uniform in [-u, u], u = 2**-11, of variance u^2/3. About 32
roundings (weights included) lie on a block's two branches and residual additions, 8 before and after the blocks; taken
as independent and none larger than the stream that they join, they leave the final hidden state with relative error
eps = u sqrt((32 L + 8) / 3), and an isotropic error of that norm moves a logit by eps |h| |w_v| / sqrt(D).

That leaves out how much this model amplifies an error. So the twin is run once more in PyTorch with the result of every
op rounded to fp16, and the largest ratio, over positions, of the error found to the error above is the model's `gain`.
Neither step runs Core ML or our executor: what they are judged by is derived without them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from distill.export.twin import ChannelRMSNorm, PrefillTwin, round_to_half
from distill.model import Student

_LENGTH = 64
_SEQUENCES = 2


def relative_error(layers: int) -> float:
    """eps: expected relative error of a hidden state after so many blocks in fp16."""
    return 2.0**-11 * math.sqrt((32 * layers + 8) / 3)


def fp16_sigma(student: Student, hidden: Tensor, gain: float) -> Tensor:
    """Derived standard deviation of each logit's error in fp16: `hidden` [..., D] after the final norm -> [..., 1].

    |w_v| is taken as its root mean square over the vocabulary.
    """
    eps = gain * relative_error(student.config.num_hidden_layers)
    row = student.lm_head.weight.float().square().sum(1).mean().sqrt()
    return eps * hidden.float().norm(dim=-1, keepdim=True) * row / math.sqrt(student.config.hidden_size)


def tolerance_factor(vocab_size: int) -> float:
    """Sigmas that the largest of V independent Gaussian errors stays below, sqrt(2 ln V), with a margin of 2."""
    return 2.0 * math.sqrt(2 * math.log(max(vocab_size, 2)))


@torch.no_grad()
def fp16_gain(student: Student) -> float:
    """The model's amplification of fp16 rounding, at least 1, on seeded random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, student.config.vocab_size, (_SEQUENCES, _LENGTH), generator=generator, dtype=torch.int32)
    twin = round_to_half(PrefillTwin(student, _LENGTH, copy=True))
    hidden = student.hidden(ids.long())
    expected = student.lm_head(hidden).float()
    with _RoundEveryOp(twin):
        found = torch.cat([twin(row[None]) for row in ids])
    error = (found - expected).square().mean(-1, keepdim=True).sqrt()
    ratio = error / fp16_sigma(student, hidden, 1.0)
    worst = float(ratio.max())
    return max(1.0, worst) if math.isfinite(worst) else 1.0  # overflow is no amplification: verification shows it


class _RoundEveryOp(TorchDispatchMode):
    """Round the floating result of every op to fp16, but inside a norm: Core ML runs that as one op."""

    def __init__(self, twin: nn.Module) -> None:
        super().__init__()
        self._inside = 0
        for module in twin.modules():
            if isinstance(module, ChannelRMSNorm):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, _module: nn.Module, _inputs: Any) -> None:
        self._inside += 1

    def _leave(self, _module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        self._inside -= 1
        return out * 1.0  # an op outside the norm: its result is rounded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out if self._inside else tree_map(_round, out)


def _round(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.half().float()
    return value
