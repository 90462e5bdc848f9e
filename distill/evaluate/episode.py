"""An episode: the model's turns and what the broker answers to its calls, until a turn without calls, or a limit.

A run drives `play` with a model, `replay` with a transcript: the same code, so the same episode.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any, Literal, NamedTuple

import msgspec

from distill import chat
from distill.chat import Message, ToolCall
from distill.errors import DatasetError, InputError
from distill.evaluate.fixtures import EpisodeBroker, Outcome
from distill.evaluate.items import Item
from distill.evaluate.transcripts import RawCall, Reply, Transcript
from distill.tokenizer import CALL_END, CALL_START
from distill.tools import arguments_problem

End = Literal["answer", "length", "context", "max_turns", "max_calls", "max_tokens", "control_token", "fault"]
"""`answer`: a turn without calls; `length`: such a turn, cut off; the others end without a final answer."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an episode may take."""

    max_turns: int = 12
    """The model's turns."""
    max_calls: int = 32
    max_tokens: int = 4096
    """Generated over all turns."""
    max_new_tokens: int = 512
    """Of one turn."""

    def __post_init__(self) -> None:
        if min(self.max_turns, self.max_calls, self.max_tokens, self.max_new_tokens) < 1:
            raise ValueError("limits are at least 1")


class Made(NamedTuple):
    """A call as it was made."""

    raw: str
    """Its arguments as text, or all of a call that cannot be read."""
    call: ToolCall | None
    """None: not a JSON object of arguments, or not the template's form."""
    problem: str
    """Why it is no valid call: unreadable, an unknown tool, or against its schema; else empty."""
    outcome: Outcome | None
    """None where the episode had ended before it was answered."""


class Turn(NamedTuple):
    """One of the model's turns."""

    content: str
    """What it said beside calls and reasoning."""
    calls: tuple[Made, ...]


class Episode(NamedTuple):
    """What happened."""

    item: Item
    turns: tuple[Turn, ...]
    end: End
    final: str
    """The answer to the user; empty where there is none."""
    clock_ms: int
    tokens: int
    prompt_tokens: int

    @property
    def calls(self) -> list[Made]:
        """All that were made, in order."""
        return [made for turn in self.turns for made in turn.calls]


class Request(NamedTuple):
    """What the model is asked: to go on with an item's conversation."""

    item: Item
    messages: tuple[Message, ...]
    replies: tuple[Reply, ...]


Play = Generator[Request, Reply, Episode]


def play(item: Item, broker: EpisodeBroker, limits: Limits) -> Play:
    """An episode as a generator: it yields what it needs of the model, is sent the reply, and returns what happened."""
    messages = list(item.messages)
    functions = {tool["name"]: tool for tool in item.tools}
    replies: list[Reply] = []
    turns: list[Turn] = []
    made = 0
    end: End = "max_turns"
    final = ""
    while len(turns) < limits.max_turns:
        reply = yield Request(item, tuple(messages), tuple(replies))
        replies.append(reply)
        content, calls = read_calls(reply, functions)
        said = Message("assistant", spoken(reply))
        made += len(calls)
        stopped = _stopped(reply, said, made, limits)
        if stopped or not calls:
            turns.append(Turn(content, tuple(calls)))
            end = stopped or ("length" if reply.stop == "length" else "answer")
            final = "" if stopped else content
            break
        answered = [_answered(one, broker) for one in calls]
        turns.append(Turn(content, tuple(answered)))
        messages += [said, *(Message("tool", one.outcome.content) for one in answered if one.outcome is not None)]
        if sum(one.tokens for one in replies) >= limits.max_tokens:
            end = "max_tokens"
            break
    tokens, prompt_tokens = sum(one.tokens for one in replies), sum(one.prompt_tokens for one in replies)
    return Episode(item, tuple(turns), end, final, broker.clock_ms, tokens, prompt_tokens)


def replay(item: Item, transcript: Transcript, broker: EpisodeBroker, limits: Limits) -> Episode:
    """The episode of a transcript; DatasetError where it holds fewer or more replies than the episode takes."""
    if transcript.fault is not None:
        return Episode(item, (), "fault", "", 0, 0, 0)
    playing = play(item, broker, limits)
    left = iter(transcript.replies)
    try:
        next(playing)
        while True:
            reply = next(left, None)
            if reply is None:
                raise DatasetError(f"the transcript of item {item.id} breaks off: other fixtures or limits made it")
            playing.send(reply)
    except StopIteration as end:
        if next(left, None) is not None:
            raise DatasetError(
                f"the transcript of item {item.id} goes on after its end: it was made otherwise"
            ) from end
        return end.value


def _stopped(reply: Reply, said: Message, made: int, limits: Limits) -> End | None:
    """Why a reply ends the episode without an answer, if it does."""
    if reply.stop == "context":
        return "context"
    try:
        chat.segments([said])
    except InputError:
        return "control_token"
    return "max_calls" if made > limits.max_calls else None


def read_calls(reply: Reply, functions: dict[str, dict[str, Any]]) -> tuple[str, list[Made]]:
    """A reply's text beside its calls, and the calls, each judged on its own. Nothing is repaired."""
    if reply.calls is None:
        parsed = chat.parse(reply.text)
        made = [_judged(json.dumps(call.arguments, ensure_ascii=False), call, functions) for call in parsed.calls]
        made += [Made(text, None, "unreadable: not a call in the template's form", None) for text in parsed.malformed]
        return parsed.content, made
    made = []
    for raw in reply.calls:
        try:
            arguments = msgspec.json.decode(raw.arguments, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            made.append(Made(raw.arguments, None, "unreadable: its arguments are not a JSON object", None))
            continue
        made.append(_judged(raw.arguments, ToolCall(raw.name, arguments), functions))
    # calls written out in the text of a server that sends calls apart were not made, and are attempts all the same
    made += [Made(text, None, "unreadable: a call written out as text", None) for text in _written(reply.text)]
    return chat.parse(reply.text).content, made


def spoken(reply: Reply) -> str:
    """A reply as a turn of the conversation, in the template's form."""
    if reply.calls is None:
        return chat.turn_of(reply.text)
    return reply.text + "".join(_raw_text(raw) for raw in reply.calls)


def _raw_text(raw: RawCall) -> str:
    return f'{CALL_START}{{"name": {json.dumps(raw.name)}, "arguments": {raw.arguments}}}{CALL_END}'


def _written(text: str) -> list[str]:
    parsed = chat.parse(text)
    return [*(chat.call_text(call) for call in parsed.calls), *parsed.malformed]


def _judged(raw: str, call: ToolCall, functions: dict[str, dict[str, Any]]) -> Made:
    function = functions.get(call.name)
    if function is None:
        return Made(raw, call, f"unknown tool {call.name[:80]!r}", None)
    return Made(raw, call, arguments_problem(call, function) or "", None)


def _answered(made: Made, broker: EpisodeBroker) -> Made:
    if made.call is None:
        error = {"error": {"type": "malformed_call", "message": "the call could not be read"}}
        return made._replace(outcome=Outcome("invalid", json.dumps(error), None, "malformed_call"))
    return made._replace(outcome=broker.call(made.call))
