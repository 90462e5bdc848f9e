"""What a generation run shows while it goes: rate, accepted, rejected, cost, time left."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from distill.data.budget import Budget, usd
from distill.data.episodes import Accepted, Rejected

_TROUBLE_EVERY = 5.0  # seconds between two lines about the same kind of trouble
_WIDE = 130  # columns, from which a bar has room beside the numbers
_LINE_EVERY = 15.0  # seconds between two lines where stderr is no terminal


class Status:
    """A progress bar on stderr where stderr is a terminal, a line now and then where it is not.

    Counting is cheap and happens with each answer; showing happens on a thread of its own.
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._live = self._console.is_terminal and not quiet
        bar = [BarColumn(bar_width=20)] if self._console.width >= _WIDE else []
        self._progress = Progress(
            TextColumn("{task.description}"), MofNCompleteColumn(), *bar, TextColumn("{task.fields[note]}"),
            console=self._console, disable=not self._live, refresh_per_second=5,
        )  # fmt: skip
        self._task = self._progress.add_task("starting", total=total, note="")
        self._budget: Budget | None = None
        self._priced = False
        self._counts = False
        self.accepted = 0
        """Answers, those of earlier starts included."""
        self._said: dict[str, float] = {}
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._show, name="status", daemon=True)
        self._restart(total)

    def _restart(self, total: int) -> None:
        self._began, self._total = time.monotonic(), total
        self._done = self._known = self._tokens = self._ended = self._rejected = 0

    def __enter__(self) -> Status:
        self._progress.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._halt.set()
        self._thread.join()
        self._refresh()
        self._progress.stop()

    def phase(self, name: str, total: int | None = None) -> None:
        """A new phase begins; with `total`, one of so many records."""
        self._counts = total is not None
        if total is not None:
            self._restart(total)
            self._progress.update(self._task, total=total, completed=0, note="")
        self._progress.update(self._task, description=name.split()[0])
        self.say(name)

    def spending(self, budget: Budget, *, priced: bool) -> None:
        """Where to read what is spent."""
        self._budget, self._priced = budget, priced

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def ended(self, end: Accepted | Rejected, *, fresh: bool) -> None:
        """An episode ended; `fresh` unless the journal had it already."""
        if isinstance(end, Accepted):
            self.accepted += 1
            self._done += 1
        else:
            self._rejected += 1
        if fresh:
            self._ended += 1
            self._tokens += sum(usage.completion for usage in end.usages)
        else:
            self._known += isinstance(end, Accepted)

    def captured(self, tokens: int) -> None:
        """A record's logits were read."""
        self._done += 1
        self._ended += 1
        self._tokens += tokens

    def waiting(self, detail: str) -> None:
        """The teacher asks us to wait."""
        self._trouble("waiting", f"waiting: {detail}")

    def failed(self, detail: str) -> None:
        """An attempt failed, and is tried again."""
        self._trouble("failed", f"trying again: {detail}")

    def _trouble(self, kind: str, text: str) -> None:
        now = time.monotonic()
        if now - self._said.get(kind, -_TROUBLE_EVERY) >= _TROUBLE_EVERY:
            self._said[kind] = now
            self.say(text[:300])

    def stopping(self, times: int) -> None:
        """Somebody asked us to stop."""
        if times == 1:
            self.say("stopping when the requests in flight are answered; once more to drop them (they may be billed)")

    def _show(self) -> None:
        last, began = -1, time.monotonic()
        while not self._halt.wait(0.2):
            if self._live:
                self._refresh()
            elif self._counts and time.monotonic() - began > _LINE_EVERY and self._done + self._rejected != last:
                last, began = self._done + self._rejected, time.monotonic()
                self.say(f"  {self._done:,} of {self._total:,}, {self._note()}")

    def _refresh(self) -> None:
        self._progress.update(self._task, completed=self._done, note=self._note())

    def _note(self) -> str:
        """Time left, money, rate, rejects: what matters first, for a narrow terminal cuts off the rest."""
        seconds = max(time.monotonic() - self._began, 1e-3)
        parts = []
        gained = self._done - self._known
        if gained > 0 and self._done < self._total:
            parts.append(_clock(seconds / gained * (self._total - self._done)) + " left")
        if self._budget and self._priced:
            limit = self._budget.limits.usd
            parts.append(f"${usd(self._budget.spent.cost)}{f' of ${limit:g}' if limit else ''}")
        if self._rejected:
            parts.append(f"{self._rejected:,} rejected")
        parts += [f"{self._ended / seconds:,.1f}/s", f"{self._tokens / seconds:,.0f} tok/s"]
        if self._known:
            parts.append(f"{self._known:,} known")
        return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
