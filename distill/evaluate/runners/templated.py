"""Models that read our own rendering of a conversation and decode greedily: one loop, whatever computes the logits.

What a conversation has already read is kept from one of its turns to the next, so that a turn reads only what is new.
It is never taken from another conversation: an item's replies do not depend on which items came before it, not even
by rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from distill import chat
from distill.evaluate.constrained import Constraint, Grammars
from distill.evaluate.episode import Request
from distill.evaluate.items import Item
from distill.evaluate.runners.interface import Settings
from distill.evaluate.transcripts import ProviderFault, Reply, Stop
from distill.tokenizer import Tokenizer


class Context(Protocol):
    """What a model has read of one conversation."""

    ids: list[int]

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...


class Engine(Protocol):
    """What computes logits."""

    capacity: int
    """Tokens of prompt and answer together."""
    together: int
    """Contexts that it gains from feeding at once."""

    def start(self) -> Context:
        """A context that holds nothing."""
        ...

    def feed(self, contexts: Sequence[Any], ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits [n, V] in fp32 after the last of the tokens, at least one, that each of n contexts reads."""
        ...


class Decoding(NamedTuple):
    """What is common to all turns."""

    tokenizer: Tokenizer
    capacity: int
    max_new_tokens: int


class _Turn:
    """A reply in the making."""

    def __init__(self, request: Request, how: Decoding, constraint: Constraint | None) -> None:
        self.item = request.item.id
        self.goes_on = bool(request.replies)
        self.prompt = chat.encode(how.tokenizer, request.messages, request.item.tools, add_generation_prompt=True).ids
        self._how, self._constraint = how, constraint
        self._room = how.capacity - len(self.prompt)
        self._limit = min(how.max_new_tokens, self._room)
        self.out: list[int] = []
        self.stop: Stop | None = None if self._room > 0 else "context"
        self.context: Any = None

    def unread(self) -> list[int]:
        """The tokens that the model must read before it can say the next one."""
        return self.out[-1:] or self.prompt[len(self.context.ids) :]

    def add(self, logits_V: np.ndarray) -> None:
        """Choose the next token: the likeliest, of those that the constraint allows."""
        token = int(logits_V.argmax()) if self._constraint is None else self._constraint.choose(logits_V)
        if token in self._how.tokenizer.stop_ids:
            self.stop = "stop"
            return
        self.out.append(token)
        if len(self.out) == self._limit:
            self.stop = "length" if self._how.max_new_tokens <= self._room else "context"

    def reply(self) -> Reply:
        """The finished turn."""
        assert self.stop is not None
        text = self._how.tokenizer.decode(self.out)
        return Reply(text, stop=self.stop, prompt_tokens=len(self.prompt), tokens=len(self.out))


class TemplatedModel:
    """A BatchModel over an Engine."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: Settings, facts: dict[str, Any]) -> None:
        """`facts`: what `identity` says of the model itself; those under `decoding` join the settings."""
        self._engine, self._facts = engine, facts
        self._how = Decoding(tokenizer, engine.capacity, settings.max_new_tokens)
        self._grammars = Grammars(tokenizer, must_call=settings.must_call) if settings.constrained else None
        if self._grammars is not None:
            self._grammars.look_at(settings.tools)
        self._kept: dict[str, Any] = {}
        self.together = min(engine.together, settings.together)

    def reply(self, item: Item, messages: Sequence[chat.Message], replies: Sequence[Reply]) -> Reply:
        """The next turn of one conversation."""
        (one,) = self.replies([Request(item, tuple(messages), tuple(replies))])
        assert isinstance(one, Reply)
        return one

    def replies(self, batch: Sequence[Request]) -> list[Reply | ProviderFault]:
        """The next turn of each conversation. A conversation begins where it has no replies yet."""
        turns = [self._begin(request) for request in batch]
        # those that go on come first, while what they have read is still kept
        waiting = deque(sorted((turn for turn in turns if turn.stop is None), key=lambda turn: not turn.goes_on))
        live: list[_Turn] = []
        while waiting or live:
            while waiting and len(live) < self.together:
                turn = waiting.popleft()
                turn.context = self._context(turn, len(live))
                self._step([turn])
                live += [turn]
                live = self._going(live)
            if live:
                self._step(live)
                live = self._going(live)
        return [turn.reply() for turn in turns]

    def identity(self) -> dict[str, Any]:
        """See Model."""
        decoding: dict[str, Any] = {"strategy": "greedy", "max_new_tokens": self._how.max_new_tokens}
        decoding["constrained"] = self._grammars is not None
        if self._grammars is not None:
            decoding |= self._grammars.identity()
        facts = dict(self._facts)
        decoding |= facts.pop("decoding", {})
        tokenizer, template = self._how.tokenizer.sha256, chat.template_sha256()
        return {**facts, "tokenizer": tokenizer, "template": template, "decoding": decoding}

    def _begin(self, request: Request) -> _Turn:
        constraint = self._grammars.begin(request.item.tools) if self._grammars is not None else None
        return _Turn(request, self._how, constraint)

    def _step(self, turns: Sequence[_Turn]) -> None:
        logits_NV = self._engine.feed([turn.context for turn in turns], [turn.unread() for turn in turns])
        for turn, logits_V in zip(turns, logits_NV):
            turn.add(logits_V)

    def _context(self, turn: _Turn, live: int) -> Any:
        """What the conversation has read and its prompt still begins with; no more than `together` are held at once."""
        context = self._kept.pop(turn.item, None)
        if context is None or not turn.goes_on:
            context = self._engine.start()
        # at least one token is read, for its logits
        context.cut(min(_common(context.ids, turn.prompt), len(turn.prompt) - 1))
        while self._kept and len(self._kept) + live >= self.together:
            del self._kept[next(iter(self._kept))]
        return context

    def _going(self, live: list[_Turn]) -> list[_Turn]:
        for turn in live:
            if turn.stop is not None:
                self._kept[turn.item] = turn.context
        return [turn for turn in live if turn.stop is None]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
