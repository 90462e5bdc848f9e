"""The codec of the teacher's distributions: a codebook trained on the store itself, and about 1.5 bytes an entry.

A token is written as numbers (distill/data/store/bits.py), each with a Huffman code of its context, entries by falling
probability. Log-probabilities lie on a grid whose steps grow as probability falls, since an error e at probability p
costs p e^2 / 2 of KL; written are the differences down the ranks. An id is written as its position in a list that
starts with the favourites of the token's class and goes on with all ids by frequency. The class is the cheapest of
those that training found (as in vector quantisation); entries on one level go by position, and gaps are written.

Shapes: N tokens, k kept entries, F fields of a token, V vocabulary, C classes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from distill.data.store import bits
from distill.data.store.bits import Ints

NAME = "compact"
STEP = 0.005
"""Step of the grid at probability 1."""
_WIDEST = 0.25
"""No step of the grid is wider, down to a log-probability of -10; below, a fortieth of it."""
_LOWEST = 1e6
"""The last step of the grid but minus infinity; beyond fp32's least positive number by far."""
_HEADER = 4
"""Fields before the entries: class, entries that lack to k, rank of the token itself (or k + its id), tail."""
_VALUE_FROM = np.array([1.0, 2.0, 3.0, 4.0, 5.5, 7.0, 9.5])
_ID_FROM = np.array([1, 4, 16])
_FIRST_VALUE, _VALUES, _IDS, _ID_CONTEXTS = 4, 5, 53, 8
"""Contexts: the header's fields, the first level, differences by rank and level, ids by class, rank and tie."""
_SYMBOLS = len(bits.FIRST)


def n_contexts(classes: int) -> int:
    """How many contexts a codebook of so many classes has."""
    return _IDS + _ID_CONTEXTS * classes


class Grid(NamedTuple):
    """Levels of -log p: `log` of level i is -minus[i]; the last one is minus infinity."""

    minus: NDArray[np.float64]
    middles: NDArray[np.float64]
    weight: NDArray[np.float64]
    """exp(-minus)."""
    bucket: Ints
    """Of each level: the context of the difference that follows it."""

    def level(self, logprobs: NDArray[np.floating]) -> Ints:
        """The nearest level."""
        return np.searchsorted(self.middles, -logprobs.astype(np.float64)).astype(np.int64)


def make_grid(step: float) -> Grid:
    """The grid of a step at probability 1 (0.0005 to 0.1)."""
    points = [0.0]
    while points[-1] < _LOWEST:
        x = points[-1]
        points.append(x + min(step * float(np.exp(min(x, 80) / 2)), max(_WIDEST, x / 40)))
    finite = np.asarray(points)
    minus = np.append(finite, np.inf)
    middles = np.append((finite[1:] + finite[:-1]) / 2, 2 * finite[-1])
    return Grid(minus, middles, np.exp(-minus), np.searchsorted(_VALUE_FROM, minus, side="right").astype(np.int64))


class Tokens(NamedTuple):
    """Distributions of N tokens: own ids [N], kept ids [N, k] (-1 where fewer are kept), log-probabilities, tail."""

    token_ids: Ints
    ids: Ints
    logprobs: NDArray[np.floating]
    tail: NDArray[np.floating]

    def only(self, part: slice) -> Tokens:
        """Some of the tokens."""
        return Tokens(self.token_ids[part], self.ids[part], self.logprobs[part], self.tail[part])


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a codebook's bytes are, as the store's metadata says it."""

    step: float
    ordered: int
    """Ids that are listed by frequency; the others follow by number."""
    favourites: tuple[int, ...]
    """How many each class has."""
    short: bool
    """Whether some token has fewer than k entries."""


class Codebook:
    """Codes and lists for the tokens of one store."""

    def __init__(self, layout: Layout, k: int, order: Ints, favourites: Ints, lengths: NDArray[np.uint8]) -> None:
        """`order` [V] is a permutation of the vocabulary, `favourites` the classes' lists one after another."""
        self.layout, self.k, self.vocab = layout, k, len(order)
        self.classes = len(layout.favourites)
        self.order, self.favourites, self.lengths = order, favourites, lengths
        self.grid = make_grid(layout.step)
        code = bits.make_code(lengths)
        if code is None:
            raise ValueError("the code lengths are not those of a prefix code")
        self.code = code
        self._list = np.concatenate([favourites, order])  # a position: an offset into it, by class
        self._many = np.asarray(layout.favourites, np.int64)
        self._from = np.cumsum(self._many) - self._many
        rank = np.arange(k)
        self._value_ctx = _VALUES + 8 * np.minimum(np.frexp(np.maximum(rank, 1))[1] - 1, 5).astype(np.int64)
        self._id_ctx = _IDS + 2 * np.searchsorted(_ID_FROM, rank, side="right").astype(np.int64)
        tables = [np.full(len(self.grid.minus), _FIRST_VALUE)] + [
            context + self.grid.bucket for context in self._value_ctx[1:]
        ]
        self._value_tables = [table << bits.MAX_CODE for table in tables]
        self._id_tables = self._id_ctx << bits.MAX_CODE
        self._positions: NDArray[np.int32] | None = None

    # -- writing

    def positions(self) -> NDArray[np.int32]:
        """[V + 1, C]: the position of each id in each class's list; the last row, of no id, is 0."""
        if self._positions is None:
            where = np.empty(self.vocab, np.int64)
            where[self.order] = np.arange(self.vocab)
            table = np.zeros((self.vocab + 1, self.classes), np.int32)
            table[:-1] = where[:, None] + self._many
            for c, (start, many) in enumerate(zip(self._from, self._many)):
                table[self.favourites[start : start + many], c] = np.arange(many)
            self._positions = table
        return self._positions

    def costs(self) -> NDArray[np.uint8]:
        """[V + 1, C]: about how many bits each id takes in each class."""
        positions = self.positions()
        out = np.zeros((self.vocab + 1, self.classes), np.uint8)
        for c in range(self.classes):
            symbol = bits.symbol_of(positions[:-1, c])
            lengths = self.lengths[_IDS + _ID_CONTEXTS * c + 4]  # those of the middle ranks
            out[:-1, c] = lengths[symbol] + bits.EXTRA[symbol]
        return out

    def classify(self, ids: Ints, costs: NDArray[np.uint8]) -> Ints:
        """The cheapest class of each token."""
        if self.classes == 1:
            return np.zeros(len(ids), np.int64)
        own = (
            self.lengths[0, bits.symbol_of(np.arange(self.classes))]
            + bits.EXTRA[bits.symbol_of(np.arange(self.classes))]
        )
        found = [costs[part].sum(1, dtype=np.uint16) + own for part in np.array_split(ids, len(ids) // 256 + 1)]
        return np.concatenate(found).argmin(1)

    def fields(self, tokens: Tokens, classes: Ints) -> tuple[Ints, Ints]:
        """Context and number of each field, [N, 4 + 2k]; the context is -1 where there is none."""
        n, k = tokens.ids.shape
        count = (tokens.ids >= 0).sum(1)
        level = self.grid.level(tokens.logprobs)
        position = self.positions()[tokens.ids, classes[:, None]].astype(np.int64)
        there = np.arange(k) < count[:, None]
        order = np.lexsort((position, np.where(there, level, len(self.grid.minus))), axis=1)
        ids, level, position = (np.take_along_axis(a, order, 1) for a in (tokens.ids, level, position))
        context, number = np.full((n, _HEADER + 2 * k), -1), np.zeros((n, _HEADER + 2 * k), np.int64)
        context[:, 0], number[:, 0] = 0, classes
        context[:, 1], number[:, 1] = 1, k - count
        is_own = (ids == tokens.token_ids[:, None]) & there
        context[:, 2], number[:, 2] = 2, np.where(is_own.any(1), is_own.argmax(1), k + tokens.token_ids)
        context[:, 3], number[:, 3] = 3, self.grid.level(tokens.tail)
        before = np.concatenate([np.zeros((n, 1), np.int64), level[:, :-1]], 1)
        step = level - before
        value_context = self._value_ctx + self.grid.bucket[before]
        value_context[:, 0] = _FIRST_VALUE
        tie = (step == 0) & (np.arange(k) > 0)
        floor = np.where(tie, np.concatenate([np.zeros((n, 1), np.int64), position[:, :-1] + 1], 1), 0)
        id_context = self._id_ctx + tie + _ID_CONTEXTS * classes[:, None]
        context[:, _HEADER::2], number[:, _HEADER::2] = np.where(there, value_context, -1), np.where(there, step, 0)
        context[:, _HEADER + 1 :: 2] = np.where(there, id_context, -1)
        number[:, _HEADER + 1 :: 2] = np.where(there, position - floor, 0)
        return context, number

    def encode(self, tokens: Tokens, costs: NDArray[np.uint8]) -> bytes:
        """The tokens of one completion: bits of each token, then the tokens."""
        context, number = self.fields(tokens, self.classify(tokens.ids, costs))
        symbol = bits.symbol_of(number)
        at = context * _SYMBOLS + symbol
        length = self.code.lengths.ravel().take(at, mode="clip").astype(np.int64)
        value = self.code.codes.ravel().take(at, mode="clip") | (number - bits.FIRST[symbol]) << length
        total = np.where(context >= 0, length + bits.EXTRA[symbol], 0)
        sizes = total.sum(1)
        width = max(8, int(sizes.max()).bit_length())
        packed = bits.pack(
            np.concatenate([sizes, value.ravel()]), np.concatenate([np.full(len(sizes), width), total.ravel()])
        )
        return bytes([width]) + packed

    # -- reading

    def decode(self, pieces: Sequence[tuple[bytes, int]]) -> list[Tokens]:
        """What `encode` wrote, of each piece with its number of tokens; several at once take less time.

        ValueError where the bits are not those of so many tokens.
        """
        for data, n in pieces:
            if not data or not 8 <= data[0] <= 40 or 8 * (len(data) - 1) < n * data[0]:
                raise ValueError(f"{len(data)} bytes cannot hold {n} tokens")
        stream = bits.Stream(b"".join(data for data, _ in pieces))
        starts, ends, byte = [], [], 0
        for data, n in pieces:
            sizes = stream.fixed(8 * byte + 8, data[0], n)
            ends.append(np.minimum(8 * byte + 8 + n * data[0] + np.cumsum(sizes), 1 << 50))
            starts.append(ends[-1] - sizes)
            byte += len(data)
            if n and (ends[-1].max() > 8 * byte or starts[-1].min() < 0):
                raise ValueError("the bits end early")
        found = self._decode(stream, np.concatenate(starts), np.concatenate(ends))
        cuts = np.cumsum([n for _, n in pieces])[:-1]
        return [Tokens(*parts) for parts in zip(*(np.split(array, cuts) for array in found))]

    def _decode(self, stream: bits.Stream, at: Ints, end: Ints) -> Tokens:
        header = []
        for context in range(_HEADER):
            number, used = self.code.read(stream.window(at), context << bits.MAX_CODE)
            header.append(number)
            at = at + used
        classes, lacking, own, tail = header
        if (classes >= self.classes).any() or (lacking > self.k).any() or (tail >= len(self.grid.minus)).any():
            raise ValueError("a class, a count or a level is out of range")
        level, ids, at = self._entries(stream, at, classes, self.k - lacking)
        if (at != end).any():
            raise ValueError("a token's bits are not used up")
        return self._tokens(own, ids, level, tail)

    def _entries(self, stream: bits.Stream, at: Ints, classes: Ints, count: Ints) -> tuple[Ints, Ints, Ints]:
        """Levels and ids [N, k] of the entries from `at`, and where they end."""
        n, k, top = len(at), self.k, len(self.grid.minus) - 1
        levels, positions = np.zeros((k, n), np.int64), np.zeros((k, n), np.int64)
        class_table = (_ID_CONTEXTS * classes) << bits.MAX_CODE
        level = position = np.zeros(n, np.int64)
        full = bool((count == k).all())
        for rank in range(k if n else 0):
            window = stream.window(at)
            step, used = self.code.read(window, self._value_tables[rank].take(level, mode="clip"))
            level = level + step
            tie = step == 0 if rank else step < 0
            gap, more = self.code.read(window >> used, class_table + (self._id_tables[rank] + (tie << bits.MAX_CODE)))
            position = gap + tie * (position + 1)
            levels[rank], positions[rank] = level, position
            at = at + used + more if full else np.where(rank < count, at + used + more, at)
        level_Nk, position_Nk = np.minimum(levels.T, top), positions.T
        many = self._many[classes][:, None]
        start = np.where(position_Nk < many, self._from[classes][:, None], len(self.favourites) - many)
        ids = self._list.take(start + position_Nk, mode="clip")
        if full:
            return level_Nk, ids, at
        there = np.arange(k) < count[:, None]
        return np.where(there, level_Nk, top), np.where(there, ids, -1), at

    def _tokens(self, own: Ints, ids: Ints, level: Ints, tail: Ints) -> Tokens:
        """Numbers to distributions that sum to 1."""
        inside = own < self.k
        token_ids = np.where(
            inside, np.take_along_axis(ids, np.minimum(own, self.k - 1)[:, None], 1)[:, 0], own - self.k
        )
        total = self.grid.weight[level].sum(1) + self.grid.weight[tail]
        shift = np.log(np.where(total > 0, total, 1.0))
        logprobs = np.minimum(-self.grid.minus[level] - shift[:, None], 0).astype(np.float32)
        return Tokens(token_ids, ids, logprobs, np.minimum(-self.grid.minus[tail] - shift, 0).astype(np.float32))

    # -- as bytes

    def to_bytes(self) -> bytes:
        """Lists and code lengths, compressed."""
        where = np.empty(self.vocab, np.int64)
        where[self.order] = np.arange(self.vocab)
        listed = self.order[: self.layout.ordered].astype("<u4")
        planes = [listed, where[self.favourites].astype("<u4")]
        raw = b"".join(np.ascontiguousarray(_delta(p).view(np.uint8).reshape(-1, 4).T).tobytes() for p in planes)
        return zlib.compress(raw + self.lengths.tobytes(), 9)


def from_bytes(data: bytes, layout: Layout, k: int, vocab: int) -> Codebook:
    """What `to_bytes` wrote; ValueError where it is not a codebook of this layout."""
    classes, many = len(layout.favourites), sum(layout.favourites)
    if not (1 <= classes <= 256 and 0.0005 <= layout.step <= 0.1 and 0 <= layout.ordered <= vocab):
        raise ValueError("the codebook's layout is out of range")
    if min(layout.favourites) < 0 or max(layout.favourites) > vocab:
        raise ValueError("the codebook's favourites are out of range")
    contexts = n_contexts(classes)
    size = 4 * (layout.ordered + many) + contexts * _SYMBOLS
    try:
        raw = zlib.decompressobj().decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"the codebook is damaged: {error}") from error
    if len(raw) != size:
        raise ValueError(f"the codebook has {len(raw)} bytes, not {size}")
    listed = _sum(raw[: 4 * layout.ordered])
    ranks = _sum(raw[4 * layout.ordered : 4 * (layout.ordered + many)])
    lengths = np.frombuffer(raw, np.uint8, offset=4 * (layout.ordered + many)).reshape(contexts, _SYMBOLS)
    if (listed >= vocab).any() or (ranks >= vocab).any() or len(np.unique(listed)) != len(listed):
        raise ValueError("the codebook lists an id twice or one outside the vocabulary")
    order = np.concatenate([listed, np.setdiff1d(np.arange(vocab), listed)])
    return Codebook(layout, k, order, order[ranks], lengths)


def _delta(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return np.diff(values, prepend=np.uint32(0)).astype("<u4")


def _sum(raw: bytes) -> Ints:
    planes = np.frombuffer(raw, np.uint8).reshape(4, -1)
    return np.cumsum(np.ascontiguousarray(planes.T).view("<u4")[:, 0], dtype=np.uint32).astype(np.int64)
