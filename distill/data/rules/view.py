"""A record as the rules look at it; what several of them need is made once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import msgspec

from distill.data.budget import Prices
from distill.data.prompts.contamination import ContaminationIndex
from distill.data.schema import Header, Record
from distill.data.store.distributions import Distribution
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


class View:
    """A record under the rules; what several of them need is made once."""

    def __init__(self, record: Record, context: Context, stored: Distribution | str | None = None) -> None:
        """`stored`: its row of the store, why it cannot be read, or None where the dataset has none."""
        self.record, self.context, self.stored = record, context, stored
        self.teachers = [(index, turn) for index, turn in enumerate(record.messages) if turn.origin == "teacher"]
        self.tools = msgspec.json.encode(record.tools) if record.tools else b"[]"

    @cached_property
    def layout(self) -> Layout | str:
        """The rendered conversation, or why it cannot be rendered."""
        try:
            return lay_out(self.record.messages, self.record.tools, self.context.tokenizer)
        except InputError as error:
            return str(error)

    @cached_property
    def texts(self) -> list[tuple[str, str]]:
        """Every text of the record with its place. `prompt` and `teacher_text` are in its messages."""
        record = self.record
        out = [("ground_truth", record.ground_truth or ""), ("reasoning", record.reasoning or "")]
        for index, turn in enumerate(record.messages):
            values = "\n".join(text for call in turn.tool_calls for text in _strings(call.arguments))
            out += [(f"messages[{index}]", turn.content), (f"messages[{index}].reasoning", turn.reasoning)]
            out.append((f"messages[{index}].tool_calls", values))
        out.append(("tools", _tool_texts(self.tools)))
        return [(place, text) for place, text in out if text]

    @cached_property
    def text(self) -> str:
        """All of them: what is not in it is in none."""
        return "\n".join(text for _, text in self.texts)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


@lru_cache(maxsize=256)
def _tool_texts(tools: bytes) -> str:
    return "\n".join(_strings(msgspec.json.decode(tools)))
