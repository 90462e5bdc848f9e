"""Process targets: where, in a conversation as the student's template renders it, a thing to learn stands.

Of each of the teacher's turns: `reasoning`; `content`, or `final` where it is the last turn's and calls nothing;
`tool_call`, `tool_name` and `tool_args` of each call; and, within its content, each `integration` of a value that an
earlier tool's result holds (distill/data/atoms.py).
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from distill import chat
from distill.artifacts import sha256_text
from distill.data.atoms import Atom, atoms_of, integrations
from distill.data.schema import Rendered, Source, Span, Target, Turn
from distill.tokenizer import Tokenizer


class Layout(NamedTuple):
    """A rendered conversation and what stands where in it."""

    text: str
    rendered: Rendered
    targets: tuple[Target, ...]
    completion: list[int] | None
    """What `completion_ids` gives; None where the student's tokenizer is not known."""


def targets_of(
    messages: Sequence[Turn], tools: Sequence[dict[str, Any]] = (), tokenizer: Tokenizer | None = None
) -> tuple[Target, ...]:
    """The targets of the teacher's turns, turn by turn."""
    return lay_out(messages, tools, tokenizer).targets


def rendered(
    messages: Sequence[Turn], tools: Sequence[dict[str, Any]] = (), tokenizer: Tokenizer | None = None
) -> Rendered:
    """Size and hash of the conversation as the template writes it."""
    return lay_out(messages, tools, tokenizer).rendered


def lay_out(
    messages: Sequence[Turn], tools: Sequence[dict[str, Any]] = (), tokenizer: Tokenizer | None = None
) -> Layout:
    """Render a conversation once and find its targets. InputError as `chat.segments` raises it."""
    pieces = chat.segments(messages, tools)
    found: list[Target] = []
    known: list[Atom] = []
    seen = 0  # turns whose results are in `known`
    completion: list[int] = []
    char = byte = tok = 0
    for piece in pieces:
        if piece.target and piece.message is not None and messages[piece.message].origin == "teacher":
            spans = tokenizer.encode_spans(piece.text) if tokenizer else None
            completion += spans.ids if spans else []
            tokens = len(spans.ids) if spans else 0
            known += [atom for index in range(seen, piece.message) for atom in atoms_of(messages[index], index)]
            seen = piece.message
            last = piece.message == len(messages) - 1
            places = _places(messages[piece.message], piece.message, known, last=last)
            body = _Body(piece.text, char, byte, tok, spans.bytes if spans else None)
            found += [body.target(place) for place in places]
        else:
            tokens = _count(tokenizer, piece.text) if tokenizer else 0
        char += len(piece.text)
        byte += _bytes(piece.text)
        tok += tokens
    text = "".join(piece.text for piece in pieces)
    stated = Rendered(sha256_text(text), char, byte, tok if tokenizer else None)
    return Layout(text, stated, tuple(found), completion if tokenizer else None)


@lru_cache(maxsize=256)
def _count(tokenizer: Tokenizer, text: str) -> int:
    """Tokens of a piece that is not learned: many conversations begin with the same tools and system turn."""
    return len(tokenizer.encode(text))


class _Place(NamedTuple):
    """A target by its characters within its turn's body."""

    kind: Any
    msg: int
    span: Span
    call: int | None = None
    source: Source | None = None


def _places(turn: Turn, msg: int, known: Sequence[Atom], *, last: bool) -> Iterator[_Place]:
    start = len(chat.thought_text(turn))
    if turn.reasoning:
        opening = len(chat.THINK_START)
        yield _Place("reasoning", msg, (opening, opening + len(turn.reasoning)))
    if turn.content:
        kind = "final" if last and not turn.tool_calls else "content"
        yield _Place(kind, msg, (start, start + len(turn.content)))
        for span, source in integrations(turn.content, known):
            yield _Place("integration", msg, (start + span[0], start + span[1]), source=source)
    start += len(turn.content)
    for index, call in enumerate(turn.tool_calls):
        # <tool_call>{"name": "NAME", "arguments": ARGUMENTS}</tool_call>
        end = start + len(chat.call_text(call))
        name = start + len(chat.CALL_START) + len('{"name": "')
        after = end - len(chat.CALL_END) - len("}")
        yield _Place("tool_call", msg, (start, end), index)
        if call.name:
            yield _Place("tool_name", msg, (name, name + _json_length(call.name) - 2), index)
        yield _Place("tool_args", msg, (after - _json_length(call.arguments), after), index)
        start = end


class _Body(NamedTuple):
    """A turn's body, where it begins, and the bytes of its tokens."""

    text: str
    char: int
    byte: int
    tok: int
    spans: list[tuple[int, int]] | None

    def target(self, place: _Place) -> Target:
        start, end = place.span
        first, stop = (start, end) if self.text.isascii() else (_bytes(self.text[:start]), _bytes(self.text[:end]))
        tok, exact = cover(self.spans, first, stop) if self.spans is not None else (None, False)
        return Target(
            kind=place.kind,
            msg=place.msg,
            char=(self.char + start, self.char + end),
            byte=(self.byte + first, self.byte + stop),
            tok=tok and (self.tok + tok[0], self.tok + tok[1]),
            exact_tok=exact,
            call=place.call,
            source=place.source,
        )


def cover(spans: Sequence[tuple[int, int]], first: int, stop: int) -> tuple[Span, bool]:
    """The least range of tokens that covers bytes [first, stop), and whether it covers nothing else."""
    begin = bisect_right(spans, first, key=lambda span: span[1])
    end = bisect_left(spans, stop, lo=begin, key=lambda span: span[0])
    exact = begin < end and spans[begin][0] == first and spans[end - 1][1] == stop
    return (begin, end), exact


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _json_length(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False))
