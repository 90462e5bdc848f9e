"""What the planted faults share: the verification stage as its user runs it, and packages that it checks quickly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill import cli
from distill.verify.contracts import GATES
from tests.conftest import Toy
from tests.integration.spoil import only_evaluate


class Verdict(dict[str, Any]):
    """Gates by name, and the exit code of `distill contracts`."""

    code: int

    def failed(self) -> list[str]:
        return [name for name in GATES if self[name]["status"] in ("fail", "error")]

    def reason(self, name: str) -> str:
        return str(self[name].get("reason"))


Verify = Callable[..., Verdict]


@pytest.fixture
def verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Run the stage and read its report. A traceback instead of a verdict fails the test by itself."""

    def run(package: Path, *flags: str) -> Verdict:
        report = tmp_path / "report.json"
        code = cli.main(["contracts", "--model", str(package), "--report", str(report), *flags])
        capsys.readouterr()
        verdict = Verdict(json.loads(report.read_text())["gates"])
        verdict.code = code
        assert list(verdict) == list(GATES)
        return verdict

    return run


@pytest.fixture(scope="session")
def quick(toy: Toy) -> dict[str, Path]:
    """The packages with one evaluation prompt: most faults are to be seen before any text is made."""
    folder = toy.folder / "quick"
    return {mode: only_evaluate(getattr(toy, mode), folder / mode, 1) for mode in ("prefill", "decode")}
