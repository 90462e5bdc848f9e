"""Who may send when: AIMD concurrency, requests and tokens a minute, and a cool-down that all requests share.

First come, first served. A permit is held from the first byte sent to the last received, never while waiting.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

from distill.errors import InputError

WINDOW = 60.0
"""Seconds that the limits count over. It slides: no 60 s hold more than the limit, wherever they begin."""
_KEPT = WINDOW + 1.0  # two requests that start 60 s apart may arrive closer together
_FIRST = 4.0  # in flight at first; each success allows one more until the first throttling
_CLIMB = 25  # after it: successes for one more
_DROP = 0.75
_LONGEST_PAUSE = 60.0


class _Start:
    """A request that began; `counted` while the window holds it."""

    __slots__ = ("at", "counted", "tokens")

    def __init__(self, at: float, tokens: int) -> None:
        self.at, self.tokens, self.counted = at, tokens, 0


class Permit:
    """The right to have one request in flight."""

    __slots__ = ("_admission", "_burst", "_open", "_start")

    def __init__(self, admission: Admission, start: _Start, burst: int) -> None:
        self._admission, self._start, self._burst = admission, start, burst
        self._open = True

    def succeeded(self) -> None:
        """The server answered: a little more may be in flight."""
        self._admission._climb()

    def throttled(self, wait: float | None) -> None:
        """The server asks for less: nobody starts for `wait` seconds (None: a pause that grows with each storm)."""
        self._admission._drop(self._burst, wait)

    def close(self, tokens_used: int | None = None) -> None:
        """Give it back, with the tokens really used where they are known. Twice does no harm."""
        if self._open:
            self._open = False
            self._admission._close(self._start, tokens_used)


class Admission:
    """`concurrency` is the most in flight; `rpm` and `tpm` are requests and tokens a minute, None for no limit."""

    def __init__(
        self, concurrency: int, rpm: int | None = None, tpm: int | None = None, *, start: int | None = None,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:  # fmt: skip
        for name, value in (("concurrency", concurrency), ("rpm", rpm), ("tpm", tpm)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        self._most, self._rpm, self._tpm = concurrency, rpm, tpm
        self._clock, self._sleep, self._jitter = clock, sleep, jitter
        self._limit: float = min(start or _FIRST, concurrency)
        self._window: deque[_Start] = deque()
        self._requests = self._tokens = 0  # in the window
        self._waiting: deque[tuple[asyncio.Future[Permit], int]] = deque()
        self._bursts = self._storms = self._good = 0
        self._cool_until = -float("inf")
        self._alarm: asyncio.Task[None] | None = None
        self._alarm_at = 0.0
        self.in_flight = 0
        self.throttled_since: float | None = None
        """When the server began to throttle without a success since, by `clock`."""

    @property
    def limit(self) -> int:
        """The most that may be in flight now."""
        return int(self._limit)

    @property
    def cooling(self) -> float:
        """Seconds until the shared cool-down ends, 0 where there is none."""
        return max(self._cool_until - self._clock(), 0.0)

    def remember(self, started: Iterable[tuple[float, int]]) -> None:
        """Count what an earlier run began: seconds ago, oldest first, and tokens. The server's minute goes on."""
        now = self._clock()
        for ago, tokens in started if self._rpm is not None or self._tpm is not None else ():
            start = _Start(now - max(ago, 0.0), tokens)
            start.counted = 1
            self._window.append(start)
            self._requests += 1
            self._tokens += tokens

    async def acquire(self, tokens: int = 0) -> Permit:
        """Wait for a turn to send a request that may use up to `tokens`, prompt and answer."""
        if self._tpm is not None and tokens > self._tpm:
            raise InputError(f"a request may use {tokens} tokens, more than the limit of {self._tpm} a minute (tpm)")
        if not self._waiting and self.in_flight < int(self._limit) and self._delay(tokens) <= 0:
            return self._grant(tokens)
        future: asyncio.Future[Permit] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, tokens))
        self._admit()
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled():  # granted and cancelled in one turn of the loop: it never started
                self._revoke(future.result())
            self._admit()
            raise

    def _grant(self, tokens: int) -> Permit:
        start = _Start(self._clock(), tokens)
        if self._rpm is not None or self._tpm is not None:
            self._window.append(start)
            start.counted = 1
            self._requests += 1
            self._tokens += tokens
        self.in_flight += 1
        return Permit(self, start, self._bursts)

    def _revoke(self, permit: Permit) -> None:
        start = permit._start
        if start.counted:
            self._requests -= 1
            self._tokens -= start.tokens
            start.counted = start.tokens = 0
        permit.close()

    def _close(self, start: _Start, tokens_used: int | None) -> None:
        self.in_flight -= 1
        if tokens_used is not None and start.counted:
            self._tokens += tokens_used - start.tokens
            start.tokens = tokens_used
        if self._waiting:
            self._admit()

    def _delay(self, tokens: int) -> float:
        """Seconds before a request of `tokens` may start by the clock; where it is the window, before the next look."""
        now = self._clock()
        if self._cool_until > now:
            return self._cool_until - now
        window = self._window
        while window and window[0].at + _KEPT <= now:
            old = window.popleft()
            self._requests -= old.counted
            self._tokens -= old.tokens
            old.counted = 0
        full = self._rpm is not None and self._requests >= self._rpm
        if full or (self._tpm is not None and self._tokens + tokens > self._tpm):
            return window[0].at + _KEPT - now
        return 0.0

    def _admit(self) -> None:
        """Let in whoever is first, as long as that is possible; else see to it that somebody looks again."""
        while self._waiting:
            future, tokens = self._waiting[0]
            if not future.done():
                if self.in_flight >= int(self._limit):
                    return
                if (delay := self._delay(tokens)) > 0:
                    self._look_again(delay)
                    return
                future.set_result(self._grant(tokens))
            self._waiting.popleft()
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _look_again(self, delay: float) -> None:
        at = self._clock() + delay
        if self._alarm is not None:
            if self._alarm_at <= at:
                return
            self._alarm.cancel()
        self._alarm_at = at
        self._alarm = asyncio.ensure_future(self._ring(max(delay, 0.001)))

    async def _ring(self, delay: float) -> None:
        await self._sleep(delay)
        self._alarm = None
        self._admit()

    def _climb(self) -> None:
        self._storms, self.throttled_since = 0, None
        self._good += 1
        if self._bursts == 0 or self._good >= _CLIMB:
            self._good = 0
            self._limit = min(self._limit + 1, self._most)

    def _drop(self, burst: int, wait: float | None) -> None:
        """Only the first of a burst lowers the limit: the others were sent before anybody could know."""
        now = self._clock()
        if self.throttled_since is None:
            self.throttled_since = now
        first = burst == self._bursts
        if first:
            self._bursts += 1
            self._storms += 1
            self._good = 0
            self._limit = max(self._limit * _DROP, 1.0)
        growing = min(2.0 ** min(self._storms - 1, 10), _LONGEST_PAUSE) * self._jitter(0.5, 1.0) if first else 0.0
        if wait is None:
            pause = growing
        else:
            pause = max(wait, 0.0) + self._jitter(0.0, min(1.0, 0.1 * max(wait, 0.0)))
            if self._storms > 2:  # a server that asks for no patience, again and again, gets some all the same
                pause = max(pause, growing / 16)
        self._cool_until = max(self._cool_until, now + pause)
