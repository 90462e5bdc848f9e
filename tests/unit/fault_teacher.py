"""An OpenAI-compatible teacher on loopback that answers by a fixed function and misbehaves down to the byte.

    with FaultTeacher(faults=["429-date", "reset-body", 503], chaos=Chaos(seed=1, share=0.2)) as teacher:
        ...                                  # teacher.url, teacher.ledger, teacher.faults, teacher.down(0.3)
    python -m tests.unit.fault_teacher --port 8123 --chaos 0.2 --seed 1     # GET /ledger says what it served

`faults` are given to the first requests, `chaos` to any; what each name does is in tests/unit/faults.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import struct
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from tests.unit import faults as wrong
from tests.unit import teacher_answers

Answerer = Callable[[dict[str, Any]], Any]


class Served(NamedTuple):
    """A request that the teacher worked on, and would charge for."""

    key: str
    """Hash of the conversation, tools, seed and model."""
    prompt: int
    completion: int
    at: float
    whole: bool = False
    """Whether the answer left the server in full."""


class Ledger:
    """What was really served. Numbers only grow; read it at any time."""

    def __init__(self, in_price: Decimal, out_price: Decimal) -> None:
        self.prices = in_price, out_price
        self.served: list[Served] = []
        self.arrivals: list[tuple[float, int]] = []
        """Time (monotonic) and prompt tokens of each request, refused ones included."""
        self.in_flight = self.most_in_flight = 0
        self.early = 0
        """Requests sent while an earlier 429 asked for patience (those already under way are forgiven)."""
        self.elsewhere = 0
        """Requests that followed a redirect."""
        self.given: Counter[str] = Counter()
        """Faults given, by name."""

    @property
    def tokens(self) -> int:
        return sum(one.prompt + one.completion for one in list(self.served))

    @property
    def cost(self) -> Decimal:
        """By the prices of a million tokens."""
        rows = list(self.served)
        price_in, price_out = self.prices
        return (sum(r.prompt for r in rows) * price_in + sum(r.completion for r in rows) * price_out) / 10**6

    @property
    def whole(self) -> Counter[str]:
        """Answers sent in full, by conversation."""
        return Counter(one.key for one in list(self.served) if one.whole)

    def most_within(self, seconds: float = 60.0) -> tuple[int, int]:
        """Most requests, and most prompt tokens, that arrived within any such time."""
        times, best = sorted(self.arrivals), (0, 0)
        first = 0
        for last, (at, _) in enumerate(times):
            while at - times[first][0] >= seconds:
                first += 1
            best = max(best[0], last + 1 - first), max(best[1], sum(tokens for _, tokens in times[first : last + 1]))
        return best

    def as_dict(self) -> dict[str, Any]:
        return {"requests": len(self.arrivals), "served": len(self.served), "tokens": self.tokens,
                "cost": str(self.cost), "whole": dict(self.whole), "most_in_flight": self.most_in_flight,
                "most_within_60s": self.most_within(), "early": self.early, "elsewhere": self.elsewhere,
                "faults": dict(self.given)}  # fmt: skip


class Chaos(NamedTuple):
    """A share of all requests that go wrong, drawn by their number."""

    seed: int = 0
    share: float = 0.2
    kinds: tuple[wrong.Item, ...] = wrong.PASSING

    def fault(self, number: int) -> wrong.Item:
        draw = random.Random(f"{self.seed}:{number}")
        return draw.choice(self.kinds) if draw.random() < self.share else None


class FaultTeacher:
    """`with FaultTeacher() as teacher:` serves at teacher.url, in a thread of its own."""

    def __init__(self, *, delay: float = 0.0, faults: Iterable[wrong.Item] = (), chaos: Chaos | None = None,
                 prefix: str = "/v1", models: tuple[str, ...] = ("stub-1",), answer: Answerer | None = None,
                 quirks: bool = True, refuse_every: int = 0, refusal: str = "400", silence: float = 30.0,
                 prices: tuple[str, str] = ("1", "4"), port: int = 0) -> None:  # fmt: skip
        self.delay, self.faults, self.chaos, self.silence = delay, list(faults), chaos, silence
        self.prefix, self.models, self.answer, self.quirks = prefix, models, answer, quirks
        self.refuse_every, self.refusal = refuse_every, refusal
        self.ledger = Ledger(Decimal(prices[0]), Decimal(prices[1]))
        self.asked: Counter[str] = Counter()
        self.most_each: int | None = None
        self.failed: Counter[str] = Counter()
        """Faults given, by conversation."""
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.not_before = self.not_before_from = 0.0
        self.lookups: list[wrong.Item] = []
        """Faults of the next GETs: a status, or `reset`."""
        with socket.create_server(("127.0.0.1", port)) as probe:
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._connections: set[asyncio.StreamWriter] = set()
        self.restarts: list[asyncio.Task[None]] = []

    def begin(
        self, *, faults: Iterable[wrong.Item] = (), chaos: Chaos | None = None, delay: float = 0.0,
        most_each: int | None = None,
    ) -> Ledger:  # fmt: skip
        """From here on: a new ledger, these faults, no more than `most_each` of them to one conversation."""
        self.ledger = Ledger(*self.ledger.prices)
        self.most_each, self.failed = most_each, Counter[str]()
        self.faults, self.chaos, self.delay = list(faults), chaos, delay
        self.asked.clear()
        return self.ledger

    def quiet(self) -> Ledger:
        """The ledger, once nobody is served any more."""
        while self.ledger.in_flight:
            time.sleep(0.001)
        return self.ledger

    def refuses(self, body: dict[str, Any]) -> bool:
        """Whether this conversation is always refused."""
        return (
            bool(self.refuse_every)
            and body.get("seed") is not None
            and int(teacher_answers.identity(body)[:8], 16) % self.refuse_every == 0
        )

    # -- the server's life

    def __enter__(self) -> FaultTeacher:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def down(self, seconds: float) -> None:
        """Be away, every connection reset, and come back on the same port."""
        asyncio.run_coroutine_threadsafe(self.restart(seconds), self._loop).result(seconds + 10)

    async def restart(self, seconds: float) -> None:
        await self._hang_up()
        await asyncio.sleep(seconds)
        await self._listen()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024, limit=1 << 26)

    async def _hang_up(self) -> None:
        self._server.close()
        for writer in list(self._connections):
            reset(writer)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            if getattr(task.get_coro(), "__name__", "") == "_serve":
                task.cancel()
        await asyncio.sleep(0)

    # -- a connection

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._one(reader, writer):
                    pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read a request and answer it; whether the connection can be used again."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ", 2)
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        low = {name.lower(): value for name, value in headers.items()}
        body = await reader.readexactly(int(low.get("content-length", 0)))
        if method == "GET":
            known = {f"{self.prefix}/models": {"object": "list", "data": [{"id": name} for name in self.models]},
                     "/ledger": self.ledger.as_dict(), "/version": {"version": "1.2.3"}}  # fmt: skip
            item = self.lookups.pop(0) if self.lookups else None
            if item == "reset":
                reset(writer)
                return False
            status = item if isinstance(item, int) else 200 if path in known else 404
            writer.write(wrong.response(status, known.get(path, {"error": {"message": "no such path"}})))
            await writer.drain()
            return True
        if not path.startswith(self.prefix + "/"):
            self.ledger.elsewhere += 1
            writer.write(wrong.response(404, {"error": {"message": "no such path"}}))
            return True
        self.headers.append(headers)
        ledger = self.ledger
        try:
            ledger.in_flight += 1
            ledger.most_in_flight = max(ledger.most_in_flight, ledger.in_flight)
            return await self._post(Exchange(self, writer, json.loads(body), low))
        finally:
            ledger.in_flight -= 1

    async def _post(self, exchange: Exchange) -> bool:
        ledger = self.ledger
        number, now = len(ledger.arrivals), time.monotonic()
        ledger.arrivals.append((now, exchange.prompt_tokens))
        ledger.early += now < self.not_before - 0.02 and now > self.not_before_from + 0.05
        item = self.faults.pop(0) if self.faults else self.chaos.fault(number) if self.chaos else None
        key = teacher_answers.identity(exchange.body)
        if self.most_each is not None and self.failed[key] >= self.most_each:
            item = None
        if item is not None:
            self.failed[key] += 1
            ledger.given[wrong.name(item)] += 1
        return await wrong.misbehave(exchange, item)

    def patience(self, seconds: float) -> None:
        """From now on nobody should ask for so long."""
        now = time.monotonic()
        if now >= self.not_before:
            self.not_before_from = now
        self.not_before = max(self.not_before, now + seconds)


class Exchange:
    """A request, and the means of answering it."""

    def __init__(self, teacher: FaultTeacher, writer: asyncio.StreamWriter, body: dict[str, Any],
                 headers: Mapping[str, str]) -> None:  # fmt: skip
        self.teacher, self.writer, self.body, self.headers = teacher, writer, body, headers
        self.ledger = teacher.ledger
        self.chat = "messages" in body
        self.prompt_tokens = tokens(len(json.dumps([body.get("messages", body.get("prompt")), body.get("tools", [])])))
        self._row = -1

    async def generate(self) -> None:
        """Work on the answer: from here on the request is charged for."""
        teacher, body = self.teacher, self.body
        key = teacher_answers.identity(body)
        if teacher.answer is None:
            self.spoken = cut(teacher_answers.speak(body, quirks=teacher.quirks), body)
            completion = tokens(self.spoken.size)
        else:
            completion = 5
        self.usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion}
        self._row = len(self.ledger.served)
        self.ledger.served.append(Served(key, *self.usage.values(), time.monotonic()))
        teacher.bodies.append(body)
        turns = body.get("messages") or [{"content": body["prompt"]}]
        teacher.asked[str(turns[-1].get("content"))] += 1
        if teacher.delay:
            await asyncio.sleep(teacher.delay * (0.5 + int(key[:4], 16) / 0xFFFF))

    def answer(self, **changes: Any) -> bytes:
        """The whole response, headers included, in the form that was asked for; ids differ every time."""
        if self.teacher.answer is not None:
            return wrong.response(200, self.teacher.answer(self.body))
        value = completion(self.spoken, self.body, self.usage, self.chat) | changes
        if self.body.get("stream"):
            return wrong.event_stream(value, bool((self.body.get("stream_options") or {}).get("include_usage")))
        return wrong.response(200, value)

    def charge(self, more: int) -> None:
        """Count so many more tokens for it."""
        self.usage["completion_tokens"] += more
        served = self.ledger.served
        served[self._row] = served[self._row]._replace(completion=self.usage["completion_tokens"])

    async def send(self, data: bytes, *, whole: bool = True) -> None:
        """Write it; `whole` says that the client now has all it needs."""
        self.writer.write(data)
        await self.writer.drain()
        if whole:
            self.delivered()

    def delivered(self) -> None:
        served = self.ledger.served
        served[self._row] = served[self._row]._replace(whole=True)

    def reset(self) -> None:
        reset(self.writer)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, so that the other side gets an error instead of an end."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def tokens(size: int) -> int:
    """Tokens that so many bytes count as."""
    return (size + 3) // 4


def cut(spoken: teacher_answers.Spoken, body: dict[str, Any]) -> teacher_answers.Spoken:
    """The answer as max_tokens cuts it off."""
    most = body.get("max_completion_tokens") or body.get("max_tokens") or 1 << 30
    if tokens(spoken.size) <= most:
        return spoken
    kept = spoken.content.encode()[: 4 * most].decode(errors="ignore")
    return teacher_answers.Spoken(kept, finish="length")


def completion(spoken: teacher_answers.Spoken, body: dict[str, Any], usage: Mapping[str, int],
               chat: bool) -> dict[str, Any]:  # fmt: skip
    """A chat.completion or text_completion."""
    thought = tokens(len(spoken.reasoning.encode()))
    more = {"total_tokens": sum(usage.values()), "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": min(thought, usage["completion_tokens"])}}  # fmt: skip
    choice: dict[str, Any] = {"index": 0, "finish_reason": spoken.finish, "logprobs": None}
    if chat:
        message: dict[str, Any] = {"role": "assistant", "content": spoken.content or None}
        if spoken.reasoning:
            message["reasoning_content"] = spoken.reasoning
        if spoken.calls:
            message["tool_calls"] = [
                {"id": f"call_{uuid.uuid4().hex[:12]}", "type": "function", "index": i,
                 "function": {"name": name, "arguments": arguments}}
                for i, (name, arguments) in enumerate(spoken.calls)
            ]  # fmt: skip
        choice["message"] = message
    else:
        choice["text"] = spoken.content
    return {"id": f"chatcmpl-{uuid.uuid4()}", "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()), "model": body.get("model", ""), "system_fingerprint": "fp_fixed",
            "choices": [choice], "usage": dict(usage) | more}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="a teacher that answers by a fixed function and misbehaves on request")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--script", default="", help="faults of the first requests, separated by commas")
    parser.add_argument("--chaos", type=float, default=0.0, help="share of all requests that go wrong")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0)
    args = parser.parse_args()
    script = [int(part) if part.isdigit() else part for part in args.script.split(",") if part]
    chaos = Chaos(args.seed, args.chaos) if args.chaos else None
    with FaultTeacher(port=args.port, faults=script, chaos=chaos, delay=args.delay) as teacher:
        print(teacher.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
