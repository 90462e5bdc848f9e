"""Training of the codec's codebook on a sample of the store: classes of tokens, their favourite ids, code lengths.

Tokens are put into classes as in vector quantisation: each goes where its ids are cheapest, then each class takes the
frequencies of its tokens. Classes pay for their lists in the store, so a small store gets few.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distill.data.store import bits
from distill.data.store.bits import Ints
from distill.data.store.codec import _SYMBOLS, STEP, Codebook, Layout, Tokens, n_contexts

SAMPLE = 1 << 22
"""Entries that a codebook is trained on at most."""
_AT_ONCE = 1024
"""Tokens looked at together: they stay in the cache."""
_ROUNDS = 6
_TOKENS_A_CLASS = 512
_MOST_CLASSES = 64
_PRIOR = 2000.0
"""Ids by which a class leans on the frequencies of all."""
_LEAST_USES, _LEAST_LIFT, _MOST_FAVOURITES = 6, 1.5, 2048
"""A favourite's uses in the sample, and how much more frequent than in all it is; a place in a list costs 1.5 bytes."""


def train(sample: Tokens, k: int, vocab: int, *, step: float = STEP, short: bool = False) -> Codebook:
    """A codebook for a store of which `sample` is a fair part (or all)."""
    classes = max(min(len(sample.ids) // _TOKENS_A_CLASS, _MOST_CLASSES), 1)
    counts = np.bincount(sample.ids[sample.ids >= 0], minlength=vocab)
    listed = int((counts > 1).sum())
    order = np.lexsort((np.arange(vocab), -counts))
    order = np.concatenate([_by_number(order[:listed]), np.sort(order[listed:])])
    of = _clusters(sample.ids, counts, classes)
    favourites = _favourites(sample.ids, of, counts, classes, order) if classes > 1 else [np.zeros(0, np.int64)]
    layout = Layout(step, listed, tuple(map(len, favourites)), short)
    lengths = np.zeros((n_contexts(classes), _SYMBOLS), np.uint8)
    lengths[:, :2] = 1
    book = Codebook(layout, k, order, np.concatenate(favourites), lengths)
    book = Codebook(layout, k, order, book.favourites, _lengths(book, sample, of, vocab))
    of = book.classify(sample.ids, book.costs())
    return Codebook(layout, k, order, book.favourites, _lengths(book, sample, of, vocab))


def _clusters(ids: Ints, counts: Ints, classes: int) -> Ints:
    """The class of each token."""
    of = ids[:, 0] * 2654435761 % 4294967296 % classes if len(ids) else np.zeros(0, np.int64)
    vocab, k = len(counts), ids.shape[1]
    share = (counts / max(counts.sum(), 1)).astype(np.float32)
    flat, there = ids.ravel(), ids.ravel() >= 0
    for _ in range(_ROUNDS if classes > 1 else 0):
        uses = np.bincount((flat * classes + np.repeat(of, k))[there], minlength=vocab * classes)
        table = uses.reshape(vocab, classes).astype(np.float32)
        total = table.sum(0)
        sizes = np.bincount(of, minlength=classes) + 1
        bits_ = np.zeros((vocab + 1, classes), np.float32)
        bits_[:-1] = np.log2(total + _PRIOR) - np.log2(np.maximum(table + _PRIOR * share[:, None], 1e-9))
        own = -np.log2(sizes / sizes.sum()).astype(np.float32)
        parts = np.array_split(ids, len(ids) // 256 + 1)
        of = np.concatenate([(bits_[part].sum(1) + own).argmin(1) for part in parts])
    return of


def _favourites(ids: Ints, of: Ints, counts: Ints, classes: int, order: Ints) -> list[Ints]:
    where = np.empty(len(order), np.int64)
    where[order] = np.arange(len(order))
    share = counts / max(counts.sum(), 1)
    out = []
    for c in range(classes):
        mine = ids[of == c]
        uses = np.bincount(mine[mine >= 0], minlength=len(order))
        liked = np.flatnonzero((uses >= _LEAST_USES) & (uses > _LEAST_LIFT * share * uses.sum()))
        liked = liked[np.lexsort((liked, -uses[liked]))][:_MOST_FAVOURITES]
        out.append(order[_by_number(where[liked])])
    return out


def _by_number(ids: Ints) -> Ints:
    """`ids` with those of one symbol sorted: places under one symbol cost the same, and sorted they store better."""
    return ids[np.lexsort((ids, bits.symbol_of(np.arange(len(ids)))))]


def _lengths(book: Codebook, sample: Tokens, of: Ints, vocab: int) -> NDArray[np.uint8]:
    """Code lengths from how often each number occurs in each context; every number that may occur has a code."""
    contexts, top = n_contexts(book.classes), len(book.grid.minus)
    flat = np.zeros(contexts * _SYMBOLS, np.int64)
    for at in range(0, len(of), _AT_ONCE):
        part = slice(at, at + _AT_ONCE)
        context, number = book.fields(sample.only(part), of[part])
        there = context >= 0
        symbols = context[there] * _SYMBOLS + bits.symbol_of(number[there])
        flat += np.bincount(symbols, minlength=len(flat))
    counts = flat.reshape(contexts, _SYMBOLS)
    sizes = [book.classes, book.k + 1 if book.layout.short else 1, book.k + vocab, top]
    possible = [bits.n_symbols(n) for n in sizes] + [bits.n_symbols(top)] * (n_contexts(0) - 4)
    possible += [bits.n_symbols(vocab + many) for many in book.layout.favourites for _ in range(8)]
    out = np.zeros((contexts, _SYMBOLS), np.uint8)
    for row, many in enumerate(possible):
        out[row, :many] = bits.code_lengths(32 * counts[row, :many] + 1)
    return out
