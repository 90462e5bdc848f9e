"""Who answers: the teacher's specification, what an answer is, and the client of an OpenAI-compatible endpoint.

Local teachers (gguf:, hf:) are in distill/data/local_teachers.py and answer through the same `ask`.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import urlsplit

import httpx
import msgspec

from distill import chat
from distill.data.schema import Teacher, Usage
from distill.errors import InputError
from distill.tokenizer import CALL_END, CALL_START, TURN_END

KEY_VARIABLES = ("TEACHER_API_KEY", "MOONSHOT_API_KEY", "OPENAI_API_KEY")
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_LONGEST_WAIT = 60.0


class Spec(NamedTuple):
    """A parsed `--teacher`: an endpoint's URL, a GGUF file, or a Hugging Face name or folder."""

    kind: Literal["endpoint", "gguf", "hf"]
    target: str


class Sampling(msgspec.Struct, frozen=True):
    """How the teacher decodes."""

    max_tokens: int
    temperature: float
    top_p: float


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came back: a text, or why there is none (`reject`)."""

    text: str = ""
    reasoning: str | None = None
    finish: str | None = None
    usage: Usage | None = None
    reject: str | None = None
    detail: str | None = None


class Unreachable(Exception):
    """Every attempt at one request failed; the teacher may be down."""


class Asker(Protocol):
    """A teacher that is ready to answer."""

    identity: Teacher

    async def ask(self, messages: Sequence[chat.Message], sampling: Sampling, seed: int) -> Answer:
        """Answer one conversation."""
        ...

    async def close(self) -> None:
        """Stop what was started."""
        ...


def parse_spec(text: str) -> Spec:
    """`http(s)://...`, `gguf:FILE-or-package`, `hf:org/model`, or an existing folder."""
    kind, colon, rest = text.partition(":")
    if kind in ("http", "https"):
        url = urlsplit(text)
        if not url.hostname:
            raise InputError(f"--teacher {text}: no host")
        if url.username or url.password:
            raise InputError("--teacher: a URL must not hold credentials; give the key in TEACHER_API_KEY")
        return Spec("endpoint", text.rstrip("/"))
    if kind in ("gguf", "hf") and colon and rest:
        return Spec("gguf" if kind == "gguf" else "hf", rest)
    if Path(text).is_dir():
        return Spec("hf", text)
    if Path(text).is_file() and text.endswith(".gguf"):
        return Spec("gguf", text)
    raise InputError(f"--teacher {text}: expected http(s)://..., gguf:FILE-or-package, hf:org/model or a local folder")


def reject_of(answer: Answer) -> str | None:
    """Why an answer cannot be a training text, or None."""
    if answer.reject:
        return answer.reject
    if answer.finish == "length":
        return "length"
    if answer.finish == "content_filter":
        return "filtered"
    if not answer.text.strip():
        return "empty"
    if CALL_START in answer.text or CALL_END in answer.text:
        return "tool_leak"  # no tools were offered
    try:
        chat.segments([chat.Message("user", "?"), chat.Message("assistant", answer.text)])
    except InputError:
        return "control_token"
    return None


class Endpoint:
    """An OpenAI-compatible server. `raw` sends our own rendering of the conversation to /completions."""

    def __init__(self, client: httpx.AsyncClient, base: str, identity: Teacher, *, raw: bool, attempts: int,
                 key: str = "") -> None:  # fmt: skip
        self.identity = identity
        self._client, self._base, self._raw, self._attempts, self._key = client, base, raw, attempts, key

    @classmethod
    async def connect(
        cls, url: str, *, model: str | None, timeout_s: float, attempts: int, concurrency: int, raw: bool = False,
        identity: Teacher | None = None,
    ) -> Endpoint:  # fmt: skip
        """Find the API below `url` (adding /v1 where the bare URL does not answer) and the model it serves."""
        host = urlsplit(url).hostname or ""
        key = api_key()
        if key and urlsplit(url).scheme == "http" and host not in _LOOPBACK:
            raise InputError(f"--teacher {url}: a key would travel unencrypted; use https")
        client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 20)),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            trust_env=host not in _LOOPBACK,
        )
        try:
            base, listed = await _find_api(client, url)
            name = model or _only_model(url, listed)
        except BaseException:
            await client.aclose()
            raise
        identity = identity or Teacher("endpoint", name, text_engine="OpenAI-compatible endpoint", host=host)
        return cls(client, base, identity, raw=raw, attempts=attempts, key=key)

    async def ask(self, messages: Sequence[chat.Message], sampling: Sampling, seed: int) -> Answer:
        """Answer one conversation; retries what may pass, raises Unreachable when it does not."""
        body: dict[str, Any] = msgspec.to_builtins(sampling) | {"model": self.identity.model, "seed": seed}
        if self._raw:
            body |= {"prompt": chat.render(messages, add_generation_prompt=True), "stop": [TURN_END]}
        else:
            body["messages"] = [{"role": m.role, "content": m.content} for m in messages]
        url = f"{self._base}/{'completions' if self._raw else 'chat/completions'}"
        problem = ""
        for attempt in range(self._attempts):
            try:
                response = await self._client.post(url, json=body)
            except httpx.TransportError as error:
                problem, wait = f"{type(error).__name__}: {error}", None
            else:
                if response.status_code == 200:
                    return _read_answer(response)
                problem = self._clean(f"HTTP {response.status_code}: {response.text[:300]}")
                if response.status_code in (401, 403, 404):
                    raise InputError(f"the teacher refuses: {problem}")
                if response.status_code not in RETRIED:
                    return Answer(reject="http", detail=problem)
                wait = retry_after(response.headers.get("retry-after"))
            if attempt + 1 < self._attempts:
                await asyncio.sleep(random.uniform(0, min(_LONGEST_WAIT, 2.0**attempt)) if wait is None else wait)
        raise Unreachable(problem)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _clean(self, text: str) -> str:
        """A server's words on one line, without our key should it echo it."""
        text = " ".join(text.split())
        return text.replace(self._key, "***") if self._key else text


def api_key() -> str:
    """The endpoint's key from the environment, or an empty string."""
    return next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), "")


def retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds to wait by a Retry-After header (seconds or a date), between 0 and ten minutes; None if it is absent."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now)
        except ValueError:
            return None
    return min(max(seconds, 0.0), 600.0) if seconds == seconds else None


async def _find_api(client: httpx.AsyncClient, url: str) -> tuple[str, list[str]]:
    """The base URL whose /models answers, and the ids it lists."""
    bases = [url] if urlsplit(url).path.rstrip("/").endswith("/v1") else [url, f"{url}/v1"]
    problem = ""
    for base in bases:
        try:
            response = await client.get(f"{base}/models")
            if response.status_code in (401, 403):
                raise InputError(f"the teacher at {base} refuses the key (HTTP {response.status_code}), which is read "
                                 f"from {', '.join(KEY_VARIABLES)}")  # fmt: skip
            problem = f"HTTP {response.status_code}"
            listed = response.json()["data"] if response.status_code == 200 else None
            if isinstance(listed, list):
                return base, [str(item["id"]) for item in listed if isinstance(item, dict) and "id" in item]
        except httpx.TransportError as error:
            problem = f"{type(error).__name__} {error}".strip()
        except (ValueError, KeyError, TypeError):
            problem = "/models did not answer with a list of models"
    raise InputError(f"cannot reach a teacher at {' or '.join(bases)}: {problem}")


def _only_model(url: str, listed: Sequence[str]) -> str:
    if len(listed) == 1:
        return listed[0]
    found = f"it lists {', '.join(sorted(listed)[:8])}" if listed else "it lists none"
    raise InputError(f"--teacher {url}: name a model with --model; {found}")


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


def _read_answer(response: httpx.Response) -> Answer:
    try:
        body = msgspec.json.decode(response.content, type=_Completion)
    except (msgspec.DecodeError, RecursionError) as error:
        return Answer(reject="malformed", detail=str(error)[:300])
    if not body.choices:
        return Answer(reject="malformed", detail="no choices")
    choice = body.choices[0]
    message = choice.message or _Message(content=choice.text)
    usage = Usage(body.usage.prompt_tokens, body.usage.completion_tokens) if body.usage else None
    return Answer(message.content or "", message.reasoning_content or message.reasoning, choice.finish_reason, usage)
