"""Checkpoint -> TorchScript programs of fixed shape, each with its contract, goldens and evaluation prompts.

    python -m conversion.export_pytorch --checkpoint C --out D [--toy] --mode prefill|decode|both
        --seq 64 --enumerated-T 64 128 256

Writes student_prefill_T*.pt and student_decode.pt with *_contract.json, *_goldens.safetensors, *_evaluation.json,
and tokenizer.json and chat_template.jinja once. Every program is compared with the training model before it is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from distill import chat, checkpoint
from distill.artifacts import atomic_file, provenance, sha256_file, write_json, write_text
from distill.contract import Contract, FileRef, ShapeValidation, TensorSpec
from distill.errors import DistillError, InputError, describe_os_error, stage_main
from distill.export import goldens
from distill.export.deployed import deploy, parse_formats, promised, tables_of_matrices, weights_sha256
from distill.export.prompts import evaluation_items
from distill.export.tolerance import fp16_gain
from distill.export.twin import DecodeTwin, PrefillTwin
from distill.formats import Formats
from distill.model import Student
from distill.versions import require_python, versions

DEFAULT_CHECKPOINT = Path("models/student/checkpoints/latest.pt")
DEFAULT_OUT = Path("models/student/exported")
DEFAULT_T = [512, 1024, 2048]
_TWIN_TOLERANCE = 1e-4
"""The twin reorders fp32 sums: allowed error as a share of the largest logit."""
KV_LAYOUT = "kv (2L, K, C, N): row 2l keys after RoPE, row 2l+1 values of layer l; head, position, width"
MASK = "additive; 0 where a token may attend, -1e4 elsewhere; causal"


class ExportConfig(NamedTuple):
    """What to export."""

    checkpoint: Path = DEFAULT_CHECKPOINT
    out: Path = DEFAULT_OUT
    mode: Literal["prefill", "decode", "both"] = "both"
    seq: int | None = None
    """Primary sequence length: its failure fails the export. None: the first of `enumerated_T`."""
    enumerated_T: tuple[int, ...] = ()
    """Sequence lengths; empty: `export.seq` of the training configuration, else 512, 1024, 2048."""
    name: str = "student_prefill_T{t}"
    """File name of a prefill program."""
    toy: bool = False
    """Evaluation prompts are the held-out ones of the toy set that the checkpoint was trained on."""
    formats: Formats | None = None
    """Weight formats of a student that was not trained in any; None: fp16, or those that it was trained in."""


class Shared(NamedTuple):
    """What every contract of one export has in common."""

    reference: goldens.Reference
    lengths: list[int]
    primary: int
    items: Sequence[Any]
    fields: dict[str, Any]
    sidecar: dict[str, FileRef]

    @property
    def student(self) -> Student:
        """The trained model."""
        return self.reference.student


def run(config: ExportConfig) -> list[Path]:
    """Export; returns the contracts written. InputError for bad input, DistillError if the primary shape fails."""
    with _together(config.out) as folder:
        staged = config._replace(out=folder)
        shared = prepare(staged)
        written = []
        if config.mode in ("prefill", "both"):
            written += _prefills(shared, staged)
        if config.mode in ("decode", "both"):
            written.append(_decode(shared, staged))
    return [config.out / path.name for path in written]


@contextlib.contextmanager
def _together(out: Path) -> Iterator[Path]:
    """A folder whose files are moved to `out` on a clean exit, contracts last: programs and contracts stay in step."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".export.", suffix=".tmp", dir=out))
    except OSError as error:
        raise InputError(f"cannot write {out}: {describe_os_error(error)}") from error
    try:
        yield folder
        for file in sorted(folder.iterdir(), key=lambda file: file.name.endswith("_contract.json")):
            file.replace(out / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepare(config: ExportConfig) -> Shared:
    """Load the checkpoint and write what all its contracts refer to."""
    require_python("export")
    loaded = checkpoint.load(config.checkpoint)
    student = loaded.student.float().eval()
    formats, tables = deploy(loaded, config.formats)
    positions = student.config.max_position_embeddings
    lengths, primary = _lengths(config, loaded.provenance.get("config", {}), positions)
    fields: dict[str, Any] = {
        "schema": "distill-export/1",
        "enumerated_T": lengths,
        "model_config": student.config,
        "rope": f"half-split, theta {student.config.rope_theta:g}, tables in the graph",
        "mask": MASK,
        "tokenizer_sha256": loaded.tokenizer.sha256,
        "chat_template_sha256": chat.template_sha256(),
        "weights_sha256": weights_sha256(student),
        "formats": formats,
        "weights": promised(student, formats),
        "tables": None if formats is None else _write_tables(config.out, tables_of_matrices(student, formats, tables)),
        "fp16_gain": fp16_gain(student),
        "probes": {},
        "made_by": provenance(
            {"primary": primary, "enumerated_T": lengths, "mode": config.mode, "toy": config.toy},
            {"checkpoint": config.checkpoint},
        )
        | {"stage": loaded.stage, "step": loaded.step, "lineage": loaded.lineage},
        "versions": versions(),
    }
    items = evaluation_items(loaded, toy_set=config.toy)
    sidecar = {
        "tokenizer": file_ref(write_text(config.out / "tokenizer.json", loaded.tokenizer.to_json())),
        "chat_template": file_ref(write_text(config.out / "chat_template.jinja", chat.JINJA)),
    }
    return Shared(
        goldens.Reference(student, loaded.tokenizer, fields["fp16_gain"]), lengths, primary, items, fields, sidecar
    )


def _write_tables(out: Path, tables: dict[str, Tensor]) -> FileRef | None:
    return file_ref(goldens.write_goldens(out / "student_tables.safetensors", tables)) if tables else None


def _lengths(config: ExportConfig, trained: dict[str, Any], positions: int) -> tuple[list[int], int]:
    """The lengths, ascending, and the primary one."""
    chosen = list(config.enumerated_T) or list((trained.get("export") or {}).get("seq") or DEFAULT_T)
    if config.seq is not None and config.seq not in chosen:
        raise InputError(f"--seq {config.seq} is not one of the enumerated lengths {chosen}")
    if len(set(chosen)) != len(chosen) or min(chosen) < 2:
        raise InputError(f"--enumerated-T {chosen}: lengths must be distinct and at least 2")
    if max(chosen) > positions:
        raise InputError(f"--enumerated-T {chosen}: the model's max_position_embeddings is {positions}")
    return sorted(chosen), chosen[0] if config.seq is None else config.seq


def _prefills(shared: Shared, config: ExportConfig) -> list[Path]:
    primary = shared.primary
    order = [primary] + [t for t in shared.lengths if t != primary]
    evaluated = goldens.evaluation(shared.reference, shared.items, max(order))
    checked: dict[str, ShapeValidation] = {}
    pending = []
    for t in order:
        twin = PrefillTwin(shared.student, t)
        golden = goldens.prefill_goldens(shared.reference, t, _first_prompt(evaluated))
        traced = trace(twin, (golden["input_ids"][:1],))
        checked[str(t)] = compare(_run_prefill(traced, golden), golden)
        print(
            f"prefill T={t}: {checked[str(t)].status}, max error {checked[str(t)].max_abs_err:.2e} in fp32 "
            f"(tolerance {checked[str(t)].tolerance:.2e})"
        )
        if t == primary and checked[str(t)].status == "fail":
            raise DistillError(f"primary shape T={t}: {checked[str(t)].reason}")
        name = config.name.format(t=t)
        file = save_program(traced, config.out / f"{name}.pt")
        fitting = _fitting(evaluated, t)
        pending.append((t, name, file, golden, fitting))
    contracts = []
    for t, name, file, golden, fitting in pending:
        contracts.append(
            write_contract(
                shared,
                config.out,
                name,
                golden,
                fitting,
                checked,
                mode="prefill",
                file=file,
                states=[],
                kv_layout=None,
                inputs=[TensorSpec("input_ids", [1, t], "int32")],
                outputs=[TensorSpec("logits", [1, t, shared.student.config.vocab_size], "float16")],
            )
        )
    return contracts


def _decode(shared: Shared, config: ExportConfig) -> Path:
    context = max(shared.lengths)
    evaluated = goldens.evaluation(shared.reference, shared.items, context)
    golden = goldens.decode_goldens(shared.reference, context, _first_prompt(evaluated))
    twin = DecodeTwin(shared.student, context)
    position = torch.tensor([min(1, context - 1)], dtype=torch.int32)
    traced = trace(twin, (golden["input_ids"][:, :1], position))
    result = compare(_run_decode(traced, golden), golden)
    print(
        f"decode C={context}: {result.status}, max error {result.max_abs_err:.2e} in fp32 "
        f"(tolerance {result.tolerance:.2e})"
    )
    if result.status == "fail":
        raise DistillError(f"decode: {result.reason}")
    traced.kv.zero_()
    file = save_program(traced, config.out / "student_decode.pt")
    return write_contract(
        shared,
        config.out,
        "student_decode",
        golden,
        evaluated,
        {str(context): result},
        mode="decode",
        file=file,
        kv_layout=KV_LAYOUT,
        inputs=[TensorSpec("input_ids", [1, 1], "int32"), TensorSpec("position", [1], "int32")],
        outputs=[TensorSpec("logits", [1, 1, shared.student.config.vocab_size], "float16")],
        states=[TensorSpec("kv", list(twin.kv.shape), "float16")],
    )


def write_contract(
    shared: Shared,
    out: Path,
    name: str,
    golden: dict[str, Tensor],
    evaluated: dict[str, Any] | None,
    checked: dict[str, ShapeValidation],
    **fields: Any,
) -> Path:
    """Write a program's goldens, evaluation prompts (None: it generates nothing) and contract."""
    sidecar = dict(shared.sidecar)
    sidecar["goldens"] = file_ref(goldens.write_goldens(out / f"{name}_goldens.safetensors", golden))
    if evaluated is not None:
        sidecar["evaluation"] = file_ref(write_json(out / f"{name}_evaluation.json", evaluated))
    contract = Contract(
        **shared.fields,
        **fields,
        name=name,
        shape_validation=checked,
        sidecar=sidecar,
        evaluation_items=len(evaluated["items"]) if evaluated else 0,
    )
    return write_json(out / f"{name}_contract.json", msgspec.to_builtins(contract))


@torch.no_grad()
def trace(twin: torch.nn.Module, example: tuple[Tensor, ...]) -> Any:
    with warnings.catch_warnings():
        # tracing bakes shapes in, which is what a static program wants, and warns of each
        warnings.simplefilter("ignore")
        return torch.jit.trace(twin, example, check_trace=False)


@torch.no_grad()
def _run_prefill(traced: Any, golden: dict[str, Tensor]) -> Tensor:
    return torch.stack([traced(row[None])[0, golden["positions"]] for row in golden["input_ids"]])


@torch.no_grad()
def _run_decode(traced: Any, golden: dict[str, Tensor]) -> Tensor:
    traced.kv.zero_()
    ids = golden["input_ids"][0]
    steps = [traced(ids[i].view(1, 1), torch.tensor([i], dtype=torch.int32))[0] for i in range(len(ids))]
    return torch.cat(steps)[None]


def compare(found: Tensor, golden: dict[str, Tensor]) -> ShapeValidation:
    expected = golden["logits"]
    tolerance = _TWIN_TOLERANCE * max(float(expected.abs().max()), 1e-3)
    error = float((found - expected).abs().max())
    if error <= tolerance:
        return ShapeValidation("pass", error, tolerance)
    reason = f"the exported program differs from the training model by {error:.3g} (tolerance {tolerance:.3g})"
    return ShapeValidation("fail", error, tolerance, reason)


def save_program(traced: Any, path: Path) -> FileRef:
    program = traced.save_to_buffer()  # torch's own file writer aborts the process when the disk is full
    with atomic_file(path) as temporary:
        temporary.write_bytes(program)
    return file_ref(path)


def file_ref(path: Path) -> FileRef:
    return FileRef(path.name, sha256_file(path), path.stat().st_size)


def _fitting(evaluated: dict[str, Any], seq: int) -> dict[str, Any]:
    """The evaluation items whose prompt and greedy answer fit a shorter program."""
    rows = [row for row in evaluated["items"] if len(row["prompt_ids"]) + len(row["greedy"]["tokens"]) <= seq]
    return evaluated | {"items": rows, "too_long": evaluated["too_long"] + len(evaluated["items"]) - len(rows)}


def _first_prompt(evaluated: dict[str, Any]) -> list[int]:
    rows = evaluated["items"]
    return rows[0]["prompt_ids"] + rows[0]["greedy"]["tokens"] if rows else []


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Parse and export; exit 0 when every shape validated, 1 when a secondary one did not."""
    parser = argparse.ArgumentParser(prog="distill export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help=f"a trained student (default: {DEFAULT_CHECKPOINT})"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"folder to fill (default: {DEFAULT_OUT})")
    parser.add_argument("--mode", choices=("prefill", "decode", "both"), default="both", help="default: both")
    parser.add_argument("--seq", type=int, help="primary length (default: the first enumerated one)")
    parser.add_argument(
        "--enumerated-T",
        type=int,
        nargs="+",
        default=[],
        metavar="T",
        help="lengths to export (default: export.seq of the training configuration)",
    )
    parser.add_argument("--toy", action="store_true", help="evaluate on the toy set's held-out prompts")
    parser.add_argument(
        "--formats",
        type=parse_formats,
        metavar="blocks=int4/32,embedding=int8",
        help="weight formats (default: those that the student was trained in, else fp16)",
    )
    args = parser.parse_args(argv)
    config = ExportConfig(
        args.checkpoint, args.out, args.mode, args.seq, tuple(args.enumerated_T), toy=args.toy, formats=args.formats
    )
    contracts = run(config)
    failed = [c for c in contracts if '"status": "fail"' in c.read_text()]
    print(f"exported {len(contracts)} programs to {config.out}" + (f"; failed shapes in {failed[0]}" if failed else ""))
    return 1 if failed else 0
