"""Apple's own operator tests (they ship in coremltools' wheel), run through the executor.

    python -m tests.conformance                        everything: both precisions, every deployment target
    python -m tests.conformance --shard 2/8            the second of eight parts
    python -m tests.conformance --sample 400 --seed 3  a random sample

Off macOS these tests pass without running anything. Here a prediction really happens, and a test that reaches none is
counted apart. The outcome is checked against known_failures.yaml both ways: an unlisted failure and a listed test that
passes are errors. Exit code 0 when all is as listed, 1 when not, 2 on a wrong argument.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
KNOWN = Path(__file__).with_name("known_failures.yaml")
_ENVIRONMENT = {
    "PYMIL_TEST_TARGETS": "mlprogram",
    "RUN_BACKWARD_COMPATIBILITY": "1",
    "INCLUDE_MIL_FP32_UNIT_TESTS": "1",
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
}


def suite_folder() -> Path:
    """Where the operator tests of the installed coremltools lie."""
    spec = find_spec("coremltools")
    if spec is None or spec.origin is None:
        sys.exit("error: coremltools is not installed")
    return Path(spec.origin).parent / "converters" / "mil" / "mil" / "ops" / "tests"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("--shard", type=fraction, default=(1, 1), metavar="I/N", help="the I-th of N parts")
    parser.add_argument("--sample", type=int, metavar="COUNT", help="only so many tests, chosen by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--match", metavar="REGEX", default="", help="only tests whose identifier matches")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="worker processes (default: every core)")
    parser.add_argument("--report", type=Path, default=ROOT / "runs" / "conformance.json", help="where results go")
    parser.add_argument("files", nargs="*", help="test files or folders of the suite, such as iOS18/test_states.py")
    return parser.parse_args(argv)


def fraction(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N")
    return int(match[1]), int(match[2])


@dataclass
class Worker:
    """One pytest process and the file it writes."""

    process: subprocess.Popen[bytes]
    record: Path
    log: Path

    def results(self) -> list[dict[str, Any]]:
        if not self.record.exists():
            return []
        lines = self.record.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]


def start(options: argparse.Namespace, folder: Path, scratch: Path) -> list[Worker]:
    """Worker w of W in shard i of N takes every test whose place in the order is i + N w, modulo N W."""
    shard, shards = options.shard
    workers = []
    for number in range(options.jobs):
        record, log = scratch / f"{number}.jsonl", scratch / f"{number}.log"
        part = f"{shard - 1 + shards * number}/{shards * options.jobs}"
        command = [sys.executable, "-W", "ignore", "-m", "pytest", "-p", "tests.conformance.recorder"]
        command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--tb=short", "--no-header", "-c", os.devnull]
        command += ["--rootdir", str(folder), "--record", str(record), "--part", part, "--seed", str(options.seed)]
        command += ["--match", options.match, "--sample", str(options.sample or 0)]
        command += [str(folder / name) for name in options.files] or [str(folder)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | _ENVIRONMENT | {"PYTHONPATH": path, "TMPDIR": str(scratch)}
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        workers.append(Worker(process, record, log))
    return workers


def watch(workers: list[Worker]) -> list[dict[str, Any]]:
    """Wait for the workers, with a line on progress; a worker that dies without an answer ends the run."""
    started = time.monotonic()
    shown = 0.0
    while any(w.process.poll() is None for w in workers):
        time.sleep(0.5)
        if time.monotonic() - shown > (2 if sys.stderr.isatty() else 60):
            shown = time.monotonic()
            print_progress([line for w in workers for line in w.results()], shown - started)
    for worker in workers:
        if worker.process.returncode not in (0, 1, 5):  # 5: its part holds no test
            tail = "\n".join(worker.log.read_text(errors="replace").splitlines()[-15:])
            sys.exit(f"error: a worker ended with code {worker.process.returncode}:\n{tail}")
    return [line for w in workers for line in w.results()]


def print_progress(lines: list[dict[str, Any]], seconds: float) -> None:
    expected = sum(line["tests"] for line in lines if "tests" in line)
    done = [line for line in lines if "id" in line]
    if not done:
        return
    failed = sum(line["outcome"] == "failed" for line in done)
    left = seconds / len(done) * (expected - len(done))
    text = f"{len(done):,} of {expected:,} tests, {failed} failed, {left / 60:.0f} min left"
    print(f"\r{text}   " if sys.stderr.isatty() else text, end="" if sys.stderr.isatty() else "\n", file=sys.stderr)


@dataclass
class Verdict:
    """Results against the list of known failures."""

    results: list[dict[str, Any]]
    known: dict[str, str]
    unexpected: list[dict[str, Any]] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return bool(self.results) and not (self.unexpected or self.mended or self.stale)


def judge(results: list[dict[str, Any]], known: dict[str, str], complete: bool) -> Verdict:
    """`complete`: every test ran, so that a listed name which did not is stale."""
    verdict = Verdict(results, known)
    verdict.unexpected = [r for r in results if r["outcome"] == "failed" and r["id"] not in known]
    verdict.mended = [r["id"] for r in results if r["outcome"] != "failed" and r["id"] in known]
    if complete:
        verdict.stale = sorted(known.keys() - {r["id"] for r in results})
    return verdict


def known_failures() -> dict[str, str]:
    """Test identifier -> reason."""
    entries = yaml.safe_load(KNOWN.read_text(encoding="utf-8")) or []
    listed = [(test, entry["reason"]) for entry in entries for test in entry["tests"]]
    twice = [test for test, n in Counter(test for test, _ in listed).items() if n > 1]
    if twice:
        sys.exit(f"error: {KNOWN.name} lists {twice[0]} twice")
    return dict(listed)


def family(result: dict[str, Any]) -> str:
    """'iOS17/test_scatter_gather.py::...' -> 'scatter_gather'."""
    return Path(result["id"].partition("::")[0]).stem.removeprefix("test_")


_COLUMNS = (
    *("family", "tests", "no prediction", "predicted", "fp16", "fp32", "comparisons"),
    *("passed", "xfailed", "known", "failed"),
)


def row(name: str, results: list[dict[str, Any]], known: dict[str, str]) -> list[Any]:
    reached = [r for r in results if r["predictions"]]
    failed = [r for r in results if r["outcome"] == "failed"]
    return [
        name,
        len(results),
        len(results) - len(reached),
        len(reached),
        sum(r["precision"] == "fp16" for r in reached),
        sum(r["precision"] == "fp32" for r in reached),
        sum(r["comparisons"] for r in reached),
        sum(r["outcome"] == "passed" for r in reached),
        sum(r["outcome"] == "skipped" for r in reached),  # the suite itself expects Core ML to fail
        sum(r["id"] in known for r in failed),
        sum(r["id"] not in known for r in failed),
    ]


def table(verdict: Verdict) -> str:
    families = sorted({family(r) for r in verdict.results})
    rows = [row(name, [r for r in verdict.results if family(r) == name], verdict.known) for name in families]
    rows.append(row("total", verdict.results, verdict.known))
    cells = [list(_COLUMNS), *[[v if isinstance(v, str) else f"{v:,}" for v in one] for one in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in cells
    )


def complaints(verdict: Verdict) -> Iterable[str]:
    for result in verdict.unexpected:
        yield f"failed, not listed: {result['id']}: {(result['message'].splitlines() or [''])[0][:300]}"
    yield from (f"listed, but passes: {test}" for test in verdict.mended)
    yield from (f"listed, but there is no such test: {test}" for test in verdict.stale)
    if not verdict.results:
        yield "no test ran"


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    known = known_failures()
    with tempfile.TemporaryDirectory(prefix="conformance-") as scratch:
        workers = start(options, suite_folder(), Path(scratch))
        try:
            lines = watch(workers)
        finally:
            for worker in workers:
                worker.process.terminate()
                worker.process.wait()
    results = sorted((line for line in lines if "id" in line), key=lambda r: str(r["id"]))
    whole = options.shard == (1, 1) and not (options.sample or options.match or options.files)
    verdict = judge(results, known, whole)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text("".join(json.dumps(r) + "\n" for r in results), encoding="utf-8")
    print(table(verdict))
    for line in complaints(verdict):
        print(line)
    print("conformance: " + ("as listed" if verdict.good else "NOT as listed"))
    return 0 if verdict.good else 1


if __name__ == "__main__":
    raise SystemExit(main())
