"""ANE eligibility, read from the serialized package anywhere; placement, asked of Core ML on a Mac.

    python -m distill.verify.ane MODEL.mlpackage [--json OUT] [--strict]

Eligible is not placed: an eligible operation may run on the Neural Engine; Core ML decides whether it does.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill import artifacts, gates, mil
from distill.errors import PackageError, Skipped, stage_main
from distill.gates import Gate, Status
from distill.mil.package import PLACEHOLDER
from distill.verify import ane_op_rules as _  # noqa: F401  enters its rules into the table
from distill.verify.ane_ops import Limits, View
from distill.verify.ane_rules import RULES, Hit, Rule, Severity

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
ELIGIBILITY, PLACEMENT = "ane_eligibility", "ane_placement"


@dataclass(frozen=True)
class Finding:
    """One violation: which rule, where, and the value that was wrong."""

    rule: str
    severity: Severity
    title: str
    message: str
    function: str
    op_type: str
    output: str
    """The operation's output, or the name of the input, output or state; empty for the whole package."""
    source: str
    conflict: str

    @property
    def where(self) -> str:
        """`main: softmax probs`, as far as it is known."""
        name = " ".join(part for part in (self.op_type, self.output) if part)
        return ": ".join(part for part in (self.function, name) if part) or "package"


@dataclass(frozen=True)
class Placement:
    """Core ML's plan: operations and estimated cost by device ('ane', 'gpu', 'cpu')."""

    operations: dict[str, int]
    cost: dict[str, float]
    off_ane: list[str]
    unplanned: int
    """Operations that the plan says nothing about; constants are among them."""

    @property
    def ane_cost(self) -> float:
        """Share of the estimated cost on the Neural Engine; not a share of time."""
        total = sum(self.cost.values())
        return self.cost.get("ane", 0.0) / total if total else 0.0


@dataclass(frozen=True)
class LintReport:
    """What the lint found, and where asked for, the placement gate."""

    model: str
    findings: tuple[Finding, ...]
    rules_checked: int
    placement: Gate | None = None
    placed: Placement | None = field(default=None, compare=False)

    @property
    def counts(self) -> dict[Severity, int]:
        """Findings by severity."""
        return {s: sum(f.severity == s for f in self.findings) for s in SEVERITIES}

    @property
    def gates(self) -> dict[str, Gate]:
        """Eligibility passes without errors; placement is there when it was asked for."""
        errors = [f for f in self.findings if f.severity == "error"]
        reason = f"{errors[0].rule} at {errors[0].where}: {errors[0].message}" if errors else None
        verdict = gates.holds(not errors, observed=self.counts, threshold={"error": 0}, backend="lint", reason=reason)
        return {ELIGIBILITY: verdict} | ({PLACEMENT: self.placement} if self.placement else {})

    @property
    def status(self) -> Status:
        """The eligibility verdict."""
        return self.gates[ELIGIBILITY].status

    def to_json(self) -> dict[str, Any]:
        """Plain values: gates, counts, every finding with its source."""
        return {
            "model": self.model,
            "gates": gates.to_json(self.gates),
            "counts": dict(self.counts),
            "rules_checked": self.rules_checked,
            "findings": [asdict(finding) for finding in self.findings],
            "placement": asdict(self.placed) if self.placed else None,
        }

    @property
    def closing_line(self) -> str:
        """Verdicts and findings, counted."""
        found = ", ".join(f"{n} {severity}" for severity, n in self.counts.items())
        return f"ANE: {gates.summary(self.gates)}; findings: {found} (eligibility, not placement)"


def lint(program: mil.Program, limits: Limits | None = None) -> LintReport:
    """Check every rule against a program; errors first."""
    view, numbers = View(program), limits or Limits()
    findings = [_finding(rule, hit) for rule in RULES.values() for hit in rule.check(view, numbers)]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return LintReport(str(program.path), tuple(findings), len(RULES))


def _finding(rule: Rule, hit: Hit) -> Finding:
    op_type = hit.operation.type if hit.operation else ""
    return Finding(
        rule.id,
        rule.severity,
        rule.title,
        hit.message,
        hit.function,
        op_type,
        hit.tensor,
        rule.source,
        rule.conflict,
    )


def run(path: Path, limits: Limits | None = None) -> LintReport:
    """Lint a package; check its placement on a Mac with a Neural Engine, skip that gate elsewhere."""
    numbers = limits or Limits()
    if (path / PLACEHOLDER).exists():
        raise Skipped(f"{path} is a placeholder package: it holds no model")
    report = lint(mil.load(path), numbers)
    try:
        placed = placement(path)
    except Skipped as skip:
        gate, found = gates.skipped(skip.reason, backend="MLComputePlan"), None
    else:
        found = placed
        gate = gates.holds(
            placed.ane_cost >= numbers.min_ane_cost,
            observed=placed.ane_cost, threshold=numbers.min_ane_cost, backend="MLComputePlan",
            reason=f"off the ANE: {', '.join(placed.off_ane[:5])}" if placed.off_ane else None,
        )  # fmt: skip
    return LintReport(report.model, report.findings, report.rules_checked, gate, found)


def placement(path: Path | str) -> Placement:
    """Where Core ML would run each operation, from MLComputePlan under CPU_AND_NE.

    Needs macOS 14.4 and a Neural Engine; raises Skipped elsewhere. This project has never run it: its tests
    cover `placement_of`, which reads a plan, on one made by hand. A multifunction package is planned as Core
    ML compiles it; operations without an answer are counted in `unplanned`. The plan is an estimate.
    """
    if platform.system() != "Darwin":
        raise Skipped(f"placement is Core ML's own answer and needs macOS; this is {platform.system()}")
    version = platform.mac_ver()[0]
    if tuple(int(part) for part in version.split(".")[:2]) < (14, 4):
        raise Skipped(f"MLComputePlan needs macOS 14.4; this is {version}")
    import coremltools as ct
    from coremltools.models.compute_device import MLComputeDevice, MLNeuralEngineComputeDevice
    from coremltools.models.compute_plan import MLComputePlan

    if not any(isinstance(d, MLNeuralEngineComputeDevice) for d in MLComputeDevice.get_all_compute_devices()):
        raise Skipped("this Mac shows no Neural Engine (an Intel Mac or a virtual machine)")
    with tempfile.TemporaryDirectory() as folder:
        compiled = ct.models.utils.compile_model(str(path), str(Path(folder) / "model.mlmodelc"))
        plan = MLComputePlan.load_from_path(compiled, compute_units=ct.ComputeUnit.CPU_AND_NE)
        return placement_of(plan, str(path))


def placement_of(plan: Any, model: str) -> Placement:
    """Count a compute plan's operations and cost by preferred device."""
    from coremltools.models import compute_device

    kinds = {
        compute_device.MLNeuralEngineComputeDevice: "ane",
        compute_device.MLGPUComputeDevice: "gpu",
        compute_device.MLCPUComputeDevice: "cpu",
    }
    program = plan.model_structure.program
    if program is None:
        raise PackageError(f"{model}: Core ML's plan has no ML Program")
    placed = Placement({}, {}, [], 0)
    unplanned = 0
    for name, function in program.functions.items():
        for op in _planned_operations(function.block):
            usage = plan.get_compute_device_usage_for_mlprogram_operation(op)
            if usage is None or op.operator_name == "const":
                unplanned += 1
                continue
            device = kinds.get(type(usage.preferred_compute_device), "unknown")
            cost = plan.get_estimated_cost_for_mlprogram_operation(op)
            placed.operations[device] = placed.operations.get(device, 0) + 1
            placed.cost[device] = placed.cost.get(device, 0.0) + (cost.weight if cost else 0.0)
            if device != "ane":
                output = op.outputs[0].name if op.outputs else ""
                placed.off_ane.append(f"{name}: {op.operator_name} {output} on {device}")
    return Placement(placed.operations, placed.cost, placed.off_ane, unplanned)


def _planned_operations(block: Any) -> Iterator[Any]:
    for op in block.operations:
        yield op
        for nested in op.blocks:
            yield from _planned_operations(nested)


def print_report(report: LintReport, console: Console | None = None) -> None:
    """One row a rule that was hit, its first finding shown; then the sources; then the gates."""
    console = console or Console(width=None if Console().is_terminal else 140, highlight=False)
    by_rule: dict[str, list[Finding]] = {}
    for finding in report.findings:
        by_rule.setdefault(finding.rule, []).append(finding)
    if by_rule:
        table = Table("severity", "rule", "n", "first at", "what was found", title=f"ANE eligibility: {report.model}")
        for id, found in by_rule.items():
            cells = (
                found[0].severity,
                id,
                str(len(found)),
                found[0].where,
                f"{found[0].title}: {found[0].message}",
            )
            table.add_row(*map(Text, cells))
        console.print(table)
        for id, found in by_rule.items():
            conflict = f". Against: {found[0].conflict}" if found[0].conflict else ""
            console.print(Text(f"{id}: {found[0].source}{conflict}"))
    console.print(Text(gates.table(report.gates)))
    console.print(Text(report.closing_line), soft_wrap=True)


@stage_main
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="distill ane", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="an .mlpackage")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report, every finding in it, to OUT")
    parser.add_argument("--strict", action="store_true", help="exit 3 on warnings and on skipped checks")
    args = parser.parse_args(argv)
    try:
        report = run(args.model)
    except Skipped as skip:
        print(f"ANE: {gates.summary({ELIGIBILITY: gates.skipped(skip.reason)})}")
        return 3 if args.strict else 0
    if args.json:
        files = {str(f.relative_to(args.model)): f for f in sorted(args.model.rglob("*")) if f.is_file()}
        made = artifacts.provenance({"strict": args.strict}, files)
        artifacts.write_json(args.json, report.to_json() | {"provenance": made})
    print_report(report)
    code = gates.exit_code(report.gates, strict=args.strict)
    return 3 if args.strict and code == 0 and report.counts["warning"] else code


if __name__ == "__main__":
    raise SystemExit(main(None))
