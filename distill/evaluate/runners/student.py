"""A checkpoint or a Hugging Face folder in PyTorch, its weights as they are or as deployed.

Rows of a pass share the weights; each attends over its own keys and values, in place and without padding, so a
conversation's attention is the same whatever goes on beside it.

Shapes: T new tokens of all conversations, B conversations, D hidden, H query heads, K key-value heads, S tokens read,
N head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from distill.artifacts import sha256_file
from distill.checkpoint import Checkpoint, load, weights_sha256
from distill.errors import ConfigError
from distill.evaluate.runners.interface import Settings
from distill.evaluate.runners.templated import TemplatedModel
from distill.export.deployed import deploy, parse_formats
from distill.formats import Formats
from distill.model import LayerCache, ModelConfig, Student, rope_tables
from distill.pretrained import from_pretrained
from distill.tokenizer import Tokenizer

_FIRST_SIZE = 256  # tokens that a context has room for at first


def open_student(path: Path, settings: Settings) -> TemplatedModel:
    """A checkpoint, or a folder with config.json; it computes in fp32."""
    loaded, facts = load_student(path, settings)
    return TemplatedModel(StudentEngine(loaded.student, settings.together), loaded.tokenizer, settings, facts)


def load_student(path: Path, settings: Settings) -> tuple[Checkpoint, dict[str, Any]]:
    """The student, in fp32 and where it is to run, with the values of its weight formats; and what `identity` says."""
    loaded, files = (_folder(path), _files_of(path)) if path.is_dir() else (load(path), [path])
    device = _device(settings.device)
    facts: dict[str, Any] = {
        "runner": "folder" if path.is_dir() else "checkpoint",
        "weights": weights_sha256(loaded.student),
        "files": {file.name: sha256_file(file) for file in files},
    }
    loaded.student.float()
    formats, _ = deploy(loaded, _formats(settings.formats))
    facts["decoding"] = {"formats": None if formats is None else msgspec.to_builtins(formats), "device": device.type}
    loaded.student.to(device).eval()
    return loaded, facts


class KeptContext:
    """The keys (after RoPE) and values of one conversation, [1, K, S, N] a layer, with room to grow."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.ids: list[int] = []
        shape = (config.num_hidden_layers, 2, 1, config.num_key_value_heads, _FIRST_SIZE, config.head_dim)
        self._kept = torch.zeros(shape, device=device)
        self._most = config.max_position_embeddings

    def cut(self, length: int) -> None:
        """Forget all but the first tokens: what lies behind them is written over."""
        del self.ids[length:]

    def make_room(self, more: int) -> None:
        """For so many more tokens."""
        size, needed = self._kept.shape[4], len(self.ids) + more
        if needed > size:
            grown = min(max(needed, 2 * size), max(self._most, needed))
            self._kept = torch.nn.functional.pad(self._kept, (0, 0, 0, grown - size))

    def add(self, layer: int, k: Tensor, v: Tensor) -> LayerCache:
        """Write a layer's keys and values of new tokens; returns all that it has then."""
        keys, values = self._kept[layer]
        start, end = len(self.ids), len(self.ids) + k.shape[2]
        keys[:, :, start:end], values[:, :, start:end] = k, v
        return LayerCache(keys[:, :, :end], values[:, :, :end])


class StudentEngine:
    """An Engine over a student in fp32."""

    def __init__(self, student: Student, together: int) -> None:
        self._student = student.eval()
        self._device = student.lm_head.weight.device
        self.capacity = student.config.max_position_embeddings
        self.together = together

    def start(self) -> KeptContext:
        """See Engine."""
        return KeptContext(self._student.config, self._device)

    @torch.inference_mode()
    def feed(self, contexts: Sequence[KeptContext], ids: Sequence[Sequence[int]]) -> np.ndarray:
        """See Engine."""
        student, lengths = self._student, [len(piece) for piece in ids]
        starts = [len(context.ids) for context in contexts]
        for context, n in zip(contexts, lengths):
            context.make_room(n)
        causal = [student.causal(n, past) for n, past in zip(lengths, starts)]
        positions_T = torch.cat([torch.arange(past, past + n) for n, past in zip(lengths, starts)]).to(self._device)
        x_BTD = student.model.embed_tokens(torch.tensor([[i for piece in ids for i in piece]], device=self._device))
        cos, sin = (table[None, None] for table in rope_tables(student.config, positions_T))  # [1,1,T,N]
        for layer, block in enumerate(student.model.layers):

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                parts = zip(causal, contexts, q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2))
                return torch.cat([see(q_, *context.add(layer, k_, v_)) for see, context, q_, k_, v_ in parts], 2)

            x_BTD, _ = block(x_BTD, cos, sin, attend, None)
        for context, piece in zip(contexts, ids):
            context.ids += piece
        last = torch.tensor(lengths).cumsum(0) - 1
        logits_BV = student.lm_head(student.model.norm(x_BTD[0, last.to(self._device)]))
        return logits_BV.cpu().numpy()


def _folder(path: Path) -> Checkpoint:
    tokenizer = Tokenizer.from_file(path / "tokenizer.json")
    student = from_pretrained(path)
    tokenizer.require_fits(student.config.vocab_size, str(path))
    return Checkpoint(0, 0.0, student, tokenizer, "", [], {}, None, None, {})


def _files_of(folder: Path) -> list[Path]:
    """What a folder's model is made of."""
    return [file for file in sorted(folder.iterdir()) if file.suffix == ".safetensors" or file.name in
            ("config.json", "tokenizer.json", "model.safetensors.index.json")]  # fmt: skip


def _formats(asked: str | dict[str, str] | None) -> Formats | None:
    """A format alone is that of every matrix."""
    if asked is None:
        return None
    if isinstance(asked, str):
        return parse_formats(asked if "=" in asked else f"blocks={asked},embedding={asked}")
    return parse_formats(",".join(f"{part}={form}" for part, form in asked.items()))


def _device(asked: str) -> torch.device:
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return torch.device(next(name for name, is_here in here.items() if is_here))
    if not here[asked]:
        raise ConfigError(f"device: {asked}, but PyTorch sees none on this machine")
    return torch.device(asked)
