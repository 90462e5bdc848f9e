"""Checkpoints: one `.pt` file that `torch.load` reads with its safe default, complete in itself.

Keys: step, loss, model, config, tokenizer (the text of tokenizer.json), tokenizer_sha256, stage, lineage,
provenance, and `resume` (what an exact continuation needs: optimiser, RNG, data cursor), absent in an exported one. Of
a student trained in its weight formats also `formats`, and `tables`: its scales and palettes by parameter, in fp16.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from distill.artifacts import atomic_file, read_text, require_regular, sha256_file, sha256_text, write_text
from distill.errors import CheckpointError, ConfigError, describe_os_error
from distill.formats import Formats
from distill.model import ModelConfig, Student
from distill.tokenizer import Tokenizer

_KINDS: dict[str, type | tuple[type, ...]] = {
    "step": int, "loss": (int, float), "model": dict, "config": dict, "tokenizer": str, "tokenizer_sha256": str,
}  # fmt: skip
_OPTIONAL_KINDS: dict[str, type | tuple[type, ...]] = {
    "stage": str, "lineage": list, "provenance": dict, "resume": (dict, type(None)), "formats": dict, "tables": dict,
}  # fmt: skip
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    formats: Formats | None
    """Those it was trained in."""
    tables: dict[str, torch.Tensor]
    """Its scales and palettes, by parameter; empty where `formats` is None."""


def contents(
    student: Student,
    tokenizer: Tokenizer,
    *,
    step: int,
    loss: float,
    stage: str,
    lineage: list[dict[str, Any]] | None = None,
    provenance: dict[str, Any] | None = None,
    resume: dict[str, Any] | None = None,
    formats: Formats | None = None,
    tables: dict[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """What a checkpoint holds. Its weights are the student's own, not copies; a tied head is in it once.

    `formats` and `tables` are those of `FakeQuantised`, for a student that was trained so.
    """
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
    if formats is not None:
        data |= {"formats": msgspec.to_builtins(formats), "tables": tables or {}}
    return data if resume is None else data | {"resume": resume}


def save(path: str | os.PathLike[str], student: Student, tokenizer: Tokenizer, **facts: Any) -> Path:
    """Write a checkpoint, whole or not at all. `facts` are those of `contents`."""
    return write(path, contents(student, tokenizer, **facts))


def write(
    path: str | os.PathLike[str], data: dict[str, Any], *, beside: Callable[[Path], object] = lambda whole: None
) -> Path:
    """Write `contents`, whole or not at all. `beside` is called with the whole file before it takes its place: what it
    writes is there whenever the checkpoint is."""
    with atomic_file(path) as temporary:
        try:
            torch.save(data, temporary)
        except RuntimeError as error:  # how torch reports a failed write, a full disk among them
            raise OSError(errno.EIO, "write failed (is the disk full?)", str(path)) from error
        beside(temporary)
    return Path(path)


def write_sealed(path: str | os.PathLike[str], data: dict[str, Any]) -> Path:
    """The same with its sha256 in a file beside it, for `require_seal`."""

    def seal(whole: Path) -> None:
        write_text(seal_of(path), f"{sha256_file(whole)}  {Path(path).name}\n")

    return write(path, data, beside=seal)


def seal_of(path: str | os.PathLike[str]) -> Path:
    """The file that holds the sha256 of a sealed checkpoint, in the form of sha256sum."""
    return Path(f"{path}.sha256")


def require_seal(path: str | os.PathLike[str]) -> None:
    """CheckpointError if the file is not the one that was sealed: damaged, cut off, or another one's."""
    if not seal_of(path).is_file():
        raise CheckpointError(f"{path}: no sha256 beside it")
    if read_text(seal_of(path)).split(" ")[0] != sha256_file(path):
        raise CheckpointError(f"{path}: damaged: its sha256 is not the one beside it")


def load(path: str | os.PathLike[str], *, mmap: bool = False) -> Checkpoint:
    """Read a checkpoint without unpickling anything unsafe; CheckpointError names what is wrong with it. `mmap` as in
    `read`."""
    data = read(path, mmap=mmap)
    _check_kinds(data, path)
    try:
        config = msgspec.convert(data["config"], ModelConfig)
        step, loss = int(data["step"]), float(data["loss"])
        matches = sha256_text(data["tokenizer"]) == data["tokenizer_sha256"]
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # msgspec's own is a ValueError
        raise CheckpointError(f"{path}: {error}") from error
    if not matches:
        raise CheckpointError(f"{path}: its tokenizer does not match tokenizer_sha256")
    tokenizer = Tokenizer.from_json(data["tokenizer"], f"{path}: tokenizer")
    tokenizer.require_fits(config.vocab_size, str(path))
    student = _build(config, dict(data["model"]), path)
    formats = _formats(data, student, path)
    return Checkpoint(
        step,
        loss,
        student,
        tokenizer,
        data.get("stage", ""),
        data.get("lineage", []),
        data.get("provenance", {}),
        data.get("resume"),
        formats,
        data.get("tables", {}),
    )


def weights_sha256(model: torch.nn.Module) -> str:
    """sha256 over a model's weights: name, dtype, shape and bytes of each, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _formats(data: dict[str, Any], student: Student, path: str | os.PathLike[str]) -> Formats | None:
    """The weight formats, once every parameter is known to have a table that fits it."""
    tables = data.get("tables", {})
    if "formats" not in data and not tables:
        return None
    try:
        formats = msgspec.convert(data.get("formats"), Formats)
        formats.require_fits(student)
    except (msgspec.ValidationError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path}: formats: {error}") from error
    weights = dict(student.named_parameters())
    if set(tables) != set(weights):
        raise CheckpointError(f"{path}: tables: scales and palettes of another model")
    for name, weight in weights.items():
        table, shape = tables[name], formats.of(name, weight.ndim).table_shape(tuple(weight.shape))
        if not _is_plain(table) or table.dtype != torch.float16 or table.shape != shape:
            raise CheckpointError(f"{path}: tables: {name} needs fp16 {list(shape)}")
        if not bool(table.isfinite().all()):
            raise CheckpointError(f"{path}: tables: {name} has values that are not finite")
        form = formats.of(name, weight.ndim)
        if (form.kind == "int" and bool((table <= 0).any())) or (form.kind == "lut" and bool((table.diff() < 0).any())):
            raise CheckpointError(f"{path}: tables: {name} has a scale that is not above 0, or a palette out of order")
    return formats


def _is_plain(value: Any) -> bool:
    """A dense tensor in memory: other packages make classes of theirs loadable."""
    own = type(value) in (torch.Tensor, torch.nn.Parameter)
    return own and value.layout == torch.strided and value.device.type == "cpu" and value.is_contiguous()


def _check_kinds(data: dict[str, Any], path: str | os.PathLike[str]) -> None:
    for key, kind in (_KINDS | _OPTIONAL_KINDS).items():
        if key not in data and key in _KINDS:
            raise CheckpointError(f"{path}: not a student checkpoint: no key {key!r}")
        if key in data and not isinstance(data[key], kind):
            raise CheckpointError(f"{path}: not a student checkpoint: {key} is of type {type(data[key]).__name__}")
    if not all(isinstance(entry, dict) for entry in data.get("lineage", [])):
        raise CheckpointError(f"{path}: not a student checkpoint: lineage is not a list of mappings")


def read(path: str | os.PathLike[str], *, mmap: bool = False) -> dict[str, Any]:
    """The mapping of tensors and plain values that a file holds, unchecked; CheckpointError where it holds others.
    `mmap`: a tensor is read from the file when it is used."""
    if not Path(path).is_file():
        require_regular(path)
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch suggests torch.jit.load for a TorchScript program
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:  # its message tells how to load the file all the same: not here
        what = "holds something other than tensors and plain values, or is damaged; not loaded"
        raise CheckpointError(f"{path}: {what}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {describe_os_error(error, path)}") from error
    except Exception as error:  # a damaged file makes torch's unpickler raise whatever it likes
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {_reason(error)}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a student checkpoint: holds a {type(data).__name__}")
    return data


def _reason(error: Exception) -> str:
    """The first sentence of torch's message where it says something, else that the file is damaged."""
    if "TorchScript" in str(error):
        return "it is a TorchScript program"
    line = (str(error).strip().splitlines() or [""])[0].split(". ")[0]
    ours = len(line.split()) >= 3 and not any(word in line for word in ("weights_only", "mmap", "torch.save"))
    return line if ours else "not a file that torch.save wrote, or damaged"


def _build(config: ModelConfig, weights: dict[str, Any], path: str | os.PathLike[str]) -> Student:
    _check_weights(config, weights, path)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    try:
        with torch.device("meta"):
            student = Student(config)
        student.load_state_dict(weights, assign=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: weights of another model: {reason}") from error
    if config.tie_word_embeddings:
        student.lm_head.weight = student.model.embed_tokens.weight
    return student


def _check_weights(config: ModelConfig, weights: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Refuse what is not plain weights of this size, before a model of the size that the file claims is built."""
    for name, value in weights.items():
        if not _is_plain(value) or value.dtype not in _FLOATS:
            raise CheckpointError(f"{path}: weights of another model: {name} is not a dense tensor of floats")
    layers = {str(name).split(".")[2] for name in weights if str(name).startswith("model.layers.")}
    if len(layers) != config.num_hidden_layers:
        raise CheckpointError(
            f"{path}: weights of another model: {len(layers)} layers, its config says {config.num_hidden_layers}"
        )
    tied = config.tie_word_embeddings
    found = sum(value.numel() for name, value in weights.items() if not (tied and name == "lm_head.weight"))
    if found != config.n_params():
        raise CheckpointError(
            f"{path}: weights of another model: {found} parameters, its config makes {config.n_params()}"
        )
