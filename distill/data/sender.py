"""One request until it is answered: admission, reservation, attempts, journal.

What each attempt may cost is on disk before it is sent, and what came of it before anybody acts on it. Nobody sleeps
while holding a permit.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Coroutine, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

from distill.artifacts import canonical_json, sha256_text
from distill.data.budget import Budget, Prices, prompt_bound, usd
from distill.data.journal import Answer, Dead, Journal, Settlement, State
from distill.data.schema import Usage
from distill.data.teacher.admission import Admission
from distill.data.teacher.outcomes import Outcome, judge
from distill.data.teacher.spec import key_in_use
from distill.data.teacher.transport import Exchange, Transport
from distill.errors import GO_ON, InputError, Paused

T = TypeVar("T")
_LONGEST_BACKOFF = 60.0
_REFUSED_AT_THE_START = 3  # requests, before any was ever answered
_BYTES_PER_TOKEN = 3  # of a prompt, roughly: for limits a minute, which a server keeps by its own estimate
_LONGEST_REFUSAL = 30 * 60.0  # seconds of nothing but 429 after which the run pauses
_SURPLUS = "surplus"
_LONGEST_ID = 200  # characters


class Request(NamedTuple):
    """What is sent, and the key under which the journal knows it."""

    key: bytes
    body: Mapping[str, Any]


class Unanswered(Exception):
    """Every attempt at one request failed in a way that may pass; `exchange` is the last one, and `alike` whether all
    had its status."""

    def __init__(self, detail: str, exchange: Exchange, *, alike: bool = False) -> None:
        super().__init__(detail)
        self.exchange, self.alike = exchange, alike


class Stopped(Exception):
    """The run is stopping: nothing more is sent."""


class Watcher(Protocol):
    """Who is told what happens."""

    def waiting(self, detail: str) -> None: ...
    def failed(self, detail: str) -> None: ...


class Sender:
    """Sends requests of one run to one teacher."""

    def __init__(self, transport: Transport, journal: Journal, admission: Admission, budget: Budget,
                 prices: Prices | None, watcher: Watcher, *, attempts: int, stream: bool = False) -> None:  # fmt: skip
        self._transport, self._journal, self._admission, self._budget = transport, journal, admission, budget
        self._prices, self._watcher, self._attempts = prices, watcher, attempts
        self.stream = stream
        self._proven = journal.has_answers
        self._refusals = 0
        self._surplus = _kept_surplus(journal)
        self.unique_ids = False
        """Whether the server numbers its answers: then one that comes again is not taken for another's."""
        self._ids = journal.answered_ids()
        self.stopping = asyncio.Event()
        self._waiting: set[asyncio.Task[Any]] = set()

    def stop(self) -> None:
        """Send nothing more: whoever waits for a turn gets Stopped; what is in flight is not touched."""
        self.stopping.set()
        for task in self._waiting:
            task.cancel()

    async def ask(self, request: Request) -> Answer:
        """The answer, in the journal by the time this returns.

        Unanswered after the last attempt, Stopped when the run stops first, Paused where only time or money helps,
        InputError where the teacher refuses us.
        """
        if self.stream:
            request = request._replace(body={**request.body, "stream_options": {"include_usage": True}})
        exchange, outcome = await self._until_final(request, "answer", self.stream)
        if outcome.kind == "answer":
            self._proven = True
            return Answer(exchange.body, reply=outcome.reply)
        if not self._proven:  # not kept: what is wrong may be the configuration, or the server
            self._refusals += 1
            if self._refusals >= _REFUSED_AT_THE_START:
                raise InputError(f"the teacher gives no usable answer: {outcome.detail}")
            raise Unanswered(outcome.detail, exchange)
        return Answer(b"", Dead("http", outcome.detail))

    async def probe(self, body: Mapping[str, Any], stream: bool) -> Exchange:
        """One call of the probe: retried and entered in the ledger like any other."""
        key = bytes.fromhex(sha256_text("kd-probe/1\n" + canonical_json([dict(body), stream])))
        try:
            exchange, _ = await self._until_final(Request(key, body), "probe", stream)
        except Unanswered as error:
            special = body.get("tools") or body.get("logprobs") or stream
            if special and error.alike and error.exchange.status in (500, 501):
                return error.exchange  # how some servers say that they cannot do this
            raise Paused(f"the teacher does not answer ({error}); {GO_ON}") from error
        return exchange

    async def _until_final(self, request: Request, purpose: str, stream: bool) -> tuple[Exchange, Outcome]:
        failures = 0
        statuses: set[int] = set()
        while True:
            exchange, outcome = await self._attempt(request, purpose, stream)
            if outcome.kind in ("answer", "dead"):
                return exchange, outcome
            if outcome.kind == "refused":
                hint = f" ({key_in_use()})" if exchange.status in (401, 403) else ""
                raise InputError(f"the teacher refuses: {outcome.detail}{hint}")
            if outcome.kind == "quota":
                raise Paused(f"the teacher's quota is used up ({outcome.detail}); {GO_ON}")
            if outcome.kind == "cooldown":
                self._cool(outcome)
                continue
            failures += 1
            statuses.add(exchange.status)
            self._watcher.failed(outcome.detail)
            if failures >= self._attempts:
                raise Unanswered(outcome.detail, exchange, alike=len(statuses) == 1)
            backoff = random.uniform(0, min(_LONGEST_BACKOFF, 2.0 ** (failures - 1)))
            await self._sleep(backoff if outcome.wait is None else outcome.wait)

    def _cool(self, outcome: Outcome) -> None:
        """A 429: everybody waits; it costs no attempt, but not for ever."""
        self._watcher.waiting(outcome.detail)
        since = self._admission.throttled_since
        if since is not None and time.monotonic() - since > _LONGEST_REFUSAL:
            raise Paused(
                f"the teacher has been refusing for {_LONGEST_REFUSAL / 60:.0f} minutes ({outcome.detail}); {GO_ON}"
            )

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.stopping.wait(), seconds)
        except TimeoutError:
            return
        raise Stopped

    async def _attempt(self, request: Request, purpose: str, stream: bool) -> tuple[Exchange, Outcome]:
        """One exchange between reserving and settling."""
        tokens, cost, likely = self._most(request.body)
        reservation = await self._turn(self._budget.reserve(tokens, cost))
        end = Settlement("released", 0, "cancelled")
        try:
            permit = await self._turn(self._admission.acquire(likely))
            try:
                number, written = self._journal.reserve(request.key, purpose, tokens, cost)
                try:
                    await written
                    end = Settlement("uncertain", 0, "cancelled")
                    exchange = await self._transport.post(request.body, stream=stream)
                    outcome = self._judge(exchange)
                    end = self._settlement(exchange, outcome)
                    if outcome.kind == "cooldown":
                        permit.throttled(outcome.wait)
                    elif outcome.kind == "answer":
                        permit.succeeded()
                    self._enter(request.key, purpose, number, end, exchange, outcome)
                    surplus = self._learn(request.body, end)
                except asyncio.CancelledError:
                    if end.detail == "cancelled":
                        self._journal.settle(number, end)
                    raise
            finally:
                permit.close(_tokens(end))
        finally:
            released = end.state == "released"
            reservation.settle(0 if released else _tokens(end), 0 if released else end.cost)
        if surplus and self._budget.limited:
            raise Paused(f"{surplus}: from now on so much more is reserved for each; {GO_ON}")
        return exchange, outcome

    async def _turn(self, wait: Coroutine[Any, Any, T]) -> T:
        """Wait for something that may take long; Stopped if the run stops before it comes."""
        task = asyncio.current_task()
        assert task is not None
        if self.stopping.is_set():
            wait.close()
            raise Stopped
        self._waiting.add(task)
        try:
            return await wait
        except asyncio.CancelledError:
            if self.stopping.is_set() and task.uncancel() == 0:
                raise Stopped from None
            raise
        finally:
            self._waiting.discard(task)

    def _judge(self, exchange: Exchange) -> Outcome:
        """A late copy of an earlier answer would be taken for the answer to the next request on its connection, and
        from there on each for the next one's: HTTP/1.1 cannot tell."""
        outcome = judge(exchange, time.time())
        if outcome.kind == "answer" and outcome.reply and outcome.reply.id:
            if self.unique_ids and outcome.reply.id[:_LONGEST_ID] in self._ids:
                self._transport.distrust()
                return Outcome("retry", 0.0, "keep", "an answer that was given before")
            self._ids.add(outcome.reply.id[:_LONGEST_ID])
        return outcome

    def _enter(self, key: bytes, purpose: str, number: int, end: Settlement, exchange: Exchange,
                     outcome: Outcome) -> None:  # fmt: skip
        if purpose == "answer" and outcome.kind == "answer":
            self._journal.settle_with(number, end, key, Answer(exchange.body))
        elif purpose == "answer" and outcome.kind == "dead" and self._proven:
            self._journal.settle_with(number, end, key, Answer(b"", Dead("http", outcome.detail)))
        else:
            self._journal.settle(number, end)

    def _settlement(self, exchange: Exchange, outcome: Outcome) -> Settlement:
        if outcome.kind == "answer" and outcome.reply:
            detail, usage = outcome.reply.id[:_LONGEST_ID], outcome.reply.usage
        else:
            detail, usage = outcome.detail, None
            if outcome.charge != "settle":
                state: State = "released" if outcome.charge == "release" else "uncertain"
                return Settlement(state, exchange.status, detail)
        if usage is None:
            return Settlement("settled", exchange.status, detail)
        return Settlement("settled", exchange.status, detail, usage, self._prices.cost(usage) if self._prices else 0)

    def _most(self, body: Mapping[str, Any]) -> tuple[int, int, int]:
        """Most tokens that a request can take, what they cost, and how many it is likely to take."""
        usage = _bound(body)
        tokens, cost = usage.prompt + usage.completion, self._prices.cost(usage) if self._prices else 0
        more_tokens, more_cost = self._surplus if self._budget.limited else (0, 0)
        return tokens + more_tokens, cost + more_cost, usage.prompt // _BYTES_PER_TOKEN + usage.completion

    def _learn(self, body: Mapping[str, Any], end: Settlement) -> str:
        """Keep by how much a server counts more than a request can take, rounded up to a power of two: so much is
        reserved on top from then on, in later starts too. Returns words about it if that is more than was known. In
        the settlement's transaction."""
        if end.usage is None:
            return ""
        bound, counted, paid = _bound(body), _tokens(end) or 0, end.cost or 0
        most, cost = bound.prompt + bound.completion, self._prices.cost(bound) if self._prices else 0
        more_tokens, more_cost = max(counted - most, 0), max(paid - cost, 0)
        if more_tokens <= self._surplus[0] and more_cost <= self._surplus[1]:
            return ""
        old_tokens, old_cost = self._surplus
        self._surplus = max(old_tokens, 1 << more_tokens.bit_length()), max(old_cost, 1 << more_cost.bit_length())
        self._journal.keep(_SURPLUS, "{} {}".format(*self._surplus))
        return (f"the teacher counted {counted:,} tokens ({usd(paid)} USD) for a request that may take {most:,} "
                f"({usd(cost)} USD)")  # fmt: skip


def _bound(body: Mapping[str, Any]) -> Usage:
    """Most tokens that a request can take."""
    prompt = prompt_bound(body.get("messages", body.get("prompt", "")), body.get("tools", ()))
    return Usage(prompt, int(body.get("max_tokens") or body.get("max_completion_tokens") or 0))


def _kept_surplus(journal: Journal) -> tuple[int, int]:
    """Tokens, and 1e-12 of the currency, that the teacher is known to count beyond the bound of a request."""
    kept = journal.meta(_SURPLUS) or "0 0"
    if not re.fullmatch(r"\d{1,18} \d{1,18}", kept):
        raise InputError(f"{journal.path}: damaged: {_SURPLUS} is {kept[:40]!r}")
    tokens, cost = map(int, kept.split())
    return tokens, cost


def _tokens(end: Settlement) -> int | None:
    return None if end.usage is None else end.usage.prompt + end.usage.completion
