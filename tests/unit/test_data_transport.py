"""The HTTP client against a server that writes raw bytes: every failure has a name, and no answer changes hands."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import shutil
import ssl
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.data.teacher import transport as transport_module
from distill.data.teacher.outcomes import judge
from distill.data.teacher.transport import Exchange, HttpTransport, only_model, unlisted_model
from distill.errors import InputError, Paused

KEY = "tk-very-secret-1234"
Script = Callable[[asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]
BODY = {"model": "m", "messages": []}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEACHER_API_KEY", "MOONSHOT_API_KEY", "OPENAI_API_KEY", "http_proxy", "https_proxy", "all_proxy",
                 "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


def response(body: bytes | str, status: str = "200 OK", *headers: str) -> bytes:
    data = body.encode() if isinstance(body, str) else body
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(data)}", "", ""]).encode() + data


def answer(text: str) -> bytes:
    return response(json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}))


def content(exchange: Exchange) -> str:
    assert exchange.problem == "" and exchange.status == 200
    return json.loads(exchange.body)["choices"][0]["message"]["content"]


class Server:
    """Answers GET /v1/models, and each POST by the next script; the last one goes on."""

    def __init__(self, *scripts: Script | bytes, tls: ssl.SSLContext | None = None) -> None:
        self.scripts, self.tls = list(scripts), tls
        self.models = response('{"data": [{"id": "m"}]}')
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.connections = 0
        self._open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.sleep(0.01)

    async def connect(self, **options: Any) -> HttpTransport:
        return await HttpTransport.connect(self.url, **options)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lines = head.split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                headers["authorization"] = next((line[15:] for line in lines if line.startswith("Authorization")), "")
                path = lines[0].split(" ")[1]
                self.requests.append((path, headers, json.loads(body or "null")))
                if lines[0].startswith("GET"):
                    models = self.models if path.endswith("/v1/models") else response("no", "404 Not Found")
                    writer.write(models)
                    if models.endswith(b"{"):
                        return
                    continue
                script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
                if isinstance(script, bytes):
                    writer.write(script)
                else:
                    await script(writer, json.loads(body))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 15))  # type: ignore[arg-type]


def fails(*scripts: Script | bytes, stream: bool = False, **options: Any) -> Exchange:
    """What a request to such a server gives; the next one on the same transport is answered."""
    found: list[Exchange] = []

    async def main() -> None:
        async with Server(*scripts, answer("next")) as server:
            transport = await server.connect(**{"timeout_s": 5} | options)
            found.append(await transport.post(BODY, stream=stream))
            while len(server.scripts) > 1:
                server.scripts.pop(0)
            assert content(await transport.post(BODY)) == "next"
            await transport.close()

    run(main)
    return found[0]


def test_a_request_is_sent_once_and_its_answer_brought_back() -> None:
    async def main() -> None:
        async with Server(response('{"x": 1}', "200 OK", "X-Request-ID: 7")) as server:
            transport = await server.connect()
            assert (transport.base, transport.host, transport.models) == (f"{server.url}/v1", "127.0.0.1", ("m",))
            exchange = await transport.post({"model": "m", "é": [1.5, None]})
            assert (
                exchange == (200, exchange.headers, b'{"x": 1}', "", True) and exchange.headers["x-request-id"] == "7"
            )
            path, headers, body = server.requests[-1]
            assert path == "/v1/chat/completions" and body == {"model": "m", "é": [1.5, None]}
            assert headers["content-type"] == "application/json" and headers["authorization"] == ""
            assert headers["accept-encoding"] == "identity" and server.connections == 1
            await transport.close()

    run(main)


def test_every_one_of_many_requests_gets_its_own_answer() -> None:
    async def echo(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        await asyncio.sleep(0.001 * (hash(body["n"]) % 5))
        writer.write(answer(str(body["n"])))

    async def main() -> None:
        async with Server(echo) as server:
            transport = await server.connect(connections=8)
            got = await asyncio.gather(*[transport.post({"n": n}) for n in range(300)])
            assert [content(exchange) for exchange in got] == [str(n) for n in range(300)]
            assert server.connections <= 8
            await transport.close()

    run(main)


@pytest.mark.parametrize("gap", [0.0, 0.05])
def test_a_second_answer_is_never_the_answer_to_the_next_request(gap: float) -> None:
    async def twice(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(answer(body["n"]))
        await asyncio.sleep(gap)
        writer.write(answer("a stranger's"))

    async def main() -> None:
        async with Server(twice) as server:
            transport = await server.connect(connections=1)
            for n in "abc":
                assert content(await transport.post({"n": n})) == n
                await asyncio.sleep(2 * gap)
            assert server.connections >= 3
            await transport.close()

    run(main)


def test_after_a_late_second_answer_no_connection_is_used_twice() -> None:
    async def late(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(answer("a"))
        await asyncio.sleep(0.02)
        writer.write(answer("a stranger's"))

    async def main() -> None:
        async with Server(late, answer("b")) as server:
            transport = await server.connect(connections=1)
            assert content(await transport.post(BODY)) == "a" and server.connections == 1
            await asyncio.sleep(0.05)
            for n in range(1, 4):
                assert content(await transport.post(BODY)) == "b" and server.connections == 1 + n
            await transport.close()

    run(main)


def test_a_connection_that_the_server_closed_meanwhile_costs_no_doubt() -> None:
    async def closing(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(answer("a"))
        writer.close()

    async def main() -> None:
        async with Server(closing) as server:
            transport = await server.connect(connections=4)
            for _ in range(20):
                assert content(await transport.post(BODY)) == "a"
            await transport.close()

    run(main)


async def silent(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    await asyncio.sleep(3)


async def reset(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    writer.transport.abort()


def cut(data: bytes, *, abort: bool = False) -> Script:
    async def script(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort() if abort else writer.close()

    return script


def drip(data: bytes, every: float = 0.02) -> Script:
    async def script(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        for byte in data:
            writer.write(bytes([byte]))
            await asyncio.sleep(every)

    return script


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("script", "status", "problem"),
    [
        (silent, 0, "silent for 0.2 s"),
        (reset, 0, ""),
        (cut(b""), 0, "disconnected"),
        (cut(b"HTTP/1.1 200 OK\r\nContent-Le"), 0, ""),
        (cut(answer("whole")[:-5]), 200, "not completed|Payload"),
        (cut(answer("whole")[:-5], abort=True), 200, ""),
        (cut(CHUNKED + b"4\r\nabcd\r\n"), 200, "not completed|Payload"),
        (cut(CHUNKED + b"zz\r\nabcd\r\n"), 0, "not HTTP: Invalid character in chunk size"),
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", 0, "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", 0, ""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 7\r\n\r\nabcde", 0, ""),
        (drip(b"HTTP/1.1 200 OK\r\n" + b"X-Slow: yes\r\n" * 100), 0, "no whole answer within 1 s"),
        (drip(response("x" * 1000)), 0, "no whole answer within 1 s"),
    ],
)  # fmt: skip
def test_every_failure_after_sending_has_a_name(script: Script | bytes, status: int, problem: str) -> None:
    exchange = fails(script, timeout_s=0.2, deadline_s=1)
    assert exchange.status in (status, 200) and exchange.sent and exchange.body == b""
    assert exchange.problem and re.search(problem, exchange.problem) and "\n" not in exchange.problem
    outcome = judge(exchange, 0.0)
    assert (outcome.kind, outcome.charge) == ("retry", "keep")


def test_a_slow_drip_of_a_body_ends_at_the_deadline() -> None:
    async def script(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        head, _, rest = answer("x" * 200).partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        await drip(rest)(writer, body)

    exchange = fails(script, timeout_s=1, deadline_s=0.5)
    assert exchange.problem == "no whole answer within 0.5 s" and exchange.status == 200


def test_nobody_at_the_door_means_nothing_was_sent() -> None:
    async def main() -> None:
        async with Server(answer("a")) as server:
            transport = await server.connect()
        exchange = await transport.post(BODY)
        assert exchange.status == 0 and "connect" in exchange.problem.lower()
        assert judge(exchange, 0.0).charge == "release"
        await transport.close()

    run(main)


def test_an_answer_is_bounded_even_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "LARGEST_BODY", 1 << 20)
    for data in (response(b"x" * (1 << 21)),
                 response(gzip.compress(b"x" * (1 << 26)), "200 OK", "Content-Encoding: gzip")):  # fmt: skip
        assert "more than 1048576 bytes" in fails(data).problem


EVENTS = ('data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
          'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n')  # fmt: skip
SSE = "Content-Type: text/event-stream; charset=utf-8"


def test_a_stream_becomes_a_plain_body_whoever_says_so() -> None:
    async def main() -> None:
        kinds = [(response(EVENTS, "200 OK", SSE), True), (response(EVENTS, "200 OK", SSE), False),
                 (response(EVENTS), True), (answer("a"), True)]  # fmt: skip
        async with Server(*[script for script, _ in kinds]) as server:
            transport = await server.connect()
            for _, stream in kinds:
                assert content(await transport.post(BODY, stream=stream)) == "a"
                assert server.requests[-1][2].get("stream", False) is stream
            await transport.close()

    run(main)


def test_a_broken_stream_says_what_broke_it() -> None:
    exchange = fails(response(EVENTS[:60], "200 OK", SSE), stream=True)
    assert exchange.status == 200 and exchange.problem and judge(exchange, 0.0)[:3] == ("retry", None, "keep")
    error = 'data: {"error": {"message": "Rate limit; try again in 3s", "code": 429}}\n\n'
    exchange = fails(response(EVENTS.split("\n\n")[0] + "\n\n" + error, "200 OK", SSE), stream=True)
    assert judge(exchange, 0.0)[:3] == ("cooldown", 3.0, "keep")


def test_a_refusal_of_a_stream_is_a_plain_body() -> None:
    exchange = fails(response('{"error": {"message": "no"}}', "400 Bad Request"), stream=True)
    assert exchange.status == 400 and judge(exchange, 0.0).detail == "HTTP 400: no"


def test_a_cancelled_request_leaves_nothing_behind() -> None:
    async def main() -> None:
        async with Server(silent, answer("b")) as server:
            transport = await server.connect(connections=1)
            task = asyncio.create_task(transport.post(BODY))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert content(await transport.post(BODY)) == "b"
            await transport.close()

    run(main)


# who is asked, and with which key


def test_the_key_travels_in_its_header_and_is_masked_in_every_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONSHOT_API_KEY", KEY)
    echo = response(json.dumps({"error": f"bad key {KEY}"}), "401 Unauthorized", f"X-Echo: {KEY}")
    exchange = fails(echo)
    assert KEY not in repr(exchange) and "***" in exchange.headers["x-echo"] and b"***" in exchange.body

    async def main() -> None:
        async with Server(answer("a")) as server:
            transport = await server.connect()
            await transport.post(BODY)
            assert {headers["authorization"] for _, headers, _ in server.requests} == {f"Bearer {KEY}"}
            server.models = response(KEY, f"302 {KEY}", f"Location: http://x/{KEY}")
            with pytest.raises(InputError) as caught:
                await server.connect()
            assert KEY not in str(caught.value)
            await transport.close()

    run(main)


def test_a_redirect_is_never_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", KEY)

    async def main() -> None:
        async with Server(answer("thief")) as other:
            async with Server(
                response("", "307 Temporary Redirect", f"Location: {other.url}/v1/chat/completions")
            ) as server:
                transport = await server.connect()
                exchange = await transport.post(BODY)
                assert exchange.status == 307 and judge(exchange, 0.0).kind == "refused"
                await transport.close()
                server.models = response("", "301 Moved Permanently", f"Location: {other.url}/v1/models")
                with pytest.raises(InputError, match=f"redirect to {other.url}/v1/models: give that URL"):
                    await server.connect()
            assert other.requests == []

    run(main)


def test_a_key_never_travels_unencrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(InputError, match="unencrypted"):
        asyncio.run(HttpTransport.connect("http://teacher.example"))


@pytest.mark.parametrize("key", ["a b", "a\nX-Evil: 1", "schlüssel"])
def test_a_key_that_can_be_none_is_refused_unseen(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", key)
    with pytest.raises(InputError, match="TEACHER_API_KEY") as caught:
        asyncio.run(HttpTransport.connect("https://127.0.0.1:1"))
    assert key not in str(caught.value)


def test_a_proxy_of_the_environment_is_used_but_not_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Server(answer("by proxy")) as server:
            monkeypatch.setenv("http_proxy", server.url)
            transport = await HttpTransport.connect("http://teacher.example/v1")
            assert content(await transport.post(BODY)) == "by proxy"
            assert server.requests[-1][0] == "http://teacher.example/v1/chat/completions"
            await transport.close()
            monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
            transport = await server.connect()
            assert content(await transport.post(BODY)) == "by proxy"
            await transport.close()

    run(main)


def test_a_netrc_changes_no_header(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    async def main() -> None:
        async with Server(answer("a")) as server:
            transport = await server.connect()
            assert server.requests[-1][1]["authorization"] == ""
            await transport.close()

    run(main)


@pytest.mark.parametrize("extra", ["", "/", "/v1", "/v1/"])
def test_v1_is_added_where_the_bare_url_does_not_answer(extra: str) -> None:
    async def main() -> None:
        async with Server(answer("a")) as server:
            transport = await HttpTransport.connect(server.url + extra, path="completions")
            assert transport.base == f"{server.url}/v1"
            await transport.post(BODY)
            assert server.requests[-1][0] == "/v1/completions"
            await transport.close()

    run(main)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (response("", "401 Unauthorized"), "HTTP 401\\): no key is set in TEACHER_API_KEY, MOON"),
        (response("", "404 Not Found"), "cannot reach a teacher at http://127.0.0.1:[0-9]+ or .*/v1: HTTP 404"),
        (response("hello"), "/models did not answer with a list of models"),
        (response('{"data": 3}'), "/models did not answer"),
        (response("[" * 100_000), "/models did not answer"),
        (b"SSH-2.0\r\n\r\n", "cannot reach a teacher"),
    ],
)
def test_a_server_that_is_no_teacher_is_named(models: bytes, message: str) -> None:
    async def main() -> None:
        async with Server(answer("a")) as server:
            server.models = models
            with pytest.raises(InputError, match=message):
                await server.connect()

    run(main)


def test_nobody_at_the_door_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"cannot reach a teacher at http://127\.0\.0\.1:1 or http://127.0.0.1:1/v1"):
        asyncio.run(HttpTransport.connect("http://127.0.0.1:1"))


def test_several_models_need_a_name() -> None:
    assert only_model("u", ["a"]) == "a"
    with pytest.raises(InputError, match="--teacher u: name a model with --model; it lists a, b"):
        only_model("u", ["b", "a"])
    with pytest.raises(InputError, match="it lists none"):
        only_model("u", [])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out",
         str(path.with_suffix(".crt"))], check=True, capture_output=True,
    )  # fmt: skip
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    yield path


def test_a_certificate_is_verified(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)

    async def main() -> None:
        async with Server(answer("a"), tls=tls) as server:
            with pytest.raises(InputError, match=r"(?i)certificate"):
                await server.connect()
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
            monkeypatch.setenv("TEACHER_API_KEY", KEY)
            transport = await server.connect()
            for _ in range(5):
                assert content(await transport.post(BODY)) == "a"
            assert server.connections == 1  # for all requests; the refused one never was one
            await transport.close()

    run(main)


def test_who_is_not_let_in_hears_which_key_was_sent_but_not_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setenv("MOONSHOT_API_KEY", KEY)
        async with Server(answer("a")) as server:
            server.models = response("", "403 Forbidden")
            with pytest.raises(InputError, match=r"HTTP 403\): the key is from MOONSHOT_API_KEY") as caught:
                await server.connect()
            assert KEY not in str(caught.value)

    run(main)


@pytest.mark.parametrize(
    "trouble",
    [
        response("", "503 Busy"),
        response("", "429 Slow", "Retry-After: 0"),
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",
    ],
)
def test_trouble_that_passes_while_the_models_are_listed_is_waited_for(trouble: bytes) -> None:
    async def main() -> None:
        async with Server(answer("a")) as server:
            listed, server.models = server.models, trouble
            asyncio.get_running_loop().call_later(0.3, setattr, server, "models", listed)
            transport = await server.connect()
            assert transport.models == ("m",)
            await transport.close()

    run(main)


def test_a_server_that_stays_busy_pauses_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "_PAUSES", (0.01, 0.01))

    async def main() -> None:
        async with Server(answer("a")) as server:
            server.models = response("", "503 Busy")
            with pytest.raises(Paused, match=r"not ready \(HTTP 503\); run the same command again"):
                await server.connect()
            assert [path for path, *_ in server.requests].count("/v1/models") == 3
            server.models = response("", "429 Slow", "Retry-After: 1000")
            with pytest.raises(Paused, match="HTTP 429"):
                await server.connect()

    run(main)


def test_a_model_that_is_not_listed_is_remarked_on() -> None:
    assert unlisted_model("a", ["b", "a"]) == "" == unlisted_model("a", [])
    assert unlisted_model("a", ["c", "b"]) == "the endpoint does not list --model a; it lists b, c"
