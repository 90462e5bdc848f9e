"""Checkpoints: one `.pt` file that `torch.load` reads with its safe default, complete in itself.

Keys: step, loss, model, config, tokenizer (the text of tokenizer.json), tokenizer_sha256, stage, lineage,
provenance, and `resume` (what an exact continuation needs: optimiser, RNG, data cursor), absent in an exported one.
"""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from distill.artifacts import atomic_file, sha256_text
from distill.errors import CheckpointError
from distill.model import ModelConfig, Student
from distill.tokenizer import Tokenizer


class Checkpoint(NamedTuple):
    """A checkpoint, read."""

    step: int
    loss: float
    student: Student
    tokenizer: Tokenizer
    stage: str
    lineage: list[dict[str, Any]]
    provenance: dict[str, Any]
    resume: dict[str, Any] | None


def save(
    path: str | os.PathLike[str],
    student: Student,
    tokenizer: Tokenizer,
    *,
    step: int,
    loss: float,
    stage: str,
    lineage: list[dict[str, Any]] | None = None,
    provenance: dict[str, Any] | None = None,
    resume: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint, whole or not at all. A tied head is stored once."""
    weights = {name: value.detach().contiguous() for name, value in student.state_dict().items()}
    if student.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    data: dict[str, Any] = {
        "step": step,
        "loss": float(loss),
        "model": weights,
        "config": msgspec.to_builtins(student.config),
        "tokenizer": tokenizer.to_json(),
        "tokenizer_sha256": tokenizer.sha256,
        "stage": stage,
        "lineage": lineage or [],
        "provenance": provenance or {},
    }
    if resume is not None:
        data["resume"] = resume
    with atomic_file(path) as temporary:
        try:
            torch.save(data, temporary)
        except RuntimeError as error:  # how torch reports a failed write, a full disk among them
            raise OSError(errno.EIO, "write failed (is the disk full?)", str(path)) from error
    return Path(path)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint without unpickling anything unsafe; CheckpointError names what is wrong with it."""
    data = _read(path)
    try:
        config = msgspec.convert(data["config"], ModelConfig)
        tokenizer_text, claimed = data["tokenizer"], data["tokenizer_sha256"]
        weights, step, loss = dict(data["model"]), int(data["step"]), float(data["loss"])
    except KeyError as error:
        raise CheckpointError(f"{path}: not a student checkpoint: no key {error}") from error
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(tokenizer_text, str) or sha256_text(tokenizer_text) != claimed:
        raise CheckpointError(f"{path}: its tokenizer does not match tokenizer_sha256")
    tokenizer = Tokenizer.from_json(tokenizer_text, f"{path}: tokenizer")
    tokenizer.require_fits(config.vocab_size, str(path))
    student = _build(config, weights, path)
    return Checkpoint(
        step,
        loss,
        student,
        tokenizer,
        str(data.get("stage", "")),
        list(data.get("lineage", [])),
        dict(data.get("provenance", {})),
        data.get("resume"),
    )


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {reason}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a student checkpoint: holds a {type(data).__name__}")
    return data


def _build(config: ModelConfig, weights: dict[str, Any], path: str | os.PathLike[str]) -> Student:
    if config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with torch.device("meta"):
        student = Student(config)
    try:
        student.load_state_dict(weights, assign=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: weights of another model: {reason}") from error
    if config.tie_word_embeddings:
        student.lm_head.weight = student.model.embed_tokens.weight
    return student
