"""What a bundle says of its origin: read from the checkpoint, the dataset beside it and the training report.

What nothing records is None, and is shown as unknown. Folders of the machine that built it are left out.
"""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

import msgspec

from distill.artifacts import read_json
from distill.checkpoint import Checkpoint, weights_sha256
from distill.contract import Contract
from distill.data.records import read_header, sidecar
from distill.deploy.manifest import StudentFacts, TeacherFacts
from distill.errors import InputError
from distill.export.deployed import deploy


def student_facts(loaded: Checkpoint, sha256: str, contract: Contract, package: str) -> StudentFacts:
    """The student, once the package is known to be made from it. InputError where it is not, or where the tokenizer is
    another. The student's weights are rounded to their formats in place."""
    if loaded.tokenizer.sha256 != contract.tokenizer_sha256:
        raise InputError(f"{package}: its tokenizer is not the checkpoint's")
    same = loaded.student.config == contract.model_config and loaded.formats in (None, contract.formats)
    if same:
        deploy(loaded, contract.formats)
    if not same or weights_sha256(loaded.student.float()) != contract.weights_sha256:
        raise InputError(f"{package}: was not made from this checkpoint: its contract names other weights")
    return StudentFacts(
        checkpoint_sha256=sha256,
        stage=loaded.stage,
        step=loaded.step,
        loss=loaded.loss,
        parameters=loaded.student.config.n_params(),
        weights_sha256=contract.weights_sha256,
        tokenizer_sha256=contract.tokenizer_sha256,
        chat_template_sha256=contract.chat_template_sha256,
        formats=msgspec.to_builtins(contract.formats),
    )


def data_path(loaded: Checkpoint, configured: str | None) -> Path | None:
    """The KD dataset: the configuration's, else that of the last training stage."""
    found = configured or (loaded.provenance.get("config") or {}).get("data")
    return Path(found) if isinstance(found, str) else None


def data_facts(loaded: Checkpoint) -> dict[str, Any]:
    """Fingerprints of the dataset of the last stage, as the checkpoint has them."""
    record = (loaded.provenance.get("inputs") or {}).get("data") or {}
    return {"sha256": record.get("sha256"), "run_id": (loaded.provenance.get("dataset") or {}).get("run_id")}


def teacher_facts(loaded: Checkpoint, data: Path | None, stated_licence: str | None) -> TeacherFacts:
    """The teacher, from the header of the dataset that the student was trained on; of another dataset, or of none, only
    the name that the checkpoint has."""
    dataset = loaded.provenance.get("dataset") or {}
    unknown = dict.fromkeys(("kind", "weights", "weights_sha256", "terms_url", "accepted_by"))
    if data is not None and (sidecar(data) / "header.json").is_file():
        header = read_header(data)
        if header.run_id == dataset.get("run_id"):
            return TeacherFacts(
                model=header.teacher.model,
                kind=header.teacher.kind,
                weights=header.teacher.weights,
                weights_sha256=header.teacher.weights_sha256,
                terms_url=header.licence.teacher_terms_url,
                accepted_by=header.licence.accepted_by,
                stated_licence=stated_licence,
                source="dataset header",
            )
    name = dataset.get("teacher")
    return TeacherFacts(
        model=name if isinstance(name, str) else None, stated_licence=stated_licence, source="checkpoint", **unknown
    )


def training_facts(loaded: Checkpoint, path: Path) -> dict[str, Any] | None:
    """Held-out values from the report beside a checkpoint, where it is the report of this very run."""
    report_path = path.with_name(f"{loaded.stage}.report.json")
    if not loaded.stage or not report_path.is_file() or not loaded.lineage:
        return None
    report = read_json(report_path)
    if not isinstance(report, dict):
        return None
    mine = (loaded.lineage[-1].get("fingerprint"), loaded.step, loaded.loss)
    if (report.get("fingerprint"), report.get("steps"), report.get("loss")) != mine:
        return None
    kept = ("fingerprint", "tokens", "first_loss", "loss", "held_out")
    return {key: report[key] for key in kept if key in report}


def without_folder(value: Any, folder: Path | str) -> Any:
    """Plain values whose texts name what lies in `folder` by its name there alone."""
    if isinstance(value, dict):
        return {key: without_folder(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folder(item, folder) for item in value]
    return value.replace(f"{folder}/", "") if isinstance(value, str) else value


def placeless(value: Any) -> Any:
    """Plain values with every absolute path cut to its last name."""
    if isinstance(value, dict):
        return {str(key): placeless(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [placeless(item) for item in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value
