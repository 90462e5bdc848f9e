"""distill.mil: packages compressed by coremltools.optimize predict what their decompressed weights say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb

from distill import mil
from tests.unit import mil_build as b

X = b.random((1, 8, 6, 5), 1)
CONV, CONV_BIAS = b.random((16, 8, 3, 3), 2, 0.2), b.random((16,), 3)
LINEAR, LINEAR_BIAS = b.random((8, 16), 4, 0.2), b.random((8,), 5)
Compress = Callable[[Any], Any]


def model(precision: str, conv: np.ndarray = CONV, linear: np.ndarray = LINEAR) -> Any:
    """A convolution, then a linear layer over the channels."""

    @mb.program(input_specs=[b.tensor(X.shape)], opset_version=ct.target.iOS18)
    def program(x):
        x = mb.relu(x=mb.conv(x=x, weight=conv, bias=CONV_BIAS))  # (1, 16, 4, 3)
        x = mb.transpose(x=x, perm=[0, 2, 3, 1])
        return mb.linear(x=x, weight=linear, bias=LINEAR_BIAS, name="y")

    return ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16 if precision == "fp16" else ct.precision.FLOAT32,
        skip_model_load=True,
    )


def weights(compressed: Any) -> tuple[np.ndarray, np.ndarray]:
    """The convolution's and the linear layer's weight as coremltools decompresses them."""
    function = cto.decompress_weights(compressed)._mil_program.functions["main"]
    conv, linear = (function.find_ops(op_type=kind)[0].weight.val for kind in ("conv", "linear"))
    return conv.astype(np.float32), linear.astype(np.float32)


def in_numpy(conv: np.ndarray, linear: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(X[0], (3, 3), (1, 2))
    x = np.einsum("cxyhw,ochw->xyo", windows, conv) + CONV_BIAS
    return (np.maximum(x, 0) @ linear.T + LINEAR_BIAS)[None]


def check(tmp_path, compressed: Any, precision: str, kinds: set[str]) -> None:
    """It is compressed as asked, the compression is felt, and the prediction is that of the decompressed weights."""
    compressed.save(str(tmp_path / "m.mlpackage"))
    program = mil.load(tmp_path / "m.mlpackage")
    used = {op.type for op in program.function().block.operations if op.type.startswith("constexpr_")}
    assert used == {f"constexpr_{kind}" for kind in kinds}
    got = program.predict({"x": X})["y"]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if precision == "fp32" else {"rtol": 5e-3, "atol": 1e-2}
    np.testing.assert_allclose(got, in_numpy(*weights(compressed)), **tolerance)
    assert np.abs(got - in_numpy(CONV, LINEAR)).max() > 1e-4


def applied(compress: Callable[..., Any], config: Any, **options: Any) -> Compress:
    return lambda m: compress(m, cto.OptimizationConfig(global_config=config), **options)


def quantized(joint: bool = False, **options: Any) -> Compress:
    config = cto.OpLinearQuantizerConfig(weight_threshold=0, **options)
    return applied(cto.linear_quantize_weights, config, joint_compression=joint)


def palettized(mode: str = "uniform", joint: bool = False, **options: Any) -> Compress:
    config = cto.OpPalettizerConfig(mode=mode, weight_threshold=0, **options)
    return applied(cto.palettize_weights, config, joint_compression=joint)


def pruned(**options: Any) -> Compress:
    return applied(cto.prune_weights, cto.OpMagnitudePrunerConfig(weight_threshold=0, **options))


PRECISIONS = ["fp32", "fp16"]
SHIFT_SCALE = {"blockwise_shift_scale"}


@pytest.mark.parametrize(("mode", "precision"), [("linear", "fp16"), ("linear_symmetric", "fp32")])
@pytest.mark.parametrize(
    ("dtype", "granularity"),
    [
        ("int8", "per_tensor"),
        ("uint8", "per_channel"),
        ("int4", "per_tensor"),
        ("uint4", "per_channel"),
        ("int4", "per_block"),
        ("int8", "per_block"),
    ],
)
def test_linear_quantisation(tmp_path, mode, precision, dtype, granularity):
    blocks = {"block_size": 4} if granularity == "per_block" else {}
    compress = quantized(mode=mode, dtype=dtype, granularity=granularity, **blocks)
    check(tmp_path, compress(model(precision)), precision, SHIFT_SCALE)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_grouped_channel"])
@pytest.mark.parametrize("scales", [False, True])
def test_palettes(tmp_path, bits, granularity, scales):
    groups = {"group_size": 4, "channel_axis": 0} if granularity == "per_grouped_channel" else {}
    compress = palettized(nbits=bits, granularity=granularity, enable_per_channel_scale=scales, **groups)
    precision = PRECISIONS[bits % 2]
    check(tmp_path, compress(model(precision)), precision, {"lut_to_dense"} | (SHIFT_SCALE if scales else set()))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("axis", [0, 1])
def test_palettes_of_vectors(tmp_path, precision, axis):
    """The weights have few enough vectors for coremltools to find them all."""
    vectors, rng = b.random((16, 2), 7), np.random.default_rng(0)

    def few(shape: tuple[int, ...]) -> np.ndarray:
        chosen = np.moveaxis(np.empty(shape), axis, -1).shape
        chosen = vectors[rng.integers(0, 16, (*chosen[:-1], chosen[-1] // 2))]  # (..., vectors, 2)
        return np.moveaxis(chosen.reshape(*chosen.shape[:-2], -1), -1, axis).astype(np.float32)

    conv, linear = few(CONV.shape), few(LINEAR.shape)
    compress = palettized("unique", cluster_dim=2, granularity="per_grouped_channel", group_size=8, channel_axis=axis)
    compressed = compress(model(precision, conv, linear))
    np.testing.assert_allclose(weights(compressed)[0], conv, rtol=1e-3)
    check(tmp_path, compressed, precision, {"lut_to_dense"})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("how", [{"target_sparsity": 0.75}, {"n_m_ratio": (2, 4)}])
def test_pruning(tmp_path, precision, how):
    check(tmp_path, pruned(**how)(model(precision)), precision, {"sparse_to_dense"})


SPARSE = pruned(target_sparsity=0.5)
PALETTES = palettized(nbits=4)
MORE_PALETTES = palettized(nbits=4, joint=True)
MORE_INTEGERS = quantized(mode="linear_symmetric", granularity="per_tensor", joint=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("stages", "kinds"),
    [
        ([SPARSE, MORE_PALETTES], {"lut_to_sparse", "sparse_to_dense"}),
        ([SPARSE, MORE_INTEGERS], {"sparse_blockwise_shift_scale", "sparse_to_dense"}),
        ([PALETTES, MORE_INTEGERS], {"blockwise_shift_scale", "lut_to_dense"}),
        ([SPARSE, MORE_PALETTES, MORE_INTEGERS], {"blockwise_shift_scale", "lut_to_sparse", "sparse_to_dense"}),
    ],
)
def test_joint_compression(tmp_path, precision, stages, kinds):
    compressed = model(precision)
    for stage in stages:
        compressed = stage(compressed)
    check(tmp_path, compressed, precision, kinds)
