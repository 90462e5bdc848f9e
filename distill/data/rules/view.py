"""A record as the rules look at it; what several of them need is made once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import msgspec

from distill.data.budget import Prices
from distill.data.episodes import Protocol
from distill.data.prompts.contamination import ContaminationIndex
from distill.data.prompts.strata import Prompt
from distill.data.rules import replay
from distill.data.rules.answers import Answers
from distill.data.schema import Header, Record
from distill.data.store.distributions import Distribution
from distill.data.store.store import TopK
from distill.data.targets import Layout, lay_out
from distill.errors import InputError
from distill.tokenizer import Tokenizer


class Context(NamedTuple):
    """What a rule may look at beside the record."""

    header: Header
    tokenizer: Tokenizer | None = None
    evaluation: ContaminationIndex | None = None
    prices: Prices | None = None
    """Those of the header's configuration."""
    protocol: Protocol | None = None
    """How the teacher was asked; None of a set that was not generated, and for the structural rules."""
    answers: Answers | None = None
    """The journal, where it is."""
    store: TopK | None = None
    """The distributions, where they are; None for the structural rules."""

    @property
    def generated(self) -> bool:
        """Whether a teacher was asked."""
        return self.header.teacher.asked


class View:
    """A record under the rules; what several of them need is made once."""

    def __init__(
        self, record: Record, context: Context, stored: Distribution | str | None = None, raw: bytes = b""
    ) -> None:
        """`stored`: its row of the store, or why it cannot be read; None where the set has none. `raw`: its line."""
        self.record, self.context, self.stored, self.raw = record, context, stored, raw
        self.teachers = [(index, turn) for index, turn in enumerate(record.messages) if turn.origin == "teacher"]
        self.tools = msgspec.json.encode(record.tools) if record.tools else b"[]"
        self.arguments = [
            (index, b"\n".join([msgspec.json.encode(call.arguments) for call in turn.tool_calls]))
            for index, turn in self.teachers if turn.tool_calls
        ]  # fmt: skip
        """Of each of the teacher's turns that calls: its index, and the arguments as JSON, one a line."""

    @cached_property
    def layout(self) -> Layout | str:
        """The rendered conversation, or why it cannot be rendered."""
        try:
            return lay_out(self.record.messages, self.record.tools, self.context.tokenizer)
        except InputError as error:
            return str(error)

    @cached_property
    def prompt(self) -> Prompt | None:
        """The prompt that it was asked with; None where its id is not that of one."""
        return replay.prompt_of(self.record)

    @cached_property
    def told(self) -> replay.Played | None:
        """The episode played again with its own turns as answers; None where it cannot be."""
        if self.context.protocol is None or self.prompt is None or not replay.playable(self.record):
            return None
        try:
            return replay.from_record(self.record, self.prompt, self.context.protocol)
        except InputError:
            return None  # it cannot be rendered: `render` says so

    @cached_property
    def played(self) -> replay.Played | str | None:
        """The episode played again with the journal's answers, or why it cannot be; None where there is no journal, and
        where the prompt is not known."""
        answers = self.context.answers
        if answers is None or self.context.protocol is None or self.prompt is None or not replay.playable(self.record):
            return None
        try:
            return replay.from_journal(self.record, self.prompt, self.context.protocol, answers)
        except InputError as error:
            return str(error)

    @cached_property
    def texts(self) -> list[tuple[str, str]]:
        """Every text of the record with its place. `prompt` and `teacher_text` are in its messages."""
        record = self.record
        out = [("ground_truth", record.ground_truth or ""), ("reasoning", record.reasoning or ""), ("id", record.id),
               ("stratum", record.stratum), ("flags", "\n".join(record.flags))]  # fmt: skip
        for index, turn in enumerate(record.messages):
            # as JSON: what a value is, its name may say
            calls = "\n".join(f"{call.name} {msgspec.json.encode(call.arguments).decode()}" for call in turn.tool_calls)
            out += [(f"messages[{index}]", turn.content), (f"messages[{index}].reasoning", turn.reasoning)]
            out += [(f"messages[{index}].tool_calls", calls), (f"messages[{index}]'s names", _names(turn))]
        out.append(("tools", _tool_texts(self.tools)))
        return [(place, text) for place, text in out if text]

    @cached_property
    def text(self) -> str:
        """All of them: what is not in it is in none."""
        return "\n".join(text for _, text in self.texts)


def _names(turn: Any) -> str:
    return "\n".join([turn.finish_reason or "", turn.tool_call_id, *(call.id for call in turn.tool_calls)]).strip()


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


class _Repeated(Exception):
    pass


def repeated_key(data: bytes) -> bool:
    """Whether an object in a JSON text gives a key twice: what a reader takes of it, the next may not."""
    try:
        json.loads(data, object_pairs_hook=_once, parse_int=str, parse_float=str)
    except _Repeated:
        return True
    except (ValueError, RecursionError):
        return False  # no JSON: whoever reads it says so
    return False


def _once(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) < len(pairs):
        raise _Repeated


@lru_cache(maxsize=256)
def _tool_texts(tools: bytes) -> str:
    return "\n".join(strings(msgspec.json.decode(tools)))
