"""Speed and memory of the executor `distill.mil` beside PyTorch eager, on a decoder of SmolLM2-135M's shape.

distill mil bench [--out runs/bench_mil] [--threads 2] [--repetitions 9] [--check]

The packages (random weights; prefill alone, and prefill at T=128 and T=256 with decode in one file) are made on first
use. Each row is measured in a process of its own; calls of the executor and of eager alternate, so that both see the
same machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from distill.errors import DistillError

POLICIES = ("ieee16", "fp32")
LIMITS = {"steady": 1.5, "first call": 3.0, "memory": 1.5}


def measure(args: argparse.Namespace, cell: str, policy: str) -> dict[str, float]:
    """One cell in its own process."""
    command = [sys.executable, "-m", "distill", "mil", "bench", "--cell", f"{cell}:{policy}", "--out", str(args.out)]
    command += ["--threads", str(args.threads), "--repetitions", str(args.repetitions)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise DistillError(f"bench: {cell} {policy} ended with status {done.returncode}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def medians(args: argparse.Namespace, cell: str, policies: tuple[str, ...], times: int) -> dict[str, dict[str, float]]:
    """The median of each number over several processes, policies in turn."""
    runs = {policy: [] for policy in policies}  # type: dict[str, list[dict[str, float]]]
    for _ in range(times):
        for policy in policies:
            runs[policy].append(measure(args, cell, policy))
    return {p: {k: statistics.median(r[k] for r in results) for k in results[0]} for p, results in runs.items()}


def report(args: argparse.Namespace) -> list[str]:
    """Print the table; returns what is above its limit."""
    import torch

    from distill.mil_tools.bench_cells import CONFIG, LENGTHS

    weights = 4 * CONFIG.n_params()
    print(f"{cpu()}, {args.threads} threads, torch {torch.__version__}, T={LENGTHS[0]}, {weights / 1e6:.0f} MB of fp32")
    speed = medians(args, "speed", POLICIES, 1)
    first = medians(args, "first", POLICIES, 3)
    memory = medians(args, "memory", POLICIES, 1)
    above = []
    print(f"{'':8}{'measure':48}{'executor':>10}{'to':>10}{'ratio':>8}{'limit':>7}")
    for policy in POLICIES:
        s, f, m = speed[policy], first[policy]["seconds"], memory[policy]
        beyond = m["peak"] - m["empty"]
        rows = [
            (
                f"steady call / eager's, s, median of {args.repetitions} pairs",
                s["executor"],
                s["eager"],
                s["ratio"],
                "steady",
            ),
            ("steady call / eager's, minima", None, None, s["ratio of minima"], ""),
            ("first call with loading / steady eager, s", f, s["eager"], f / s["eager"], "first call"),
            ("private peak above torch alone / weights, GB", beyond / 1e9, weights / 1e9, beyond / weights, "memory"),
            (
                "private peak of the whole process / weights, GB",
                m["peak"] / 1e9,
                weights / 1e9,
                m["peak"] / weights,
                "",
            ),
        ]
        for what, ours, theirs, ratio, limit in rows:
            numbers = "".join(f"{'' if n is None else f'{n:.3f}':>10}" for n in (ours, theirs))
            bound = f"{LIMITS[limit]:.1f}" if limit else ""
            print(f"{policy:8}{what:48}{numbers}{ratio:8.2f}{bound:>7}")
            if limit and ratio > LIMITS[limit]:
                above.append(f"{policy}: {what}: {ratio:.2f} is above {LIMITS[limit]}")
    return above


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distill mil bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench_mil"), help="folder of the package")
    parser.add_argument("--threads", type=int, default=2, help="of both (default 2)")
    parser.add_argument("--repetitions", type=int, default=9, help="pairs of steady calls (default 9)")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a ratio is above its limit")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


def run(args: argparse.Namespace) -> int:
    """Make the packages if there are none; measure."""
    import torch

    from distill.mil_tools.bench_cells import ALL, CELLS, make

    torch.set_num_threads(args.threads)
    if args.cell:
        cell, policy = args.cell.split(":")
        print(json.dumps(CELLS[cell](args.out, policy, args.repetitions)))
        return 0
    if not (args.out / ALL).exists():
        print(f"making {args.out / ALL}", flush=True)
        make(args.out)
    above = report(args)
    for line in above:
        print(line)
    return 1 if above and args.check else 0
