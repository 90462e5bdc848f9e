"""Process targets: where, in a conversation as the student's template renders it, a thing to learn stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from distill import chat


class Target(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A span of the rendered conversation that the student is to write."""

    kind: Literal["tool_call", "final"]
    char: tuple[int, int]
    """Half-open, in code points of `chat.render(messages, tools)`."""
    call: int | None = None
    """Index of the call within its turn."""


def targets_of(messages: Sequence[chat.Message], tools: Sequence[dict[str, Any]] = ()) -> tuple[Target, ...]:
    """The targets of the last assistant turn: its text, if any, then each of its calls."""
    position, start = 0, 0
    for segment in chat.segments(messages, tools):
        start = position if segment.target else start
        position += len(segment.text)
    last = messages[-1]
    found = [Target("final", (start, start + len(last.content)))] if last.content else []
    start += len(last.content)
    for index, call in enumerate(last.tool_calls):
        end = start + len(chat.call_text(call))
        found.append(Target("tool_call", (start, end), index))
        start = end
    return tuple(found)
