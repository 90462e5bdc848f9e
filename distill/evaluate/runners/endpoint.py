"""An OpenAI-compatible endpoint: asked as the teacher stage asks a teacher, with its transport, verdicts and pacing.

Calls are kept as they came and sent back as they came, under the server's own ids. Trouble of the network or the server
is a ProviderFault once the attempts are used up, never an empty answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import re
import threading
import time
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import msgspec

from distill import chat
from distill.data.teacher.admission import Admission
from distill.data.teacher.outcomes import Outcome, judge
from distill.data.teacher.probe import probe
from distill.data.teacher.server_name import server_of
from distill.data.teacher.spec import key_in_use
from distill.data.teacher.transport import LOOPBACK, HttpTransport
from distill.data.teacher.wire import Exchange
from distill.data.teacher.wire import Reply as WireReply
from distill.errors import GO_ON, InputError, Paused
from distill.evaluate.episode import Request
from distill.evaluate.items import Item
from distill.evaluate.runners.interface import Settings
from distill.evaluate.transcripts import ProviderFault, RawCall, Reply
from distill.tokenizer import TURN_END

T = TypeVar("T")
_LONGEST_BACKOFF = 60.0
_LONGEST_CLOSE = 5.0
_TOO_LONG = re.compile(r"context[ _](?:length|size|window)|maximum context", re.IGNORECASE)
"""How servers say that a prompt is too long: OpenAI, vLLM, SGLang, llama.cpp."""


class _Wants(NamedTuple):
    """How this server is asked."""

    model: str
    temperature: float | None
    max_tokens_field: str = "max_tokens"
    reasoning_field: str | None = None
    """Under which it wants its earlier reasoning back."""


def open_endpoint(url: str, settings: Settings) -> EndpointModel:
    """Connect and, for chat, probe what the server wants. InputError or Paused where that fails."""
    parts = urlsplit(url)
    if not parts.hostname or parts.username or parts.password:
        raise InputError("an endpoint's URL has a host, and no credentials: the key is taken from TEACHER_API_KEY")
    loop = _Loop()
    try:
        return loop.run(_open(url, settings, loop))
    except BaseException:
        loop.close(None)
        raise


async def _open(url: str, settings: Settings, loop: _Loop) -> EndpointModel:
    transport = await _connect(url.rstrip("/"), settings)
    try:
        asker = _Asker(transport, settings)
        wants = _Wants(settings.model_id or _only_model(url, transport.models), settings.temperature)
        if settings.form == "chat":
            found = await probe(asker.exchange, wants.model)
            field = found.reasoning_field if found.reasoning_field != "content" else None
            temperature = None if "temperature 0 is refused" in found.notes else settings.temperature
            wants = _Wants(wants.model, temperature, found.max_tokens_field, field)
        return EndpointModel(loop, asker, settings, wants, await server_of(transport))
    except BaseException:
        await transport.close()
        raise


async def _connect(url: str, settings: Settings) -> HttpTransport:
    """For completions below /v1 first: llama.cpp's server has something else, of its own, at /completions."""
    connect = functools.partial(
        HttpTransport.connect, path="chat/completions" if settings.form == "chat" else "completions",
        timeout_s=settings.timeout_s, deadline_s=settings.deadline_s, connections=settings.together,
    )  # fmt: skip
    if settings.form == "completions" and not url.endswith("/v1"):
        with contextlib.suppress(InputError):
            return await connect(f"{url}/v1")
    return await connect(url)


def _only_model(url: str, listed: Sequence[str]) -> str:
    if len(listed) == 1:
        return listed[0]
    found = f"it lists {', '.join(sorted(listed)[:8])}" if listed else "it lists none"
    raise InputError(f"{url}: name a model with --model-id; {found}")


class _Loop:
    """An event loop in a thread of its own, for a caller that knows nothing of one, or has another."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for it; where the wait is interrupted, so is the work."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self, transport: HttpTransport | None) -> None:
        """Close the connections and end the thread; waits for it unless it is called by the thread itself."""

        async def stop() -> None:
            if transport is not None:
                await transport.close()
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(stop(), self._loop)
        if threading.current_thread() is not self._thread:
            self._thread.join(_LONGEST_CLOSE)


class _Asker:
    """Sends a request until there is an answer, or none to be had. Nobody sleeps while holding a permit."""

    def __init__(self, transport: HttpTransport, settings: Settings) -> None:
        self.transport, self._attempts, self._patience = transport, settings.attempts, settings.patience_s
        start = settings.together if transport.host in LOOPBACK else None
        self._admission = Admission(settings.together, start=start)

    async def exchange(self, body: Mapping[str, Any], stream: bool) -> Exchange:
        """For the probe, to which a refusal says something, too."""
        return (await self._until_final(body, stream))[0]

    async def ask(self, body: Mapping[str, Any]) -> Outcome:
        """An answer, or a refusal that will not change. ProviderFault after the last attempt; InputError where we are
        not let in; Paused where only money or time helps."""
        return (await self._until_final(body, stream=False))[1]

    async def _until_final(self, body: Mapping[str, Any], stream: bool) -> tuple[Exchange, Outcome]:
        failures = 0
        while True:
            exchange, outcome = await self._attempt(body, stream)
            if outcome.kind in ("answer", "dead"):
                return exchange, outcome
            if outcome.kind == "refused":
                hint = f" ({key_in_use()})" if exchange.status in (401, 403) else ""
                raise InputError(f"the endpoint refuses: {outcome.detail}{hint}")
            if outcome.kind == "quota":
                raise Paused(f"the endpoint's quota is used up ({outcome.detail}); {GO_ON}")
            if outcome.kind == "cooldown":  # everybody waits, and no attempt is used
                since = self._admission.throttled_since
                if since is not None and time.monotonic() + self._admission.cooling - since > self._patience:
                    raise _Unanswered(f"the endpoint throttles for too long: {outcome.detail}", exchange.status)
                continue
            failures += 1
            if failures >= self._attempts:
                raise _Unanswered(f"no answer after {failures} attempts: {outcome.detail}", exchange.status)
            backoff = random.uniform(0, min(_LONGEST_BACKOFF, 2.0 ** (failures - 1)))
            await asyncio.sleep(backoff if outcome.wait is None else outcome.wait)

    async def _attempt(self, body: Mapping[str, Any], stream: bool) -> tuple[Exchange, Outcome]:
        permit = await self._admission.acquire()
        try:
            exchange = await self.transport.post(body, stream=stream)
            outcome = judge(exchange, time.time())
            if outcome.kind == "cooldown":
                permit.throttled(outcome.wait)
            elif outcome.kind == "answer":
                permit.succeeded()
            return exchange, outcome
        finally:
            permit.close()


class _Unanswered(ProviderFault):
    """`status` is that of the last attempt."""

    def __init__(self, detail: str, status: int) -> None:
        super().__init__(detail)
        self.status = status


class EndpointModel:
    """A BatchModel behind an endpoint. `together` requests are in flight, fewer while the server throttles."""

    def __init__(self, loop: _Loop, asker: _Asker, settings: Settings, wants: _Wants, server: str | None) -> None:
        self._loop, self._asker, self._settings, self._wants = loop, asker, settings, wants
        self._server, self._chat = server, settings.form == "chat"
        self._ids: dict[str, list[tuple[str, ...]]] = {}
        """Of each item's conversation: the ids that the server gave to the calls of each turn."""
        self.together = settings.together
        weakref.finalize(self, loop.close, asker.transport)

    def reply(self, item: Item, messages: Sequence[chat.Message], replies: Sequence[Reply]) -> Reply:
        """The next turn of one conversation; ProviderFault where it cannot be had."""
        (one,) = self.replies([Request(item, tuple(messages), tuple(replies))])
        if isinstance(one, ProviderFault):
            raise one
        return one

    def replies(self, batch: Sequence[Request]) -> list[Reply | ProviderFault]:
        """The next turn of each conversation. InputError where the server lets us in no more, Paused where only time
        or money helps."""
        return self._loop.run(self._all(batch))

    def identity(self) -> dict[str, Any]:
        """See Model. The weights behind an endpoint are not known."""
        wants, settings = self._wants, self._settings
        return {
            "runner": "endpoint", "weights": None, "tokenizer": None, "host": self._asker.transport.host,
            "server": self._server, "model": wants.model, "template": None if self._chat else chat.template_sha256(),
            "decoding": {
                "strategy": "the server's", "form": settings.form, "temperature": wants.temperature,
                "seed": settings.seed, "max_new_tokens": settings.max_new_tokens, "constrained": False,
                "reasoning_replayed": wants.reasoning_field,
            },
        }  # fmt: skip

    async def _all(self, batch: Sequence[Request]) -> list[Reply | ProviderFault]:
        found = await asyncio.gather(*map(self._one, batch), return_exceptions=True)
        out: list[Reply | ProviderFault] = []
        for one in found:
            if not isinstance(one, Reply | ProviderFault):
                raise one
            out.append(one)
        return out

    async def _one(self, request: Request) -> Reply:
        if not request.replies:
            self._ids.pop(request.item.id, None)
        unreadable = any(not _is_object(call.arguments) for reply in request.replies for call in reply.calls or ())
        try:
            outcome = await self._asker.ask(self._body(request))
        except _Unanswered as fault:
            if unreadable and fault.status == 500:
                return _nothing("stop")
            raise
        if outcome.reply is not None:
            return self._read(request.item, outcome.reply)
        if _TOO_LONG.search(outcome.detail):
            return _nothing("context")
        if unreadable:
            return _nothing("stop")
        raise ProviderFault(f"the endpoint refuses the request: {outcome.detail}")

    def _read(self, item: Item, reply: WireReply) -> Reply:
        self._ids.setdefault(item.id, []).append(tuple(call.id for call in reply.calls))
        calls = tuple(RawCall(call.name, call.arguments) for call in reply.calls) if self._chat else None
        prompt, completion = (reply.usage.prompt, reply.usage.completion) if reply.usage else (0, 0)
        return Reply(reply.content, calls, "length" if reply.finish == "length" else "stop", prompt, completion,
                     reply.reasoning or "")  # fmt: skip

    def _body(self, request: Request) -> dict[str, Any]:
        settings, wants, tools = self._settings, self._wants, request.item.tools
        body: dict[str, Any] = {"model": wants.model, wants.max_tokens_field: settings.max_new_tokens,
                                "seed": settings.seed}  # fmt: skip
        if wants.temperature is not None:
            body["temperature"] = wants.temperature
        if not self._chat:
            body["prompt"] = chat.render(request.messages, tools, add_generation_prompt=True)
            return body | {"stop": [TURN_END]}
        if tools:
            body["tools"] = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        ids = self._ids.get(request.item.id, ())
        return body | {"messages": wire_messages(request, ids, wants.reasoning_field)}


def wire_messages(
    request: Request, ids: Sequence[Sequence[str]], reasoning_field: str | None = None
) -> list[dict[str, Any]]:
    """A conversation as the server wants it back: the model's turns as they came, results under the ids of their calls.

    `ids`: those that the server gave in each of the model's turns; where it gave none, or one twice, ours take their
    place."""
    out: list[dict[str, Any]] = []
    replies, given = iter(request.replies), iter(ids)
    unanswered: list[str] = []
    for index, message in enumerate(request.messages):
        if message.role == "tool":
            name = unanswered.pop(0) if unanswered else f"call_{index}"
            out.append({"role": "tool", "tool_call_id": name, "content": message.content})
            continue
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        calls = [(call.name, _json_text(call.arguments)) for call in message.tool_calls]
        server_ids: Sequence[str] = ()
        if message.role == "assistant" and index >= len(request.item.messages):
            reply, server_ids = next(replies), next(given, ())
            turn["content"], calls = reply.text, [(call.name, call.arguments) for call in reply.calls or ()]
            if reasoning_field and reply.reasoning:
                turn[reasoning_field] = reply.reasoning
        if calls:
            usable = len(server_ids) == len(calls) == len(set(server_ids)) and all(server_ids)
            unanswered = list(server_ids) if usable else [f"call_{index}_{n}" for n in range(len(calls))]
            turn["tool_calls"] = [
                {"id": name, "type": "function", "function": {"name": function, "arguments": arguments}}
                for name, (function, arguments) in zip(unanswered, calls)
            ]
        out.append(turn)
    return out


def _nothing(stop: Any) -> Reply:
    """A turn that could not be had because of what the model itself did: its conversation is too long, or holds a call
    of its own that the server, which reads what it is sent back, cannot read."""
    return Reply("", (), stop)


def _json_text(arguments: Mapping[str, Any]) -> str:
    """Arguments as they travel."""
    return msgspec.json.encode(arguments).decode()


def _is_object(arguments: str) -> bool:
    try:
        msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
