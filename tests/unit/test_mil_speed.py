"""distill.mil: what makes it fast and small, and that none of it changes a bit. Nothing here measures time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import coremltools as ct
import msgspec
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb

from distill import mil
from distill.errors import PackageError
from distill.mil import guard, interpreter
from distill.mil.plan import Plan
from distill.mil.policy import Acc16, Policy, make_policy
from distill.mil_tools import bench_cells as bench
from tests.unit import mil_build as b

UNARY = ("exp", "tanh", "sigmoid", "silu", "abs", "square", "relu", "erf", "softmax")
BINARY = ("add", "sub", "mul", "maximum")
SHAPE = (2, 4, 1, 8)


class Plain(Policy):
    """ieee16 by its definition: a copy of every result, rounded."""

    def settle(self, x, op_type, name, ours=False):
        return x.half().float()


def random_program(path: Path, seed: int) -> mil.Program:
    """Thirty operations that read what came before at random; the last values are outputs."""
    rng = np.random.default_rng(seed)

    def body(x0, x1):
        values = [x0, x1]
        for _ in range(30):
            x, y = (values[i] for i in rng.integers(len(values), size=2))
            kind = rng.integers(7)
            if kind == 0:
                made = getattr(mb, str(rng.choice(UNARY)))(x=x)
            elif kind == 1:
                made = mb.transpose(x=mb.transpose(x=x, perm=[0, 3, 2, 1]), perm=[0, 3, 2, 1])
            elif kind == 2:
                made = mb.conv(x=x, weight=b.random((4, 4, 1, 1), int(rng.integers(99))))
            elif kind == 3:
                made = mb.layer_norm(x=x, axes=[1])
            elif kind == 4:
                swapped = mb.transpose(x=mb.matmul(x=x, y=y, transpose_y=True), perm=[0, 1, 3, 2])
                made = mb.add(x=x, y=mb.mul(x=swapped, y=np.float32(0.25)))
            elif kind == 5:
                parts = mb.split(x=x, num_splits=2, axis=1)
                made = mb.concat(values=[parts[1], parts[0]], axis=1)
            else:
                made = getattr(mb, str(rng.choice(BINARY)))(x=x, y=y)
            values.append(made)
        return tuple(mb.identity(x=value, name=f"y{n}") for n, value in enumerate(values[-4:]))

    return b.load(path, [b.tensor(SHAPE), b.tensor(SHAPE)], body)


@pytest.mark.parametrize("seed", range(6))
def test_rounding_in_place_gives_the_same_bits_as_a_rounded_copy(tmp_path, seed):
    program = random_program(tmp_path / "m.mlpackage", seed)
    inputs = {"x0": b.random(SHAPE, seed), "x1": b.random(SHAPE, seed + 50)}
    kept = {name: value.copy() for name, value in inputs.items()}
    expected = program.predict(inputs, policy=Plain())
    for _ in range(2):  # first with every call measured, then with its cost known
        found = program.predict(inputs)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name].view(np.int32), value.view(np.int32), err_msg=name)
    traced = {name: value for step in program.trace(inputs) for name, value in step.outputs.items()}
    for name, value in expected.items():
        np.testing.assert_array_equal(traced[name].view(np.int32), value.view(np.int32), err_msg=name)
    for name, value in kept.items():
        np.testing.assert_array_equal(inputs[name], value)


def test_an_output_is_the_callers_own(tmp_path):
    """Written by the caller, it changes neither the next prediction nor another output."""

    def body(x):
        first = mb.mul(x=x, y=np.float32(2), name="y")
        return first, mb.reshape(x=first, shape=[4], name="z"), mb.reshape(x=x, shape=[4], name="w")

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((2, 2))], body)
    x = np.ones((2, 2), np.float32)
    out = program.predict({"x": x})
    for value in out.values():
        assert value.flags.writeable
        value += 10
        assert sum(float(v.max()) > 5 for v in out.values()) == 1
        value -= 10
    np.testing.assert_array_equal(x, np.ones((2, 2)))
    np.testing.assert_array_equal(program.predict({"x": x})["y"], np.full((2, 2), 2))


def large(path: Path) -> mil.Program:
    """One embedding and one square matrix, in two functions; the second is the first with another length."""
    table, matrix = b.random((4096, 256), 1), b.random((2048, 256), 2)
    descriptor = ct.utils.MultiFunctionDescriptor()
    for length in (4, 8):

        def body(ids):
            row = mb.gather(x=table, indices=ids, axis=0)
            return mb.linear(x=row, weight=matrix, bias=np.zeros(2048, np.float32), name="y")

        one = b.build(path.with_name(f"f{length}.mlpackage"), [b.tensor((length,), "int32")], body)
        descriptor.add_function(str(one), "main", f"f{length}")
    descriptor.default_function_name = "f4"
    ct.utils.save_multifunction(descriptor, str(path))
    return mil.load(path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return large(tmp_path_factory.mktemp("large") / "m.mlpackage")


def constants(program: mil.Program, op_type: str, name: str) -> list[torch.Tensor]:
    plans = [value for value in program.cache.values() if isinstance(value, Plan)]
    return [i.fixed[name] for plan in plans for i in plan.instructions if i.op.type == op_type]


def run_all(program: mil.Program) -> None:
    for length in (4, 8):
        for policy in ("ieee16", "fp32"):
            program.predict({"ids": np.arange(length)}, f"f{length}", policy=policy)


def test_weights_are_decoded_once_for_all_functions_and_policies(shared):
    run_all(shared)
    weights = constants(shared, "linear", "weight")
    assert len(weights) == 4 and len({weight.data_ptr() for weight in weights}) == 1


def test_an_embedding_stays_in_the_mapped_file_in_half_precision(shared):
    run_all(shared)
    tables = constants(shared, "gather", "x")
    assert len(tables) == 4 and all(table.dtype == torch.float16 for table in tables)
    assert len({table.data_ptr() for table in tables}) == 1
    ids = np.array([1, 4095, 0, 7])
    rows = next(s.outputs for s in shared.trace({"ids": ids}) if s.op.type == "gather")
    (found,) = rows.values()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, b.random((4096, 256), 1)[ids].astype(np.float16).astype(np.float32))


def test_operations_alike_are_measured_once(tmp_path):
    """Layers of a decoder are the same operations with other weights: one is measured, the others take its cost."""

    def body(x):
        for n in range(20):
            x = mb.tanh(x=mb.conv(x=x, weight=b.random((8, 8, 1, 1), n)))
        return mb.identity(x=x, name="y")

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((1, 8, 1, 4))], body)
    plan, run, arguments = begin(program, b.random((1, 8, 1, 4)))
    plan.execute(run, arguments, True)
    again, rerun, arguments = begin(program, b.random((1, 8, 1, 4)))
    again.execute(rerun, arguments, True)
    assert len([i for i in plan.instructions if i.op.type == "conv"]) == 20
    assert len([key for key in run.guard.ledger.costs if key[0][0] == "conv"]) == 1
    assert rerun.guard.spent == run.guard.spent > 0


def begin(program: mil.Program, x: np.ndarray):
    return interpreter.begin(program, program.function(), {"x": x}, None, make_policy("ieee16"))


MEASURE = """
import json, sys
import numpy as np, torch
torch.set_num_threads(1)
from distill import mil
import distill.mil.interpreter, distill.mil.parse

def private():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

torch.ones(16, 256) @ torch.ones(16384, 256).t()  # the library of products keeps a buffer of its own
program = mil.load(sys.argv[1])
sizes = [private()]
for name in sorted(program.functions):
    inputs = {f.name: np.zeros(f.shape, np.int32) for f in program.function(name).inputs}
    program.predict(inputs, name)
    sizes.append(private())
print(json.dumps([sizes, "coremltools" in sys.modules, "torch._dynamo" in sys.modules]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_private_memory_does_not_grow_with_the_number_of_functions(tmp_path):
    table, matrix = b.random((16384, 256), 1), b.random((16384, 256), 2)  # 16 MiB each as fp32
    descriptor = ct.utils.MultiFunctionDescriptor()
    for length in (4, 8, 12, 16):

        def body(ids):
            row = mb.gather(x=table, indices=ids, axis=0)
            return mb.linear(x=row, weight=matrix, bias=np.zeros(16384, np.float32), name="y")

        one = b.build(tmp_path / f"f{length}.mlpackage", [b.tensor((length,), "int32")], body)
        descriptor.add_function(str(one), "main", f"f{length}")
    descriptor.default_function_name = "f4"
    ct.utils.save_multifunction(descriptor, str(tmp_path / "m.mlpackage"))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "m.mlpackage")], capture_output=True, text=True, check=True
    )
    (empty, *sizes), coremltools, compiler = json.loads(done.stdout)
    mebibyte = 2**20
    assert sizes[0] - empty < 16 * mebibyte + 12 * mebibyte  # the matrix, not the table
    assert sizes[-1] - sizes[0] < 8 * mebibyte
    assert not coremltools and not compiler


@pytest.fixture(scope="module")
def fallible(tmp_path_factory):
    """Writes a row of its state, then gathers an index that may be out of bounds."""

    def body(x, pos, index, kv):
        old = mb.read_state(input=kv)
        end = mb.add(x=pos, y=np.array([1], np.int32))
        row = mb.concat(values=[pos, np.array([0], np.int32)], axis=0)
        stop = mb.concat(values=[end, np.array([4], np.int32)], axis=0)
        new = mb.slice_update(x=old, update=mb.cast(x=x, dtype="fp16"), begin=row, end=stop)
        mb.coreml_update_state(state=kv, value=new)
        return mb.gather(x=mb.read_state(input=kv), indices=index, axis=0, validate_indices=True, name="y")

    specs = [b.tensor((1, 4)), b.tensor((1,), "int32"), b.tensor((1,), "int32"), b.state((3, 4))]
    return b.load(tmp_path_factory.mktemp("state") / "m.mlpackage", specs, body)


def test_a_prediction_that_fails_leaves_its_state_as_it_was(fallible):
    state = fallible.make_state()
    names = [f.name for f in fallible.function().inputs]

    def predict(value: float, position: int, index: int) -> None:
        values = [np.full((1, 4), value, np.float32), np.array([position]), np.array([index])]
        fallible.predict(dict(zip(names, values)), state=state)

    predict(1, 0, 0)
    (kv,) = state.names
    before = state.read(kv)
    assert before[0].tolist() == [1, 1, 1, 1]
    with pytest.raises(PackageError, match="gather"):
        predict(9, 0, 77)
    np.testing.assert_array_equal(state.read(kv), before)
    predict(2, 1, 1)
    assert state.read(kv)[:2].tolist() == [[1] * 4, [2] * 4]


def test_strict_reports_every_float_tensor_once_for_each_operation(tmp_path):
    def body(x):
        big = mb.mul(x=x, y=np.float32(1e30), name="big")
        return mb.mul(x=big, y=np.float32(1e30), name="y"), mb.reshape(x=big, shape=[3, 1], name="z")

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((3,))], body, "fp32")
    program.predict({"x": np.array([1.0, np.nan, 1e-40], np.float32)}, policy="strict")
    found = {(f.kind, f.op_type, f.name): f.count for f in program.findings}
    assert found == {
        ("nan", "input", "x"): 1,
        ("subnormal", "input", "x"): 1,
        ("nan", "mul", "big"): 1,
        ("infinite", "mul", "y"): 1,
        ("nan", "mul", "y"): 1,
        ("nan", "reshape", "z"): 1,
    }


def test_strict_adds_up_what_a_loop_repeats():
    strict = make_policy("strict")
    for value in (1e5, 2e5):
        strict.settle(torch.tensor([value, 1.0]), "mul", "y")
    (only,) = strict.findings
    assert (only.kind, only.count, only.size, only.worst) == ("overflow", 2, 4, 2e5)


def test_acc16_adds_up_in_half_precision_inside_softmax_and_logsumexp():
    """4096 equal powers: past 2048, adding 1 to an fp16 sum changes nothing, 32 at a time it is exact to 4096."""
    policy, x = Acc16(), torch.zeros(40000)
    assert make_policy("ieee16").logsumexp(x, [0], False).item() == pytest.approx(np.log(40000))
    total = 0.0
    for _ in range(40000 // 32):
        total = float(np.float16(total + 32))
    assert policy.logsumexp(x, [0], False).item() == pytest.approx(np.log(total), abs=1e-6)
    assert policy.softmax(x, 0)[0].item() == pytest.approx(1 / total, rel=1e-6)
    y = torch.tensor([[0.0, 1.0, -np.inf]])
    torch.testing.assert_close(policy.softmax(y, 1), torch.softmax(y, 1), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(policy.logsumexp(y, [1], True), torch.logsumexp(y, [1], True), atol=2e-3, rtol=2e-3)


def test_the_benchmark_makes_its_package_and_measures_every_cell(tmp_path, monkeypatch):
    small = msgspec.structs.replace(
        bench.CONFIG,
        vocab_size=96,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
    )
    monkeypatch.setattr(bench, "CONFIG", small)
    monkeypatch.setattr(bench, "LENGTHS", (4, 8))
    bench.make(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {bench.WEIGHTS, bench.PREFILL, bench.ALL}
    assert sorted(mil.load(tmp_path / bench.ALL).functions) == ["decode", "prefill_4", "prefill_8"]
    logits = bench.run_executor(tmp_path, "fp32")()["logits"]
    np.testing.assert_allclose(logits, bench.run_eager(tmp_path)().numpy(), rtol=1e-2, atol=1e-2)
    for cell, policy in (("speed", "ieee16"), ("first", "fp32"), ("memory", "fp32")):
        assert all(value > 0 for value in bench.CELLS[cell](tmp_path, policy, 1).values())


def test_a_step_at_another_position_is_not_measured_again(tmp_path, monkeypatch):
    """Where a slice begins changes nothing about what it takes."""

    def body(x, position, kv):
        end = mb.add(x=position, y=np.array([1], np.int32))
        new = mb.slice_update(
            x=mb.read_state(input=kv),
            update=x,
            begin=mb.concat(values=[position, np.array([0], np.int32)], axis=0),
            end=mb.concat(values=[end, np.array([4], np.int32)], axis=0),
        )
        mb.coreml_update_state(state=kv, value=new)
        return mb.reduce_sum(x=new, axes=[0])

    specs = [b.tensor((1, 4), "fp16"), b.tensor((1,), "int32"), b.state((8, 4))]
    program = b.load(tmp_path / "m.mlpackage", specs, body)
    state, measured, foreseen = program.make_state(), [], guard.foreseen
    monkeypatch.setattr(guard, "foreseen", lambda *call: measured.append(call) or foreseen(*call))
    for position in range(4):
        before = len(measured)
        program.predict({"x": np.ones((1, 4)), "position": np.array([position])}, state=state)
        if position > 1:
            assert len(measured) == before
    assert measured and state.read(state.names[0]).sum() == 16
