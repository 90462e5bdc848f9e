"""distill.mil: programs of a shape that nobody would write: deep, long, endless, or wrong in kind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb
from coremltools.proto import MIL_pb2, Model_pb2

from distill import mil
from distill.errors import PackageError
from tests.unit import mil_build as b
from tests.unit.mil_hostile import add_op, bind, refused, run, text

SECONDS = 20.0  # of processor time: a refusal takes far less, an attack that works far more


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


def test_nesting_beyond_what_protobuf_reads_is_refused(tmp_path):
    raw = b""
    for _ in range(1000):
        raw = field(MIL_pb2.Block, "operations", field(MIL_pb2.Operation, "blocks", raw))
    entry = b"".join(varint(n << 3 | 2) + varint(len(data)) + data for n, data in ((1, b"CoreML8"), (2, raw)))
    function = field(MIL_pb2.Function, "block_specializations", entry)
    entry = b"".join(varint(n << 3 | 2) + varint(len(data)) + data for n, data in ((1, b"main"), (2, function)))
    program = field(MIL_pb2.Program, "functions", entry)
    refused(tmp_path, field(Model_pb2.Model, "mlProgram", program), "not a Core ML model: .*[Dd]epth")


def field(message: Any, name: str, data: bytes) -> bytes:
    return varint(message.DESCRIPTOR.fields_by_name[name].number << 3 | 2) + varint(len(data)) + data


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def test_a_protobuf_of_countless_tiny_messages_is_refused_before_it_is_read(tmp_path):
    raw = field(MIL_pb2.Block, "operations", b"") * 2**20
    refused(tmp_path, raw, "bytes, the limit is", limits=mil.Limits(memory=2**25))


def test_a_program_of_millions_of_parts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.mil.parse._MAX_NODES", 1000)
    model = b.raw_model()
    for n in range(400):
        add_op(model, "identity", f"i{n}", (2,), {"x": "x"})
    refused(tmp_path, model, "the program has more than 1000 parts")


def test_an_absurdly_long_name_is_refused_and_not_repeated(tmp_path):
    model = b.raw_model()
    b.operations(model)[0].outputs[0].name = "y" * 100_000
    refused(tmp_path, model, "a name of 100000 characters")


def test_ten_thousand_missing_operators_are_named_in_time(tmp_path):
    model = b.raw_model()
    for n in range(10_000):
        add_op(model, f"unheard_of_{n}", f"i{n}", (2,), {"x": "x"})
    refused(tmp_path, model, "and 9950 more")


def chain(model: Any, length: int, kind: str, **inputs: Any) -> None:
    last = "x"
    for n in range(length):
        add_op(model, kind, f"c{n}", (2,), {"x": last, **inputs})
        last = f"c{n}"


def test_a_long_chain_of_updates_is_planned_in_time(tmp_path):
    """Whether an update may happen in place is proved in time, or not proved."""
    model = b.raw_model()
    chain(model, 5000, "slice_update", update="x", begin=np.array([0]), end=np.array([2]))
    path = b.write_package(tmp_path / "m.mlpackage", model)
    assert run(path)["y"].tolist() == [2.0, 2.0]


def test_nested_blocks_do_not_copy_all_names_around_them(tmp_path):
    model = b.raw_model()
    chain(model, 3000, "identity")
    for n in range(2000):
        op = add_op(model, "cond", f"d{n}", (2,), {})
        argument = op.inputs["pred"].arguments.add()
        bind(argument, np.array(1))
        argument.value.type.tensorType.dataType = MIL_pb2.INT32
        for _ in range(2):
            op.blocks.add().outputs.append("x")
    path = b.write_package(tmp_path / "m.mlpackage", model)
    assert run(path)["y"].tolist() == [2.0, 2.0]


def endless(model: Any) -> None:
    op = add_op(model, "while_loop", "z", (2,), {"loop_vars": ["x"]})
    for name in ("i", "j"):
        block = op.blocks.add()
        b.set_type(block.inputs.add(name=name).type, "fp32", (2,))
        inner = block.operations.add(type="greater" if name == "i" else "identity")
        if name == "i":
            for parameter, number in (("x", 1.0), ("y", 0.0)):
                bind(inner.inputs[parameter].arguments.add(), np.float32(number))
            b.set_type(inner.outputs.add(name="go").type, "fp32", ())
            inner.outputs[0].type.tensorType.dataType = MIL_pb2.BOOL
            block.outputs.append("go")
        else:
            inner.inputs["x"].arguments.add(name="j")
            b.set_type(inner.outputs.add(name="k").type, "fp32", (2,))
            block.outputs.append("k")


def test_a_loop_that_never_ends_is_stopped(tmp_path):
    model = b.raw_model()
    endless(model)
    refused(
        tmp_path,
        model,
        r"while_loop 'z'.* failed: (too many loop iterations|more than \S+ operations)",
        limits=mil.Limits(work=2**33),
    )


def test_a_loop_may_not_fill_the_memory_through_a_list(tmp_path):
    def body(x):
        ls = mb.make_list(init_length=1, dynamic_length=True, elem_shape=[2**24])

        def step(i, ls):
            return mb.add(x=i, y=np.int32(1)), mb.list_write(ls=ls, index=i, value=mb.tile(x=x, reps=[2**23]))

        _, ls = mb.while_loop(
            _cond=lambda i, ls: mb.less(x=i, y=np.int32(200)), _body=step, loop_vars=(np.int32(0), ls)
        )
        return mb.list_read(ls=ls, index=0, name="y")

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((2,))], body, "fp32")
    with pytest.raises(PackageError, match=r"list_write .* failed: this takes .* MiB, the limit is"):
        program.predict({"x": np.ones(2)})


@pytest.mark.parametrize("rank", [17, 70])
def test_a_tensor_of_many_dimensions_is_refused(tmp_path, rank):
    model = b.raw_model()
    add_op(model, "identity", "z", (1,) * rank, {"x": "x"})
    refused(tmp_path, model, f"a tensor of rank {rank}")


def test_a_state_of_gigabytes_is_refused_at_load(tmp_path):
    model = b.raw_model()
    function = model.mlProgram.functions["main"]
    wrapped = function.inputs.add(name="s").type.stateType.wrappedType
    b.set_type(wrapped, "fp16", (2**16, 2**15))
    feature = model.description.state.add(name="s")
    feature.type.stateType.arrayType.dataType = b._ARRAY["fp16"]
    feature.type.stateType.arrayType.shape.extend((2**16, 2**15))
    refused(tmp_path, model, "states and optional inputs: this takes")


@pytest.mark.parametrize("kind", ["read_state", "write_state"])
def test_a_state_operator_without_a_state_is_refused(tmp_path, kind):
    model = b.raw_model()
    op = add_op(model, kind, "z", (2,), {"input": "x"} | ({"data": "x"} if kind == "write_state" else {}))
    refused(tmp_path, model, f"{kind} 'z': input 'input' is not a state")
    op.inputs["input"].arguments[0].value.CopyFrom(text("ghost"))
    path = b.write_package(tmp_path / "n.mlpackage", model)
    with pytest.raises(PackageError, match="is not a state"):
        run(path)


def test_a_product_of_scalars_is_refused_not_asserted(tmp_path):
    model = b.raw_model()
    add_op(model, "matmul", "z", (2,), {"x": np.float32(1), "y": "x"})
    refused(tmp_path, model, "matmul 'z' failed")
