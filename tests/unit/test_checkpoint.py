"""Checkpoints: complete, safe to read, and one clear line for every kind of damage."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
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


_Q = "model.layers.0.self_attn.q_proj.weight"
_UNLIKE_WEIGHTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "sparse": lambda w: w.to_sparse(),
    "complex": lambda w: w.to(torch.complex64),
    "integer": lambda w: w.int(),
    "meta": lambda w: w.to("meta"),
    "quantised": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "one number, expanded": lambda w: w[:1, :1].expand(w.shape),
    "a list": lambda w: w.tolist(),
}


@pytest.mark.parametrize("kind", _UNLIKE_WEIGHTS)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_no_dense_floats_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c.pt"
    _save(path)
    good = torch.load(path)["model"]
    _edit(path, model=good | {_Q: _UNLIKE_WEIGHTS[kind](good[_Q])})
    with pytest.raises(CheckpointError, match=r"c\.pt: weights of another model: .*q_proj.weight is not a dense"):
        checkpoint.load(path)


@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": 10**9}, {"hidden_size": 10**9}, {"intermediate_size": 10**30}, {"head_dim": 2**30},
    {"max_position_embeddings": 10**30}, {"rms_norm_eps": math.nan}, {"rope_theta": math.inf}, {"rope_theta": -1.0},
    {"sliding_window": 0}, {"rope_scaling": {"rope_type": "linear", "factor": math.nan}},
], ids=str)  # fmt: skip
def test_dimensions_that_the_weights_do_not_have_are_refused_before_they_are_built(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tmp_path / "c.pt"
    _save(path)
    _edit(path, config=torch.load(path)["config"] | changes)
    with pytest.raises(CheckpointError, match=r"c\.pt") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [
    ("lineage", 5), ("lineage", [5]), ("provenance", "x"), ("resume", [1]), ("stage", 7), ("step", math.inf),
    ("loss", 10**400),
])  # fmt: skip
def test_a_value_of_another_kind_is_refused(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "c.pt"
    _save(path)
    _edit(path, **{key: value})
    with pytest.raises(CheckpointError, match=r"c\.pt: "):
        checkpoint.load(path)


def test_the_line_says_what_is_wrong_and_not_how_to_load_it_all_the_same(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "c.pt"

    def line() -> str:
        with pytest.raises(InputError) as caught:
            checkpoint.load(path)
        assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    path.write_bytes(b"hello")
    assert line().endswith("not a file that torch.save wrote, or damaged")
    torch.save({"model": _Bomb()}, path)
    assert "holds something other than tensors and plain values" in line()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    recwarn.clear()
    assert line().endswith("it is a TorchScript program") and not recwarn.list
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in line()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    _save(tmp_path / "c.pt", vocab_size=100)
    with pytest.raises(InputError, match="vocab_size 100 is smaller than the tokenizer's"):
        checkpoint.load(tmp_path / "c.pt")
