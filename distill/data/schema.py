"""Schema kd/1: what a record and a header hold. distill/data/records.py reads and writes them.

Nothing here varies between two runs on the same answers: times, attempts and what retries cost stay in the journal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Literal

import msgspec

from distill import __version__, chat
from distill.artifacts import canonical_json, code_version, sha256_text
from distill.tokenizer import Tokenizer

Span = tuple[int, int]
"""Half-open."""


class Call(chat.ToolCall, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A call in a record. Its id is ours, `call_0`, `call_1` and so on through the conversation: a teacher's own
    differ from run to run."""

    id: str = ""


class Turn(chat.Message, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A turn of a record. Its `reasoning` is what the student's template renders, and so learns."""

    tool_calls: tuple[Call, ...] = ()
    origin: Literal["dataset", "teacher", "broker"] = "dataset"
    """Who wrote it. Only the teacher's turns are learned."""
    tool_call_id: str = ""
    """Of a tool's result: the call that it answers."""
    finish_reason: str | None = None
    """Of a teacher's turn: why it ended there."""


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an integrated value comes from: a tool's result and the JSON pointer of the leaf in it."""

    msg: int
    pointer: str


class Target(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """A span of the conversation, as `chat.render(messages, tools)` writes it, that the student learns to write."""

    kind: Literal["reasoning", "content", "tool_call", "tool_name", "tool_args", "integration", "final"]
    msg: int
    """Index of its turn."""
    char: Span
    """In code points."""
    byte: Span
    """In UTF-8 bytes."""
    tok: Span | None = None
    """In tokens of `chat.encode(...)`: the least that cover it; absent where the student's tokenizer is not known."""
    exact_tok: bool = False
    """Whether the tokens cover nothing else."""
    call: int | None = None
    """Index of the call within its turn."""
    source: Source | None = None
    """Of an integration: what was integrated."""


class Rendered(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The conversation as the student's template renders it, by its size and hash."""

    text_sha256: str
    n_chars: int
    n_bytes: int
    n_tokens: int | None = None


class LogprobRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a record's distributions are: row of the store, number of tokens, entries kept of each."""

    row: int
    n: int
    k: int


class Usage(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Tokens as the teacher's server counted them, over all requests of a record."""

    prompt: int = 0
    completion: int = 0
    reasoning: int = 0
    """Part of `completion`."""
    cached: int = 0
    """Part of `prompt`."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt + other.prompt, self.completion + other.completion,
                     self.reasoning + other.reasoning, self.cached + other.cached)  # fmt: skip


class Provenance(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a record's turns were made from, in order."""

    request_sha256: tuple[str, ...] = ()
    """Key of each request: in the journal, the answer."""
    response_sha256: tuple[str, ...] = ()
    """Of each answer's text, calls and finish reason."""
    fixture_sha256: tuple[str, ...] = ()
    """Of each result that the broker gave, with its call."""


class Record(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """One training example: a conversation whose last turn is the teacher's."""

    id: str
    """Of the prompt: a hash of what was asked, tools included (distill/data/prompts/stream.py)."""
    prompt: str
    """The last user turn, as text."""
    teacher_text: str
    """The last turn as the student writes it, calls included, without reasoning and the token that ends the turn."""
    ground_truth: str | None
    """A known right answer in the same form, or null."""
    messages: tuple[Turn, ...]
    tools: list[dict[str, Any]] = []
    """Functions offered, as JSON schemas."""
    run_id: str
    split: Literal["train", "val"]
    stratum: str
    """The part of the mix it belongs to."""
    expect: Literal["any", "call", "no_call"] = "any"
    """What the prompt was written to bring about."""
    reasoning: str | None = None
    """The last turn's reasoning, whether or not the student learns it."""
    render: Rendered | None = None
    targets: tuple[Target, ...] = ()
    logprobs: LogprobRef | None = None
    usage: Usage | None = None
    cost_usd: Decimal | None = None
    provenance: Provenance | None = None
    flags: tuple[str, ...] = ()
    """What is unusual about it, such as `crlf`."""

    def __post_init__(self) -> None:
        if not self.id or not self.prompt.strip() or not self.teacher_text.strip():
            raise ValueError("id, prompt and teacher_text must not be empty")
        if len(self.messages) < 2 or self.messages[-1].role != "assistant":
            raise ValueError("messages must hold at least two turns and end with the assistant's")
        if self.messages[-1].origin != "teacher":
            raise ValueError("the last turn of messages must be the teacher's (origin)")
        if self.teacher_text != turn_text(self.messages[-1]):
            raise ValueError("teacher_text differs from the last turn of messages")

    @property
    def context(self) -> tuple[Turn, ...]:
        """The conversation up to the last turn."""
        return self.messages[:-1]

    @property
    def learned(self) -> tuple[int, ...]:
        """Indices of the turns that the student learns to write: the teacher's."""
        return tuple(i for i, turn in enumerate(self.messages) if turn.origin == "teacher")

    @property
    def gold_calls(self) -> tuple[Call, ...]:
        """The calls of the last turn."""
        return self.messages[-1].tool_calls


class Teacher(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Who answered, and which engine gave what."""

    kind: Literal["toy", "scripted", "endpoint", "gguf", "hf"]
    model: str
    text_engine: str
    logits_engine: str | None = None
    weights: str | None = None
    """Numeric format of the weights where it is known, such as Q4_1."""
    weights_sha256: str | None = None
    host: str | None = None
    """Host of the endpoint; never its key."""
    server: str | None = None
    """What a local server calls itself, with its version."""
    models_seen: tuple[str, ...] = ()
    """What the answers called their model."""
    system_fingerprints_seen: tuple[str, ...] = ()

    @property
    def asked(self) -> bool:
        """Whether requests were sent to it: there is nothing to ask of a toy or a script."""
        return self.kind not in ("toy", "scripted")


class LogprobInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the stored distributions are."""

    k: int
    """Most entries kept of a token."""
    temperature: float
    kind: Literal["raw", "processed", "unknown"]
    """Before or after the sampler's changes; `unknown` where a server does not say."""
    tail: Literal["logsumexp", "log1mexp"]
    """How the mass of the rest was found: from all logits, or as what the kept entries leave of 1."""
    codec: str
    kl_to_exact: dict[str, float] = {}
    """KL(what was given || what is stored) of a token, measured while storing: mean, p99, max (nats)."""


class Licence(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """On what terms the teacher's words may be learned."""

    teacher_terms_url: str | None = None
    accepted_by: str | None = None
    reasoning_allowed: bool = False


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What made the dataset."""

    schema: Literal["kd/1"] = "kd/1"
    run_id: str
    created_by: dict[str, str]
    tokenizer_sha256: str | None
    template_sha256: str
    prompts_sha256: str
    tools_sha256: str | None = None
    """Of all tools that records offer; null where none is."""
    config: dict[str, Any]
    sampling: dict[str, Any]
    teacher: Teacher
    capabilities: dict[str, Any] = {}
    """What the probe found that the endpoint can do."""
    text_only: bool = False
    """No distributions: the student learns from text alone."""
    logprobs: LogprobInfo | None
    licence: Licence = Licence()
    quotas: dict[str, int] = {}
    """Records wanted of each stratum."""
    quota_tolerance: float = 0.0
    """Part of a quota that may be missing."""
    decontamination: dict[str, str] = {}
    """Evaluation sets that the prompts were held against: name and sha256."""
    near_duplicates: float | None = None
    """Jaccard similarity of prompts from which they count as one."""
    cost_usd: Decimal | None = None
    """What the answers in it, rejected ones included, cost; what retries cost beyond that is in the journal."""
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
    **more: Any,
) -> Header:
    """A header; equal inputs give equal run_ids. `more` are further fields of Header."""
    made = Header(
        run_id="",
        created_by={"package": "distill", "version": __version__, "code": code_version()},
        tokenizer_sha256=tokenizer.sha256 if tokenizer else None,
        template_sha256=chat.template_sha256(),
        prompts_sha256=prompts_sha256,
        config=dict(config),
        sampling=dict(sampling),
        teacher=teacher,
        logprobs=logprobs,
        text_only=logprobs is None,
        **more,
    )
    return msgspec.structs.replace(made, run_id=run_id_of(made))


def run_id_of(header: Header) -> str:
    """A hash of what the answers depend on: configuration, sampling, teacher, tokenizer and template."""
    teacher = msgspec.structs.replace(header.teacher, server=None, models_seen=(), system_fingerprints_seen=())
    identity = {
        "config": header.config,
        "sampling": header.sampling,
        "teacher": msgspec.to_builtins(teacher),
        "tokenizer": header.tokenizer_sha256,
        "template": header.template_sha256,
    }
    return sha256_text("kd-run/2\n" + canonical_json(identity))[:16]


def turn_text(message: chat.Message) -> str:
    """An assistant's turn as the student writes it, without its reasoning and the token that ends it."""
    return message.content + "".join(chat.call_text(call) for call in message.tool_calls)


def tools_sha256(tools: Iterable[bytes]) -> str | None:
    """Of tools, each as JSON, whatever their order and however often one is given; None of none."""
    texts = sorted({canonical_json(msgspec.json.decode(tool)) for tool in tools})
    return sha256_text("kd-tools/1\n" + "\n".join(texts)) if texts else None


def completion_ids(record: Record, tokenizer: Tokenizer) -> list[int]:
    """The tokens that the student is to write, the ends of the turns included: all the teacher's turns, in order."""
    learned = set(record.learned)
    pieces = [p for p in chat.segments(record.messages, record.tools) if p.target and p.message in learned]
    return [token for piece in pieces for token in tokenizer.encode(piece.text)]


def split_of(identity: str, val_share: float = 0.1) -> Literal["train", "val"]:
    """The same split for the same id, always."""
    draw = int.from_bytes(hashlib.sha256(b"kd-split/1\n" + identity.encode()).digest()[:8], "big") / 2**64
    return "val" if draw < val_share else "train"
