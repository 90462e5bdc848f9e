"""The same parity through Core ML itself. It runs on macOS only, and says SKIPPED with that reason elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from distill import gates
from distill.contract import Contract
from distill.errors import PackageError, Skipped
from distill.export.conversation import alone
from distill.export.tolerance import tolerance_factor
from distill.gates import Gate
from distill.versions import import_coremltools


def parity_gate(package: Path, contract: Contract, golden: dict[str, np.ndarray]) -> Gate:
    """Golden logits through Core ML, within the derived fp16 error. Not exercised off macOS."""
    if sys.platform != "darwin":
        raise Skipped("Core ML runs on macOS only")
    ct = import_coremltools()
    if contract.functions:
        return _generator_gate(ct, package, contract, golden)
    try:
        model = ct.models.MLModel(str(package))
    except Exception as error:  # coremltools raises bare Exception and RuntimeError
        raise PackageError(f"{package}: Core ML does not load it: {error}") from error
    state = model.make_state() if contract.states else None
    if contract.mode == "block":
        out = model.predict({contract.inputs[0].name: golden["input"]})[contract.outputs[0].name]
        return _gate(out[:, :, 0].swapaxes(1, 2), golden)
    rows = []
    for ids in golden["input_ids"]:
        if contract.mode == "decode":
            names = [spec.name for spec in contract.inputs]
            logits = [
                model.predict({names[0]: ids[i].reshape(1, 1), names[1]: np.array([i], np.int32)}, state=state)
                for i in range(len(ids))
            ]
            rows.append(np.stack([step[contract.outputs[0].name][0, 0] for step in logits]))
        else:
            out = model.predict({contract.inputs[0].name: ids[None]})
            rows.append(out[contract.outputs[0].name][0])
    return _gate(np.stack([row[golden["positions"]] for row in rows]), golden)


def _generator_gate(ct: Any, package: Path, contract: Contract, golden: dict[str, np.ndarray]) -> Gate:
    """Each function alone, as the executor runs it, on a state of its own."""
    tokens, position = (spec.name for spec in contract.inputs)
    ids, rows, worst = golden["input_ids"][0], golden["rows"], 0.0
    factor = tolerance_factor(contract.model_config.vocab_size)
    for name, function in contract.functions.items():
        try:
            model = ct.models.MLModel(str(package), function_name=name)
        except Exception as error:  # coremltools raises bare Exception and RuntimeError
            raise PackageError(f"{package}: Core ML does not load {name}: {error}") from error
        state, size = model.make_state(), function.tokens()
        for first in alone(size, len(ids)):
            chunk = ids[first : first + size]
            feed = {tokens: np.resize(chunk, (1, size)), position: np.array([first], np.int32)}
            found = model.predict(feed, state=state)[contract.outputs[0].name][0]
            kept = np.flatnonzero((rows >= first) & (rows < first + len(chunk)))
            off = np.abs(found[rows[kept] - first][:, golden["columns"]].astype(np.float64) - golden["logits"][kept])
            share = float((off / (golden["fp16_sigma"][kept] * factor)).max(initial=0.0))
            worst = share if not share <= worst else worst
    return gates.at_most(worst, 1.0, backend="Core ML", reason="share of the derived fp16 error")


def _gate(found: np.ndarray, golden: dict[str, np.ndarray]) -> Gate:
    tolerance = golden["fp16_sigma"] * tolerance_factor(golden["logits"].shape[-1])
    worst = float((np.abs(found.astype(np.float64) - golden["logits"]) / tolerance).max())
    return gates.at_most(worst, 1.0, backend="Core ML", reason="share of the derived fp16 error")
