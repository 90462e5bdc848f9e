"""What a server on this machine says it is; whatever it says, one short line comes of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from distill.data.teacher.server_name import server_of


class At:
    def __init__(self, base: str) -> None:
        self.base = base


@contextmanager
def serving(pages: dict[str, bytes], trouble: Sequence[int] = ()) -> Iterator[str]:
    """A server with these pages; its first answers are `trouble`: a status, or 0 for something that is not HTTP."""
    first = list(trouble)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages.get(self.path)
            status = first.pop(0) if first else 404 if body is None else 200
            if not status:
                self.wfile.write(b"SSH-2.0-OpenSSH\r\n")
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(body or b"no")))
            self.end_headers()
            self.wfile.write(body or b"no")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def named(pages: dict[str, object]) -> str | None:
    with serving({k: v if isinstance(v, bytes) else json.dumps(v).encode() for k, v in pages.items()}) as base:
        return asyncio.run(server_of(At(base)))


PROPS = {"build_info": "b6501-84e908c6", "default_generation_settings": {}}


@pytest.mark.parametrize(
    ("pages", "name"),
    [
        ({"/props": PROPS | {"model_ftype": "Q4_K - Medium"}}, "llama.cpp b6501-84e908c6 Q4_K - Medium"),
        ({"/props": PROPS, "/version": {"version": "9"}}, "llama.cpp b6501-84e908c6"),
        ({"/version": {"version": "0.11.0"}}, "vLLM 0.11.0"),
        ({"/api/version": {"version": "0.12.3"}}, "Ollama 0.12.3"),
        ({"/version": {"version": "1\n\x1b[2J; rm -rf <b>" + "9" * 500}}, "vLLM 12J rm -rf b" + "9" * 63),
        ({}, None),
        ({"/props": b"[" * 100_000, "/version": b"\xff\xfe", "/api/version": {"version": 3}}, None),
        ({"/version": b'{"version": "' + b"x" * (1 << 21) + b'"}'}, None),
        ({"/version": {"version": ""}, "/props": [1]}, None),
    ],
)
def test_a_server_is_named_by_what_it_says_on_one_short_line(pages: dict[str, object], name: str | None) -> None:
    assert named(pages) == name


@pytest.mark.parametrize("trouble", [[503], [500, 429], [0, 502]], ids=str)
def test_trouble_that_passes_does_not_change_a_name(trouble: list[int]) -> None:
    with serving({"/version": b'{"version": "0.11.0"}'}, trouble) as base:
        assert asyncio.run(server_of(At(base))) == "vLLM 0.11.0"


def test_a_server_that_is_gone_has_no_name() -> None:
    with serving({}) as base:
        pass
    assert asyncio.run(server_of(At(base))) is None


@pytest.mark.parametrize("base", ["https://api.example.com/v1", "http://10.0.0.1:8000/v1", "nonsense"])
def test_a_server_elsewhere_is_not_asked(base: str) -> None:
    assert asyncio.run(server_of(At(base))) is None
