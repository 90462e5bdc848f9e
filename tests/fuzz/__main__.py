"""Fuzz for a given time: `python -m tests.fuzz SECONDS [--jobs 2] [--out fuzz-failures]`.

Each failure is made as small as possible and written as a recipe; `--replay FILE` runs one again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.harness import Escape, Harness
from tests.fuzz.mutate import CHANGES, Change, Recipe


def draw(rng: random.Random, names: list[str]) -> Recipe:
    """Mostly few changes: a package with many is refused for the first."""
    count = rng.choice((1, 1, 1, 2, 2, 3, 5))
    kinds = [rng.choice(CHANGES) if rng.random() < 0.6 else "invent" for _ in range(count)]
    return Recipe(rng.choice(names), tuple(Change(k, rng.getrandbits(32), rng.getrandbits(32)) for k in kinds))


def signature(harness: Harness, recipe: Recipe) -> str | None:
    try:
        harness.run(recipe)
    except Escape as escape:
        return escape.signature
    return None


def smaller(harness: Harness, recipe: Recipe, wanted: str) -> Recipe:
    """Leave out changes as long as the same defect shows."""
    for change in recipe.changes:
        less = recipe._replace(changes=tuple(c for c in recipe.changes if c is not change))
        if less.changes and signature(harness, less) == wanted:
            recipe = less
    return recipe


def fuzz(seconds: float, seed: int, out: Path) -> dict[str, object]:
    rng = random.Random(seed)
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            recipe = draw(rng, list(harness.sound))
            try:
                harness.run(recipe)
            except Escape as escape:
                if escape.signature in failures:
                    continue
                recipe = smaller(harness, recipe, escape.signature)
                failures[escape.signature] = str(escape)
                out.mkdir(parents=True, exist_ok=True)
                saved = {"recipe": recipe, "signature": escape.signature, "message": str(escape)}
                (out / f"{seed}-{len(failures)}.json").write_text(json.dumps(saved, indent=1))
                print(f"FAILURE {escape.signature}\n{escape}", file=sys.stderr, flush=True)
        harness.close()
    return {"outcomes": harness.outcomes, "messages": harness.messages, "failures": failures}


def replay(path: Path) -> int:
    package, changes = json.loads(path.read_text())["recipe"]
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder))
        print(harness.run(Recipe(package, tuple(Change(*c) for c in changes))))
        harness.close()
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("seconds", type=float, nargs="?", default=60.0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=None, help="the first job's; the others count on")
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--replay", type=Path)
    args = parser.parse_args(argv)
    if args.replay:
        return replay(args.replay)
    seed = args.seed if args.seed is not None else random.SystemRandom().getrandbits(31)
    if args.jobs == 1:
        print(json.dumps(fuzz(args.seconds, seed, args.out)))
        return 0
    base = [sys.executable, "-m", "tests.fuzz", str(args.seconds), "--jobs", "1", "--out", str(args.out), "--seed"]
    jobs = [subprocess.Popen([*base, str(seed + i)], stdout=subprocess.PIPE, text=True) for i in range(args.jobs)]
    answers = [job.communicate()[0] for job in jobs]
    for job, answer in zip(jobs, answers):
        if job.returncode or not answer:
            print(f"a job ended with {job.returncode}", file=sys.stderr)
    results = [json.loads(answer.splitlines()[-1]) for answer in answers if answer]
    outcomes: Counter[str] = Counter()
    messages: Counter[str] = Counter()
    failures: set[str] = set()
    for result in results:
        outcomes.update(result["outcomes"])
        messages.update(result["messages"])
        failures |= result["failures"].keys()
    for message, count in messages.most_common():
        print(f"{count:6}  {message}")
    print(f"{outcomes.total()} packages (seed {seed}): {dict(outcomes)}; {len(messages)} different messages")
    for failure in sorted(failures):
        print(f"FAILURE {failure}")
    return 1 if failures or len(results) < args.jobs else 0


if __name__ == "__main__":
    sys.exit(main())
