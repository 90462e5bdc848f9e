"""distill.mil.pytest_plugin: a Core ML test-suite, written as for a Mac, runs here."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from distill.mil.coreml_proxy import MLModelAssetProxy

HEADER = """
import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types

def doubled():
    @mb.program(input_specs=[mb.TensorSpec((2, 3))], opset_version=ct.target.iOS18)
    def program(x):
        return mb.mul(x=x, y=2.0, name="y")
    return ct.convert(program, minimum_deployment_target=ct.target.iOS18)

def counter():
    specs = [mb.TensorSpec((1,), dtype=types.fp16), mb.StateTensorSpec((1,), dtype=types.fp16)]
    @mb.program(input_specs=specs, opset_version=ct.target.iOS18)
    def program(x, total):
        new = mb.add(x=mb.read_state(input=total), y=x)
        mb.coreml_update_state(state=total, value=new)
        return mb.identity(x=new, name="y")
    return ct.convert(program, minimum_deployment_target=ct.target.iOS18)
"""


def run_suite(tmp_path: Path, body: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A suite of one file, in a pytest of its own."""
    (tmp_path / "test_theirs.py").write_text(HEADER + textwrap.dedent(body))
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-p", "distill.mil.pytest_plugin", "-q", "-rs"]
    command += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path), *options, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.skipif(sys.platform == "darwin", reason="there Core ML itself answers")
def test_a_suite_written_for_a_mac_runs(tmp_path):
    done = run_suite(
        tmp_path,
        """
        X = np.arange(6, dtype=np.float32).reshape(2, 3)

        def test_predict():
            np.testing.assert_array_equal(doubled().predict({"x": X})["y"], 2 * X)

        def test_a_batch():
            assert [y["y"][0, 1] for y in doubled().predict([{"x": X}, {"x": 3 * X}])] == [2, 6]

        def test_state_outlives_a_prediction_and_conversations_are_apart():
            model = counter()
            one, other = model.make_state(), model.make_state()
            for value in (1, 2, 4):
                last = model.predict({"x": np.array([value], np.float16)}, one)
            assert last["y"] == 7 and model.predict({"x": np.array([1.0])}, other)["y"] == 1
            name = model.get_spec().description.state[0].name
            assert one.read_state(name) == 7
            one.write_state(name, np.array([100.0], np.float32))
            assert model.predict({"x": np.array([1.0])}, one)["y"] == 101
            with pytest.raises(RuntimeError, match="no state 'nonsense'"):
                one.read_state("nonsense")

        def test_a_compiled_model():
            model = doubled()  # the compiled files live as long as the model, as on a Mac
            compiled = ct.models.CompiledMLModel(model.get_compiled_model_path())
            assert compiled.predict({"x": X})["y"][1, 2] == 10

        def test_a_saved_model_can_be_loaded_and_compiled(tmp_path):
            doubled().save(str(tmp_path / "m.mlpackage"))
            assert ct.models.MLModel(str(tmp_path / "m.mlpackage")).predict({"x": X})["y"][1, 2] == 10
            compiled = ct.models.utils.compile_model(str(tmp_path / "m.mlpackage"), str(tmp_path / "c.mlmodelc"))
            assert ct.models.CompiledMLModel(compiled).predict({"x": X})["y"][1, 2] == 10

        def test_an_asset_in_memory():
            model = doubled()
            asset = ct.models.model.MLModelAsset.from_memory(model.get_spec().SerializeToString())
            compiled = ct.models.CompiledMLModel.from_asset(asset)
            assert compiled.predict({"x": X})["y"][1, 2] == 10

        def test_a_wrong_input_is_an_error_that_names_it():
            with pytest.raises(RuntimeError, match="input 'x' has shape"):
                doubled().predict({"x": np.zeros((2, 4), np.float32)})

        def test_numbers_are_cast_as_core_ml_casts_them():
            @mb.program(input_specs=[mb.TensorSpec((1,), dtype=types.int32)], opset_version=ct.target.iOS18)
            def program(x):
                return mb.add(x=x, y=1, name="y")
            model = ct.convert(program, minimum_deployment_target=ct.target.iOS18)
            for given in (3, 3.0, np.int32(3), np.array(3), np.array([3.9]), [3]):
                assert model.predict({"x": given})["y"] == 4, given

        def test_a_tensor_may_be_returned_twice():
            @mb.program(input_specs=[mb.TensorSpec((2,))], opset_version=ct.target.iOS18)
            def program(x):
                y = mb.relu(x=x, name="y")
                return y, y
            model = ct.convert(program, minimum_deployment_target=ct.target.iOS18)
            assert model.predict({"x": np.ones(2)})["y"].tolist() == [1, 1]

        def test_a_model_can_be_copied():
            import copy
            assert copy.deepcopy(doubled()).predict({"x": X})["y"][0, 1] == 2

        def test_the_helpers_of_coremltools_believe_it():
            assert ct.utils._macos_version() >= (15, 0)
        """,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "11 passed" in done.stdout and "distill.mil made 20 predictions" in done.stdout


@pytest.mark.skipif(sys.platform == "darwin", reason="there Core ML itself answers")
def test_what_only_core_ml_can_do_is_skipped_with_its_reason(tmp_path):
    done = run_suite(
        tmp_path,
        """
        def test_neural_network():
            @mb.program(input_specs=[mb.TensorSpec((2, 3))])
            def program(x):
                return mb.relu(x=x)
            ct.convert(program, convert_to="neuralnetwork").predict({"x": np.ones((2, 3))})
            raise AssertionError("not reached")

        def test_compiled_neural_network():
            @mb.program(input_specs=[mb.TensorSpec((2, 3))])
            def program(x):
                return mb.relu(x=x)
            spec = ct.convert(program, convert_to="neuralnetwork").get_spec()
            ct.models.CompiledMLModel(ct.models.utils.compile_model(spec)).predict({"x": np.ones((2, 3))})
            raise AssertionError("not reached")

        def test_compute_plan():
            ct.models.compute_plan.MLComputePlan.load_from_path(doubled().get_compiled_model_path())
            raise AssertionError("not reached")
        """,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "3 skipped" in done.stdout
    assert "needs Core ML" in done.stdout and "compute plan" in done.stdout


@pytest.mark.skipif(sys.platform == "darwin", reason="there Core ML itself answers")
def test_the_policy_is_an_option(tmp_path):
    body = """
    def test_precision():
        third = np.full((2, 3), 1 / 3, np.float32)
        assert (doubled().predict({"x": third})["y"] == 2 * third).all()
    """
    assert run_suite(tmp_path, body, "--mil-policy", "fp32").returncode == 0
    assert "1 failed" in run_suite(tmp_path, body).stdout


@pytest.mark.skipif(sys.platform == "darwin", reason="there Core ML itself answers")
def test_predictions_of_parallel_workers_are_counted(tmp_path):
    body = """
    def test_predict():
        assert doubled().predict({"x": np.ones((2, 3), np.float32)})["y"][0, 0] == 2
    """
    assert "distill.mil made 1 predictions" in run_suite(tmp_path, body, "-n", "1").stdout


def test_the_bytes_of_an_asset_cannot_be_written_elsewhere():
    for name in ("../outside.bin", "/outside.bin", "@model_path/../../outside.bin"):
        with pytest.raises(RuntimeError, match="leads out of the model"):
            MLModelAssetProxy.from_memory(b"", {name: b"x"})
