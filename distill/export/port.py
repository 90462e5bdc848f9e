"""A student for other runtimes, with no distill needed there: `distill port --checkpoint C --out D --to TARGET`.

    huggingface    config.json, model.safetensors, tokenizer and chat template: transformers and what reads its folders
    gguf           model.gguf for llama.cpp, and a Modelfile for Ollama
    mlx            the Hugging Face folder, refused where mlx-lm would compute something else

A student that was trained or is asked for in weight formats is written with the values that its package decompresses,
so that the port computes what the package computes. port.json says what made the folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from distill import chat, checkpoint
from distill.artifacts import atomic_dir, provenance, require_replaceable, write_json
from distill.errors import CheckpointError, stage_main
from distill.export.deployed import deploy, parse_formats
from distill.export.gguf_file import context_length, window_note, write_gguf
from distill.export.gguf_tokenizer import is_qwen2
from distill.export.ollama import modelfile
from distill.formats import Formats
from distill.model import ModelConfig, Student
from distill.pretrained import config_from_huggingface, config_to_huggingface, write_pretrained
from distill.tokenizer import Tokenizer

GGUF_NAME = "model.gguf"
DTYPES = {"float16": torch.float16, "float32": torch.float32}


class PortConfig(NamedTuple):
    """What to port, and to what."""

    checkpoint: Path
    out: Path
    to: str
    dtype: str | None = None
    """Of the stored weights; None: float16 where that holds every one exactly, else float32."""
    formats: Formats | None = None
    """Weight formats of a student that was not trained in any; None: none, or those that it was trained in."""


class Ported(NamedTuple):
    """A port, written."""

    out: Path
    dtype: str
    notes: list[str]
    """In what the runtime differs from the student, each in a line."""


def run(config: PortConfig) -> Ported:
    """Write the folder `config.out`, whole or not at all. InputError names what the target cannot represent."""
    require_replaceable(config.out)  # before the work
    loaded = checkpoint.load(config.checkpoint)
    formats, _ = deploy(loaded, config.formats)
    dtype = stored_dtype(loaded.student, config.dtype)
    with atomic_dir(config.out) as folder:
        notes = TARGETS[config.to](loaded.student.to(torch.float32), loaded.tokenizer, folder, DTYPES[dtype])
        made = {"to": config.to, "dtype": dtype, "formats": msgspec.to_builtins(formats), "notes": notes}
        write_json(folder / "port.json", provenance(made, {"checkpoint": config.checkpoint}))
    return Ported(config.out, dtype, notes)


def stored_dtype(student: Student, asked: str | None) -> str:
    """float16 where every weight is one exactly, else float32; or what is asked for. CheckpointError where a weight is
    not finite, or too large for it."""
    exact = True
    for name, weight in student.named_parameters():
        half = weight.detach().half()
        if not bool(weight.isfinite().all()):
            raise CheckpointError(f"{name} has values that are not finite")
        if asked == "float16" and not bool(half.isfinite().all()):
            raise CheckpointError(f"{name} has values beyond float16: {float(weight.detach().abs().max()):.6g}")
        exact = exact and torch.equal(half.to(weight.dtype), weight)
    return asked or ("float16" if exact else "float32")


def write_huggingface(student: Student, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> list[str]:
    """Fill `folder` with what `AutoModelForCausalLM` and `AutoTokenizer` load."""
    if config_to_huggingface(student.config)["model_type"] == "qwen2" and not is_qwen2(tokenizer):
        student = as_llama(student)
    require_family(student.config)
    write_pretrained(student.to(dtype), folder, eos=tokenizer.turn_end, pad=tokenizer.pad)
    write_json(folder / "generation_config.json", {
        "do_sample": False, "eos_token_id": sorted(tokenizer.stop_ids), "pad_token_id": tokenizer.pad,
    })  # fmt: skip
    (folder / "tokenizer.json").write_text(tokenizer.to_json() + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": student.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,  # else a decoded " ." loses its space
        "eos_token": tokenizer.decode([tokenizer.turn_end]),
        "pad_token": tokenizer.decode([tokenizer.pad]),
        "chat_template": chat.JINJA,
    })  # fmt: skip
    return []


def as_llama(student: Student) -> Student:
    """A student of Qwen2's form as a Llama with biases, that of o_proj zero: transformers 5 gives every qwen2 model
    Qwen2's own pre-tokenizer, whatever tokenizer.json and tokenizer_config.json say."""
    config = msgspec.structs.replace(student.config, output_bias=True)
    with torch.device("meta"):
        made = Student(config)
    zeros = {
        name: torch.zeros(value.shape) for name, value in made.state_dict().items() if name.endswith("o_proj.bias")
    }
    made.load_state_dict(student.state_dict() | zeros, assign=True)
    return made


def require_family(config: ModelConfig) -> None:
    """CheckpointError where no family of transformers that we write has all of this student's features."""
    written = config_to_huggingface(config)
    back = config_from_huggingface(written, "config.json")
    wrong = [name for name in config.__struct_fields__ if getattr(back, name) != getattr(config, name)]
    if config.mlp_bias and written["model_type"] != "llama":
        wrong.append("mlp_bias")
    if wrong:
        raise CheckpointError(f"transformers has no {written['model_type']} model with this student's {wrong[0]}")


def write_mlx(student: Student, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> list[str]:
    """The Hugging Face folder for mlx-lm, which reads it as it is but passes over some keys of config.json."""
    config = student.config
    narrow = config.head_dim * config.num_attention_heads != config.hidden_size
    qwen2 = config.attention_bias and not config.output_bias and is_qwen2(tokenizer)
    ignored = {
        "a head_dim of its own in a qwen2 model": qwen2 and narrow,
        "attention_bias in a qwen3 model": config.qk_norm and config.attention_bias,
        "attention_factor of YaRN": config.rope_scaling is not None
        and config.rope_scaling.attention_factor is not None,
    }
    if found := [name for name, has in ignored.items() if has]:
        raise CheckpointError(f"mlx-lm does not compute {found[0]}")
    require_family(config)
    notes = window_note(config)
    student.config = msgspec.structs.replace(
        config, max_position_embeddings=context_length(config), sliding_window=None
    )
    return notes + write_huggingface(student, tokenizer, folder, dtype)


def write_llama_cpp(student: Student, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> list[str]:
    """model.gguf, and the Modelfile that makes an Ollama model of it."""
    notes = write_gguf(student, tokenizer, folder / GGUF_NAME, dtype)
    text = modelfile(GGUF_NAME, tokenizer, context_length(student.config))
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    return notes


TARGETS: dict[str, Callable[[Student, Tokenizer, Path, torch.dtype], list[str]]] = {
    "huggingface": write_huggingface,
    "gguf": write_llama_cpp,
    "mlx": write_mlx,
}


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Write a checkpoint for another runtime."""
    parser = argparse.ArgumentParser(
        prog="distill port", description="A checkpoint as a Hugging Face folder, a GGUF file or an MLX folder."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint file, .pt")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--to", choices=tuple(TARGETS), required=True, help="what will read it")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="of the weights (default: float16 if exact, else float32)"
    )
    parser.add_argument(
        "--formats",
        type=parse_formats,
        metavar="blocks=int4/32,embedding=int8",
        help="weight formats (default: those that the student was trained in, else none)",
    )
    args = parser.parse_args(argv)
    done = run(PortConfig(args.checkpoint, args.out, args.to, args.dtype, args.formats))
    size = sum(file.stat().st_size for file in done.out.iterdir())
    print(f"{done.out}: {args.to}, {done.dtype}, {size / 1e6:.1f} MB")
    for note in done.notes:
        print(f"note: {note}")
    return 0
