"""distill.mil: compressed constants, against values worked by hand and against coremltools' own decompression."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.defs.iOS16 import constexpr_ops as ios16
from coremltools.converters.mil.mil.ops.defs.iOS18 import compression as ios18
from hypothesis import given, settings
from hypothesis import strategies as st

import distill.mil.ops  # noqa: F401  (fills the operator table)
from distill.errors import PackageError
from distill.mil import dtypes
from distill.mil.ops.registry import TABLE
from distill.mil.policy import Fp32, Policy
from distill.mil.run import Run
from tests.unit import mil_build as b

HALF, SINGLE = np.dtype(np.float16), np.dtype(np.float32)
RANGES = {"int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127), "uint8": (0, 255)}
BITS = st.sampled_from([1, 2, 3, 4, 6, 8])
FLOATS = st.sampled_from([HALF, SINGLE])
examples = settings(max_examples=50, deadline=None)
Shapes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4)  # (blocks, block size)


def decoded(name: str, dtype: Any, **operands: Any) -> Any:
    """What the operator makes of numpy operands, in the type that its output is declared to have."""
    half = dtype == HALF
    arguments = {k: runtime(v) if isinstance(v, np.ndarray) else v for k, v in operands.items()}
    if TABLE[name].wants_run:
        arguments["run"] = Run(Policy() if half else Fp32(), None)
    result = TABLE[name].function(**arguments)
    if isinstance(result, tuple):
        return [r.numpy() for r in result[:-1]] + [result[-1].numpy().astype(dtype)]
    return result.numpy().astype(dtype)


def runtime(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(SINGLE) if array.dtype == HALF else array)


def integers(rng: np.random.Generator, kind: str, shape: Any) -> np.ndarray:
    low, high = RANGES[kind]
    return rng.integers(low, high + 1, shape).astype(np.int8 if low else np.uint8)


def floats(rng: np.random.Generator, dtype: Any, shape: Any, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(dtype)


def numbers(rng: np.random.Generator, kind: str, shape: Any) -> np.ndarray:
    return integers(rng, kind, shape) if kind in RANGES else floats(rng, kind, shape, 10)


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Low bits first, without gaps: one long integer, written in little-endian order."""
    stream = sum(int(v) << (i * bits) for i, v in enumerate(values.reshape(-1)))
    return np.array(list(stream.to_bytes((values.size * bits + 7) // 8, "little")), np.uint8)


@examples
@given(st.sampled_from([1, 2, 3, 4, 6]), st.lists(st.integers(0, 63), max_size=60), st.booleans())
def test_integers_of_any_width_are_read_low_bits_first(bits, values, signed):
    values = np.array(values, np.int64) % 2**bits
    name = "int4" if signed else f"uint{bits}"
    values = values % 16 if signed else values
    raw = packed(values, 4 if signed else bits)
    got = dtypes.unpack(name, raw, len(values))
    expected = np.where(values >= 8, values - 16, values) if signed else values
    assert got.dtype == (np.int8 if signed else np.uint8) and got.tolist() == expected.tolist()


@examples
@given(st.data(), Shapes, FLOATS, st.integers(0, 2**32 - 1))
def test_affine_dequantisation_equals_coremltools(data, shape, dtype, seed):
    rng = np.random.default_rng(seed)
    sizes = [n * size for n, size in shape]
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    kind = data.draw(st.sampled_from(["int8", "uint8"]))
    of_scale, of_zero = (data.draw(st.sampled_from([(), (sizes[axis],)])) for _ in range(2))
    operands = {
        "quantized_data": integers(rng, kind, sizes),
        "zero_point": numbers(rng, data.draw(st.sampled_from([kind, "f4"])), of_zero),
        "scale": np.asarray(floats(rng, dtype, of_scale)),
        "axis": axis,
    }
    operands["zero_point"] = np.asarray(operands["zero_point"])
    expected = ios16.constexpr_affine_dequantize.decompress(**operands)
    np.testing.assert_array_equal(decoded("constexpr_affine_dequantize", dtype, **operands), expected)


@examples
@given(st.data(), Shapes, FLOATS, st.integers(0, 2**32 - 1))
def test_blockwise_shift_and_scale_equals_coremltools(data, shape, dtype, seed):
    """An fp32 offset below an fp16 scale is left out: numpy then computes in fp32, which no document says."""
    rng = np.random.default_rng(seed)
    sizes, counts = [n * size for n, size in shape], [n for n, _ in shape]
    kind = data.draw(st.sampled_from([*RANGES, "f2", "f4"]))
    of_offset = data.draw(st.sampled_from([None, kind, "f2", dtype.str[1:]]))
    if of_offset == "f4" and dtype == HALF:
        of_offset = "f2"
    offset = None if of_offset is None else numbers(rng, of_offset, counts)
    values, scale = numbers(rng, kind, sizes), floats(rng, dtype, counts)
    expected = ios18.constexpr_blockwise_shift_scale.decompress(values, scale, offset)
    got = decoded("constexpr_blockwise_shift_scale", dtype, data=values, scale=scale, offset=offset)
    np.testing.assert_array_equal(got, expected.astype(dtype))

    mask = rng.integers(0, 2, sizes).astype(np.uint8)
    operands = {"data_mask": mask, "nonzero_data": values[mask != 0], "scale": scale, "offset": offset}
    expected = ios18.constexpr_sparse_blockwise_shift_scale.decompress(**operands)
    got = decoded("constexpr_sparse_blockwise_shift_scale", dtype, **operands)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1].astype(dtype))


@examples
@given(st.data(), BITS, Shapes, st.integers(0, 2**32 - 1))
def test_palettes_equal_coremltools(data, bits, shape, seed):
    rng = np.random.default_rng(seed)
    sizes, tables = [n * size for n, size in shape], [n for n, _ in shape]
    width = data.draw(st.integers(1, 4))
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    axis = data.draw(st.sampled_from([None, axis])) if width == 1 else axis
    dtype = data.draw(st.sampled_from([HALF, SINGLE, np.dtype(np.int8), np.dtype(np.uint8)]))
    indices = rng.integers(0, 2**bits, sizes).astype(np.uint8)
    lut = floats(rng, dtype, (*tables, 2**bits, width), 100 if dtype.kind in "iu" else 1)
    expected = ios18.constexpr_lut_to_dense.decompress(indices, lut, axis)
    got = decoded("constexpr_lut_to_dense", dtype, indices=indices, lut=lut, vector_axis=axis)
    np.testing.assert_array_equal(got, expected)

    mask = rng.integers(0, 2, sizes).astype(np.uint8)
    operands = {"indices_mask": mask, "indices_nonzero_data": indices[mask != 0], "lut": lut, "vector_axis": axis}
    expected = ios18.constexpr_lut_to_sparse.decompress(**operands)
    got = decoded("constexpr_lut_to_sparse", dtype, **operands)
    for one, other in zip(got, expected):
        np.testing.assert_array_equal(one, other)


@examples
@given(st.sampled_from([1, 2, 4, 6, 8]), st.lists(st.integers(1, 5), min_size=1, max_size=3), FLOATS, st.integers(0, 9))
def test_packed_palettes_and_masks_of_ios16_equal_coremltools(bits, shape, dtype, seed):
    rng = np.random.default_rng(seed)
    indices, lut = packed(rng.integers(0, 2**bits, shape), bits), floats(rng, dtype, 2**bits)
    expected = ios16.constexpr_lut_to_dense.decompress(lut, indices, shape)
    np.testing.assert_array_equal(
        decoded("constexpr_lut_to_dense", dtype, indices=indices, lut=lut, shape=shape), expected
    )

    mask = rng.integers(0, 2, shape)
    values = floats(rng, dtype, int(mask.sum()))
    expected = np.zeros(shape, dtype)
    expected[mask != 0] = values
    got = decoded("constexpr_sparse_to_dense", dtype, nonzero_data=values, mask=packed(mask, 1), shape=shape)
    np.testing.assert_array_equal(got, expected)
    by_tensor = decoded("constexpr_sparse_to_dense", dtype, nonzero_data=values, mask=mask.astype(np.uint8))
    np.testing.assert_array_equal(by_tensor, expected)


def test_a_vector_of_a_sparse_palette_fills_its_axis():
    mask = np.array([[1, 0], [1, 1]], np.uint8)
    lut = np.array([[2, 3], [4, 5]], np.float32).reshape(1, 1, 2, 2)
    indices = np.array([1, 0, 1], np.uint8)
    got = decoded(
        "constexpr_lut_to_sparse", SINGLE, indices_mask=mask, indices_nonzero_data=indices, lut=lut, vector_axis=0
    )
    assert got[0].tolist() == [[1, 0], [1, 0], [1, 1], [1, 1]]
    assert got[1].tolist() == [4, 5, 2, 4, 3, 5]


def test_the_difference_of_a_float_offset_is_rounded_to_fp16_and_not_in_fp32():
    """2049 - 0.5 is 2048.5; in fp16 2049 is 2048, and 2047.5 is 2048."""
    operands = {
        "data": np.array([2049], np.float32),
        "scale": np.array([2], np.float32),
        "offset": np.array([0.5], np.float32),
    }
    assert decoded("constexpr_blockwise_shift_scale", HALF, **operands) == 2 * 2048
    assert decoded("constexpr_blockwise_shift_scale", SINGLE, **operands) == 2 * 2048.5


U8, F4 = np.uint8, np.float32


@pytest.mark.parametrize(
    ("name", "operands", "message"),
    [
        ("lut_to_dense", {"indices": np.zeros(3, U8), "lut": np.zeros(5, F4), "shape": [8]}, "a palette of 5 values"),
        ("lut_to_dense", {"indices": np.zeros(3, U8), "lut": np.zeros(4, F4), "shape": [8]}, "3 bytes of 2-bit"),
        ("lut_to_dense", {"indices": np.zeros(0, U8), "lut": np.zeros(4, F4), "shape": [-1]}, "refusing to allocate"),
        ("lut_to_dense", {"indices": np.full(3, 2, U8), "lut": np.zeros((1, 2, 1), F4)}, "index 2 into 2 palettes"),
        ("lut_to_dense", {"indices": np.zeros(3, np.int8), "lut": np.zeros((1, 2, 1), F4)}, "type torch.int8"),
        ("lut_to_dense", {"indices": np.zeros(3, U8), "lut": np.zeros((2, 2, 1), F4)}, "do not divide"),
        ("lut_to_dense", {"indices": np.zeros(3, U8), "lut": np.zeros((1, 2, 2), F4)}, "along axis None"),
        ("sparse_to_dense", {"nonzero_data": np.zeros(2, F4), "mask": np.ones(3, U8)}, "2 values for 3 set bits"),
        (
            "sparse_to_dense",
            {"nonzero_data": np.zeros(2, F4), "mask": np.ones(3, U8), "shape": [7]},
            "3 bytes of 1-bit",
        ),
        ("blockwise_shift_scale", {"data": np.zeros((4, 3), U8), "scale": np.zeros((4, 2), F4)}, "do not divide"),
        ("blockwise_shift_scale", {"data": np.zeros((4, 3), U8), "scale": np.zeros((4, 0), F4)}, "do not divide"),
        (
            "blockwise_shift_scale",
            {"data": np.zeros(4, U8), "scale": np.zeros(2, F4), "offset": np.zeros(4, F4)},
            r"offsets of shape \[4\] for scales of shape \[2\]",
        ),
        (
            "affine_dequantize",
            {"quantized_data": np.zeros((2, 3), U8), "zero_point": np.array(0, U8), "scale": np.ones(2, F4), "axis": 1},
            "2 values along axis 1",
        ),
    ],
)
def test_operands_that_do_not_fit_are_one_clear_error(name, operands, message):
    with pytest.raises((ValueError, PackageError), match=message):
        decoded(f"constexpr_{name}", SINGLE, **operands)


_PEAK = """
import json, resource
import numpy as np, torch
import distill.mil.ops
from distill.mil import dtypes
from distill.mil.ops.registry import TABLE
from distill.mil.policy import Policy
from distill.mil.run import Run
shape, count = (4096, 4096), 4096 * 4096
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / (4 * count)
def unpacked(kind):
    raw = np.full(dtypes.packed_size(kind, count), 0x55, np.uint8)
    return torch.from_numpy(dtypes.unpack(kind, raw, count).reshape(shape))
run, ones, half = Run(Policy(), None), torch.ones(4096, 128), count // 2
indices = torch.zeros(half, dtype=torch.uint8)
calls = {
    "affine_dequantize": lambda f: f(unpacked("int4"), torch.zeros(4096), torch.ones(4096), 0),
    "blockwise_shift_scale": lambda f: f(run, unpacked("int4"), ones, ones),
    "sparse_to_dense": lambda f: f(torch.ones(half), unpacked("uint1")),
    "lut_to_dense": lambda f: f(run, unpacked("uint6"), torch.zeros(64, 1, 64, 1)),
    "lut_to_sparse": lambda f: f(run, unpacked("uint1"), indices, torch.ones(64, 1, 16, 1)),
}
before, peaks = peak(), {}
for name, call in calls.items():
    call(TABLE["constexpr_" + name].function)
    peaks[name] = round(peak() - before, 2)
print(json.dumps(peaks))
"""


def test_decoding_a_weight_takes_less_than_three_times_its_float32_size():
    """Each operator's peak is at least its predecessors': it is the process's."""
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    assert max(json.loads(done.stdout).values()) < 3, done.stdout


def nested_shift_scale(x):
    """A palette that is quantised itself: 4-bit indices into int8 values with one scale."""
    indices = np.arange(24).reshape(4, 6).astype(U8) % 16
    lut = (np.arange(16, dtype=np.int8) - 8).reshape(1, 1, 16, 1)
    values = mb.constexpr_lut_to_dense(indices=typed(indices, 4), lut=lut)
    weight = mb.constexpr_blockwise_shift_scale(data=values, scale=np.full((4, 1), 0.5, F4))
    return mb.linear(x=x, weight=weight, bias=np.zeros(4, F4), name="y"), ((indices.astype(F4) - 8) / 2)


def nested_scaled_table(x):
    """A table that is dequantised before it is looked up."""
    indices = np.arange(24).reshape(4, 6).astype(U8) % 4
    scale = np.full((1, 1, 1, 1), 0.25, F4)
    table = np.array([1, -3, 5, 100], np.int8).reshape(1, 1, 4, 1)
    lut = mb.constexpr_blockwise_shift_scale(data=table, scale=scale)
    weight = mb.constexpr_lut_to_dense(indices=typed(indices, 2), lut=lut)
    return mb.linear(x=x, weight=weight, bias=np.zeros(4, F4), name="y"), table.reshape(-1)[indices] * F4(0.25)


def nested_sparse(x):
    """Sparse indices, looked up, shifted and scaled, and only then made dense."""
    mask = (np.arange(24).reshape(4, 6) % 3 != 0).astype(U8)
    indices = (np.arange(16) % 8).astype(U8)
    lut = np.arange(8, dtype=np.int8).reshape(1, 1, 8, 1)
    scale = np.array([[1], [2], [3], [4]], F4)
    bits, values = mb.constexpr_lut_to_sparse(
        indices_mask=typed(mask, 1), indices_nonzero_data=typed(indices, 3), lut=lut
    )
    bits, values = mb.constexpr_sparse_blockwise_shift_scale(
        data_mask=bits, nonzero_data=values, scale=scale, offset=np.full((4, 1), 2, np.int8)
    )
    weight = mb.constexpr_sparse_to_dense(nonzero_data=values, mask=bits)
    dense = np.zeros((4, 6), F4)
    dense[mask != 0] = indices
    return mb.linear(x=x, weight=weight, bias=np.zeros(4, F4), name="y"), np.where(mask, (dense - 2) * scale, 0)


def typed(values: np.ndarray, bits: int) -> np.ndarray:
    return values.astype(types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}")))


@pytest.mark.parametrize("make", [nested_shift_scale, nested_scaled_table, nested_sparse])
def test_compressed_constants_nest(tmp_path, make):
    weights = []

    def body(x):
        y, weight = make(x)
        weights.append(weight)
        return y

    x = b.random((2, 6), 1)
    got = b.load(tmp_path / "m.mlpackage", [b.tensor((2, 6))], body, "fp32").predict({"x": x})["y"]
    np.testing.assert_allclose(got, x @ weights[0].T, rtol=1e-5, atol=1e-5)


def test_a_compressed_constant_feeds_any_operator(tmp_path):
    rng = np.random.default_rng(0)
    data = rng.integers(-8, 8, (4, 6)).astype(np.int8)
    dense = data * F4(0.5)

    def body(x, ids):
        def weight(shape):
            values = data.reshape(shape).astype(types.np_int4_dtype)
            scale = np.full([1] * len(shape), 0.5, F4)
            return mb.constexpr_blockwise_shift_scale(data=values, scale=scale)

        return (
            mb.gather(x=weight((4, 6)), indices=ids, axis=0, name="gathered"),
            mb.matmul(x=x, y=weight((4, 6)), transpose_y=True, name="product"),
            mb.conv(x=mb.reshape(x=x, shape=[1, 6, 1, 2]), weight=weight((4, 6, 1, 1)), name="convolved"),
            mb.add(x=x, y=mb.slice_by_index(x=weight((4, 6)), begin=[0, 0], end=[2, 6]), name="sum"),
            mb.einsum(
                values=(mb.reshape(x=x, shape=[1, 2, 1, 6]), weight((1, 6, 1, 4))),
                equation="nchw,nwhu->nchu",
                name="dotted",
            ),
        )

    x, ids = b.random((2, 6), 1), np.array([3, 0], np.int32)
    program = b.load(tmp_path / "m.mlpackage", [b.tensor((2, 6)), b.tensor((2,), "int32")], body, "fp32")
    got = program.predict({"x": x, "ids": ids})
    expected = {
        "gathered": dense[ids],
        "product": x @ dense.T,
        "convolved": np.einsum("oc,chw->ohw", dense, x.reshape(6, 1, 2))[None],
        "sum": x + dense[:2],
        "dotted": (x @ dense.reshape(6, 4))[None, :, None],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_activations_are_quantised_to_the_even_integer_and_clipped(tmp_path):
    x = np.array([[0.25, 0.75, -0.25, 100, -100, 1.2]], F4)

    def body(x):
        q = mb.quantize(input=x, scale=F4(0.5), zero_point=np.int8(3), output_dtype="int8")
        columns = mb.quantize(input=x, scale=np.arange(1, 7).astype(F4), axis=1, output_dtype="uint8")
        return (
            mb.cast(x=q, dtype="int32", name="steps"),
            mb.dequantize(input=q, scale=F4(0.5), zero_point=np.int8(3), name="back"),
            mb.dequantize(input=columns, scale=np.arange(1, 7).astype(F4), axis=-1, name="columns"),
        )

    got = b.load(tmp_path / "m.mlpackage", [b.tensor((1, 6))], body, "fp32").predict({"x": x})
    assert got["steps"].tolist() == [[3, 5, 3, 127, -128, 5]]
    assert got["back"].tolist() == [[0, 1, 0, 62, -65.5, 1]]
    assert got["columns"].tolist() == [[0, 0, 0, 100, 0, 0]]
