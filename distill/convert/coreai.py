"""Checkpoint -> Core AI asset (Apple's successor of Core ML, OS 27) with its contract.

    distill coreai --checkpoint C --out X.aimodel [--prefill T ...] [--context N] [--precision fp16|fp32] [--formats F]

One asset holds `decode` (a token at a time) and a `prefill_T` for each length, all over one state `kv` and the same
weights: the twins of distill/export/twin.py, through torch.export. `X.aimodel.contract/` beside it holds contract.json,
the golden conversation, the tokenizer and the chat template.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill import chat, checkpoint
from distill.artifacts import atomic_dir, provenance, require_replaceable, write_json, write_text
from distill.checkpoint import weights_sha256
from distill.contract import Contract, Function, TensorSpec
from distill.errors import CheckpointError, InputError, stage_main
from distill.export import goldens
from distill.export.conversation import conversation
from distill.export.deployed import deploy, matrices, parse_formats, promised, tables_of_matrices
from distill.export.programs import Shape, file_ref, interface
from distill.export.pytorch import DEFAULT_CHECKPOINT, MASK
from distill.export.tolerance import fp16_gain
from distill.export.twin import CachedTwin, ChannelRMSNorm, round_to_half
from distill.formats import Compressed, Format, Formats, encode, operands
from distill.model import Student
from distill.versions import installed, optional, require_python, versions
from distill.versions import quiet as versions_quiet

PROGRAM = "main.mlirb"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_DATE = "20010101T000000Z"
"""Core AI's metadata wants a creation date; a true one would make two builds differ."""


class CoreAIConfig(NamedTuple):
    """What to build."""

    checkpoint: Path
    out: Path
    prefill: tuple[int, ...] = (64,)
    """Tokens of each prefill function."""
    context: int | None = None
    """Rows of the state; None: the model's max_position_embeddings, at most 2048."""
    precision: Literal["fp16", "fp32"] = "fp16"
    """Of weights, state and arithmetic; a norm is computed in fp32 in both."""
    formats: Formats | None = None


class Built(NamedTuple):
    """What a build starts from."""

    student: Student
    context: int
    dtype: torch.dtype
    stored: dict[str, Compressed]
    """Compressed matrices, by name in the twin."""


def contract_folder(asset: Path) -> Path:
    """`X.aimodel.contract`: a package of the same name has `X.contract`."""
    return asset.with_name(asset.name + ".contract")


def run(config: CoreAIConfig) -> Contract:
    """Build asset and contract, whole or not at all. InputError for bad input, CheckpointError if it does not lower."""
    require_python("conversion")
    if config.out.suffix != ".aimodel":
        raise InputError(f"--out {config.out}: a Core AI asset's name ends in .aimodel")
    with quiet():
        optional("coreai_torch", "coreai")
        import coreai_torch._compression.custom_layers  # noqa: F401  registers the operators of compressed weights
    folder = contract_folder(config.out)
    require_replaceable(config.out)
    require_replaceable(folder)
    loaded = checkpoint.load(config.checkpoint)
    student = loaded.student.float().eval()
    context = _context(config, student.config.max_position_embeddings)
    formats, tables = deploy(loaded, config.formats)
    stored = {} if formats is None else _stored(student, formats, tables_of_matrices(student, formats, tables))
    built = Built(student, context, DTYPES[config.precision], stored)
    chunks = {f"prefill_{t}": t for t in sorted(config.prefill)}
    reference = goldens.Reference(student, loaded.tokenizer, fp16_gain(student))
    golden = conversation(reference, context, chunks, [])
    with contextlib.ExitStack() as stack:
        # both are complete before either is renamed
        asset, sidecar = (stack.enter_context(atomic_dir(path)) for path in (config.out, folder))
        _save(_lower(built, {"decode": 1, **chunks}), asset)
        files = {
            "goldens": file_ref(goldens.write_goldens(sidecar / "goldens.safetensors", golden)),
            "tokenizer": file_ref(write_text(sidecar / "tokenizer.json", loaded.tokenizer.to_json())),
            "chat_template": file_ref(write_text(sidecar / "chat_template.jinja", chat.JINJA)),
        }
        contract = Contract(
            schema="distill-coreai/1",
            name=config.out.stem,
            file=file_ref(asset / PROGRAM),
            enumerated_T=[context],
            shape_validation={},
            model_config=student.config,
            rope=f"half-split, theta {student.config.rope_theta:g}, tables in the graph",
            mask=MASK,
            tokenizer_sha256=loaded.tokenizer.sha256,
            chat_template_sha256=chat.template_sha256(),
            weights_sha256=weights_sha256(student),
            fp16_gain=reference.gain,
            sidecar=files,
            probes={},
            made_by=_made_by(config, context) | {"stage": loaded.stage, "step": loaded.step, "lineage": loaded.lineage},
            versions=versions() | {name: str(installed(name)) for name in ("coreai-torch", "coreai-core")},
            formats=formats,
            weights=promised(student, formats),
            **_interface(built, chunks),
        )
        write_json(sidecar / "contract.json", msgspec.to_builtins(contract))
    return contract


def _context(config: CoreAIConfig, positions: int) -> int:
    context = min(positions, 2048) if config.context is None else config.context
    if not 2 <= context <= positions:
        raise InputError(f"--context {context}: the model has positions for 2 to {positions} tokens")
    if not config.prefill or len(set(config.prefill)) != len(config.prefill):
        raise InputError(f"--prefill {list(config.prefill)}: lengths must be distinct, and there is at least one")
    if min(config.prefill) < 2 or max(config.prefill) > context:
        raise InputError(f"--prefill {list(config.prefill)}: lengths must lie in 2 to the context of {context}")
    return context


def _made_by(config: CoreAIConfig, context: int) -> dict[str, Any]:
    asked = {"prefill": sorted(config.prefill), "context": context, "precision": config.precision}
    return provenance(asked, {"checkpoint": config.checkpoint})


def _interface(built: Built, chunks: dict[str, int]) -> dict[str, Any]:
    """A generator's fields of the contract; the asset takes and gives its own precision at its boundary."""
    decode = interface(Shape("decode", built.context, "decode"), built.student.config)
    kind = str(built.dtype).removeprefix("torch.")
    for part in ("outputs", "states"):
        decode[part] = [msgspec.structs.replace(spec, dtype=kind) for spec in decode[part]]
    tokens, *rest = decode["inputs"]
    logits = decode["outputs"][0]
    functions = {}
    for name, t in {"decode": 1, **chunks}.items():
        inputs = [TensorSpec(tokens.name, [1, t], tokens.dtype), *rest]
        functions[name] = Function(
            inputs, [TensorSpec(logits.name, [1, t, logits.shape[2]], logits.dtype)], decode["states"]
        )
    return decode | {"mode": "generator", "functions": functions}


def _stored(student: Student, formats: Formats, tables: dict[str, Tensor]) -> dict[str, Compressed]:
    """The codes of every compressed matrix: its deployed weight, with the table that gives that again."""
    parameters, out = dict(student.named_parameters()), {}
    for matrix in matrices(student):
        form = formats.of(matrix.parameter)
        if form.kind == "lut" and form.bits == 3:
            raise InputError(f"{matrix.name}: weight format {form}: Core AI's converter packs no codes of 3 bits")
        if form.kind != "fp":
            out[matrix.name] = encode(
                parameters[matrix.parameter][matrix.first : matrix.last], form, tables[matrix.name]
            )
    return out


class ExportableTwin(CachedTwin):
    """A twin whose position is a number that torch.export can reason about."""

    def first(self, position: Tensor) -> Any:
        row = position[0].item()  # a symbol while exporting
        torch._check(row >= 0)
        torch._check(row + self.seq <= self.kv.shape[2])
        return row


class _Decompressed(nn.Module):
    """A weight that the asset stores as codes and tables; named as Core AI's converter looks for them."""

    def __init__(self, stored: Compressed, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.form: Format = stored.format
        self.dtype = dtype
        names = {"data": "quantized_data", "scale": "scale", "indices": "indices", "lut": "lut"}
        for name, array in operands(stored, rank)[1].items():
            self.register_buffer(names[name], torch.from_numpy(array.copy()))

    def forward(self, _: Tensor) -> Tensor:
        if self.form.kind == "lut":
            weight = torch.ops.coreai.lut_to_dense(self.indices, self.lut, 0)
        else:
            kind = getattr(torch, f"int{self.form.bits}")
            weight = torch.ops.coreai.constexpr_blockwise_shift_scale(
                self.quantized_data, self.scale, None, None, kind, None
            )
        return weight.to(self.dtype)


def twin(built: Built, seq: int) -> ExportableTwin:
    """The twin of one function, in the precision that the asset has.

    In fp16, norms are computed in fp32: their sums of squares would overflow, and Core AI fuses them to no operator
    that guards against it, as coremltools does.
    """
    made = ExportableTwin(built.student, built.context, seq, copy=True)
    if built.dtype == torch.float16:
        round_to_half(made).half()
        for norm in [module for module in made.modules() if isinstance(module, ChannelRMSNorm)]:
            norm.float()
            norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
            norm.register_forward_hook(lambda _, __, out: out.half())
    for name, stored in built.stored.items():
        owner = made.get_submodule(name.removesuffix(".weight"))
        rank = 2 if isinstance(owner, nn.Embedding) else 4
        with torch.no_grad():
            parametrize.register_parametrization(owner, "weight", _Decompressed(stored, rank, built.dtype), unsafe=True)
    return made


def lower(module: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype) -> Any:
    """`module` as an exported program of the operators that Core AI's converter takes."""
    import coreai_torch

    with default_dtype(dtype), torch.no_grad():  # constants made in the graph, such as the mask's, get its precision
        return torch.export.export(module, example).run_decompositions(coreai_torch.get_decomp_table())


def _lower(built: Built, functions: dict[str, int]) -> Any:
    """The functions as one Core AI program."""
    import coreai_torch

    with quiet():
        converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
        try:
            for name, seq in functions.items():
                example = torch.zeros(1, seq, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
                converter.add_exported_program(
                    lower(twin(built, seq), example, built.dtype),
                    input_names=["input_ids", "position"],
                    output_names=["logits"],
                    state_names=["kv"],
                    entrypoint_name=name,
                )
            return converter.to_coreai()
        except OSError:
            raise
        except Exception as error:  # torch.export and MLIR raise anything
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(f"Core AI's converter cannot lower the student: {lines[0].strip()}") from error


def _save(program: Any, folder: Path) -> None:
    """Core AI insists on the suffix, so it writes inside and is moved up."""
    inner = folder / "inner.aimodel"
    with quiet():
        program.save_asset(inner)
    for part in inner.iterdir():
        part.rename(folder / part.name)
    inner.rmdir()
    metadata = json.loads((folder / "metadata.json").read_text())
    write_json(folder / "metadata.json", dict(sorted((metadata | {"creationDate": _DATE}).items())))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of Core AI's converter, and its warning that torch 2.13.0+cpu is not 2.13.0."""
    with versions_quiet(), contextlib.redirect_stdout(io.StringIO()):
        yield


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Parse and build."""
    parser = argparse.ArgumentParser(prog="distill coreai", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help=f"a trained student (default: {DEFAULT_CHECKPOINT})"
    )
    parser.add_argument("--out", type=Path, required=True, help="X.aimodel")
    parser.add_argument(
        "--prefill",
        type=int,
        nargs="+",
        default=[64],
        metavar="T",
        help="tokens of each prefill (default: 64)",
    )
    parser.add_argument("--context", type=int, help="rows of the state (default: the model's positions, at most 2048)")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp16", help="default: fp16")
    parser.add_argument(
        "--formats",
        type=parse_formats,
        metavar="blocks=int4/32,embedding=int8",
        help="weight formats (default: those that the student was trained in, else the precision's)",
    )
    args = parser.parse_args(argv)
    config = CoreAIConfig(args.checkpoint, args.out, tuple(args.prefill), args.context, args.precision, args.formats)
    contract = run(config)
    assert contract.file is not None
    print(f"wrote {config.out}: {contract.file.bytes / 1e6:.2f} MB, functions {', '.join(contract.functions)}")
    return 0
