"""Plays the episodes of a run: several at once, each written down as soon as it is over."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import msgspec

from distill.evaluate.episode import Limits, Play, Request, play
from distill.evaluate.fixtures import EpisodeBroker
from distill.evaluate.items import Item
from distill.evaluate.report import mode_of
from distill.evaluate.results import Journal, RunHeader
from distill.evaluate.runners.interface import BatchModel
from distill.evaluate.sets import EvaluationSet
from distill.evaluate.transcripts import ProviderFault, Reply, Transcript, storable


class _Live:
    """An episode under way."""

    def __init__(self, item: Item, broker: EpisodeBroker, limits: Limits) -> None:
        self.item, self.broker = item, broker
        self.playing: Play = play(item, broker, limits)
        self.request: Request | None = next(self.playing)
        self.replies: list[Reply] = []
        self.fault: str | None = None

    def go_on(self, reply: Reply | ProviderFault) -> None:
        """Take a reply; `request` is None once the episode is over."""
        if isinstance(reply, ProviderFault):
            self.request, self.fault = None, str(reply) or "the model could not be asked"
            return
        reply = storable(reply)
        self.replies.append(reply)
        try:
            self.request = self.playing.send(reply)
        except StopIteration:
            self.request = None


class Driver:
    """Plays items that the journal does not have, and items that met a provider's fault, once more."""

    def __init__(self, found: EvaluationSet, header: RunHeader, limits: Limits, journal: Journal) -> None:
        self._found, self._header, self._limits, self._journal = found, header, limits, journal

    def run(self, model: BatchModel, items: Sequence[Item]) -> None:
        """Play them all. What is known already is not asked again."""
        known = {name for name, one in self._journal.transcripts.items() if one.fault is None}
        waiting = [item for item in items if item.id not in known]
        if len(waiting) < len(items):
            print(f"going on: {len(items) - len(waiting)} of {len(items)} episodes are there", flush=True)
        progress = _Progress(len(waiting))
        live: list[_Live] = []
        waiting.reverse()
        while waiting or live:
            while waiting and len(live) < model.together:
                item = waiting.pop()
                broker = EpisodeBroker(item, self._found.fixtures, mode_of(self._header), self._header.seed)
                live.append(_Live(item, broker, self._limits))
            replies = model.replies([one.request for one in live if one.request is not None])
            for one, reply in zip(live, replies, strict=True):
                one.go_on(reply)
                progress.tokens += reply.tokens if isinstance(reply, Reply) else 0
            for one in [one for one in live if one.request is None]:
                self._journal.add(Transcript(item=one.item.id, replies=tuple(one.replies), fault=one.fault))
                progress.done += 1
            live = [one for one in live if one.request is not None]
            progress.show()
        progress.show(last=True)


class _Progress(msgspec.Struct):
    """A line now and then: episodes, tokens a second, time left."""

    total: int
    done: int = 0
    tokens: int = 0
    started: float = msgspec.field(default_factory=time.monotonic)
    shown: float = msgspec.field(default_factory=time.monotonic)

    def show(self, *, last: bool = False) -> None:
        """Print, if it is time to."""
        now = time.monotonic()
        if not self.done or (not last and now - self.shown < 10):
            return
        self.shown = now
        spent = now - self.started
        left = "" if last else f", {spent / self.done * (self.total - self.done):.0f} s left"
        print(f"{self.done} of {self.total} episodes, {self.tokens / max(spent, 1e-9):.0f} tokens/s{left}",
              file=sys.stderr, flush=True)  # fmt: skip
