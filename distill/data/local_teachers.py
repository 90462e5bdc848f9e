"""Teachers that run here: a GGUF file behind llama.cpp's server, or a Hugging Face model in `transformers`.

A local teacher is a white box: its tokenizer becomes the student's, conversations are rendered by chat.py for text
and for logits alike, and `WhiteBox` gives its exact next-token distributions (distill/data/capture.py).
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill import chat
from distill.artifacts import atomic_dir, sha256_file
from distill.data.extras import teacher_extra
from distill.data.schema import Teacher, Usage
from distill.data.teachers import Answer, Endpoint, Sampling, Spec, parse_spec
from distill.errors import InputError, stage_main
from distill.tokenizer import Tokenizer


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
    field = gguf.GGUFReader(path).get_field("general.file_type")
    return "unknown" if field is None else gguf.LlamaFileType(field.contents()).name.removeprefix("MOSTLY_")


def identity_of(spec: Spec) -> Teacher:
    """Who a local teacher is, before anything is loaded."""
    if spec.kind == "gguf":
        path, weights = find_gguf(spec.target), gguf_weights(find_gguf(spec.target))
        return Teacher(
            "gguf", path.name, text_engine=f"llama.cpp ({weights})",
            logits_engine=f"transformers ({weights} dequantised)", weights=weights, weights_sha256=sha256_file(path),
        )  # fmt: skip
    name = Path(spec.target).name if Path(spec.target).is_dir() else spec.target
    weights_file = Path(spec.target) / "model.safetensors"
    return Teacher(
        "hf", name, text_engine="transformers", logits_engine="transformers",
        weights_sha256=sha256_file(weights_file) if weights_file.is_file() else None,
    )  # fmt: skip


def _source(spec: Spec) -> tuple[str, dict[str, str]]:
    """Arguments of from_pretrained."""
    if spec.kind == "hf":
        return spec.target, {}
    path = find_gguf(spec.target)
    return str(path.parent), {"gguf_file": path.name}


def load_tokenizer(spec: Spec) -> Tokenizer:
    """The teacher's tokenizer as ours. InputError where it lacks the ChatML control tokens."""
    folder, extra = _source(spec)
    if (Path(folder) / "tokenizer.json").is_file() and not extra:
        return Tokenizer.from_file(Path(folder) / "tokenizer.json")
    try:
        loaded = teacher_extra("transformers").AutoTokenizer.from_pretrained(folder, **extra)
    except (OSError, ValueError) as error:
        raise InputError(f"teacher {spec.target}: cannot load its tokenizer: {_line(error)}") from error
    return Tokenizer.from_json(loaded.backend_tokenizer.to_str(), f"tokenizer of {spec.target}")


class WhiteBox(NamedTuple):
    """A teacher in `transformers`, whose logits can be read."""

    model: Any
    tokenizer: Tokenizer
    device: str


def load_white_box(spec: Spec, *, dtype: str = "float32") -> WhiteBox:
    """Load weights and tokenizer; a GGUF file is dequantised. On a GPU where there is one."""
    import torch

    folder, extra = _source(spec)
    tokenizer = load_tokenizer(spec)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = extra if extra else {"use_safetensors": True}
    try:
        model = teacher_extra("transformers").AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), trust_remote_code=False, **options
        )
    except (OSError, ValueError) as error:
        raise InputError(f"teacher {spec.target}: cannot load it: {_line(error)}") from error
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


class GgufTeacher:
    """llama.cpp's own server on a loopback port, started here and stopped by `close`."""

    def __init__(self, server: Any, endpoint: Endpoint) -> None:
        self._server, self._endpoint = server, endpoint
        self.identity = endpoint.identity

    @classmethod
    async def start(cls, spec: Spec, *, identity: Teacher, concurrency: int, context: int, timeout_s: float,
                    attempts: int) -> GgufTeacher:  # fmt: skip
        """Start the server with one slot a concurrent request."""
        xllamacpp = teacher_extra("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(find_gguf(spec.target))
        params.n_parallel, params.n_ctx = concurrency, concurrency * context
        params.port, params.verbosity = 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = idle_cores()
        try:
            server = await asyncio.to_thread(xllamacpp.Server, params)
        except RuntimeError as error:
            raise InputError(f"teacher gguf:{spec.target}: llama.cpp cannot load it: {_line(error)}") from error
        endpoint = await Endpoint.connect(
            f"{server.listening_address}/v1",  # the bare /completions is llama.cpp's own, of another form
            model=identity.model, timeout_s=timeout_s, attempts=attempts,
            concurrency=concurrency, raw=True, identity=identity,
        )  # fmt: skip
        return cls(server, endpoint)

    async def ask(self, messages: Sequence[chat.Message], sampling: Sampling, seed: int) -> Answer:
        """Answer one conversation."""
        return await self._endpoint.ask(messages, sampling, seed)

    async def close(self) -> None:
        """Stop the server."""
        await self._endpoint.close()
        self._server = None  # its destructor stops the threads


class _Batch:
    """Requests that will be generated together, and the task that does it."""

    def __init__(self) -> None:
        self.items: list[tuple[Sequence[chat.Message], Sampling, int]] = []
        self.task: asyncio.Task[list[Answer]] | None = None


class HfTeacher:
    """A model in `transformers`; requests that wait while one batch is generated form the next."""

    def __init__(self, box: WhiteBox, identity: Teacher, batch: int) -> None:
        self.identity = identity
        self._box, self._size = box, batch
        self._open: _Batch | None = None
        self._busy = asyncio.Lock()

    async def ask(self, messages: Sequence[chat.Message], sampling: Sampling, seed: int) -> Answer:
        """Answer one conversation."""
        if self._open is None or len(self._open.items) >= self._size:
            self._open = _Batch()
        batch = self._open
        batch.items.append((messages, sampling, seed))
        index = len(batch.items) - 1
        if batch.task is None:
            batch.task = asyncio.create_task(self._run(batch))
        return (await batch.task)[index]

    async def _run(self, batch: _Batch) -> list[Answer]:
        async with self._busy:
            await asyncio.sleep(0)  # let everyone who is ready join
            if self._open is batch:
                self._open = None
            conversations = [item[0] for item in batch.items]
            return await asyncio.to_thread(self._generate, conversations, batch.items[0][1], batch.items[0][2])

    def _generate(self, conversations: Sequence[Sequence[chat.Message]], sampling: Sampling, seed: int) -> list[Answer]:
        import torch

        tokenizer = self._box.tokenizer
        prompts = [chat.encode(tokenizer, messages, add_generation_prompt=True).ids for messages in conversations]
        width = max(len(ids) for ids in prompts)
        ids_BT = torch.tensor([[tokenizer.pad] * (width - len(ids)) + ids for ids in prompts])
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        torch.manual_seed(seed)
        choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if sampling.temperature > 0:
            choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        with torch.inference_mode():
            out = self._box.model.generate(
                ids_BT.to(self._box.device), attention_mask=mask_BT.to(self._box.device),
                max_new_tokens=sampling.max_tokens, eos_token_id=sorted(tokenizer.stop_ids),
                pad_token_id=tokenizer.pad, **choice,
            )  # fmt: skip
        return [_cut(row.tolist(), len(ids), tokenizer) for row, ids in zip(out[:, width:], prompts)]

    async def close(self) -> None:
        """Let the batch that is running finish."""
        async with self._busy:
            pass


def _cut(ids: list[int], n_prompt: int, tokenizer: Tokenizer) -> Answer:
    """Generated ids up to the first stop token."""
    end = next((i for i, token in enumerate(ids) if token in tokenizer.stop_ids), None)
    text = tokenizer.decode(ids if end is None else ids[:end])
    n = len(ids) if end is None else end + 1
    return Answer(text, finish="length" if end is None else "stop", usage=Usage(n_prompt, n))


async def open_local(
    spec: Spec, identity: Teacher, *, concurrency: int, context: int, timeout_s: float, attempts: int, dtype: str
) -> GgufTeacher | HfTeacher:
    """Start a local teacher."""
    if spec.kind == "gguf":
        return await GgufTeacher.start(
            spec, identity=identity, concurrency=concurrency, context=context, timeout_s=timeout_s, attempts=attempts
        )
    return HfTeacher(load_white_box(spec, dtype=dtype), identity, concurrency)


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
