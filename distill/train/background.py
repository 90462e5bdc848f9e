"""What runs beside the loop, in one thread each: the next step's batches are built, the last checkpoint is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


@contextlib.contextmanager
def ahead(make: Callable[[Given], Made], given: Iterable[Given]) -> Iterator[Iterator[Made]]:
    """`make(x)` for each x in order; the next one is made while one is used. An error comes in its place.

    On exit the one being made is waited for, and no more are.
    """
    pool = ThreadPoolExecutor(1, "batches")

    def results() -> Iterator[Made]:
        waiting: Future[Made] | None = None
        for item in given:
            following = pool.submit(make, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)


class Writer:
    """Runs one job at a time beside its caller, who learns of a failure at the next call. A context manager."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Run `job`; the one before it must have been waited for."""
        self._job = self._pool.submit(job)

    def check(self) -> None:
        """Raise what a finished job raised."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is running; raises what the job raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:  # one error is enough: the caller's own goes before a checkpoint's
            self.wait()
