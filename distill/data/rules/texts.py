"""Rules about the texts of a record: lost bytes, markup of other templates, secrets, personal data, evaluation sets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import msgspec

from distill import chat
from distill.data.rules import secrets
from distill.data.rules.view import View, strings
from distill.data.teacher.wire import lost_bytes, markup_in
from distill.tokenizer import CALL_END, CALL_START

_LOST_IN_JSON = ("\ufffd".encode(), rb"\u0000")
FLAGS = {"crlf"}
"""What is unusual about a record, as distill/data/build.py says it."""


def bytes_problems(view: View) -> Iterator[str]:
    """The teacher's text came through undamaged, and what is unusual about its lines is flagged."""
    record = view.record
    for index, turn in view.teachers:
        for text in (turn.content, turn.reasoning):
            if lost_bytes(text):
                yield f"messages[{index}] holds characters that stand for lost bytes"
    for index, calls in view.arguments:
        if _LOST_IN_JSON[0] in calls or _LOST_IN_JSON[1] in calls:
            yield f"messages[{index}]: its calls hold characters that stand for lost bytes"
    if record.reasoning and lost_bytes(record.reasoning):
        yield "its reasoning holds characters that stand for lost bytes"
    returns = False
    for turn in record.messages:  # runs for every record: no generator
        returns = returns or "\r" in turn.content
    if returns != ("crlf" in record.flags):
        yield "holds carriage returns, which flags does not say" if returns else "is flagged crlf and holds none"
    if not record.flags:
        return
    if unknown := set(record.flags) - FLAGS:
        yield f"flags holds {min(unknown)[:40]!r}, which nothing sets"
    if len(set(record.flags)) < len(record.flags):
        yield "flags says something twice"


def leak_problems(view: View) -> Iterator[str]:
    """No call or control markup of another template is left in what the teacher wrote; for ours, see `calls`."""
    for index, turn in view.teachers:
        if family := _family(turn.content, turn.reasoning):
            yield f"messages[{index}] holds {family} markup"
    for index, calls in view.arguments:
        if (b"<" in calls or b"[" in calls) and (family := _family("\n".join(_values(calls)), "")):
            yield f"messages[{index}]: its calls hold {family} markup"
    if view.record.reasoning and (family := _family("", view.record.reasoning)):
        yield f"its reasoning holds {family} markup"


def _family(content: str, reasoning: str) -> str | None:
    family = markup_in(content) or markup_in(reasoning)
    ours = family == "tool_call" and any(mark in content for mark in (CALL_START, CALL_END))
    return None if ours else family


def _values(calls: bytes) -> Iterator[str]:
    return strings([msgspec.json.decode(line) for line in calls.split(b"\n")])


def secrets_problems(view: View) -> Iterator[str]:
    """Nothing in the record that looks like a key or a password."""
    if not secrets.secret_in(view.text):
        if kind := secrets.secret_in(view.raw.decode(errors="replace")):  # such as under a key that is given twice
            yield f"the line holds what looks like a secret ({kind})"
        return
    for place, text in view.texts:
        if kind := secrets.secret_in(text):
            yield f"{place} holds what looks like a secret ({kind})"


def personal_data_problems(view: View) -> Iterator[str]:
    """Nothing in the record that looks like data about a person."""
    if not secrets.personal_in(view.text):
        return
    for place, text in view.texts:
        for kind, n in secrets.personal_in(text).items():
            yield f"{place} holds what looks like personal data ({kind}, {n})"


def contamination_problems(view: View) -> Iterator[str]:
    """No run of words of an evaluation set in any text of a record, each by itself: joined, a short one is missed."""
    if view.context.evaluation is None:
        return
    record = view.record
    texts = {record.ground_truth or "", record.reasoning or ""}
    for turn in record.messages:
        texts |= {turn.content, turn.reasoning, *(chat.call_text(call) for call in turn.tool_calls)}
    hits = (hit for text in sorted(texts) if text for hit in view.context.evaluation.hits(text, limit=3))
    for hit in itertools.islice(hits, 3):
        yield f"shares {hit.ngram!r} with {hit.item} of {hit.set}"
