"""A record as the episode that it is: played again by the code that generates, with the answers that it or the journal
holds. The broker's results are the record's own; whether they are what was sent on, the next request's hash says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import NamedTuple

import msgspec

from distill import chat
from distill.broker import Broker, Result, fixture_sha256
from distill.data.budget import dollars
from distill.data.episodes import Accepted, Protocol, Rejected, advance, episode
from distill.data.journal import Answer
from distill.data.prompts.strata import Prompt, make_prompt
from distill.data.rules.answers import Answers, Paid
from distill.data.schema import Record, Usage, turn_text
from distill.data.sender import Request
from distill.data.teacher.wire import CallText, Reply


class Played(NamedTuple):
    """An episode played again: the hashes of its requests, how it ends (None: an answer is missing), and what the
    ledger has of each answer."""

    requests: tuple[str, ...]
    end: Accepted | Rejected | None
    paid: tuple[Paid | None, ...] = ()


class _Recorded(Broker):
    """Gives the results that a record holds, in their order."""

    def __init__(self, record: Record) -> None:
        super().__init__(())
        self._results = iter([turn.content for turn in record.messages if turn.role == "tool"])

    def call(self, call: chat.ToolCall, *, seed: int, nth: int = 0, fault: str = "") -> Result:
        """The next result, whatever is asked."""
        content = next(self._results, "")
        return Result(content, fixture_sha256(call, content))


def prompt_of(record: Record) -> Prompt | None:
    """The prompt whose hash a record's id is; None where it is that of none. Whether its calls fail on purpose is part
    of a prompt and not of a record, so each is tried."""
    first = next((n for n, turn in enumerate(record.messages) if turn.origin == "teacher"), len(record.messages))
    said = [chat.Message(turn.role, turn.content) for turn in record.messages[:first]]
    for fault in ("", "once", "always"):
        prompt = make_prompt(record.stratum, said, record.tools, ground_truth=record.ground_truth,
                             expect=record.expect, fault=fault)  # fmt: skip
        if prompt.id == record.id:
            return prompt
    return None


def playable(record: Record) -> bool:
    """Whether its tools are functions with names, at the least."""
    functions = [tool.get("function", tool) for tool in record.tools]
    return all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions)


def from_record(record: Record, prompt: Prompt, protocol: Protocol) -> Played:
    """With the record's own turns as the answers."""
    answers = iter(_said(record, protocol))
    return _play(record, prompt, protocol, lambda _: next(answers, None))


def from_journal(record: Record, prompt: Prompt, protocol: Protocol, journal: Answers) -> Played:
    """With the journal's answers."""
    paid: list[Paid | None] = []

    def answer(key: bytes) -> Answer | None:
        paid.append(journal.paid(key))
        return journal.answer(key)

    return _play(record, prompt, protocol, answer)._replace(paid=tuple(paid))


def _play(record: Record, prompt: Prompt, protocol: Protocol, answer: Callable[[bytes], Answer | None]) -> Played:
    play = episode(prompt, protocol, _Recorded(record))
    step = advance(play)
    requests: list[str] = []
    while isinstance(step, Request):
        requests.append(step.key.hex())
        found = answer(step.key)
        if found is None:
            return Played(tuple(requests), None)
        step = advance(play, found)
    return Played(tuple(requests), step)


def _said(record: Record, protocol: Protocol) -> Iterator[Answer]:
    """The teacher's turns as a server would have given them."""
    last = len(record.messages) - 1
    for index, turn in enumerate(record.messages):
        if turn.origin != "teacher":
            continue
        reasoning = record.reasoning if index == last else turn.reasoning or None
        calls = tuple(CallText("", c.name, json.dumps(c.arguments, ensure_ascii=False)) for c in turn.tool_calls)
        if protocol.form == "completions":
            reply = Reply(turn_text(turn), reasoning, (), turn.finish_reason, None, "", "", None)
        else:
            reply = Reply(turn.content, reasoning, calls, turn.finish_reason, None, "", "", None)
        yield Answer(b"", reply=reply)


def differences(record: Record, played: Played) -> Iterator[str]:
    """In what a record is not what the journal's answers make."""
    if played.end is None:
        yield f"the journal has no answer to its request {len(played.requests) - 1}"
        return
    if isinstance(played.end, Rejected):
        yield f"the journal's answers make no record, but a reject ({played.end.reason})"
        return
    end = played.end
    made = {
        "messages": end.messages, "provenance": end.provenance, "reasoning": end.replies[-1].reasoning,
        "usage": sum(end.usages, Usage()) if end.usages else None,
    }  # fmt: skip
    names = [name for name, value in made.items() if _json(value) != _json(getattr(record, name))]
    if names:
        yield f"{', '.join(names)} differ from what the journal's answers make"
    for number, (paid, reply) in enumerate(zip(played.paid, end.replies)):
        if paid is None:
            yield f"the ledger has no attempt for answer {number}"
        elif paid.state != "settled" or paid.usage != reply.usage:
            yield f"the ledger settled something else for answer {number} than it used"


def cost_of(played: Played) -> Decimal | None:
    """What the ledger settled for an episode's answers, in dollars."""
    known = [paid.cost for paid in played.paid if paid is not None and paid.cost is not None]
    return dollars(sum(known)) if len(known) == len(played.paid) else None


def _json(value: object) -> bytes:
    return msgspec.json.encode(value)  # 1 and 1.0 are equal values and different texts
