"""What a model said in an episode, turn by turn: the only thing of a run that cannot be computed again.

All else, calls, results, scores, follows from it and from the set, and is computed anew wherever it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

from distill import chat
from distill.evaluate.items import Item

Stop = Literal["stop", "length", "context"]
"""Why a reply ended: by itself, at its limit of tokens, or because the context is full."""


class RawCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call as a server sent it; nothing is repaired."""

    name: str
    arguments: str
    """JSON text, or what should have been."""


class Reply(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One turn of the model."""

    text: str
    """As generated; of a server that sends calls apart, its content."""
    calls: tuple[RawCall, ...] | None = None
    """None: calls stand in the text, in the template's form."""
    stop: Stop = "stop"
    prompt_tokens: int = 0
    tokens: int = 0
    """Generated."""
    reasoning: str = ""
    """Of a server that sends it apart: kept, not judged."""


def storable(reply: Reply) -> Reply:
    """The reply without lone surrogates, which no file in UTF-8 can hold: U+FFFD in their place."""
    calls = None if reply.calls is None else tuple(RawCall(_plain(c.name), _plain(c.arguments)) for c in reply.calls)
    return msgspec.structs.replace(reply, text=_plain(reply.text), reasoning=_plain(reply.reasoning), calls=calls)


def _plain(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class ProviderFault(Exception):
    """The model could not be asked, such as an endpoint that is down: no fault of the model, and no score."""


class Model(Protocol):
    """Whatever can be evaluated."""

    def reply(self, item: Item, messages: Sequence[chat.Message], replies: Sequence[Reply]) -> Reply:
        """The next turn of a conversation so far: the item's messages, then the model's turns and the tools' results
        in turn. `replies` are the model's turns as it gave them. ProviderFault where it cannot be asked."""
        ...

    def identity(self) -> dict[str, Any]:
        """What it is, for fingerprints: `runner`, `weights` (sha256 or None), `tokenizer`, `template`, `decoding`."""
        ...


class Transcript(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """A line of results: an item's episode."""

    item: str
    replies: tuple[Reply, ...]
    fault: str | None = None
    """Why the model could not be asked any further."""
