"""An OpenAI-compatible teacher on loopback whose answer is a function of the question, with faults on request."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that was killed or cancelled is no news."""


class StubTeacher:
    """`with StubTeacher() as stub:` serves at stub.url. `faults` are (status, headers) given to the first requests."""

    def __init__(self, *, delay: float = 0.0, faults: list[tuple[int, dict[str, str]]] | None = None,
                 prefix: str = "/v1", models: tuple[str, ...] = ("stub-1",), answer: Any = None) -> None:  # fmt: skip
        self.delay, self.faults, self.prefix, self.models = delay, list(faults or []), prefix, models
        self.answer = answer or self.default_answer
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path == f"{stub.prefix}/models":
                    self._send(200, {"object": "list", "data": [{"id": name} for name in stub.models]})
                else:
                    self._send(404, {"error": "no such path"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.headers.append(dict(self.headers))
                if stub.faults:
                    status, extra = stub.faults.pop(0)
                    self._send(status, {"error": f"fault; you sent {self.headers.get('Authorization')}"}, extra)
                    return
                time.sleep(stub.delay)
                stub.bodies.append(body)
                stub.asked[body["messages"][-1]["content"]] += 1
                self._send(200, stub.answer(body))

            def _send(self, status: int, value: Any, extra: dict[str, str] | None = None) -> None:
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in {"Content-Length": str(len(data)), **(extra or {})}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @staticmethod
    def default_answer(body: dict[str, Any]) -> dict[str, Any]:
        """One in seven answers is cut off, one in eleven is empty."""
        draw = int(hashlib.sha256(body["messages"][-1]["content"].encode()).hexdigest(), 16)
        text = "" if draw % 11 == 0 else f"Answer {draw % 1_000_003}."
        return {
            "choices": [{"message": {"role": "assistant", "content": text, "reasoning_content": f"because {draw % 97}"},
                         "finish_reason": "length" if draw % 7 == 0 else "stop"}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 5},
        }  # fmt: skip

    def __enter__(self) -> StubTeacher:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
