"""Is a tier's pipeline whole: was every step run, each on what the one before it has left?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from distill import gates
from distill.errors import InputError
from distill.evaluate.evidence import File, Link, NoEvidence, attempt, in_order
from distill.evaluate.tier_cells import (
    ARTIFACTS,
    BUNDLE,
    CONVERT,
    LATEST,
    Look,
    evaluations,
    packages_of,
    verification,
    was_verified,
)
from distill.gates import Gate

EXPORTED, EXPORT, DEPLOY = Path("models/student/exported"), "make pytorch-worker", "make deploy-full"


def smoke(look: Look) -> Iterator[Gate]:
    """Random weights by way of ONNX and of TorchScript, and five steps of training."""
    for one, folder, name, program in zip(packages_of(look), ("onnx", "models"), ("toy", "toy_torch"),
                                          ("toy_sanitized.onnx", "toy_torch.pt"), strict=True):  # fmt: skip
        here, target, package = Path(folder), one.target, ARTIFACTS / name / "model.contract/contract.json"
        contract = here / f"{name}_contract.json"
        yield in_order([
            _link(look, here / f"{name}_checkpoint.pt", contract, "checkpoint", target),
            _link(look, contract, package, "contract", target),
            _link(look, here / program, package, "source", target),
            partial(was_verified, look, one),
        ])  # fmt: skip
    training, target = Path("training/toy_test"), "make smoke_training"
    yield in_order([
        _link(look, training / "toy_dataset.jsonl", training / "checkpoints/toy.report.json", "data", target),
        partial(look.evidence.present, training / "checkpoints/latest.pt", target),
    ])  # fmt: skip


def toy(look: Look) -> Iterator[Gate]:
    """Data, training, export, conversion, verification."""
    folder, target = look.toy, "make toy-e2e"
    exported, package = folder / "toy_exported", folder / "toy_T128.contract/contract.json"
    contract, training = exported / "student_prefill_T128_contract.json", folder / "toy.report.json"
    yield in_order([
        _link(look, folder / "toy_kd.jsonl", training, "data", target),
        partial(_trained_by, look, contract, training, target),
        _link(look, folder / "toy.ckpt", contract, "checkpoint", target),
        _link(look, exported / "student_prefill_T128.pt", package, "source", target),
        _link(look, contract, package, "contract", target),
        partial(was_verified, look, packages_of(look)[0]),
    ])  # fmt: skip


def full(look: Look) -> Iterator[Gate]:
    """A teacher's answers, training, export, conversion, verification, evaluation, bundle."""
    exports = sorted(EXPORTED.glob("*_contract.json"))
    if exports:
        yield attempt(_training, look, exports[0])
        yield in_order(_link(look, LATEST, path, "checkpoint", EXPORT) for path in exports)
    else:
        yield Gate("inconclusive", reason=f"not run: {EXPORT} ({EXPORTED} holds no export)")
    yield attempt(_conversion, look, exports)
    yield attempt(_was_evaluated, look)
    yield attempt(_bundle, look)


def _link(look: Look, file: Path, record: Path, role: str, target: str) -> Callable[[], Gate]:
    return partial(look.evidence.linked, Link(file, record, role, target), look.code)


def _was_evaluated(look: Look) -> Gate:
    evaluations(look)
    return Gate("pass")


def _trained_by(look: Look, contract: Path, training: Path, target: str) -> Gate:
    """The exported checkpoint came from the run that the report of training tells of."""
    _, origin = look.evidence.record(contract, target)
    report, _ = look.evidence.record(training, target)
    last = origin.lineage[-1].get("fingerprint") if origin.lineage else None
    if not report.fingerprint or report.fingerprint != last:
        raise NoEvidence(f"stale: {contract} is of another run than {training}: {target}")
    return Gate("pass")


def _training(look: Look, contract: Path) -> Gate:
    """The last stage of training, and its data."""
    _, origin = look.evidence.record(contract, EXPORT)
    target = f"make {origin.stage}" if origin.stage in ("worker", "proc", "qat") else "make worker"
    training = LATEST.with_name(f"{origin.stage}.report.json")
    _trained_by(look, contract, training, target)
    _, made = look.evidence.record(training, target)
    data = Path(str(made.config.get("data")))
    look.evidence.present(data, "make kd-dataset")
    return look.evidence.linked(Link(data, training, "data", target), None)


def _conversion(look: Look, exports: list[Path]) -> Gate:
    """Every export has a package, made from it as it is now, and every package was verified."""
    converted: set[str] = set()
    for one in packages_of(look):
        _, origin = look.evidence.record(one.package.with_suffix(".contract") / "contract.json", CONVERT)
        converted |= {file.sha256 for role, file in origin.inputs.items() if role == "contract"}
        verification(look, one)
    if missing := [path.name for path in exports if look.evidence.sha256(path, EXPORT) not in converted]:
        raise NoEvidence(f"stale: no package is of {', '.join(missing)} as exported now: {CONVERT}")
    return Gate("pass")


class _Manifest(msgspec.Struct, frozen=True):
    """What is looked at of deployment_manifest.json."""

    student: dict[str, Any]
    files: dict[str, File]
    overridden: list[str]


def _bundle(look: Look) -> Gate:
    """The bundle is of this checkpoint, its files are the manifest's, and no gate was overridden."""
    path = BUNDLE / "deployment_manifest.json"
    found = look.evidence.report(path, _Manifest, DEPLOY)
    if found.student.get("checkpoint_sha256") != look.evidence.sha256(LATEST, "make worker"):
        raise NoEvidence(f"stale: {BUNDLE} is of another checkpoint than {LATEST}: {DEPLOY}")
    for name, file in found.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{path}: {name!a} is no file of the bundle")
        if look.evidence.sha256(BUNDLE / name, DEPLOY) != file.sha256:
            raise NoEvidence(f"stale: {BUNDLE / name} is not the one in the manifest: {DEPLOY}")
    overridden = f"{path.name}: built although {len(found.overridden)} gates had not passed"
    return gates.holds(not found.overridden, reason=overridden if found.overridden else None)
