"""Teachers that run here: a GGUF file behind llama.cpp's server, or a Hugging Face model in `transformers`.

A local teacher is a white box: its tokenizer becomes the student's, and `WhiteBox` gives its exact next-token
distributions (data/store/capture.py). Text and logits must answer the same prompt, so conversations are rendered by
chat.py for both, whatever template the teacher's own files bring. To have a model answer in its own template, run
llama.cpp's `llama-server --jinja` (or vLLM) and name it as an endpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib.util
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from distill import chat
from distill.artifacts import atomic_dir, sha256_file, sha256_text
from distill.data.schema import Teacher
from distill.data.teacher.extras import teacher_extra
from distill.data.teacher.hf_transport import HfTransport, WhiteBox
from distill.data.teacher.spec import Spec, parse_spec
from distill.data.teacher.transport import Exchange, HttpTransport
from distill.errors import InputError, stage_main
from distill.tokenizer import Tokenizer

# what the readers of transformers and gguf raise over files that are not what they claim to be
_DAMAGE = (OSError, ValueError, LookupError, ArithmeticError, TypeError, RuntimeError, struct.error, SafetensorError)


def find_gguf(target: str) -> Path:
    """The GGUF file that `gguf:TARGET` names: a file, or the only one inside an installed package."""
    if Path(target).is_file():
        return Path(target)
    package = importlib.util.find_spec(target) if target.isidentifier() else None
    if package is None or not package.submodule_search_locations:
        raise InputError(f"--teacher gguf:{target}: neither a file nor an installed package")
    found = sorted(path for root in package.submodule_search_locations for path in Path(root).rglob("*.gguf"))
    if len(found) != 1:
        raise InputError(f"--teacher gguf:{target}: the package holds {len(found)} .gguf files, expected one")
    return found[0]


def idle_cores() -> int:
    """Threads for llama.cpp. They wait for each other by spinning: one more than there are idle cores, and two
    threads are 10 times slower than one (measured: 2 busy cores, 253 tokens/s fell to 10)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(round(cores - os.getloadavg()[0]), 1), cores)


def gguf_weights(path: Path) -> str:
    """The numeric format of a GGUF file's weights, such as Q4_1."""
    gguf = teacher_extra("gguf")
    try:
        field = gguf.GGUFReader(path).get_field("general.file_type")
        return "unknown" if field is None else gguf.LlamaFileType(field.contents()).name.removeprefix("MOSTLY_")
    except _DAMAGE as error:
        raise InputError(f"teacher {path}: not a whole GGUF file: {_line(error)}") from error


def _safetensors_sha256(folder: Path) -> str | None:
    """Of the weights in a folder: of the file where it is one, else of the shards' names and hashes."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) < 2:
        return sha256_file(files[0]) if files else None
    return sha256_text("\n".join(f"{file.name} {sha256_file(file)}" for file in files))


@functools.cache
def _folder(target: str) -> Path:
    """A local folder, or that of a model of the hub, fetched where it is not here, so that its weights stay."""
    if Path(target).is_dir():
        return Path(target)
    hub = teacher_extra("huggingface_hub")
    try:
        return Path(hub.snapshot_download(target, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
    except (OSError, ValueError, hub.errors.HFValidationError) as error:
        raise InputError(f"--teacher hf:{target}: not a folder, and cannot be fetched: {_line(error)}") from error


def identity_of(spec: Spec) -> Teacher:
    """Who a local teacher is, before anything is loaded."""
    if spec.kind == "gguf":
        path, weights = find_gguf(spec.target), gguf_weights(find_gguf(spec.target))
        return Teacher(
            "gguf", path.name, text_engine=f"llama.cpp ({weights})",
            logits_engine=f"transformers ({weights} dequantised)", weights=weights, weights_sha256=sha256_file(path),
        )  # fmt: skip
    name = Path(spec.target).name if Path(spec.target).is_dir() else spec.target
    return Teacher("hf", name, text_engine="transformers", logits_engine="transformers",
                   weights_sha256=_safetensors_sha256(_folder(spec.target)))  # fmt: skip


def _source(spec: Spec) -> tuple[str, dict[str, str]]:
    """Arguments of from_pretrained."""
    if spec.kind == "hf":
        return str(_folder(spec.target)), {}
    path = find_gguf(spec.target)
    return str(path.parent), {"gguf_file": path.name}


def load_tokenizer(spec: Spec) -> Tokenizer:
    """The teacher's tokenizer as ours. InputError where it lacks the ChatML control tokens."""
    folder, extra = _source(spec)
    if (Path(folder) / "tokenizer.json").is_file() and not extra:
        return Tokenizer.from_file(Path(folder) / "tokenizer.json")
    try:
        loaded = teacher_extra("transformers").AutoTokenizer.from_pretrained(folder, **extra)
    except _DAMAGE as error:
        raise InputError(f"teacher {spec.target}: cannot load its tokenizer: {_line(error)}") from error
    return Tokenizer.from_json(loaded.backend_tokenizer.to_str(), f"tokenizer of {spec.target}")


def load_white_box(spec: Spec, *, dtype: str = "float32") -> WhiteBox:
    """Load weights and tokenizer; a GGUF file is dequantised. On a GPU where there is one."""
    import torch

    folder, extra = _source(spec)
    tokenizer = load_tokenizer(spec)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = extra if extra else {"use_safetensors": True}
    try:
        model, found = teacher_extra("transformers").AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), trust_remote_code=False, output_loading_info=True, **options
        )
    except _DAMAGE as error:
        raise InputError(f"teacher {spec.target}: cannot load it: {_line(error)}") from error
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random ones
        raise InputError(f"teacher {spec.target}: {len(missing)} weights are missing, such as {missing[0]}")
    tokenizer.require_fits(model.get_input_embeddings().num_embeddings, f"teacher {spec.target}")
    return WhiteBox(model.eval().requires_grad_(False).to(device), tokenizer, device)


def export_teacher(teacher: str, folder: str | Path, *, dtype: str = "float32") -> Path:
    """Write a local teacher as a Hugging Face folder (config.json, model.safetensors, tokenizer.json).

    `distill.pretrained` reads it, so a student can start from its layers and be judged against it.
    """
    spec = parse_spec(teacher)
    if spec.kind == "endpoint":
        raise InputError(f"--teacher {teacher}: an endpoint has no weights to export")
    box = load_white_box(spec, dtype=dtype)
    box.model.config.__dict__.pop("quantization_config", None)  # the weights are dequantised now
    box.model.hf_quantizer = None
    with atomic_dir(folder) as temporary:
        box.model.save_pretrained(temporary)
        (temporary / "tokenizer.json").write_text(box.tokenizer.to_json(), encoding="utf-8")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chat.JINJA}
        (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return Path(folder)


class GgufTransport:
    """llama.cpp's own server in this process, on a loopback port, stopped by `close`."""

    def __init__(self, server: Any, http: HttpTransport, identity: Teacher) -> None:
        self.identity = identity
        self._server, self._http = server, http

    @classmethod
    async def start(cls, spec: Spec, identity: Teacher, *, concurrency: int, context: int, timeout_s: float,
                    deadline_s: float) -> GgufTransport:  # fmt: skip
        """Start the server with a slot of `context` tokens for each concurrent request."""
        params = server_params(find_gguf(spec.target), slots=concurrency, context=context)
        server = await asyncio.to_thread(start_server, params)
        # the bare /completions is llama.cpp's own, of another form
        http = await HttpTransport.connect(
            f"{server.listening_address}/v1", path="completions", timeout_s=timeout_s, deadline_s=deadline_s,
            connections=concurrency,
        )  # fmt: skip
        return cls(server, http, identity)

    async def post(self, body: Mapping[str, Any], *, stream: bool = False) -> Exchange:
        """Send one request; see Transport."""
        return await self._http.post(body, stream=stream)

    def distrust(self) -> None:
        """See Transport."""
        self._http.distrust()

    async def close(self) -> None:
        """Close the connections and stop the server."""
        await self._http.close()
        self._server = None  # its destructor stops the threads


def server_params(path: Path, *, slots: int, context: int) -> Any:
    """Settings of llama.cpp's server on a free loopback port: `slots` requests at a time, of `context` tokens each."""
    params = teacher_extra("xllamacpp").CommonParams()
    params.model.path, params.model_alias = str(path), {path.name}
    params.n_parallel, params.n_ctx = slots, slots * context
    params.port, params.verbosity, params.ui = 0, 0, False
    params.cache_ram_mib = 0  # else it keeps up to 8 GiB of finished conversations
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = idle_cores()
    # a request names temperature and top_p: nothing else may narrow what it samples from
    params.sampling.top_k, params.sampling.min_p = 0, 0.0
    return params


def start_server(params: Any) -> Any:
    """llama.cpp's server at its `listening_address`; it stops when the object goes."""
    try:
        return teacher_extra("xllamacpp").Server(params)
    except RuntimeError as error:
        raise InputError(f"teacher {params.model.path}: llama.cpp cannot load it: {_line(error)}") from error


async def open_local(
    spec: Spec, identity: Teacher, *, concurrency: int, context: int, timeout_s: float, deadline_s: float, dtype: str
) -> GgufTransport | HfTransport:
    """Start a local teacher. Both take completions requests: our own rendering of a conversation, so that the text and
    the logits are answers to the same prompt, whatever template a file brings."""
    if spec.kind == "gguf":
        return await GgufTransport.start(
            spec, identity, concurrency=concurrency, context=context, timeout_s=timeout_s, deadline_s=deadline_s
        )
    return HfTransport(await asyncio.to_thread(load_white_box, spec, dtype=dtype), identity, batch=concurrency)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Write a local teacher as a Hugging Face folder."""
    parser = argparse.ArgumentParser(
        prog="distill teacher", description="A local teacher as a Hugging Face folder, for a student's first weights."
    )
    parser.add_argument("--teacher", required=True, help="gguf:FILE-or-package, hf:org/model or a folder")
    parser.add_argument("--out", default="models/teacher", help="folder to write (default: models/teacher)")
    args = parser.parse_args(argv)
    folder = export_teacher(args.teacher, args.out)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.0f} MB")
    return 0
