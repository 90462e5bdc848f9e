"""What a run shows while it works: a progress bar on a terminal, a line now and then elsewhere, a tracker, a log.

steps.jsonl has one line a step with what was computed, and no times: a run that was killed and went on has the lines
of one that was not, byte for byte.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill.artifacts import require_replaceable_file
from distill.errors import InputError, describe_os_error
from distill.train.tracker import Tracker

_LINES = 10
"""Lines printed over a run where there is no terminal."""


class StepLog:
    """steps.jsonl, held by the one process that trains this run. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        require_replaceable_file(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"cannot write {describe_os_error(error, path)}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
        except OSError as error:
            self._file.close()
            raise InputError(f"{path}: another process is training this run") from error

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a line that did not fit was told when it was added
            self._file.close()

    def begin(self, done: int) -> None:
        """Drop the lines of steps after `done`; of a damaged log, all from the first that is not sound."""
        end = 0
        self._file.seek(0)
        for number in range(1, done + 1):
            line = self._file.readline()
            if not (line.startswith(b'{"step": %d, ' % number) and line.endswith(b"}\n")):
                break
            end += len(line)
        self._file.truncate(end)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a line; the system has it when this returns."""
        try:
            self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"cannot write {describe_os_error(error, self.path)}") from error

    def sync(self) -> None:
        """What was added is on disk."""
        os.fsync(self._file.fileno())


class Monitor:
    """Reports steps; a context manager. Of several processes, only the first has a log and a console that shows."""

    def __init__(self, title: str, total: int, log: StepLog | None, tracker: Tracker, console: Console) -> None:
        self.console, self.total = console, total
        self._log, self._tracker = log, tracker
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=total, facts="")
        self._title = title
        self._first, self._tokens, self._start = 0, 0, time.monotonic()

    def __enter__(self) -> Monitor:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._tracker.close()

    def begin(self, done: int) -> None:
        """The steps after `done` come now: the clock starts."""
        if self._log is not None:
            self._log.begin(done)
        self._first, self._start = done, time.monotonic()
        self._bar.reset(self._task, total=self.total, completed=done)

    @property
    def tokens_per_second(self) -> float:
        """Since `begin`, prompts included."""
        return self._tokens / max(time.monotonic() - self._start, 1e-9)

    def step(self, step: int, total: float, tokens: int, values: Mapping[str, float], waited: float) -> None:
        """Report finished step `step` (counted from 1); `waited`: seconds for its batches."""
        self._tokens += tokens
        if self._log is not None:
            self._log.add({"step": step, "loss": total, "tokens": tokens, **values})
        times = {"tokens_per_s": self.tokens_per_second, "waited_s": waited}
        self.scalars(step, {f"train/{name}": value for name, value in {"total": total, **values, **times}.items()})
        facts = f"loss {total:.4f}  {self.tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, facts=facts)
        every = max(1, self.total // _LINES)
        if not self.console.is_terminal and (step % every == 0 or step == self.total):
            left = (time.monotonic() - self._start) / (step - self._first) * (self.total - step)
            self.say(f"{self._title}: step {step} of {self.total}  {facts}  {left:.0f} s left")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers for the tracker."""
        self._tracker.scalars(step, values)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Text samples for the tracker, by prompt."""
        self._tracker.texts(step, texts)

    def say(self, text: str) -> None:
        """A line as it is."""
        say(self.console, text)

    def sync(self) -> None:
        """What was reported is on disk: a checkpoint of this step is about to be."""
        if self._log is not None:
            self._log.sync()
        self._tracker.flush()


def say(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)
