"""What server answers on this machine: llama.cpp, vLLM and Ollama say so when asked."""

from __future__ import annotations

import asyncio
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_WAIT_S = 3.0
_PAUSES = (0.2, 0.5, 1.0, 2.0)  # seconds, between tries: what a server is called must not depend on passing trouble
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
    root = f"{url.scheme}://{url.netloc}"
    props = await _patiently(f"{root}/props")
    if isinstance(props.get("build_info"), str) and "default_generation_settings" in props:
        weights = props.get("model_ftype")
        return _line(f"llama.cpp {props['build_info']}", f" {weights}" if isinstance(weights, str) else "")
    for path, name in (("/version", "vLLM"), ("/api/version", "Ollama")):
        version = (await _patiently(root + path)).get("version")
        if isinstance(version, str) and version:
            return _line(name, f" {version}")
    return None


async def _patiently(url: str) -> Mapping[str, Any]:
    """A JSON object, or an empty one where the server has none to give."""
    for pause in (*_PAUSES, None):
        value = await asyncio.to_thread(_get, url)
        if value is not None or pause is None:
            break
        await asyncio.sleep(pause)
    return value if isinstance(value, dict) else {}


def _get(url: str) -> object:
    """What stands at `url`, through no proxy; None if it may come when asked again."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_WAIT_S) as answer:
            text = answer.read(_LARGEST + 1)
            cut = len(text) <= _LARGEST and answer.length
        return None if cut else msgspec.json.decode(text[:_LARGEST])
    except urllib.error.HTTPError as error:
        return None if error.code in (408, 425, 429) or error.code >= 500 else {}
    except ConnectionRefusedError:
        return {}
    except (OSError, http.client.HTTPException):
        return None
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return {}


def _line(*parts: str) -> str:
    return _ODD.sub("", "".join(parts))[:80].strip()
