"""What a package of a student will hold and cost, before anything is built: nothing is loaded, no weight is read.

    distill package --plan --config configs/worker_9b.yaml --context 4096 --prefill 64 512 --platform ios

Without --context and --prefill, those of `export.seq` in the configuration.

Bytes are those of weight.bin and of the states, to the byte but for constants that happen to be equal, which Core ML
keeps once. What the platforms take is not documented by Apple in full: every limit names its source, and those on which
sources disagree are arguments. Time and memory of the conversion come from a measured line (docs/packages.md).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from distill import checkpoint
from distill.artifacts import write_json
from distill.config import load_yaml
from distill.errors import CheckpointError, ConfigError, InputError, stage_main
from distill.export.deployed import parse_formats
from distill.export.twin import HEAD_SLICE
from distill.formats import Format, Formats, stored_bytes
from distill.model import ModelConfig

_GB, _MIB = 10**9, 1 << 20
_RECORD, _IN_FILE = 64, 10
"""Of weight.bin: bytes of a record and what data is aligned to; elements from which a constant goes there."""


class Limits(NamedTuple):
    """What a chunk may be."""

    chunk_bytes: int
    layers: int | None
    """Blocks of a chunk; None: any number."""
    ids: int = 65_535
    """Token ids that the graph's own embedding can look up."""


LIMITS = {"ios": Limits(1 * _GB, 15), "macos": Limits(2 * _GB, None)}
SOURCES = {
    "chunk_bytes": "about 1 GB a file on iOS, 2 GB on macOS (Anemll); others: below 2 GB on iOS (Apple, coreai-models "
    "guidance.md), 250 MB is reliable and 1 GB compiled fails with -14 (ane-book, chapter 4)",
    "layers": "about 15 blocks a chunk on iPhone (CoreML-LLM, EXPERIMENTS); of macOS none says so; fewer chunks are "
    "faster: 4 to 3 gave +8.2 % (the same)",
    "ids": "the Neural Engine takes ids as uint16 (executorch, PR 7616)",
    "head_slice": "at most 16,384 in a dimension (Anemll, llama_model.py; 0seba, export_utils.py); but 262,144 ran "
    "whole, 4.6 % faster than in 16 slices (CoreML-LLM, LMSPLIT_FINALISE)",
    "state": "one state a chunk is safe, three fail (CoreML-LLM, MLSTATE_PATTERN); its dimensions in multiples of 32 "
    "(coremltools issue 2631)",
    "formats": "int8 and int4 by channel, palettes of 2, 4, 6 and 8 bits (Apple, coreai-models guidance.md); int4 by "
    "block may run on the CPU without a word (ane-book, chapter 3)",
    "floor": "2 blocks of width 128 were eligible and none was placed, 6 of width 384 were (ask-meridian.uk)",
}
"""Where each limit comes from; none was measured on Apple hardware here."""


class Chunk(NamedTuple):
    """A package of some of the blocks."""

    first: int
    last: int
    """Blocks `first` to `last`, this one not included."""
    weights: int
    """Bytes of its weight.bin."""
    state: int
    """Bytes of its keys and values."""


class Conversion(NamedTuple):
    """An estimate: peaks of the process above its imports, and processor time on one core."""

    peak: int
    seconds: float


class Plan(NamedTuple):
    """What `plan` found."""

    config: ModelConfig
    formats: Formats
    context: int
    prefill: tuple[int, ...]
    platform: str
    limits: Limits
    parts: dict[str, int]
    """Bytes in weight.bin by part, each once, however many functions read it."""
    chunks: list[Chunk]
    host_embedding: bool
    host_bytes: int
    """Of the table beside the package."""
    conversion: Conversion
    notes: list[str]

    @property
    def functions(self) -> list[str]:
        """Of every chunk."""
        return ["decode", *(f"prefill_{t}" for t in self.prefill)]

    def table(self) -> str:
        """A line a part, a line a chunk, then what to know."""
        c, f = self.config, self.formats
        head = f.head or f.embedding
        lines = [
            f"student     {c.n_params():,} parameters, {c.num_hidden_layers} blocks of width {c.hidden_size}, "
            f"{c.vocab_size:,} ids, {'tied' if c.tie_word_embeddings else 'untied'}",
            f"formats     blocks {f.blocks}, embedding {f.embedding}, head {head}",
            f"functions   {', '.join(self.functions)} over a context of {self.context:,}",
        ]
        lines += [f"{name:11s} {size:>15,} bytes" for name, size in self.parts.items()]
        lines.append(f"{'weight.bin':11s} {sum(x.weights for x in self.chunks):>15,} bytes in {len(self.chunks)} "
                     f"package{'s' * (len(self.chunks) > 1)}")  # fmt: skip
        lines.append(f"{'state':11s} {sum(x.state for x in self.chunks):>15,} bytes of keys and values, fp16")
        if self.host_embedding:
            lines.append(f"{'host':11s} {self.host_bytes:>15,} bytes of embedding beside the package, fp16")
        lines += [f"chunk {i}     blocks {x.first} to {x.last - 1}: {x.weights:,} bytes, state {x.state:,}"
                  for i, x in enumerate(self.chunks)]  # fmt: skip
        lines.append(f"conversion  about {self.conversion.peak / _MIB:,.0f} MiB above the imports, "
                     f"{self.conversion.seconds:,.0f} s of one core: estimated, {MEASURED}")  # fmt: skip
        return "\n".join(lines + [f"note        {note}" for note in self.notes])

    def to_json(self) -> dict[str, Any]:
        """Plain values, the sources among them."""
        return json.loads(msgspec.json.encode(self._asdict() | {"functions": self.functions, "sources": SOURCES}))


def plan(
    config: ModelConfig,
    formats: Formats | None = None,
    *,
    context: int,
    prefill: tuple[int, ...] = (),
    platform: Literal["ios", "macos"] = "ios",
    limits: Limits | None = None,
    head_slice: int = HEAD_SLICE,
    host_embedding: bool | None = None,
) -> Plan:
    """Plan the packages of a student. `host_embedding` None: only where the graph cannot look up its ids.

    InputError where no number of chunks fits; ConfigError where a weight cannot be stored as asked.
    """
    formats, limits = formats or Formats(), limits or LIMITS[platform]
    host = config.vocab_size > limits.ids if host_embedding is None else host_embedding
    outer, block, tables = (
        _outer(config, formats, head_slice),
        _block(config, formats),
        _tables(config, context, prefill),
    )
    if host:
        outer["embedding"] = 0
    chunks = _chunks(config, outer, block, tables, limits, context)
    parts = {
        **outer, "blocks": config.num_hidden_layers * block["blocks"],
        "norms": config.num_hidden_layers * block["norms"] + outer["norms"],
        **{name: size * len(chunks) for name, size in tables.items()}, "headers": _RECORD * len(chunks),
    }  # fmt: skip
    table = 2 * config.vocab_size * config.hidden_size if host else 0
    cost = _conversion(config, len(prefill) + 1, len(chunks))
    return Plan(config, formats, context, prefill, platform, limits, parts, chunks, host, table, cost,
                _notes(config, formats, context, platform, limits, head_slice, host))  # fmt: skip


def require_ids(config: ModelConfig, *, host_embedding: bool) -> None:
    """InputError where the graph would look up more ids than it can."""
    most = LIMITS["ios"].ids
    if config.vocab_size > most and not host_embedding:
        raise InputError(f"{config.vocab_size:,} ids, but the graph's own embedding can look up {most:,} "
                         f"({SOURCES['ids']}): give --host-embedding")  # fmt: skip


def split(layers: int, chunks: int, block: int, first: int, last: int) -> list[tuple[int, int]]:
    """Blocks of each chunk, so that the largest is as small as can be. `first`, `last`: bytes besides blocks."""
    if not 1 <= chunks <= layers:
        raise InputError(f"--chunks {chunks}: a chunk has a block at least, and there are {layers}")
    counts, sizes = [1] * chunks, [block] * chunks
    sizes[0] += first
    sizes[-1] += last
    for _ in range(layers - chunks):
        least = min(range(chunks), key=lambda i: sizes[i])
        counts[least] += 1
        sizes[least] += block
    ends = [sum(counts[: i + 1]) for i in range(chunks)]
    return [(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _chunks(
    config: ModelConfig,
    outer: dict[str, int],
    block: dict[str, int],
    tables: dict[str, int],
    limits: Limits,
    context: int,
) -> list[Chunk]:
    each, extra = sum(block.values()), _RECORD + sum(tables.values())
    for n in range(1, config.num_hidden_layers + 1):
        ends = (outer["embedding"], outer["head"] + outer["norms"])
        made = []
        for i, (first, last) in enumerate(split(config.num_hidden_layers, n, each, *ends)):
            size = (last - first) * each + extra + (ends[0] if i == 0 else 0) + (ends[1] if i == n - 1 else 0)
            made.append(Chunk(first, last, size, state_bytes(config, last - first, context)))
        longest = max(x.last - x.first for x in made)
        if max(x.weights for x in made) <= limits.chunk_bytes and longest <= (limits.layers or longest):
            return made
    raise InputError(f"no chunk of {limits.chunk_bytes:,} bytes holds a block beside the embedding or the head: "
                     "keep the embedding on the host, or store them in fewer bits")  # fmt: skip


def state_bytes(config: ModelConfig, layers: int, context: int) -> int:
    """Keys and values of some blocks, fp16."""
    return 2 * layers * config.num_key_value_heads * context * config.head_dim * 2


def _record(elements: int, bits: int = 16) -> int:
    size = (elements * bits + 7) // 8
    return _RECORD + -(-size // _RECORD) * _RECORD if elements >= _IN_FILE else 0


def _outer(config: ModelConfig, formats: Formats, head_slice: int) -> dict[str, int]:
    v, d = config.vocab_size, config.hidden_size
    embedding = formats.of("model.embed_tokens.weight")
    head = embedding if config.tie_word_embeddings else formats.of("lm_head.weight")
    slices = [min(head_slice, v - first) for first in range(0, v, head_slice)]
    return {
        "embedding": stored_bytes(embedding, (v, d)),
        "head": sum(_slice_bytes(head, (rows, d)) for rows in slices),
        "norms": _record(d),
    }


def _slice_bytes(form: Format, shape: tuple[int, int]) -> int:
    form.require_fits(shape, "head")
    return stored_bytes(form, shape)


def _block(config: ModelConfig, formats: Formats) -> dict[str, int]:
    """Bytes of one block's matrices with their biases, and of its norms."""
    d, f, n = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * n, config.num_key_value_heads * n
    form = Format.parse(formats.blocks)
    shapes = [(q, d), (kv, d), (kv, d), (d, q), (f, d), (f, d), (d, f)]
    biases = [q, kv, kv] * config.attention_bias + [d] * config.output_bias + [f, f, d] * config.mlp_bias
    return {
        "blocks": sum(stored_bytes(form, shape) for shape in shapes) + sum(map(_record, biases)),
        "norms": 2 * _record(d) + 2 * _record(n) * config.qk_norm,
    }


def _tables(config: ModelConfig, context: int, prefill: tuple[int, ...]) -> dict[str, int]:
    """Four tables of RoPE, and of the mask its positions and both of its values, which all functions share, and each
    prefill's offsets."""
    return {
        "rope": 4 * _record(context * config.head_dim),
        "mask": _record(context, 32) + 2 * _record(context) + sum(_record(t, 32) for t in prefill),
    }


MEASURED = "a line through SmolLM2-135M's dimensions at 4 to 30 blocks, one core of a shared x86 server"
_SECONDS, _SECONDS_A_BLOCK, _SECONDS_A_GB = 1.9, 0.82, 6.5
_OF_BLOCKS, _OF_TIED, _OF_UNTIED = 1.15, 2.2, 1.3
"""Peak over fp32 weights. A tied embedding is converted as a table and as a head."""


def _conversion(config: ModelConfig, functions: int, chunks: int) -> Conversion:
    """Of all functions, one after another, the weights of one chunk at a time. Merging them is not counted."""
    weights, copies = 4 * config.n_params(), 1 if config.tie_word_embeddings else 2
    outer = 4 * config.vocab_size * config.hidden_size * copies
    peak = _OF_BLOCKS * (weights - outer) / chunks + (_OF_TIED if copies == 1 else _OF_UNTIED) * outer
    seconds = _SECONDS * chunks + _SECONDS_A_BLOCK * config.num_hidden_layers + _SECONDS_A_GB * weights / _GB
    return Conversion(int(peak), functions * seconds)


def _notes(
    config: ModelConfig, formats: Formats, context: int, platform: str, limits: Limits, head_slice: int, host: bool
) -> list[str]:
    notes = [f"limits of {platform}: {limits.chunk_bytes:,} bytes a package ({SOURCES['chunk_bytes']}); "
             f"{limits.layers or 'any number of'} blocks ({SOURCES['layers']})"]  # fmt: skip
    if config.vocab_size > limits.ids:
        way = "the embedding is on the host" if host else "the graph's embedding cannot look them all up"
        notes.append(f"{config.vocab_size:,} ids, the limit is {limits.ids:,}: {way} ({SOURCES['ids']})")
    if config.vocab_size > head_slice:
        notes.append(
            f"head in {math.ceil(config.vocab_size / head_slice)} slices of {head_slice:,}: {SOURCES['head_slice']}"
        )
    if context % 32 or config.head_dim % 32:
        notes.append(
            f"state: context {context} and head width {config.head_dim} are not multiples of 32: {SOURCES['state']}"
        )
    blockwise = [
        text for text in {formats.blocks, formats.embedding, formats.head or "fp16"} if text.startswith("int4/")
    ]
    if platform == "ios" and blockwise:
        notes.append(f"{', '.join(blockwise)}: {SOURCES['formats']}")
    if config.num_hidden_layers < 6 or config.hidden_size < 384:
        notes.append(f"a model this small may not be placed on the Neural Engine at all: {SOURCES['floor']}")
    return notes


def _of_config(path: Path) -> tuple[ModelConfig, list[int], Formats | None]:
    data = load_yaml(path)
    try:
        model = msgspec.convert(data.get("model"), ModelConfig)
        lengths = msgspec.convert((data.get("export") or {}).get("seq") or [], list[int])
        formats = msgspec.convert((data.get("quantisation") or {}).get("formats"), Formats | None)
    except (msgspec.ValidationError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return model, lengths, formats


def _of_checkpoint(path: Path) -> tuple[ModelConfig, list[int], Formats | None]:
    """Its configuration, and the formats that it was trained in: the weights are mapped, and not read."""
    data = checkpoint.read(path, mmap=True)
    try:
        model = msgspec.convert(data.get("config"), ModelConfig)
        formats = msgspec.convert(data.get("formats"), Formats | None)
    except (msgspec.ValidationError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    trained = data.get("provenance", {}).get("config", {})
    return model, (trained.get("export") or {}).get("seq") or [], formats


def parser() -> argparse.ArgumentParser:
    """Of `distill package --plan`."""
    out = argparse.ArgumentParser(prog="distill package --plan", description=(__doc__ or "").splitlines()[0])
    source = out.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, help="a training configuration with a `model`")
    source.add_argument("--checkpoint", type=Path, help="a trained student; its weights are not read")
    out.add_argument("--context", type=int, metavar="C", help="positions (default: the longest of export.seq)")
    out.add_argument("--prefill", type=int, nargs="+", default=[], metavar="T", help="tokens of each prefill")
    out.add_argument(
        "--formats",
        type=parse_formats,
        metavar="blocks=int4/32,embedding=int8",
        help="default: those of --config or --checkpoint, else fp16",
    )
    out.add_argument("--platform", choices=LIMITS, default="ios", help="default: ios")
    out.add_argument("--chunk-bytes", type=int, help="most of a package (default: the platform's)")
    out.add_argument("--chunk-blocks", type=int, help="most of a package (default: the platform's)")
    out.add_argument("--head-slice", type=int, default=HEAD_SLICE, help=f"rows of a convolution ({HEAD_SLICE:,})")
    out.add_argument("--host-embedding", action="store_true", default=None, help="keep it out of the package")
    out.add_argument("--json", type=Path, metavar="F", help="write the plan as JSON too")
    return out


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Parse and print."""
    args = parser().parse_args(argv)
    config, lengths, formats = _of_config(args.config) if args.config else _of_checkpoint(args.checkpoint)
    context = max(lengths, default=0) if args.context is None else args.context
    prefill = tuple(args.prefill or [t for t in sorted(lengths) if t < context])
    if not 2 <= context <= config.max_position_embeddings or not all(2 <= t <= context for t in prefill):
        raise InputError(f"--context {context}, --prefill {list(prefill)}: at least 2, and at most the context and "
                         f"the model's {config.max_position_embeddings}")  # fmt: skip
    if min(size for size in (args.head_slice, args.chunk_bytes, args.chunk_blocks) if size is not None) < 1:
        raise InputError("--head-slice, --chunk-bytes and --chunk-blocks must be at least 1")
    base = LIMITS[args.platform]
    limits = Limits(args.chunk_bytes or base.chunk_bytes, args.chunk_blocks or base.layers)
    found = plan(
        config, args.formats or formats, context=context, prefill=prefill, platform=args.platform, limits=limits,
        head_slice=args.head_slice, host_embedding=args.host_embedding,
    )  # fmt: skip
    print(found.table())
    if args.json:
        write_json(args.json, found.to_json())
    return 0
