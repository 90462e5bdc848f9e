"""Generation: workers that play episodes until every stratum has its quota of accepted ones.

The prompts of a stratum are asked in their order, and one is sent only while accepted episodes and those in flight
are fewer than the quota. So the set that is asked is the same at any concurrency, and whatever was interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distill.broker import Broker
from distill.data.episodes import Accepted, Protocol, Rejected, advance, episode
from distill.data.journal import Answer, Dead, Journal, Reason
from distill.data.prompts.stream import Prompt, PromptStream
from distill.data.sender import Request, Sender, Stopped, Unanswered
from distill.data.status import Status
from distill.data.teacher.outcomes import MALFORMED
from distill.errors import GO_ON, Paused, Terminated

_DOWN_AFTER = 3  # prompts in a row that got no answer: the teacher is away
_GIVE_UP_AFTER = 3  # times the attempts that a request is worth
_MORE_IN_AN_OUTAGE = 5  # times as many, where no other request is answered
_MOST_MALFORMED = 5  # whole answers to a request that cannot be read: each is paid
_DRAIN = 2.0  # seconds that SIGTERM leaves to what is in flight


class Plan:
    """Which prompt is asked next, and how far each stratum is."""

    def __init__(self, stream: PromptStream, quotas: Mapping[str, int]) -> None:
        self._stream, self.quotas = stream, dict(quotas)
        self.pulled: list[Prompt] = []
        """In the order of the stream: what the dataset is built from."""
        self.accepted: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self._pending: Counter[str] = Counter()
        self._buffers: defaultdict[str, deque[Prompt]] = defaultdict(deque)
        self._again: deque[Prompt] = deque()
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def pending(self) -> int:
        """Episodes in flight."""
        return self._pending.total()

    def needs(self, stratum: str) -> bool:
        """Whether another prompt of a stratum may be asked: up to half of all answers may be rejected."""
        quota = self.quotas.get(stratum, 0)
        open_ = self.accepted[stratum] + self._pending[stratum]
        return open_ < quota and open_ + self.rejected[stratum] < most_asked(quota)

    def take(self) -> Prompt | None:
        """The next prompt to ask, or None if nothing is wanted for now."""
        needy = [name for name in self.quotas if self.needs(name)]
        for name in needy:
            if self._buffers[name]:
                return self._start(self._buffers[name].popleft())
        while any(name not in self._stream.exhausted for name in needy):
            prompt = next(self._stream, None)
            if prompt is None:
                break
            self.pulled.append(prompt)
            if self.needs(prompt.stratum):
                return self._start(prompt)
            self._buffers[prompt.stratum].append(prompt)
        return self._again.popleft() if self._again else None

    def _start(self, prompt: Prompt) -> Prompt:
        self._pending[prompt.stratum] += 1
        return prompt

    def finish(self, prompt: Prompt, end: Accepted | Rejected) -> None:
        """An episode has ended."""
        self._pending[prompt.stratum] -= 1
        (self.accepted if isinstance(end, Accepted) else self.rejected)[prompt.stratum] += 1
        self._wake()

    def put_back(self, prompt: Prompt) -> None:
        """An episode got no answer for now: it comes again after all others, and keeps its place in the quota: else
        which prompts are asked would depend on what went wrong on the way."""
        self._again.append(prompt)
        self._wake()

    async def changed(self) -> None:
        """Wait until an episode ends."""
        future = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        await future

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for future in waiters:
            if not future.done():
                future.set_result(None)


def most_asked(quota: int) -> int:
    """Prompts of a stratum that are asked at most for `quota` records."""
    return 2 * quota + 20


class Generation:
    """One run over a plan."""

    def __init__(self, plan: Plan, protocol: Protocol, broker: Broker, sender: Sender, journal: Journal,
                 status: Status, *, attempts: int) -> None:  # fmt: skip
        self._plan, self._protocol, self._broker, self._sender = plan, protocol, broker, sender
        self._journal, self._status, self._attempts = journal, status, attempts
        self._down = 0

    async def run(self, workers: int, interrupts: Interrupts) -> None:
        """Ask until every quota is full or its prompts are used up.

        Paused where the budget, a quota or an absent teacher ends it early: the journal has all that came. When a
        signal does, it returns, and `interrupts` knows.
        """
        tasks = [asyncio.create_task(self._work()) for _ in range(workers)]

        def drop() -> None:
            for task in tasks:
                task.cancel()

        try:
            with interrupts.during(self._sender.stop, drop):
                await self._watch(tasks)
        finally:
            drop()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, tasks: list[asyncio.Task[None]]) -> None:
        """Wait for all workers. When one fails, the others finish what they have in flight."""
        pending: set[asyncio.Task[None]] = set(tasks)
        failure: BaseException | None = None
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled() and (error := task.exception()) and not isinstance(error, Stopped):
                    failure = failure or error
                    self._sender.stop()
        if failure:
            raise failure

    async def _work(self) -> None:
        while not self._sender.stopping.is_set():
            prompt = self._plan.take()
            if prompt is not None:
                await self._play(prompt)
            elif self._plan.pending:
                await self._plan.changed()
            else:
                return

    async def _play(self, prompt: Prompt) -> None:
        play = episode(prompt, self._protocol, self._broker)
        fresh, end = False, None
        try:
            step = advance(play)
            while isinstance(step, Request):
                answer = self._journal.answer(step.key)
                if answer is None:
                    answer, fresh = await self._ask(step), True
                step = advance(play, answer)
            end = step
        except Unanswered as error:
            self._down += 1
            if self._down >= _DOWN_AFTER:
                raise Paused(f"the teacher stopped answering ({error}); {GO_ON}") from error
        finally:
            if end is None:
                self._plan.put_back(prompt)
            else:
                self._plan.finish(prompt, end)
                self._status.ended(end, fresh=fresh)

    async def _ask(self, request: Request) -> Answer:
        """An answer, or after many failures of this request, while others are answered, that there is none."""
        try:
            answer = await self._sender.ask(request)
        except Unanswered as error:
            await self._journal.flush()
            reason = self._hopeless(request.key)
            if reason is None:
                raise
            return self._journal.give_up(request.key, Dead(reason, str(error)))
        self._down = 0
        return answer

    def _hopeless(self, key: bytes) -> Reason | None:
        """Why a request is given up, if it has failed often enough. In an outage nobody is answered, and that is not
        the request's fault."""
        every, malformed = self._journal.failures(key), self._journal.failures(key, MALFORMED)
        for failed, most in ((malformed, _MOST_MALFORMED), (every, _GIVE_UP_AFTER * self._attempts)):
            alive = len(failed) >= most and self._journal.answered_since(failed[-most])
            if alive or len(failed) >= most * _MORE_IN_AN_OUTAGE:
                return "malformed" if 2 * len(malformed) > len(every) else "unanswered"
        return None


class Interrupts:
    """Ctrl-C and SIGTERM while the event loop runs. While requests are in flight, the first Ctrl-C lets them finish and
    a second one drops them; SIGTERM waits no longer than _DRAIN. At any other time they end the work at once."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self._got: list[int] = []
        self._in_flight: tuple[Callable[[], None], Callable[[], None]] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread: signals are the caller's
                before = signal.getsignal(number)
                loop.add_signal_handler(number, self._signal, number, loop, main)
                self._before[number] = before
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, handler)
        if self._got and (kind is None or issubclass(kind, asyncio.CancelledError)):
            if signal.SIGTERM in self._got:
                raise Terminated
            raise Paused(f"interrupted; {GO_ON}")

    @contextlib.contextmanager
    def during(self, stop: Callable[[], None], drop: Callable[[], None]) -> Iterator[None]:
        """Requests are in flight: how to send nothing more, and how to drop them."""
        self._in_flight = (stop, drop)
        try:
            yield
        finally:
            self._in_flight = None

    def _signal(self, number: int, loop: asyncio.AbstractEventLoop, main: asyncio.Task[Any]) -> None:
        self._got.append(number)
        if self._in_flight is None:
            main.cancel()
            return
        stop, drop = self._in_flight
        if len(self._got) > 1:
            drop()
        elif number == signal.SIGTERM:
            loop.call_later(_DRAIN, drop)
        stop()
        self._status.stopping(len(self._got))
