"""What is kept of a teacher's logits is right to the last bit that matters, and a bad store is never read."""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.store import store as stores
from distill.data.store.distributions import (
    Distribution,
    capture,
    divergence,
    full_logprobs,
    problem_of,
)
from distill.data.store.store import TopK, Writer, metadata
from distill.errors import DatasetError, InputError


def _store(path: Path, items: Sequence[Distribution], vocab: int, codec: str = "exact") -> TopK:
    k = items[0].topk_ids.shape[1]
    writer = Writer(path.parent, k, vocab_size=vocab, codec=codec)
    for item in items:
        writer.add(item)
    writer.finish(path, metadata(tokenizer_sha256="t", template_sha256="c", teacher="x", k=k, temperature=1.0,
                                 vocab_size=vocab, run_id="r"))  # fmt: skip
    writer.close()
    return TopK(path)


def _item(n: int, vocab: int, k: int, seed: int = 0, scale: float = 3.0) -> Distribution:
    generator = torch.Generator().manual_seed(seed)
    kept = capture(torch.randn(n, vocab, generator=generator) * scale, k)
    ids = torch.randint(vocab, (n,), generator=generator).numpy().astype(np.int32)
    return Distribution(ids, kept.ids, kept.logprobs, kept.tail)


def _shortened(item: Distribution, counts: Sequence[int]) -> Distribution:
    """The same with fewer entries of each token; what is dropped goes into the tail."""
    ids, lp, tail = item.topk_ids.copy(), item.topk_logprobs.copy(), item.tail_logprob.astype(np.float64)
    for row, count in enumerate(counts):
        tail[row] = np.logaddexp.reduce([tail[row], *lp[row, count:].astype(np.float64)]) if count else -np.inf
        ids[row, count:], lp[row, count:] = -1, -np.inf
    return Distribution(item.token_ids, ids, lp, np.minimum(tail, 0).astype(np.float32))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6), st.integers(2, 300), st.integers(1, 40), st.integers(0, 2**31), st.floats(0.01, 40),
    st.sampled_from([0.5, 1.0, 2.0]),
)  # fmt: skip
def test_capture_agrees_with_log_softmax_in_double(n, vocab, k, seed, scale, temperature) -> None:
    k = min(k, vocab)
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    exact = torch.log_softmax(logits.double() / temperature, -1)
    kept = capture(logits, k, temperature=temperature)
    ids = torch.from_numpy(kept.ids).long()
    np.testing.assert_allclose(kept.logprobs, exact.gather(-1, ids), atol=3e-5, rtol=1e-5)
    assert (exact.gather(-1, ids) >= exact.topk(k, -1).values - 1e-5).all()
    rest = exact.scatter(-1, ids, -torch.inf).logsumexp(-1)
    np.testing.assert_allclose(kept.tail, rest, atol=3e-5, rtol=1e-5)
    assert problem_of(Distribution(kept.ids[:, 0], kept.ids, kept.logprobs, kept.tail), vocab) is None


def test_a_tail_far_below_rounding_is_still_exact() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 7] = 60.0
    assert capture(logits, 1).tail[0] == pytest.approx(np.log(999) - 60, abs=1e-4)


def test_nothing_remains_when_everything_is_kept() -> None:
    assert capture(torch.randn(2, 5), 5).tail.tolist() == [-np.inf, -np.inf]


def test_k_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="k = 6"):
        capture(torch.randn(2, 5), 6)


def test_the_exact_codec_gives_back_every_bit(tmp_path: Path) -> None:
    items = [_item(n, 50, 8, n) for n in (3, 1, 7)]
    items.append(_shortened(items[2], [8, 0, 3, 1, 0, 8, 5]))
    store = _store(tmp_path / "s.safetensors", items, 50)
    assert len(store) == 4 and store.k == 8 and store.tokens == 18
    for row, item in enumerate(items):
        for name in item._fields:
            np.testing.assert_array_equal(getattr(store[row], name), getattr(item, name))
    assert json.loads(store.metadata["kl_to_exact"]) == {"mean": 0.0, "p99": 0.0, "max": 0.0}
    assert (pickle.loads(pickle.dumps(store))[1].topk_ids == items[1].topk_ids).all()


def test_several_rows_at_once_are_those_one_by_one(tmp_path: Path) -> None:
    for codec in stores.CODECS:
        items = [_item(n, 300, 20, n) for n in (3, 40, 7)] + [_shortened(_item(4, 300, 20), [0, 20, 7, 1])]
        store = _store(tmp_path / f"{codec}.safetensors", items, 300, codec)
        for row, item in zip((3, 0, 2), store.take([3, 0, 2])):
            for one, other in zip(item, store[row]):
                np.testing.assert_array_equal(one, other)


def test_the_store_says_what_it_holds_and_any_safetensors_reader_reads_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    store = _store(tmp_path / "s.safetensors", [_item(4, 30, 5)], 30, "compact")
    tensors = load_file(tmp_path / "s.safetensors")
    assert tensors["tokens"].tolist() == [0, 4] and len(tensors["rows"]) == tensors["offsets"][-1]
    wanted = {"alignment", "tokenizer_sha256", "template_sha256", "teacher", "teacher_sha256", "k", "temperature",
              "kind", "tail", "vocab_size", "run_id", "codec", "layout", "kl_to_exact"}  # fmt: skip
    assert wanted <= set(store.metadata)


def test_the_stated_divergence_is_that_of_what_is_read(tmp_path: Path) -> None:
    items = [_item(200, 800, 30, seed, scale=2.5) for seed in range(3)]
    store = _store(tmp_path / "s.safetensors", items, 800, "compact")
    kl = np.concatenate([_kl(item, store[row]) for row, item in enumerate(items)])
    stated = json.loads(store.metadata["kl_to_exact"])
    assert stated["mean"] == pytest.approx(kl.mean(), rel=0.01) and stated["max"] == pytest.approx(kl.max(), rel=0.01)
    assert stated["p99"] == pytest.approx(np.quantile(kl, 0.99), rel=0.05)


def _kl(exact: Distribution, stored: Distribution) -> np.ndarray:
    """By hand, in a loop."""
    out = []
    for row in range(len(exact.token_ids)):
        q = dict(zip(stored.topk_ids[row].tolist(), stored.topk_logprobs[row].tolist()))
        pairs = [(lp, q[i]) for i, lp in zip(exact.topk_ids[row].tolist(), exact.topk_logprobs[row].tolist())]
        pairs.append((float(exact.tail_logprob[row]), float(stored.tail_logprob[row])))
        out.append(sum(np.exp(a) * (a - b) for a, b in pairs if a > -np.inf))
    return np.asarray(out)


def test_divergence_is_that_of_the_definition() -> None:
    exact, other = _item(20, 60, 9), _item(20, 60, 9, scale=2.5)
    other = exact._replace(topk_logprobs=other.topk_logprobs, tail_logprob=other.tail_logprob)
    np.testing.assert_allclose(divergence(exact, other), _kl(exact, other), rtol=1e-4)
    assert divergence(exact, exact).max() == 0


def test_full_logprobs_sum_to_one() -> None:
    item = _shortened(_item(4, 30, 5), [5, 1, 3, 5])
    np.testing.assert_allclose(np.exp(full_logprobs(item, 30)).sum(1), 1, atol=1e-6)


def _with(item: Distribution, **change: np.ndarray) -> Distribution:
    return item._replace(**change)


FAULTS = {
    "outside 0..29": lambda d: _with(d, topk_ids=np.where(d.topk_ids == d.topk_ids[0, 0], 30, d.topk_ids)),
    "an id outside": lambda d: _with(d, token_ids=np.full_like(d.token_ids, -1)),
    "sorted": lambda d: _with(d, topk_logprobs=d.topk_logprobs[:, ::-1], topk_ids=d.topk_ids[:, ::-1]),
    "NaN or above 0": lambda d: _with(d, topk_logprobs=np.full_like(d.topk_logprobs, np.nan)),
    "above 0": lambda d: _with(d, tail_logprob=np.full_like(d.tail_logprob, 0.1)),
    "sum to": lambda d: _with(d, tail_logprob=np.zeros_like(d.tail_logprob)),
    "twice": lambda d: _with(d, topk_ids=np.repeat(d.topk_ids[:, :1], 5, 1)),
    "absent": lambda d: _with(d, topk_ids=np.where(np.arange(5) == 2, -1, d.topk_ids)),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_is_no_distribution_is_neither_written_nor_read(
    tmp_path: Path, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [_item(4, 30, 5), FAULTS[message](_item(4, 30, 5))]
    with pytest.raises(InputError, match=message):
        _store(tmp_path / "s.safetensors", items, 30)
    with monkeypatch.context() as unchecked:
        unchecked.setattr(stores, "problem_of", lambda item, vocab: None)
        store = _store(tmp_path / "s.safetensors", items, 30)  # by a writer that does not look
    assert len(store[0].token_ids) == 4
    with pytest.raises(DatasetError, match="row 1"):
        store[1]


def _edit_header(path: Path, change) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def _reseal(header: dict, **change: str) -> None:
    """Change the metadata as someone would who knows the checksum."""
    found = header["__metadata__"]
    found.update(change)
    plain = {k: v for k, v in found.items() if k != "metadata_crc32"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    found["metadata_crc32"] = str(zlib.crc32(text.encode()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.pop("tokens"), "s.safetensors"),
        (lambda h: h["__metadata__"].update(schema="kd-topk/1"), "schema 'kd-topk/1'"),
        (lambda h: h["__metadata__"].update(temperature="2.0"), "checksums"),
        (lambda h: h["offsets"].update(dtype="F64"), "offsets is not a list of I64"),
        (lambda h: h["rows"].update(data_offsets=[0, 10**12]), "s.safetensors"),
        (lambda h: _reseal(h, k="4"), "row 0"),
        (lambda h: _reseal(h, k="-1"), "whole number k"),
        (lambda h: _reseal(h, k="9" * 5000), "whole number k"),
        (lambda h: _reseal(h, vocab_size="none"), "whole number vocab_size"),
        (lambda h: _reseal(h, codec="zip"), "codec 'zip'"),
        (lambda h: _reseal(h, layout='{"step":1e-9,"ordered":9,"favourites":[],"short":false}'), "layout"),
        (lambda h: _reseal(h, layout='{"step":0.01,"ordered":30,"favourites":[999999],"short":false}'), "favourites"),
        (lambda h: _reseal(h, layout="[" * 9000), "s.safetensors"),
    ],
)  # fmt: skip
def test_a_store_with_a_lying_header_is_refused(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "s.safetensors"
    _store(path, [_item(4, 30, 5)], 30, "compact")
    _edit_header(path, change)
    with pytest.raises(DatasetError, match=message):
        TopK(path)[0]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(stores.CODECS), st.integers(0, 10**9), st.integers(1, 255), st.booleans())
def test_a_damaged_store_is_an_error_or_reads_as_before(tmp_path_factory, codec, place, flip, cut) -> None:
    path, items = _damaged(codec, tmp_path_factory)
    raw = bytearray(_ORIGINAL[codec])
    place %= len(raw)
    if cut:
        del raw[place:]
    else:
        raw[place] ^= flip
    path.write_bytes(raw)
    try:
        store = TopK(path)
        found = [store[row] for row in range(len(store))]
    except DatasetError:
        return
    for item, expected in zip(found, items, strict=True):
        for one, other in zip(item, expected):
            np.testing.assert_array_equal(one, other)


_ORIGINAL: dict[str, bytes] = {}
_ITEMS: dict[str, list[Distribution]] = {}


def _damaged(codec: str, tmp_path_factory) -> tuple[Path, list[Distribution]]:
    path = tmp_path_factory.getbasetemp() / f"{codec}.safetensors"
    if codec not in _ORIGINAL:
        store = _store(path, [_item(5, 40, 6), _shortened(_item(3, 40, 6, 1), [6, 0, 2])], 40, codec)
        _ORIGINAL[codec] = path.read_bytes()
        _ITEMS[codec] = [store[row] for row in range(2)]
    return path, _ITEMS[codec]


def test_a_truncated_or_absent_store_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    _store(path, [_item(4, 30, 5)], 30)
    path.write_bytes(path.read_bytes()[:-9])
    for bad in (path, tmp_path / "none.safetensors"):
        with pytest.raises(DatasetError, match=bad.name):
            TopK(bad)


def test_a_row_that_is_not_there_is_refused(tmp_path: Path) -> None:
    store = _store(tmp_path / "s.safetensors", [_item(4, 30, 5)], 30)
    for row in (-1, 1):
        with pytest.raises(DatasetError, match=f"no row {row}"):
            store[row]


def test_a_store_of_no_completions_can_be_written_and_opened(tmp_path: Path) -> None:
    for codec in stores.CODECS:
        writer = Writer(tmp_path, 5, vocab_size=30, codec=codec)
        assert writer.finish(tmp_path / codec, metadata(tokenizer_sha256="t", template_sha256="c", teacher="x", k=5,
                             temperature=1.0, vocab_size=30, run_id="r")) == {}  # fmt: skip
        assert len(TopK(tmp_path / codec)) == 0
        writer.close()
