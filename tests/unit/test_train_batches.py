"""Records become sequences, targets and rows; the order of the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distill import chat
from distill.data import toy
from distill.data.batches import Examples, encode, plan
from distill.data.records import Dataset, write_dataset
from distill.errors import ConfigError, DatasetError
from distill.tokenizer import Tokenizer, toy_tokenizer
from distill.train.config import LengthStage
from tests.unit.train_sets import write_set


def _examples(path: Path, **options: object) -> Examples:
    return Examples(Dataset.open(path), toy_tokenizer(), "train", max_length=options.pop("max_length", 512), **options)


def test_a_sequence_is_the_prompt_that_inference_feeds_and_then_the_answer(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    for record in toy.build("tools", 8).records:
        ids, start = encode(record, tokenizer, record.teacher_text)
        prompt = chat.encode(tokenizer, record.context, record.tools, add_generation_prompt=True).ids
        assert ids[:start].tolist() == prompt
        assert tokenizer.decode(ids[start:].tolist()) == record.teacher_text + "<|im_end|>"


def test_only_the_last_turn_is_learned() -> None:
    record = toy.build("8-ball", 1).records[0]
    earlier = (chat.Message("user", "Hello"), chat.Message("assistant", "Yes"), *record.messages)
    longer = type(record)(**{name: getattr(record, name) for name in record.__struct_fields__} | {"messages": earlier})
    ids, start = encode(longer, toy_tokenizer(), longer.teacher_text)
    assert toy_tokenizer().decode(ids[start:].tolist()) == record.teacher_text + "<|im_end|>"


def test_batches_pad_on_the_right_and_point_one_token_before_each_target(tmp_path: Path) -> None:
    examples = _examples(write_set(tmp_path / "d.jsonl"))
    batch = examples.batch([0, 1, 2])
    flat = batch.ids_BT.flatten()
    assert torch.equal(flat[batch.positions_N + 1], batch.labels_N)
    assert batch.tokens == sum(len(examples[i].ids) for i in range(3))
    for row in range(3):
        length = len(examples[row].ids)
        assert (batch.ids_BT[row, length:] == toy_tokenizer().pad).all()
    assert (batch.topk_ids_NK[:, 0] == batch.labels_N).float().mean() > 0.9  # a toy teacher favours its own text


def test_equal_texts_share_a_sequence_and_a_different_ground_truth_has_its_own(tmp_path: Path) -> None:
    same = _examples(write_set(tmp_path / "a.jsonl", 6, val=0))
    other = _examples(write_set(tmp_path / "b.jsonl", 6, val=0, truth="No."))
    none = _examples(write_set(tmp_path / "c.jsonl", 6, val=0, truth=None))
    assert [len(x) for x in (same, other, none)] == [6, 12, 6]
    assert same.carried["ce_ground_truth"] == same.carried["ce_teacher"] == same.carried["kl_div"] > 0
    assert none.carried["ce_ground_truth"] == 0
    batch = other.batch([1])
    assert batch.ground_truth_N.all() and not batch.teacher_N.any() and not batch.has_distribution_N.any()
    assert len(_examples(tmp_path / "b.jsonl", components=["ce_teacher"])) == 6


def test_a_record_that_is_too_long_is_left_out_and_counted_never_cut(tmp_path: Path) -> None:
    path = write_set(tmp_path / "d.jsonl", 12, val=0)
    every = _examples(path)
    limit = int(np.median([len(e.ids) for e in every.items]))
    some = _examples(path, max_length=limit)
    assert some.too_long == sum(len(e.ids) > limit for e in every.items) > 0
    assert len(some) + some.too_long == 12 and all(len(e.ids) <= limit for e in some.items)


def test_distributions_of_other_tokens_are_refused_with_the_record_named(tmp_path: Path) -> None:
    made = toy.build("tools", 4)
    rolled = [*made.distributions[1:], made.distributions[0]]
    write_dataset(tmp_path / "d.jsonl", made.records, made.header, distributions=rolled, tokenizer=toy_tokenizer())
    examples = _examples(tmp_path / "d.jsonl")
    with pytest.raises(DatasetError, match=made.records[0].id):
        for index in range(4):
            examples.batch([index])


def test_distributions_over_another_tokenizer_are_refused(tmp_path: Path) -> None:
    path = write_set(tmp_path / "d.jsonl")
    text = toy_tokenizer().to_json().replace('"<tool_call>"', '"<other_call>"')
    with pytest.raises(ConfigError, match="another tokenizer"):
        Examples(Dataset.open(path), Tokenizer.from_json(text, "other"), "train", max_length=512)


STAGE = LengthStage(max_length=100, epochs=3, batch_size=4, accumulation=2)


def test_every_epoch_visits_every_sequence_once_in_another_order() -> None:
    lengths = [int(x) for x in np.random.default_rng(0).integers(5, 100, 37)]
    steps = plan(lengths, [STAGE], seed=3)
    assert steps == plan(lengths, [STAGE], seed=3) != plan(lengths, [STAGE], seed=4)
    flat = [i for step in steps for batch in step for i in batch]
    epochs = [flat[at : at + 37] for at in range(0, 111, 37)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs) and epochs[0] != epochs[1]
    assert max(len(step) for step in steps) == 2 and max(len(b) for step in steps for b in step) == 4


def test_sequences_of_like_length_share_a_batch() -> None:
    lengths = [int(x) for x in np.random.default_rng(0).integers(5, 500, 64)]
    steps = plan(lengths, [LengthStage(max_length=500, batch_size=8)], seed=0)
    waste = sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for s in steps for b in s)
    assert waste / sum(lengths) < 0.2


def test_plan_ends_at_max_steps_and_with_the_step_that_reaches_the_budget() -> None:
    lengths = [10] * 40
    assert len(plan(lengths, [STAGE], 0, max_steps=3)) == 3
    steps = plan(lengths, [STAGE], 0, token_budget=250)  # 80 tokens a step
    assert len(steps) == 4


def test_curriculum_brings_longer_sequences_later() -> None:
    lengths = [10, 20, 30, 40, 50]
    short, long = LengthStage(max_length=25, batch_size=2), LengthStage(max_length=50, batch_size=1)
    steps = plan(lengths, [short, long], 0)
    assert sorted(i for b in steps[0] for i in b) == [0, 1]
    assert sorted(i for step in steps[1:] for b in step for i in b) == [0, 1, 2, 3, 4]
