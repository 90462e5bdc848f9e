"""Records become sequences, targets and rows; the order of the data."""

from __future__ import annotations

from itertools import groupby, pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import chat
from distill.data import toy
from distill.data.batches import Examples, plan
from distill.data.records import Dataset, write_dataset
from distill.data.schema import Call, Record, Turn, completion_ids
from distill.data.spans import KINDS, span_kinds, turn_of
from distill.data.store.capture import learned_tokens
from distill.errors import ConfigError, DatasetError
from distill.tokenizer import Tokenizer, toy_tokenizer
from distill.train.config import LengthStage
from tests.unit import kd_sets
from tests.unit.train_sets import episode, random_distribution, tool_episode, write_records, write_set


def _examples(path: Path, **options: object) -> Examples:
    return Examples(Dataset.open(path), toy_tokenizer(), "train", max_length=options.pop("max_length", 512), **options)


def _sequence(record: Record) -> tuple[list[int], list[int]]:
    """A record's ids and the places of its targets."""
    ids, places = learned_tokens(toy_tokenizer(), record.messages, record.tools, record.learned)
    return ids.tolist(), places.tolist()


def _learned_text(record: Record) -> str:
    ids, places = _sequence(record)
    return toy_tokenizer().decode([ids[place] for place in places])


def test_a_sequence_is_the_prompt_that_inference_feeds_and_then_the_answer() -> None:
    for record in toy.build("tools", 8).records:
        ids, places = _sequence(record)
        prompt = chat.encode(toy_tokenizer(), record.context, record.tools, add_generation_prompt=True).ids
        assert ids[: places[0]] == prompt and places == list(range(len(prompt), len(ids)))
        assert _learned_text(record) == record.teacher_text + "<|im_end|>"


def test_all_of_the_teachers_turns_are_learned_and_nothing_else() -> None:
    call = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'
    thought = "<think>\nThe result says so.\n</think>\n\n"
    assert _learned_text(tool_episode()) == f"I look.{call}<|im_end|>{thought}It rains.<|im_end|>"
    earlier = (Turn("user", "Hello"), Turn("assistant", "Yes"))
    record = toy.build("8-ball", 1).records[0]
    longer = msgspec.structs.replace(record, messages=(*earlier, *record.messages))
    assert _learned_text(longer) == record.teacher_text + "<|im_end|>"


_WORDS = st.text(st.sampled_from('abc {}":,\n<>/é'), max_size=12)
_TEACHER = st.builds(
    lambda text, thought, calls: Turn(
        "assistant", text + "x", tuple(Call("get_weather", {}, f"call_{i}") for i in range(calls)),
        thought, "teacher",
    ),
    _WORDS, _WORDS.filter(lambda text: "think" not in text), st.integers(0, 2),
)  # fmt: skip
_OTHER = st.builds(
    lambda role, text: Turn(role, text, origin="broker" if role == "tool" else "dataset", tool_call_id="call_0"),
    st.sampled_from(["user", "assistant", "tool", "tool"]), _WORDS,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(_OTHER, _TEACHER), max_size=6), _TEACHER)
def test_the_tokens_of_tool_results_and_of_the_datasets_turns_never_carry_loss(middle, last) -> None:
    tokenizer = toy_tokenizer()
    record = episode([Turn("user", "Hi"), *middle, last])
    ids, places = _sequence(record)
    assert [ids[place] for place in places] == completion_ids(record, tokenizer)
    text, owners = tokenizer.decode(ids), []
    for piece in chat.segments(record.messages, record.tools):
        for _ in tokenizer.encode(piece.text):
            owners.append(piece.message if piece.target else None)
    learned = [owners[place] for place in places]
    assert all(owner is not None and record.messages[owner].origin == "teacher" for owner in learned)
    assert len(places) == sum(owner in record.learned for owner in owners)
    assert text == chat.render(record.messages, record.tools).removesuffix("\n")


def _by_kind(record: Record) -> list[tuple[str, str]]:
    """Runs of learned tokens of one kind, as text."""
    tokenizer = toy_tokenizer()
    ids, places = _sequence(record)
    kinds = span_kinds(tokenizer, record.messages, record.tools, record.learned)
    assert len(kinds) == len(places)
    runs = groupby(zip(kinds.tolist(), places), key=lambda pair: pair[0])
    return [(KINDS[kind], tokenizer.decode([ids[place] for _, place in run])) for kind, run in runs]


def test_every_learned_token_belongs_to_one_kind_of_span() -> None:
    assert _by_kind(tool_episode()) == [
        ("content", "I look."), ("tool_call", '<tool_call>{"name": "'), ("tool_name", "get_weather"),
        ("tool_call", '", "arguments": '), ("tool_args", "{}}"), ("tool_call", "</tool_call><|im_end|>"),
        ("reasoning", "<think>\nThe result says so.\n</think>\n\n"), ("final", "It rains.<|im_end|>"),
    ]  # fmt: skip
    turns = tool_episode('{"celsius": 21.5, "sky": "light rain"}').messages[:-1]
    said = Turn("assistant", "I see light rain at 21.5 degrees.", origin="teacher")
    found = [(kind, text.strip(" .")) for kind, text in _by_kind(episode([*turns, said]))][-5:]
    assert found == [("final", "I see"), ("integration", "light rain"), ("final", "at"), ("integration", "21.5"),
                     ("final", "degrees.<|im_end|>")]  # fmt: skip


def test_the_kinds_are_those_of_a_record_s_own_targets() -> None:
    tokenizer, seen = toy_tokenizer(), set()
    for record in [*(kd_sets.episode(i, tokenizer=tokenizer) for i in range(4)), *toy.build("tools", 8).records]:
        _, places = _sequence(record)
        kinds = dict(zip(places, span_kinds(tokenizer, record.messages, record.tools, record.learned).tolist()))
        for place in places:
            own = {target.kind for target in record.targets if place in range(*target.tok)}
            assert not own or KINDS[kinds[place]] == max(own, key=KINDS.index)
            seen |= own
    assert seen == set(KINDS)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(_OTHER, _TEACHER), max_size=6), _TEACHER)
def test_no_token_has_the_kind_of_another_span(middle, last) -> None:
    record = episode([Turn("user", "Hi"), *middle, last])
    text = "".join(text for _, text in _by_kind(record))
    assert text == _learned_text(record)
    calls = sum(len(turn.tool_calls) for turn in record.messages if turn.origin == "teacher")
    assert sum("get_weather" in text for kind, text in _by_kind(record) if kind == "tool_name") == calls
    for kind, text in _by_kind(record):
        if kind in ("content", "final", "integration"):
            assert "get_weather" not in text and "</think>" not in text
        assert kind != "final" or text.endswith("<|im_end|>")


def test_a_ground_truth_s_calls_are_found_where_the_template_would_write_them_so() -> None:
    call = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'
    turn = turn_of(f"<think>\nWhy not?\n</think>\n\nI look.{call}")
    assert (turn.reasoning, turn.content, turn.tool_calls) == ("Why not?", "I look.", (Call("get_weather", {}),))
    for text in ("It rains.", call.replace(": {}", ":{}"), f"{call} and more", f"{call} ", "<tool_call>{", " x ",
                 f"<think>\n{call}\n</think>\n\nx", "<think>\n</think>\n\n"):  # fmt: skip
        assert turn_of(text) == Turn("assistant", text, origin="teacher")


def test_a_batch_carries_its_sequences_kinds_in_their_order(tmp_path: Path) -> None:
    truth = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'
    examples = _examples(write_records(tmp_path / "d.jsonl", [tool_episode(truth=truth)], None))
    batch = examples.batch([1, 0])
    name = toy_tokenizer().encode("get_weather")
    for first, last in ((0, examples[1].targets), (examples[1].targets, batch.targets)):
        part = slice(first, last)
        assert batch.labels_N[part][batch.span_N[part] == KINDS.index("tool_name")].tolist() == name
    assert sum(examples.spans.values()) == batch.targets and examples.spans["tool_name"] == 2 * len(name)


def test_every_learned_turn_has_its_rows_and_a_batch_puts_them_at_its_tokens(tmp_path: Path) -> None:
    records = [tool_episode(identity="a"), *toy.build("tools", 3).records]
    items = [random_distribution(record, seed=seed) for seed, record in enumerate(records)]
    items[2] = None
    examples = _examples(write_records(tmp_path / "d.jsonl", records, items))
    order = [next(i for i, e in enumerate(examples.items) if e.record == r and e.teacher) for r in (1, 0, 2)]
    batch = examples.batch(order)
    assert torch.equal(batch.ids_T[batch.positions_N + 1], batch.labels_N)
    expected = np.concatenate([items[1].topk_ids, items[0].topk_ids])
    has = batch.has_distribution_N.numpy()
    assert (batch.topk_ids_NK.numpy()[has] == expected).all() and has.sum() == len(expected) < len(has)
    tail = np.concatenate([items[1].tail_logprob, items[0].tail_logprob])
    assert (batch.tail_logprob_N.numpy()[has] == tail).all()


def test_a_token_without_entries_carries_no_divergence(tmp_path: Path) -> None:
    record = tool_episode()
    item = random_distribution(record)
    ids, lp, tail = item.topk_ids.copy(), item.topk_logprobs.copy(), item.tail_logprob.copy()
    ids[-1], lp[-1], tail[-1] = -1, -np.inf, -np.inf
    item = item._replace(topk_ids=ids, topk_logprobs=lp, tail_logprob=tail)
    batch = _examples(write_records(tmp_path / "d.jsonl", [record], [item])).batch([0])
    assert batch.has_distribution_N.tolist() == [True] * (len(ids) - 1) + [False]
    assert batch.teacher_N.all()


def test_a_different_ground_truth_replaces_the_last_turn_only_and_is_learned_there_only(tmp_path: Path) -> None:
    records = [tool_episode(truth="It snows."), tool_episode(truth="It rains.", identity="same")]
    examples = _examples(write_records(tmp_path / "d.jsonl", records, None))
    shown = [(toy_tokenizer().decode(e.labels.tolist()), e.teacher, e.truths) for e in examples.items]
    assert len(shown) == 3 and shown[1] == ("It snows.<|im_end|>", False, examples[1].targets)
    assert toy_tokenizer().decode(examples[1].ids.tolist()).count("I look.") == 1
    last = toy_tokenizer().encode("<think>\nThe result says so.\n</think>\n\nIt rains.<|im_end|>")
    assert shown[2][2] == len(last) < examples[2].targets
    truth = examples.batch([2]).ground_truth_N
    assert truth[-len(last) :].all() and not truth[: -len(last)].any()


def test_a_text_only_set_is_read_without_distributions(tmp_path: Path) -> None:
    examples = _examples(write_records(tmp_path / "d.jsonl", [tool_episode()], None))
    assert examples.k == 0 and examples.carried["kl_div"] == 0 and not examples.batch([0]).has_distribution_N.any()


def test_sequences_lie_end_to_end_and_positions_point_one_token_before_each_target(tmp_path: Path) -> None:
    examples = _examples(write_set(tmp_path / "d.jsonl"))
    batch = examples.batch([0, 2, 1])
    assert torch.equal(batch.ids_T[batch.positions_N + 1], batch.labels_N)
    assert batch.tokens == sum(batch.lengths) == sum(len(examples[i].ids) for i in range(3))
    for index, ids in zip([0, 2, 1], batch.ids_T.split(batch.lengths)):
        assert ids.tolist() == examples[index].ids.tolist()
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


@given(st.lists(st.integers(1, 500), min_size=1, max_size=80), st.integers(500, 4000), st.integers(0, 5))
def test_micro_batches_hold_at_most_their_tokens_and_every_sequence_once(lengths, tokens, seed) -> None:
    steps = plan(lengths, [LengthStage(max_length=500, batch_tokens=tokens, accumulation=3)], seed=seed)
    batches = [batch for step in steps for batch in step]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in batch) for batch in batches]
    assert (max(sizes) <= tokens and all(a + b > tokens for a, b in pairwise(sizes))) or len(sizes) == 1


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
