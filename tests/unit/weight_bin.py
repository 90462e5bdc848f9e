"""Packages in weight formats, made for tests, and a reader of weight.bin that shares nothing with the code under test.

The reader knows the blob format (MILBlob/Blob/StorageFormat.hpp) and what constexpr_* compute from MIL's documentation;
it unpacks codes bit by bit and multiplies in fp64, which is exact, before one rounding to fp16.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from coremltools.proto import Model_pb2

from distill import checkpoint
from distill.convert import coreml
from distill.convert.package import SPEC_FILE, WEIGHT_FILE
from distill.export import pytorch
from distill.export.deployed import parse_formats
from distill.formats import Formats
from distill.model import ModelConfig, Student
from distill.tokenizer import toy_tokenizer
from distill.train.fake_quantisation import FakeQuantised

SEQ = 16
SMALL: dict[str, Any] = dict(vocab_size=1088, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=1, head_dim=32,
                             max_position_embeddings=32)  # fmt: skip
MIX = "blocks=int4/32,embedding=int8,head=lut4/16"


class Made(NamedTuple):
    """A student trained in its formats, its export and its package."""

    package: Path
    export: Path
    applied: dict[str, torch.Tensor]
    """What the parameters held in training."""


def student(tied: bool = False, seed: int = 0, **changes: Any) -> Student:
    model = Student(ModelConfig(**SMALL | changes, tie_word_embeddings=tied)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def trained(folder: Path, formats: Formats, tied: bool = False, **changes: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint as training leaves it: its weights have moved on since its scales and palettes were found."""
    model = student(tied, **changes)
    fake = FakeQuantised(model, formats)
    for parameter in model.parameters():
        parameter.data += 0.003 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    with fake.applied():
        applied = {name: p.detach().half() for name, p in model.named_parameters()}
    saved = checkpoint.save(folder / "c.pt", model, toy_tokenizer(), step=1, loss=math.nan, stage="qat",
                            formats=formats, tables=fake.tables)  # fmt: skip
    return saved, applied


def export(saved: Path, folder: Path, mode: Any = "prefill", formats: Formats | None = None) -> Path:
    pytorch.run(pytorch.ExportConfig(saved, folder, mode, SEQ, (SEQ,), formats=formats))
    return folder


def convert(folder: Path, package: Path, name: str = f"student_prefill_T{SEQ}", **options: Any) -> Path:
    coreml.run(coreml.ConvertConfig(folder / f"{name}.pt", package, **options))
    return package


class Maker:
    """Each combination of formats and tying, made once."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        self.folder = folder
        self.found: dict[tuple[str, bool], Made] = {}

    def __call__(self, text: str, tied: bool = False) -> Made:
        if (text, tied) not in self.found:
            folder = self.folder()
            saved, applied = trained(folder, parse_formats(text), tied)
            exported = export(saved, folder / "e", "both" if text == MIX else "prefill")
            self.found[text, tied] = Made(convert(exported, folder / "p.mlpackage"), exported, applied)
        return self.found[text, tied]


BLOB_TYPES = {1: "fp16", 2: "fp32", 3: "uint8", 4: "int8", 8: "int4", 9: "uint1", 10: "uint2", 11: "uint4",
              12: "uint3", 13: "uint6"}  # fmt: skip
PROTO_TYPES = {10: "fp16", 11: "fp32", 21: "int8", 25: "int4", 31: "uint8", 35: "uint4", 36: "uint2", 37: "uint1",
               38: "uint6", 39: "uint3"}  # fmt: skip


def bits_of(kind: str) -> int:
    return int("".join(c for c in kind if c.isdigit()))


def numbers(kind: str, raw: bytes, count: int) -> np.ndarray:
    """Stored numbers: little endian, the first in the lowest bits."""
    if kind in ("fp16", "fp32"):
        return np.frombuffer(raw, {"fp16": "<f2", "fp32": "<f4"}[kind], count)
    width = bits_of(kind)
    assert len(raw) == (count * width + 7) // 8
    whole = int.from_bytes(raw, "little")
    if count * width < 4000:  # a second way, for small ones: one long number
        slow = [(whole >> (i * width)) & ((1 << width) - 1) for i in range(count)]
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")[: count * width].reshape(count, width)
    values = (bits.astype(np.int64) << np.arange(width)).sum(1)
    assert count * width >= 4000 or slow == values.tolist()
    return values - ((values >> (width - 1)) << width) if kind.startswith("int") else values


class Reader:
    """A package's constants, read from its two files."""

    def __init__(self, package: Path) -> None:
        self.raw = (package / WEIGHT_FILE).read_bytes()
        model = Model_pb2.Model.FromString((package / SPEC_FILE).read_bytes())
        function = model.mlProgram.functions["main"]
        self.operations = list(function.block_specializations[function.opset].operations)
        self.makers = {out.name: op for op in self.operations for out in op.outputs}

    def operand(self, op: Any, name: str) -> np.ndarray:
        (binding,) = op.inputs[name].arguments
        return self.value(binding.value)

    def record(self, value: Any) -> tuple[str, int, int]:
        """Type, begin and size of a blob."""
        sentinel, code, size, begin = struct.unpack_from("<IIQQ", self.raw, value.blobFileValue.offset)
        assert sentinel == 0xDEADBEEF and value.blobFileValue.offset % 64 == 0 and begin % 64 == 0
        return BLOB_TYPES[code], begin, size

    def value(self, value: Any) -> np.ndarray:
        kind = PROTO_TYPES[value.type.tensorType.dataType]
        shape = [d.constant.size for d in value.type.tensorType.dimensions]
        if value.WhichOneof("value") == "blobFileValue":
            stored, begin, size = self.record(value)
            assert stored == kind
            raw = self.raw[begin : begin + size]
        else:
            raw = value.immediateValue.tensor.bytes.values
        return numbers(kind, raw, math.prod(shape)).reshape(shape)

    def weight(self, name: str) -> tuple[str, np.ndarray]:
        """Operator and fp16 values of what makes a weight."""
        op = self.makers[name]
        if op.type == "const":
            return "const", self.value(op.attributes["val"])
        if op.type == "constexpr_blockwise_shift_scale":
            assert set(op.inputs) == {"data", "scale"}  # an offset would keep it off the Neural Engine
            codes, scale = self.operand(op, "data"), self.operand(op, "scale")
            for axis, (n, blocks) in enumerate(zip(codes.shape, scale.shape, strict=True)):
                scale = scale.repeat(n // blocks, axis)
            return op.type, (codes.astype(np.float64) * scale.astype(np.float64)).astype(np.float16)
        assert op.type == "constexpr_lut_to_dense" and set(op.inputs) == {"indices", "lut"}
        codes, lut = self.operand(op, "indices"), self.operand(op, "lut")
        assert lut.shape[1:-2] == (1,) * (codes.ndim - 1) and lut.shape[-1] == 1
        out = np.empty(codes.shape, np.float16)
        for o in range(codes.shape[0]):
            out[o] = lut[o * lut.shape[0] // codes.shape[0]].reshape(-1)[codes[o]]
        return op.type, out

    def matrices(self) -> dict[str, tuple[str, np.ndarray]]:
        """What convolutions and the look-up of ids take, by name in the twin."""
        out = {}
        for op in self.operations:
            parameter = {"conv": "weight", "gather": "x"}.get(op.type)
            if parameter:
                name = op.inputs[parameter].arguments[0].name
                if name.endswith("_weight_to_fp16"):
                    out[name.removesuffix("_to_fp16")] = self.weight(name)
        return out
