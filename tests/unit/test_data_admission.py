"""Admission in virtual time: the limits hold in every window, storms pass, and no permit is lost."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.teacher.admission import WINDOW, Admission, Permit
from distill.errors import InputError


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that jumps to its next timer instead of waiting for it; with none, it is a deadlock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        select = self._selector.select

        def jump(timeout: float | None = None) -> Any:
            found = select(0)
            if not found and timeout is None:
                raise AssertionError("everybody waits for nothing")
            self.now += (timeout or 0.0) if not found else 0.0
            return found

        self._selector.select = jump

    def time(self) -> float:
        return self.now


def virtual(main: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class Watched(Admission):
    """Looks at the limit in the moment in which somebody is let in; a moment later it may be lower."""

    def _grant(self, tokens: int) -> Permit:
        permit = super()._grant(tokens)
        assert self.in_flight <= self.limit
        return permit


def admission(concurrency: int = 8, rpm: int | None = None, tpm: int | None = None) -> Admission:
    loop = asyncio.get_running_loop()
    return Watched(concurrency, rpm, tpm, clock=loop.time, jitter=random.Random(0).uniform)


def now() -> float:
    return asyncio.get_running_loop().time()


def fullest(starts: list[tuple[float, int]]) -> tuple[int, int]:
    """Most requests and most tokens that began in any WINDOW seconds."""
    requests = tokens = 0
    for first, (begin, _) in enumerate(starts):
        inside = [t for at, t in starts[first:] if at <= begin + WINDOW]
        requests, tokens = max(requests, len(inside)), max(tokens, sum(inside))
    return requests, tokens


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 9), st.none() | st.integers(1, 7), st.none() | st.integers(50, 120),
    st.lists(st.tuples(st.integers(0, 50), st.floats(0, 70), st.sampled_from(["ok", "429", "error"]), st.floats(0, 100),
                       st.none() | st.floats(0, 120)), min_size=1, max_size=30),
)  # fmt: skip
def test_limits_hold_in_every_window_whatever_ends_or_is_cancelled_when(
    concurrency: int, rpm: int | None, tpm: int | None, jobs: list[tuple[int, float, str, float, float | None]]
) -> None:
    async def main() -> None:
        gate = admission(concurrency, rpm, tpm)
        starts: list[tuple[float, int]] = []
        asked: list[int] = []
        began: list[int] = []
        flying: set[int] = set()

        async def job(n: int, tokens: int, lasts: float, end: str, comes: float) -> None:
            await asyncio.sleep(comes)
            asked.append(n)
            permit = await gate.acquire(tokens)
            try:
                starts.append((now(), tokens))
                began.append(n)
                flying.add(n)
                assert len(flying) <= gate.in_flight <= concurrency
                await asyncio.sleep(lasts)
                if end == "ok":
                    permit.succeeded()
                elif end == "429":
                    permit.throttled(lasts / 3 if tokens % 2 else None)
            finally:
                flying.discard(n)
                permit.close(tokens)
                permit.close(tokens)

        tasks = [asyncio.create_task(job(n, *fields[:4])) for n, fields in enumerate(jobs)]
        for task, (*_, cancelled) in zip(tasks, jobs):
            if cancelled is not None:
                asyncio.get_running_loop().call_later(cancelled, task.cancel)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(r is None or isinstance(r, asyncio.CancelledError) for r in results), results
        requests, tokens = fullest(starts)
        assert (rpm is None or requests <= rpm) and (tpm is None or tokens <= tpm)
        assert gate.in_flight == 0 and began == [n for n in asked if n in set(began)]  # first come, first served
        assert set(began) >= {n for n, result in enumerate(results) if result is None}
        await asyncio.sleep(300)
        await gate.acquire(tpm or 0)  # nothing was lost

    virtual(main())


def test_a_full_window_slides_and_is_used_up() -> None:
    async def main() -> None:
        gate = admission(1000, rpm=30)
        starts = []

        async def job() -> None:
            permit = await gate.acquire()
            starts.append((now(), 0))
            permit.succeeded()
            permit.close()

        await asyncio.gather(*[job() for _ in range(300)])
        assert fullest(starts)[0] == 30 and now() <= 9 * 61.1

    virtual(main())


def test_tokens_that_were_not_used_are_given_back_and_those_beyond_are_counted() -> None:
    async def main() -> None:
        gate = admission(tpm=100)
        (await gate.acquire(100)).close(10)
        (await gate.acquire(90)).close(None)
        assert now() == 0
        await gate.acquire(1)
        assert WINDOW <= now() <= WINDOW + 1.01
        gate = admission(tpm=100)
        (await gate.acquire(10)).close(100)
        start = now()
        await gate.acquire(1)
        assert now() - start >= WINDOW

    virtual(main())


def test_a_request_that_can_never_start_is_refused() -> None:
    with pytest.raises(InputError, match=r"101 tokens.*100 a minute \(tpm\)"):
        asyncio.run(Admission(4, tpm=100).acquire(101))
    with pytest.raises(InputError, match="rpm must be at least 1, not 0"):
        Admission(4, rpm=0)


async def serve(gate: Admission, n: int, allowed: Any, lasts: float = 1.0) -> tuple[int, list[float]]:
    """n requests to a server that throttles whoever is beyond `allowed(now)` at a time; throttled ones come again.
    Returns how many were throttled, and when each was answered."""
    flying = throttled = 0
    answered: list[float] = []

    async def one() -> None:
        nonlocal flying, throttled
        while True:
            permit = await gate.acquire()
            flying += 1
            over = flying > allowed(now())
            await asyncio.sleep(0.05 if over else lasts)
            flying -= 1
            if not over:
                permit.succeeded()
                permit.close()
                answered.append(now())
                return
            throttled += 1
            permit.throttled(None)
            permit.close()

    await asyncio.gather(*[one() for _ in range(n)])
    return throttled, answered


def test_without_throttling_all_of_the_concurrency_is_soon_used() -> None:
    async def main() -> None:
        gate = admission(64)
        throttled, answered = await serve(gate, 6400, lambda t: 10_000)
        assert throttled == 0 and gate.limit == 64 and answered[-1] < 110  # 100 s at 64, and the ramp

    virtual(main())


def test_a_storm_is_waited_out_together_and_recovered_from() -> None:
    async def main() -> None:
        gate = admission(32)
        seen: list[int] = []

        async def watch() -> None:
            while True:
                await asyncio.sleep(1)
                seen.append(gate.limit)

        watcher = asyncio.create_task(watch())
        throttled, answered = await serve(gate, 12_000, lambda t: 0 if 60 < t < 180 else 10_000)
        watcher.cancel()
        lowest = min(seen[60:180])
        assert 1 <= lowest < 32 and throttled < 200  # not 12000 requests sent into the wall
        assert gate.throttled_since is None
        again = next(at for at in answered if at > 180)
        assert again < 250 and gate.limit == 32  # within the longest pause, and back at full strength

    virtual(main())


def test_it_settles_near_what_the_server_can_take() -> None:
    async def main() -> None:
        gate = admission(64)
        throttled, answered = await serve(gate, 6000, lambda t: 20)
        assert 12 <= gate.limit <= 21 and throttled < 300
        assert 6000 / answered[-1] > 0.7 * 20

    virtual(main())


def test_a_burst_of_refusals_counts_once() -> None:
    async def main() -> None:
        gate = admission(16)
        for _ in range(12):
            permit = await gate.acquire()
            permit.succeeded()
            permit.close()
        assert gate.limit == 16
        permits = [await gate.acquire() for _ in range(16)]
        for permit in permits:
            permit.throttled(5)
            permit.close()
        assert gate.limit == 12 and 5 <= gate.cooling <= 5.5 and gate.throttled_since == 0
        (await gate.acquire()).throttled(None)
        assert gate.limit == 9 and now() >= 5

    virtual(main())


def test_the_longest_cool_down_counts_and_everybody_waits() -> None:
    async def main() -> None:
        gate = admission(8)
        permits = [await gate.acquire() for _ in range(3)]
        for permit, wait in zip(permits, (3, 30, 1)):
            permit.throttled(wait)
            permit.close()
        waiters = [asyncio.create_task(gate.acquire()) for _ in range(2)]
        await asyncio.sleep(29)
        assert not any(waiter.done() for waiter in waiters)
        await asyncio.sleep(4)
        assert all(waiter.done() for waiter in waiters)

    virtual(main())


def test_a_cancelled_waiter_makes_room_for_the_next() -> None:
    async def main() -> None:
        gate = admission(1, tpm=100)
        held = await gate.acquire(10)
        first, second = (asyncio.create_task(gate.acquire(n)) for n in (90, 5))
        await asyncio.sleep(1)
        held.close()
        first.cancel()  # in the turn in which it was let in: it never knew
        permit = await asyncio.wait_for(second, 1)
        assert first.cancelled() and isinstance(permit, Permit) and gate.in_flight == 1
        permit.close(None)
        (await asyncio.wait_for(gate.acquire(85), 1)).close()  # the cancelled 90 tokens are not counted
        await asyncio.sleep(70)
        (await gate.acquire(100)).close()
        start = now()
        await gate.acquire(1)  # nor counted off once more when the window has passed them
        assert now() - start >= WINDOW

    virtual(main())


def test_admission_costs_little() -> None:
    async def main() -> None:
        gate = Admission(64, rpm=10**9, tpm=10**12)

        async def work() -> None:
            for _ in range(100):
                permit = await gate.acquire(1000)
                await asyncio.sleep(0)
                permit.succeeded()
                permit.close(500)

        start = time.perf_counter()
        await asyncio.gather(*[work() for _ in range(100)])
        assert 10_000 / (time.perf_counter() - start) > 20_000

    asyncio.run(main())
