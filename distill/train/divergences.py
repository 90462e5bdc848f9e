"""Divergences between two distributions over classes, and their gradients with respect to the student's logits.

Everything is closed form: with t = exp(log_t), s = softmax(z), d = log_s - log_t and a divergence D whose derivative
with respect to s_j is g_j, dD/dz_j = s_j (g_j - sum_i s_i g_i). Mixtures go through expm1 and log1p of -|d|, which
neither overflows nor cancels. A teacher's stored probabilities need not add up to exactly 1: the formulae hold for any
sum.

Shapes: R rows, C classes: the vocabulary, or K stored ids and everything else as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]

LOG_ZERO = -100.0
"""Stands for the logarithm of 0: its exponential vanishes in fp32, and products with it stay finite. Where the teacher
gives no mass at all the reverse KL is infinite; this is its ceiling there."""

_MIX = {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}
_EVEN = 0.25, 0.75
"""Shares of a mixture between which neither of the two counts for little."""


class Divergence(NamedTuple):
    """Which divergence, named by direction, of softmax(teacher / T) and softmax(student / T)."""

    kind: Kind = "forward_kl"
    mix: float | None = None
    """jsd: the teacher's share of the mixture (0.5); skew: the first argument's share of the second (0.1)."""
    temperature: float = 1.0

    def require_valid(self) -> None:
        """ValueError naming what is wrong."""
        if self.kind not in _FORMULAE:
            raise ValueError(f"divergence {self.kind!r} is not one of {', '.join(_FORMULAE)}")
        if self.mix is not None and self.kind not in _MIX:
            raise ValueError(f"mix: {self.kind} mixes nothing")
        if not 0 < self.share < 1:
            raise ValueError(
                f"mix must lie between 0 and 1, not {self.share}; at its ends use forward_kl or reverse_kl"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")

    @property
    def share(self) -> float:
        """`mix`, or its usual value."""
        return _MIX.get(self.kind, 0.5) if self.mix is None else self.mix

    @property
    def scale(self) -> float:
        """T squared keeps gradients at one size (Hinton et al. 2015); total variation has no such factor."""
        return 1.0 if self.kind == "tvd" else self.temperature**2

    def value_and_gradient(self, log_t: Tensor, t: Tensor, log_s: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """D [R], times its scale, and its gradient with respect to the student's logits before temperature [R, C].

        The four are log-probabilities and probabilities [R, C] at the temperature. May overwrite `log_s`.
        """
        value, gradient = _FORMULAE[self.kind](log_t, t, log_s, s, self.share)
        if self.scale != 1.0:
            value = value * self.scale
        if self.scale != self.temperature:
            gradient = gradient.mul_(self.scale / self.temperature)
        return value, gradient


Formula = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def _forward_kl(log_t: Tensor, t: Tensor, log_s: Tensor, s: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """KL(t || s); g = -t / s."""
    value = (t * (log_t - log_s)).sum(-1)
    excess = t.sum(-1, keepdim=True) - s.sum(-1, keepdim=True)  # of stored probabilities; 0 where t is s
    return value, (s - t).addcmul_(s, excess)


def _reverse_kl(log_t: Tensor, t: Tensor, log_s: Tensor, s: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """KL(s || t); g = d + 1."""
    d = log_s.sub_(log_t)
    return (s * d).sum(-1), _through_softmax(s, d)


def _jsd(log_t: Tensor, t: Tensor, log_s: Tensor, s: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """b KL(t || m) + (1 - b) KL(s || m), m = b t + (1 - b) s (Agarwal et al. 2024, GKD); g = (1 - b) log(s / m)."""
    over_t, over_s = _log_mixture(log_t, log_s, share)  # log m - log t, log m - log s
    value = -(share * (t * over_t).sum(-1) + (1 - share) * (s * over_s).sum(-1))
    if not _EVEN[0] <= share <= _EVEN[1]:
        over_s = _without_constant(over_s, _over_mixture(s, over_t)[1], log_t, log_s, share)
    return value, _through_softmax(s, over_s.mul_(share - 1))


def _skew_kl(log_t: Tensor, t: Tensor, log_s: Tensor, s: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """KL(t || m), m = a t + (1 - a) s (Ko et al. 2024, DistiLLM); g = -(1 - a) t / m."""
    over_t, _ = _log_mixture(log_t, log_s, share)
    value = -(t * over_t).sum(-1)
    return value, _through_softmax(s, _over_mixture(s, over_t)[0].mul_(share - 1))


def _skew_reverse_kl(log_t: Tensor, t: Tensor, log_s: Tensor, s: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """KL(s || m), m = a s + (1 - a) t (Ko et al. 2024); g = log(s / m) + (1 - a) t / m."""
    over_t, over_s = _log_mixture(log_t, log_s, 1 - share)
    value = -(s * over_s).sum(-1)
    ratio, far = _over_mixture(s, over_t)
    if not _EVEN[0] <= share <= _EVEN[1]:
        over_s = _without_constant(over_s, far, log_t, log_s, 1 - share)
    return value, _through_softmax(s, ratio.mul_(1 - share).sub_(over_s))


def _tvd(log_t: Tensor, t: Tensor, log_s: Tensor, s: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Total variation, half the sum of |s - t|; g = sign(s - t) / 2."""
    d = s - t
    value = d.abs().sum(-1) / 2
    return value, _through_softmax(s, d.sign_().mul_(0.5))


_FORMULAE: dict[str, Formula] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
}


def _over_mixture(s: Tensor, over_t: Tensor) -> tuple[Tensor, Tensor]:
    """t / m, but for a constant of each row, which a softmax does not see; and the rows [R, 1] that are far: most of
    the student's mass is where t is small against m. There it is t / m; elsewhere t / m - 1, which is small."""
    near = over_t.neg().expm1_()
    far = (s * near).sum(-1, keepdim=True) < -0.5
    return (torch.where(far, over_t.neg_().exp_(), near) if bool(far.any()) else near), far


def _without_constant(over_s: Tensor, far: Tensor, log_t: Tensor, log_s: Tensor, share: float) -> Tensor:
    """log m - log s [R, C] without the constant log(1 - share), near which it is in far rows."""
    if not bool(far.any()):
        return over_s
    rest = torch.nn.functional.softplus(log_t - log_s + math.log(share / (1 - share)))  # log m - log((1 - share) s)
    return torch.where(far, rest, over_s)


def _through_softmax(s: Tensor, g: Tensor) -> Tensor:
    """s (g - sum s g), over `g`."""
    return g.sub_((s * g).sum(-1, keepdim=True)).mul_(s)


def _log_mixture(log_t: Tensor, log_s: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """log m - log t and log m - log s for m = share * t + (1 - share) * s."""
    d = log_s - log_t
    larger = d >= 0
    less = torch.where(larger, d.new_tensor(share), d.new_tensor(1 - share))  # the share of the smaller of the two
    apart = d.abs().neg_()
    below = apart.expm1().mul_(less)  # m / max(t, s) - 1
    over_larger = below.log1p()
    if not _EVEN[0] <= share <= _EVEN[1]:  # the larger one may count for so little that 1 - less is lost in 1 + below
        more = torch.where(larger, d.new_tensor(1 - share), d.new_tensor(share))
        over_larger = torch.where(below > -0.5, over_larger, apart.exp_().mul_(less).add_(more).log_())
    return over_larger + d.clamp(min=0), over_larger.sub_(d.clamp_(max=0))
