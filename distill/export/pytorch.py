"""Checkpoint -> TorchScript programs of fixed shape, each with its contract, goldens and evaluation prompts.

    python -m conversion.export_pytorch --checkpoint C --out D [--toy] --mode prefill|decode|both
        --seq 64 --enumerated-T 64 128 256

Writes student_prefill_T*.pt and student_decode.pt with *_contract.json, *_goldens.safetensors, *_evaluation.json,
and tokenizer.json and chat_template.jinja once. Every program is compared with the training model before it is kept.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from torch import Tensor

from distill import chat, checkpoint
from distill.artifacts import provenance, write_json, write_text
from distill.checkpoint import weights_sha256
from distill.contract import Contract, FileRef, ShapeValidation, read_contract
from distill.errors import DistillError, InputError, stage_main
from distill.export import goldens, resume
from distill.export.deployed import deploy, parse_formats, promised, tables_of_matrices
from distill.export.programs import Shape, attempt, file_ref, interface, save_program
from distill.export.prompts import evaluation_items
from distill.export.tolerance import fp16_gain
from distill.formats import Formats
from distill.model import Student
from distill.versions import require_python, versions

DEFAULT_CHECKPOINT = Path("models/student/checkpoints/latest.pt")
DEFAULT_OUT = Path("models/student/exported")
DEFAULT_T = [512, 1024, 2048]
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
    fingerprint: str
    """Of what every shape is made from."""

    @property
    def student(self) -> Student:
        """The trained model."""
        return self.reference.student


def run(config: ExportConfig) -> list[Path]:
    """Export; returns the contracts written. InputError for bad input, DistillError if the primary shape fails.

    Shapes that an earlier run made from the same inputs are kept, those of a run that was stopped too.
    """
    with resume.workspace(config.out) as work:
        shared = prepare(config._replace(out=work.staging))
        evaluated = functools.cache(lambda: goldens.evaluation(shared.reference, shared.items, max(shared.lengths)))
        shapes = _shapes(shared, config)
        contracts = [_export(shared, shape, evaluated, work, primary=shape == shapes[0]) for shape in shapes]
        checked = {str(c.sequence()): resume.own_validation(c) for c in contracts if c.mode == "prefill"}
        return work.publish([_completed(shared, contract, checked) for contract in contracts])


def prepare(config: ExportConfig) -> Shared:
    """Load the checkpoint and write what all its contracts refer to."""
    require_python("export")
    loaded = checkpoint.load(config.checkpoint)
    student = loaded.student.float().eval()
    formats, tables = deploy(loaded, config.formats)
    positions = student.config.max_position_embeddings
    lengths, primary = _lengths(config, loaded.provenance.get("config", {}), positions)
    items = evaluation_items(loaded, toy_set=config.toy)
    made_by = provenance(
        {"primary": primary, "enumerated_T": lengths, "mode": config.mode, "toy": config.toy},
        {"checkpoint": config.checkpoint},
    )
    inputs = {"inputs": made_by["inputs"], "formats": formats, "enumerated_T": lengths, "items": items}
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
        "made_by": made_by | {"stage": loaded.stage, "step": loaded.step, "lineage": loaded.lineage},
        "versions": versions(),
    }
    sidecar = {
        "tokenizer": file_ref(write_text(config.out / "tokenizer.json", loaded.tokenizer.to_json())),
        "chat_template": file_ref(write_text(config.out / "chat_template.jinja", chat.JINJA)),
    }
    reference = goldens.Reference(student, loaded.tokenizer, fields["fp16_gain"])
    return Shared(reference, lengths, primary, items, fields, sidecar, resume.fingerprint(inputs))


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
        raise InputError(f"length {max(chosen)}: the model's max_position_embeddings is {positions}")
    return sorted(chosen), chosen[0] if config.seq is None else config.seq


def _shapes(shared: Shared, config: ExportConfig) -> list[Shape]:
    """What to export, the primary shape first."""
    lengths = [shared.primary, *(t for t in shared.lengths if t != shared.primary)]
    shapes = [Shape("prefill", t, config.name.format(t=t)) for t in lengths if config.mode != "decode"]
    return shapes + [Shape("decode", max(lengths), "student_decode")] * (config.mode != "prefill")


def _export(
    shared: Shared, shape: Shape, evaluated: Callable[[], dict[str, Any]], work: resume.Workspace, *, primary: bool
) -> Contract:
    """The contract of one shape that is kept, or made and staged; it lists no other shape's validation."""
    contract = work.kept(shape.name, shared.fingerprint)
    how = "made" if contract is None else "kept"
    if contract is None:
        made = attempt(shape, shared.reference, lambda: _first_prompt(evaluated()))
        if primary and made.validation.status == "fail":
            work.discard()
            raise DistillError(f"primary shape {shape}: {made.validation.reason}")
        fields = interface(shape, shared.student.config)
        checked = {str(shape.length): made.validation}
        if made.traced is None:
            contract = Contract(**shared.fields, **fields, name=shape.name, file=None,
                                shape_validation=checked, sidecar=shared.sidecar)  # fmt: skip
        else:
            file = save_program(made.traced, work.staging / f"{shape.name}.pt")
            fitting = evaluated() if shape.mode == "decode" else _fitting(evaluated(), shape.length)
            contract = _contract(shared, work.staging, shape.name, made.golden, fitting, checked, file=file, **fields)
        work.stage(contract, shared.fingerprint)
    print(f"{shape}: {how}, {_words(contract.shape_validation[str(shape.length)])}", flush=True)
    return contract


def _words(found: ShapeValidation) -> str:
    if found.max_abs_err is None:
        return f"{found.status}: {found.reason}"
    return f"{found.status}, max error {found.max_abs_err:.2e} in fp32 (tolerance {found.tolerance:.2e})"


def _completed(shared: Shared, contract: Contract, checked: dict[str, ShapeValidation]) -> Contract:
    """With what all contracts of this export have in common; a prefill's lists every prefill shape's validation."""
    own = {role: ref for role, ref in contract.sidecar.items() if role not in shared.sidecar}
    validation = checked if contract.mode == "prefill" else contract.shape_validation
    made_by = shared.fields["made_by"] | {"shape": resume.seal(contract, shared.fingerprint)}
    common = shared.fields | {"sidecar": shared.sidecar | own, "shape_validation": validation, "made_by": made_by}
    return msgspec.structs.replace(contract, **common)


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
    contract = _contract(shared, out, name, golden, evaluated, checked, **fields)
    return write_json(out / f"{name}_contract.json", msgspec.to_builtins(contract))


def _contract(
    shared: Shared,
    out: Path,
    name: str,
    golden: dict[str, Tensor],
    evaluated: dict[str, Any] | None,
    checked: dict[str, ShapeValidation],
    **fields: Any,
) -> Contract:
    """Write goldens and evaluation prompts; returns the contract that names them."""
    sidecar = dict(shared.sidecar)
    sidecar["goldens"] = file_ref(goldens.write_goldens(out / f"{name}_goldens.safetensors", golden))
    if evaluated is not None:
        sidecar["evaluation"] = file_ref(write_json(out / f"{name}_evaluation.json", evaluated))
    return Contract(
        **shared.fields,
        **fields,
        name=name,
        shape_validation=checked,
        sidecar=sidecar,
        evaluation_items=len(evaluated["items"]) if evaluated else 0,
    )


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
    contracts = [read_contract(path) for path in run(config)]
    failed = [c.name for c in contracts if resume.own_validation(c).status == "fail"]
    print(f"exported {len(contracts) - len(failed)} programs to {config.out}"
          + (f"; failed: {', '.join(failed)}" if failed else ""))  # fmt: skip
    return 1 if failed else 0
