"""Checkpoints: complete, safe to read, and one clear line for every kind of damage."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from distill import checkpoint
from distill.errors import CheckpointError, InputError
from distill.model import Student
from distill.tokenizer import toy_tokenizer
from distill.train.toy import toy_model


def _save(path: Path, **changes: Any) -> Student:
    student = Student(msgspec.structs.replace(toy_model(32, 1), **changes)).init_weights(0)
    checkpoint.save(path, student, toy_tokenizer(), step=7, loss=1.5, stage="worker", resume={"rng": torch.zeros(3)})
    return student


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_comes_back_bit_equal(tmp_path: Path, tied: bool) -> None:
    student = _save(tmp_path / "c.pt", tie_word_embeddings=tied)
    found = checkpoint.load(tmp_path / "c.pt")
    assert (found.step, found.loss, found.stage) == (7, 1.5, "worker")
    assert found.student.config == student.config and found.tokenizer.sha256 == toy_tokenizer().sha256
    assert all(torch.equal(v, found.student.state_dict()[k]) for k, v in student.state_dict().items())
    assert (found.student.lm_head.weight is found.student.model.embed_tokens.weight) == tied
    assert found.resume is not None and torch.equal(found.resume["rng"], torch.zeros(3))


def test_the_documented_snippet_reads_it(tmp_path: Path) -> None:
    _save(tmp_path / "c.pt")
    data = torch.load(tmp_path / "c.pt", map_location="cpu")
    assert {"step", "loss", "model", "config", "tokenizer_sha256"} <= data.keys() and data.get("step", 0) == 7


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


def test_a_pickle_that_runs_code_is_refused_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    torch.save({"step": 1, "model": _Bomb()}, path)
    with pytest.raises(CheckpointError, match=r"bomb\.pt"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(_Bomb(), protocol=2))
    with pytest.raises(CheckpointError, match=r"bomb\.pt"):
        checkpoint.load(path)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_one_clear_line(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "c.pt"
    _save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"c\.pt") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def _edit(path: Path, **changes: Any) -> None:
    data = torch.load(path)
    torch.save(data | changes, path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    _save(path)
    other = Student(toy_model(64, 1)).init_weights(0).state_dict()
    good = torch.load(path)["model"]
    fewer = {k: v for k, v in good.items() if "q_proj" not in k}
    for weights in (other, fewer, good | {"extra": torch.zeros(1)}, good | {"lm_head.weight": "text"}, "text", [1]):
        _edit(path, model=weights)
        with pytest.raises(CheckpointError, match=r"c\.pt"):
            checkpoint.load(path)


@pytest.mark.parametrize("key", ["step", "loss", "model", "config", "tokenizer", "tokenizer_sha256"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "c.pt"
    _save(path)
    data = torch.load(path)
    del data[key]
    torch.save(data, path)
    with pytest.raises(CheckpointError, match=key):
        checkpoint.load(path)


def test_values_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    _save(path)
    config = torch.load(path)["config"]
    text = toy_tokenizer().to_json()
    for changes in (
        {"config": config | {"hidden_size": "wide"}},
        {"config": config | {"num_key_value_heads": 7}},
        {"config": config | {"unknown": 1}},
        {"config": [1, 2]},
        {"step": "soon"},
        {"loss": None},
        {"tokenizer": text.replace("<tool_call>", "<tool_fall>")},
        {"tokenizer": 5},
    ):
        _save(path)
        _edit(path, **changes)
        with pytest.raises(InputError, match=r"c\.pt"):
            checkpoint.load(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "none.pt")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    _save(tmp_path / "c.pt", vocab_size=100)
    with pytest.raises(InputError, match="vocab_size 100 is smaller than the tokenizer's"):
        checkpoint.load(tmp_path / "c.pt")
