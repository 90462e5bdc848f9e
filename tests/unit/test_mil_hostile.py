"""distill.mil: small packages that ask for much memory or time. Each is refused with one PackageError that names the
place, quickly. See also tests/fuzz.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from coremltools.proto import MIL_pb2

from distill import mil
from distill.errors import PackageError
from tests.unit import mil_build as b
from tests.unit.mil_hostile import add_op, bind, dynamic, refused, run, text

SECONDS = 20.0  # of processor time: a refusal takes far less, an attack that works far more


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


# What a program may ask for.

HUGE = "MiB, the limit is|refusing to allocate|refusing|operations in one prediction|Storage size|elements"
BOMBS: dict[str, tuple[int, dict[str, Any]]] = {
    "tile": (1, {"x": "x", "reps": np.array([2**31 - 1])}),
    "pad": (1, {"x": "x", "pad": np.array([2**30, 2**30])}),
    "fill": (1, {"shape": np.array([2**31 - 1]), "value": np.float32(1)}),
    "range_1d": (1, {"start": np.float32(0), "end": np.float32(2**31), "step": np.float32(1)}),
    "one_hot": (2, {"indices": np.zeros(1, np.int32), "one_hot_vector_size": np.array(2**31 - 1)}),
    "reshape": (1, {"x": "x", "shape": np.array([2**31 - 1])}),
    "sliding_windows": (2, {"x": "x", "axis": np.array(0), "size": np.array(2**31 - 1)}),
    "expand_dims": (1, {"x": "x", "axes": np.arange(100)}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_operator_may_not_make_an_enormous_tensor(tmp_path, name):
    rank, inputs = BOMBS[name]
    model = b.raw_model()
    op = add_op(model, name, "z", (1,), inputs)
    op.outputs[0].type.CopyFrom(dynamic(rank))
    refused(tmp_path, model, f"function main: {name} 'z' failed: ")


def test_nothing_may_not_be_split_into_billions_of_parts(tmp_path):
    model = b.raw_model()
    add_op(model, "slice_by_size", "e", (0,), {"x": "x", "begin": np.array([0]), "size": np.array([0])})
    add_op(model, "split", "z", (0,), {"x": "e", "axis": np.array(0), "num_splits": np.array(2**31 - 1)})
    refused(tmp_path, model, "split 'z' failed: 0 does not divide")


def test_a_slice_backwards_makes_no_list_of_its_indices(tmp_path):
    model = b.raw_model()
    add_op(model, "tile", "t", (2**23,), {"x": "x", "reps": np.array([2**22])})
    masks = {"begin_mask": np.array([1]), "end_mask": np.array([1])}
    numbers = {"begin": np.array([0]), "end": np.array([0]), "stride": np.array([-1])}
    op = add_op(model, "slice_by_index", "z", (2**23,), {"x": "t"} | numbers | masks)
    assert op.outputs
    path = b.write_package(tmp_path / "m.mlpackage", model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KiB; a list would take 600 MiB


def test_broadcasting_may_not_make_an_enormous_tensor(tmp_path):
    model = b.raw_model()
    add_op(model, "tile", "row", (2**17,), {"x": "x", "reps": np.array([2**16])})
    add_op(model, "expand_dims", "column", (2**17, 1), {"x": "row", "axes": np.array([1])})
    add_op(model, "add", "z", (2**17,), {"x": "row", "y": "column"})
    refused(tmp_path, model, r"add 'z' failed: this takes 65537 MiB, the limit is 1024 MiB")


def test_many_tensors_may_not_fill_the_memory_together(tmp_path):
    model = b.raw_model()
    reps = np.array([2**25])
    for n in range(64):
        add_op(model, "tile", f"t{n}", (2**26,), {"x": "x", "reps": reps})
    add_op(model, "concat", "z", (2**32,), {"values": [f"t{n}" for n in range(64)], "axis": np.array(0)})
    refused(tmp_path, model, "tile 't.' failed: this takes .* the limit is")


def test_a_limit_may_be_raised_and_lowered(tmp_path):
    model = b.raw_model()
    add_op(model, "tile", "t", (2**21,), {"x": "x", "reps": np.array([2**20])})
    path = b.write_package(tmp_path / "m.mlpackage", model)
    assert run(path)["y"].tolist() == [2.0, 2.0]
    with pytest.raises(PackageError, match="tile 't' failed: this takes 8 MiB, the limit is 4 MiB"):
        run(path, limits=mil.Limits(memory=2**22))
    with pytest.raises(PackageError, match="operations in one prediction"):
        run(path, limits=mil.Limits(work=2**10))


def test_a_product_may_not_take_for_ever(tmp_path):
    model = b.raw_model()
    add_op(model, "tile", "t", (2**27,), {"x": "x", "reps": np.array([2**26])})
    add_op(model, "reshape", "a", (1, 1, 2**27), {"x": "t", "shape": np.array([1, 1, 2**27])})
    add_op(model, "conv", "z", (1, 1, 1), {"x": "a", "weight": "a"})
    refused(tmp_path, model, "failed: (more than .* operations in one prediction|this takes)")


def test_the_smallest_integer_divided_by_minus_one_is_no_crash(tmp_path):
    model = b.raw_model("int32")
    least = np.array([-(2**31), 7], np.int64)
    add_op(model, "real_div", "z", (2,), {"x": least, "y": np.array([-1, -1])}, "int32")
    model.mlProgram.functions["main"].block_specializations["CoreML8"].outputs[0] = "z"
    model.description.output[0].name = "z"
    path = b.write_package(tmp_path / "m.mlpackage", model)
    assert run(path)["z"].tolist() == [-(2**31), -7]


# What a constant may ask for.


def constexpr(kind: str, inputs: dict[str, tuple[int, tuple[int, ...], int]], out: tuple[int, ...]) -> Any:
    """A model with one constexpr whose operands (proto type, shape, offset) lie in the weight file."""
    model = b.raw_model()
    op = b.operations(model).add(type=kind)
    for name, (dtype, shape, offset) in inputs.items():
        value = op.inputs[name].arguments.add().value
        b.set_type(value.type, "fp32", shape)
        value.type.tensorType.dataType = dtype
        value.blobFileValue.fileName = "@model_path/weights/weight.bin"
        value.blobFileValue.offset = offset
    b.set_type(op.outputs.add(name="w").type, "fp16", out)
    return model


def test_a_blob_is_never_larger_than_its_file(tmp_path):
    wide = (2**16, 2**16)
    model = constexpr("constexpr_sparse_to_dense", {"mask": (MIL_pb2.UINT1, wide, 64)}, wide)
    refused(tmp_path, model, r"claims \d+ bytes from", b.weight_bin(9, bytes(64), size=2**29))


@pytest.mark.parametrize("times", [1, 40])
def test_a_few_bits_do_not_become_gigabytes(tmp_path, times):
    """One blob under many shapes: each is decoded apart."""
    model = b.raw_model()
    count = 2**28
    for n in range(times):
        op = b.operations(model).add(type="identity")
        value = op.inputs["x"].arguments.add().value
        b.set_type(value.type, "fp32", (count >> n % 20, 1 << n % 20, *[1] * (n // 20)))
        value.type.tensorType.dataType = MIL_pb2.UINT1
        value.blobFileValue.fileName = "@model_path/weights/weight.bin"
        value.blobFileValue.offset = 64
        op.outputs.add(name=f"i{n}").type.CopyFrom(value.type)
    weights = b.weight_bin(9, bytes(count // 8))
    path = b.write_package(tmp_path / "m.mlpackage", model, weights)
    if times == 1:
        assert run(path)["y"].tolist() == [2.0, 2.0]
        return
    with pytest.raises(PackageError, match=r"this takes .* the limit is"):
        run(path, limits=mil.Limits(memory=2**27))


def test_a_small_mask_does_not_become_a_large_tensor(tmp_path):
    """iOS 16 gives the shape apart from the data."""
    model = b.raw_model()
    op = b.operations(model).add(type="constexpr_sparse_to_dense")
    attribute(op, "nonzero_data", np.zeros(0, np.float32))
    attribute(op, "mask", np.zeros(4, np.int32), MIL_pb2.UINT8, bytes(4))
    attribute(op, "shape", np.array([2**16, 2**16]), MIL_pb2.UINT32)
    b.set_type(op.outputs.add(name="w").type, "fp32", (2**16, 2**16))
    refused(tmp_path, model, "constexpr_sparse_to_dense 'w' failed|constexpr_sparse_to_dense 'w': ")


def attribute(op: Any, name: str, array: np.ndarray, dtype: int | None = None, raw: bytes | None = None) -> None:
    value = op.attributes[name]
    b.set_type(value.type, "int32" if array.dtype.kind == "i" else "fp32", array.shape)
    if dtype is not None:
        value.type.tensorType.dataType = dtype
    tensor = value.immediateValue.tensor
    if raw is not None:
        tensor.bytes.values = raw
    elif array.dtype.kind == "i":
        tensor.ints.values.extend(array.tolist())
    else:
        tensor.floats.values.extend(array.tolist())


def test_one_long_string_does_not_lengthen_all(tmp_path):
    model = b.raw_model()
    const = b.operations(model).add(type="const")
    value = const.attributes["val"]
    texts = ["x" * 2**20, *[""] * 2**16]
    for kind in (value.type, const.outputs.add(name="s").type):
        b.set_type(kind, "fp32", (len(texts),))
        kind.tensorType.dataType = MIL_pb2.STRING
    value.immediateValue.tensor.strings.values.extend(texts)
    program = mil.load(b.write_package(tmp_path / "m.mlpackage", model))
    assert program.function().constants["s"].numpy().nbytes == 8 * len(texts)


def test_a_list_of_numbers_is_not_a_tensor_of_millions(tmp_path):
    model = b.raw_model()
    add_op(model, "tile", "t", (2**22,), {"x": "x", "reps": np.array([2**21])})
    cast = add_op(model, "cast", "c", (2**22,), {"x": "t"}, "int32")
    cast.inputs["dtype"].arguments.add().value.CopyFrom(text("int32"))
    op = add_op(model, "reshape", "z", (1,), {"x": "x", "shape": "c"})
    op.outputs[0].type.CopyFrom(dynamic(1))
    refused(tmp_path, model, "reshape 'z' failed: a list of 4194304 numbers")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_number_that_is_no_integer_is_refused_where_one_is_expected(tmp_path, number):
    model = b.raw_model()
    op = add_op(model, "softmax", "z", (2,), {"x": "x"})
    bind(op.inputs["axis"].arguments.add(), np.float32(number))
    refused(tmp_path, model, "function main: softmax 'z'")


def test_an_attack_costs_the_process_less_than_a_gigabyte(tmp_path):
    """In a process of its own, with what the bombs above ask for one after the other."""
    for name, (rank, inputs) in list(BOMBS.items())[:5]:
        model = b.raw_model()
        add_op(model, name, "z", (1,), inputs).outputs[0].type.CopyFrom(dynamic(rank))
        b.write_package(tmp_path / f"{name}.mlpackage", model)
    code = (
        "import sys, resource, pathlib, numpy as np; from distill import mil\n"
        "from distill.errors import PackageError\n"
        "x = {'x': np.ones(2)}; last = 0\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try: mil.load(path).predict(x); sys.exit(f'{path} passed')\n"
        "    except PackageError: pass\n"
        "    last = last or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - last) // 2**10)\n"
    )
    grown = subprocess.check_output([sys.executable, "-c", code, str(tmp_path)], text=True)
    assert int(grown) < 1024  # MiB
