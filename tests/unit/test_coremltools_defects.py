"""Wrong results of coremltools 9.0 itself, each as its smallest reproduction. None is a fault of the executor: another
computation of the same program agrees with it. A test here that fails after an upgrade says that the defect is gone.

A dropped state write (`index_put_` through torch.jit.trace) is in tests/integration/test_planted_programs.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb

from distill import mil

EPSILON = 1e-5


class _RMSNorm(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), eps=EPSILON)


def _source(frontend: str) -> Any:
    example = torch.ones(2, 64)
    if frontend == "trace":
        return torch.jit.trace(_RMSNorm().eval(), example)
    return torch.export.export(_RMSNorm().eval(), (example,)).run_decompositions({})


def _converted(tmp_path: Path, frontend: str) -> mil.Program:
    model = ct.convert(
        _source(frontend),
        inputs=[ct.TensorType("x", (2, 64), dtype=np.float32)],
        outputs=[ct.TensorType("y", dtype=np.float32)],
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    model.save(str(tmp_path / "norm.mlpackage"))
    return mil.load(tmp_path / "norm.mlpackage")


def _as_lowered(x: np.ndarray) -> np.ndarray:
    """What the lowering writes: rows divided by their largest magnitude, epsilon left as it was."""
    scaled = x / np.abs(x).max(-1, keepdims=True)
    return scaled / np.sqrt((scaled**2).mean(-1, keepdims=True) + EPSILON)


@pytest.mark.parametrize("frontend", ["trace", "export"])
def test_rms_norm_loses_its_epsilon(tmp_path, frontend):
    """apple/coremltools #2821: the effective epsilon scales with max|x| squared."""
    x = 0.005 * np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    expected = _RMSNorm()(torch.from_numpy(x)).numpy()
    program = _converted(tmp_path, frontend)
    got = program.predict({"x": x}, policy="fp32")["y"]
    assert np.abs(got - expected).max() > 0.05 * np.abs(expected).max()
    np.testing.assert_allclose(got, _as_lowered(x), rtol=1e-4)  # what the program says is what was computed
    assert np.isnan(program.predict({"x": np.zeros((2, 64), np.float32)}, policy="fp32")["y"]).all()


def test_is_stateful_crashes_on_a_multifunction_model(tmp_path):
    """models/model.py: the list of functions is asked for `.state`."""

    def single(name: str, factor: float) -> Any:
        @mb.program(input_specs=[mb.TensorSpec((2,))], opset_version=ct.target.iOS18)
        def program(x):
            return mb.mul(x=x, y=factor)

        model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
        model.save(str(tmp_path / f"{name}.mlpackage"))

    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, factor in (("double", 2.0), ("triple", 3.0)):
        single(name, factor)
        descriptor.add_function(str(tmp_path / f"{name}.mlpackage"), "main", name)
    descriptor.default_function_name = "double"
    ct.utils.save_multifunction(descriptor, str(tmp_path / "both.mlpackage"))

    model = ct.models.MLModel(str(tmp_path / "both.mlpackage"), skip_model_load=True)
    with pytest.raises(AttributeError, match="state"):
        model._is_stateful()
    program = mil.load(tmp_path / "both.mlpackage")
    for name, factor in (("double", 2.0), ("triple", 3.0)):
        (value,) = program.predict({"x": np.ones(2)}, name).values()
        assert (value == factor).all()
