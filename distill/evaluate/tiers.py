"""The quality gates by tier: does what the targets left show what a tier promises, of what is there now?

    distill gates [--tier smoke|toy|full] [--reports eval/reports] [--report OUT.json]

Nothing is run here. Every cell is judged from reports, and a report counts only while the packages, checkpoints and
data that it was made from are the ones that are there. Exit code 0: all that applies passed (skips are named);
1: something failed, or its report cannot be read; 3: something was not run, is stale or inconclusive.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distill import gates
from distill.artifacts import provenance, write_json
from distill.errors import stage_main
from distill.evaluate import tier_cells, tier_pipelines
from distill.evaluate.evidence import Evidence, combined, gathered
from distill.evaluate.tier_cells import Look
from distill.gates import Gate

TIERS = {"smoke": "Smoke Tests", "toy": "Toy E2E", "full": "Full Training"}
TABLE: dict[str, dict[str, Callable[[Look], Iterator[Gate]]]] = {
    "Pipeline Completeness": {"smoke": tier_pipelines.smoke, "toy": tier_pipelines.toy, "full": tier_pipelines.full},
    "CoreML Compatibility": {"smoke": tier_cells.core_ml, "toy": tier_cells.core_ml, "full": tier_cells.core_ml},
    "Contract Compliance": {"toy": tier_cells.contracts, "full": tier_cells.contracts},
    "CAWS Evaluation": {"full": tier_cells.caws},
    "Performance Targets": {"full": tier_cells.performance},
    "Integration Tests": {"toy": tier_cells.integration, "full": tier_cells.integration},
}
"""Row -> tier -> how it is judged. What is not here does not apply."""


class GatesConfig(NamedTuple):
    """What to judge."""

    tier: str | None = None
    """None: all three."""
    reports: Path = Path("eval/reports")
    toy: Path = Path("/tmp")
    """Where `make toy-e2e` works."""


def run(config: GatesConfig) -> dict[str, Any]:
    """Judge; returns the report."""
    evidence = Evidence()
    tiers = [tier for tier in TIERS if config.tier in (None, tier)]
    cells = {f"{tier}: {row}": (tier, row) for tier in tiers for row in TABLE}
    found = {
        name: combined(gathered(TABLE[row][tier], Look(tier, config.reports, config.toy, evidence)))
        for name, (tier, row) in cells.items()
        if tier in TABLE[row]
    }
    return {
        "schema": "distill-tiers/1",
        "gates": gates.to_json(found),
        "counts": gates.count(found),
        "not_applicable": [name for name in cells if name not in found],
        "made_by": provenance({"tier": config.tier, "reports": str(config.reports)}, evidence.read),
    }


def table(found: dict[str, Gate]) -> str:
    """The table, then a line for each cell that did not pass, or not in everything."""
    tiers = [tier for tier in TIERS if any(name.startswith(f"{tier}: ") for name in found)]
    lines = [f"{'':24}" + "".join(f"{TIERS[tier]:16}" for tier in tiers)]
    for row in TABLE:
        cells = [found.get(f"{tier}: {row}") for tier in tiers]
        lines.append(f"{row:24}" + "".join(f"{cell.status.upper() if cell else 'n/a':16}" for cell in cells))
    said = [f"{name}: {gate.status}: {gate.reason}" for name, gate in found.items() if gate.reason]
    return "\n".join([line.rstrip() for line in lines] + [""] * bool(said) + said)


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Parse, judge, print the table and the closing line."""
    parser = argparse.ArgumentParser(prog="distill gates", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__)  # fmt: skip
    parser.add_argument("--tier", choices=list(TIERS), help="one column; default: all three")
    parser.add_argument("--reports", type=Path, default=GatesConfig().reports, help="default: eval/reports")
    parser.add_argument("--report", type=Path, help="where the JSON report goes")
    args = parser.parse_args(argv)
    report = run(GatesConfig(args.tier, args.reports))
    if args.report is not None:
        write_json(args.report, report)
    found = {name: Gate(**value) for name, value in report["gates"].items()}
    print(table(found))
    print(f"gates: {gates.summary(found)}")
    return gates.exit_code(found)
