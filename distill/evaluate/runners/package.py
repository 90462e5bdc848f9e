"""A Core ML package through the reference executor, or on macOS through Core ML itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from distill.artifacts import canonical_json, sha256_file, sha256_text
from distill.contract import WITH_STATE
from distill.convert.package import SPEC_FILE, WEIGHT_FILE
from distill.errors import InputError, PackageError, Skipped
from distill.evaluate.runners.interface import Settings
from distill.evaluate.runners.templated import TemplatedModel
from distill.verify.integrity import program_gate, weights_gate
from distill.verify.runner import PackageRunner
from distill.versions import import_coremltools


def open_package(path: Path, settings: Settings) -> TemplatedModel:
    """PackageError where weights or program are not those that its contract records; Skipped where Core ML is asked
    for and is not here."""
    if settings.backend == "coreml" and sys.platform != "darwin":
        raise Skipped("Core ML runs on macOS only")
    runner = CoreMlRunner(path) if settings.backend == "coreml" else PackageRunner(path, settings.policy)
    if runner.contract.mode == "block":
        raise InputError(f"{path}: a block of a model does not generate text")
    return TemplatedModel(PackageEngine(runner), runner.tokenizer(), settings, _facts(runner, settings.backend))


class CoreMlRunner(PackageRunner):
    """A package in Core ML itself. Off macOS only its logic is tried, with the executor in Core ML's place.

    A conversation's state is fed through the function that made it, token by token where there are several.
    """

    def __init__(self, package: str | Path) -> None:
        super().__init__(package)
        self.functions = {name: size for name, size in self.functions.items() if size == 1} or self.functions
        ct = import_coremltools()
        function = "decode" if self.contract.functions else None
        try:
            self._model: Any = ct.models.MLModel(str(package), function_name=function)
        except Exception as error:  # coremltools raises bare Exception and RuntimeError
            raise PackageError(f"{package}: Core ML does not load it: {error}") from error

    def predict(self, feed: Mapping[str, np.ndarray], function: str | None = None, state: Any = None) -> np.ndarray:
        """See PackageRunner."""
        options = {} if state is None else {"state": state}
        return np.asarray(self._model.predict(dict(feed), **options)[self.output], np.float32)

    def make_state(self) -> Any:
        """See PackageRunner."""
        return self._model.make_state()


class PackageContext:
    """A conversation with a package; one that keeps no state reads everything anew for each token."""

    def __init__(self, runner: PackageRunner) -> None:
        self.ids: list[int] = []
        self.state = runner.begin() if runner.contract.mode in WITH_STATE else None

    def cut(self, length: int) -> None:
        """Forget all but the first tokens: rows behind the position are overwritten before any token may see them."""
        del self.ids[length:]
        if self.state is not None:
            self.state.position = length


class PackageEngine:
    """An Engine over a package. Its shapes are fixed, so nothing is gained by several conversations at once."""

    together = 1

    def __init__(self, runner: PackageRunner) -> None:
        self._runner = runner
        self.capacity = runner.capacity

    def start(self) -> PackageContext:
        """See Engine."""
        return PackageContext(self._runner)

    def feed(self, contexts: Sequence[PackageContext], ids: Sequence[Sequence[int]]) -> np.ndarray:
        """See Engine."""
        rows = []
        for context, new in zip(contexts, ids):
            context.ids += new
            logits = self._runner.prefill(context.ids) if context.state is None else context.state.feed(new)
            rows.append(logits[-1])
        return np.stack(rows)


def _facts(runner: PackageRunner, backend: str) -> dict[str, Any]:
    for gate in (weights_gate(runner), program_gate(runner)):
        if gate.status != "pass":
            raise PackageError(f"{runner.path}: {gate.reason}")
    contract = runner.contract
    whole = msgspec.to_builtins(contract)
    named = (name for name in (WEIGHT_FILE, SPEC_FILE) if (runner.path / name).is_file())
    return {
        "runner": "package",
        "weights": None if contract.file is None else contract.file.sha256,
        "files": {Path(name).name: sha256_file(runner.path / name) for name in named},
        "contract": {
            "sha256": sha256_text(canonical_json(whole)), "program": contract.program_sha256,
            "training_weights": contract.weights_sha256, "mode": contract.mode, "context": runner.capacity,
        },
        "decoding": {"formats": whole.get("formats"), "backend": backend}
        | ({"policy": runner.policy} if backend == "executor" else {}),
    }  # fmt: skip
