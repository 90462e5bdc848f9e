"""What is kept of a teacher's logits is right to the last bit that matters, and a bad store is never read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.distributions import Distribution, TopK, Writer, capture, full_logprobs, metadata, problem_of
from distill.errors import DatasetError, InputError


def _store(path: Path, items: list[Distribution], vocab: int, dtype: str = "F32") -> TopK:
    k = items[0].topk_ids.shape[1]
    writer = Writer(path.parent, k, dtype=dtype)
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


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_a_store_gives_back_what_was_written(tmp_path: Path, dtype: str) -> None:
    items = [_item(n, 50, 8, n) for n in (3, 1, 7)]
    store = _store(tmp_path / "s.safetensors", items, 50, dtype)
    assert len(store) == 3 and store.k == 8 and store.tokens == 11
    for row, item in enumerate(items):
        for name, tolerance in (("token_ids", 0), ("topk_ids", 0), ("tail_logprob", 0), ("topk_logprobs", 5e-3)):
            exact = 0 if dtype == "F32" else tolerance
            np.testing.assert_allclose(getattr(store[row], name), getattr(item, name), atol=exact, rtol=0)
    assert (pickle.loads(pickle.dumps(store))[1].topk_ids == items[1].topk_ids).all()


def test_any_safetensors_reader_reads_the_store(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    item = _item(4, 30, 5)
    _store(tmp_path / "s.safetensors", [item], 30)
    tensors = load_file(tmp_path / "s.safetensors")
    assert tensors["offsets"].tolist() == [0, 4] and torch.equal(tensors["topk_ids"], torch.from_numpy(item.topk_ids))


def test_full_logprobs_sum_to_one() -> None:
    item = _item(4, 30, 5)
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
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_row_that_is_no_distribution_is_refused(tmp_path: Path, message: str) -> None:
    store = _store(tmp_path / "s.safetensors", [_item(4, 30, 5), FAULTS[message](_item(4, 30, 5))], 30)
    assert len(store[0].token_ids) == 4
    with pytest.raises(DatasetError, match=f"row 1.*{message}"):
        store[1]


def _edit_header(path: Path, change) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("topk_ids"),
        lambda h: h["__metadata__"].update(schema="kd-topk/9"),
        lambda h: h["__metadata__"].update(k="4"),
        lambda h: h["__metadata__"].pop("vocab_size"),
        lambda h: h["topk_ids"].update(shape=[5, 4]),
        lambda h: h["offsets"].update(dtype="F64"),
        lambda h: h["token_ids"].update(data_offsets=[0, 10**12]),
        lambda h: h["tail_logprob"].update(dtype="I32"),
    ],
)
def test_a_store_with_a_lying_header_is_refused(tmp_path: Path, change) -> None:
    path = tmp_path / "s.safetensors"
    _store(path, [_item(4, 30, 5)], 30)
    _edit_header(path, change)
    with pytest.raises(DatasetError, match=r"s\.safetensors"):
        TopK(path)


@pytest.mark.parametrize("offsets", [[0, 5], [1, 4], [0, -1], [4, 0]])
def test_offsets_that_leave_the_arrays_are_refused(tmp_path: Path, offsets: list[int]) -> None:
    path = tmp_path / "s.safetensors"
    _store(path, [_item(4, 30, 5)], 30)
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start : start + 16] = np.asarray(offsets, "<i8").tobytes()
    path.write_bytes(raw)
    with pytest.raises(DatasetError, match="offsets"):
        TopK(path)


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
