"""A teacher on loopback that answers at once: `python -m tests.unit.fast_stub [PORT]` prints its URL and serves.

For measuring what a client costs: one process, raw asyncio, a fixed answer, keep-alive and pipelining. GET /served
says how many answers it gave, GET /quit stops it.
"""

from __future__ import annotations

import asyncio
import json
import sys

ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "stub-1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "The answer to that question is 42. " * 8},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 30, "completion_tokens": 64, "total_tokens": 94},
    }
).encode()
MODELS = b'{"object": "list", "data": [{"id": "stub-1"}]}'


def response(body: bytes, kind: str = "application/json") -> bytes:
    """A whole HTTP/1.1 response."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (kind.encode(), len(body), body)


def _stream() -> bytes:
    words = ["The ", "answer ", "to ", "that ", "is ", "42."] * 10
    events = [{"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]} for word in words]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    events.append({"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 64}})
    return b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events) + b"data: [DONE]\n\n"


class FastStub(asyncio.Protocol):
    """One connection."""

    plain, stream = response(ANSWER), response(_stream(), "text/event-stream")
    served = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + size:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + size], self.buffer[end + 4 + size :]
            self.transport.write(self._answer(head.split(b" ", 2)[1], body))

    def _answer(self, path: bytes, body: bytes) -> bytes:
        if path == b"/quit":
            asyncio.get_running_loop().stop()
        if path == b"/served":
            return response(b"%d" % FastStub.served)
        if path.endswith(b"/models"):
            return response(MODELS)
        FastStub.served += 1
        return self.stream if b'"stream":true' in body or b'"stream": true' in body else self.plain


def main(port: int = 0) -> None:
    """Serve until GET /quit."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(loop.create_server(FastStub, "127.0.0.1", port))
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    loop.run_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
