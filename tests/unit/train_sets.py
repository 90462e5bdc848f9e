"""Small datasets and configurations for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from distill.data import toy
from distill.data.records import write_dataset
from distill.data.schema import make_header
from distill.tokenizer import toy_tokenizer
from distill.train.config import TrainConfig
from distill.train.toy import toy_model


def write_set(
    path: Path,
    n: int = 12,
    *,
    val: int = 4,
    distributions: bool = True,
    truth: str | None = "same",
    kind: str = "tools",
) -> Path:
    """A toy set whose last `val` records are held out; `truth` None, "same" or another text."""
    made = toy.build(kind, n)
    records = []
    for index, record in enumerate(made.records):
        text = record.teacher_text if truth == "same" else truth
        split = "val" if index >= n - val else "train"
        records.append(msgspec.structs.replace(record, split=split, ground_truth=text))
    header = made.header
    if not distributions:
        header = make_header(config={}, sampling={}, teacher=header.teacher, prompts_sha256="0" * 64,
                             tokenizer=toy_tokenizer(), logprobs=None)  # fmt: skip
    write_dataset(path, records, header, distributions=made.distributions if distributions else None,
                  tokenizer=toy_tokenizer())  # fmt: skip
    return path


def config(folder: Path, data: Path, **changes: Any) -> TrainConfig:
    """A run of a few steps of a tiny student, with everything under `folder`."""
    values: dict[str, Any] = {
        "data": str(data), "model": toy_model(32, 1), "tokenizer": "toy", "epochs": 2, "batch_size": 2, "lr": 1e-3,
        "device": "cpu", "threads": 1, "checkpoints": str(folder / "checkpoints"), "runs": str(folder / "runs"),
        "save_every": 1, "weight_decay": 0.1,
    }  # fmt: skip
    return TrainConfig(**(values | changes))
