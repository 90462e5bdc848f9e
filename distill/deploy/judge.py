"""Which gates of a student's reports must have passed before it ships, and which may be skipped for a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from distill import gates
from distill.artifacts import read_json
from distill.errors import InputError
from distill.gates import Gate

REPORTS = ("contracts", "distribution", "evaluation")
"""Of every bundle, each at reports/NAME.json."""

MAY_BE_SKIPPED = {
    "contracts": {"core_ml", "tool_span_f1"},
    "evaluation": {"evaluation"},
}
"""By report: what only a Mac can answer, prompts that ask for no call, no evaluation yet. All else counts."""


_FRESH = "fresh"
"""Of every evaluation report that is there: was it made from this student."""


def unmet(reports: dict[str, dict[str, Gate]]) -> list[str]:
    """The gates that did not pass and may not be skipped, each with its reason, sorted."""
    found = [f"{report}: there is no such report" for report in REPORTS if not reports.get(report)]
    for report, made in reports.items():
        for name, gate in made.items():
            excused = gate.status == "skipped" and name in MAY_BE_SKIPPED.get(report, ()) and _FRESH not in made
            if gate.status != "pass" and not excused:
                found.append(f"{report}: {name} {gate.status}" + (f" ({gate.reason})" if gate.reason else ""))
    return sorted(found)


def gates_of(report: Any, source: str) -> dict[str, Gate]:
    """The gates of a report, of the form that distill/gates.py gives; InputError where they are not."""
    made = report.get("gates") if isinstance(report, dict) else None
    if not isinstance(made, dict) or not made:
        raise InputError(f"{source}: not a report: it has no gates")
    try:
        return msgspec.convert(made, dict[str, Gate])
    except msgspec.ValidationError as error:
        raise InputError(f"{source}: not a report: {error}") from error


def evaluation(path: Path, sha256s: set[str]) -> dict[str, Any]:
    """The evaluation's gates with its report; one skipped gate where there is none.

    A report that names none of `sha256s` among its inputs was made from something else: one failed gate more.
    """
    if not path.exists():
        return {"gates": gates.to_json({"evaluation": gates.skipped("no evaluation report")}), "report": None}
    report = read_json(path)
    found = gates_of(report, str(path))
    try:
        json.dumps(report, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a report: {error}") from error
    fresh = bool(_inputs(report) & sha256s)
    stale = None if fresh else "stale: made from another checkpoint or package than this one"
    return {"gates": gates.to_json(found | {_FRESH: gates.holds(fresh, reason=stale)}), "report": report}


def _inputs(report: dict[str, Any]) -> set[str]:
    """The sha256s that a report's provenance names."""
    made_by = report.get("made_by")
    inputs = made_by.get("inputs") if isinstance(made_by, dict) else None
    files = inputs.values() if isinstance(inputs, dict) else []
    return {str(file.get("sha256")) for file in files if isinstance(file, dict)}
