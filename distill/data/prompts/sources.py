"""Prompts from files: JSONL, or plain text with a prompt a line. A file is checked whole before anything is asked.

    {"prompt": "...", "system": "...", "ground_truth": "...", "tools": ["get_weather", {"name": ...}], "expect": "call"}
    {"messages": [{"role": "user", "content": "..."}, ...], "stratum": "support", "id": "q-17"}

Of a file only places and hashes are held, 24 bytes a prompt; a prompt is read when its turn comes.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from distill import chat
from distill.artifacts import sha256_file
from distill.broker import Tool, parse_tool
from distill.chat import Message
from distill.data.prompts.similarity import mix
from distill.data.prompts.strata import Expect, Prompt, make_prompt
from distill.errors import DatasetError, InputError, describe_os_error
from distill.jsonlines import MAX_LINE, decode_object, read_lines

MAX_PROMPT = 1 << 20  # characters of all turns
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,47}")


class SourceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of prompts in a mix."""

    path: str
    """JSONL, or any other suffix for plain text with a prompt a line."""
    weight: float = 1.0
    """Share of the mix, beside the weights of `strata`."""
    stratum: str | None = None
    """Its name in the mix; null takes each line's own `stratum`, then the file's name."""
    system: str | None = None
    """System turn of prompts that bring none."""
    tools: list[str] = []
    """Names of tools offered with prompts that bring none."""
    expect: Literal["any", "call", "no_call"] = "any"
    """What the prompts that do not say so themselves are to bring about."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < 1e9:
            raise ValueError(f"the weight of {self.path} must be above 0, not {self.weight}")
        if self.stratum is not None and not _NAME.fullmatch(self.stratum):
            raise ValueError(f"stratum {self.stratum!r}: a name has 1 to 48 letters, digits, _, - and .")


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prompt: str | None = None
    messages: list[_Said] | None = None
    system: str | None = None
    tools: list[str | dict[str, Any]] | None = None
    ground_truth: str | None = None
    stratum: str | None = None
    expect: Literal["any", "call", "no_call"] | None = None
    id: str | int | None = None


class _Said(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str


class _Places(NamedTuple):
    """Of each prompt: where its line begins, its number in the file, and a hash of its bytes."""

    offsets: array[int]
    numbers: array[int]
    hashes: array[int]


class Source:
    """One file, checked."""

    def __init__(self, config: SourceConfig, tools: Mapping[str, Tool]) -> None:
        """`tools` can be named by prompts. DatasetError names the first line that cannot be used."""
        self.path = Path(config.path)
        self.tools: dict[str, Tool] = {}
        """Tools whose schemas the file itself brings."""
        self.sha256 = sha256_file(self.path)
        self._config, self._known = config, dict(tools)
        self._places: dict[str, _Places] = {}
        offset = 0
        for number, line in read_lines(self.path, blank=True):
            if line.strip():
                prompt = self._prompt(line, number)
                places = self._places.setdefault(prompt.stratum, _Places(array("Q"), array("Q"), array("Q")))
                for column, value in zip(places, (offset, number, _hash(line)), strict=True):
                    column.append(value)
            offset += len(line)
        if not self._places:
            raise DatasetError(f"{self.path}: no prompts in it")

    @property
    def weights(self) -> dict[str, float]:
        """Of each stratum in the file: the file's weight, divided by the number of prompts."""
        counts = self.counts
        return {name: self._config.weight * n / sum(counts.values()) for name, n in counts.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Prompts of each stratum."""
        return {name: len(places.offsets) for name, places in self._places.items()}

    def prompts(self, stratum: str, seed: int) -> Iterator[Prompt]:
        """The prompts of a stratum in an order that seed and content decide, not their place in the file."""
        places = self._places[stratum]
        salt = np.uint64(int.from_bytes(hashlib.blake2b(f"{seed}".encode(), digest_size=8).digest(), "big"))
        hashes = np.array(places.hashes, np.uint64)
        try:
            with open(self.path, "rb") as file:
                for index in np.argsort(mix(hashes ^ salt), kind="stable").tolist():
                    file.seek(places.offsets[index])
                    line = file.readline(MAX_LINE + 1)
                    if _hash(line) != places.hashes[index]:
                        raise DatasetError(f"{self.path}:{places.numbers[index]}: the file was changed while in use")
                    yield self._prompt(line, places.numbers[index])
        except OSError as error:
            raise DatasetError(f"cannot read {describe_os_error(error, self.path)}") from error

    def _prompt(self, line: bytes, number: int) -> Prompt:
        where = f"{self.path}:{number}"
        if self.path.suffix in (".jsonl", ".ndjson", ".json"):
            try:
                row = msgspec.convert(decode_object(line, where), _Line)
            except (msgspec.ValidationError, ValueError, RecursionError) as error:
                raise DatasetError(f"{where}: {error}") from error
        else:
            row = _Line(prompt=line.decode().strip().lstrip("\ufeff"))
        messages = self._messages(row, where)
        offers = [self._tool(tool, where).offer for tool in (self._config.tools if row.tools is None else row.tools)]
        names = [offer["function"]["name"] for offer in offers]
        if len(set(names)) < len(names):
            raise DatasetError(f"{where}: a tool is offered twice")
        expect: Expect = row.expect or self._config.expect
        if expect == "call" and not offers:
            raise DatasetError(f"{where}: expects a call and offers no tool")
        try:
            chat.segments(messages, offers)
        except InputError as error:
            raise DatasetError(f"{where}: {error}") from error
        stratum = self._config.stratum or row.stratum or re.sub(r"[^A-Za-z0-9_.-]", "_", self.path.stem)[:48]
        if not _NAME.fullmatch(stratum):
            raise DatasetError(f"{where}: stratum: a name has 1 to 48 letters, digits, _, - and .")
        return make_prompt(stratum, messages, offers, ground_truth=row.ground_truth, expect=expect,
                           source=f"{self.path.name}:{number}")  # fmt: skip

    def _messages(self, row: _Line, where: str) -> list[Message]:
        if (row.prompt is None) == (row.messages is None):
            raise DatasetError(f"{where}: a line has either prompt or messages")
        said = row.messages if row.messages is not None else [_Said("user", row.prompt or "")]
        system = row.system if row.system is not None else self._config.system
        if system and not (said and said[0].role == "system"):
            said = [_Said("system", system), *said]
        roles = [message.role for message in said if message.role != "system"]
        if len(roles) < len(said) - (said[0].role == "system" if said else 0):
            raise DatasetError(f"{where}: a system turn comes first or not at all")
        if len(roles) % 2 == 0 or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            raise DatasetError(f"{where}: turns go user, assistant, user ... and end with the user's")
        if not all(message.content.strip() for message in said):
            raise DatasetError(f"{where}: a turn is empty")
        if sum(len(message.content) for message in said) > MAX_PROMPT:
            raise DatasetError(f"{where}: the turns have more than {MAX_PROMPT:,} characters")
        return [Message(message.role, message.content) for message in said]

    def _tool(self, tool: str | dict[str, Any], where: str) -> Tool:
        if isinstance(tool, str):
            found = self._known.get(tool) or self.tools.get(tool)
            if found is None:
                raise DatasetError(f"{where}: no tool is called {tool!r}")
            return found
        given = parse_tool(tool, where)
        before = self._known.get(given.name) or self.tools.setdefault(given.name, given)
        if (before.function, before.returns) != (given.function, given.returns or before.returns):
            raise DatasetError(f"{where}: tool {given.name} is defined otherwise elsewhere")
        return before


def _hash(line: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "big")
