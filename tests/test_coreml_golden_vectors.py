"""Golden vectors: the package gives the logits that PyTorch recorded when the program was exported.

    make toy-e2e && pytest tests/test_coreml_golden_vectors.py -v
    pytest tests/test_coreml_golden_vectors.py --package coreml/artifacts/worker/*.mlpackage

Takes /tmp/toy_T128.mlpackage where `make toy-e2e` has made it, and toy packages of its own in any case; or the packages
given. What they show of packages that targets made is kept in eval/reports/integration.json, for `distill gates`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from distill.artifacts import provenance
from distill.convert.package import sidecar_folder
from distill.evaluate.evidence import content
from distill.export.tolerance import tolerance_factor
from distill.verify import native
from distill.verify.parity import exact_tolerance
from distill.verify.runner import PackageRunner
from tests.conftest import EVIDENCE


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = metafunc.config.getoption("package")
    metafunc.parametrize("package", given or ["toy-e2e", "prefill", "decode"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def package(request: pytest.FixtureRequest) -> Path:
    if request.param in ("prefill", "decode"):
        toy = request.getfixturevalue("toy")
        return toy.prefill_long if request.param == "prefill" else toy.decode
    return request.getfixturevalue("toy_e2e").package if request.param == "toy-e2e" else Path(request.param)


@pytest.fixture(autouse=True)
def evidence(request: pytest.FixtureRequest, package: Path, record_property: Callable[[str, object], None]) -> None:
    """Which package a test speaks of. Nobody asks about the toys of a test session afterwards."""
    if request.node.callspec.params["package"] not in ("prefill", "decode"):
        made_by = provenance({}, {str(file.relative_to(package)): file for file in content(package)})
        record_property(EVIDENCE, {"package": str(package), "made_by": made_by})


@pytest.fixture(scope="module")
def golden(package: Path) -> dict[str, np.ndarray]:
    return load_file(sidecar_folder(package) / "goldens.safetensors")


def _logits(package: Path, golden: dict[str, np.ndarray], policy: str) -> np.ndarray:
    runner = PackageRunner(package, policy)
    rows = [runner.logits(ids.tolist())[golden["positions"]] for ids in golden["input_ids"]]
    return np.stack(rows).astype(np.float64)


def test_without_rounding_the_package_computes_what_the_trained_model_means(
    package: Path, golden: dict[str, np.ndarray]
) -> None:
    """fp32 arithmetic against the model with fp16 constants: only the order of sums may differ."""
    expected = golden["logits_half"].astype(np.float64)
    error = np.linalg.norm(_logits(package, golden, "fp32") - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() <= exact_tolerance(PackageRunner(package).contract)


def test_as_it_runs_in_fp16_the_package_stays_within_the_derived_error(
    package: Path, golden: dict[str, np.ndarray]
) -> None:
    expected = golden["logits"].astype(np.float64)
    found = _logits(package, golden, "ieee16")
    allowed = golden["fp16_sigma"] * tolerance_factor(expected.shape[-1])
    assert (np.abs(found - expected) <= allowed).all()
    best, second = np.sort(expected, -1)[..., -1], np.sort(expected, -1)[..., -2]
    sure = best - second > allowed[..., 0]
    assert sure.sum() >= 8  # or the next line would say nothing
    assert (found.argmax(-1) == expected.argmax(-1))[sure].all()


def test_the_golden_vectors_tell_a_different_model_apart(package: Path, golden: dict[str, np.ndarray]) -> None:
    """The comparison above is no formality: logits of the neighbouring position do not pass it."""
    expected = golden["logits"].astype(np.float64)
    allowed = golden["fp16_sigma"] * tolerance_factor(expected.shape[-1])
    assert (np.abs(np.roll(expected, 1, axis=1) - expected) > 10 * allowed).any()


def test_core_ml_itself_stays_within_the_derived_error(package: Path, golden: dict[str, np.ndarray]) -> None:
    if sys.platform != "darwin":
        pytest.skip("Core ML runs on macOS only")
    gate = native.parity_gate(package, PackageRunner(package).contract, golden)
    assert gate.status == "pass", gate.reason
