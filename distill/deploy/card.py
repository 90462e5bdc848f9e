"""MODEL_CARD.md: what the manifest says, for people. Every figure is one of a report, which is named.

`distill deploy verify` renders it again from the manifest and compares the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distill.deploy.manifest import Manifest
from distill.gates import Gate

CARD = "MODEL_CARD.md"
_REPORTS = {
    "contracts": "The package computes what the trained student computes",
    "distribution": "What the package loses in distribution, on held-out text",
    "evaluation": "Evaluation",
}


def model_card(manifest: Manifest, runtime: dict[str, Any]) -> str:
    """The card of a bundle."""
    sections = [
        f"# {manifest.name}",
        f"A student language model in a Core ML package. Its teacher: {manifest.teacher.model or 'unknown'}. Figures "
        "are those of the reports named beside them, made when the bundle was built, on the machine that built it; "
        'what no report holds is "not measured".',
        _overridden(manifest),
        "## What it is\n\n" + _table(("", "", "source"), _facts(manifest, runtime)),
        "## Teacher, data and licence\n\n" + _table(("", "", "source"), _origin(manifest)),
        "## Training\n\n" + _training(manifest),
        *(f"## {title}\n\n" + _gates(report, manifest.gates.get(report, {})) for report, title in _REPORTS.items()),
        "## Not measured\n\n" + "\n".join(f"- {line}" for line in _not_measured(manifest)),
        "## Versions\n\n" + _versions(manifest),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _overridden(manifest: Manifest) -> str:
    if not manifest.overridden:
        return ""
    lines = "\n".join(f"- {_plain(reason)}" for reason in manifest.overridden)
    return f"## Built although gates did not pass\n\n`--allow-failed-gates` let these through:\n\n{lines}"


def _facts(manifest: Manifest, runtime: dict[str, Any]) -> Iterable[tuple[Any, ...]]:
    inside = {path: file.bytes for path, file in manifest.files.items() if path.startswith(f"{manifest.package}/")}
    weights = next((size for path, size in inside.items() if path.endswith("weight.bin")), 0)
    lengths = runtime["prefill"]["chunk_lengths"]
    yield "parameters", f"{manifest.student.parameters:,}", "checkpoint"
    yield "package", f"{sum(inside.values()):,} bytes", "deployment_manifest.json, files"
    yield "of it weights", f"{weights:,} bytes", "deployment_manifest.json, files"
    formats = manifest.student.formats
    yield "weight formats", ", ".join(f"{k} {v}" for k, v in formats.items() if v) if formats else "fp16", "contract"
    yield "context", f"{runtime['context']:,} tokens", "runtime_config.json"
    yield "functions", ", ".join(runtime["functions"]), "runtime_config.json"
    yield "prompt tokens per call", ", ".join(map(str, [1, *lengths])), "runtime_config.json"


def _origin(manifest: Manifest) -> Iterable[tuple[Any, ...]]:
    teacher = manifest.teacher
    yield "teacher", teacher.model or "unknown", teacher.source
    yield "the teacher's weights", teacher.weights or "unknown", teacher.source
    yield "the teacher's terms", teacher.terms_url or "unknown", teacher.source
    yield "terms accepted by", teacher.accepted_by or "unknown", teacher.source
    stated = teacher.stated_licence
    yield "the teacher's licence", stated or "unknown", "configuration, unchecked" if stated else "nothing states it"
    yield "the student's licence", manifest.licence or "not stated", "configuration"
    yield "dataset", manifest.data.get("run_id") or "unknown", "checkpoint"
    yield "dataset, sha256", manifest.data.get("sha256") or "unknown", "checkpoint"
    for entry in manifest.lineage:
        init = entry.get("init")
        start = next((str(v) for v in (init or {}).values() if isinstance(v, str)), None) if init else None
        yield f"stage {entry.get('stage', '?')} started from", start or "new weights", "lineage"


def _training(manifest: Manifest) -> str:
    student = manifest.student
    rows: list[tuple[Any, ...]] = [
        ("last stage", student.stage or "unknown", "checkpoint"),
        ("steps", f"{student.step:,}", "checkpoint"),
        ("training loss at the end", _number(student.loss), "checkpoint"),
    ]
    held_out = (manifest.training or {}).get("held_out") or {}
    for name, after in (held_out.get("after") or {}).items():
        before = (held_out.get("before") or {}).get(name)
        rows.append((f"held-out {name}", f"{_number(before)} before, {_number(after)} after", "training report"))
    if held_out.get("after"):
        rows.append(("held-out records", held_out.get("records", "unknown"), "training report"))
    return _table(("", "", "source"), rows)


def _gates(report: str, gates: dict[str, Gate]) -> str:
    rows = [
        (name, gate.status, _number(gate.observed), _number(gate.threshold), gate.backend or "", gate.reason or "")
        for name, gate in gates.items()
    ]
    return f"Source: reports/{report}.json.\n\n" + _table(
        ("gate", "status", "observed", "limit", "computed by", "remark"), rows
    )


def _not_measured(manifest: Manifest) -> Iterable[str]:
    yield "speed, memory and placement on Apple hardware: not measured"
    for report, made in manifest.gates.items():
        for name, gate in made.items():
            if gate.status == "skipped":
                yield f"{report}: {name}: not measured ({_plain(gate.reason or 'no reason given')})"
    if not (manifest.training or {}).get("held_out"):
        yield "held-out loss: not measured (no report of this training run beside the checkpoint)"


def _versions(manifest: Manifest) -> str:
    names = sorted({name for found in manifest.versions.values() for name in found})
    columns = sorted(manifest.versions)
    return _table(("", *columns), [(n, *(manifest.versions[c].get(n, "") for c in columns)) for n in names])


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> str:
    """One line of a table, whatever a report says."""
    return " ".join(str(value).split()).replace("|", "\\|")
