"""How fast a package is: on a Mac by compute unit, elsewhere SKIPPED; beside it what no chip can beat.

    python -m distill speed [--model X.mlpackage ...] [--report eval/reports/speed.json] [--rounds 20] [--strict]

Timings of our executor are those of a checking tool and say nothing of Core ML.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from distill import artifacts, gates
from distill.errors import InputError, Skipped, stage_main
from distill.evaluate import timing
from distill.evaluate.bounds import bound
from distill.evaluate.chips import CHIPS, LARGEST_CACHE, PRECISION, SOURCES
from distill.evaluate.timing import EXECUTOR, UNITS, Package, Session, Timing
from distill.gates import Gate
from distill.verify import ane
from distill.versions import versions

DEFAULT_FOLDER = Path("coreml/artifacts/worker")
DEFAULT_REPORT = Path("eval/reports/speed.json")


class SpeedConfig(NamedTuple):
    """What to time."""

    models: tuple[Path, ...] = ()
    """Empty: every package of coreml/artifacts/worker."""
    report: Path | None = DEFAULT_REPORT
    rounds: int = 20
    """Calls of each function on each unit; of the executor a quarter of them, at least 3."""


def run(config: SpeedConfig) -> dict[str, Any]:
    """Time every package; returns the report. What this machine cannot time is skipped, with the reason."""
    models = config.models or tuple(sorted(DEFAULT_FOLDER.glob("*.mlpackage")))
    if not models:
        raise InputError(f"{DEFAULT_FOLDER}: holds no package; run make coreml-worker first, or give --model")
    if config.rounds < 2:
        raise InputError(f"--rounds {config.rounds}: at least 2")
    packages = [timing.read(path) for path in models]
    machine = {"system": platform.platform(), "chip": own_chip()}
    results = [_measure(package, config.rounds) for package in packages]
    verdicts: dict[str, Gate] = {}
    for result in results:
        verdicts |= {f"{name} {result['package']}": gate for name, gate in _judge(result, machine["chip"]).items()}
    files = {str(f): f for package in packages for f in sorted(package.path.rglob("*")) if f.is_file()}
    report = {
        "schema": "distill-speed/1",
        "machine": machine,
        "gates": gates.to_json(verdicts),
        "counts": gates.count(verdicts),
        "packages": results,
        "chips": [chip._asdict() | {"precision": PRECISION} for chip in CHIPS],
        "sources": {name: source._asdict() for name, source in SOURCES.items()},
        "largest_cache": LARGEST_CACHE,
        "versions": versions(),
        "made_by": artifacts.provenance({"rounds": config.rounds}, files),
    }
    if config.report is not None:
        artifacts.write_json(config.report, report)
    return report


def own_chip() -> str | None:
    """This machine's chip as the table names it; None where it is none of them."""
    if sys.platform != "darwin":
        return None
    done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], stdout=subprocess.PIPE, text=True, check=False)
    name = done.stdout.strip().removeprefix("Apple ")
    return name if name in {chip.name for chip in CHIPS} else None


def _measure(package: Package, rounds: int) -> dict[str, Any]:
    sessions = timing.executor_sessions(package)
    rows = _rows(package, sessions, timing.time_all(sessions, max(3, rounds // 4)))
    memory = {EXECUTOR: timing.peak_memory(package.path, EXECUTOR)}
    placed: dict[str, Any]
    try:
        if sys.platform != "darwin":
            raise Skipped(f"Core ML runs on macOS only; this is {platform.system()}")
        rows += core_ml_rows(package, rounds)
        memory |= {unit: timing.peak_memory(package.path, unit) for unit in UNITS}
    except Skipped as skipped:
        rows += [{"unit": unit, "status": "skipped", "reason": skipped.reason} for unit in UNITS]
    try:
        placed = dataclasses.asdict(ane.placement(package.path))
    except Skipped as skipped:
        placed = {"status": "skipped", "reason": skipped.reason}
    functions = {}
    for name, cost in package.costs.items():
        chips = [bound(cost, chip)._asdict() for chip in CHIPS]
        functions[name] = {"cost": cost._asdict(), "at_most_tokens_per_second": chips}
    return {
        "package": str(package.path),
        "functions": functions,
        "rows": rows,
        "peak_bytes": memory,
        "placement": placed,
    }


def core_ml_rows(package: Package, rounds: int) -> list[dict[str, Any]]:
    """Every function on every compute unit, by whatever stands behind coremltools' MLModel: on a Mac, Core ML."""
    sessions = timing.core_ml_sessions(package, UNITS)
    return _rows(package, sessions, timing.time_all(sessions, rounds))


def _rows(package: Package, sessions: list[Session], found: list[Timing]) -> list[dict[str, Any]]:
    return [
        {
            "unit": session.unit,
            "status": "measured",
            "function": session.function,
            "load_seconds": session.load,
            "seconds": taken._asdict(),
            "tokens_per_second": package.costs[session.function].tokens / taken.median,
        }
        for session, taken in zip(sessions, found, strict=True)
    ]


def _judge(result: dict[str, Any], chip: str | None) -> dict[str, Gate]:
    """Was Core ML timed, and is it within what the table says is possible? A speed above that is a wrong table."""
    measured = [row for row in result["rows"] if row["unit"] in UNITS and row["status"] == "measured"]
    if not measured:
        reason = next(row["reason"] for row in result["rows"] if row["unit"] in UNITS)
        return {name: gates.skipped(reason) for name in ("core_ml_speed", "within_bound", "placement")}
    out = {"core_ml_speed": gates.holds(True, observed=len(measured), backend="Core ML")}
    shares = []
    for row in measured:
        limits = result["functions"][row["function"]]["at_most_tokens_per_second"]
        limit = next((b["bandwidth"] for b in limits if b["chip"] == chip), None)
        shares += [row["tokens_per_second"] / limit] if limit else []
    what = "measured speed as a share of the bound by bandwidth"
    out["within_bound"] = (
        gates.at_most(max(shares), 1.0, backend="Core ML", reason=what)
        if shares
        else gates.skipped("no bound: the chip's bandwidth is unknown, or the weights may stay in a cache")
    )
    placed = result["placement"]
    out["placement"] = (
        gates.skipped(placed["reason"])
        if placed.get("status") == "skipped"
        else gates.holds(True, observed=placed["operations"], backend="MLComputePlan")
    )
    return out


def table(report: dict[str, Any]) -> str:
    """What was measured, what was not and why, then the bounds by chip."""
    lines = []
    for result in report["packages"]:
        lines += ["", result["package"]]
        skipped: dict[str, list[str]] = {}
        for row in result["rows"]:
            if row["status"] == "skipped":
                skipped.setdefault(row["reason"], []).append(row["unit"])
                continue
            s, peak = row["seconds"], result["peak_bytes"].get(row["unit"])
            lines.append(
                f"  {row['function']:12s} {1e3 * s['median']:10.2f} ms ({1e3 * s['low']:.2f} to {1e3 * s['high']:.2f}, "
                f"n {s['calls']}) {row['tokens_per_second']:10.1f} tokens/s "
                f"{'' if peak is None else f'{peak / 1e6:8.0f} MB'}  {row['unit']}"
            )
        lines += [f"  SKIPPED      {', '.join(units)}: {reason}" for reason, units in skipped.items()]
        lines += _bounds(result)
    return "\n".join(lines[1:])


def _bounds(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, function in result["functions"].items():
        cost = {k: v / 1e6 for k, v in function["cost"].items()}
        lines.append(
            f"  {name}: a call of {function['cost']['tokens']} tokens reads {cost['read']:.1f} MB of "
            f"{cost['weights']:.1f} MB of weights and {cost['state']:.1f} MB of state, {cost['operations'] / 1e3:.2f} "
            "G operations"
        )
    names = list(result["functions"])
    lines.append(f"  at most, tokens/s by memory / by the Neural Engine's operations, precision {PRECISION};")
    lines.append("  -: unknown, or no bound since weights and state may stay in a cache")
    lines.append(f"    {'chip':10s}" + "".join(f"{name:>24s}" for name in names))
    unbound = []
    for index, chip in enumerate(CHIPS):
        cells = [result["functions"][name]["at_most_tokens_per_second"][index] for name in names]
        words = [f"{_number(cell['bandwidth'])} / {_number(cell['operations'])}" for cell in cells]
        if set(words) == {"- / -"}:
            unbound.append(chip.name)
        else:
            lines.append(f"    {chip.name:10s}" + "".join(f"{word:>24s}" for word in words))
    return lines + ([f"    no bound: {', '.join(unbound)}"] if unbound else [])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Parse, time, print the tables and the closing line."""
    parser = argparse.ArgumentParser(prog="distill speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", type=Path, nargs="+", default=[], help=f"packages (default: all of {DEFAULT_FOLDER})"
    )
    parser.add_argument("--report", type=Path, default=DEFAULT_REPORT, help=f"default: {DEFAULT_REPORT}")
    parser.add_argument("--rounds", type=int, default=20, help="calls of each function on each unit (default: 20)")
    parser.add_argument("--strict", action="store_true", help="exit 3 if anything was skipped")
    parser.add_argument("--memory-of", choices=(*UNITS, EXECUTOR), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory_of:
        print(json.dumps({"bytes": timing.own_peak(timing.read(args.model[0]), args.memory_of)}))
        return 0
    report = run(SpeedConfig(tuple(args.model), args.report, args.rounds))
    result = {name: Gate(**value) for name, value in report["gates"].items()}
    print(table(report))
    print(f"report: {args.report}")
    print(f"speed: {gates.summary(result)}")
    code = gates.exit_code(result, strict=args.strict)
    return 0 if code == 3 and not args.strict else code
