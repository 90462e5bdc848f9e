"""What server answers on this machine: llama.cpp, vLLM and Ollama say so when asked."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_WAIT_S = 3.0
_LARGEST = 1 << 20
_ODD = re.compile(r"[^\w .+-]+")


class _Reached(Protocol):
    base: str


async def server_of(transport: _Reached) -> str | None:
    """Name and version of the server behind a transport, such as `vLLM 0.11.0`; None if it is not on this machine or
    does not say."""
    url = urlsplit(transport.base)
    if url.hostname not in _LOOPBACK:
        return None
    return await asyncio.to_thread(_ask, f"{url.scheme}://{url.netloc}")


def _ask(root: str) -> str | None:
    props = _get(f"{root}/props")
    if isinstance(props.get("build_info"), str) and "default_generation_settings" in props:
        weights = props.get("model_ftype")
        return _line(f"llama.cpp {props['build_info']}", f" {weights}" if isinstance(weights, str) else "")
    for path, name in (("/version", "vLLM"), ("/api/version", "Ollama")):
        version = _get(root + path).get("version")
        if isinstance(version, str) and version:
            return _line(name, f" {version}")
    return None


def _get(url: str) -> Mapping[str, Any]:
    """A JSON object, or an empty one; through no proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_WAIT_S) as answer:
            value = msgspec.json.decode(answer.read(_LARGEST + 1)[:_LARGEST])
    except (OSError, ValueError, RecursionError):  # HTTPError is an OSError, msgspec's errors are ValueErrors
        return {}
    return value if isinstance(value, dict) else {}


def _line(*parts: str) -> str:
    return _ODD.sub("", "".join(parts))[:80].strip()
