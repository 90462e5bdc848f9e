"""Which teacher is meant and how it decodes. transport.py reaches an endpoint, local.py starts a model here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec

from distill.errors import InputError

KEY_VARIABLES = ("TEACHER_API_KEY", "MOONSHOT_API_KEY", "OPENAI_API_KEY")


class Spec(NamedTuple):
    """A parsed `--teacher`: an endpoint's URL, a GGUF file, or a Hugging Face name or folder."""

    kind: Literal["endpoint", "gguf", "hf"]
    target: str


class Sampling(msgspec.Struct, frozen=True):
    """How the teacher decodes."""

    max_tokens: int
    temperature: float
    top_p: float


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


def api_key() -> str:
    """The endpoint's key from the environment, or an empty string."""
    name = _variable()
    return os.environ[name] if name else ""


def key_in_use() -> str:
    """Where the key came from, for whoever is told that it is refused."""
    name = _variable()
    return f"the key is from {name}" if name else f"no key is set in {', '.join(KEY_VARIABLES)}"


def _variable() -> str | None:
    return next((name for name in KEY_VARIABLES if os.environ.get(name)), None)
