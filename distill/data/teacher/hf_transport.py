"""A Hugging Face model in this process that answers completions requests like a server's.

Requests that wait while one batch is generated form the next. Every request samples with its own seeded generator, so
that which batch it fell into changes its answer through floating-point rounding alone.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from distill.data.schema import Teacher
from distill.data.teacher.extras import teacher_extra
from distill.data.teacher.transport import Exchange
from distill.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


class WhiteBox(NamedTuple):
    """A teacher in `transformers`, whose logits can be read."""

    model: Any
    tokenizer: Tokenizer
    device: str


class Completion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What can be asked: the body of a completions request."""

    prompt: str | list[int]
    """Text, or its token ids."""
    max_tokens: int
    model: str = ""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Each of them one token of the model; the tokenizer's own ends always stop."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("max_tokens must be at least 1, temperature at least 0, top_p in (0, 1]")


class _Job(NamedTuple):
    """A request that waits for its answer."""

    body: Completion
    ids: list[int]
    stops: set[int]
    most: int
    """Tokens that it may take."""
    answer: asyncio.Future[Exchange]


class HfTransport:
    """A white box as a Transport. `batch` is the most requests that are generated together."""

    def __init__(self, box: WhiteBox, identity: Teacher, *, batch: int) -> None:
        self.identity = identity
        self._box, self._batch = box, batch
        self._waiting: list[_Job] = []
        self._worker: asyncio.Task[None] | None = None
        self._stopped = threading.Event()

    async def post(self, body: Mapping[str, Any], *, stream: bool = False) -> Exchange:
        """Answer a completions request, a streamed one whole; status 400 for what cannot be asked, 413 for what does
        not fit into memory even alone."""
        try:
            job = self._job(msgspec.convert(dict(body), Completion))
        except ValueError as error:  # msgspec's ValidationError is one
            return _refusal(400, str(error))
        if self._stopped.is_set():
            return _failure("the teacher was stopped", sent=False)
        self._waiting.append(job)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await job.answer

    def distrust(self) -> None:
        """Nothing comes twice from here."""

    async def close(self) -> None:
        """Stop at the next token; whoever still waits is told."""
        self._stopped.set()
        if self._worker is not None:
            await asyncio.wait([self._worker])
        for job in self._waiting:
            if not job.answer.done():
                job.answer.set_result(_failure("the teacher was stopped", sent=False))

    def _job(self, body: Completion) -> _Job:
        """ValueError for what this model cannot be asked."""
        tokenizer = self._box.tokenizer
        ids = tokenizer.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        if not ids or not all(0 <= token < tokenizer.vocab_size for token in ids):
            raise ValueError("the prompt is empty or holds ids beyond the vocabulary")
        limit = getattr(self._box.model.config, "max_position_embeddings", None) or len(ids) + body.max_tokens
        if len(ids) >= limit:
            raise ValueError(f"the prompt takes {len(ids)} tokens, the model reads {limit}")
        stops = {text: tokenizer.encode(text) for text in body.stop}
        if unfit := [text for text, tokens in stops.items() if len(tokens) != 1]:
            raise ValueError(f"stop {unfit[0]!r} is not one token of the model")
        ends = tokenizer.stop_ids.union(*stops.values())
        return _Job(body, ids, ends, min(body.max_tokens, limit - len(ids)), asyncio.get_running_loop().create_future())

    async def _work(self) -> None:
        while self._waiting and not self._stopped.is_set():
            await asyncio.sleep(0)  # let everyone who is ready join
            jobs, self._waiting = self._waiting[: self._batch], self._waiting[self._batch :]
            for job, exchange in zip(jobs, await asyncio.to_thread(self._answer, jobs)):
                if not job.answer.done():
                    job.answer.set_result(exchange)

    def _answer(self, jobs: Sequence[_Job]) -> list[Exchange]:
        """Generate; where memory runs out, in two halves, and in smaller batches from then on."""
        import torch

        try:
            return self._generate(jobs)
        except RuntimeError as error:
            problem = " ".join(str(error).split())[:300]
            # the CPU's allocator has no exception of its own
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in problem:
                return [_failure(f"transformers: {problem}", sent=True)] * len(jobs)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(jobs) == 1:
            return [_refusal(413, f"a prompt of {len(jobs[0].ids)} tokens: {problem}")]
        self._batch = half = (len(jobs) + 1) // 2
        return self._answer(jobs[:half]) + self._answer(jobs[half:])

    def _generate(self, jobs: Sequence[_Job]) -> list[Exchange]:
        import torch

        generation = teacher_extra("transformers").generation
        pad, device = self._box.tokenizer.pad, self._box.device
        width = max(len(job.ids) for job in jobs)
        ids_BT = torch.tensor([[pad] * (width - len(job.ids)) + job.ids for job in jobs], device=device)
        mask_BT = torch.tensor([[0] * (width - len(job.ids)) + [1] * len(job.ids) for job in jobs], device=device)
        draws = [random.Random(job.body.seed) for job in jobs]
        finished = [False] * len(jobs)

        def choose(_: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
            """Scores whose greatest is the token sampled; rows of logits beyond the tokenizer's are padding."""
            known_BV = logits_BV[:, : self._box.tokenizer.vocab_size]
            tokens_B = sample(known_BV, [job.body for job in jobs], [draw.random() for draw in draws])
            return torch.full_like(logits_BV, -torch.inf).scatter_(1, tokens_B[:, None], 0.0)

        def ended(ids_BT: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
            made = ids_BT.shape[1] - width
            done = [self._stopped.is_set() or job.answer.done() or made >= job.most or token in job.stops
                    for job, token in zip(jobs, ids_BT[:, -1].tolist())]  # fmt: skip
            finished[:] = [before or now for before, now in zip(finished, done)]
            return torch.tensor(finished, device=device)

        self._box.model.generation_config = generation.GenerationConfig()  # no penalties that its folder may bring
        with torch.inference_mode():
            out_BT = self._box.model.generate(
                ids_BT, attention_mask=mask_BT, max_new_tokens=max(job.most for job in jobs), pad_token_id=pad,
                do_sample=False, logits_processor=[choose], stopping_criteria=[ended],
            )  # fmt: skip
        return [self._exchange(job, row) for job, row in zip(jobs, out_BT[:, width:].tolist())]

    def _exchange(self, job: _Job, ids: list[int]) -> Exchange:
        """The answer up to its first stop token, as a server's JSON."""
        end = next((i for i, token in enumerate(ids[: job.most]) if token in job.stops), None)
        if end is None and len(ids) < job.most:
            return _failure("the teacher was stopped", sent=True)
        kept = ids[: job.most] if end is None else ids[:end]
        n = len(kept) if end is None else end + 1
        choice = {
            "index": 0,
            "text": self._box.tokenizer.decode(kept),
            "finish_reason": "length" if end is None else "stop",
        }
        usage = {"prompt_tokens": len(job.ids), "completion_tokens": n, "total_tokens": len(job.ids) + n}
        return _json(200, {"object": "text_completion", "model": self.identity.model, "choices": [choice],
                           "usage": usage})  # fmt: skip


def sample(logits_BV: torch.Tensor, bodies: Sequence[Completion], draws: Sequence[float]) -> torch.Tensor:
    """A token for each row: the most likely at temperature 0, else by its draw from [0, 1), in the order of the ids, so
    that rounding moves a choice only where the draw falls on a border."""
    import torch

    device = logits_BV.device
    greedy_B = logits_BV.argmax(-1)
    temperature_B = torch.tensor([body.temperature for body in bodies], dtype=torch.float64, device=device)
    if not temperature_B.any():
        return greedy_B
    scale_B1 = torch.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    probs_BV = (logits_BV.double() / scale_B1).softmax(-1)
    top_p_B1 = torch.tensor([[body.top_p] for body in bodies], dtype=torch.float64, device=device)
    if (top_p_B1 < 1).any():
        ranked_BV = probs_BV.sort(-1, descending=True).values
        # the nucleus: the fewest tokens that hold top_p (Holtzman et al. 2020, arXiv:1904.09751)
        kept_BV = ranked_BV.cumsum(-1) - ranked_BV < top_p_B1
        least_B1 = ranked_BV.gather(1, kept_BV.sum(-1, keepdim=True) - 1)
        probs_BV = probs_BV.where(probs_BV >= least_B1, 0.0)
    mass_BV = probs_BV.cumsum(-1)
    draw_B1 = torch.tensor([[draw] for draw in draws], dtype=torch.float64, device=device) * mass_BV[:, -1:]
    drawn_B = torch.searchsorted(mass_BV, draw_B1, right=True)[:, 0]
    return torch.where(temperature_B > 0, drawn_B, greedy_B)


def _json(status: int, value: Any) -> Exchange:
    return Exchange(status, {"content-type": "application/json"}, msgspec.json.encode(value), "", True)


def _refusal(status: int, why: str) -> Exchange:
    """A server's answer to a request that it cannot serve."""
    return _json(status, {"error": {"code": status, "message": why, "type": "invalid_request_error"}})


def _failure(why: str, *, sent: bool) -> Exchange:
    return Exchange(0, {}, b"", why, sent)
