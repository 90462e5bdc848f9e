"""A white box's distributions: those of a plain forward pass, in batches, and whole after any kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import chat
from distill.data import toy
from distill.data.schema import Record, completion_ids
from distill.data.store import capture as capturing
from distill.data.store.capture import Spool, teacher_distributions
from distill.data.store.distributions import Distribution, problem_of
from distill.data.store.store import Writer, metadata
from distill.errors import InputError
from distill.tokenizer import toy_tokenizer
from tests.unit.train_sets import tool_episode

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
K = 8


def _box(kind: str = "llama"):
    """A random model with more rows than the tokenizer has ids, as padded vocabularies have."""
    from distill.data.teacher.local import WhiteBox

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    shape["vocab_size"] = toy_tokenizer().vocab_size + 6
    if kind == "gemma2":
        made = transformers.Gemma2Config(**shape, head_dim=16, final_logit_softcapping=2.0, sliding_window=64)
    else:
        made = transformers.LlamaConfig(**shape)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    return WhiteBox(model.eval().requires_grad_(False), toy_tokenizer(), "cpu")


def _records(n: int = 9) -> list[Record]:
    return [tool_episode(identity="multi"), *toy.build("tools", n).records]


def _plain(box, record: Record) -> tuple[list[int], torch.Tensor]:
    """[n, V] log-probabilities of the learned tokens by the definition: one sequence, all logits."""
    tokenizer, ids, rows, at = box.tokenizer, [], [], 0
    for piece in chat.segments(record.messages, record.tools):
        tokens = tokenizer.encode(piece.text)
        if piece.target and piece.message in record.learned:
            rows += range(at, at + len(tokens))
        ids += tokens
        at += len(tokens)
    with torch.inference_mode():
        logits = box.model(torch.tensor([ids])).logits[0].double()[:, : tokenizer.vocab_size]
    return [ids[row] for row in rows], torch.log_softmax(logits, -1)[[row - 1 for row in rows]]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_batched_rows_are_those_of_a_plain_forward_pass(kind: str) -> None:
    box, records = _box(kind), _records()
    for record, item in zip(records, teacher_distributions(box, records, K), strict=True):
        ids, exact = _plain(box, record)
        assert item.token_ids.tolist() == ids == completion_ids(record, box.tokenizer)
        assert problem_of(item, box.tokenizer.vocab_size) is None
        best = exact.topk(K, -1)
        np.testing.assert_allclose(item.topk_logprobs, best.values, atol=2e-4)
        np.testing.assert_allclose(exact.gather(1, torch.from_numpy(item.topk_ids).long()), best.values, atol=2e-4)
        rest = exact.scatter(1, best.indices, -torch.inf).logsumexp(1)
        np.testing.assert_allclose(item.tail_logprob, rest, atol=2e-4)


def test_padding_changes_nothing_beyond_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    box, records = _box(), _records()
    together = list(teacher_distributions(box, records, K))
    monkeypatch.setattr(capturing, "BATCH_TOKENS", 1)
    for one, other in zip(teacher_distributions(box, records, K), together, strict=True):
        np.testing.assert_allclose(one.topk_logprobs, other.topk_logprobs, atol=1e-5)
        np.testing.assert_allclose(one.tail_logprob, other.tail_logprob, atol=1e-5)


def test_logits_exist_for_learned_positions_only_and_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    box, records, sizes = _box(), _records(), []
    monkeypatch.setattr(capturing, "LOGIT_ROWS", 7)
    box.model.get_output_embeddings().register_forward_hook(lambda layer, given, out: sizes.append(out[..., 0].numel()))
    learned = sum(len(item.token_ids) for item in teacher_distributions(box, records, K))
    assert max(sizes) <= 7 and learned <= sum(sizes) <= learned + 2 * len(records)


def test_one_forward_pass_serves_all_turns_of_a_record() -> None:
    box, passes = _box(), []
    box.model.register_forward_hook(lambda *_: passes.append(1))
    list(teacher_distributions(box, [tool_episode()], K))
    assert len(passes) == 1


def test_windows_and_batches_keep_the_order_and_bound_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    box, records, heard = _box(), _records(12), []
    monkeypatch.setattr(capturing, "WINDOW", 5)
    monkeypatch.setattr(capturing, "BATCH_TOKENS", 300)
    shapes: list[tuple[int, int]] = []
    box.model.model.embed_tokens.register_forward_hook(lambda layer, given, out: shapes.append(tuple(out.shape[:2])))
    items = list(teacher_distributions(box, iter(records), K, on_tokens=heard.append))
    assert [item.token_ids.tolist() for item in items] == [completion_ids(r, box.tokenizer) for r in records]
    assert sum(heard) == sum(len(item.token_ids) for item in items)
    assert max(b for b, _ in shapes) > 1 and all(b == 1 or b * t <= 300 for b, t in shapes)


def test_a_record_longer_than_the_teacher_reads_is_named() -> None:
    with pytest.raises(InputError, match=r"record long: \d+ tokens, the teacher reads 512"):
        list(teacher_distributions(_box(), [tool_episode("1 " * 600, identity="long")], K))


def _store(path: Path, items: Iterator[Distribution]) -> bytes:
    vocab = toy_tokenizer().vocab_size
    writer = Writer(path.parent, K, vocab_size=vocab)
    for item in items:
        writer.add(item)
    writer.finish(path, metadata(tokenizer_sha256="t", template_sha256="c", teacher="x", k=K, temperature=1.0,
                                 vocab_size=vocab, run_id="r"))  # fmt: skip
    writer.close()
    return path.read_bytes()


CHILD = """
import sys
from pathlib import Path
from distill.data.store import capture
from tests.unit.test_data_capture import _box, _records, K
capture.BATCH_TOKENS, capture.WINDOW = 250, 6
for n, item in enumerate(capture.teacher_distributions(
        _box(), _records(20), K, identity="x", spool=Path(sys.argv[1]), on_tokens=lambda n: print(n, flush=True))):
    pass
"""


def test_a_capture_killed_at_any_instant_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capturing, "BATCH_TOKENS", 250)
    monkeypatch.setattr(capturing, "WINDOW", 6)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = _store(tmp_path / "whole", teacher_distributions(_box(), _records(20), K, identity="x"))
    spool, sizes = tmp_path / "d" / "capture.spool", []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for kill_after in (1, 3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(spool)], stdout=subprocess.PIPE, env=environment)
        assert child.stdout is not None
        for _ in range(kill_after):
            assert child.stdout.readline().strip()
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        sizes.append(spool.stat().st_size)
    with open(spool, "ab") as file:
        file.write(b"kdsp" + bytes(60))  # as a kill amid a write leaves it
    box, passes = _box(), []
    box.model.register_forward_hook(lambda *_: passes.append(1))
    batches: list[int] = []
    again = _store(
        tmp_path / "again",
        teacher_distributions(box, _records(20), K, identity="x", spool=spool, on_tokens=batches.append),
    )
    torch.set_num_threads(threads)
    assert again == whole and sizes[1] >= sizes[0] > 0
    assert 0 < len(passes) <= len(batches) - 3


def test_another_teacher_or_other_tokens_take_nothing_from_the_spool(tmp_path: Path) -> None:
    box, passes = _box(), []
    box.model.register_forward_hook(lambda *_: passes.append(1))
    for identity, k, n, fresh in (
        ("a", K, 3, True),
        ("a", K, 3, False),
        ("b", K, 3, True),
        ("a", 4, 3, True),
        ("a", K, 4, True),
    ):
        before = len(passes)
        list(teacher_distributions(box, _records(n), k, identity=identity, spool=tmp_path / "s"))
        assert (len(passes) > before) == fresh


@settings(deadline=None, max_examples=100)
@given(st.lists(st.binary(max_size=40), max_size=5), st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_a_damaged_spool_gives_what_was_put_or_nothing(tmp_path_factory, blocks, place, flip, cut) -> None:
    path = tmp_path_factory.mktemp("spool") / "s"
    spool = Spool(path)
    keys = [bytes([i]) * 32 for i in range(len(blocks))]
    for key, block in zip(keys, blocks):
        spool.put(key, block)
    spool.close()
    raw = bytearray(path.read_bytes())
    if raw and cut:
        del raw[place % len(raw) :]
    elif raw:
        raw[place % len(raw)] ^= flip
    path.write_bytes(raw)
    spool = Spool(path)
    for key, block in zip(keys, blocks):
        assert spool.get(key) in (block, None)
    spool.put(b"n" * 32, b"new")
    spool.close()
    spool = Spool(path)
    assert spool.get(b"n" * 32) == b"new"
    spool.close()


def test_a_block_whose_bytes_changed_is_not_given(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    spool.put(b"a" * 32, b"first")
    spool.put(b"b" * 32, b"second")
    spool.close()
    raw = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(raw.replace(b"first", b"fi_st"))
    spool = Spool(tmp_path / "s")
    assert spool.get(b"a" * 32) is None and spool.get(b"b" * 32) == b"second"
    spool.close()
