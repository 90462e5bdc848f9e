"""Bit-level parts of the codec: numbers as a symbol and raw bits, Huffman codes of bounded length, bit streams.

A number below 8 is its own symbol; above, each octave has four symbols, followed by raw bits. Bits go into bytes from
the lowest up. All of it is vectorised; nothing loops over tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

MAX_CODE = 11
"""Bits of the longest code."""
_CODE_MASK = (1 << MAX_CODE) - 1
_DIRECT, _OCTAVES = 8, 17
MAX_NUMBER = _DIRECT << _OCTAVES
"""Numbers are below it."""


def _symbols() -> tuple[Ints, Ints]:
    """The first number of each symbol, and how many raw bits follow it."""
    extra = np.concatenate([np.zeros(_DIRECT, np.int64), np.repeat(np.arange(1, _OCTAVES + 1), 4)])
    first = np.concatenate([[0], np.cumsum(np.int64(1) << extra)[:-1]])
    return first, extra


FIRST, EXTRA = _symbols()
EXTRA_MASK = (np.int64(1) << EXTRA) - 1


def symbol_of(numbers: NDArray[np.integer]) -> Ints:
    """The symbol of each number (0 to MAX_NUMBER - 1)."""
    x = np.asarray(numbers, np.int64)
    octave = np.frexp(np.maximum(x, _DIRECT).astype(np.float64))[1].astype(np.int64) - 4  # 8..15 -> 0
    return np.where(x < _DIRECT, x, _DIRECT + 4 * octave + ((x >> (octave + 1)) & 3))


def n_symbols(numbers: int) -> int:
    """How many symbols the numbers 0 to `numbers` - 1 take."""
    return int(symbol_of(np.asarray([max(numbers - 1, 0)]))[0]) + 1


def code_lengths(counts: Sequence[int] | Ints) -> NDArray[np.uint8]:
    """Lengths of a Huffman code for positive counts, at most MAX_CODE; a lone symbol takes no bits."""
    weights = np.asarray(counts, np.int64)
    floor = 0
    while True:
        lengths = _huffman(np.maximum(weights, floor).tolist())
        if max(lengths) <= MAX_CODE:
            return np.asarray(lengths, np.uint8)
        floor = max(2 * floor, int(weights.sum()) >> MAX_CODE, 1)  # rare numbers count as less rare, until it fits


def _huffman(weights: list[int]) -> list[int]:
    heap: list[tuple[int, int, list[int]]] = [(w, i, [i]) for i, w in enumerate(weights)]
    heapq.heapify(heap)
    lengths = [0] * len(weights)
    while len(heap) > 1:
        a, _, left = heapq.heappop(heap)
        b, order, right = heapq.heappop(heap)
        for leaf in left + right:
            lengths[leaf] += 1
        heapq.heappush(heap, (a + b, order, left + right))
    return lengths


class Code(NamedTuple):
    """Huffman codes of several contexts, [contexts, symbols] each, and what decodes them."""

    lengths: NDArray[np.uint8]
    codes: Ints
    """Bit-reversed: the first bit is the lowest."""
    lookup: NDArray[np.int32]
    """[contexts << MAX_CODE]: symbol << 4 | length of what the next MAX_CODE bits begin with."""

    def read(self, window: Ints, table: Ints | int) -> tuple[Ints, Ints]:
        """The number that each window begins with, in the context `table` >> MAX_CODE, and the bits it takes."""
        entry = self.lookup.take((window & _CODE_MASK) + table)
        symbol, length = entry >> 4, entry & 15
        number = FIRST.take(symbol) + ((window >> length) & EXTRA_MASK.take(symbol))
        return number, length + EXTRA.take(symbol)


def make_code(lengths: NDArray[np.uint8]) -> Code | None:
    """The canonical codes of [contexts, symbols] lengths; None unless each context's are those of a full code.

    Length 0 is a symbol that does not occur; where all are 0, the first is the only one and takes no bits.
    """
    contexts = len(lengths)
    space = np.where(lengths > 0, np.int64(1) << (MAX_CODE - np.minimum(lengths, MAX_CODE).astype(np.int64)), 0)
    space[~lengths.any(1), 0] = 1 << MAX_CODE
    if (lengths > MAX_CODE).any() or (space.sum(1) != 1 << MAX_CODE).any():
        return None
    order = np.argsort(lengths, axis=1, kind="stable")
    sorted_space = np.take_along_axis(space, order, 1)
    starts = np.empty_like(space)
    np.put_along_axis(starts, order, np.cumsum(sorted_space, 1) - sorted_space, 1)
    codes = _reverse(starts)
    entry = (order << 4 | np.take_along_axis(lengths, order, 1)).astype(np.int32)
    straight = np.repeat(entry.ravel(), sorted_space.ravel()).reshape(contexts, 1 << MAX_CODE)
    lookup = straight[:, _reverse(np.arange(1 << MAX_CODE))]
    return Code(lengths, codes, np.ascontiguousarray(lookup).ravel())


def _reverse(numbers: Ints) -> Ints:
    """The lowest MAX_CODE bits in the opposite order."""
    out = np.zeros_like(numbers)
    for bit in range(MAX_CODE):
        out |= ((numbers >> bit) & 1) << (MAX_CODE - 1 - bit)
    return out


def pack(values: Ints, lengths: Ints) -> bytes:
    """The lowest `lengths` bits of each value (at most 56), one after another."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    within = np.arange(total) - np.repeat(ends - lengths, lengths)
    return np.packbits((np.repeat(values, lengths) >> within & 1).astype(np.uint8), bitorder="little").tobytes()


class Stream:
    """Reads at many bit positions at once. Reading beyond the end gives some bits, never an error."""

    def __init__(self, data: bytes | memoryview) -> None:
        padded = bytes(data) + bytes(8)
        self._words = np.ndarray((len(padded) - 7,), "<i8", padded, strides=(1,))
        self.bits = 8 * len(data)

    def window(self, at: Ints) -> Ints:
        """At least 57 bits from each position."""
        return self._words.take(at >> 3, mode="clip") >> (at & 7)

    def fixed(self, start: int, width: int, n: int) -> Ints:
        """`n` numbers of `width` bits (at most 56) from `start`."""
        at = start + width * np.arange(n, dtype=np.int64)
        return self.window(at) & ((1 << width) - 1)
