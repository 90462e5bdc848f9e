"""A served teacher that scores given text, such as the student's own answers: its likeliest ids at every target.

A server that echoes a prompt with its log-probabilities (vLLM) is asked once a sequence. One that does not (llama.cpp
tells those of generated tokens only, ggml-org/llama.cpp#27174) is asked once a target, for one token after all that
comes before it: its cache of prompts makes that as slow as generating the text, no slower. Either way ids are sent and
come back, so the server's tokenizer must be the student's; where a server tells a token's bytes as well, they are
checked. The mass of all other ids is 1 minus that of those told, which rounds where little is left.

Shapes: N target tokens, K ids a token.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distill.artifacts import canonical_json, sha256_text
from distill.data.batches import Batch
from distill.data.store.distributions import TopEntries, entries
from distill.data.teacher.outcomes import judge
from distill.data.teacher.transport import HttpTransport, only_model
from distill.data.teacher.wire import TokenLogprob
from distill.errors import GO_ON, ConfigError, InputError, Paused
from distill.tokenizer import Tokenizer
from distill.train.targets import TopK

_PAUSES = (0.5, 2.0, 8.0)
"""Seconds between tries, at the least."""
_LONGEST_PAUSE = 60.0


class ServedTeacher:
    """An OpenAI-compatible completions endpoint. `close` it, or use it in a `with`."""

    def __init__(
        self, url: str, tokenizer: Tokenizer, *, k: int, model: str | None = None, connections: int = 4
    ) -> None:
        """InputError where there is no server. `connections`: sequences it works on at a time."""
        self._tokenizer, self._k, self._url = tokenizer, k, url
        self._runner = asyncio.Runner()
        self._echoes: bool | None = None
        try:
            self._http = self._runner.run(HttpTransport.connect(url, path="completions", connections=connections))
            self._model = model or only_model(url, self._http.models)
        except BaseException:
            self._runner.close()
            raise
        self._connections = connections

    @property
    def sha256(self) -> str:
        """Of what is known of it: where it is, and its name."""
        return sha256_text(canonical_json([self._url, self._model]))

    def __str__(self) -> str:
        return f"from {self._model} at {self._url}, top_k {self._k}"

    def __enter__(self) -> ServedTeacher:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._http.close())
        self._runner.close()

    def target(self, batch: Batch) -> TopK:
        """The likeliest k ids of the batch's targets. Paused where the server does not answer for now."""
        rows = self._runner.run(self._rows(batch))
        n = len(rows)
        ids_NK, logprobs_NK = np.full((n, self._k), -1, np.int64), np.full((n, self._k), -np.inf, np.float32)
        for row, found in enumerate(rows):
            if not len(found.ids):
                raise InputError(f"the teacher at {self._url} gives no distribution for a token of {self._k} ids")
            ids_NK[row, : len(found.ids)], logprobs_NK[row, : len(found.ids)] = found.ids, found.logprobs
        tail_N = np.stack([found.tail for found in rows])
        parts = (torch.from_numpy(part).to(batch.ids_T.device) for part in (ids_NK, logprobs_NK, tail_N))
        return TopK(*parts)

    async def _rows(self, batch: Batch) -> list[TopEntries]:
        room = asyncio.Semaphore(self._connections)
        ends = torch.tensor(batch.lengths).cumsum(0)
        target_N = batch.positions_N.cpu() + 1
        of_N = torch.bucketize(target_N, ends, right=True)

        async def score(index: int, ids: list[int]) -> list[TopEntries]:
            places = (target_N[of_N == index] - (int(ends[index]) - len(ids))).tolist()
            async with room:
                return [entries(row, None, self._tokenizer, self._k) for row in await self._score(ids, places)]

        sequences = [part.tolist() for part in batch.ids_T.cpu().split(batch.lengths)]
        first = [await score(0, sequences[0])]  # shows what kind of server it is
        rest = await asyncio.gather(*(score(i, ids) for i, ids in enumerate(sequences[1:], 1)))
        return [row for found in (*first, *rest) for row in found]

    async def _score(self, ids: list[int], places: Sequence[int]) -> list[TokenLogprob]:
        """What the server expects at each place of a sequence."""
        if self._echoes is not False and places:
            told = await self._ask(ids)
            self._echoes = len(told) >= len(ids)
            if self._echoes:
                return [told[place] for place in places]
        return [(await self._ask(ids[:place]))[-1] for place in places]

    async def _ask(self, ids: Sequence[int]) -> tuple[TokenLogprob, ...]:
        """The log-probabilities of the prompt, from a server that echoes them, and of one more token."""
        body: dict[str, Any] = {
            "model": self._model, "prompt": list(ids), "max_tokens": 1, "echo": True, "logprobs": self._k,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        pauses = iter(_PAUSES)
        while True:
            outcome = judge(await self._http.post(body), time.time())
            if outcome.reply is not None:
                told = outcome.reply.logprobs
                if not told or not told[-1].top:
                    raise InputError(f"the teacher at {self._url} gives no log-probabilities")
                self._require_ours(told)
                return told
            if outcome.kind in ("refused", "dead"):
                raise InputError(f"the teacher at {self._url} refuses: {outcome.detail}")
            wait = max(next(pauses, math.inf), outcome.wait or 0.0)
            if outcome.kind == "quota" or wait > _LONGEST_PAUSE:
                raise Paused(f"the teacher at {self._url} is not ready ({outcome.detail}); {GO_ON}")
            await asyncio.sleep(wait)

    def _require_ours(self, told: Sequence[TokenLogprob]) -> None:
        """ConfigError where the server's ids stand for other bytes than ours."""
        for token in (candidate for row in told for candidate in row.top):
            ours = self._tokenizer.bytes_by_id.get(-1 if token.id is None else token.id)
            if token.bytes and ours is not None and token.bytes != ours:
                raise ConfigError(
                    f"the teacher at {self._url}: its tokenizer is not the student's ({self._tokenizer.source}): "
                    f"id {token.id} is {token.bytes!r} there, {ours!r} here"
                )
