"""From records to batches: sequences, what is learned in each, the teacher's rows, and the order they come in.

A record gives the sequence context + teacher_text, which carries kl_div (where its distributions are stored) and
ce_teacher; its ground truth is carried by the same sequence if the texts are equal, else by a second one. Only the
last turn is learned. A sequence longer than the limit is left out and counted, never cut: a cut answer would teach
the student to stop early. The order is a pure function of seed, lengths and stages, so a resumed run needs only the
number of the step.

Shapes: B sequences, T tokens, N target tokens, K stored ids a token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill import chat
from distill.data.distributions import same_tokens
from distill.data.records import Dataset, Record
from distill.errors import ConfigError, DatasetError, InputError
from distill.tokenizer import Tokenizer

_BUCKET = 16
"""Micro-batches whose sequences are sorted by length together."""


class Example(NamedTuple):
    """A sequence: ids, of which those from `start` are targets. The newline that closes the turn is not in it."""

    record: int
    """Index in the dataset."""
    ids: NDArray[np.int32]
    start: int
    teacher: bool
    """Carries ce_teacher."""
    ground_truth: bool
    """Carries ce_ground_truth."""
    row: int | None
    """Carries kl_div: row of the store with the teacher's distributions of its targets."""

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return len(self.ids) - self.start


class Batch(NamedTuple):
    """Sequences padded on the right, and for each of N targets where its logits come from and what they should be."""

    ids_BT: Tensor
    positions_N: Tensor
    """Index into B*T of the token before the target."""
    labels_N: Tensor
    teacher_N: Tensor
    ground_truth_N: Tensor
    has_distribution_N: Tensor
    topk_ids_NK: Tensor
    """-1 where there is no distribution."""
    topk_logprobs_NK: Tensor
    tail_logprob_N: Tensor
    tokens: int
    """Tokens in it, padding not counted."""
    records: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._replace(**moved)


class Stage(Protocol):
    """A stage of the length curriculum (distill.train.config.LengthStage)."""

    @property
    def max_length(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def accumulation(self) -> int: ...


class Examples:
    """The sequences of one split. `[i]` lists them; `batch` collates some with the teacher's rows.

    A sequence that would carry none of `components` is left out; `limit` counts records.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        split: str,
        *,
        max_length: int,
        components: Collection[str] = ("kl_div", "ce_teacher", "ce_ground_truth"),
        limit: int | None = None,
    ) -> None:
        self.dataset, self.pad, self.k = dataset, tokenizer.pad, 0
        self.items: list[Example] = []
        self.too_long = 0
        self._text = "ce_teacher" in components
        self._truth = "ce_ground_truth" in components
        if dataset.distributions is not None and "kl_div" in components:
            self.k = dataset.distributions.k
            if dataset.header.tokenizer_sha256 != tokenizer.sha256:
                raise ConfigError(
                    f"{dataset.path}: its distributions are over another tokenizer than the student's "
                    f"({tokenizer.source}); set loss_weights.kl_div: 0 to learn from its text alone"
                )
        taken = 0
        for index, record in enumerate(dataset):
            if record.split != split or (limit is not None and taken >= limit):
                continue
            taken += 1
            self._add(index, record, tokenizer, max_length)

    def _add(self, index: int, record: Record, tokenizer: Tokenizer, max_length: int) -> None:
        truth = record.ground_truth if self._truth else None
        same = truth == record.teacher_text
        stored = record.logprobs if self.k else None
        found = []
        try:
            if self._text or same or stored:
                ids, start = encode(record, tokenizer, record.teacher_text)
                found.append(Example(index, ids, start, self._text, same, stored.row if stored else None))
            if truth is not None and not same:
                ids, start = encode(record, tokenizer, truth)
                found.append(Example(index, ids, start, False, True, None))
        except InputError as error:
            raise DatasetError(f"{self.dataset.path}: record {record.id}: {error}") from error
        for example in found:
            if len(example.ids) > max_length:
                self.too_long += 1
            else:
                self.items.append(example)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]

    @property
    def carried(self) -> dict[str, int]:
        """Target tokens that carry each component."""
        return {
            "kl_div": sum(e.targets for e in self.items if e.row is not None),
            "ce_teacher": sum(e.targets for e in self.items if e.teacher),
            "ce_ground_truth": sum(e.targets for e in self.items if e.ground_truth),
        }

    def batch(self, indices: Sequence[int]) -> Batch:
        """Collate; DatasetError where a stored completion is not the text's tokens."""
        chosen = [self.items[i] for i in indices]
        width = max(len(e.ids) for e in chosen)
        ids_BT = np.full((len(chosen), width), self.pad, np.int64)
        n = sum(e.targets for e in chosen)
        topk_ids = np.full((n, self.k), -1, np.int64)
        topk_lp, tail = np.full((n, self.k), -np.inf, np.float32), np.full(n, -np.inf, np.float32)
        positions, at = [], 0
        for row, e in enumerate(chosen):
            ids_BT[row, : len(e.ids)] = e.ids
            positions.append(row * width + np.arange(e.start - 1, len(e.ids) - 1))
            if e.row is not None:
                part = slice(at, at + e.targets)
                topk_ids[part], topk_lp[part], tail[part] = self._rows(e, e.row)
            at += e.targets
        repeats = [e.targets for e in chosen]
        return Batch(
            ids_BT=torch.from_numpy(ids_BT),
            positions_N=torch.from_numpy(np.concatenate(positions)),
            labels_N=torch.from_numpy(np.concatenate([e.ids[e.start :] for e in chosen]).astype(np.int64)),
            teacher_N=torch.from_numpy(np.repeat([e.teacher for e in chosen], repeats)),
            ground_truth_N=torch.from_numpy(np.repeat([e.ground_truth for e in chosen], repeats)),
            has_distribution_N=torch.from_numpy(np.repeat([e.row is not None for e in chosen], repeats)),
            topk_ids_NK=torch.from_numpy(topk_ids),
            topk_logprobs_NK=torch.from_numpy(topk_lp),
            tail_logprob_N=torch.from_numpy(tail),
            tokens=sum(len(e.ids) for e in chosen),
            records=tuple(e.record for e in chosen),
        )

    def _rows(self, e: Example, row: int) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        store = self.dataset.distributions
        assert store is not None  # a row comes from one
        item, wanted = store[row], e.ids[e.start :]
        if not same_tokens(item, wanted.tolist()):
            what = f"stored for tokens {_few(item.token_ids)}, the text has {_few(wanted)}"
            raise DatasetError(
                f"{self.dataset.path}: record {self.dataset[e.record].id}: "
                f"its distributions are not those of its text: {what}"
            )
        return item.topk_ids.astype(np.int64), item.topk_logprobs.astype(np.float32), item.tail_logprob


def encode(record: Record, tokenizer: Tokenizer, text: str) -> tuple[NDArray[np.int32], int]:
    """Ids of the conversation with `text` as its last turn, up to the end of the turn, and the first target's index."""
    messages = [*record.context, chat.Message("assistant", text)]
    encoded = chat.encode(tokenizer, messages, record.tools)
    target = np.asarray(encoded.target)
    last = int(np.flatnonzero(target)[-1])
    context = np.flatnonzero(target[:last] == 0)
    return np.asarray(encoded.ids[: last + 1], np.int32), int(context[-1]) + 1


def _few(ids: NDArray[np.int32]) -> str:
    return f"{ids[:6].tolist()}{' ...' if len(ids) > 6 else ''} ({len(ids)})"


def plan(
    lengths: Sequence[int],
    stages: Sequence[Stage],
    seed: int,
    *,
    max_steps: int | None = None,
    token_budget: int | None = None,
) -> list[list[list[int]]]:
    """All steps of a run, in order: a step is a list of micro-batches, a micro-batch a list of example indices.

    Ends with the epochs of the last stage, after `max_steps`, or with the step that reaches `token_budget`.
    """
    steps: list[list[list[int]]] = []
    tokens = 0
    for number, stage in enumerate(stages):
        fits = np.asarray([i for i, length in enumerate(lengths) if length <= stage.max_length], np.int64)
        for epoch in range(stage.epochs if fits.size else 0):
            batches = list(_epoch(fits, lengths, stage.batch_size, np.random.default_rng([seed, number, epoch])))
            for first in range(0, len(batches), stage.accumulation):
                step = batches[first : first + stage.accumulation]
                steps.append(step)
                tokens += sum(lengths[i] for batch in step for i in batch)
                if len(steps) == max_steps or (token_budget is not None and tokens >= token_budget):
                    return steps
    return steps


def _epoch(fits: NDArray[np.int64], lengths: Sequence[int], size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Micro-batches of one pass: shuffled, then sorted by length within buckets, then shuffled as batches."""
    order = rng.permutation(fits)
    batches: list[list[int]] = []
    for first in range(0, len(order), size * _BUCKET):
        bucket = sorted(order[first : first + size * _BUCKET].tolist(), key=lambda i: lengths[i])
        batches += [bucket[at : at + size] for at in range(0, len(bucket), size)]
    for index in rng.permutation(len(batches)):
        yield batches[index]
