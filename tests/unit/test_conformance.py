"""tests.conformance: its verdicts, and that it fails when an operator, a tolerance or the list is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conformance import __main__ as runner
from tests.conformance import comparison
from tests.conformance.comparison import RULES, Contents, tolerance

ROOT = Path(__file__).parents[2]
SQUARE = ["--match", r"elementwise_unary.*\[.*mode=square", "--sample", "6", "--jobs", "1"]


def conformance(tmp_path: Path, *options: str, plugin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.conformance", "--report", str(tmp_path / "report.json"), *options]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    if plugin:
        (tmp_path / "fault.py").write_text(plugin)
        environment["PYTEST_ADDOPTS"] = "-p fault"
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def result(test: str, outcome: str = "passed", predictions: int = 1) -> dict[str, Any]:
    return {
        "id": test,
        "outcome": outcome,
        "predictions": predictions,
        "comparisons": predictions,
        "precision": "fp16",
        "seconds": 0.1,
        "message": "boom\nmore",
    }


def test_an_unlisted_failure_a_mended_one_and_a_stale_name_are_errors():
    good = [result("iOS14/test_pool.py::a"), result("iOS14/test_pool.py::b", "failed")]
    assert runner.judge(good, {"iOS14/test_pool.py::b": "why"}, complete=True).good
    assert not runner.judge(good, {}, complete=True).good
    assert runner.judge(good, {}, True).unexpected == [good[1]]
    listed = {"iOS14/test_pool.py::a": "why", "iOS14/test_pool.py::b": "why"}
    assert runner.judge(good, listed, True).mended == ["iOS14/test_pool.py::a"]
    gone = {"iOS14/test_pool.py::b": "why", "iOS14/test_pool.py::c": "why"}
    assert runner.judge(good, gone, True).stale == ["iOS14/test_pool.py::c"]
    assert runner.judge(good, gone, complete=False).good  # it may be in another shard
    assert not runner.judge([], {}, complete=False).good


def test_the_table_counts_what_reached_no_prediction_apart():
    results = [result("iOS14/test_pool.py::a"), result("iOS17/test_pool.py::b", predictions=0)]
    lines = runner.table(runner.judge(results, {}, True)).splitlines()
    header = "family tests no prediction predicted fp16 fp32 comparisons passed xfailed known failed"
    assert " ".join(lines[0].split()) == header
    assert lines[1].split() == ["pool", "2", "1", "1", "1", "0", "1", "1", "0", "0", "0"]


def test_every_known_failure_has_a_reason():
    assert all(len(reason) > 20 for reason in runner.known_failures().values())


def test_fp16_is_compared_tightly_and_fp32_at_the_suites_own_tolerance():
    expected = np.ones(3, np.float32)
    assert tolerance(Contents({"add"}, "fp16"), expected, 0.5, 0.05) == (2e-3, 5e-3)
    assert tolerance(Contents({"add"}, "fp32"), expected, 1e-4, 1e-5) == (1e-4, 1e-5)


def test_a_rule_is_of_an_operator_says_why_and_stays_far_below_the_suites_half():
    for name, rule in RULES.items():
        assert len(rule.reason) > 20, name
        assert rule.atol(np.ones(4, np.float32)) < 0.1, name


def test_a_part_of_apples_tests_runs(tmp_path):
    done = conformance(tmp_path, *SQUARE)
    assert done.returncode == 0, done.stdout + done.stderr
    total = done.stdout.splitlines()[-2].split()
    assert total[:2] == ["total", "6"] and int(total[3]) > 0 and total[-1] == "0"
    assert len((tmp_path / "report.json").read_text().splitlines()) == 6


@pytest.mark.slow
def test_a_wrong_operator_is_found(tmp_path):
    fault = """
import distill.mil.ops
from distill.mil.ops.registry import TABLE
TABLE["square"] = TABLE["square"]._replace(function=lambda x: x * x * 1.01)
"""
    done = conformance(tmp_path, *SQUARE, plugin=fault)
    assert done.returncode == 1
    assert "failed, not listed: iOS14/test_elementwise_unary.py::TestElementwiseUnary::" in done.stdout


@pytest.mark.slow
def test_predictions_that_do_not_happen_are_not_passes(tmp_path):
    fault = """
import pytest
@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session):
    import coremltools.converters.mil.testing_utils as suite
    import coremltools.converters.mil.mil.ops.tests.testing_utils as op_suite
    op_suite.compare_backend = suite.compare_backend = lambda **_: None
"""
    done = conformance(tmp_path, *SQUARE, plugin=fault)
    total = done.stdout.splitlines()[-2].split()
    assert total[:4] == ["total", "6", "6", "0"]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "x", "1/0"])
def test_a_wrong_shard_is_refused(tmp_path, shard):
    done = conformance(tmp_path, "--shard", shard)
    assert done.returncode == 2 and "is not I/N" in done.stderr


def test_the_precision_is_that_of_the_program():
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    def model(precision: Any) -> Any:
        @mb.program(input_specs=[mb.TensorSpec((2,), dtype=types.fp32)], opset_version=ct.target.iOS16)
        def program(x):
            return mb.exp(x=x)

        return ct.convert(
            program,
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=precision,
            skip_model_load=True,
        )

    assert comparison.contents(model(ct.precision.FLOAT32)) == Contents({"exp"}, "fp32")
    half = comparison.contents(model(ct.precision.FLOAT16))
    assert half.precision == "fp16" and "exp" in half.operators
