"""The toy tokenizer is the same everywhere, reversible, and writes the toy sets in few tokens."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from distill import chat
from distill.data import toy
from distill.errors import InputError
from distill.tokenizer import CALL_END, CALL_START, TURN_END, TURN_START, Tokenizer, toy_tokenizer


def test_two_processes_build_the_same_tokenizer() -> None:
    code = "from distill.tokenizer import toy_tokenizer; print(toy_tokenizer().sha256)"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": str(seed), "PATH": "", "TOKENIZERS_PARALLELISM": ("false", "true")[seed]},
        ).stdout.strip()
        for seed in (0, 1)
    ]  # fmt: skip
    assert runs == [toy_tokenizer().sha256] * 2


@given(st.text(max_size=80))
def test_decoding_gives_back_any_text(text: str) -> None:
    tokenizer = toy_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("token", [TURN_START, TURN_END, CALL_START, CALL_END])
def test_a_control_token_is_one_id_wherever_it_stands(token: str) -> None:
    tokenizer = toy_tokenizer()
    (identity,) = tokenizer.encode(token)
    assert identity in tokenizer.encode(f'a {token}{{"name": 1}}')


def test_its_json_form_reads_back_as_the_same_tokenizer() -> None:
    again = Tokenizer.from_json(toy_tokenizer().to_json(), "again")
    assert again.sha256 == toy_tokenizer().sha256 and again.encode("Will it rain?") == toy_tokenizer().encode(
        "Will it rain?"
    )


@given(st.text(max_size=60))
def test_the_bytes_of_tokens_follow_each_other_to_the_end(text: str) -> None:
    spans = toy_tokenizer().encode_spans(text)
    assert spans.ids == toy_tokenizer().encode(text)
    edges = [0, *(stop for _, stop in spans.bytes)]
    assert spans.bytes == list(pairwise(edges)) and edges[-1] == len(text.encode())


def _small(**parts: Any) -> Tokenizer:
    vocab = {TURN_START: 0, TURN_END: 1, "▁é": 2, "b": 3, "▁": 4, "c": 5, "a": 6}
    inner = tokenizers.Tokenizer(tokenizers.models.Unigram([(token, -1.0) for token in vocab], unk_id=0))
    inner.add_special_tokens([TURN_START, TURN_END])
    for name, part in parts.items():
        setattr(inner, name, part)
    return Tokenizer(inner, "small")


def test_of_a_tokenizer_that_is_not_byte_level_the_characters_count() -> None:
    """`é` is a character of two bytes; the mark of a space is not in the text at all."""
    metaspace = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    spans = _small(pre_tokenizer=metaspace, decoder=tokenizers.decoders.Metaspace()).encode_spans("b éc")
    assert [("b éc".encode())[slice(*span)].decode() for span in spans.bytes] == ["b", " é", "c"]


def test_of_a_tokenizer_that_changes_its_text_the_characters_count() -> None:
    """NFC makes one character of two, so the bytes of the tokens are not those of the text."""
    inner = tokenizers.Tokenizer.from_str(toy_tokenizer().to_json())
    inner.normalizer = tokenizers.normalizers.NFC()
    tokenizer = Tokenizer(inner, "NFC")
    text = "a e\u0301 b"
    spans = tokenizer.encode_spans(text)
    assert max(stop for _, stop in spans.bytes) == len(text.encode())
    assert "e\u0301" in {text.encode()[slice(*span)].decode() for span in spans.bytes}


@pytest.mark.parametrize("kind", toy.KINDS)
def test_every_toy_conversation_fits_64_tokens(kind: str) -> None:
    tokenizer = toy_tokenizer()
    for record in toy.build(kind, 600, seed=3).records:
        assert len(chat.encode(tokenizer, record.messages, record.tools).ids) <= 64


def test_ids_beyond_the_vocabulary_are_dropped_when_decoding() -> None:
    assert toy_tokenizer().decode([31_999, *toy_tokenizer().encode("Yes"), -1]) == "Yes"


def test_a_tokenizer_without_turns_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "t.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}')
    with pytest.raises(InputError, match=r"t\.json.*<\|im_start\|>.*<\|im_end\|>"):
        Tokenizer.from_file(tmp_path / "t.json")
    with pytest.raises(InputError, match=r"absent\.json"):
        Tokenizer.from_file(tmp_path / "absent.json")


def test_a_model_smaller_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="vocab_size 100 is smaller"):
        toy_tokenizer().require_fits(100, "model")
