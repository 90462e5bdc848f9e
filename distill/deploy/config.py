"""Every key of configs/deploy.yaml."""

from __future__ import annotations

import re

import msgspec

from distill.formats import Formats


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a runner should choose the next token unless it is told otherwise."""

    temperature: float = 0.0
    """Logits are divided by it; 0: always the largest one (greedy), which is what was verified."""
    top_k: int = 0
    """Draw from so many of the largest; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest that have this much of the probability together."""
    max_new_tokens: int = 256
    """An answer ends here at the latest."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"sampling.temperature must be from 0 to 100, not {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise ValueError("sampling: top_k must be at least 0, top_p above 0 and at most 1, max_new_tokens positive")


class DeployConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to bundle, and what is to be said of it."""

    name: str = "student"
    """Name of the bundle and of the package in it, NAME.mlpackage."""
    checkpoint: str = "models/student/checkpoints/latest.pt"
    """The trained student."""
    out: str = "models/student/deployed"
    """The bundle. One that is there is replaced; any other folder is not."""
    context: int | None = None
    """Positions of the package's state; null: the longest of `export.seq` of the training configuration."""
    prefill: list[int] = []
    """Tokens of each prefill function; empty: the other lengths of `export.seq`."""
    formats: Formats | None = None
    """Weight formats of a student that was not trained in any; null: fp16, or those that it was trained in."""
    data: str | None = None
    """KD dataset whose held-out records the package is judged on; null: the one that the checkpoint was trained on."""
    limits: str = "configs/limits.yaml"
    """What the package may lose on them, by weight format."""
    sampling: Sampling = Sampling()
    """Defaults for runners."""
    licence: str | None = None
    """On what terms the student may be used; null: none was stated, and the bundle says so."""
    teacher_licence: str | None = None
    """The teacher's licence as its owner states it; null: only what the dataset's header records."""
    evaluation: str = "eval/reports/local.json"
    """Report of the student's evaluation. Where there is none, its gate is skipped."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", self.name):
            raise ValueError(f"name {self.name!r}: letters, digits, - and _ only, and at most 64 of them")
