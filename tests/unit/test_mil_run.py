"""distill.mil: running programs. Results are compared with torch or numpy, never with our own code."""

from __future__ import annotations

import copy
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb

from distill import mil
from distill.errors import InputError, PackageError
from distill.mil.ops.registry import op
from tests.unit import mil_build as b

F16 = {"rtol": 2e-3, "atol": 2e-3}


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


class Block(torch.nn.Module):
    """A decoder block in the (B, C, 1, S) layout: 1x1 convolutions, [x, -x] norm, attention, SwiGLU."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        names = ("q", "k", "v", "o", "gate", "up", "down")
        self.parts = torch.nn.ModuleDict({n: torch.nn.Conv2d(width, width, 1, bias=n == "q") for n in names})

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.cat([x, -x], 1)
        d = z - z.mean(1, keepdim=True)
        return (d * ((d * d).mean(1, keepdim=True) + 1e-5).rsqrt())[:, : x.shape[1]]

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        p, h = self.parts, self.norm(x)
        q, k, v = (p[n](h).squeeze(2) for n in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k / 4 + mask, -1)
        x = x + p["o"]((v @ weights.transpose(1, 2)).unsqueeze(2))
        h = self.norm(x)
        return x + p["down"](torch.nn.functional.silu(p["gate"](h)) * p["up"](h))


def convert(path: Path, module: torch.nn.Module, inputs: list, example: tuple, **options) -> Path:
    program = torch.export.export(module.eval(), example).run_decompositions({})
    model = ct.convert(
        program,
        inputs=inputs,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
        **options,
    )
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    torch.manual_seed(0)
    module = Block()
    x, mask = torch.randn(1, 16, 1, 8), torch.full((1, 8, 8), -1e4).triu(1)
    specs = [
        ct.TensorType("x", x.shape, dtype=np.float16),
        ct.TensorType("mask", mask.shape, dtype=np.float16),
    ]
    outputs = [ct.TensorType("y", dtype=np.float16)]
    path = convert(tmp_path_factory.mktemp("d") / "m.mlpackage", module, specs, (x, mask), outputs=outputs)
    with torch.no_grad():
        expected = module(x, mask).numpy()
    return mil.load(path), {"x": x.numpy(), "mask": mask.numpy()}, expected


def test_a_decoder_block_agrees_with_torch_in_fp16(decoder):
    program, inputs, expected = decoder
    out = program.predict(inputs)["y"]
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, atol=1e-2)
    np.testing.assert_array_equal(out, half(out))


def test_fp32_leaves_only_the_rounding_of_the_weights(decoder):
    program, inputs, expected = decoder
    error = {p: np.abs(program.predict(inputs, policy=p)["y"] - expected).max() for p in ("fp32", "ieee16")}
    assert error["fp32"] < 2e-3
    assert error["fp32"] < error["ieee16"]


def test_acc16_is_worse_than_ieee16_but_close(decoder):
    program, inputs, expected = decoder
    exact, rough = (program.predict(inputs, policy=p)["y"] for p in ("ieee16", "acc16"))
    assert not np.array_equal(exact, rough)
    np.testing.assert_allclose(rough, expected, atol=3e-2)


def test_a_trace_yields_every_operation_in_order_and_ends_in_the_output(decoder):
    program, inputs, _ = decoder
    steps = list(program.trace(inputs))
    wanted = [o for o in program.function().block.operations if o.type != "const"]
    assert [s.op for s in steps] == wanted
    np.testing.assert_array_equal(steps[-1].outputs["y"], program.predict(inputs)["y"])


def test_strict_names_the_operation_that_overflows(tmp_path):
    def body(x):
        return mb.mul(x=mb.square(x=x, name="squared"), y=np.float32(0.5), name="y")

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((3,))], body)
    out = program.predict({"x": np.array([300.0, 1e-3, 1.0])}, policy="strict")
    assert out["y"][0] == np.inf
    found = {(f.kind, f.op_type) for f in program.findings}
    assert ("overflow", "square") in found and ("subnormal", "square") in found
    program.predict({"x": np.ones(3)}, policy="strict")
    assert program.findings == []


def test_an_unknown_policy_lists_those_that_exist(decoder):
    with pytest.raises(InputError, match="acc16, fp32, ieee16, strict"):
        decoder[0].predict(decoder[1], policy="fp64")


class Cached(torch.nn.Module):
    """One attention layer with a KV state, written by slices at a position."""

    def __init__(self, layers: int = 2, ctx: int = 8, width: int = 4) -> None:
        super().__init__()
        self.register_buffer("kv", torch.zeros(2 * layers, 1, ctx, width))
        self.mix = torch.nn.ModuleList([torch.nn.Linear(width, 3 * width) for _ in range(layers)])
        self.ctx = ctx

    def forward(self, x: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        p = pos.item()
        torch._check_is_size(p)
        torch._check(p < self.ctx)
        torch._check(p + 1 <= self.ctx)
        for n, mix in enumerate(self.mix):
            q, k, v = mix(x).chunk(3, -1)
            self.kv[2 * n : 2 * n + 1, :, p : p + 1, :] = k.unsqueeze(0)
            self.kv[2 * n + 1 : 2 * n + 2, :, p : p + 1, :] = v.unsqueeze(0)
            weights = torch.softmax(q @ self.kv[2 * n].transpose(1, 2), -1)
            x = x + weights @ self.kv[2 * n + 1]
        return x


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    torch.manual_seed(1)
    module = Cached()
    specs = [ct.TensorType("x", (1, 1, 4)), ct.TensorType("pos", (1,), dtype=np.int32)]
    example = (torch.zeros(1, 1, 4), torch.tensor([1], dtype=torch.int32))
    path = convert(tmp_path_factory.mktemp("c") / "m.mlpackage", module, specs, example, outputs=[ct.TensorType("y")])
    return mil.load(path), module


def test_stateful_decoding_agrees_with_torch_step_by_step(cached):
    program, module = cached
    module, state = copy.deepcopy(module), program.make_state()
    for p in range(6):
        x = b.random((1, 1, 4), p)
        with torch.no_grad():
            expected = module(torch.from_numpy(x), torch.tensor([p])).numpy()
        out = program.predict({"x": x, "pos": np.array([p])}, state=state)["y"]
        np.testing.assert_allclose(out, expected, atol=1e-2)
        np.testing.assert_allclose(state.read("kv"), module.kv.numpy(), atol=5e-3)


def test_two_conversations_interleave_and_a_copy_is_independent(cached):
    program, _ = cached
    xs = [b.random((1, 1, 4), n) for n in range(6)]

    def step(state, p, x):
        return program.predict({"x": x, "pos": np.array([p])}, state=state)["y"]

    alone = program.make_state()
    expected = [step(alone, p, xs[p]) for p in range(3)]
    one, two = program.make_state(), program.make_state()
    for p in range(3):
        np.testing.assert_array_equal(step(one, p, xs[p]), expected[p])
        step(two, p, xs[5 - p])
    branch, before = one.copy(), one.read("kv")
    step(branch, 3, xs[3])
    np.testing.assert_array_equal(one.read("kv"), before)
    assert not np.array_equal(branch.read("kv"), before)


def test_a_trace_updates_the_state_like_a_prediction(cached):
    program, _ = cached
    inputs = {"x": b.random((1, 1, 4)), "pos": np.array([0])}
    one, two = program.make_state(), program.make_state()
    program.predict(inputs, state=one)
    kept = [s.outputs for s in program.trace(inputs, state=two)]
    copies = copy.deepcopy(kept)
    np.testing.assert_array_equal(one.read("kv"), two.read("kv"))
    program.predict(inputs, state=two)
    for before, after in zip(copies, kept, strict=True):
        for name in before:
            np.testing.assert_array_equal(before[name], after[name])


def test_a_stateful_function_needs_its_state(cached):
    with pytest.raises(InputError, match=r"keeps state \(kv\)"):
        cached[0].predict({"x": np.zeros((1, 1, 4)), "pos": np.array([0])})


def test_what_was_read_before_a_write_does_not_change(tmp_path):
    def body(x, s):
        old = mb.read_state(input=s)
        view = mb.slice_by_index(x=old, begin=[0, 0], end=[1, 3])
        new = mb.coreml_update_state(state=s, value=mb.slice_update(x=old, update=x, begin=[0, 0], end=[1, 3]))
        again = mb.coreml_update_state(state=s, value=mb.slice_update(x=new, update=view, begin=[1, 0], end=[2, 3]))
        return mb.add(x=view, y=x, name="y"), mb.identity(x=again, name="z")

    specs = [b.tensor((1, 3), "fp16"), b.state((2, 3))]
    program = b.load(tmp_path / "m.mlpackage", specs, body)
    state, results = program.make_state(), []
    for n in range(1, 4):
        results.append(program.predict({"x": np.full((1, 3), n)}, state=state))
    assert [r["y"][0, 0] for r in results] == [1, 3, 5]  # the row before the write, plus x
    assert [r["z"].tolist() for r in results] == [[[n] * 3, [n - 1] * 3] for n in (1, 2, 3)]
    assert state.read("s").tolist() == [[3] * 3, [2] * 3]


def test_two_states_that_receive_one_value_stay_apart(tmp_path):
    def body(x, s, t):
        old = mb.read_state(input=t)  # or coremltools 9.0 loses its way in a pass
        new = mb.slice_update(x=mb.read_state(input=s), update=x, begin=[0], end=[1])
        first = mb.coreml_update_state(state=s, value=mb.mul(x=new, y=np.float16(1)))
        second = mb.coreml_update_state(state=t, value=new)
        return mb.add(x=second, y=first, name="y"), mb.add(x=second, y=old, name="z")

    specs = [b.tensor((1,), "fp16"), b.state((2,)), b.state((2,))]
    program = b.load(tmp_path / "m.mlpackage", specs, body)
    state = program.make_state()
    program.predict({"x": [1]}, state=state)
    state.write("t", np.array([7, 7]))
    assert state.read("s").tolist() == [1, 0]
    program.predict({"x": [2]}, state=state)
    assert state.read("s").tolist() == state.read("t").tolist() == [2, 0]


def test_decoder_state_is_updated_in_place(cached):
    from distill.mil import plan as plans

    program, _ = cached
    state = program.make_state()
    program.predict({"x": np.zeros((1, 1, 4)), "pos": np.array([0])}, state=state)
    (prepared,) = {id(p): p for p in program.cache.values() if isinstance(p, plans.Plan)}.values()
    updates = [i for i in prepared.instructions if i.op.type == "slice_update" and i.op.outputs[0].shape[0] == 4]
    assert len(updates) == 4 and all(i.in_place is not None for i in updates)


def test_functions_of_one_package_share_decoded_weights(tmp_path):
    def body(x):
        return mb.linear(x=x, weight=b.random((64, 64)), bias=b.random((64,)), name="y")

    first = b.build(tmp_path / "a.mlpackage", [b.tensor((1, 64))], body)
    descriptor = ct.utils.MultiFunctionDescriptor()
    descriptor.add_function(str(first), "main", "one")
    descriptor.add_function(str(first), "main", "two")
    descriptor.default_function_name = "one"
    ct.utils.save_multifunction(descriptor, str(tmp_path / "m.mlpackage"))
    program = mil.load(tmp_path / "m.mlpackage")
    assert sorted(program.functions) == ["one", "two"] and program.default_function == "one"
    x = b.random((1, 64), 1)
    np.testing.assert_array_equal(program.predict({"x": x})["y"], program.predict({"x": x}, function="two")["y"])
    assert len([k for k in program.cache if k[0] == "constant"]) == 2


def test_enumerated_shapes_are_enforced(tmp_path):
    shapes = ct.EnumeratedShapes(shapes=[(1, 4), (1, 8)], default=(1, 4))
    traced = torch.jit.trace(torch.nn.ReLU(), torch.zeros(1, 4))
    model = ct.convert(
        traced,
        inputs=[ct.TensorType("x", shapes)],
        outputs=[ct.TensorType("y")],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    model.save(str(tmp_path / "m.mlpackage"))
    program = mil.load(tmp_path / "m.mlpackage")
    assert program.predict({"x": -np.ones((1, 8))})["y"].shape == (1, 8)
    with pytest.raises(InputError, match=r"shape \[1, 5\], expected one of \[1, 4\], \[1, 8\]"):
        program.predict({"x": np.zeros((1, 5))})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "needs input ids"),
        ({"ids": [1, 2], "idz": 0}, "has no input idz; it takes ids"),
        ({"ids": [1, 2, 3]}, r"shape \[3\], expected \[2\]"),
        ({"ids": [1.5, 2]}, "takes int32, got 1.5"),
        ({"ids": [2**31, 0]}, "takes int32, got 2147483648"),
        ({"ids": [float("nan"), 0]}, "takes int32, got nan"),
        ({"ids": ["a", "b"]}, "not of numbers"),
    ],
)
def test_bad_inputs_are_named_with_the_value_that_was_wrong(tmp_path_factory, inputs, message):
    path = tmp_path_factory.getbasetemp() / "ids.mlpackage"
    if not path.exists():
        b.build(path, [b.tensor((2,), "int32")], lambda ids: mb.add(x=ids, y=np.int32(1), name="y"))
    with pytest.raises(InputError, match=message):
        mil.load(path).predict(inputs)


def test_integer_inputs_may_come_as_whole_floats_or_int64(tmp_path):
    program = b.load(
        tmp_path / "m.mlpackage",
        [b.tensor((2,), "int32")],
        lambda ids: mb.add(x=ids, y=np.int32(1), name="y"),
    )
    for value in ([1.0, 2.0], np.array([1, 2], np.int64), torch.tensor([1, 2])):
        assert program.predict({"ids": value})["y"].tolist() == [2, 3]


def test_loops_and_branches_run(tmp_path):
    def body(x):
        total = mb.while_loop(
            _cond=lambda n, t: mb.squeeze(x=mb.less(x=n, y=np.float32(5))),
            _body=lambda n, t: (mb.add(x=n, y=np.float32(1)), mb.add(x=t, y=mb.mul(x=n, y=x))),
            loop_vars=(np.zeros(1, np.float32), np.zeros(1, np.float32)),
        )[1]
        positive = mb.squeeze(x=mb.greater(x=x, y=np.float32(0)))
        return mb.cond(
            pred=positive,
            _true_fn=lambda: mb.add(x=total, y=np.float32(1)),
            _false_fn=lambda: mb.sub(x=total, y=np.float32(1)),
            name="y",
        )

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((1,))], body, "fp32")
    assert program.predict({"x": [2.0]})["y"].item() == 21
    assert program.predict({"x": [-2.0]})["y"].item() == -21


def test_registering_an_operator_twice_raises():
    with pytest.raises(ValueError, match="'add' is registered twice"):
        op("add")(lambda: None)


def test_a_token_id_outside_the_vocabulary_is_reported(tmp_path):
    def body(ids):
        return mb.gather(x=b.random((8, 4)), indices=ids, axis=0, name="y")

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((1,), "int32")], body)
    program.predict({"ids": [9]}, policy="strict")
    assert [f.kind for f in program.findings if f.kind == "index"] == ["index"]


def test_validated_indices_raise(tmp_path):
    def body(ids):
        return mb.gather(x=b.random((8, 4)), indices=ids, axis=0, validate_indices=True, name="y")

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((1,), "int32")], body)
    with pytest.raises(PackageError, match="index 9 is out of bounds for a dimension of size 8"):
        program.predict({"ids": [9]})
