"""How a request reaches an OpenAI-compatible server: kept-alive connections, credentials, limits of time and size.

On aiohttp, which of the libraries measured is the fastest that ends cleanly (docs/data.md).
"""

from __future__ import annotations

import asyncio
import select
import ssl
import time
import urllib.request
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import aiohttp
import msgspec

from distill import __version__
from distill.data.teacher.events import StreamReader
from distill.data.teacher.outcomes import judge
from distill.data.teacher.spec import KEY_VARIABLES, api_key, key_in_use
from distill.data.teacher.wire import LARGEST_BODY, Exchange, ReplyError
from distill.errors import GO_ON, InputError, Paused

__all__ = ["Exchange", "HttpTransport", "Transport", "only_model", "unlisted_model"]

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_CONNECT_S = 20.0
_PAUSES = (0.2, 0.5, 1.0, 2.0)  # seconds, between tries to read the list of models
_LONGEST_PAUSE = 60.0
_LAST = {"Connection": "close"}
"""With a stream: llama.cpp's server closes after one without saying so, and the next request may meet the closing."""


class Transport(Protocol):
    """Sends one request and brings back what came of it."""

    async def post(self, body: Mapping[str, Any], *, stream: bool = False) -> Exchange:
        """Never raises for trouble of the network or the server; asyncio.CancelledError passes."""
        ...

    def distrust(self) -> None:
        """The server gave an answer twice."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class _Unclean(aiohttp.ClientError):
    """A kept-alive connection cannot be used again; nothing was sent on it."""

    def __init__(self, unsolicited: bool) -> None:
        super().__init__("the connection was not clean")
        self.unsolicited = unsolicited


_used: weakref.WeakSet[Any] = weakref.WeakSet()


class _CheckedRequest(aiohttp.ClientRequest):
    """Sends on an idle connection only if nothing came on it since: aiohttp would take a second answer to the last
    request for the answer to this one. An end that the server has put to it is seen here too, before it costs doubt."""

    async def send(self, conn: Any) -> aiohttp.ClientResponse:
        protocol = conn.protocol
        if protocol in _used:
            if protocol.should_close:
                raise _Unclean(unsolicited=True)
            poll = select.poll()
            poll.register(conn.transport.get_extra_info("socket").fileno(), select.POLLIN)
            if poll.poll(0):
                raise _Unclean(unsolicited=False)
        else:
            _used.add(protocol)
        return await super().send(conn)


class HttpTransport:
    """A Transport over HTTP. Made by `connect`."""

    base: str
    """URL under which the API was found, such as https://api.example/v1."""
    host: str
    models: tuple[str, ...]
    """Ids that the server lists."""

    def __init__(self, url: str, path: str, timeout: aiohttp.ClientTimeout, connections: int) -> None:
        parts = urlsplit(url)
        self.base, self.host, self.models = url, parts.hostname or "", ()
        self._path, self._timeout, self._connections = path, timeout, connections
        self._key = _usable_key(url, self.host)
        self._proxy = _proxy(parts.scheme, self.host)
        self._sessions = [self._session(keep_alive=True)]

    @classmethod
    async def connect(
        cls, url: str, *, path: Literal["chat/completions", "completions"] = "chat/completions",
        timeout_s: float = 120.0, deadline_s: float = 1800.0, connections: int = 16,
    ) -> HttpTransport:  # fmt: skip
        """Find the API below `url` (adding /v1 where the bare URL does not answer). InputError where there is none.

        `timeout_s` is the longest silence, `deadline_s` the longest answer, `connections` the most at a time.
        """
        timeout = aiohttp.ClientTimeout(deadline_s, sock_connect=min(timeout_s, _CONNECT_S), sock_read=timeout_s)
        self = cls(url.rstrip("/"), path, timeout, connections)
        try:
            await self._find_api()
        except BaseException:
            await self.close()
            raise
        return self

    async def post(self, body: Mapping[str, Any], *, stream: bool = False) -> Exchange:
        """Send one request; `stream` adds `"stream": true` to the body. See Transport."""
        content = msgspec.json.encode({**body, "stream": True} if stream else body)
        return await self._send("POST", f"{self.base}/{self._path}", content, stream)

    async def _send(self, method: str, url: str, content: bytes | None = None, stream: bool = False) -> Exchange:
        """One exchange, over a connection that is clean."""
        for _ in range(self._connections + 1):  # each try that meets an unclean connection has closed it
            try:
                return await self._try(method, url, content, stream)
            except _Unclean as unclean:
                if unclean.unsolicited:  # whoever does it once may do it again while a request is on its way
                    self.distrust()
        return Exchange(0, {}, b"", "every kept-alive connection was closed by the server", False)

    def distrust(self) -> None:
        """The server answers twice: from now on each connection is used for one request."""
        if len(self._sessions) == 1:
            self._sessions.append(self._session(keep_alive=False))

    async def close(self) -> None:
        """Close the connections."""
        for session in self._sessions:
            await session.close()

    async def _try(self, method: str, url: str, content: bytes | None, stream: bool) -> Exchange:
        """One try. Of a broken stream that told why, `body` is the event with the error."""
        status, headers, body, problem, sent = 0, {}, b"", "", True
        try:
            async with self._sessions[-1].request(
                method, url, data=content, allow_redirects=False, proxy=self._proxy,
                headers=_LAST if stream else None,
            ) as response:  # fmt: skip
                status = response.status
                headers = {name.lower(): self._clean(value) for name, value in response.headers.items()}
                body = await self._read(response, stream)
        except _Unclean:
            raise
        except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError) as error:
            problem, sent = f"cannot connect: {_words(error)}", False
        except aiohttp.SocketTimeoutError:
            problem = f"silent for {self._timeout.sock_read:g} s"
        except TimeoutError:
            problem = f"no whole answer within {self._timeout.total:g} s"
        except ReplyError as error:
            problem, body = str(error), getattr(error, "event", b"")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            problem = _words(error)
        if self._key and self._key.encode() in body:
            body = body.replace(self._key.encode(), b"***")
        return Exchange(status, headers, body, self._clean(problem), sent)

    async def _read(self, response: aiohttp.ClientResponse, stream: bool) -> bytes:
        """The whole body; of a stream, what it adds up to."""
        pieces: list[bytes] = []
        size = 0
        reader: StreamReader | None = None
        events = response.status == 200 and "event-stream" in response.headers.get("content-type", "").lower()
        while chunk := await response.content.readany():
            if not pieces and (events or (stream and response.status == 200 and not chunk.lstrip().startswith(b"{"))):
                reader = reader or StreamReader()
            if reader is not None:
                reader.feed(chunk)
                continue
            size += len(chunk)
            if size > LARGEST_BODY:
                raise ReplyError(f"an answer of more than {LARGEST_BODY} bytes")
            pieces.append(chunk)
        return reader.finish() if reader is not None else b"".join(pieces)

    def _session(self, *, keep_alive: bool) -> aiohttp.ClientSession:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity",
                   "User-Agent": f"distill/{__version__}"}  # fmt: skip
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        # made here, for aiohttp makes its own when it is imported: before SSL_CERT_FILE may be set
        tls = ssl.create_default_context() if self.base.startswith("https:") else True
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, force_close=not keep_alive, ssl=tls),
            headers=headers, timeout=self._timeout, cookie_jar=aiohttp.DummyCookieJar(), request_class=_CheckedRequest,
        )  # fmt: skip

    async def _find_api(self) -> None:
        """Set `base` to the URL whose /models answers, and `models` to what it lists."""
        url = self.base
        bases = [url] if urlsplit(url).path.rstrip("/").endswith("/v1") else [url, f"{url}/v1"]
        problem = ""
        for base in bases:
            exchange = await self._models_at(base)
            problem = exchange.problem or f"HTTP {exchange.status}"
            if exchange.status in (401, 403):
                raise InputError(f"the teacher at {base} lets nobody in (HTTP {exchange.status}): {key_in_use()}")
            if exchange.status in (402, 429) or exchange.status >= 500:
                raise Paused(f"the teacher at {base} is not ready ({problem}); {GO_ON}")
            if 300 <= exchange.status < 400:
                problem += f", a redirect to {exchange.headers.get('location', 'nowhere')}: give that URL"
            elif exchange.status == 200 and not exchange.problem:
                found = _model_ids(exchange.body)
                if found is not None:
                    self.base, self.models = base, found
                    return
                problem = "/models did not answer with a list of models"
        raise InputError(f"cannot reach a teacher at {' or '.join(bases)}: {problem}")

    async def _models_at(self, base: str) -> Exchange:
        """What /models says, asked again where trouble may pass."""
        for pause in (*_PAUSES, None):
            exchange = await self._send("GET", f"{base}/models")
            whole = exchange.status == 200 and not exchange.problem
            outcome = judge(exchange, time.time())
            if whole or not exchange.sent or outcome.kind not in ("retry", "cooldown") or pause is None:
                break
            wait = pause if outcome.wait is None else max(pause, outcome.wait)
            if wait > _LONGEST_PAUSE:
                break
            await asyncio.sleep(wait)
        return exchange

    def _clean(self, text: str) -> str:
        """Words from outside on one line, without our key should they echo it."""
        text = " ".join(text.split())[:2000]
        return text.replace(self._key, "***") if self._key else text


def only_model(url: str, listed: Sequence[str]) -> str:
    """The one model that a server lists; InputError where it is not one."""
    if len(listed) == 1:
        return listed[0]
    found = f"it lists {', '.join(sorted(listed)[:8])}" if listed else "it lists none"
    raise InputError(f"--teacher {url}: name a model with --model; {found}")


def unlisted_model(model: str, listed: Sequence[str]) -> str:
    """A remark about a model that a server does not list among those that it lists."""
    if not listed or model in listed:
        return ""
    return f"the endpoint does not list --model {model}; it lists {', '.join(sorted(listed)[:8])}"


def _usable_key(url: str, host: str) -> str:
    key = api_key()
    if key and urlsplit(url).scheme != "https" and host not in LOOPBACK:
        raise InputError(f"--teacher {url}: a key would travel unencrypted; use https")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"the key in {' or '.join(KEY_VARIABLES)} holds a space, a line end or another odd character")
    return key


def _proxy(scheme: str, host: str) -> str | None:
    """The environment's proxy, which no request to this machine goes through."""
    if host in LOOPBACK or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    if proxy and urlsplit(proxy).scheme not in ("http", "https"):
        raise InputError(f"a proxy must be http:// or https://, not {urlsplit(proxy).scheme}:// (from the environment)")
    return proxy


def _model_ids(body: bytes) -> tuple[str, ...] | None:
    try:
        listed = msgspec.json.decode(body)["data"]
        return tuple(str(item["id"]) for item in listed if isinstance(item, dict) and "id" in item)
    except (msgspec.MsgspecError, RecursionError, ValueError, KeyError, TypeError):
        return None


def _words(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientResponseError):
        return f"not HTTP: {error.message}"
    return f"{type(error).__name__} {error}".strip()
