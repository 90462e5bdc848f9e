"""The student at step 0: a Hugging Face folder, some of its layers, a checkpoint, or random weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import torch

from distill import checkpoint, pretrained
from distill.errors import ConfigError
from distill.formats import Formats
from distill.model import Student
from distill.tokenizer import Tokenizer, toy_tokenizer
from distill.train.config import InitSection, TrainConfig


class Start(NamedTuple):
    """A student to train, in fp32, its tokenizer, and the stages behind it."""

    student: Student
    tokenizer: Tokenizer
    lineage: list[dict[str, Any]]
    formats: Formats | None = None
    """Those that its checkpoint was trained in."""


def build(config: TrainConfig) -> Start:
    """Build the student that a run starts from. ConfigError where model, weights and tokenizer do not fit together."""
    init = config.init
    lineage: list[dict[str, Any]] = []
    formats: Formats | None = None
    tokenizer: Tokenizer | None = named_tokenizer(config)
    if path := init.trained:
        found = checkpoint.load(path)
        student, lineage, formats = found.student, found.lineage, found.formats
        if tokenizer is not None and tokenizer.sha256 != found.tokenizer.sha256:
            raise ConfigError(f"tokenizer {tokenizer.source} is not the one of {path}")
        tokenizer = found.tokenizer
    elif init.from_pretrained:
        student = pretrained.from_pretrained(init.from_pretrained)
        tokenizer = tokenizer or Tokenizer.from_file(f"{init.from_pretrained}/tokenizer.json")
    else:
        if config.model is None or tokenizer is None:
            raise ConfigError("model and tokenizer (`toy` or a tokenizer.json) are needed where init gives no weights")
        student = Student(config.model).init_weights(config.seed)
    if config.model is not None and config.model != student.config:
        raise ConfigError(f"model: differs from that of {path or init.from_pretrained}; leave it out")
    if init.keep_layers is not None:
        student = keep_layers(student, layers_kept(init, student.config.num_hidden_layers))
    tokenizer.require_fits(student.config.vocab_size, "model")
    return Start(student.float(), tokenizer, lineage, formats)


def named_tokenizer(config: TrainConfig) -> Tokenizer | None:
    """The tokenizer that the configuration names, if it names one."""
    if config.tokenizer is None:
        return None
    return toy_tokenizer() if config.tokenizer == "toy" else Tokenizer.from_file(config.tokenizer)


def layers_kept(init: InitSection, n_layers: int) -> list[int]:
    """Indices of the layers taken over. A number means evenly spaced, the first and the last among them."""
    keep = init.keep_layers
    if isinstance(keep, int):
        if not 2 <= keep <= n_layers:
            raise ConfigError(f"init.keep_layers: {keep} of {n_layers} layers; it must be 2 to {n_layers}")
        return [round(i * (n_layers - 1) / (keep - 1)) for i in range(keep)]
    chosen = list(keep or [])
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= n_layers:
        raise ConfigError(f"init.keep_layers: {chosen} must be rising indices from 0 to {n_layers - 1}")
    return chosen


def keep_layers(student: Student, layers: list[int]) -> Student:
    """A student of only these layers; embeddings, norm and head are shared with the original."""
    config = msgspec.structs.replace(student.config, num_hidden_layers=len(layers))
    with torch.device("meta"):
        small = Student(config)
    for new, old in enumerate(layers):
        small.model.layers[new] = student.model.layers[old]
    small.model.embed_tokens, small.model.norm, small.lm_head = (
        student.model.embed_tokens, student.model.norm, student.lm_head,
    )  # fmt: skip
    return small
