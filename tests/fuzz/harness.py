"""Runs recipes in worker processes and tells what escaped."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzz import mutate, packages
from tests.fuzz.mutate import WORDS, Recipe

ROOT = Path(__file__).parents[2]


class Escape(AssertionError):
    """A package that did more than answer or be refused; `signature` names the defect."""

    def __init__(self, signature: str, message: str) -> None:
        super().__init__(message)
        self.signature = signature


class Harness:
    """The sound packages, a worker, and the tally of what came out."""

    def __init__(self, folder: Path, names: list[str] | None = None) -> None:
        self.folder = folder
        self.sound = {}
        for name in names or list(packages.BUILDERS):
            self.sound[name] = mutate.read(packages.build(name, folder / f"{name}.mlpackage"))
        self.words = vocabulary([files["model"] for files in self.sound.values()])
        self.worker: subprocess.Popen[str] | None = None
        self.outcomes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()

    def close(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker.communicate()
            self.errors.close()
            self.worker = None

    def start(self) -> subprocess.Popen[str]:
        self.errors = (self.folder / "errors").open("w+")
        command = [sys.executable, "-m", "tests.fuzz.worker"]
        worker = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
        )
        self.worker = worker
        answer = self.ask(self.folder / f"{next(iter(self.sound))}.mlpackage")
        if answer.get("outcome") != "ready":
            raise RuntimeError(f"the worker did not start: {answer}")
        return worker

    def ask(self, package: Path) -> dict[str, Any]:
        """The worker's answer, or how it died."""
        worker = self.worker
        assert worker is not None and worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(f"{package}\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        code = worker.wait()
        self.errors.seek(0)
        trace = self.errors.read()[-6000:]
        self.worker = None
        where = re.search(r'File "[^"]*distill/mil/[^"]*", line \d+ in \w+', trace)
        place = where.group(0).split("/")[-1] if where else ""
        return {"outcome": "escaped", "error": f"worker ended with {code}", "where": place, "message": trace}

    def run(self, recipe: Recipe) -> dict[str, Any]:
        """Write the package, have it tried, raise Escape if it was not held."""
        if self.worker is None:
            self.start()
        folder = self.folder / "tried.mlpackage"
        shutil.rmtree(folder, ignore_errors=True)
        mutate.write(folder, mutate.apply(recipe, self.sound[recipe.package], self.words))
        answer = self.ask(folder)
        self.outcomes[answer["outcome"]] += 1
        if answer["outcome"] == "refused":
            self.messages[f"{answer['error']}: {general(answer['message'])}"] += 1
        if answer["outcome"] == "escaped":
            raise Escape(f"{answer['error']} in {answer['where']}", f"{recipe}\n{answer['message']}")
        return answer


def vocabulary(models: list[bytes]) -> list[str]:
    """Words that mean something somewhere: names of the packages, operators, and odd ones."""
    import distill.mil.ops  # noqa: F401
    from distill.mil.ops.registry import TABLE

    found = {m.decode() for raw in models for m in re.findall(rb"[a-zA-Z_][a-zA-Z0-9_]{1,30}", raw)}
    return [*WORDS, *sorted(TABLE), *sorted(found)]


def general(message: str) -> str:
    """A message without what differs from one package to the next."""
    message = re.sub(r"/\S*tried\.mlpackage\S*", "PACKAGE", message)
    message = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", message)
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "N", message)[:200]
