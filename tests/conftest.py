"""Toy artefacts, made once a session through the real stages: data, training, export, conversion. About 8 s."""

from __future__ import annotations

import contextlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # toys are too small to share between cores

from pathlib import Path
from typing import Any, NamedTuple

import pytest

SEQ, SEQ_LONG = 64, 128
EVIDENCE = "golden_vectors"
"""Property of a test: the package that it speaks of, and what that was made of."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--package", nargs="+", default=[], help="golden vectors: of these packages, in place of toys")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers report to the process that started them
        config.pluginmanager.register(Outcomes(config.invocation_params.dir / "eval/reports/integration.json"))


class Outcomes:
    """What became of the golden vectors, by package and test, for `distill gates`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.packages: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Set-up, call and tear-down of a test; the worst of the three counts."""
        of = dict(report.user_properties).get(EVIDENCE)
        if not isinstance(of, dict):
            return
        found = self.packages.setdefault(of["package"], {"gates": {}, "made_by": of["made_by"]})["gates"]
        name = report.nodeid.rpartition("::")[2].partition("[")[0]
        if report.failed:
            found[name] = {"status": "fail", "reason": f"failed in its {report.when}"}
        elif report.skipped:
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            found.setdefault(name, {"status": "skipped", "reason": why.removeprefix("Skipped: ")})
        elif report.when == "call":
            found.setdefault(name, {"status": "pass"})

    def pytest_sessionfinish(self) -> None:
        """Packages of earlier runs are kept as they were: whether they are still there is for the reader to see."""
        from distill.artifacts import read_json, write_json
        from distill.errors import InputError

        if self.packages:
            before = {}
            with contextlib.suppress(InputError, KeyError, TypeError):  # none yet, or none of this form
                before = dict(read_json(self.path)["packages"])
            write_json(self.path, {"schema": "distill-integration/1", "packages": before | self.packages})


class Toy(NamedTuple):
    """Where the toy artefacts lie. Tests copy what they change."""

    folder: Path
    data: Path
    checkpoint: Path
    exported: Path
    """student_prefill_T64, student_prefill_T128 and student_decode, with their contracts."""
    prefill: Path
    """The T=64 package."""
    prefill_long: Path
    """The T=128 package."""
    decode: Path
    """The package with a key-value state."""


class Documented(NamedTuple):
    """What `make toy-e2e` leaves behind."""

    package: Path = Path("/tmp/toy_T128.mlpackage")
    checkpoint: Path = Path("/tmp/toy.ckpt")


@pytest.fixture(scope="session")
def toy_e2e() -> Documented:
    """The documented pipeline's own package; skipped, by name, where there is none or another version made it."""
    from distill.artifacts import code_version, read_json
    from distill.convert.package import sidecar_folder

    made = Documented()
    if not made.package.exists():
        pytest.skip(f"{made.package} is not there: make toy-e2e has not run")
    by = read_json(sidecar_folder(made.package) / "contract.json")["made_by"]["code"]
    if by != code_version():
        pytest.skip(f"{made.package} is of version {by}, this is {code_version()}: run make toy-e2e again")
    return made


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The toy tool-calling student, from dataset to packages."""
    import msgspec
    from rich.console import Console

    from distill.convert import coreml
    from distill.data import toy as data
    from distill.export import pytorch
    from distill.train import loop
    from distill.train.toy import PRESETS, toy_config, toy_model

    folder = tmp_path_factory.mktemp("toy")
    made = Toy(folder, folder / "kd.jsonl", folder / "toy.ckpt", folder / "exported",
               *(folder / f"{name}.mlpackage" for name in ("prefill", "prefill_long", "decode")))  # fmt: skip
    data.write(made.data, "tools", 128)
    config = toy_config(
        str(made.data), str(made.checkpoint), preset=PRESETS["tools"], model=toy_model(), device="cpu", seed=0
    )
    config = msgspec.structs.replace(config, runs=str(folder / "runs"))
    loop.run(config, restart=True, console=Console(quiet=True))
    pytorch.run(pytorch.ExportConfig(made.checkpoint, made.exported, "both", SEQ, (SEQ, SEQ_LONG), toy=True))
    for name, package in {
        f"student_prefill_T{SEQ}": made.prefill,
        f"student_prefill_T{SEQ_LONG}": made.prefill_long,
        "student_decode": made.decode,
    }.items():
        coreml.run(coreml.ConvertConfig(made.exported / f"{name}.pt", package))
    return made
