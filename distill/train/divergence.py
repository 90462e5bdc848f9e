"""The divergence operator: from hidden states and the output matrix to the loss and its gradient, chunk by chunk.

Neither the student's nor the teacher's logits exist as a whole ([tokens, vocabulary]): a chunk of tokens is projected,
turned into its loss and, in place, into the gradient of its logits, multiplied back, and dropped. So a training step
takes the three products that any loss over a vocabulary needs, once each (four with a dense teacher), and the memory of
one chunk. Products and sums are fp32 whatever the inputs are; fp64 stays fp64.

    losses = linear_divergence(hidden_ND, weight_VD, target=TopK(...), divergence_weight_N=w / tokens)
    losses.total.backward()

Shapes: N tokens, D hidden, V vocabulary, K stored ids a token, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.train.divergences import Divergence
from distill.train.targets import Dense, Sampled, Target, TopK, block_gradient, softmax_times

FORWARD_KL = Divergence()
_BLOCK = 1 << 20
"""Logits worked on at one time on a CPU: they and what is made of them stay in its cache."""
_CHUNK = 1 << 24
"""Logits that exist at one time: 64 MiB in fp32 keep the products large."""


class Losses(NamedTuple):
    """The weighted sum, which alone carries a gradient, and what it is made of, by token."""

    total: Tensor
    divergence_N: Tensor | None
    """Divergence of each token, temperature squared included, weights not."""
    cross_entropy_N: Tensor | None
    support_N: Tensor | None
    """The student's mass on the stored ids (TopK)."""


def linear_divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    *,
    target: Target | None = None,
    divergence: Divergence = FORWARD_KL,
    divergence_weight_N: Tensor | None = None,
    labels_N: Tensor | None = None,
    cross_entropy_weight_N: Tensor | None = None,
    vocabulary: int | None = None,
    chunk: int | None = None,
    operands: torch.dtype | None = None,
) -> Losses:
    """sum_n w_n D(teacher_n, student_n) + sum_n v_n (-log student_n[label_n]), with gradients to hidden and weight.

    Weights per token (1 where none are given) carry every factor: component, span, one over the step's tokens. A token
    that weighs nothing costs nothing and its label is not looked at. `vocabulary`: ids that exist; rows of either
    output matrix from there on are padding and have no probability. `chunk`: tokens whose logits exist at one time.
    `operands`: what products round their operands to; None: nothing on a CPU, on a GPU the inputs' own type, whose
    tensor cores add up in fp32. (bf16 on a CPU is fast and rounds the logits to bf16 as well.)
    ValueError where shapes or kinds do not fit.
    """
    divergence.require_valid()
    size = _require_shapes(hidden_ND, weight_VD, target, labels_N, vocabulary)
    if isinstance(target, Sampled) and divergence.kind != "forward_kl":
        raise ValueError(f"a sampled target estimates forward_kl only, not {divergence.kind}")
    wide = torch.promote_types(torch.promote_types(hidden_ND.dtype, weight_VD.dtype), torch.float32)
    weights = (
        _token_weights(divergence_weight_N, hidden_ND, wide) if target is not None else None,
        _token_weights(cross_entropy_weight_N, hidden_ND, wide) if labels_N is not None else None,
    )
    rows = _heavy(len(hidden_ND), hidden_ND.device, *weights)
    narrow = torch.promote_types(hidden_ND.dtype, weight_VD.dtype) if hidden_ND.is_cuda else wide
    work = _Work(
        rows, _target_rows(target, rows), divergence, _at(weights[0], rows), _at(labels_N, rows),
        _at(weights[1], rows), size, chunk or max(64, _CHUNK // size), operands or narrow, wide,
    )  # fmt: skip
    return Losses(*_LinearDivergence.apply(hidden_ND, weight_VD, work))


class _Work(NamedTuple):
    """What is to be computed, on the M tokens that weigh something."""

    rows_M: Tensor | None
    """Indices of those tokens; None: all."""
    target: Target | None
    how: Divergence
    divergence_weight_M: Tensor | None
    labels_M: Tensor | None
    cross_entropy_weight_M: Tensor | None
    vocabulary: int
    chunk: int
    operand: torch.dtype
    wide: torch.dtype


class _LinearDivergence(torch.autograd.Function):
    """The gradient is taken in the forward pass, where the logits are, and only scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, work: _Work) -> tuple[Tensor | None, ...]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            ctx.gradients, facts = _run(hidden_ND, weight_VD, work, wants_hidden, wants_weight)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        out = (facts.total(work, hidden_ND.device), *facts.by_token(len(hidden_ND), work.rows_M))
        ctx.mark_non_differentiable(*(x for x in out[1:] if x is not None))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of linear_divergence was taken already; call it again")
        gradients, ctx.gradients = ctx.gradients, None  # the memory is handed on, not copied
        return (*(None if g is None else g.mul_(scale).to(d) for g, d in zip(gradients, ctx.dtypes)), None)


def _run(
    hidden_ND: Tensor, weight_VD: Tensor, work: _Work, wants_hidden: bool, wants_weight: bool
) -> tuple[tuple[Tensor | None, Tensor | None], _Facts]:
    """Every chunk: its logits, their gradient in their place, and the products with it."""
    hidden_MD = hidden_ND if work.rows_M is None else hidden_ND.index_select(0, work.rows_M)
    d_hidden_MD = torch.zeros_like(hidden_MD, dtype=work.wide) if wants_hidden else None
    d_weight_VD = torch.zeros_like(weight_VD, dtype=work.wide) if wants_weight else None
    facts, chunks = _Facts.empty(len(hidden_MD), work, hidden_MD.device), _Chunks(hidden_MD, weight_VD, work)
    for part in chunks:
        logits_CV, teacher_CV = chunks.student(part), chunks.teacher(part)
        rows = len(logits_CV) if logits_CV.is_cuda else max(1, _BLOCK // work.vocabulary)
        for first in range(0, len(logits_CV), rows):
            block = slice(first, first + rows)
            teacher_RV = None if teacher_CV is None else teacher_CV[block]
            at = slice(part.start + first, min(part.start + first + rows, part.stop))
            _block(logits_CV[block], teacher_RV, at, work, facts)
        narrow_CV = logits_CV.to(work.operand)
        if d_hidden_MD is not None:
            product(narrow_CV, chunks.weight_VD, d_hidden_MD[part])
        if d_weight_VD is not None:
            _add_product(d_weight_VD[: work.vocabulary], narrow_CV.t(), chunks.hidden(part))
    if work.rows_M is not None and d_hidden_MD is not None:
        d_hidden_MD = torch.zeros_like(hidden_ND, dtype=work.wide).index_copy_(0, work.rows_M, d_hidden_MD)
    return (d_hidden_MD, d_weight_VD), facts


def head_bytes(tokens: int, vocabulary: int, width: int, *, bf16: bool, cuda: bool, extra: int = 0) -> int:
    """What a call allocates beyond hidden states and both gradients: a chunk's logits, `extra` more of what is worked
    on at one time (4 for a dense target), and in bf16 the operands, and the weight's gradient from one chunk."""
    chunk = vocabulary * min(max(64, _CHUNK // vocabulary), tokens)
    worked = chunk if cuda else min(max(_BLOCK, vocabulary), chunk)
    narrow = 2 * chunk + (6 if cuda else 4) * vocabulary * width
    return 4 * chunk + 4 * worked * extra + (narrow if bf16 else 0)


def _block(z_RV: Tensor, teacher_RV: Tensor | None, at: slice, work: _Work, facts: _Facts) -> None:
    """Write the facts of tokens `at`, and over their logits the gradient of the weighted losses."""
    how, label_R, ce_weight_R = work.how, _at(work.labels_M, at), _at(work.cross_entropy_weight_M, at)
    weight_R = _at(work.divergence_weight_M, at)
    if label_R is not None and ce_weight_R is not None:
        label_R = torch.where(ce_weight_R != 0, label_R, 0)  # what weighs nothing may be no id
    picked_R = None if label_R is None else z_RV.gather(1, label_R[:, None])[:, 0]
    apart = ce_weight_R is not None and work.target is not None and how.temperature != 1.0
    beside_RV, lse_R = z_RV.clone() if apart else z_RV[:0], z_RV[:0, 0]
    if apart or work.target is None:  # cross-entropy is always at temperature 1
        lse_R = softmax_times(beside_RV if apart else z_RV, ce_weight_R)
    if work.target is not None and weight_R is not None:
        if how.temperature != 1.0:
            z_RV.div_(how.temperature)
        shared = None if apart else ce_weight_R
        value_R, lse, support_R = block_gradient(z_RV, teacher_RV, work.target, at, how, weight_R, shared)
        facts.divergence_M[at] = torch.where(weight_R != 0, value_R, 0)  # type: ignore[index]
        if facts.support_M is not None:
            facts.support_M[at] = support_R
        if apart:
            z_RV.add_(beside_RV)
        else:
            lse_R = lse
    if label_R is not None and picked_R is not None and ce_weight_R is not None:
        facts.cross_entropy_M[at] = torch.where(ce_weight_R != 0, lse_R - picked_R, 0)  # type: ignore[index]
        z_RV.scatter_add_(1, label_R[:, None], -ce_weight_R[:, None])


class _Facts(NamedTuple):
    """What is reported of each token."""

    divergence_M: Tensor | None
    cross_entropy_M: Tensor | None
    support_M: Tensor | None

    @staticmethod
    def empty(m: int, work: _Work, device: torch.device) -> _Facts:
        def one(wanted: bool) -> Tensor | None:
            return torch.zeros(m, dtype=work.wide, device=device) if wanted else None

        return _Facts(one(work.target is not None), one(work.labels_M is not None), one(isinstance(work.target, TopK)))

    def total(self, work: _Work, device: torch.device) -> Tensor:
        """The weighted sum, added up in fp64 (fp32 where there is none: Metal)."""
        exact = torch.float32 if device.type == "mps" else torch.float64
        total = torch.zeros((), dtype=exact, device=device)
        for value_M, weight_M in ((self.divergence_M, work.divergence_weight_M),
                                  (self.cross_entropy_M, work.cross_entropy_weight_M)):  # fmt: skip
            if value_M is not None and weight_M is not None:
                total += (value_M * weight_M).sum(dtype=exact)
        return total.to(work.wide)

    def by_token(self, n: int, rows_M: Tensor | None) -> list[Tensor | None]:
        """Each fact for all n tokens, 0 where a token weighs nothing."""
        if rows_M is None:
            return list(self)
        return [None if x is None else x.new_zeros(n).index_copy_(0, rows_M, x) for x in self]


class _Chunks:
    """Tokens chunk by chunk, each projected into buffers that are used over again."""

    def __init__(self, hidden_MD: Tensor, weight_VD: Tensor, work: _Work) -> None:
        self.work, self._hidden_MD = work, hidden_MD
        self.weight_VD = weight_VD.detach()[: work.vocabulary].to(work.operand)
        self._teacher_VE: Tensor | None = None
        shape = (min(work.chunk, len(hidden_MD)), work.vocabulary)
        self._student_CV = hidden_MD.new_empty(shape, dtype=work.wide)
        if isinstance(work.target, Dense):
            self._teacher_VE = work.target.weight_VE.detach()[: work.vocabulary].to(work.operand)
            self._teacher_CV = torch.empty_like(self._student_CV)

    def __iter__(self) -> Iterator[slice]:
        for first in range(0, len(self._hidden_MD), self.work.chunk):
            yield slice(first, min(first + self.work.chunk, len(self._hidden_MD)))

    def hidden(self, part: slice) -> Tensor:
        """The student's hidden states, as operands."""
        return self._hidden_MD[part].detach().to(self.work.operand)

    def student(self, part: slice) -> Tensor:
        """The student's logits, in a buffer that may be written to."""
        return product(self.hidden(part), self.weight_VD.t(), self._student_CV[: part.stop - part.start])

    def teacher(self, part: slice) -> Tensor | None:
        """The dense teacher's logits, likewise."""
        if self._teacher_VE is None or not isinstance(self.work.target, Dense):
            return None
        hidden_CE = self.work.target.hidden_NE[part].detach().to(self.work.operand)
        return product(hidden_CE, self._teacher_VE.t(), self._teacher_CV[: part.stop - part.start])


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into `out`, which may be wider than they are: sums are fp32."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out) if a.is_cuda else out.copy_(torch.mm(a, b))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype) if a.is_cuda else torch.mm(a, b))


def _at(x: Tensor | None, rows: Tensor | slice | None) -> Tensor | None:
    if x is None or rows is None:
        return x
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _target_rows(target: Target | None, rows: Tensor | None) -> Target | None:
    if target is None or rows is None:
        return target
    if isinstance(target, Dense):
        return target._replace(hidden_NE=target.hidden_NE.index_select(0, rows))
    return type(target)(*(part.index_select(0, rows) for part in target))


def _token_weights(weight_N: Tensor | None, hidden_ND: Tensor, wide: torch.dtype) -> Tensor:
    n = len(hidden_ND)
    if weight_N is None:
        return torch.ones(n, dtype=wide, device=hidden_ND.device)
    if weight_N.shape != (n,):
        raise ValueError(f"weights of shape {tuple(weight_N.shape)} for {n} tokens")
    return weight_N.detach().to(wide)


def _heavy(n: int, device: torch.device, *weights: Tensor | None) -> Tensor | None:
    """Indices of the tokens that weigh something; None: all."""
    heavy_N = torch.zeros(n, dtype=torch.bool, device=device)
    for weight_N in weights:
        if weight_N is not None:
            heavy_N |= weight_N != 0
    return None if bool(heavy_N.all()) else heavy_N.nonzero()[:, 0]


def _require_shapes(
    hidden_ND: Tensor, weight_VD: Tensor, target: Target | None, labels_N: Tensor | None, vocabulary: int | None
) -> int:
    """The number of ids that exist; ValueError where something does not fit."""
    if target is None and labels_N is None:
        raise ValueError("nothing to compare with: give a target, labels or both")
    n = len(hidden_ND)
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden {tuple(hidden_ND.shape)} and weight {tuple(weight_VD.shape)} do not fit")
    by_token = {} if labels_N is None else {"labels": labels_N}
    if isinstance(target, Dense):
        by_token["the teacher's hidden states"] = target.hidden_NE
    elif target is not None:
        by_token |= {f"target.{name}": part for name, part in target._asdict().items()}
    for name, part in by_token.items():
        if len(part) != n:
            raise ValueError(f"{name} are for {len(part)} tokens, hidden states for {n}")
    rows = [len(weight_VD)] + ([len(target.weight_VE)] if isinstance(target, Dense) else [])
    size = min(rows) if vocabulary is None else vocabulary
    if not 1 <= size <= min(rows):
        raise ValueError(f"vocabulary {size} is not within the {min(rows)} rows of the output matrix")
    return size
