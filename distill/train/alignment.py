"""A teacher with another vocabulary: likelihoods of the same bytes are compared, not distributions over tokens.

Both tokenizers cut the same text. Where both cut at the same byte a chunk ends; chunks are the smallest that both can
be put together from. Of each chunk, teacher and student have a probability p_T and p_S: the product of its tokens'.
Approximate likelihood matching (Minixhofer et al. 2025, arXiv:2503.20083) compares the two coins p_T^(1/tau) and
p_S^(1/tau): "this chunk" against "anything else".

Limits. A chunk tells one number, where a token of a teacher with the student's vocabulary tells a whole distribution:
where both are at hand, that teacher's distributions teach far more a token. The probability of a token includes that no
longer token was chosen, and which longer tokens there are differs between vocabularies: two models of the same bytes
can differ on a chunk, and the loss has its minimum near the teacher, not at it (the paper's correction by the mass of
what may follow is not made). For the same reason distributions over the tokens that both vocabularies have are not
compared. The teacher reads the student's rendering of a conversation, control tokens included, without a first token of
its own. What a chunk holds beside targets, or no token before it, is left out.

Shapes: N target tokens, D hidden, V vocabulary, C chunks, T the student's tokens, U the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill import pretrained
from distill.checkpoint import weights_sha256
from distill.data.batches import Batch
from distill.errors import ConfigError
from distill.tokenizer import Tokenizer
from distill.train.divergence import FORWARD_KL, Losses, linear_divergence
from distill.train.divergences import Divergence

TAU = 100.0
"""As in the paper's experiments. The larger, the more a chunk counts by its log-probability."""
_CERTAIN = -1e-7
"""Log-probabilities nearer to 0 are fp32's rounding."""


class Aligned(NamedTuple):
    """The chunks of a batch and the teacher's log-probability of each."""

    chunk_N: Tensor
    """The chunk that each target belongs to; -1: none."""
    logprob_C: Tensor
    """fp64."""


def common_chunks(
    ours: Sequence[tuple[int, int]], theirs: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The chunk of each token of two tokenisations of one text, given as ranges of bytes; -1 after the last common end.

    Ranges are in order; they may be empty, or overlap where tokens share a character: no chunk ends within one.
    """
    ends, closed = zip(*(_ends(spans) for spans in (ours, theirs)))
    borders = np.intersect1d(*closed)
    found = [np.searchsorted(borders, end) for end in ends]
    return tuple(np.where(chunk < len(borders), chunk, -1) for chunk in found)  # type: ignore[return-value]


def _ends(spans: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each token ends, and the ends that the next token does not reach back over."""
    start, end = np.asarray(spans, np.int64).reshape(-1, 2).T
    return end, end[end <= np.append(start[1:], end[-1:])]


class AlignedTeacher:
    """A frozen model with a tokenizer of its own."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer, device: torch.device) -> None:
        """ConfigError where the student's tokens do not stand for bytes."""
        if not tokenizer.bytes_by_id:
            raise ConfigError(f"{tokenizer.source}: not a byte-level tokenizer, so no other can be aligned with it")
        self._folder, self._ours = folder, tokenizer.bytes_by_id
        self._tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        model = pretrained.from_pretrained(folder)
        self.sha256 = weights_sha256(model)
        self._model = model.to(device).eval().requires_grad_(False)
        self._tokenizer.require_fits(self._model.config.vocab_size, f"teacher {folder}")

    def __str__(self) -> str:
        return f"from {self._folder} beside the student, aligned by bytes"

    @torch.no_grad()
    def target(self, batch: Batch) -> Aligned:
        """The chunks of the batch's targets. Those of a sequence depend on the sequence alone."""
        target_T = torch.zeros(batch.tokens, dtype=torch.bool)
        target_T[batch.positions_N.cpu() + 1] = True
        chunk_T, chunk_U, ids_U, lengths, count = [], [], [], [], 0
        parts = zip(batch.records, batch.ids_T.cpu().split(batch.lengths), target_T.split(batch.lengths))
        for record, ids, is_target in parts:
            read, own, other = self._chunks(ids.tolist(), is_target.numpy(), record)
            chunk_T.append(np.where(own >= 0, own + count, -1))
            if (own >= 0).any():
                chunk_U.append(np.where(other >= 0, other + count, -1))
                ids_U += read
                lengths.append(len(read))
            count += int(own.max(initial=-1)) + 1
        device = batch.ids_T.device
        chunk_N = torch.from_numpy(np.concatenate(chunk_T)).to(device)[batch.positions_N + 1]
        logprob_C = torch.zeros(count, dtype=torch.float64)
        if count:
            places_M = torch.from_numpy(np.concatenate(chunk_U) >= 0).nonzero()[:, 0]
            told_M = self._logprobs(torch.tensor(ids_U), lengths, places_M).double().cpu()
            logprob_C.index_add_(0, torch.from_numpy(np.concatenate(chunk_U))[places_M], told_M)
        return Aligned(chunk_N, logprob_C)

    def _chunks(
        self, ids: list[int], is_target: NDArray[np.bool_], record: int
    ) -> tuple[list[int], NDArray[np.int64], NDArray[np.int64]]:
        """The teacher's ids, and the chunk of each of our tokens and of its own; chunks are numbered from 0."""
        pieces = [self._ours.get(token, b"") for token in ids]
        spans = list(pairwise(accumulate(map(len, pieces), initial=0)))
        theirs = self._tokenizer.encode_spans(_valid(b"".join(pieces)))
        limit = self._model.config.max_position_embeddings
        if len(theirs.ids) > limit:
            raise ConfigError(f"record {record}: {len(theirs.ids)} tokens, the teacher {self._folder} reads {limit}")
        own, other = common_chunks(spans, theirs.bytes)
        kept = np.ones(max(own.max(initial=-1), other.max(initial=-1)) + 1, bool)
        kept[own[(own >= 0) & ~is_target]] = False
        kept[other[:1][other[:1] >= 0]] = False  # nothing predicts a first token
        number = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1)  # -1 stays -1
        return theirs.ids, number[own], number[other]

    def _logprobs(self, ids_U: Tensor, lengths: Sequence[int], places_M: Tensor) -> Tensor:
        """Log-probabilities of the tokens at these places."""
        head_VD = self._model.lm_head.weight
        ids_U, places_M = ids_U.to(head_VD.device), places_M.to(head_VD.device)
        hidden_UD = self._model.hidden(ids_U[None], lengths=lengths)[0]
        return _token_logprobs(hidden_UD[places_M - 1], head_VD, ids_U[places_M])


def _valid(data: bytes) -> str:
    """The text up to the first byte that is none: of a student's own answer, cut within a character."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


@torch.no_grad()
def _token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, mask_N: Tensor | None = None, **options: Any
) -> Tensor:
    """Log-probability of each label, by chunks; 0 outside the mask."""
    told = linear_divergence(hidden_ND, weight_VD, labels_N=labels_N, cross_entropy_weight_N=mask_N, **options)
    assert told.cross_entropy_N is not None
    return -told.cross_entropy_N


def aligned_divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    *,
    target: Aligned,
    labels_N: Tensor,
    divergence: Divergence = FORWARD_KL,
    divergence_weight_N: Tensor | None = None,
    cross_entropy_weight_N: Tensor | None = None,
    tau: float = TAU,
    **options: Any,
) -> Losses:
    """sum_c w_c tau D(coin of p_T(c), coin of p_S(c)) + sum_n v_n (-log p_S(label_n)), with gradients to both inputs.

    w_c is the mean weight of the chunk's targets (1 where none are given); v 0 where none are given. The factor tau
    keeps gradients at one size, as T squared does. By token, each of a chunk's targets is told an equal part of its
    divergence. `options`: `vocabulary`, `chunk` and `operands` of linear_divergence.

    The logits are computed twice, and never exist as a whole: first for the log-probabilities, then for their gradient,
    which is that of a cross-entropy whose weights are minus the slopes of the loss.
    """
    if divergence.temperature != 1.0 or not tau > 0:
        raise ValueError(f"chunks have tau (above 0, not {tau}) and no temperature (1, not {divergence.temperature})")
    in_chunk_N = target.chunk_N >= 0
    weight_N, v_N = (
        torch.full(target.chunk_N.shape, fill, dtype=torch.float64) if given is None else given.detach().double().cpu()
        for given, fill in ((divergence_weight_N, 1.0), (cross_entropy_weight_N, 0.0))
    )
    wanted_N = in_chunk_N | (v_N != 0).to(in_chunk_N.device)
    logprob_N = _token_logprobs(hidden_ND, weight_VD, labels_N, wanted_N, **options).double().cpu()
    place_M, chunk_M = in_chunk_N.cpu(), target.chunk_N.cpu()[in_chunk_N.cpu()]
    zero_C = torch.zeros_like(target.logprob_C)
    tokens_C = zero_C.index_add(0, chunk_M, torch.ones_like(logprob_N[place_M]))
    weight_C = zero_C.index_add(0, chunk_M, weight_N[place_M]) / tokens_C
    ours_C = zero_C.index_add(0, chunk_M, logprob_N[place_M])
    value_C, slope_C = coins(target.logprob_C, ours_C, divergence, tau)
    share_N, slope_N = torch.zeros_like(logprob_N), torch.zeros_like(logprob_N)
    share_N[place_M] = (value_C / tokens_C)[chunk_M]
    slope_N[place_M] = (weight_C * slope_C)[chunk_M]
    device, wide = hidden_ND.device, torch.promote_types(hidden_ND.dtype, torch.float32)
    minus_slope_N = (v_N - slope_N).to(wide).to(device)
    passed = linear_divergence(
        hidden_ND, weight_VD, labels_N=labels_N, cross_entropy_weight_N=minus_slope_N, **options
    ).total
    value = (weight_C * value_C).sum() - (v_N * logprob_N).sum()
    return Losses(
        (passed - passed.detach()) + value.to(wide).to(device),
        share_N.to(wide).to(device),
        torch.where(v_N != 0, -logprob_N, 0).to(wide).to(device) if cross_entropy_weight_N is not None else None,
        None,
    )


def coins(theirs_C: Tensor, ours_C: Tensor, how: Divergence, tau: float) -> tuple[Tensor, Tensor]:
    """tau D of the two coins that show "this chunk" with p^(1/tau), from log-probabilities in fp64, and its slope in
    ours."""
    sides = []
    for logprob_C in (theirs_C, ours_C):
        yes_C = logprob_C.clamp(max=_CERTAIN) / tau
        sides.append(torch.stack([yes_C, torch.log(-torch.expm1(yes_C))], 1))
    (log_t, log_s), (t, s) = sides, [side.exp() for side in sides]
    value_C, by_logit = how.value_and_gradient(log_t, t, log_s, s)
    return tau * value_C, by_logit[:, 0] / s[:, 1]  # a coin's logit grows by 1 / (1 - p) as its log p grows by 1
