"""The toy sets: deterministic, never leaking into what they are judged on, with a teacher that really is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import make_toy_kd
from distill import chat
from distill.data import toy
from distill.data.records import completion_ids
from distill.data.store.distributions import full_logprobs, problem_of
from distill.data.toy_material import INTENTS, TOOLS
from distill.errors import InputError
from distill.tokenizer import toy_tokenizer
from distill.tools import arguments_problem

SIZES = st.tuples(st.sampled_from(toy.KINDS), st.integers(1, 400), st.integers(0, 50))


@settings(deadline=None, max_examples=12)
@given(SIZES, st.integers(1, 100), st.integers(0, 50))
def test_held_out_prompts_are_in_no_training_set(size, n_held, seed_held) -> None:
    kind, n, seed = size
    trained = {record.prompt for record in toy.build(kind, n, seed).records}
    assert len(trained) == n
    held = [record.prompt for record in toy.held_out(n_held, seed_held, kind)]
    assert len(set(held)) == n_held and not trained & set(held)


def test_the_8_ball_knows_the_classic_twenty_and_uses_them_all() -> None:
    assert len(set(toy.ANSWERS)) == 20
    assert {record.teacher_text for record in toy.build("8-ball", 128).records} == set(toy.ANSWERS)
    assert len(toy.held_out_questions(50)) == 50 and all(q.endswith("?") for q in toy.held_out_questions(50))


def test_the_tool_set_has_distinct_calls_plain_controls_and_no_copied_argument() -> None:
    made = toy.build("tools", 128).records
    called = {chat.call_text(call) for record in made for call in record.gold_calls}
    assert len(TOOLS) >= 4 and len(called) == 6
    assert sum(not record.gold_calls for record in made) >= 10
    for record in made:
        offered = {tool["name"]: tool for tool in record.tools}
        assert len(offered) == 2
        for call in record.gold_calls:
            assert arguments_problem(call, offered[call.name]) is None
            assert not any(str(value) in record.prompt for value in call.arguments.values())


def test_no_word_asks_for_two_things() -> None:
    words = [word for intent in INTENTS for word in intent.words]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("kind", toy.KINDS)
def test_the_teachers_rows_are_distributions_that_say_its_text(kind: str) -> None:
    tokenizer = toy_tokenizer()
    made = toy.build(kind, 40)
    for record, item in zip(made.records, made.distributions, strict=True):
        assert item.token_ids.tolist() == completion_ids(record, tokenizer)
        assert (item.topk_ids[:, 0] == item.token_ids).all()  # its text is what it finds most probable
        assert problem_of(item, tokenizer.vocab_size) is None
        assert (item.tail_logprob > np.log(1e-3)).all()  # the tail is real


def test_the_first_row_is_the_mixture_of_the_answers_first_tokens() -> None:
    tokenizer = toy_tokenizer()
    made = toy.build("8-ball", 20)
    record, item = made.records[0], made.distributions[0]
    weights = {answer: (1 - toy.FAVOURITE) / 19 for answer in toy.ANSWERS} | {record.teacher_text: toy.FAVOURITE}
    expected = np.full(tokenizer.vocab_size, toy.NOISE / tokenizer.vocab_size)
    for answer, weight in weights.items():
        expected[tokenizer.encode(answer)[0]] += (1 - toy.NOISE) * weight
    np.testing.assert_allclose(np.exp(full_logprobs(item, tokenizer.vocab_size)[0]), expected, atol=1e-6)


def test_the_door_writes_the_documented_128_lines(tmp_path: Path, capsys) -> None:
    assert make_toy_kd.main is toy.main
    assert toy.main(["--out", str(tmp_path / "toy_kd.jsonl"), "--n", "128"]) == 0
    assert len((tmp_path / "toy_kd.jsonl").read_text().splitlines()) == 128
    assert "128 tools samples" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--n", "0"], ["--n", "999999"], ["--kind", "8-ball", "--n", "99999"]])
def test_a_size_that_cannot_be_made_is_one_line_and_exit_2(tmp_path: Path, capsys, arguments) -> None:
    assert toy.main(["--out", str(tmp_path / "x.jsonl"), *arguments]) == 2
    assert "--n" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="tools, 8-ball"):
        toy.build("dice")


def test_importing_the_toy_sets_loads_no_torch() -> None:
    code = "import sys, distill.data.toy, distill.data.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
