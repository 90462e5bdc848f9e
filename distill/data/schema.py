"""Schema kd/1: what a record and a header hold. distill/data/records.py reads and writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from distill import __version__, chat
from distill.artifacts import canonical_json, code_version, sha256_text
from distill.data.targets import Target
from distill.tokenizer import Tokenizer


class LogprobRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a record's distributions are: row of the store, number of tokens, entries kept of each."""

    row: int
    n: int
    k: int


class Usage(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Tokens as the teacher's server counted them."""

    prompt: int = 0
    completion: int = 0
    reasoning: int = 0


class Record(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """One training example: a conversation whose last turn is the teacher's."""

    id: str
    prompt: str
    """The last user turn, as text."""
    teacher_text: str
    """The last turn as the student writes it, calls included, without the token that ends the turn."""
    ground_truth: str | None
    """A known right answer in the same form, or null."""
    messages: tuple[chat.Message, ...]
    tools: list[dict[str, Any]] = []
    """Functions offered, as JSON schemas."""
    run_id: str
    split: Literal["train", "val"]
    stratum: str
    """The part of the mix it belongs to."""
    reasoning: str | None = None
    targets: tuple[Target, ...] = ()
    logprobs: LogprobRef | None = None
    usage: Usage | None = None

    def __post_init__(self) -> None:
        if not self.id or not self.prompt.strip() or not self.teacher_text.strip():
            raise ValueError("id, prompt and teacher_text must not be empty")
        if len(self.messages) < 2 or self.messages[-1].role != "assistant":
            raise ValueError("messages must hold at least two turns and end with the assistant's")
        if self.teacher_text != turn_text(self.messages[-1]):
            raise ValueError("teacher_text differs from the last turn of messages")

    @property
    def context(self) -> tuple[chat.Message, ...]:
        """The conversation up to the turn that the student is to write."""
        return self.messages[:-1]

    @property
    def gold_calls(self) -> tuple[chat.ToolCall, ...]:
        """The calls of the last turn."""
        return self.messages[-1].tool_calls


class Teacher(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Who answered, and which engine gave what."""

    kind: Literal["toy", "endpoint", "gguf", "hf"]
    model: str
    text_engine: str
    logits_engine: str | None = None
    weights: str | None = None
    """Numeric format of the weights where it is known, such as Q4_1."""
    weights_sha256: str | None = None
    host: str | None = None
    """Host of the endpoint; never its key."""


class LogprobInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the stored distributions are."""

    k: int
    temperature: float
    kind: Literal["raw", "processed"]
    dtype: Literal["F32", "F16"]


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What made the dataset."""

    schema: Literal["kd/1"] = "kd/1"
    run_id: str
    created_by: dict[str, str]
    tokenizer_sha256: str | None
    template_sha256: str
    prompts_sha256: str
    config: dict[str, Any]
    sampling: dict[str, Any]
    teacher: Teacher
    logprobs: LogprobInfo | None
    counts: dict[str, int] = {}
    files: dict[str, str] = {}
    """sha256 of each file of the dataset."""


def make_header(
    *,
    config: Mapping[str, Any],
    sampling: Mapping[str, Any],
    teacher: Teacher,
    prompts_sha256: str,
    tokenizer: Tokenizer | None,
    logprobs: LogprobInfo | None,
) -> Header:
    """A header; its run_id is a hash of everything else in it but the code version, so equal inputs give equal ids."""
    identity = {
        "config": dict(config),
        "sampling": dict(sampling),
        "teacher": msgspec.to_builtins(teacher),
        "prompts": prompts_sha256,
        "tokenizer": tokenizer.sha256 if tokenizer else None,
        "template": chat.template_sha256(),
    }
    return Header(
        run_id=sha256_text("kd-run/1\n" + canonical_json(identity))[:16],
        created_by={"package": "distill", "version": __version__, "code": code_version()},
        tokenizer_sha256=tokenizer.sha256 if tokenizer else None,
        template_sha256=chat.template_sha256(),
        prompts_sha256=prompts_sha256,
        config=dict(config),
        sampling=dict(sampling),
        teacher=teacher,
        logprobs=logprobs,
    )


def turn_text(message: chat.Message) -> str:
    """An assistant's turn as the student writes it, without the token that ends it."""
    return message.content + "".join(chat.call_text(call) for call in message.tool_calls)


def completion_ids(record: Record, tokenizer: Tokenizer) -> list[int]:
    """The tokens that the student is to write for the last turn, the end of the turn included."""
    last = [piece for piece in chat.segments(record.messages, record.tools) if piece.target][-1]
    return tokenizer.encode(last.text)


def split_of(identity: str, val_share: float = 0.1) -> Literal["train", "val"]:
    """The same split for the same id, always."""
    draw = int.from_bytes(hashlib.sha256(b"kd-split/1\n" + identity.encode()).digest()[:8], "big") / 2**64
    return "val" if draw < val_share else "train"
