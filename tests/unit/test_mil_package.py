"""distill.mil: reading packages, and refusing those that are malformed or hostile."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb

from distill import mil
from distill.errors import InputError, PackageError, UnsupportedOpError
from distill.mil import dtypes
from tests.unit import mil_build as b


def simple(x):
    return mb.add(x=x, y=np.arange(12, dtype=np.float32).reshape(4, 3), name="y")


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    return b.build(tmp_path_factory.mktemp("p") / "m.mlpackage", [b.tensor((4, 3))], simple)


def test_importing_the_package_loads_neither_torch_nor_coremltools():
    code = "import sys, distill.mil; print([m for m in ('torch', 'coremltools') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_public_names_are_sorted_and_exist():
    assert mil.__all__ == sorted(mil.__all__)
    assert all(hasattr(mil, name) for name in mil.__all__)


def test_a_program_shows_its_interface_and_constants(package):
    program = mil.load(package)
    function = program.function()
    assert [(f.name, f.dtype, f.shape) for f in function.inputs] == [("x", "fp32", (4, 3))]
    assert [(f.name, f.dtype, f.shape) for f in function.outputs] == [("y", "fp32", (4, 3))]
    assert program.specification_version == 9
    assert [p.name for p in program.weight_files] == ["weight.bin"]
    (weights,) = [v for v in function.constants.values() if v.is_blob]
    assert weights.type == mil.TensorType("fp16", (4, 3))
    np.testing.assert_array_equal(weights.numpy(), np.arange(12).reshape(4, 3))
    assert not weights.numpy().flags.writeable


def test_a_placeholder_package_is_named(tmp_path):
    (tmp_path / "PLACEHOLDER").write_text("")
    with pytest.raises(PackageError, match="is a placeholder package"):
        mil.load(tmp_path)


def test_an_unknown_function_lists_those_that_exist(package):
    with pytest.raises(InputError, match="no function 'decode'; it has main"):
        mil.load(package).predict({}, function="decode")


@pytest.mark.parametrize("entry", ["../../outside.mlmodel", "/etc/passwd", "x/../../../outside.mlmodel"])
def test_a_manifest_may_not_lead_out_of_the_package(tmp_path, entry):
    (tmp_path / "outside.mlmodel").write_bytes(b.raw_model().SerializeToString())
    path = b.write_package(tmp_path / "m.mlpackage", b.raw_model(), entry=entry)
    with pytest.raises(PackageError, match="leads out of the package"):
        mil.load(path)


def test_a_symbolic_link_may_not_lead_out_of_the_package(tmp_path, package):
    path = shutil.copytree(package, tmp_path / "m.mlpackage")
    weights = path / "Data/com.apple.CoreML/weights/weight.bin"
    outside = shutil.move(weights, tmp_path / "weight.bin")
    weights.symlink_to(outside)
    with pytest.raises(PackageError, match="leads out of the package"):
        mil.load(path)


@pytest.mark.parametrize("manifest", ["", "[]", "{", '{"itemInfoEntries": {}}', "[" * 100_000])
def test_a_broken_manifest_is_refused(tmp_path, package, manifest):
    path = shutil.copytree(package, tmp_path / "m.mlpackage")
    (path / "Manifest.json").write_text(manifest)
    with pytest.raises(PackageError, match=r"Manifest\.json"):
        mil.load(path)


def test_every_truncation_of_the_model_is_refused_or_reported(tmp_path):
    raw = b.raw_model().SerializeToString()
    for length in range(0, len(raw), 7):
        path = b.write_package(tmp_path / f"{length}.mlpackage", raw[:length])
        with pytest.raises((PackageError, InputError)):
            mil.load(path).predict({"x": np.zeros(2)})


def test_random_damage_never_escapes_as_a_raw_exception(tmp_path):
    raw = bytearray(b.raw_model().SerializeToString())
    rng = np.random.default_rng(0)
    for trial in range(150):
        spoilt = bytearray(raw)
        for at in rng.integers(0, len(raw), 3):
            spoilt[at] = rng.integers(0, 256)
        path = b.write_package(tmp_path / f"{trial}.mlpackage", bytes(spoilt))
        with contextlib.suppress(PackageError, InputError):
            mil.load(path).predict({"x": np.zeros(2)})


BAD_WEIGHTS = {
    "sentinel": b.weight_bin(2, bytes(8)).replace(struct.pack("<I", 0xDEADBEEF), bytes(4)),
    "claims": b.weight_bin(2, bytes(8), size=2**63),
    "claims 8 bytes from": b.weight_bin(2, bytes(8), data_offset=2**62),
    "has 4 bytes": b.weight_bin(2, bytes(4)),
    "holds fp16": b.weight_bin(1, bytes(8)),
    "unknown data type": b.weight_bin(99, bytes(8)),
    "version": b.weight_bin(2, bytes(8)).replace(struct.pack("<II", 1, 2), struct.pack("<II", 1, 9)),
    "no weight file": b"",
}


@pytest.mark.parametrize("message", BAD_WEIGHTS)
def test_a_bad_weight_file_is_refused_at_load(tmp_path, message):
    model = b.raw_model()
    b.add_blob_const(model, "w", "fp32", (2,), 64)
    path = b.write_package(tmp_path / "m.mlpackage", model, BAD_WEIGHTS[message])
    with pytest.raises(PackageError, match=message):
        mil.load(path)


@pytest.mark.parametrize("offset", [0, 63, 65, 128, 2**64 - 64])
def test_a_blob_offset_outside_the_file_is_refused(tmp_path, offset):
    model = b.raw_model()
    b.add_blob_const(model, "w", "fp32", (2,), offset)
    path = b.write_package(tmp_path / "m.mlpackage", model, b.weight_bin(2, bytes(8)))
    with pytest.raises(PackageError, match=f"offset {offset}"):
        mil.load(path)


def test_a_weight_file_name_may_not_climb(tmp_path):
    model = b.raw_model()
    b.add_blob_const(model, "w", "fp32", (2,), 64).blobFileValue.fileName = "@model_path/../../../weight.bin"
    (tmp_path / "weight.bin").write_bytes(b.weight_bin(2, bytes(8)))
    with pytest.raises(PackageError, match="leads out"):
        mil.load(b.write_package(tmp_path / "m.mlpackage", model))


def spoil_undefined(model):
    b.operations(model)[0].inputs["y"].arguments[0].name = "ghost"


def spoil_cycle(model):
    b.operations(model)[0].inputs["y"].arguments[0].name = "y"


def spoil_twice(model):
    b.operations(model).add().CopyFrom(b.operations(model)[0])


def spoil_shape(model):
    b.operations(model)[0].outputs[0].type.tensorType.dimensions[0].constant.size = 2**40


def spoil_rank(model):
    b.operations(model)[0].outputs[0].type.tensorType.rank = 7


def spoil_type(model):
    b.operations(model)[0].outputs[0].type.tensorType.dataType = 77


def spoil_opset(model):
    model.mlProgram.functions["main"].opset = "CoreML99"


def spoil_output(model):
    model.mlProgram.functions["main"].block_specializations["CoreML8"].outputs[0] = "ghost"


def spoil_feature(model):
    model.description.input[0].name = "other"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_undefined, "'ghost', which is not defined"),
        (spoil_cycle, "'y', which is not defined before it"),
        (spoil_twice, "defined twice"),
        (spoil_shape, "a dimension of|beyond"),
        (spoil_rank, "rank 7 with 1 dimensions"),
        (spoil_type, "unknown data type 77"),
        (spoil_opset, "no block for its opset"),
        (spoil_output, "'ghost' is never defined"),
        (spoil_feature, "'other' of the model description is not in the program"),
    ],
)
def test_a_malformed_program_is_refused_with_its_place(tmp_path, spoil, message):
    model = b.raw_model()
    spoil(model)
    with pytest.raises(PackageError, match=message):
        mil.load(b.write_package(tmp_path / "m.mlpackage", model))


def test_all_missing_operators_are_listed_at_once_with_their_kin(tmp_path):
    model = b.raw_model()
    for n, name in enumerate(("reduce_summ", "frobnicate")):
        op = b.operations(model).add(type=name)
        op.inputs["x"].arguments.add(name="x")
        b.set_type(op.outputs.add(name=f"z{n}").type, "fp32", (2,))
    program = mil.load(b.write_package(tmp_path / "m.mlpackage", model))
    with pytest.raises(UnsupportedOpError, match="nearest known: reduce_sum") as caught:
        program.predict({"x": np.zeros(2)})
    assert caught.value.missing == ["frobnicate", "reduce_summ"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda op: op.inputs["zeta"].arguments.add(name="x"), "no input zeta in this operator"),
        (lambda op: op.inputs.pop("y"), "input 'y' is missing"),
        (lambda op: op.inputs["y"].arguments.add(name="x"), "takes one value, not 2"),
    ],
)
def test_wrong_operator_inputs_are_refused_before_the_run(tmp_path, change, message):
    model = b.raw_model()
    change(b.operations(model)[0])
    program = mil.load(b.write_package(tmp_path / "m.mlpackage", model))
    with pytest.raises(PackageError, match=message):
        program.predict({"x": np.zeros(2)})


def test_a_failing_operation_names_itself_its_output_and_its_place(tmp_path):
    model = b.raw_model()
    b.operations(model)[0].outputs[0].type.tensorType.dimensions[0].constant.size = 3
    program = mil.load(b.write_package(tmp_path / "m.mlpackage", model))
    with pytest.raises(PackageError, match=r"function main: add 'y' failed: .*shape \[2\], declared is fp32\[3\]"):
        program.predict({"x": np.zeros(2)})


def test_an_absurd_fill_is_refused_before_it_allocates(tmp_path):
    def body(shape):
        return mb.fill(shape=shape, value=np.float32(1))

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((3,), "int32")], body, "fp32")
    with pytest.raises(PackageError, match="refusing to allocate"):
        program.predict({"shape": np.array([2**30, 2**30, 2**30])})


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_packed_integers_are_unpacked_low_bits_first(bits):
    values = np.random.default_rng(bits).integers(0, 2**bits, 21)
    packed = np.zeros(dtypes.packed_size(f"uint{bits}", 21), np.uint8)
    for index, value in enumerate(values):
        for bit in range(bits):
            at = index * bits + bit
            packed[at // 8] |= ((value >> bit) & 1) << (at % 8)
    np.testing.assert_array_equal(dtypes.unpack(f"uint{bits}", packed, 21), values)


def test_signed_nibbles_and_small_floats_decode():
    assert dtypes.unpack("int4", np.array([0x8F, 0x07], np.uint8), 4).tolist() == [-1, -8, 7, 0]
    assert dtypes.unpack("bf16", np.array([0x80, 0x3F, 0x40, 0xC0], np.uint8), 2).tolist() == [1.0, -3.0]
    e4m3 = dtypes.unpack("fp8e4m3fn", np.array([0x38, 0x7E, 0x01, 0xFF], np.uint8), 4)
    assert e4m3[:3].tolist() == [1.0, 448.0, 2.0**-9] and np.isnan(e4m3[3])
    e5m2 = dtypes.unpack("fp8e5m2", np.array([0x3C, 0x7C, 0xFB], np.uint8), 3)
    assert e5m2.tolist() == [1.0, np.inf, -57344.0]
