"""How fast a dataset is validated: `python -m tests.bench_validate [--records 50000] [--jobs 2]`.

Whole episodes of about 5.5 KB (tools, reasoning, 17 targets) in a temporary folder; CPU seconds of one process beside
the wall clock, since other work on the machine slows only the latter.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Literal

from distill.data.rules import header
from distill.data.rules.block import Options
from distill.data.validate import validate
from tests.unit.kd_sets import write_set


def measure(path: Path, rules: Literal["structural", "all"], jobs: int) -> str:
    """A line: MB/s by the wall clock, and by CPU time where one process does it all."""
    wall, cpu = time.perf_counter(), time.process_time()
    report = validate(path, Options(rules, jobs=jobs))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    wrong = [name for name, gate in report.gates.items() if gate.status == "fail"]
    size = path.stat().st_size / 1e6
    by_cpu = f", {size / cpu:6.1f} MB/s of CPU time" if jobs == 1 else ""
    return f"{rules:10} {jobs} process(es): {size / wall:6.1f} MB/s{by_cpu}; failing rules: {wrong or 'none'}"


def main() -> None:
    """Make a dataset and validate it."""
    parser = argparse.ArgumentParser(prog="bench_validate")
    parser.add_argument("--records", type=int, default=50_000, help="for the structural rules; a tenth for all of them")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    header.toy_problems = lambda _: iter(())  # its sets are invented, and of no teacher
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "large.jsonl", Path(folder) / "small.jsonl"
        write_set(large, args.records, size=30, logprobs=False)
        write_set(small, max(args.records // 10, 24), size=30)
        print(f"{args.records} records, {large.stat().st_size / 1e6:.0f} MB, for the structural rules; "
              f"{small.stat().st_size / 1e6:.0f} MB with distributions for all")  # fmt: skip
        for path, rules, jobs in ((large, "structural", 1), (small, "all", 1), (small, "all", args.jobs)):
            print(measure(path, rules, jobs), flush=True)


if __name__ == "__main__":
    main()
