"""What lm-evaluation-harness needs of a model, and the two ways to have it: PyTorch, and a package's executor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from distill.artifacts import read_json
from distill.errors import InputError
from distill.evaluate.runners.interface import Settings
from distill.evaluate.runners.student import load_student
from distill.model import LayerCache, Student
from distill.tokenizer import Tokenizer
from distill.verify.runner import PackageRunner


class Computes(Protocol):
    """Logits and greedy tokens: a StudentRunner, or a package's own runner."""

    @property
    def capacity(self) -> int:
        """Tokens that it can read."""
        ...

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [n, V] in fp32 after each of n tokens."""
        ...

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: set[int]) -> Iterator[int]:
        """Greedy tokens as they come, the stop token not among them."""
        ...


class StudentRunner:
    """A student in PyTorch."""

    def __init__(self, student: Student) -> None:
        self._student = student
        self.capacity = student.config.max_position_embeddings

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """See Computes."""
        return self._after(ids, None)[0].float().cpu().numpy()

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: set[int]) -> Iterator[int]:
        """See Computes."""
        cache: list[LayerCache] = []
        new = list(prompt_ids)
        for _ in range(max_new_tokens):
            token = int(self._after(new, cache)[0, -1].argmax())
            if token in stop_ids:
                return
            yield token
            new = [token]

    def _after(self, ids: Sequence[int], cache: list[LayerCache] | None) -> torch.Tensor:
        device = self._student.lm_head.weight.device
        return self._student(torch.tensor([list(ids)], device=device), cache=cache)


class Scorer:
    """A model with its tokenizer, as the harness asks for it."""

    def __init__(self, model: Computes, tokenizer: Tokenizer, first: int | None = None) -> None:
        """`first`: the token that a text without anything before it is conditioned on; None: the end of a turn."""
        self.model, self.tokenizer = model, tokenizer
        self.first = tokenizer.turn_end if first is None else first

    @cached_property
    def _special(self) -> set[int]:
        added = json.loads(self.tokenizer.to_json()).get("added_tokens", ())
        return {token["id"] for token in added if token.get("special")}

    def decode(self, ids: Sequence[int]) -> str:
        """Text without control tokens, which is how the harness reads any model."""
        return self.tokenizer.decode([token for token in ids if token not in self._special])

    def log_probabilities(self, ids: Sequence[int]) -> np.ndarray:
        """[n, V] in fp64 after each of n tokens."""
        logits = self.model.logits(ids).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def open_scorer(spec: str, settings: Settings) -> tuple[Scorer, dict[str, Any]]:
    """A model by its path, and what it is. InputError where it is none that gives logits."""
    path = Path(spec)
    if path.suffix == ".mlpackage":
        if settings.formats is not None:
            raise InputError(f"{spec}: weight formats are for a checkpoint or folder; a package has its own")
        runner = PackageRunner(path, settings.policy)
        identity = {"runner": "package", "weights": runner.contract.weights_sha256, "policy": settings.policy}
        return Scorer(runner, runner.tokenizer()), identity
    if not path.is_file() and not (path / "config.json").is_file():
        raise InputError(f"{spec}: neither a checkpoint, a Hugging Face folder nor a package (*.mlpackage)")
    loaded, identity = load_student(path, settings)
    first = _beginning(path, loaded.tokenizer) if path.is_dir() else None
    return Scorer(StudentRunner(loaded.student), loaded.tokenizer, first), identity


def _beginning(folder: Path, tokenizer: Tokenizer) -> int | None:
    """The folder's own token for the beginning of a text, which transformers takes where there is one."""
    file = folder / "tokenizer_config.json"
    token = read_json(file).get("bos_token") if file.is_file() else None
    text = token.get("content") if isinstance(token, dict) else token
    ids = tokenizer.encode(text) if isinstance(text, str) else []
    return ids[0] if len(ids) == 1 else None
