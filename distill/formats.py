"""Core ML's weight formats as arithmetic: what weight.bin holds of a weight, and what the device makes of that.

    fp16              as it is
    int8  int4        a code times the scale of its output channel; int4/32: of its block of 32 inputs
    lut1 2 3 4 6 8    an index into the weight's palette; lut4/16: into that of its group of 16 output channels

    stored = compress(weight, Format.parse("int4/32"))     # codes, and scales or palettes in fp16
    decompress(stored)                                     # fp16, what constexpr_* of iOS 18 computes

Scales are symmetric, so no offset is stored: one in fp16 keeps a weight off the Neural Engine. The product of a code
and an fp16 scale has at most 19 significant bits and is exact in fp32, so it can be rounded to fp16 in one way only.

Shapes: O output channels, I input channels, B blocks of a channel, G groups of channels, K palette entries.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from distill.errors import ConfigError, InputError
from distill.fitting import LARGEST, code_range, fit_palettes, fit_scales, nearest_edges

_FORM = re.compile(r"(fp|int|lut)(\d+)(?:/(\d+))?", re.ASCII)
_WIDTHS = {"fp": (16,), "int": (4, 8), "lut": (1, 2, 3, 4, 6, 8)}
"""Bits that the operators take in iOS 18."""
_AT_ONCE = 1 << 22
"""Weights encoded or decoded at one time: torch's indices take eight bytes each."""
_IN_FILE = 10
"""Elements from which coremltools writes a constant to weight.bin; the program holds smaller ones."""
_ALIGNED = 64
"""Bytes of a record in weight.bin, and what its data is aligned to."""
_LEAST_IMPORTANCE = 1e-4
"""Of an input channel, against their mean: one that calibration never saw still counts."""


class Format(NamedTuple):
    """How a weight is stored."""

    kind: str
    """fp, int or lut."""
    bits: int
    """Of a code."""
    per: int | None = None
    """int: inputs that share a scale; None: the whole channel. lut: output channels that share a palette; None: all."""

    @staticmethod
    def parse(text: str) -> Format:
        """`fp16`, `int4/32`, `lut4`, ... ConfigError where Core ML stores no such thing."""
        found = _FORM.fullmatch(text)
        if found is None or (found[1] == "fp" and found[3]):
            raise ConfigError(
                f"weight format {text!r} is none of fp16, int4, int8, int4/32, lut4, lut4/16 and the like"
            )
        kind, bits, per = found[1], int(found[2]), found[3]
        if bits not in _WIDTHS[kind]:
            widths = " or ".join(f"{kind}{width}" for width in _WIDTHS[kind])
            hint = f"; try lut{bits}" if kind == "int" and bits in _WIDTHS["lut"] else ""
            raise ConfigError(f"weight format {text!r}: Core ML stores {widths}{hint}")
        if per is not None and int(per) < 1:
            raise ConfigError(f"weight format {text!r}: {per} is no size")
        return Format(kind, bits, None if per is None else int(per))

    def __str__(self) -> str:
        return f"{self.kind}{self.bits}" + (f"/{self.per}" if self.per else "")

    @property
    def stored_type(self) -> str:
        """MIL's name of a code's type."""
        return {"fp": "fp16", "int": f"int{self.bits}", "lut": f"uint{self.bits}"}[self.kind]

    def require_fits(self, shape: tuple[int, ...], name: str) -> None:
        """ConfigError where a weight of this shape cannot be stored so."""
        if self.kind == "fp":
            return
        if len(shape) != 2 or 0 in shape:
            raise ConfigError(f"{name}: weight format {self} is for matrices, not for shape {list(shape)}")
        size, what = (shape[1], "inputs in blocks") if self.kind == "int" else (shape[0], "output channels in groups")
        if self.per is not None and size % self.per:
            raise ConfigError(f"{name}: weight format {self}: {size} {what} of {self.per} leave a rest")

    def table_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales [O, B] or palettes [G, K] of a weight; (0,) in fp16."""
        if self.kind == "fp":
            return (0,)
        if self.kind == "int":
            return shape[0], shape[1] // (self.per or shape[1])
        return shape[0] // (self.per or shape[0]), 1 << self.bits


class Formats(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which part of the student gets which format. What is no matrix stays fp16."""

    blocks: str = "fp16"
    """Of the matrices of attention and MLP."""
    embedding: str = "fp16"
    """Of the embedding; of a tied head too."""
    head: str | None = None
    """Of the head; None: the embedding's."""

    def __post_init__(self) -> None:
        for name in ("blocks", "embedding", "head"):
            try:
                Format.parse(getattr(self, name) or "fp16")
            except ConfigError as error:
                raise ValueError(f"{name}: {error}") from error

    def __str__(self) -> str:
        return f"blocks {self.blocks}, embedding {self.embedding}, head {self.head or self.embedding}"

    def of(self, name: str, ndim: int = 2) -> Format:
        """The format of a parameter of the student."""
        if ndim < 2:
            return Format("fp", 16)
        part = {"model.embed_tokens.weight": self.embedding, "lm_head.weight": self.head or self.embedding}
        return Format.parse(part.get(name, self.blocks))

    def require_fits(self, student: nn.Module) -> None:
        """ConfigError where a weight cannot be stored as asked; the student's may be on the meta device."""
        weights = dict(student.named_parameters())
        if "lm_head.weight" not in weights and self.head not in (None, self.embedding):
            raise ConfigError(f"head: {self.head}, but it is tied to the embedding, which is {self.embedding}")
        for name, weight in weights.items():
            self.of(name, weight.ndim).require_fits(tuple(weight.shape), name)


class Compressed(NamedTuple):
    """What weight.bin stores of a weight (there, codes of fewer than 8 bits are packed)."""

    format: Format
    codes: Tensor
    """int8, uint8, or fp16 for what is not compressed; of the weight's shape."""
    table: Tensor
    """Scales [O, B] or palettes [G, K], fp16; empty for what is not compressed."""


def compress(weight: Tensor, form: Format, importance_I: Tensor | None = None) -> Compressed:
    """The weight in this format, with the scales or palettes of the least squared error.

    `importance_I` weighs the error by input channel: the mean square of what comes in there, from calibration. Without
    it, an integer's scale is that of the largest value.
    """
    return encode(weight, form, fit(weight, form, importance_I))


@torch.no_grad()
def fit(weight: Tensor, form: Format, importance_I: Tensor | None = None, start: Tensor | None = None) -> Tensor:
    """The scales or palettes, fp16. `start`: those of an earlier time; palettes are taken one step on from them.

    InputError where a value is not finite or beyond fp16. Deterministic.
    """
    form.require_fits(tuple(weight.shape), "weight")
    if not bool((weight.abs() <= LARGEST).all()):
        raise InputError(f"a weight of shape {list(weight.shape)} has values that are not finite or beyond {LARGEST}")
    if form.kind == "fp":
        return weight.new_empty(0, dtype=torch.float16)
    shape, importance_I = form.table_shape(tuple(weight.shape)), _importance(weight, importance_I)
    if form.kind == "int":
        per_BN = None if importance_I is None else importance_I.reshape(shape[1], -1)
        return fit_scales(weight.float().reshape(*shape, -1), form.bits, per_BN)
    per_1N = None if importance_I is None else importance_I.repeat(weight.shape[0] // shape[0])[None]
    return fit_palettes(weight.float().reshape(shape[0], -1), shape[1], per_1N, start)


def _importance(weight: Tensor, importance_I: Tensor | None) -> Tensor | None:
    if importance_I is None:
        return None
    if importance_I.shape != weight.shape[1:] or not bool((importance_I >= 0).all() & importance_I.isfinite().all()):
        raise InputError(f"importance: {weight.shape[1]} numbers of at least 0 are needed")
    mean = importance_I.float().mean()
    return (importance_I.float() / mean).clamp_min(_LEAST_IMPORTANCE) if mean > 0 else None


@torch.no_grad()
def encode(weight: Tensor, form: Format, table: Tensor) -> Compressed:
    """The codes of the nearest values, with these scales or palettes."""
    form.require_fits(tuple(weight.shape), "weight")
    if table.shape != form.table_shape(tuple(weight.shape)) or table.dtype != torch.float16:
        raise InputError(f"{form} of shape {list(weight.shape)} has no table of {table.dtype} {list(table.shape)}")
    if form.kind == "fp":
        return Compressed(form, weight.detach().to(torch.float16), table)
    codes = torch.empty(weight.shape, dtype=torch.int8 if form.kind == "int" else torch.uint8, device=weight.device)
    for part in _parts(weight):
        w, here = weight[part].float(), _per_channel(form, table, weight.shape[0], part)
        if form.kind == "int":
            scaled = w.reshape(*here.shape, -1) / here.float()[..., None]
            codes[part] = scaled.round_().clamp_(*code_range(form.bits)).reshape(w.shape)
        else:
            codes[part] = torch.searchsorted(nearest_edges(here.float()), w, out_int32=True)
    return Compressed(form, codes, table)


def decompress(stored: Compressed) -> Tensor:
    """What Core ML makes of it, fp16."""
    form, codes, table = stored
    if form.kind == "fp":
        return codes
    out = torch.empty(codes.shape, dtype=torch.float16, device=codes.device)
    for part in _parts(codes):
        c, here = codes[part], _per_channel(form, table, codes.shape[0], part)
        if form.kind == "int":
            out[part] = (c.float().reshape(*here.shape, -1) * here.float()[..., None]).reshape(c.shape)
        else:
            out[part] = here.gather(1, c.long())
    return out


def _parts(weight: Tensor) -> list[slice]:
    """Output channels worked on at one time."""
    rows = max(1, _AT_ONCE // weight.shape[1])
    return [slice(first, min(first + rows, weight.shape[0])) for first in range(0, weight.shape[0], rows)]


def _per_channel(form: Format, table: Tensor, channels: int, part: slice) -> Tensor:
    """The scales [O, B] or the palette [O, K] of each of these channels."""
    if form.kind == "int":
        return table[part]
    groups = torch.arange(part.start, part.stop, device=table.device) // (form.per or channels)
    return table[groups].contiguous()


def deployed(weight: Tensor, form: Format, table: Tensor) -> Tensor:
    """The weight as it is after deployment with these scales or palettes, in its own type."""
    return decompress(encode(weight, form, table)).to(weight.dtype)


@torch.no_grad()
def saturated(weight: Tensor, form: Format, table: Tensor) -> Tensor | None:
    """Where a weight lies so far outside that its code is cut off; None: nowhere (a palette's ends follow the values).

    There the deployed value does not change with the weight, so its gradient is zero.
    """
    if form.kind != "int":
        return None
    low, high = code_range(form.bits)
    scaled = weight.float().reshape(*table.shape, -1) / table.float()[..., None]
    return ((scaled < low - 0.5) | (scaled > high + 0.5)).reshape(weight.shape)


def operands(stored: Compressed, rank: int = 2) -> tuple[str, dict[str, np.ndarray]]:
    """The operator of iOS 18 that gives the weight, and its operands, for a weight of this rank: a convolution's has
    dimensions of size 1 at its end. Codes are of MIL's type `format.stored_type`, one a byte."""
    form, ones = stored.format, (1,) * (rank - stored.codes.ndim)
    codes, table = stored.codes.cpu().numpy(), stored.table.cpu().numpy()
    codes = codes.reshape(codes.shape + ones)
    if form.kind == "fp":
        return "const", {"val": codes}
    if form.kind == "int":
        return "constexpr_blockwise_shift_scale", {"data": codes, "scale": table.reshape(table.shape + ones)}
    groups, entries = table.shape
    return "constexpr_lut_to_dense", {"indices": codes, "lut": table.reshape(groups, 1, *ones, entries, 1)}


def stored_bytes(form: Format, shape: tuple[int, ...]) -> int:
    """What a weight takes in weight.bin: its codes and its table, each with its record, up to where the next may begin.
    The file's own header, 64 bytes for all of them, is not counted."""
    form.require_fits(shape, "weight")
    blobs = [(math.prod(shape), form.bits), (math.prod(form.table_shape(shape)), 16)]
    return sum(_ALIGNED + _aligned((n * bits + 7) // 8) for n, bits in blobs if n >= _IN_FILE)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
