"""Schema contextual/1: one item of an evaluation set, what a right answer to it does, and nothing of any answer.

Whether an item counts in a metric is said by its `kind` and its gold alone, never by what a model did.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from distill import chat

Kind = Literal[
    "required",
    "multi",
    "control",
    "decline",
    "clarify",
    "error_recovery",
    "empty_evidence",
    "canary",
    "injection",
    "locale",
    "long_context",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
NO_CALL: frozenset[Kind] = frozenset({"control", "decline", "clarify"})
"""Whose right answer calls no tool."""
ADVERSARIAL: frozenset[Kind] = frozenset({"canary", "injection"})
USER = "user"
"""The audience of what is said to the user."""
MOST_CALLS = 8
"""Gold calls of an item."""


class Matcher(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """What an argument must be: exactly one of these. `optional`: it may also be absent."""

    exact: Any = msgspec.UNSET
    """JSON equality: 5 is 5.0, true is not 1."""
    enum: tuple[Any, ...] | None = None
    """One of several values."""
    num: int | float | None = None
    """A number within `abs` or within `rel` of it."""
    abs: float = 0.0
    rel: float = 0.0
    regex: str | None = None
    """The whole text, in a linear-time engine: no look-around, no back-references."""
    set: tuple[Any, ...] | None = None
    """A list with these items in any order."""
    date: str | None = None
    """A day YYYY-MM-DD, or a moment YYYY-MM-DDTHH:MM[:SS], in any ISO 8601 form."""
    any: bool = False
    """Whatever the schema allows."""
    optional: bool = False

    def __post_init__(self) -> None:
        given = [self.exact is not msgspec.UNSET, self.enum is not None, self.num is not None, self.regex is not None,
                 self.set is not None, self.date is not None, self.any]  # fmt: skip
        if sum(given) != 1:
            raise ValueError("a matcher has exactly one of exact, enum, num, regex, set, date, any")
        if (self.abs or self.rel) and self.num is None:
            raise ValueError("abs and rel belong to num")
        if self.abs < 0 or self.rel < 0 or isinstance(self.num, bool):
            raise ValueError("num must be a number, abs and rel not negative")


class GoldCall(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """A call that a right answer makes. An argument that `arguments` does not name is wrong."""

    id: str
    name: str
    arguments: dict[str, Matcher] = {}
    example: dict[str, Any]
    """Arguments that match: what the oracle calls with, and a fixture answers."""
    after: tuple[str, ...] = ()
    """Ids of the calls that come before it."""


class Fact(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """A value of a tool's result that the final answer must hold."""

    call: str
    """Id of the gold call."""
    pointer: str
    """JSON pointer (RFC 6901) of a leaf in its result."""
    type: Literal["number", "date", "time", "url", "id", "string"]
    value: Any
    """The leaf, as the fixture has it."""
    renderings: tuple[str, ...] = ()
    """Other texts that say exactly the same, such as `12 March 2026`, `12,5` or `0.5 km` for 500 m."""
    synonyms: tuple[str, ...] = ()
    """Texts that count in the lax metric only."""


class Secret(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """A canary or another value that may be said only where its audience is."""

    value: str
    audience: tuple[str, ...] = ()
    """`user` for what is said to the user, or names of tools; empty: it may be said nowhere."""
    disclose: str | None = None
    """Where it must be said, one of the audience, because the user rightly asked."""

    def __post_init__(self) -> None:
        if self.disclose is not None and self.disclose not in self.audience:
            raise ValueError("a secret is disclosed to one of its audience")


class ForbiddenCall(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """A call that text in a tool's result asks for and that must not be made: the tool, with these arguments."""

    name: str
    arguments: dict[str, Matcher] = {}
    """Each must match for the call to be the forbidden one; those not named may be anything."""


class Item(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """One episode to play, and what a right one does."""

    id: str
    kind: Kind
    stratum: str
    """Which scenario made it: for reading a report, never for scoring."""
    messages: tuple[chat.Message, ...]
    """Up to the user's turn that the model answers."""
    tools: tuple[dict[str, Any], ...]
    """Functions offered (`name`, `description`, `parameters`): what is needed, or tempts, and at least three others."""
    calls: tuple[GoldCall, ...] = ()
    facts: tuple[Fact, ...] = ()
    decoys: tuple[str, ...] = ()
    """Texts that a wrong answer would hold, such as the other values of an enum: said, they must be grounded."""
    derived: tuple[str, ...] = ()
    """Values that follow from results without standing in them, such as a sum: grounded wherever they are said."""
    must_say: tuple[str, ...] = ()
    """An answer without facts has to own up to that: it holds one of these texts, in any case, at the edges of words,
    such as `could not`, or `?` where it should ask back. Empty: nothing in particular."""
    answer: str
    """A right final answer: the oracle's."""
    secrets: tuple[Secret, ...] = ()
    forbidden_calls: tuple[ForbiddenCall, ...] = ()
    allow: tuple[str, ...] = ()
    """Values that look private, such as an IBAN, and may be said in this item."""
    locale: str = "en"
    """How numbers are written: `en` 1,234.5; `de`, `es`, `it`, `pt` 1.234,5; `fr`, `sv`, `nb` 1 234,5."""

    def __post_init__(self) -> None:
        if not self.id or not self.messages or self.messages[-1].role != "user":
            raise ValueError("an item has an id, and messages that end with the user's")
        if not self.answer.strip():
            raise ValueError("answer must not be empty: the oracle says it")
        if bool(self.calls) == (self.kind in NO_CALL):
            raise ValueError(f"kind {self.kind}: " + ("calls none" if self.calls else "has at least one gold call"))
        if len(self.calls) > MOST_CALLS:
            raise ValueError(f"more than {MOST_CALLS} gold calls")
        known: set[str] = set()
        for call in self.calls:  # in an order in which they can be made
            if call.id in known or not set(call.after) <= known:
                raise ValueError(f"gold call {call.id!r}: its id is taken, or it comes before one of its `after`")
            known.add(call.id)
        if unknown := {fact.call for fact in self.facts} - known:
            raise ValueError(f"a fact names the call {min(unknown)!r}, which the item does not have")

    @property
    def prompt(self) -> str:
        """The user's last turn."""
        return self.messages[-1].content

    @property
    def integrates(self) -> bool:
        """Whether its final answer must take up what tools returned: every kind that calls."""
        return self.kind not in NO_CALL

    def function(self, name: str) -> dict[str, Any] | None:
        """The offered function of this name."""
        return next((tool for tool in self.tools if tool["name"] == name), None)


class FixtureRow(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """A line of a fixtures file: what a call returns."""

    tool: str
    args: dict[str, Any]
    """The arguments, or by `match: matchers` a Matcher for each."""
    match: Literal["exact", "matchers"] = "exact"
    nth: int | Literal["*"] = "*"
    """Which of the episode's calls that this tool and these arguments answer, from 1 on; `*`: all others."""
    result: Any = msgspec.UNSET
    error: dict[str, str] | None = None
    """`type` and `message`, in place of a result."""
    latency_ms: int = 0
    """Added to the episode's virtual clock."""
    item: str | None = None
    """The item that it belongs to; absent: any."""
    id: str = ""
    """For people: nothing reads it."""

    def __post_init__(self) -> None:
        if (self.result is msgspec.UNSET) == (self.error is None):
            raise ValueError("a fixture has either a result or an error")
        if self.error is not None and set(self.error) != {"type", "message"}:
            raise ValueError("a fixture's error has a type and a message")
        if (isinstance(self.nth, int) and self.nth < 1) or self.latency_ms < 0:
            raise ValueError("nth counts from 1; latency_ms is not negative")


class SetHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`F.jsonl.d/header.json`: what made an evaluation set, and what its files must hash to."""

    schema: Literal["contextual/1"] = "contextual/1"
    created_by: dict[str, str]
    seed: int
    config: dict[str, Any] = {}
    files: dict[str, str]
    """sha256 of the set's own file (`items`), of `fixtures.jsonl` and `tools.jsonl` beside the header."""
    template_sha256: str
    counts: dict[str, int]
    """Items by kind."""
    disjoint_from: dict[str, str] = {}
    """Training sets that every prompt was held against: name and sha256."""
