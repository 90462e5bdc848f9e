"""What a generation run shows while it goes: accepted, rejected, rate, time left."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill.data.teachers import Answer


class Status:
    """A progress bar on stderr, where stderr is a terminal; a line now and then where it is not."""

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(), console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._total = total
        self._task = self._progress.add_task("starting", total=total, note="")
        self._restart()

    def _restart(self) -> None:
        self._began, self._tokens, self._rejected, self._resumed = time.monotonic(), 0, 0, 0
        self._done = self._said = 0

    def __enter__(self) -> Status:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, name: str) -> None:
        """A new phase begins."""
        self._progress.update(self._task, description=name)
        if not self._console.is_terminal:
            self._console.print(name, highlight=False)

    def resumed(self, reject: str | None) -> None:
        """An answer was in the journal already."""
        self._resumed += reject is None
        self._advance(reject)

    def answered(self, answer: Answer, reject: str | None) -> None:
        """An answer came in."""
        self._tokens += answer.usage.completion if answer.usage else 0
        self._advance(reject)

    def _advance(self, reject: str | None) -> None:
        self._rejected += reject is not None
        note = f"{self._rejected} rejected" + (f", {self._resumed} from the journal" if self._resumed else "")
        rate = self._tokens / max(time.monotonic() - self._began, 1e-3)
        self._show(int(reject is None), f"{note}, {rate:.0f} tokens/s")

    def trouble(self, text: str) -> None:
        """A request failed for good."""
        self._console.print(f"no answer: {text}", highlight=False, markup=False)

    def capturing(self, total: int) -> None:
        """Reading logits begins."""
        self._restart()
        self.phase("reading the teacher's logits")
        self._total = total
        self._progress.update(self._task, total=total, completed=0, note="")

    def captured(self, tokens: int) -> None:
        """A record's logits were read."""
        self._tokens += tokens
        rate = self._tokens / max(time.monotonic() - self._began, 1e-3)
        self._show(1, f"{rate:.0f} tokens/s")

    def _show(self, advance: int, note: str) -> None:
        """Move the bar; without a terminal, a line every tenth of the way."""
        self._progress.update(self._task, advance=advance, note=note)
        self._done += advance
        tenth = self._done * 10 // max(self._total, 1)
        if not self._console.is_terminal and advance and tenth > self._said:
            self._said = tenth
            left = (time.monotonic() - self._began) / self._done * (self._total - self._done)
            self._console.print(f"  {self._done:,} of {self._total:,}  {note}  {left:.0f} s left", highlight=False)
