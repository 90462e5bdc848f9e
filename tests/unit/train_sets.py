"""Small datasets and configurations for the tests of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from distill.data import toy
from distill.data.records import write_dataset
from distill.data.schema import Call, LogprobInfo, Record, Teacher, Turn, completion_ids, make_header, turn_text
from distill.data.store.distributions import Distribution, capture
from distill.tokenizer import toy_tokenizer
from distill.train.config import TrainConfig
from distill.train.toy import toy_model

WEATHER = {"name": "get_weather", "description": "Weather", "parameters": {"type": "object", "properties": {}}}


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


def episode(turns: Sequence[Turn], *, truth: str | None = None, identity: str = "episode-0") -> Record:
    """A record of these turns."""
    return Record(
        id=identity, prompt=next(t.content for t in reversed(turns) if t.role == "user" and t.content.strip()),
        teacher_text=turn_text(turns[-1]), ground_truth=truth, messages=tuple(turns), tools=[WEATHER], run_id="",
        split="train", stratum="tools",
    )  # fmt: skip


def tool_episode(result: str = '{"rain": true}', **options: Any) -> Record:
    """A call, its result, an answer."""
    call = Call("get_weather", {}, "call_0")
    return episode(
        [
            Turn("user", "Does it rain?"),
            Turn("assistant", "I look.", tool_calls=(call,), origin="teacher"),
            Turn("tool", result, origin="broker", tool_call_id="call_0"),
            Turn("assistant", "It rains.", reasoning="The result says so.", origin="teacher"),
        ],
        **options,
    )


def random_distribution(record: Record, k: int = 8, *, seed: int = 0) -> Distribution:
    """Distributions of a record's tokens, drawn from `seed`."""
    tokenizer = toy_tokenizer()
    ids = completion_ids(record, tokenizer)
    logits = torch.randn(len(ids), tokenizer.vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    kept = capture(logits, k)
    return Distribution(np.asarray(ids, np.int32), kept.ids, kept.logprobs, kept.tail)


def write_records(path: Path, records: Sequence[Record], items: Sequence[Distribution | None] | None) -> Path:
    """A set of these records; text-only if `items` is None."""
    info = None
    if items is not None:
        k = next(item.topk_ids.shape[1] for item in items if item is not None)
        info = LogprobInfo(k=k, temperature=1.0, kind="raw", tail="logsumexp", codec="exact")
    header = make_header(config={}, sampling={}, teacher=Teacher("toy", "toy", text_engine="none"),
                         prompts_sha256="0" * 64, tokenizer=toy_tokenizer(), logprobs=info)  # fmt: skip
    write_dataset(path, records, header, distributions=items, tokenizer=toy_tokenizer())
    return path


def config(folder: Path, data: Path, **changes: Any) -> TrainConfig:
    """A run of a few steps of a tiny student, with everything under `folder`."""
    values: dict[str, Any] = {
        "data": str(data), "model": toy_model(32, 1), "tokenizer": "toy", "epochs": 2, "batch_size": 2, "lr": 1e-3,
        "device": "cpu", "threads": 1, "checkpoints": str(folder / "checkpoints"), "runs": str(folder / "runs"),
        "save_every": 1, "weight_decay": 0.1,
    }  # fmt: skip
    return TrainConfig(**(values | changes))
