"""The student as it will be after deployment: its weights rounded to their formats before anything is exported.

What is exported, its goldens and what verification compares with are then those weights; conversion finds each again in
the lowered program and stores it in its format (distill/convert/compression.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from distill.checkpoint import Checkpoint
from distill.contract import Weight
from distill.errors import ConfigError, InputError
from distill.export.twin import HEAD_SLICE
from distill.formats import Format, Formats, decompress, encode, fit
from distill.model import Student

_LAYER = {
    "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}  # fmt: skip
"""A block's matrices: in the twin, in the student."""


class Matrix(NamedTuple):
    """A matrix of the exported program."""

    name: str
    """In the twin."""
    parameter: str
    """Of the student, of which it holds the output channels `first` to `last`."""
    first: int
    last: int
    shape: list[int]
    """In the program."""


def parse_formats(text: str) -> Formats:
    """`blocks=int4/32,embedding=int8`; ConfigError names what is wrong."""
    pairs = [part.partition("=") for part in text.split(",")]
    given = {key.strip(): value.strip() for key, _, value in pairs}
    if len(given) != len(pairs) or not all(separator for _, separator, _ in pairs):
        raise ConfigError(f"formats {text!r}: expected blocks=FORMAT,embedding=FORMAT,head=FORMAT, each once at most")
    try:
        return msgspec.convert(given, Formats)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"formats {text!r}: {error}") from error


def deploy(loaded: Checkpoint, asked: Formats | None) -> tuple[Formats | None, dict[str, Tensor]]:
    """Give a student its deployed weights in place; returns the formats and the scales or palettes by parameter.

    A checkpoint that was trained in its formats has both; another one gets the best for its weights. None, and no
    change: no formats are asked for. InputError where others are asked for than those that it was trained in.
    """
    if loaded.formats is not None and asked not in (None, loaded.formats):
        raise InputError(f"formats {_words(asked)}: the checkpoint was trained in {_words(loaded.formats)}")
    formats, student = asked or loaded.formats, loaded.student
    if formats is None:
        return None, {}
    formats.require_fits(student)
    tables = {}
    for name, weight in student.named_parameters():
        form = formats.of(name, weight.ndim)
        table = tables[name] = loaded.tables[name] if loaded.formats else fit(weight.detach(), form)
        with torch.no_grad():
            weight.copy_(decompress(encode(weight, form, table)))
    return formats, tables


def _words(formats: Formats | None) -> str:
    return ",".join(f"{key}={value}" for key, value in msgspec.to_builtins(formats).items() if value)


def matrices(student: Student) -> Iterator[Matrix]:
    """Every matrix of the twin, with the parameter that it comes from."""
    parameters = dict(student.named_parameters())
    embedding = "model.embed_tokens.weight"
    names = {f"block_{layer}.{ours}.weight": f"model.layers.{layer}.{theirs}.weight"
             for layer in range(student.config.num_hidden_layers) for ours, theirs in _LAYER.items()}  # fmt: skip
    rows, width = parameters[embedding].shape
    yield Matrix("embed.weight", embedding, 0, rows, [rows, width])
    for name, parameter in names.items():
        rows, width = parameters[parameter].shape
        yield Matrix(name, parameter, 0, rows, [rows, width, 1, 1])
    head = "lm_head.weight" if "lm_head.weight" in parameters else embedding
    rows, width = parameters[head].shape
    for index, first in enumerate(range(0, rows, HEAD_SLICE)):
        last = min(first + HEAD_SLICE, rows)
        yield Matrix(f"head_{index}.weight", head, first, last, [last - first, width, 1, 1])


def promised(student: Student, formats: Formats | None) -> dict[str, Weight]:
    """What every package of this export holds of each matrix: its format, and the sha256 of its values in fp16."""
    parameters = dict(student.named_parameters())
    out = {}
    for matrix in matrices(student):
        form = (formats or Formats()).of(matrix.parameter)
        half = parameters[matrix.parameter][matrix.first : matrix.last].detach().half().contiguous()
        out[matrix.name] = Weight(str(form), matrix.shape, hashlib.sha256(half.numpy().data).hexdigest())
    return out


def tables_of_matrices(student: Student, formats: Formats, tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scales or palettes of each compressed matrix; ConfigError where a slice of the head cuts a group in two."""
    out = {}
    for matrix in matrices(student):
        form = formats.of(matrix.parameter)
        if form.kind == "fp":
            continue
        out[matrix.name] = _rows(tables[matrix.parameter], form, matrix).clone()  # a file holds none twice
    return out


def _rows(table: Tensor, form: Format, matrix: Matrix) -> Tensor:
    if form.kind == "int":
        return table[matrix.first : matrix.last]
    if form.per is None:
        return table
    if matrix.first % form.per or (matrix.last - matrix.first) % form.per:
        raise ConfigError(f"{matrix.name}: weight format {form}: a slice of {HEAD_SLICE} channels cuts a group in two")
    return table[matrix.first // form.per : matrix.last // form.per]
