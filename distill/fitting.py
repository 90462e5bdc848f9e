"""The scales and palettes that bring a weight's deployed values closest to it, by weighted squared error.

Integers: the scale of the largest value; where the importance of the inputs is known, the one with the least error of
some twenty from there downwards. (Unweighted, that search nearly halves int4's error and doubles the divergence of the
student: it clips the few large weights, which meet large inputs.) Palettes: k-means in one dimension (Lloyd 1982), from
the best division of the values into runs of small pieces where entries are few (dynamic programming). Values are sorted
once; then a cluster is an interval, and a step reads cumulative sums at its ends. Everything is deterministic.

Shapes: O output channels, I input channels, R rows with a scale or palette of their own, N values of a row,
P points of a row (sorted, equal ones together or not), E = P + 1 places before, between and after them, K palette
entries, C places that a division may use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 65504.0
"""Of fp16."""
_SHARES = [1 - 0.04 * i for i in range(16)]
"""Of the largest value, that a code may saturate at. Steps of 0.01 gain less than 1% of the error."""
_CACHED = 1 << 17
"""Values worked on at one time."""
_SORTED = 1 << 22
"""Values sorted at one time; a longer row is counted by its fp16 value instead."""
_BLOCKS = 8
"""Blocks of equal weight for each palette entry, to tell the density from."""
_PIECES = 4
"""Pieces for each palette entry, of which a first palette is put together; 16 gain less than 0.3% of the error."""
_FEW = 16
"""Entries up to which that is worth its time."""
_STEPS = 200
"""Of Lloyd's, at most; few rows need so many."""


def code_range(bits: int) -> tuple[int, int]:
    """Least and largest code of a signed integer."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def fit_scales(weight_OBN: Tensor, bits: int, importance_BN: Tensor | None) -> Tensor:
    """The scale of each row of N values, [O, B] in fp16; 2^-24 at least."""
    parts = weight_OBN.split(max(1, _CACHED // weight_OBN[0].numel()))
    return torch.cat([_best_scales(part, bits, importance_BN) for part in parts])


def _best_scales(x_OBN: Tensor, bits: int, importance_BN: Tensor | None) -> Tensor:
    low, high = code_range(bits)
    largest_OB1 = x_OBN.abs().amax(-1, keepdim=True)
    best_OB1 = torch.ones_like(largest_OB1)
    least_OB1 = torch.full_like(largest_OB1, torch.inf)
    for scale_OB1, exact in _scales(largest_OB1, high, clip=importance_BN is not None):
        codes = (x_OBN / scale_OB1).round_().clamp_(low, high)
        error = codes.mul_(scale_OB1).half().float().sub_(x_OBN).square_()
        if importance_BN is not None:
            error.mul_(importance_BN)
        error_OB1 = error.sum(-1, keepdim=True)
        better = (error_OB1 < least_OB1) & ((error_OB1 == 0) | (not exact))
        best_OB1 = torch.where(better, scale_OB1, best_OB1)
        least_OB1 = torch.where(better, error_OB1, least_OB1)
    return best_OB1.squeeze(-1).half()


def _scales(largest: Tensor, high: int, clip: bool) -> Iterator[tuple[Tensor, bool]]:
    """That which puts the largest value on the last code; to `clip`, smaller ones too. And whether one is of use only
    where it leaves no error: so values that are a scale's multiples already find it again."""
    for level in (high, high + 1):
        bits = (largest / level).half().view(torch.int16)
        for step in (0, -1, 1):
            exact = step == 1 or (level > high and not clip)
            yield (bits + step).clamp(1, 0x7BFF).view(torch.float16).float(), exact
    for share in _SHARES[1:] if clip else ():
        yield (largest * (share / high)).half().clamp_min(2.0**-24).float(), False


def fit_palettes(weight_RN: Tensor, entries: int, importance_RN: Tensor | None, start_RK: Tensor | None) -> Tensor:
    """The palette of each row, sorted, [R, K] in fp16. `start_RK`: palettes to go on from, by one step."""
    rows = max(1, _SORTED // weight_RN.shape[1])
    found = []
    for first in range(0, len(weight_RN), rows):
        at = slice(first, first + rows)
        importance = None if importance_RN is None else importance_RN.expand_as(weight_RN)[at]
        points = _counted if weight_RN.shape[1] > _SORTED else _sorted
        start = None if start_RK is None else start_RK[at].double()
        found.append(_lloyd(points(weight_RN[at].float(), importance), entries, start))
    return torch.cat(found).half() + 0.0  # -0.0 would be equal to 0, with other bits


class _Points(NamedTuple):
    """Values in order, and cumulative sums before each of them and after the last: of the weight, and weight times
    value. In fp64: a difference of two sums keeps its digits."""

    x_RP: Tensor
    weight_RE: Tensor
    moment_RE: Tensor


def _sorted(x_RN: Tensor, importance_RN: Tensor | None) -> _Points:
    x_RN, order = x_RN.sort(dim=1)
    x = x_RN.double()
    weight = torch.ones_like(x) if importance_RN is None else importance_RN.gather(1, order).double()
    return _Points(x, _cumulative(weight), _cumulative(weight * x))


def _counted(x_1N: Tensor, importance_1N: Tensor | None) -> _Points:
    """One long row: values that fp16 does not tell apart become their mean."""
    bits_N = x_1N[0].half().view(torch.int16).int()
    bins_N = torch.where(bits_N < 0, -1 - (bits_N & 0x7FFF), bits_N) + 0x8000  # in the order of the values
    weight_N = torch.ones_like(x_1N[0]) if importance_1N is None else importance_1N[0]
    weight_P = torch.bincount(bins_N, weight_N.double(), 1 << 16)
    moment_P = torch.bincount(bins_N, (weight_N * x_1N[0]).double(), 1 << 16)
    there = weight_P > 0
    weight_P, moment_P = weight_P[there], moment_P[there]
    return _Points((moment_P / weight_P)[None], _cumulative(weight_P[None]), _cumulative(moment_P[None]))


def _cumulative(x_RP: Tensor) -> Tensor:
    return torch.cat([x_RP.new_zeros(len(x_RP), 1), x_RP.cumsum(1)], 1)  # [R, E], E = P + 1


def _lloyd(points: _Points, entries: int, start_RK: Tensor | None) -> Tensor:
    """Each entry becomes the mean of the values nearest to it, until none changes. A row of no more values than entries
    gets just those."""
    few_R, palette_RK = _distinct(points.x_RP, entries)
    guess = _divided if entries <= _FEW else _spread
    mean_RK = guess(points, entries) if start_RK is None else start_RK
    edge_before: Tensor | None = None
    for _ in range(_STEPS if start_RK is None else 1):
        edge = _intervals(points, mean_RK)
        if edge_before is not None and torch.equal(edge, edge_before):
            break
        edge_before = edge
        weight_RK, moment_RK = (sums.gather(1, edge).diff(dim=1) for sums in points[1:])
        mean_RK = torch.where(weight_RK > 0, moment_RK / weight_RK, mean_RK)
    return torch.where(few_R[:, None], palette_RK, mean_RK)


def _intervals(points: _Points, palette_RK: Tensor) -> Tensor:
    """The places where the points nearest to each entry begin, and where the last ones end, [R, K + 1]."""
    inner = torch.searchsorted(points.x_RP, nearest_edges(palette_RK))
    end = torch.full_like(points.x_RP[:, :1], points.x_RP.shape[1], dtype=inner.dtype)
    return torch.cat([torch.zeros_like(end), inner, end], 1)


def nearest_edges(palette_RK: Tensor) -> Tensor:
    """Where the nearest entry of a sorted palette changes, [R, K - 1]."""
    return (palette_RK[:, 1:] + palette_RK[:, :-1]) / 2


def _distinct(x_RP: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Whether a row has no more values than entries, and its first values, the last of them repeated."""
    rank_RP = torch.zeros_like(x_RP, dtype=torch.int64)
    rank_RP[:, 1:] = (x_RP.diff(dim=1) != 0).cumsum(1)
    first_RK = torch.searchsorted(rank_RP, torch.arange(entries, device=x_RP.device).expand(len(x_RP), -1).contiguous())
    last_R1 = torch.searchsorted(rank_RP, rank_RP[:, -1:].contiguous())
    return rank_RP[:, -1] < entries, x_RP.gather(1, torch.minimum(first_RK, last_R1))


def _divided(points: _Points, entries: int) -> Tensor:
    """A first palette: the means of the best division into K runs of small pieces (Wang & Song 2011).

    The squares' sum is the same for every division, so the best one has the largest sum of moment^2 / weight.
    """
    spread_RK = _spread(points, _PIECES * entries)
    place_RC = _intervals(points, spread_RK)
    weight_RC, moment_RC = (sums.gather(1, place_RC) for sums in points[1:])
    weight_RCC = weight_RC[:, None] - weight_RC[:, :, None]  # of the run from one place to another
    moment_RCC = moment_RC[:, None] - moment_RC[:, :, None]
    gain_RCC = torch.where(weight_RCC > 0, moment_RCC.square() / weight_RCC, 0.0)
    backwards = torch.ones(gain_RCC.shape[1:], dtype=torch.bool, device=gain_RCC.device).tril(-1)
    gain_RCC.masked_fill_(backwards, -torch.inf)
    best_RC, froms = gain_RCC[:, 0], []
    for _ in range(entries - 1):
        best_RC, from_RC = (best_RC[:, :, None] + gain_RCC).max(1)
        froms.append(from_RC)
    ends = [torch.full_like(place_RC[:, :1], place_RC.shape[1] - 1)]
    for from_RC in reversed(froms):
        ends.insert(0, from_RC.gather(1, ends[0]))
    end_RK = torch.cat([torch.zeros_like(ends[0]), *ends], 1)
    weight_RK, moment_RK = (sums.gather(1, end_RK).diff(dim=1) for sums in (weight_RC, moment_RC))
    empty_RK = spread_RK[:, ::_PIECES]
    return torch.where(weight_RK > 0, moment_RK / weight_RK, empty_RK).sort(dim=1).values


def _spread(points: _Points, entries: int) -> Tensor:
    """A first palette: its entries as dense as the cube root of the values' density, the best for many entries (Panter
    & Dite 1951). Blocks of equal weight tell the density: one of width d takes a share of the entries like d^(2/3)."""
    x_RP, weight_RE, _ = points
    blocks = _BLOCKS * entries
    parts = torch.arange(blocks + 1, device=x_RP.device, dtype=torch.float64) / blocks
    at_RB = torch.searchsorted(weight_RE, weight_RE[:, -1:] * parts).clamp_max(x_RP.shape[1] - 1)
    ends_RB = x_RP.gather(1, at_RB)
    share_RB = _cumulative(ends_RB.diff(dim=1).pow(2 / 3))
    wanted_RK = share_RB[:, -1:] * ((torch.arange(entries, device=x_RP.device) + 0.5) / entries).double()
    block_RK = torch.searchsorted(share_RB, wanted_RK).clamp(1, blocks) - 1
    low_RK, high_RK = ends_RB.gather(1, block_RK), ends_RB.gather(1, block_RK + 1)
    before_RK, after_RK = share_RB.gather(1, block_RK), share_RB.gather(1, block_RK + 1)
    within = torch.where(after_RK > before_RK, (wanted_RK - before_RK) / (after_RK - before_RK), 0.5)
    return low_RK + within * (high_RK - low_RK)
