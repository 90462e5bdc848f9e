"""What the planted faults share: the verification stage as its user runs it, and packages that it checks quickly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill import cli, config
from distill.convert import functions
from distill.deploy import bundle
from distill.deploy.config import DeployConfig
from distill.verify.contracts import GATES, GENERATOR_GATES
from tests.conftest import Toy
from tests.integration import bundles
from tests.integration.spoil import only_evaluate


class Verdict(dict[str, Any]):
    """Gates by name, and the exit code of `distill contracts`."""

    code: int

    def failed(self) -> list[str]:
        return [name for name in self if self[name]["status"] in ("fail", "error")]

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
        assert list(verdict) == list(GENERATOR_GATES if "weights_shared" in verdict else GATES)
        return verdict

    return run


@pytest.fixture(scope="session")
def quick(toy: Toy) -> dict[str, Path]:
    """The packages with one evaluation prompt: most faults are to be seen before any text is made."""
    folder = toy.folder / "quick"
    return {mode: only_evaluate(getattr(toy, mode), folder / mode, 1) for mode in ("prefill", "decode")}


@pytest.fixture(scope="session")
def generator(toy: Toy) -> Path:
    """Prefill by 8 and by 24 tokens and decode in one package, with one evaluation prompt."""
    folder = toy.folder / "generator"
    built = folder / "built" / "toy.mlpackage"
    built.parent.mkdir(parents=True)
    functions.build(functions.FunctionsConfig(toy.checkpoint, built, 128, (8, 24), toy=True), lambda line: None)
    return only_evaluate(built, folder, 1)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> bundles.Made:
    """A toy bundle, all its gates passed."""
    folder = tmp_path_factory.mktemp("bundle")
    before = bundles.Made(folder, bundles.train(folder), folder / "out", "")
    built = bundle.run(config.load(before.config(folder), DeployConfig), say=lambda line: None)
    return before._replace(manifest_sha256=built.manifest_sha256)
