"""distill.mil: programs of a shape that nobody would write: deep, long, endless, or wrong in kind."""

from __future__ import annotations

import resource
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb
from coremltools.proto import MIL_pb2, Model_pb2

from distill import mil
from distill.errors import PackageError
from distill.mil.guard import Ledger
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


def loop(model: Any, fill: Callable[[Any], None]) -> None:
    """A loop without end; `fill` writes the body, whose input is 'j' and whose output is 'j' too."""
    op = add_op(model, "while_loop", "z", (2,), {"loop_vars": ["x"]})
    condition, body = op.blocks.add(), op.blocks.add()
    for block, name in ((condition, "i"), (body, "j")):
        b.set_type(block.inputs.add(name=name).type, "fp32", (2,))
    true = condition.operations.add(type="const")
    for kind in (true.outputs.add(name="true").type, true.attributes["val"].type):
        kind.tensorType.dataType = MIL_pb2.BOOL
    true.attributes["val"].immediateValue.tensor.bools.values.append(True)
    condition.outputs.append("true")
    fill(body)
    body.outputs.append("j")


def many_identities(body: Any) -> None:
    for n in range(1000):
        op = body.operations.add(type="identity")
        op.inputs["x"].arguments.add(name="j")
        b.set_type(op.outputs.add(name=f"k{n}").type, "fp32", (2,))


def many_lists(body: Any) -> None:
    for n in range(1000):
        op = body.operations.add(type="make_list")
        op.outputs.add(name=f"k{n}").type.listType.type.tensorType.dataType = MIL_pb2.FLOAT32


def many_branches(body: Any) -> None:
    for n in range(1000):
        op = body.operations.add(type="cond")
        argument = op.inputs["pred"].arguments.add()
        bind(argument, np.array(1))
        b.set_type(op.outputs.add(name=f"k{n}").type, "fp32", (2,))
        for _ in range(2):
            op.blocks.add().outputs.append("j")


def many_variables(body: Any) -> None:
    """A loop that ends at once and carries thousands of values."""
    op = body.operations.add(type="while_loop")
    for n in range(5000):
        op.inputs["loop_vars"].arguments.add(name="j")
        b.set_type(op.outputs.add(name=f"k{n}").type, "fp32", (2,))
    for part in ("c", "d"):
        block = op.blocks.add()
        for n in range(5000):
            b.set_type(block.inputs.add(name=f"{part}{n}").type, "fp32", (2,))
        false = block.operations.add(type="const")
        for kind in (false.outputs.add(name=f"{part}no").type, false.attributes["val"].type):
            kind.tensorType.dataType = MIL_pb2.BOOL
        false.attributes["val"].immediateValue.tensor.bools.values.append(False)
        block.outputs.append(f"{part}no")


@pytest.mark.parametrize("fill", [many_identities, many_lists, many_branches, many_variables])
def test_operations_that_compute_nothing_are_not_free(tmp_path, fill):
    model = b.raw_model()
    loop(model, fill)
    message = r"while_loop 'z'.* failed: more than \S+ operations"
    refused(tmp_path, model, message, limits=mil.Limits(work=2**30, iterations=10**9))


@pytest.mark.parametrize("kind", ["gather", "scatter"])
def test_what_a_list_does_is_paid_by_the_element(tmp_path, kind):
    def body(x0):
        ls = mb.make_list(init_length=2, dynamic_length=True, elem_shape=[1])
        indices = mb.cast(x=mb.tile(x=mb.slice_by_size(x=x0, begin=[0], size=[1]), reps=[2**13]), dtype="int32")
        if kind == "gather":
            return mb.reshape(x=mb.list_gather(ls=ls, indices=indices), shape=[-1])
        values = mb.expand_dims(x=mb.cast(x=indices, dtype="fp32"), axes=[1])
        return mb.list_read(ls=mb.list_scatter(ls=ls, indices=indices, value=values), index=0)

    path = b.build(tmp_path / "m.mlpackage", [b.tensor((2,))], body, "fp32")
    with pytest.raises(PackageError, match=f"list_{kind} .* failed: more than"):
        mil.load(path, limits=mil.Limits(work=2**29)).predict({"x0": np.zeros(2)})
    assert mil.load(path).predict({"x0": np.zeros(2)})


def test_many_long_lists_are_counted_as_memory(tmp_path):
    model = b.raw_model()
    for n in range(100):
        op = b.operations(model).add(type="make_list")
        bind(op.inputs["init_length"].arguments.add(), np.array(2**20))
        op.outputs.add(name=f"l{n}").type.listType.type.tensorType.dataType = MIL_pb2.FLOAT32
    for n in range(100):  # which keeps them all
        op = add_op(model, "list_length", f"n{n}", (), {"ls": f"l{n}"}, "int32")
    refused(tmp_path, model, "make_list 'l.*' failed: this takes", limits=mil.Limits(memory=2**27))


def vectors(indices: int, width: int, declared: int) -> tuple[Any, bytes]:
    """A palette of two vectors: a weight file of a few KB that asks for `indices` x `width` numbers."""
    records, offsets = b"", []
    blobs = [(9, bytes(indices // 8)), (1, bytes(4 * width))]
    for code, data in blobs:
        offset = 64 + len(records)
        offsets.append(offset)
        record = struct.pack("<IIQQQ", 0xDEADBEEF, code, len(data), offset + 64, 0).ljust(64, b"\0") + data
        records += record.ljust(-(-len(record) // 64) * 64, b"\0")
    model = b.raw_model()
    lut = b.add_blob_const(model, "lut", "fp16", (1, 2, width), offsets[1])
    assert lut.type.tensorType.rank == 3
    index = b.add_blob_const(model, "index", "fp16", (indices,), offsets[0])
    index.type.tensorType.dataType = MIL_pb2.UINT1
    b.operations(model)[0].outputs[0].type.tensorType.dataType = MIL_pb2.UINT1
    add_op(model, "constexpr_lut_to_dense", "w", (declared,), {"indices": "index", "lut": "lut"}, "fp16")
    bind(b.operations(model)[-1].inputs["vector_axis"].arguments.add(), np.array(0))
    return model, struct.pack("<II", len(blobs), 2).ljust(64, b"\0") + records


@pytest.mark.parametrize("declared", [2**30, 2])
def test_a_palette_of_vectors_is_not_expanded_beyond_the_limit(tmp_path, declared):
    model, weights = vectors(2**16, 2**14, declared)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path, model, "constexpr_lut_to_dense 'w' failed: this takes 4096 MiB", weights)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


def test_a_constexpr_of_another_shape_than_declared_is_refused(tmp_path):
    model, weights = vectors(64, 8, 2)
    refused(tmp_path, model, r"the result has shape \[512\], declared is fp16\[2\]", weights)


@pytest.mark.parametrize("dtype", ["uint1", "int32"])
def test_a_constant_of_a_million_numbers_is_no_list_of_sizes(tmp_path, dtype):
    model = b.raw_model()
    code = {"uint1": (9, MIL_pb2.UINT1, 2**17), "int32": (14, MIL_pb2.INT32, 2**22)}[dtype]
    value = b.add_blob_const(model, "big", "fp32", (2**20,), 64)
    for kind in (value.type, b.operations(model)[0].outputs[0].type):
        kind.tensorType.dataType = code[1]
    for n in range(30):
        add_op(model, "reshape", f"r{n}", (2,), {"x": "x", "shape": "big"})
    weights = b.weight_bin(code[0], bytes(code[2]))
    refused(tmp_path, model, "reshape 'r0': input 'shape': .*a list of 1048576 numbers", weights)


def test_many_lists_of_numbers_are_counted_as_memory(tmp_path):
    model = b.raw_model()
    b.add_blob_const(model, "big", "int32", (4096,), 64)
    for n in range(200):
        add_op(model, "reshape", f"r{n}", (2,), {"x": "x", "shape": "big"})
    weights = b.weight_bin(14, bytes(2**14))
    refused(tmp_path, model, "reshape 'r.*: this takes", weights, limits=mil.Limits(memory=2**24))


def test_hundreds_of_states_in_one_group_are_planned_in_time(tmp_path):
    """Each update asks of each state whether it is read again."""
    model = b.raw_model()
    many, last = 500, "r0"
    for n in range(many):
        b.set_type(model.mlProgram.functions["main"].inputs.add(name=f"s{n}").type.stateType.wrappedType, "fp32", (2,))
        feature = model.description.state.add(name=f"s{n}").type.stateType.arrayType
        feature.dataType = b._ARRAY["fp32"]
        feature.shape.append(2)
        add_op(model, "read_state", f"r{n}", (2,), {"input": f"s{n}"})
    for n in range(1, many):
        add_op(model, "reshape_like", f"j{n}", (2,), {"x": last, "ref_tensors": [last, f"r{n}"]})
        for name, number in (("begins", [0, 0]), ("ends", [0, 1])):
            bind(b.operations(model)[-1].inputs[name].arguments.add(), np.array(number))
        argument = b.operations(model)[-1].inputs["end_masks"].arguments.add()
        bind(argument, np.array([0, 0]))
        argument.value.type.tensorType.dataType = MIL_pb2.INT32
        last = f"j{n}"
    add_op(model, "mul", "update", (2,), {"x": "x", "y": "x"})
    for n in range(many):
        inputs = {"x": last, "update": "update", "begin": np.array([0]), "end": np.array([2])}
        add_op(model, "slice_update", f"u{n}", (2,), inputs)
        last = f"u{n}"
    for n in range(many):
        op = b.operations(model).add(type="write_state")
        op.inputs["input"].arguments.add(name=f"s{n}")
        op.inputs["data"].arguments.add(name=last)
    program = mil.load(b.write_package(tmp_path / "m.mlpackage", model))
    state = program.make_state()
    program.predict({"x": np.ones(2)}, state=state)
    assert state.read("s7").tolist() == [1, 1]


@pytest.mark.parametrize("declared", ["fp32", "fp16", "int32", "string", "state"])
def test_a_list_where_a_tensor_is_declared_is_refused(tmp_path, declared):
    model = b.raw_model()
    op = b.operations(model).add(type="make_list")
    kind = op.outputs.add(name="l").type
    if declared == "state":
        b.set_type(kind.stateType.wrappedType, "fp32", (2,))
    else:
        b.set_type(kind, "fp32" if declared == "string" else declared, (2,))
    if declared == "string":
        kind.tensorType.dataType = MIL_pb2.STRING
    program = mil.load(b.write_package(tmp_path / "m.mlpackage", model))
    if declared == "state":
        assert [r.name for r in program.ranges([{"x": np.ones(2)}])] == ["y", "x"]
        return
    for call in (program.predict, lambda feed: program.ranges([feed]), lambda feed: list(program.trace(feed))):
        with pytest.raises(PackageError, match="make_list 'l' failed: the result is a TensorList, declared is"):
            call({"x": np.ones(2)})


def test_a_state_is_no_output(tmp_path):
    model = b.raw_model()
    b.set_type(model.mlProgram.functions["main"].inputs.add(name="s").type.stateType.wrappedType, "fp32", (2,))
    array = model.description.state.add(name="s").type.stateType.arrayType
    output = model.description.output.add(name="s").type.multiArrayType
    for described in (array, output):
        described.dataType = b._ARRAY["fp32"]
        described.shape.append(2)
    model.mlProgram.functions["main"].block_specializations["CoreML8"].outputs.append("s")
    refused(tmp_path, model, "output 's' is an array, but StateType")


def test_of_the_costs_that_are_remembered_the_oldest_goes():
    ledger = Ledger()
    for n in range(5):
        ledger.remember(n, (n, n), 3)
    assert list(ledger.costs) == [2, 3, 4]
