"""Weights stored in their formats: constants of the lowered program become constexpr_* operators of iOS 18.

The exported program holds deployed weights, and its contract the sha256 of each. A constant is replaced if its shape
and its bytes in fp16 are those; its codes are found with the scales or palettes that came along, and must give the same
bytes again. A weight that is not found, or that its table does not give, is an error.

A tied head is a convolution and the embedding a table that ids look up: Core ML stores both.
"""

from __future__ import annotations

import gc
import hashlib
import math
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import register_pass
from safetensors import SafetensorError
from safetensors.torch import load_file

from distill.artifacts import sha256_file
from distill.contract import Weight, sidecar_path
from distill.convert.coreml import Lowered
from distill.errors import DistillError, InputError
from distill.formats import Format, decompress, encode, operands

_PASS = "distill::store_in_formats"
_COLLECTIONS = 4
"""How often Python looks for garbage meanwhile: it frees a weight in fp16 no earlier."""


def append(passes: Any, contract: Lowered, folder: Path) -> None:
    """Let a pipeline compress at its end, where the contract has weights to compress.

    `folder` holds the table file of the export. InputError where that is missing, altered, or not that of the contract.
    """
    wanted = {name: weight for name, weight in contract.weights.items() if weight.format != "fp16"}
    if wanted:
        passes.append_pass(_PASS)
        passes.set_options(_PASS, {"job": Job(wanted, _tables(contract, wanted, folder))})


def _tables(contract: Lowered, wanted: dict[str, Weight], folder: Path) -> dict[str, torch.Tensor]:
    if contract.tables is None:
        raise InputError(f"{contract.name}: its contract has compressed weights, but names no file of their tables")
    path = sidecar_path(folder, contract.tables)
    if not path.is_file() or sha256_file(path) != contract.tables.sha256:
        raise InputError(f"{path}: missing, or does not match the sha256 in its contract")
    try:
        tables = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if set(tables) != set(wanted):
        raise InputError(f"{path}: tables of other weights than the contract's")
    return tables


class Job:
    """The weights to compress, and which of them have been."""

    def __init__(self, wanted: dict[str, Weight], tables: dict[str, torch.Tensor]) -> None:
        self.wanted, self.tables = wanted, tables
        self.names: dict[tuple[str, tuple[int, ...]], str] = {}
        """By sha256 and shape. Of weights that are equal, coremltools keeps one, and any name is right."""
        for name, weight in wanted.items():
            self.names.setdefault((weight.sha256, tuple(weight.shape)), name)
        self.shapes = {shape for _, shape in self.names}
        self.left = set(self.names.values())
        self.bytes = sum(2 * math.prod(weight.shape) for weight in wanted.values())

    def name_of(self, value: Any) -> str | None:
        """The wanted weight that a constant is."""
        if not isinstance(value, np.ndarray) or value.dtype != np.float16 or value.shape not in self.shapes:
            return None
        digest = hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()
        return self.names.get((digest, value.shape))

    def operator(self, name: str, value: np.ndarray) -> tuple[str, dict[str, np.ndarray]]:
        """The operator that gives the weight, and its operands."""
        form = Format.parse(self.wanted[name].format)
        half = torch.from_numpy(np.require(value, requirements=["C", "W"])).reshape(value.shape[:2])
        stored = encode(half, form, self.tables[name])
        if not torch.equal(decompress(stored).view(torch.int16), half.view(torch.int16)):
            raise DistillError(f"{name}: is not a weight in {form} with the scales or palettes that came with it")
        kind = types.nptype_from_builtin(types.string_to_builtin(form.stored_type))
        op, arrays = operands(stored, value.ndim)
        codes = "data" if form.kind == "int" else "indices"
        return op, arrays | {codes: arrays[codes].astype(kind)}


@register_pass(namespace="distill")
class store_in_formats(AbstractGraphPass):  # named as coremltools names passes
    """Runs once nothing folds constants any more, so that nothing undoes it."""

    job: Job | None = None

    def apply(self, prog: Any) -> None:
        assert self.job is not None
        for block in prog.functions.values():
            left, dropped = deque(block.operations), 0
            while left:
                op = left.popleft()
                if op.op_type == "const" and (name := self.job.name_of(op.outputs[0].val)) is not None:
                    dropped += op.outputs[0].val.nbytes
                    self._replace(block, op, name)
                if dropped > self.job.bytes // _COLLECTIONS:
                    gc.collect()  # a removed operator and its output refer to each other
                    dropped = 0
        if self.job.left:
            raise DistillError(f"conversion lost weights to compress: {', '.join(sorted(self.job.left)[:4])}")

    def _replace(self, block: Any, op: Any, name: str) -> None:
        assert self.job is not None
        kind, arrays = self.job.operator(name, op.outputs[0].val)
        with block:
            made = getattr(mb, kind)(**arrays, before_op=op, name=op.name)
        block.replace_uses_of_var_after_op(anchor_op=op, old_var=op.outputs[0], new_var=made, no_check_var_types=True)
        block.remove_ops([op])
        self.job.left.discard(name)
