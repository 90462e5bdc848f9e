"""Which kind of span each token that the student learns belongs to: what `span_weights` tells apart.

Found in the text itself, as `targets_of` finds it: that costs a fifth of tokenising a record, holds for any student's
tokenizer and for sets without targets, and trusts no offset of a file. (The rule `targets` of validation holds a
record's own ones to the same function.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill import chat
from distill.data.schema import Call, Target, Turn
from distill.data.targets import cover, targets_of
from distill.errors import InputError
from distill.tokenizer import Tokenizer

KINDS = ("content", "final", "reasoning", "tool_call", "tool_name", "tool_args", "integration")
"""final: the text of the last turn, where that calls nothing; content: of other turns; tool_call: what is neither name
nor arguments of a call; integration: what of either text carries a value of an earlier tool's result. A token that
reaches into several spans belongs to the last of them in this order."""
_PARTS = ("content", "final", "reasoning", "tool_call")


def span_kinds(
    tokenizer: Tokenizer, messages: Sequence[Turn], tools: Sequence[dict[str, Any]], learned: Collection[int]
) -> NDArray[np.int8]:
    """The kind of each token of the `learned` turns, which are the teacher's, in order: an index into KINDS."""
    targets = targets_of(messages, tools)
    found, byte = [np.zeros(0, np.int8)], 0
    for piece in chat.segments(messages, tools):
        if piece.target and piece.message in learned:
            own = [target for target in targets if target.msg == piece.message]
            found.append(_of_turn(tokenizer.encode_spans(piece.text).bytes, own, byte))
        byte += len(piece.text.encode())
    return np.concatenate(found)


def _of_turn(spans: Sequence[tuple[int, int]], targets: Sequence[Target], start: int) -> NDArray[np.int8]:
    """The turn begins at byte `start`. Its parts follow one another; what stands between two of them (the end of the
    reasoning) or after the last (the end of the turn) goes with the one before it."""
    kind_N = np.zeros(len(spans), np.int8)
    places = [(target.kind, cover(spans, *(byte - start for byte in target.byte))[0]) for target in targets]
    parts = [(kind, begin) for kind, (begin, _) in places if kind in _PARTS]
    for number, (kind, begin) in enumerate(parts):
        kind_N[begin if number else 0 :] = KINDS.index(kind)
    for kind, (begin, end) in places:
        if kind not in _PARTS:
            kind_N[begin:end] = KINDS.index(kind)
    return kind_N


def turn_of(text: str) -> Turn:
    """An answer given as text, such as a ground truth, as a turn: its reasoning and calls where the template would
    write them exactly so, else all of it content."""
    plain, parsed = Turn("assistant", text, origin="teacher"), chat.parse(text)
    calls = tuple(Call(call.name, call.arguments) for call in parsed.calls)
    turn = Turn("assistant", parsed.content, calls, parsed.reasoning, "teacher")
    try:
        return turn if chat.render([turn]) == chat.render([plain]) else plain
    except InputError:  # marks within its reasoning
        return plain
