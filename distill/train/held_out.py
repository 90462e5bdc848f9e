"""What training changed on held-out data, judged: against the student's own initialisation, or against another run.

distill held-out models/student/checkpoints/worker.report.json [--against OTHER.report.json]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distill import gates
from distill.artifacts import read_json
from distill.errors import InputError, stage_main
from distill.gates import Gate

COMPONENTS = ("kl_div", "ce_teacher")


def read_report(path: Path) -> dict[str, Any]:
    """A stage's training report with held-out values; InputError if it has none."""
    report = read_json(path)
    held_out = report.get("held_out") if isinstance(report, dict) else None
    if not isinstance(held_out, dict) or not held_out.get("before") or not held_out.get("after"):
        raise InputError(f"{path}: holds no held-out values (train on a set with records of split val)")
    return report


def judge(report: dict[str, Any], against: dict[str, Any] | None) -> dict[str, Gate]:
    """Each component must have fallen; with `against`, KL must be below the other run's, at no fewer of its tokens."""
    before, after = report["held_out"]["before"], report["held_out"]["after"]
    out = {}
    for name in COMPONENTS:
        if name in before and name in after:
            out[f"{name}_below_initialisation"] = gates.holds(
                after[name] < before[name], observed=after[name], threshold=before[name]
            )
        else:
            out[f"{name}_below_initialisation"] = gates.skipped(f"{name} is absent: no teacher distributions")
    if against is not None:
        other = against["held_out"]["after"]
        same = against["tokens"] == report["tokens"]
        out["equal_tokens"] = gates.holds(same, observed=report["tokens"], threshold=against["tokens"])
        if "kl_div" in other and "kl_div" in after:
            out["kl_div_below_other"] = gates.holds(
                after["kl_div"] < other["kl_div"], observed=after["kl_div"], threshold=other["kl_div"]
            )
    return out


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Held-out values of each run, before and after."""
    lines = [f"{'run':12s} {'tokens':>8s} {'tok/s':>7s} " + " ".join(f"{n:>22s}" for n in COMPONENTS)]
    for name, report in runs.items():
        before, after = report["held_out"]["before"], report["held_out"]["after"]
        cells = [f"{before[n]:9.4f} -> {after[n]:9.4f}" if n in before else "absent" for n in COMPONENTS]
        speed = report.get("tokens_per_second", 0.0)
        lines.append(f"{name:12s} {report['tokens']:8,} {speed:7.0f} " + " ".join(f"{c:>22s}" for c in cells))
    return "\n".join(lines)


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Print the table, the gates and the closing line."""
    parser = argparse.ArgumentParser(prog="distill held-out", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path, help="a training report, <stage>.report.json")
    parser.add_argument("--against", type=Path, help="the report of a run to beat")
    args = parser.parse_args(argv)
    report = read_report(args.report)
    against = read_report(args.against) if args.against else None
    runs = {str(report["stage"]): report} | ({str(against["stage"]): against} if against else {})
    tokens = ", ".join(f"{n:,} of {name}" for name, n in report["held_out"]["target_tokens"].items())
    print(f"held out: {report['held_out']['records']} records; target tokens: {tokens}")
    print(table(runs))
    result = judge(report, against)
    print(gates.table(result))
    print(gates.summary(result))
    return gates.exit_code(result)
