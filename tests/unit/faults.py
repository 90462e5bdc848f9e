"""Every way in which tests/unit/fault_teacher.py misbehaves, by name.

A fault is a name of FAULTS, a status, or (status, headers[, body]). Those of PASSING go away when the request is
asked again; those that answer in spite of all are in SOUND.
"""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.unit.fault_teacher import Exchange

Item = str | int | tuple[Any, ...] | None
Fault = Callable[["Exchange"], Awaitable[bool]]
SKEW = 5 * 3600.0
"""How far off the server's clock is, in the faults that say so."""


def response(status: int, value: Any, headers: Mapping[str, str] | None = None, *, date: float | None = None) -> bytes:
    """A response with its length."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    given = {
        "Date": email.utils.formatdate(time.time() if date is None else date, usegmt=True),
        "Content-Type": "application/json",
        "Content-Length": str(len(data)),
    } | dict(headers or {})
    head = "".join(f"{name}: {text}\r\n" for name, text in given.items())
    return f"HTTP/1.1 {status} Told\r\n{head}\r\n".encode("latin-1") + data


def event_stream(value: dict[str, Any], usage: bool) -> bytes:
    """The same completion as server-sent events, chunked."""
    return stream_head() + b"".join(map(chunk, events(value, usage))) + b"0\r\n\r\n"


def stream_head() -> bytes:
    return b"HTTP/1.1 200 Told\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def events(value: dict[str, Any], usage: bool) -> list[bytes]:
    """The events of a completion, the last of them [DONE]."""
    frame = {name: part for name, part in value.items() if name not in ("choices", "usage")}
    frame["object"] = str(value.get("object")).replace("chat.completion", "chat.completion.chunk")
    out = []

    def event(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> None:
        choice = {"index": index, "delta": delta, "finish_reason": finish}
        out.append(b"data: " + json.dumps(frame | {"choices": [choice]}).encode() + b"\n\n")

    for choice in value["choices"]:
        message = choice.get("message") or {"content": choice.get("text")}
        event({"role": "assistant", "content": ""}, index=choice["index"])
        for name, size in (("reasoning_content", 7), ("content", 5)):
            text = message.get(name) or ""
            for start in range(0, len(text), size):
                event({name: text[start : start + size]}, index=choice["index"])
        for i, call in enumerate(message.get("tool_calls") or ()):
            arguments = call["function"]["arguments"]
            event({"tool_calls": [call | {"index": i, "function": call["function"] | {"arguments": ""}}]})
            for start in range(0, len(arguments), 9):
                event({"tool_calls": [{"index": i, "function": {"arguments": arguments[start : start + 9]}}]})
        event({}, choice["finish_reason"], choice["index"])
    if usage:
        out.append(b"data: " + json.dumps(frame | {"choices": [], "usage": value["usage"]}).encode() + b"\n\n")
    return [*out, b"data: [DONE]\n\n"]


# -- refusals: nothing was generated


def refusal(status: int, headers: Mapping[str, str] | None = None, body: Any = None, *, wait: float = 0.0,
            date: float | None = None) -> Fault:  # fmt: skip
    async def refuse(x: Exchange) -> bool:
        value = {"error": {"message": f"told to answer {status}; you sent {x.headers.get('authorization')}",
                           "type": "told"}} if body is None else body  # fmt: skip
        await x.send(response(status, value, headers, date=date), whole=False)
        if wait:
            x.teacher.patience(wait)
        return True

    return refuse


def dated(skew: float) -> Fault:
    """Retry-After as a date two seconds from now, by a clock that is `skew` seconds off."""

    async def refuse(x: Exchange) -> bool:
        now = time.time() + skew
        headers = {"Retry-After": email.utils.formatdate(now + 2, usegmt=True)}
        x.teacher.patience(1.0)
        return await refusal(429, headers, date=now)(x)

    return refuse


async def redirect(x: Exchange) -> bool:
    return await refusal(307, {"Location": f"{x.teacher.url.replace('127.0.0.1', 'localhost')}/elsewhere"})(x)


# -- answers that do not arrive


def broken(send: Callable[[Exchange, bytes], Awaitable[None]], *, rst: bool = True) -> Fault:
    """The answer is made and paid for, what `send` writes of it is not enough, and the connection ends."""

    async def give(x: Exchange) -> bool:
        await x.generate()
        await send(x, x.answer())
        if rst:
            await asyncio.sleep(0.01)
            x.reset()
        return False

    return give


async def reset_before(x: Exchange) -> bool:
    x.reset()
    return False


async def _nothing(x: Exchange, data: bytes) -> None:
    pass


async def _head(x: Exchange, data: bytes) -> None:
    await x.send(data[: data.index(b"\r\n\r\n") + 4], whole=False)


async def _half(x: Exchange, data: bytes) -> None:
    start = data.index(b"\r\n\r\n") + 4
    await x.send(data[: start + (len(data) - start) // 2], whole=False)


async def _part_of_head(x: Exchange, data: bytes) -> None:
    await x.send(data[:25], whole=False)


async def _huge_header(x: Exchange, data: bytes) -> None:
    await x.send(data.replace(b"\r\n", b"\r\nX-Huge: " + b"a" * (1 << 20) + b"\r\n", 1), whole=False)


async def _endless(x: Exchange, data: bytes) -> None:
    await x.send(stream_head().replace(b"text/event-stream", b"application/json"), whole=False)
    for _ in range(4096):
        await x.send(chunk(b" " * 65536), whole=False)


async def _bad_chunk(x: Exchange, data: bytes) -> None:
    await x.send(stream_head() + b"zz\r\n" + data, whole=False)


async def silence(x: Exchange) -> bool:
    await x.generate()
    await asyncio.sleep(x.teacher.silence)
    x.reset()
    return False


async def silent_body(x: Exchange) -> bool:
    await x.generate()
    await _half(x, x.answer())
    await asyncio.sleep(x.teacher.silence)
    x.reset()
    return False


async def restart(x: Exchange) -> bool:
    await x.generate()
    task = asyncio.get_running_loop().create_task(x.teacher.restart(0.2))
    x.teacher.restarts.append(task)
    await asyncio.sleep(x.teacher.silence)
    return False


# -- 200 with something that is no answer


def instead(value: Any, headers: Mapping[str, str] | None = None) -> Fault:
    async def give(x: Exchange) -> bool:
        await x.generate()
        await x.send(response(200, value, headers), whole=False)
        return True

    return give


async def cut_stream(x: Exchange) -> bool:
    """The chunks end properly, the events do not."""
    await x.generate()
    if not x.body.get("stream"):
        data = x.answer()
        await x.send(response(200, data[data.index(b"\r\n\r\n") + 4 : -20]), whole=False)
        return True
    data = x.answer()
    frames = data[len(stream_head()) :].split(b"\n\n\r\n")
    await x.send(stream_head() + b"\n\n\r\n".join(frames[: len(frames) // 2]) + b"\n\n\r\n0\r\n\r\n", whole=False)
    return True


async def bomb(x: Exchange) -> bool:
    """A quarter of a gigabyte, packed small where the client unpacks."""
    await x.generate()
    packed = "gzip" in x.headers.get("accept-encoding", "")
    data = gzip.compress(b" " * (1 << 28), 1) if packed else b" " * (1 << 20)
    await x.send(response(200, data, {"Content-Encoding": "gzip"} if packed else {}), whole=False)
    return True


# -- answers in spite of all


def sound(send: Callable[[Exchange, bytes], Awaitable[None]], *, stays: bool = True) -> Fault:
    async def give(x: Exchange) -> bool:
        await x.generate()
        await send(x, x.answer())
        x.delivered()
        return stays

    return give


async def _plainly(x: Exchange, data: bytes) -> None:
    await x.send(data)


async def _drip(x: Exchange, data: bytes) -> None:
    for i in range(0, len(data), max(len(data) // 120, 1)):
        await x.send(data[i : i + max(len(data) // 120, 1)], whole=False)
        await asyncio.sleep(0.005)


async def _by_byte(x: Exchange, data: bytes) -> None:
    for i in range(len(data)):
        await x.send(data[i : i + 1], whole=False)
        if i % 64 == 0:
            await asyncio.sleep(0.001)


async def _twice(x: Exchange, data: bytes) -> None:
    await x.send(data + x.answer(), whole=False)


async def _early_hints(x: Exchange, data: bytes) -> None:
    await x.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + data, whole=False)


async def _gzip(x: Exchange, data: bytes) -> None:
    if "gzip" not in x.headers.get("accept-encoding", "") or x.body.get("stream"):
        return await _plainly(x, data)
    body = gzip.compress(data[data.index(b"\r\n\r\n") + 4 :])
    await x.send(response(200, body, {"Content-Encoding": "gzip"}), whole=False)
    return None


async def _stream_twice(x: Exchange, data: bytes) -> None:
    """Every event again after [DONE]; without a stream, the answer as it is."""
    if not x.body.get("stream"):
        return await _plainly(x, data)
    frames = data[len(stream_head()) : -len(b"0\r\n\r\n")]
    await x.send(stream_head() + frames + frames + b"0\r\n\r\n", whole=False)
    return None


async def two_choices(x: Exchange) -> bool:
    """A second choice that nobody asked for, in front of the first."""
    await x.generate()
    other = {"index": 1, "finish_reason": "stop", "message": {"role": "assistant", "content": "The other one."}}
    data = x.answer()
    if not x.body.get("stream"):
        value = json.loads(data[data.index(b"\r\n\r\n") + 4 :])
        data = response(200, value | {"choices": [other, *value["choices"]]})
    await x.send(data)
    return True


async def wrong_model(x: Exchange) -> bool:
    await x.generate()
    await x.send(x.answer(model="another-model"), whole=False)
    return True


async def no_usage(x: Exchange) -> bool:
    await x.generate()
    await x.send(x.answer(usage=None))
    return True


async def overcharge(x: Exchange) -> bool:
    """Ten million tokens for one answer."""
    await x.generate()
    usage = {"prompt_tokens": 5_000_000, "completion_tokens": 5_000_000, "total_tokens": 10_000_000}
    await x.send(x.answer(usage=usage))
    return True


async def surcharge(x: Exchange) -> bool:
    """5,000 tokens more than the answer has, which are charged for."""
    await x.generate()
    x.charge(5000)
    await x.send(x.answer())
    return True


_QUOTA = {"error": {"message": "You exceeded your current quota, please check your plan and billing details.",
                    "type": "insufficient_quota", "param": None, "code": "insufficient_quota"}}  # fmt: skip
_HTML = b"<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"
FAULTS: dict[str, Fault] = {
    "429-seconds": refusal(429, {"Retry-After": "1"}, wait=0.9),
    "429-fraction": refusal(429, {"Retry-After": "0.2"}, wait=0.15),
    "429-date-ahead": dated(SKEW),
    "429-date-behind": dated(-SKEW),
    "429-ms": refusal(429, {"retry-after-ms": "150"}, wait=0.1),
    "429-reset": refusal(
        429, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "200ms"}, wait=0.15
    ),
    "429-body": refusal(429, None, {"error": {"message": "slow down", "retry_after": 0.2}}, wait=0.15),
    "429-none": refusal(429),
    "429-absurd": refusal(429, {"Retry-After": "nan"}),
    "quota": refusal(429, None, _QUOTA),
    **{str(status): refusal(status) for status in (408, 409, 425, 500, 502, 503, 504, 529)},
    **{f"{status}-soon": refusal(status, {"Retry-After": "0"}) for status in (500, 502, 503, 529)},
    "401": refusal(401, None, {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}),
    "400": refusal(400, None, {"error": {"message": "this prompt is refused", "type": "invalid_request_error"}}),
    "redirect": redirect,
    "reset-before": reset_before,
    "reset-worked": broken(_nothing),
    "reset-in-head": broken(_part_of_head),
    "reset-headers": broken(_head),
    "reset-body": broken(_half),
    "short-body": broken(_half, rst=False),
    "bad-chunk": broken(_bad_chunk, rst=False),
    "huge-header": broken(_huge_header),
    "endless": broken(_endless),
    "bomb": bomb,
    "silence": silence,
    "silent-body": silent_body,
    "restart": restart,
    "cut-stream": cut_stream,
    "bad-json": instead(b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hal'),
    "wrong-types": instead({"choices": {"0": "no"}, "usage": "many"}),
    "no-choices": instead({"object": "chat.completion", "choices": [], "usage": None}),
    "error-200": instead({"error": {"message": "engine overloaded", "type": "overloaded_error"}}),
    "deep-json": instead(b"[" * 200_000),
    "not-utf8": instead(b'{"choices": [{"index": 0, "message": {"content": "\xff\xfe"}, "finish_reason": "stop"}]}'),
    "html": instead(_HTML, {"Content-Type": "text/html"}),
    "empty-body": instead(b""),
    "wrong-model": wrong_model,
    "drip": sound(_drip),
    "bytewise": sound(_by_byte),
    "twice": sound(_twice),
    "stream-twice": sound(_stream_twice),
    "early-hints": sound(_early_hints),
    "gzip": sound(_gzip),
    "hang-up": sound(_plainly, stays=False),
    "two-choices": two_choices,
    "no-usage": no_usage,
    "overcharge": overcharge,
    "surcharge": surcharge,
}
STORMS = tuple(name for name in FAULTS if name.startswith("429"))
STATUSES = ("408", "409", "425", "500", "502", "503", "504", "529", "500-soon", "502-soon", "503-soon", "529-soon")
CUTS = ("reset-before", "reset-worked", "reset-in-head", "reset-headers", "reset-body", "short-body", "bad-chunk",
        "cut-stream", "restart", "huge-header", "endless", "bomb")  # fmt: skip
GARBAGE = ("bad-json", "wrong-types", "no-choices", "error-200", "deep-json", "not-utf8", "html", "empty-body")
SILENCES = ("silence", "silent-body")
SOUND = ("drip", "bytewise", "twice", "stream-twice", "early-hints", "gzip", "hang-up", "two-choices")
PASSING = (*STATUSES, *CUTS, *GARBAGE, *SOUND, "429-fraction", "429-ms", "429-reset", "429-body", "429-none")


def name(item: Item) -> str:
    """What a fault is called in the ledger."""
    return item if isinstance(item, str) else str(item[0] if isinstance(item, tuple) else item)


async def misbehave(x: Exchange, item: Item) -> bool:
    """Answer with a fault, or rightly without one; whether the connection can be used again."""
    if isinstance(item, tuple):
        return await refusal(*item)(x)
    if x.teacher.refuses(x.body) and (item is None or item in SOUND):  # it is never answered, in no manner
        return await FAULTS[x.teacher.refusal](x)
    if item is not None:
        return await FAULTS[str(item)](x)
    return await sound(_plainly)(x)
