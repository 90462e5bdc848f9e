"""A student too large for one package: some of its blocks in each, every function and a state of its own in all.

    distill package --chunks 2 --checkpoint C --out X.mlpackage --context 2048 --prefill 64

writes X_chunk0.mlpackage, X_chunk1.mlpackage, ... and X.chunks.json, which says how one feeds the next: the first takes
`input_ids`, those between pass `hidden` (1,D,1,S) on, the last gives `logits`; all take `position`. Weights are mapped
from the checkpoint, and those of one chunk at a time are converted. With the embedding on the host the first takes
`inputs_embeds` (1,D,1,S), and X.embedding.safetensors holds the table.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from distill import checkpoint
from distill.artifacts import atomic_file, require_replaceable, sha256_file, write_json
from distill.contract import FileRef, TensorSpec, Weight
from distill.convert import coreml
from distill.convert.package import WEIGHT_FILE, save_package
from distill.convert.plan import require_ids, split
from distill.errors import InputError
from distill.export import goldens, programs
from distill.export.deployed import deploy, promised, tables_of_matrices
from distill.export.twin import CachedTwin
from distill.formats import Formats, stored_bytes
from distill.model import Blocks, ModelConfig, Student
from distill.versions import import_coremltools, quiet, versions


class ChunksConfig(NamedTuple):
    """What to build."""

    checkpoint: Path
    out: Path
    context: int
    prefill: tuple[int, ...] = ()
    chunks: int = 2
    formats: Formats | None = None
    host_embedding: bool = False


class Part(msgspec.Struct, frozen=True):
    """One package of a chunked student."""

    file: str
    weight_sha256: str
    first: int
    last: int
    """Blocks `first` to `last`, this one not included."""
    input: str
    output: str


class Chunks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """X.chunks.json: the packages in the order in which they run."""

    schema: str
    context: int
    prefill: list[int]
    model_config: ModelConfig
    tokenizer_sha256: str
    parts: list[Part]
    embedding: FileRef | None
    """The table of an embedding on the host, [V,D] in fp16."""
    versions: dict[str, str]


class ChunkTwin(CachedTwin):
    """Blocks of a student, and the embedding before or the head after them: the student given has these blocks only."""

    def __init__(self, student: Student, context: int, seq: int, *, embeds: bool, heads: bool) -> None:
        super().__init__(student, context, seq)
        self.heads = heads
        self.embeds = embeds

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """(1,S) ids, or (1,D,1,S) as they are."""
        return super().embed_tokens(input_ids) if self.embeds else input_ids

    def logits(self, x: Tensor) -> Tensor:
        """(1,S,V), or (1,D,1,S) as they are."""
        return super().logits(x) if self.heads else x


class _Interface(NamedTuple):
    """What conversion asks of a contract."""

    name: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    states: list[TensorSpec]
    model_config: ModelConfig
    weights: dict[str, Weight]
    tables: FileRef | None


def build(config: ChunksConfig, say: Callable[[str], None] = print) -> Path:
    """Build all packages, then the file that names them; returns that file. InputError for bad input."""
    if config.out.suffix != ".mlpackage":
        raise InputError(f"--out {config.out}: a Core ML package's name ends in .mlpackage")
    ct = import_coremltools()
    loaded = checkpoint.load(config.checkpoint, mmap=True)
    model = loaded.student.config
    _check(config, model)
    used = config.formats or loaded.formats or Formats()
    layer = {name: p.shape for name, p in loaded.student.model.layers[0].named_parameters()}
    sizes = [stored_bytes(used.of("", len(shape)), tuple(shape)) for shape in layer.values() if len(shape) == 2]
    ends = stored_bytes(used.of("model.embed_tokens.weight"), (model.vocab_size, model.hidden_size))
    spans = split(model.num_hidden_layers, config.chunks, sum(sizes), 0 if config.host_embedding else ends, ends)
    names = [f"{config.out.stem}_chunk{index}.mlpackage" for index in range(len(spans))]
    for name in names:
        require_replaceable(config.out.with_name(name))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{config.out.stem}.", dir=config.out.parent) as staging:
        parts = []
        for name, (first, last) in zip(names, spans, strict=True):
            say(f"{name}: blocks {first} to {last - 1} of {model.num_hidden_layers}")
            parts.append(_chunk(ct, config, Path(staging) / name, first, last))
            gc.collect()  # its program, whose operators refer to each other
        embedding = _table(config.out, loaded.student) if config.host_embedding else None
        for name in names:  # all are whole; the file that names them is last
            target = config.out.with_name(name)
            if target.exists():
                shutil.rmtree(target)
            (Path(staging) / name).rename(target)
    listed = Chunks("distill-chunks/1", config.context, list(config.prefill), model, loaded.tokenizer.sha256, parts,
                    embedding, versions())  # fmt: skip
    return write_json(config.out.with_suffix(".chunks.json"), msgspec.to_builtins(listed))


def _check(config: ChunksConfig, model: ModelConfig) -> None:
    if config.context > model.max_position_embeddings or config.context < 2:
        raise InputError(f"--context {config.context}: the model's max_position_embeddings is "
                         f"{model.max_position_embeddings}")  # fmt: skip
    if bad := [t for t in config.prefill if not 2 <= t <= config.context]:
        raise InputError(f"--prefill {bad}: lengths must be at least 2 and no longer than {config.context}")
    require_ids(model, host_embedding=config.host_embedding)


def _table(out: Path, student: Student) -> FileRef:
    path = out.with_suffix(".embedding.safetensors")
    with atomic_file(path) as temporary:
        save_file({"embedding": student.model.embed_tokens.weight.detach().half()}, temporary)
    return programs.file_ref(path)


def _chunk(ct: Any, config: ChunksConfig, out: Path, first: int, last: int) -> Part:
    """Convert one chunk, from weights that are mapped anew, so that nothing of another chunk is in memory."""
    from distill.convert.functions import Merged

    loaded = checkpoint.load(config.checkpoint, mmap=True)
    whole = loaded.student.config
    embeds, heads = first == 0 and not config.host_embedding, last == whole.num_hidden_layers
    student = loaded.student
    student.model.layers = Blocks(list(student.model.layers)[first:last])
    student.config = msgspec.structs.replace(whole, num_hidden_layers=last - first)
    student.float().eval()
    loaded = loaded._replace(tables=_renumbered(loaded.tables, first, last))
    with tempfile.TemporaryDirectory(prefix="distill.chunk.") as name:
        folder = Path(name)
        weights, ref = _weights(loaded, config, student, folder, embeds, heads)
        models = {}
        for function, seq in {"decode": 1, **{f"prefill_{t}": t for t in config.prefill}}.items():
            twin = ChunkTwin(student, config.context, seq, embeds=embeds, heads=heads)
            interface = _interface(out.stem, student.config, seq, config, (first == 0, embeds, heads), weights, ref)
            kind = torch.int32 if embeds else torch.float32
            example = (torch.zeros(interface.inputs[0].shape, dtype=kind), torch.zeros(1, dtype=torch.int32))
            traced = programs.trace(twin, example)
            traced.kv.zero_()
            models[function] = folder / f"{function}.mlpackage"
            with quiet(), coreml.one_line(out.name):
                model = coreml.lower(ct, traced, interface, folder)
                coreml.check_state_writes(model, interface)
                model.save(str(models[function]))
            del traced, twin, model
            gc.collect()
        save_package(Merged(ct, models), out, None, None)
    names = interface.inputs[0].name, interface.outputs[0].name
    return Part(out.name, sha256_file(out / WEIGHT_FILE), first, last, *names)


def _renumbered(tables: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """Those of some blocks, counted from 0, and of what is in no block."""
    prefix = "model.layers."
    out = {name: table for name, table in tables.items() if not name.startswith(prefix)}
    for layer in range(first, last):
        own = f"{prefix}{layer}."
        out |= {f"{prefix}{layer - first}.{name.removeprefix(own)}": table
                for name, table in tables.items() if name.startswith(own)}  # fmt: skip
    return out


def _weights(
    loaded: Any, config: ChunksConfig, student: Student, folder: Path, embeds: bool, heads: bool
) -> tuple[dict[str, Weight], FileRef | None]:
    """The weights that the chunk's programs hold, and the file of their tables."""

    def inside(name: str) -> bool:
        return embeds if name.startswith("embed.") else heads if name.startswith("head_") else True

    formats, tables = deploy(loaded, config.formats)
    if formats is None:
        return {}, None
    kept = {name: table for name, table in tables_of_matrices(student, formats, tables).items() if inside(name)}
    weights = {name: weight for name, weight in promised(student, formats).items() if inside(name)}
    ref = programs.file_ref(goldens.write_goldens(folder / "tables.safetensors", kept)) if kept else None
    return weights, ref


def _interface(
    name: str, model: ModelConfig, seq: int, config: ChunksConfig, place: tuple[bool, bool, bool],
    weights: dict[str, Weight], ref: FileRef | None,
) -> _Interface:  # fmt: skip
    first, embeds, heads = place
    hidden = [1, model.hidden_size, 1, seq]
    given = TensorSpec("inputs_embeds" if first else "hidden", hidden, "float16")
    logits = TensorSpec("logits", [1, seq, model.vocab_size], "float16")
    made = logits if heads else TensorSpec("hidden_out", hidden, "float16")
    kv = [2 * model.num_hidden_layers, model.num_key_value_heads, config.context, model.head_dim]
    return _Interface(
        name, [TensorSpec("input_ids", [1, seq], "int32") if embeds else given, TensorSpec("position", [1], "int32")],
        [made], [TensorSpec("kv", kv, "float16")], model, weights, ref,
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """`distill package --chunks N`."""
    if args.context is None:
        raise InputError("--chunks and --host-embedding need --context")
    prefill = tuple(sorted(set(args.prefill)))
    config = ChunksConfig(
        args.checkpoint, args.out, args.context, prefill, args.chunks, args.formats, args.host_embedding
    )
    listed = build(config, lambda line: print(line, flush=True))
    print(f"wrote {listed} and its {args.chunks} package{'s' * (args.chunks > 1)}")
    return 0
