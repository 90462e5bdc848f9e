"""From records to batches: sequences, what is learned in each, the teacher's rows, and the order they come in.

A record gives its conversation, in which all of the teacher's turns are learned, and neither what tools returned nor
the dataset's own turns: they carry kl_div (where its distributions are stored) and ce_teacher. Its ground truth is the
last turn: of the same sequence if that is its text, else of a second one, in which nothing else is learned. A sequence
longer than the limit is left out and counted, never cut: a cut answer would teach the student to stop early. The order
is a pure function of seed, lengths and stages, so a resumed run needs only the number of the step.

Sequences of a micro-batch lie end to end in one row: there is no padding.

Shapes: T tokens of a micro-batch, N target tokens, K stored ids a token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.data.records import Dataset, Record
from distill.data.spans import KINDS, span_kinds, turn_of
from distill.data.store.capture import learned_tokens
from distill.data.store.distributions import Distribution, same_tokens
from distill.errors import ConfigError, DatasetError, InputError
from distill.tokenizer import Tokenizer

_MOST_STEPS = 10**6
"""They are laid out before a run starts."""


class Example(NamedTuple):
    """A sequence up to its last target: the newline that closes the turn is not in it."""

    record: int
    """Index in the dataset."""
    ids: NDArray[np.int32]
    places: NDArray[np.int64]
    """Where its targets are."""
    spans: NDArray[np.int8]
    """The kind of span that each target belongs to, an index into `distill.data.spans.KINDS`."""
    teacher: bool
    """Carries ce_teacher."""
    truths: int
    """How many of its last targets carry ce_ground_truth."""
    row: int | None
    """Carries kl_div: row of the store with the teacher's distributions of its targets."""

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return len(self.places)

    @property
    def labels(self) -> NDArray[np.int32]:
        """Ids of the target tokens."""
        return self.ids[self.places]


class Batch(NamedTuple):
    """Sequences end to end, and for each of N targets where its logits come from and what they should be."""

    ids_T: Tensor
    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    positions_N: Tensor
    """Index into T of the token before the target."""
    labels_N: Tensor
    span_N: Tensor
    """Index into `distill.data.spans.KINDS`."""
    teacher_N: Tensor
    ground_truth_N: Tensor
    has_distribution_N: Tensor
    topk_ids_NK: Tensor
    """-1 where there is no distribution."""
    topk_logprobs_NK: Tensor
    tail_logprob_N: Tensor
    records: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens in it."""
        return len(self.ids_T)

    @property
    def targets(self) -> int:
        """Target tokens in it."""
        return len(self.labels_N)

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
    def batch_tokens(self) -> int | None: ...
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
        self.dataset, self.k = dataset, 0
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
        last = len(record.messages) - 1
        try:
            if self._text or same or stored:
                ids, places = learned_tokens(tokenizer, record.messages, record.tools, record.learned)
                spans = span_kinds(tokenizer, record.messages, record.tools, record.learned)
                truths = _turn_tokens(places) if same else 0
                found.append(Example(index, ids, places, spans, self._text, truths, stored.row if stored else None))
            if truth is not None and not same:
                messages = [*record.context, turn_of(truth)]
                ids, places = learned_tokens(tokenizer, messages, record.tools, [last])
                spans = span_kinds(tokenizer, messages, record.tools, [last])
                found.append(Example(index, ids, places, spans, False, len(places), None))
        except InputError as error:
            raise DatasetError(f"{self.dataset.path}: record {record.id}: {error}") from error
        for example in found:
            if len(example.ids) > max_length:
                self.too_long += 1
            else:
                self.items.append(example)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [len(e.ids) for e in self.items]

    def __getitem__(self, index: int) -> Example:
        return self.items[index]

    @property
    def carried(self) -> dict[str, int]:
        """Target tokens that carry each component; of kl_div, those of the turns whose distributions are stored."""
        return {
            "kl_div": sum(e.targets for e in self.items if e.row is not None),
            "ce_teacher": sum(e.targets for e in self.items if e.teacher),
            "ce_ground_truth": sum(e.truths for e in self.items),
        }

    @property
    def spans(self) -> dict[str, int]:
        """Target tokens in each kind of span; a kind without any is absent."""
        counts = sum((np.bincount(e.spans, minlength=len(KINDS)) for e in self.items), np.zeros(len(KINDS), np.int64))
        return {kind: int(n) for kind, n in zip(KINDS, counts) if n}

    def batch(self, indices: Sequence[int]) -> Batch:
        """Collate; DatasetError where a stored completion is not the text's tokens."""
        chosen = [self.items[i] for i in indices]
        starts = np.cumsum([0, *(len(e.ids) for e in chosen)])
        ends = np.cumsum([e.targets for e in chosen])
        n = int(ends[-1])
        topk_ids = np.full((n, self.k), -1, np.int64)
        topk_lp, tail = np.full((n, self.k), -np.inf, np.float32), np.full(n, -np.inf, np.float32)
        for index, item in self._stored(chosen):
            part = slice(int(ends[index]) - len(item.token_ids), int(ends[index]))
            topk_ids[part], topk_lp[part], tail[part] = item.topk_ids, item.topk_logprobs, item.tail_logprob
        positions = [start + e.places - 1 for start, e in zip(starts, chosen)]
        truth = [np.arange(e.targets) >= e.targets - e.truths for e in chosen]
        return Batch(
            ids_T=torch.from_numpy(np.concatenate([e.ids for e in chosen]).astype(np.int64)),
            lengths=tuple(len(e.ids) for e in chosen),
            positions_N=torch.from_numpy(np.concatenate(positions)),
            labels_N=torch.from_numpy(np.concatenate([e.labels for e in chosen]).astype(np.int64)),
            span_N=torch.from_numpy(np.concatenate([e.spans for e in chosen]).astype(np.int64)),
            teacher_N=torch.from_numpy(np.repeat([e.teacher for e in chosen], [e.targets for e in chosen])),
            ground_truth_N=torch.from_numpy(np.concatenate(truth)),
            has_distribution_N=torch.from_numpy((topk_ids >= 0).any(1)),
            topk_ids_NK=torch.from_numpy(topk_ids),
            topk_logprobs_NK=torch.from_numpy(topk_lp),
            tail_logprob_N=torch.from_numpy(tail),
            records=tuple(e.record for e in chosen),
        )

    def _stored(self, chosen: Sequence[Example]) -> Iterator[tuple[int, Distribution]]:
        """The distributions of those of `chosen` that have some, each with its index."""
        store = self.dataset.distributions
        with_row = [(i, e, e.row) for i, e in enumerate(chosen) if e.row is not None]
        if store is None or not with_row:
            return
        for (index, e, _), item in zip(with_row, store.take([row for _, _, row in with_row])):
            if not same_tokens(item, e.labels.tolist()):
                what = f"stored for tokens {_few(item.token_ids)}, the text has {_few(e.labels)}"
                raise DatasetError(
                    f"{self.dataset.path}: record {self.dataset[e.record].id}: "
                    f"its distributions are not those of its text: {what}"
                )
            yield index, item


def _turn_tokens(places: NDArray[np.int64]) -> int:
    """How many targets the last turn has: those that follow one another to the end."""
    breaks = np.flatnonzero(np.diff(places) > 1)
    return len(places) - (int(breaks[-1]) + 1 if breaks.size else 0)


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
    if max_steps == 0:
        return []
    steps: list[list[list[int]]] = []
    tokens = 0
    for number, stage in enumerate(stages):
        fits = np.asarray([i for i, length in enumerate(lengths) if length <= stage.max_length], np.int64)
        for epoch in range(stage.epochs if fits.size else 0):
            order = np.random.default_rng([seed, number, epoch]).permutation(fits).tolist()
            batches = list(micro_batches(order, lengths, stage))
            for first in range(0, len(batches), stage.accumulation):
                step = batches[first : first + stage.accumulation]
                steps.append(step)
                tokens += sum(lengths[i] for batch in step for i in batch)
                if len(steps) > _MOST_STEPS:
                    raise ConfigError(f"more than {_MOST_STEPS:,} steps: fewer epochs, or max_steps")
                if len(steps) == max_steps or (token_budget is not None and tokens >= token_budget):
                    return steps
    return steps


def micro_batches(order: Sequence[int], lengths: Sequence[int], stage: Stage) -> Iterator[list[int]]:
    """Cut one pass into micro-batches: of `batch_tokens` at most, or of `batch_size` sequences."""
    batch: list[int] = []
    tokens = 0
    for index in order:
        full = tokens + lengths[index] > stage.batch_tokens if stage.batch_tokens else len(batch) == stage.batch_size
        if batch and full:
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch
