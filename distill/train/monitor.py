"""What a run shows while it works: a progress bar on a terminal, a line now and then elsewhere, TensorBoard scalars."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINES = 10
"""Lines printed over a run where there is no terminal."""


class Monitor:
    """Reports steps; a context manager. `folder` None writes no TensorBoard events."""

    def __init__(self, title: str, total: int, done: int, folder: Path | None, console: Console) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.console, self.total = console, total
        self._writer = SummaryWriter(str(folder), purge_step=done) if folder else None
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=total, completed=done, facts="")
        self._title, self._first, self._tokens, self._start = title, done, 0, time.monotonic()

    def __enter__(self) -> Monitor:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._writer:
            self._writer.close()

    @property
    def tokens_per_second(self) -> float:
        """Over the steps of this process, prompts included."""
        return self._tokens / max(time.monotonic() - self._start, 1e-9)

    def step(
        self, step: int, total: float, parts: Mapping[str, float], tokens: int, rates: Mapping[str, float]
    ) -> None:
        """Report finished step `step` (counted from 1)."""
        self._tokens += tokens
        self.scalars(step, {"train/total": total} | {f"train/{name}": value for name, value in parts.items()})
        self.scalars(step, {f"train/{name}": value for name, value in rates.items()})
        self.scalars(step, {"train/tokens_per_s": self.tokens_per_second})
        facts = f"loss {total:.4f}  {self.tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, facts=facts)
        every = max(1, self.total // _LINES)
        if not self.console.is_terminal and (step % every == 0 or step == self.total):
            left = (time.monotonic() - self._start) / (step - self._first) * (self.total - step)
            self.console.print(
                f"{self._title}: step {step} of {self.total}  {facts}  {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write TensorBoard scalars."""
        for name, value in values.items() if self._writer else ():
            self._writer.add_scalar(name, value, step)  # type: ignore[union-attr]
