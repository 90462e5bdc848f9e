"""An episode: a prompt, the teacher's turns, and what the broker answers to its calls, until the teacher's last word.

`episode` is a generator: it yields the requests that it needs and is sent their answers. The run drives it with a
teacher, the dataset is built by driving it with the journal: the same code, so the same episode.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from distill import chat
from distill.artifacts import sha256_text
from distill.broker import FIXTURE_MISS, Broker
from distill.data.journal import Answer
from distill.data.prompts.stream import Prompt
from distill.data.rules import secrets
from distill.data.schema import Call, Provenance, Teacher, Turn, Usage
from distill.data.sender import Request
from distill.data.teacher import wire
from distill.data.teacher.spec import Sampling
from distill.errors import InputError
from distill.tokenizer import TURN_END
from distill.tools import arguments_problem

MAX_CALLS = 16
"""Calls in one turn."""
REJECTS = (
    "length", "filtered", "finish", "empty", "tool_leak", "lost_bytes", "args", "unknown_tool", "schema",
    "too_many_calls", "no_call", "unexpected_call", "too_many_turns", "secret", "fixture_miss", "http", "malformed",
    "unanswered",
)  # fmt: skip
"""Why an episode cannot be a record."""


_SORTED = msgspec.json.Encoder(order="sorted")


class Protocol(NamedTuple):
    """How a teacher is asked: everything about a request but the conversation."""

    identity: Teacher
    form: Literal["chat", "completions"]
    """OpenAI's chat with its own template, or our rendering of the conversation sent to /completions."""
    sampling: Sampling
    seed: int
    max_turns: int = 6
    """Teacher's turns in an episode."""
    top_logprobs: int = 0
    logprobs_with_tools: bool = True
    replay_reasoning: str | None = None
    """Field under which a thinking teacher wants its earlier reasoning back within an episode."""
    max_tokens_field: str = "max_tokens"
    learn_reasoning: bool = False


class Accepted(NamedTuple):
    """A finished conversation, and what it was made from."""

    messages: tuple[Turn, ...]
    replies: tuple[wire.Reply, ...]
    provenance: Provenance
    usages: tuple[Usage, ...]


class Rejected(NamedTuple):
    """Why there is no record; `usages` are those of what was paid for."""

    reason: str
    detail: str
    usages: tuple[Usage, ...] = ()


Episode = Generator[Request, Answer, Accepted | Rejected]


class _Live:
    """A conversation as it grows: as the dataset keeps it, and as the server wants it back."""

    def __init__(self, prompt: Prompt) -> None:
        self.turns = [Turn(message.role, message.content) for message in prompt.messages]
        self.wire = [{"role": turn.role, "content": turn.content} for turn in self.turns]
        self.replies: list[wire.Reply] = []
        self.requests: list[str] = []
        self.fixtures: list[str] = []

    @property
    def usages(self) -> tuple[Usage, ...]:
        return tuple(reply.usage for reply in self.replies if reply.usage)


def episode(prompt: Prompt, protocol: Protocol, broker: Broker) -> Episode:
    """Play one episode. A pure function of its arguments and of the answers that it is sent."""
    live = _Live(prompt)
    draw = int(sha256_text(f"kd-seed/1\n{protocol.seed}\n{prompt.id}")[:8], 16) & 0x7FFFFFFF
    offered = {tool.get("function", tool)["name"]: tool.get("function", tool) for tool in prompt.tools}
    for _ in range(protocol.max_turns):
        request = _request(prompt, live, protocol, draw)
        live.requests.append(request.key.hex())
        answer = yield request
        if answer.dead is not None:
            # the words of the last of many failures differ from run to run
            detail = answer.dead.detail if answer.dead.reason == "http" else "given up after many attempts"
            return Rejected(answer.dead.reason, detail, live.usages)
        try:
            reply = _read(answer, protocol)
        except wire.ReplyError as error:
            return Rejected("malformed", str(error), live.usages)
        live.replies.append(reply)
        turn, problem = _turn(reply, prompt, offered, live, protocol)
        if problem or turn is None:
            return Rejected(*(problem or ("empty", "")), live.usages)
        live.turns.append(turn)
        if not turn.tool_calls:
            return _finish(prompt, live)
        if missed := _answer_calls(turn, reply, prompt, live, broker, draw, protocol):
            return Rejected(FIXTURE_MISS, f"no fixture answers the call of {missed}", live.usages)
    return Rejected("too_many_turns", f"more than {protocol.max_turns} turns", live.usages)


def advance(play: Episode, answer: Answer | None = None) -> Request | Accepted | Rejected:
    """The next request of an episode, given the answer to the last one (None at its start), or its end."""
    try:
        return next(play) if answer is None else play.send(answer)
    except StopIteration as end:
        return end.value


def replay(play: Episode, known: Callable[[bytes], Answer | None]) -> Request | Accepted | Rejected:
    """Play an episode as far as known answers reach: its end, or the first request without an answer."""
    step = advance(play)
    while isinstance(step, Request):
        answer = known(step.key)
        if answer is None:
            return step
        step = advance(play, answer)
    return step


def _request(prompt: Prompt, live: _Live, protocol: Protocol, draw: int) -> Request:
    """The next request; its key leaves out what a server makes up anew each time, the ids of its calls."""
    sampling = protocol.sampling
    body: dict[str, Any] = {
        "model": protocol.identity.model, "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": draw,
        protocol.max_tokens_field: sampling.max_tokens,
    }  # fmt: skip
    if protocol.form == "completions":
        body["prompt"] = chat.render(live.turns, prompt.tools, add_generation_prompt=True)
        body["stop"] = [TURN_END]
        if protocol.top_logprobs:
            body["logprobs"] = protocol.top_logprobs
        keyed = body
    else:
        if prompt.tools:
            body["tools"] = [
                tool if "function" in tool else {"type": "function", "function": tool} for tool in prompt.tools
            ]
        if protocol.top_logprobs and (protocol.logprobs_with_tools or not prompt.tools):
            body |= {"logprobs": True, "top_logprobs": protocol.top_logprobs}
        keyed = body | {"messages": live.turns}
        body = body | {"messages": live.wire}
    identity = [protocol.identity.kind, protocol.identity.host, protocol.identity.weights_sha256]
    return Request(hashlib.sha256(b"kd-request/2\n" + _SORTED.encode([identity, keyed])).digest(), body)


def _read(answer: Answer, protocol: Protocol) -> wire.Reply:
    """A reply; of our own rendering, the calls are taken out of the text."""
    reply = answer.reply or wire.read_reply(answer.body)
    if protocol.form == "chat":
        return reply
    parsed = chat.parse(reply.content)
    if not parsed.calls and not parsed.malformed:
        return reply
    calls = [wire.CallText("", call.name, json.dumps(call.arguments, ensure_ascii=False)) for call in parsed.calls]
    calls += [wire.CallText("", "", text) for text in parsed.malformed]
    return msgspec.structs.replace(reply, content=parsed.content, calls=tuple(calls))


def _turn(reply: wire.Reply, prompt: Prompt, offered: Mapping[str, Any], live: _Live,
          protocol: Protocol) -> tuple[Turn | None, tuple[str, str] | None]:  # fmt: skip
    """The teacher's turn, or why it is none."""
    problem = _finish_problem(reply) or _text_problem(reply)
    if problem:
        return None, problem
    calls, problem = _calls(reply, offered, sum(len(turn.tool_calls) for turn in live.turns))
    if problem:
        return None, problem
    if not calls and reply.finish != "stop":
        return None, ("finish", f"finish_reason {reply.finish} without a call")
    if not calls and not reply.content.strip():
        return None, ("empty", "no text and no call")
    if calls and prompt.expect == "no_call":
        return None, ("unexpected_call", f"called {calls[0].name}")
    if not calls and prompt.expect == "call" and not live.fixtures:
        return None, ("no_call", "answered without calling a tool")
    learned = (reply.reasoning or "") if protocol.learn_reasoning else ""
    turn = Turn("assistant", reply.content, calls, learned, origin="teacher", finish_reason=reply.finish)
    try:
        chat.segments([chat.Message("user", "?"), turn])
    except InputError as error:
        return None, ("tool_leak", str(error))
    return turn, None


def _finish_problem(reply: wire.Reply) -> tuple[str, str] | None:
    if reply.finish in ("stop", "tool_calls", "function_call"):
        return None
    known = {"length": "length", "content_filter": "filtered"}
    return known.get(reply.finish or "", "finish"), f"finish_reason {reply.finish}"


def _text_problem(reply: wire.Reply) -> tuple[str, str] | None:
    if family := wire.leak_of(reply):
        return "tool_leak", family
    if wire.lost_bytes(reply.content) or wire.lost_bytes(reply.reasoning or ""):
        return "lost_bytes", "the text holds characters that stand for lost bytes"
    texts = [reply.content, reply.reasoning or "", *(call.arguments for call in reply.calls)]
    kind = secrets.secret_in("\n".join(texts) if len(texts) > 2 or texts[1] else texts[0])
    return ("secret", kind) if kind else None


def _calls(reply: wire.Reply, offered: Mapping[str, Any],
           before: int) -> tuple[tuple[Call, ...], tuple[str, str] | None]:  # fmt: skip
    """Calls as values, each checked against its tool's schema. Nothing is repaired."""
    if len(reply.calls) > MAX_CALLS:
        return (), ("too_many_calls", f"{len(reply.calls)} calls in one turn")
    if "object_arguments" in reply.flags:
        return (), ("args", "the arguments are an object, not a string that holds JSON")
    out: list[Call] = []
    for raw in reply.calls:
        try:
            arguments = msgspec.json.decode(raw.arguments, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError) as error:
            return (), ("args", f"{raw.name or 'a call'}: {error}")
        if raw.name not in offered:
            return (), ("unknown_tool", f"{raw.name[:80]} is not offered")
        plain = msgspec.json.encode(arguments).decode()
        if family := wire.markup_in(plain):
            return (), ("tool_leak", f"{raw.name}: {family} in its arguments")
        if wire.lost_bytes(plain) or r"\u0000" in plain:
            return (), ("lost_bytes", f"{raw.name}: its arguments hold characters that stand for lost bytes")
        call = Call(raw.name, arguments, id=f"call_{before + len(out)}")
        if problem := arguments_problem(call, offered[raw.name]):
            return (), ("schema", f"{raw.name}: {problem}")
        out.append(call)
    return tuple(out), None


def _answer_calls(turn: Turn, reply: wire.Reply, prompt: Prompt, live: _Live, broker: Broker, draw: int,
                  protocol: Protocol) -> str:  # fmt: skip
    """Append the broker's results, in the order of the calls, under our ids and under the server's. Returns the tool
    whose fixtures have no answer, or an empty string."""
    ids = [raw.id for raw in reply.calls]
    if not all(ids) or len(set(ids)) < len(ids):
        ids = [call.id for call in turn.tool_calls]
    sent: dict[str, Any] = {"role": "assistant", "content": turn.content, "tool_calls": [
        {"id": name, "type": "function", "function": {"name": raw.name, "arguments": raw.arguments}}
        for name, raw in zip(ids, reply.calls)
    ]}  # fmt: skip
    if protocol.replay_reasoning and reply.reasoning:
        sent[protocol.replay_reasoning] = reply.reasoning
    live.wire.append(sent)
    for name, call in zip(ids, turn.tool_calls):
        result = broker.call(call, seed=draw, nth=len(live.fixtures), fault=prompt.fault)
        if result.error == FIXTURE_MISS:
            return call.name
        live.fixtures.append(result.sha256)
        live.turns.append(Turn("tool", result.content, origin="broker", tool_call_id=call.id))
        live.wire.append({"role": "tool", "tool_call_id": name, "content": result.content})
    return ""


def _finish(prompt: Prompt, live: _Live) -> Accepted:
    hashes = tuple(reply_sha256(reply) for reply in live.replies)
    provenance = Provenance(tuple(live.requests), hashes, tuple(live.fixtures))
    return Accepted(tuple(live.turns), tuple(live.replies), provenance, live.usages)


def reply_sha256(reply: wire.Reply) -> str:
    """Of what the teacher said, without the ids and times that a server makes up."""
    said = [reply.content, reply.reasoning, [[call.name, call.arguments] for call in reply.calls], reply.finish]
    return hashlib.sha256(b"kd-reply/1\n" + _SORTED.encode(said)).hexdigest()
