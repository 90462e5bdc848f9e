"""Greedy decoding through the packages of a chunked student: each feeds the next, each with a state of its own.

X.chunks.json names them (distill/convert/chunks.py); a file whose sha256 is not the one named there is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from distill import mil
from distill.artifacts import read_json, sha256_file
from distill.contract import sidecar_path
from distill.convert.chunks import Chunks
from distill.convert.package import WEIGHT_FILE
from distill.errors import ConfigError, InputError, PackageError


class ChunkedRunner:
    """The loaded packages, run by the reference executor under `policy`."""

    def __init__(self, listed: Path, policy: str = "ieee16") -> None:
        try:
            self.chunks = msgspec.convert(read_json(listed), Chunks)
        except (msgspec.ValidationError, ValueError, ConfigError) as error:
            raise InputError(f"{listed}: does not list chunks: {error}") from error
        self.policy, self.programs = policy, []
        for part in self.chunks.parts:
            path = listed.parent / Path(part.file).name
            if not (path / WEIGHT_FILE).is_file() or sha256_file(path / WEIGHT_FILE) != part.weight_sha256:
                raise PackageError(f"{path}: missing, or its weights are not those that {listed.name} names")
            self.programs.append(mil.load(path))
        self.embedding = None if self.chunks.embedding is None else self._embedding(listed.parent)

    def _embedding(self, folder: Path) -> np.ndarray:
        assert self.chunks.embedding is not None
        path = sidecar_path(folder, self.chunks.embedding)
        if not path.is_file() or sha256_file(path) != self.chunks.embedding.sha256:
            raise PackageError(f"{path}: missing, or altered: its sha256 is not the one listed")
        try:
            return load_file(path)["embedding"]
        except (SafetensorError, KeyError) as error:
            raise PackageError(f"{path}: holds no embedding: {error}") from error

    def states(self) -> list[Any]:
        """A conversation: one state a package."""
        return [program.make_state() for program in self.programs]

    def run(self, function: str, ids: np.ndarray, position: int, states: list[Any]) -> np.ndarray:
        """Logits [S, V] after the tokens `ids` [S], of which the first is at `position`."""
        value = ids[None].astype(np.int32) if self.embedding is None else self.embedding[ids].T[None, :, None]
        for part, program, state in zip(self.chunks.parts, self.programs, states, strict=True):
            feed = {part.input: value, "position": np.array([position], np.int32)}
            value = program.predict(feed, function=function, state=state, policy=self.policy)[part.output]
        return value[0]

    def prompt(self, ids: Sequence[int], states: list[Any]) -> np.ndarray:
        """Logits [V] after a prompt: by the longest prefill that is filled, what is left token by token."""
        if not 0 < len(ids) <= self.chunks.context:
            raise InputError(f"{len(ids)} tokens do not fit a context of {self.chunks.context}")
        at, logits = 0, np.empty(0)
        while at < len(ids):
            count = max((t for t in self.chunks.prefill if t <= len(ids) - at), default=1)
            function = "decode" if count == 1 else f"prefill_{count}"
            logits = self.run(function, np.array(ids[at : at + count]), at, states)[-1]
            at += count
        return logits

    def generate(self, ids: Sequence[int], most: int, stop_ids: set[int]) -> tuple[list[int], np.ndarray]:
        """Greedy tokens, and the logits [n, V] that each was chosen by."""
        states, rows, out = self.states(), [], list[int]()
        logits = self.prompt(ids, states)
        while len(out) < min(most, self.chunks.context - len(ids)):
            rows.append(logits)
            token = int(logits.argmax())
            if token in stop_ids:
                break
            out.append(token)
            if len(out) < min(most, self.chunks.context - len(ids)):
                logits = self.run("decode", np.array([token]), len(ids) + len(out) - 1, states)[-1]
        return out, np.stack(rows)
