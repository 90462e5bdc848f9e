"""distill.mil: compressed constants, against numpy written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types

from tests.unit import mil_build as b


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_a_grouped_palette_is_looked_up(tmp_path, bits):
    rng = np.random.default_rng(bits)
    indices = rng.integers(0, 2**bits, (8, 6)).astype(np.uint8)
    lut = b.random((2, 1, 2**bits, 1), bits)
    dense = np.array([[lut[r // 4, 0, indices[r, c], 0] for c in range(6)] for r in range(8)], np.float32)

    def body(x):
        packed = indices.astype(types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}")))
        weight = mb.constexpr_lut_to_dense(indices=packed, lut=lut)
        return mb.linear(x=x, weight=weight, bias=np.zeros(8, np.float32), name="y")

    x = b.random((2, 6), 1)
    program = b.load(tmp_path / "m.mlpackage", [b.tensor((2, 6))], body, "fp32")
    np.testing.assert_allclose(program.predict({"x": x})["y"], x @ dense.T, rtol=1e-5, atol=1e-5)


def test_blockwise_quantised_weights_are_shifted_and_scaled(tmp_path):
    rng = np.random.default_rng(0)
    data, offset = (
        rng.integers(-128, 128, (4, 6)).astype(np.int8),
        rng.integers(-9, 9, (2, 3)).astype(np.int8),
    )
    scale = b.random((2, 3), 2)
    dense = np.repeat(np.repeat(scale, 2, 0), 2, 1) * (
        data.astype(np.float32) - np.repeat(np.repeat(offset, 2, 0), 2, 1)
    )

    def body(x):
        weight = mb.constexpr_blockwise_shift_scale(data=data, scale=scale, offset=offset)
        return mb.linear(x=x, weight=weight, bias=np.zeros(4, np.float32), name="y")

    x = b.random((2, 6), 1)
    program = b.load(tmp_path / "m.mlpackage", [b.tensor((2, 6))], body, "fp32")
    np.testing.assert_allclose(program.predict({"x": x})["y"], x @ dense.T, rtol=1e-4, atol=1e-3)


def test_sparse_weights_are_spread_over_their_mask(tmp_path):
    mask = np.array([[1, 0, 1], [0, 1, 1]], np.uint8)
    values = np.array([1, 2, 3, 4], np.float32)

    def body(x):
        bits = mask.astype(types.nptype_from_builtin(types.uint1))
        weight = mb.constexpr_sparse_to_dense(nonzero_data=values, mask=bits)
        return mb.linear(x=x, weight=weight, bias=np.zeros(2, np.float32), name="y")

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((1, 3))], body, "fp32")
    assert program.predict({"x": np.ones((1, 3))})["y"].tolist() == [[3, 7]]
