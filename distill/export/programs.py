"""One program of a fixed shape: its twin traced, run, and compared with the training model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from distill.artifacts import atomic_file, sha256_file
from distill.contract import FileRef, ShapeValidation, TensorSpec
from distill.export import goldens
from distill.export.twin import CachedTwin, PrefillTwin
from distill.model import ModelConfig

_TWIN_TOLERANCE = 1e-4
"""The twin reorders fp32 sums: allowed error as a share of the largest logit."""
_KV_LAYOUT = "kv (2L, K, C, N): row 2l keys after RoPE, row 2l+1 values of layer l; head, position, width"
_REASON = 300
"""Characters kept of the reason why there is no program."""


class Shape(NamedTuple):
    """A program to make."""

    mode: Literal["prefill", "decode"]
    length: int
    """T of a prefill, the context of a decode."""
    name: str

    def __str__(self) -> str:
        return f"{self.mode} {'T' if self.mode == 'prefill' else 'C'}={self.length}"


class Made(NamedTuple):
    """A program, or why there is none."""

    traced: Any
    golden: dict[str, Tensor]
    validation: ShapeValidation


def interface(shape: Shape, config: ModelConfig) -> dict[str, Any]:
    """The fields of a contract that the shape decides."""
    if shape.mode == "prefill":
        return {
            "mode": "prefill",
            "states": [],
            "kv_layout": None,
            "inputs": [TensorSpec("input_ids", [1, shape.length], "int32")],
            "outputs": [TensorSpec("logits", [1, shape.length, config.vocab_size], "float16")],
        }
    kv = [2 * config.num_hidden_layers, config.num_key_value_heads, shape.length, config.head_dim]
    return {
        "mode": "decode",
        "states": [TensorSpec("kv", kv, "float16")],
        "kv_layout": _KV_LAYOUT,
        "inputs": [TensorSpec("input_ids", [1, 1], "int32"), TensorSpec("position", [1], "int32")],
        "outputs": [TensorSpec("logits", [1, 1, config.vocab_size], "float16")],
    }


def attempt(shape: Shape, reference: goldens.Reference, prompt: Callable[[], list[int]]) -> Made:
    """Make a shape's program, goldens and verdict; whatever goes wrong is a failed validation with its reason."""
    try:
        make = _prefill if shape.mode == "prefill" else _decode
        return make(shape.length, reference, prompt())
    except Exception as error:  # tracing and allocating raise anything; one shape must not hide the others
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = ": ".join([type(error).__name__, *lines[:1]])[:_REASON]
        return Made(None, {}, ShapeValidation("fail", reason=reason))


@torch.no_grad()
def _prefill(seq: int, reference: goldens.Reference, prompt: list[int]) -> Made:
    golden = goldens.prefill_goldens(reference, seq, prompt)
    traced = trace(PrefillTwin(reference.student, seq), (golden["input_ids"][:1],))
    found = torch.stack([traced(row[None])[0, golden["positions"]] for row in golden["input_ids"]])
    return Made(traced, golden, compare(found, golden))


@torch.no_grad()
def _decode(context: int, reference: goldens.Reference, prompt: list[int]) -> Made:
    golden = goldens.decode_goldens(reference, context, prompt)
    position = torch.tensor([min(1, context - 1)], dtype=torch.int32)
    traced = trace(CachedTwin(reference.student, context), (golden["input_ids"][:, :1], position))
    traced.kv.zero_()
    ids = golden["input_ids"][0]
    steps = [traced(ids[i].view(1, 1), torch.tensor([i], dtype=torch.int32))[0] for i in range(len(ids))]
    traced.kv.zero_()
    return Made(traced, golden, compare(torch.cat(steps)[None], golden))


@torch.no_grad()
def trace(twin: torch.nn.Module, example: tuple[Tensor, ...]) -> Any:
    with warnings.catch_warnings():
        # tracing bakes shapes in, which is what a static program wants, and warns of each
        warnings.simplefilter("ignore")
        return torch.jit.trace(twin, example, check_trace=False)


def compare(found: Tensor, golden: dict[str, Tensor]) -> ShapeValidation:
    expected = golden["logits"]
    tolerance = _TWIN_TOLERANCE * max(float(expected.abs().max()), 1e-3)
    error = float((found - expected).abs().max())
    if error <= tolerance:
        return ShapeValidation("pass", error, tolerance)
    reason = f"the exported program differs from the training model by {error:.3g} (tolerance {tolerance:.3g})"
    if not math.isfinite(error):
        return ShapeValidation("fail", reason=reason)
    return ShapeValidation("fail", error, tolerance, reason)


def save_program(traced: Any, path: Path) -> FileRef:
    program = traced.save_to_buffer()  # torch's own file writer aborts the process when the disk is full
    with atomic_file(path) as temporary:
        temporary.write_bytes(program)
    return file_ref(path)


def file_ref(path: Path) -> FileRef:
    return FileRef(path.name, sha256_file(path), path.stat().st_size)
