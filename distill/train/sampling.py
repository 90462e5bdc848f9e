"""On-policy distillation (Agarwal et al. 2024, GKD): the student's own answers, for the teacher to be compared on.

Learning only from others' texts, a student never sees the mistakes that it makes itself. So a share of a step's
sequences has its last part, one turn of the teacher's, replaced by what the student would have said. No gradient goes
through the drawing. What is drawn depends on weights, seed, step and sequence, never on what is drawn beside it: a
token is the one whose logit and Gumbel noise add up to most, and each sequence has its own noise. Rounding, which does
differ from batch to batch, then decides only between two sums that agree to a millionth; where a number falls among
cumulated probabilities it would decide between all the many unlikely tokens.

Shapes: B sequences at a time, T tokens, D hidden, V vocabulary, N target tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.data.batches import Batch, Example, Examples
from distill.data.spans import KINDS
from distill.model import LayerCache, Student
from distill.tokenizer import Tokenizer

_CHOSEN, _TURN, _TOKENS = range(3)


class OnPolicy(NamedTuple):
    """How much of a step is the student's own, and how it is drawn."""

    share: float
    """Of the sequences, each drawn by itself."""
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def require_valid(self) -> None:
        """ValueError naming what is wrong."""
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in [0, 1], not {self.share}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")

    def chosen(self, step: int, index: int) -> bool:
        """Whether sequence `index` is the student's own in this step."""
        return bool(self._generator(step, index, _CHOSEN).random() < self.share)

    def prompt(self, step: int, index: int, example: Example) -> list[int]:
        """What comes before one of the example's learned turns, whose turn it is drawn."""
        starts = example.places[np.flatnonzero(np.diff(example.places, prepend=-2) > 1)]
        turn = int(self._generator(step, index, _TURN).integers(len(starts)))
        return [int(i) for i in example.ids[: starts[turn]]]

    def noise(self, step: int, index: int) -> torch.Generator:
        """Where a sequence's tokens are drawn from."""
        return torch.Generator().manual_seed(int(self._generator(step, index, _TOKENS).integers(1 << 32)))

    def _generator(self, step: int, index: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, step, index, purpose])


def own_answers(
    student: Student, examples: Examples, indices: Sequence[int], how: OnPolicy, step: int, tokenizer: Tokenizer
) -> Batch:
    """A micro-batch of the student's own answers to what comes before a learned turn of each of these examples."""
    longest = student.config.max_position_embeddings
    prompts = [how.prompt(step, i, examples[i]) for i in indices]
    limits = [min(how.max_new_tokens, longest - len(prompt)) for prompt in prompts]
    answers = sample(student, prompts, limits, [how.noise(step, i) for i in indices], stop_ids=tokenizer.stop_ids,
                     vocabulary=tokenizer.vocab_size, temperature=how.temperature, top_p=how.top_p)  # fmt: skip
    return own_batch(prompts, answers, [examples[i].record for i in indices])


def own_batch(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], records: Sequence[int]) -> Batch:
    """Prompts and answers end to end, each token of an answer a target: of the divergence, and of no cross-entropy,
    which would only make the student surer of itself. Spans are not looked for: all is `content`."""
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers)]
    starts = np.cumsum([0, *lengths])[:-1]
    places = [start + np.arange(len(p), len(p) + len(a)) for start, p, a in zip(starts, prompts, answers)]
    ids_T = torch.tensor([token for pair in zip(prompts, answers) for part in pair for token in part])
    positions_N = torch.from_numpy(np.concatenate(places)) - 1
    n = len(positions_N)
    never_N = torch.zeros(n, dtype=torch.bool)
    return Batch(
        ids_T=ids_T,
        lengths=tuple(lengths),
        positions_N=positions_N,
        labels_N=ids_T[positions_N + 1],
        span_N=torch.full((n,), KINDS.index("content")),
        teacher_N=never_N,
        ground_truth_N=never_N,
        has_distribution_N=~never_N,
        topk_ids_NK=torch.empty(n, 0, dtype=torch.long),
        topk_logprobs_NK=torch.empty(n, 0),
        tail_logprob_N=torch.zeros(n),
        records=tuple(records),
    )


@torch.no_grad()
def sample(
    student: Student,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    noise: Sequence[torch.Generator],
    *,
    stop_ids: Collection[int],
    vocabulary: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    together: int = 32,
) -> list[list[int]]:
    """The continuation of each prompt, up to its limit of tokens, with the one of `stop_ids` that ends it.

    `noise`: generators on the CPU, one a prompt. `vocabulary`: ids that exist; no other is drawn. Temperature 0 takes
    the likeliest token. `together`: sequences at a time, which share each pass over the weights.
    ValueError where a prompt is empty or its limit below 1.
    """
    if not all(prompts) or min(limits, default=1) < 1:
        raise ValueError("a prompt has at least one token, and a limit of at least one more")
    how = _Draw(vocabulary, temperature, top_p, stop_ids)
    training = student.training
    student.eval()
    found: dict[int, list[int]] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    try:
        for first in range(0, len(by_length), together):
            part = by_length[first : first + together]
            group = _Group([prompts[i] for i in part], [limits[i] for i in part], [noise[i] for i in part], how)
            found |= zip(part, group.run(student))
    finally:
        student.train(training)
    return [found[i] for i in range(len(prompts))]


class _Draw(NamedTuple):
    """How a token is drawn, and which of them end an answer."""

    vocabulary: int
    temperature: float
    top_p: float
    stop_ids: Collection[int]

    def tokens(self, logits_BV: Tensor, noise: Sequence[torch.Generator]) -> list[int]:
        """One for each row."""
        z_BV = logits_BV[:, : self.vocabulary].float()
        if self.temperature == 0:
            return z_BV.argmax(1).tolist()
        z_BV = z_BV / self.temperature
        if self.top_p < 1:
            p_BV = z_BV.softmax(1)
            ranked_BV = p_BV.sort(1, descending=True).values
            # the nucleus: the fewest tokens that hold top_p (Holtzman et al. 2020)
            size_B = (ranked_BV.cumsum(1) - ranked_BV < self.top_p).sum(1)
            z_BV = z_BV.masked_fill(p_BV < ranked_BV.gather(1, size_B[:, None] - 1), -torch.inf)
        wait_BV = torch.stack(
            [torch.empty(z_BV.shape[1], dtype=torch.float64).exponential_(generator=g) for g in noise]
        )
        return (z_BV - wait_BV.log().float().to(z_BV.device)).argmax(1).tolist()


class _Group:
    """Sequences that go through the student side by side: all are read from their first token on, as far as the
    shortest is known, so that there is no padding; one that is longer has its own next token where another draws."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], noise: Sequence[torch.Generator], how: _Draw
    ) -> None:
        self._prompts, self._limits, self._noise, self._how = prompts, limits, noise, how
        self._ids = [list(prompt) for prompt in prompts]

    def run(self, student: Student) -> list[list[int]]:
        """Draw them all to their ends."""
        cache: list[LayerCache] = []
        read, rows = 0, list(range(len(self._ids)))
        while rows:
            known = min(len(self._ids[i]) for i in rows)
            ids_BT = torch.tensor([self._ids[i][read:known] for i in rows], device=student.lm_head.weight.device)
            hidden_BD = student.hidden(ids_BT, cache=cache)[:, -1]
            read = known
            due = [row for row, i in enumerate(rows) if len(self._ids[i]) == read]
            tokens = self._how.tokens(student.lm_head(hidden_BD[due]), [self._noise[rows[row]] for row in due])
            for row, token in zip(due, tokens):
                self._ids[rows[row]].append(token)
            going = [row for row, i in enumerate(rows) if not self._ended(i)]
            if len(going) < len(rows):
                cache = [LayerCache(layer.keys[going], layer.values[going]) for layer in cache]
                rows = [rows[row] for row in going]
        return [ids[len(prompt) :] for ids, prompt in zip(self._ids, self._prompts)]

    def _ended(self, i: int) -> bool:
        new = len(self._ids[i]) - len(self._prompts[i])
        return new > 0 and (self._ids[i][-1] in self._how.stop_ids or new == self._limits[i])
