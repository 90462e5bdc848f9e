"""The compact codec loses what it says and nothing else, and never reads beyond its bits."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.store import bench as bench_store
from distill.data.store import bits, codebook, codec
from distill.data.store.codec import Codebook, Tokens
from distill.data.store.distributions import Distribution, divergence


def _tokens(n: int, vocab: int, k: int, seed: int = 0, *, groups: int = 1, short: bool = False) -> Tokens:
    """Rows of a Zipf-like teacher whose favourites differ between `groups` of tokens."""
    rng = np.random.default_rng(seed)
    orders = [np.random.default_rng(g).permutation(vocab) for g in range(groups)]
    group = rng.integers(0, groups, n)
    base = -rng.uniform(0.3, 3, (n, 1)) * np.log(np.arange(1, vocab + 1)) + rng.normal(0, 0.7, (n, vocab))
    logits = np.empty((n, vocab))
    for row in range(n):
        logits[row, orders[group[row]]] = base[row]
    exact = logits - np.logaddexp.reduce(logits, 1)[:, None]
    ids = np.argsort(-exact, 1)[:, :k]
    kept = np.take_along_axis(exact, ids, 1)
    np.put_along_axis(exact, ids, -np.inf, 1)
    with np.errstate(divide="ignore"):
        tail = np.logaddexp.reduce(exact, 1)
    own = np.where(rng.random(n) < 0.9, ids[:, 0], rng.integers(0, vocab, n))
    if short:
        count = rng.integers(0, k + 1, n)
        gone = np.arange(k) >= count[:, None]
        tail = np.logaddexp(tail, np.logaddexp.reduce(np.where(gone, kept, -np.inf), 1))
        tail, ids, kept = np.where(count, tail, -np.inf), np.where(gone, -1, ids), np.where(gone, -np.inf, kept)
    return Tokens(own, ids, kept.astype(np.float32), np.minimum(tail, 0).astype(np.float32))


def _round(book: Codebook, tokens: Tokens) -> tuple[bytes, Tokens]:
    data = book.encode(tokens, book.costs())
    return data, book.decode([(data, len(tokens.ids))])[0]


def _as_distribution(tokens: Tokens) -> Distribution:
    return Distribution(tokens.token_ids, tokens.ids, tokens.logprobs, tokens.tail)


def _same_but_rounded(given_: Tokens, read: Tokens, step: float) -> None:
    assert (given_.token_ids == read.token_ids).all()
    assert (np.sort(given_.ids, 1) == np.sort(read.ids, 1)).all()
    assert not (read.logprobs[:, 1:] > read.logprobs[:, :-1]).any()
    kl = divergence(_as_distribution(given_), _as_distribution(read))
    assert kl.max() < given_.ids.shape[1] * step**2, kl.max()
    known = (given_.ids >= 0).any(1)
    total = np.exp(read.logprobs.astype(float)).sum(1) + np.exp(read.tail.astype(float))
    np.testing.assert_allclose(total, known, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 30), st.integers(2, 400), st.integers(1, 60), st.integers(0, 2**31), st.booleans(),
    st.sampled_from([0.002, 0.005, 0.02]),
)  # fmt: skip
def test_any_rows_come_back_with_their_ids_and_within_the_stated_loss(n, vocab, k, seed, short, step) -> None:
    k = min(k, vocab)
    tokens = _tokens(n, vocab, k, seed, short=short)
    book = codebook.train(tokens, k, vocab, step=step, short=True)
    _same_but_rounded(tokens, _round(book, tokens)[1], step)


def test_rows_unlike_the_sample_come_back_too() -> None:
    book = codebook.train(_tokens(4000, 500, 20, groups=4), 20, 500)
    assert book.classes > 1 and sum(book.layout.favourites) > 0
    for groups in (4, 40):
        tokens = _tokens(300, 500, 20, 99, groups=groups)
        _same_but_rounded(tokens, _round(book, tokens)[1], 0.005)


def test_classes_pay_where_tokens_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = _tokens(6000, 600, 24, groups=6)
    with_classes = codebook.train(tokens, 24, 600)
    monkeypatch.setattr(codebook, "_MOST_CLASSES", 1)
    without = codebook.train(tokens, 24, 600)
    sizes = [len(_round(book, tokens)[0]) + len(book.to_bytes()) for book in (with_classes, without)]
    assert sizes[0] < 0.95 * sizes[1]


def test_tiny_and_absent_tails_survive() -> None:
    lp = np.log(np.asarray([[0.9, 0.1]] * 4)).astype(np.float32)
    tail = np.asarray([-np.inf, -700.0, -30.0, -1e5], np.float32)
    tokens = Tokens(np.zeros(4, np.int64), np.tile([0, 1], (4, 1)), lp, tail)
    read = _round(codebook.train(tokens, 2, 10), tokens)[1]
    np.testing.assert_allclose(read.tail[1:], tail[1:], rtol=0.02)
    assert read.tail[0] == -np.inf


def test_the_grid_is_finest_where_the_divergence_is_most_sensitive() -> None:
    grid = codec.make_grid(0.005)
    steps = np.diff(grid.minus[:-1])
    x = grid.minus[:-2]
    np.testing.assert_allclose(steps, np.minimum(0.005 * np.exp(np.minimum(x, 80) / 2), np.maximum(0.25, x / 40)))
    for logprob in (0.0, -1.7, -9.0, -90.0, -1e5):
        level = int(grid.level(np.asarray([logprob]))[0])
        assert abs(grid.minus[level] + logprob) <= steps[min(level, len(steps) - 1)]
    assert grid.minus[int(grid.level(np.asarray([-np.inf]))[0])] == np.inf


def test_a_codebook_is_its_bytes() -> None:
    tokens = _tokens(3000, 300, 12, groups=3)
    book = codebook.train(tokens, 12, 300)
    again = codec.from_bytes(book.to_bytes(), book.layout, 12, 300)
    data = book.encode(tokens, book.costs())
    assert again.encode(tokens, again.costs()) == data and again.to_bytes() == book.to_bytes()
    for one, other in zip(again.decode([(data, 3000)])[0], book.decode([(data, 3000)])[0]):
        np.testing.assert_array_equal(one, other)


def test_training_is_a_pure_function_of_the_sample() -> None:
    tokens = _tokens(2000, 300, 12, groups=3)
    assert codebook.train(tokens, 12, 300).to_bytes() == codebook.train(tokens, 12, 300).to_bytes()


_BOOK = codebook.train(_tokens(1500, 200, 8, groups=2, short=True), 8, 200, short=True)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 60))
def test_any_bytes_are_refused_or_decode_to_that_many_tokens(data: bytes, n: int) -> None:
    try:
        (read,) = _BOOK.decode([(data, n)])
    except ValueError:
        return
    assert read.ids.shape == (n, 8) and read.ids.min(initial=0) >= -1 and read.ids.max(initial=0) < 200
    assert read.token_ids.min(initial=0) >= 0


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_bit_never_reads_past_the_end(place: int, flip: int) -> None:
    tokens = _tokens(12, 200, 8, 5, groups=2, short=True)
    data = bytearray(_BOOK.encode(tokens, _BOOK.costs()))
    data[place % len(data)] ^= flip
    try:
        (read,) = _BOOK.decode([(bytes(data), 12)])
    except ValueError:
        return
    assert read.ids.shape == (12, 8) and read.ids.max() < 200


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.integers(1, 255), st.booleans())
def test_a_damaged_codebook_is_refused_or_still_one(place: int, flip: int, cut: bool) -> None:
    data = bytearray(_BOOK.to_bytes())
    if cut:
        del data[place % len(data) :]
    else:
        data[place % len(data)] ^= flip
    try:
        book = codec.from_bytes(bytes(data), _BOOK.layout, 8, 200)
    except ValueError:
        return
    assert sorted(book.order.tolist()) == list(range(200))


def test_sizes_that_are_not_those_of_the_tokens_and_missing_bits_are_refused() -> None:
    tokens = _tokens(12, 200, 8, 5, groups=2)
    data = _BOOK.encode(tokens, _BOOK.costs())
    with pytest.raises(ValueError, match="end early"):
        _BOOK.decode([(data[:-2], 12)])
    one = _BOOK.encode(tokens.only(slice(0, 1)), _BOOK.costs())
    assert one[0] == 8 and one[1] < 255  # the size's width, the size
    with pytest.raises(ValueError, match="not used up"):
        _BOOK.decode([(one[:1] + bytes([one[1] + 1]) + one[2:] + bytes(1), 1)])


def test_a_codebook_that_lists_an_id_twice_is_refused() -> None:
    raw, listed = zlib.decompress(_BOOK.to_bytes()), 4 * _BOOK.layout.ordered
    with pytest.raises(ValueError, match="twice"):
        codec.from_bytes(zlib.compress(bytes(listed) + raw[listed:]), _BOOK.layout, 8, 200)


@pytest.mark.parametrize(
    "change",
    [
        {"step": float("nan")}, {"step": 0.0}, {"ordered": 201}, {"ordered": -1}, {"favourites": ()},
        {"favourites": (0,) * 257}, {"favourites": (-1, 1)}, {"favourites": (10**12,)}, {"ordered": 3},
    ],
)  # fmt: skip
def test_a_layout_that_is_not_the_codebooks_is_refused_before_memory_is_taken(change) -> None:
    with pytest.raises(ValueError, match="codebook"):
        codec.from_bytes(_BOOK.to_bytes(), msgspec.structs.replace(_BOOK.layout, **change), 8, 200)


@given(st.lists(st.integers(0, bits.MAX_NUMBER - 1), min_size=1))
def test_a_number_is_its_symbol_and_raw_bits(numbers: list[int]) -> None:
    x = np.asarray(numbers)
    symbol = bits.symbol_of(x)
    assert ((x - bits.FIRST[symbol] >= 0) & (x - bits.FIRST[symbol] < 1 << bits.EXTRA[symbol])).all()
    assert bits.n_symbols(int(x.max()) + 1) == symbol.max() + 1


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=76))
def test_code_lengths_are_a_full_code_and_near_the_entropy(counts: list[int]) -> None:
    lengths = bits.code_lengths(counts).astype(int)
    assert lengths.max() <= bits.MAX_CODE
    assert len(counts) == 1 or sum(2.0**-n for n in lengths) == 1
    share = np.asarray(counts) / sum(counts)
    assert (share * lengths).sum() <= -(share * np.log2(share)).sum() + 1


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20), st.data())
def test_what_is_packed_with_a_code_is_read_back(counts: list[int], data) -> None:
    lengths = np.zeros((1, len(bits.FIRST)), np.uint8)
    lengths[0, : len(counts)] = bits.code_lengths(counts)
    code = bits.make_code(lengths)
    assert code is not None
    symbols = np.asarray(data.draw(st.lists(st.integers(0, len(counts) - 1), min_size=1, max_size=30)))
    extra = bits.EXTRA[symbols]
    raw = np.asarray([data.draw(st.integers(0, (1 << int(n)) - 1)) for n in extra])
    own = lengths[0, symbols].astype(np.int64)
    stream = bits.Stream(bits.pack(code.codes[0, symbols] | raw << own, own + extra))
    at, found = np.zeros(1, np.int64), []
    for _ in symbols:
        number, used = code.read(stream.window(at), 0)
        found.append(int(number[0]))
        at = at + used
    assert found == (bits.FIRST[symbols] + raw).tolist()


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 2, 2], [12, 1], [1]])
def test_lengths_that_are_no_full_code_are_refused(lengths: Sequence[int]) -> None:
    table = np.zeros((2, len(bits.FIRST)), np.uint8)
    table[1, : len(lengths)] = lengths
    assert bits.make_code(table) is None


def test_the_opponents_form_has_its_published_size_and_the_store_beats_it() -> None:
    rng = np.random.default_rng(0)
    vocab, k = 49152, 50
    shown = np.arange(2000)  # the ids of a small text
    ids = np.stack(
        [rng.choice(shown, k, replace=False, p=1 / (shown + 5) / (1 / (shown + 5)).sum()) for _ in range(600)]
    )
    lp = np.log(np.sort(rng.dirichlet(np.full(k, 0.1), 600), 1)[:, ::-1] * 0.95 + 1e-9)
    lp -= np.logaddexp.reduce(np.concatenate([lp, np.full((600, 1), -3.0)], 1), 1)[:, None]
    tail = np.log1p(-np.exp(lp).sum(1))
    row = Distribution(ids[:, 0].astype(np.int32), ids.astype(np.int32), lp.astype(np.float32), tail.astype(np.float32))
    lines = {line["form"]: line for line in bench_store.measure([row], k, vocab)}
    assert lines["DistillKit, budget"]["bytes_per_token"] == 114
    assert lines["DistillKit, recommended"]["bytes_per_token"] == 156
    assert lines["uncompressed, 32 bits a number"]["bytes_per_token"] == 408
    assert all(line["kl_max"] == 0 for name, line in lines.items() if "uncompressed" in name or "exact" in name)
    mine, theirs = lines["this store, compact"], lines["DistillKit, recommended"]
    assert mine["bytes_per_token"] < 100 and mine["kl_mean"] <= theirs["kl_mean"]
