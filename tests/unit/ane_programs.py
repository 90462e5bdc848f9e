"""Packages for the ANE lint's tests: for each rule one that violates it, and near misses that do not."""

from __future__ import annotations

import atexit
import dataclasses
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import get_new_symbol, types

from distill import mil

X = (1, 64, 1, 64)
VIOLATIONS: dict[str, Callable[[], mil.Program]] = {}
Body = Callable[..., Any]
FOLDER = tempfile.TemporaryDirectory()
atexit.register(FOLDER.cleanup)


def violates(*ids: str) -> Callable[[Callable[[], mil.Program]], Callable[[], mil.Program]]:
    """The program that a function makes violates these rules. Made once."""

    def enter(make: Callable[[], mil.Program]) -> Callable[[], mil.Program]:
        cached = cache(make)
        VIOLATIONS.update(dict.fromkeys(ids, cached))
        return cached

    return enter


def save(model: Any) -> mil.Program:
    path = Path(tempfile.mkdtemp(dir=FOLDER.name)) / "model.mlpackage"
    model.save(str(path))
    return mil.load(path)


def build(body: Body, *specs: Any, target: Any = ct.target.iOS18, **options: Any) -> mil.Program:
    """Write a package from MIL, operations as they are written here, and load it."""
    specs = specs or (tensor(X),)
    program = mb.program(input_specs=list(specs), opset_version=target)(body)
    settings = {"pass_pipeline": ct.PassPipeline.EMPTY} | options
    return save(ct.convert(program, minimum_deployment_target=target, skip_model_load=True, **settings))


def tensor(shape: tuple[Any, ...], dtype: type = types.fp16) -> Any:
    return mb.TensorSpec(shape, dtype)


def half(*shape: int, value: float = 0.5) -> np.ndarray:
    return np.full(shape, value, np.float16)


def network(x: Any) -> Any:
    h = mb.conv(x=x, weight=half(64, 64, 1, 1))
    return mb.mul(x=mb.silu(x=h), y=x)


@cache
def clean() -> mil.Program:
    """A package without a finding; a sparse file lifts it over the size floor."""
    program = build(network)
    sparse(program.path, 21_000_000)
    return program


def sparse(path: Path, size: int) -> None:
    with (path / "padding").open("wb") as file:
        file.truncate(size)


def operation(program: mil.Program, type_: str) -> mil.Operation:
    return next(op for op in program.function().block.walk() if op.type == type_)


def retyped(type_: mil.TensorType) -> mil.Program:
    """The clean network with another type declared for one of its values."""
    program = build(network)
    op = operation(program, "silu")
    op.outputs[0] = dataclasses.replace(op.outputs[0], type=type_)
    return program


violates("rank")(lambda: retyped(mil.TensorType("fp16", (1, 2, 32, 1, 2, 32))))
violates("dtype")(lambda: retyped(mil.TensorType("bf16", X)))


@violates("layout", "linear")
def rank_2() -> mil.Program:
    return build(lambda x: mb.linear(x=mb.reshape(x=x, shape=(64, 64)), weight=half(64, 64)))


def flexible(shape: Any, *names: str, target: Any = ct.target.iOS18) -> mil.Program:
    body = (lambda x: mb.relu(x=x)) if len(names) < 2 else (lambda x, y: (mb.relu(x=x), mb.relu(x=y)))
    symbols = [tensor((1, 64, 1, get_new_symbol())) for _ in names]
    inputs = [ct.TensorType(n, shape, dtype=np.float16) for n in names]
    return build(body, *symbols, target=target, inputs=inputs, pass_pipeline=ct.PassPipeline.DEFAULT)


@violates("dynamic-range")
def ranged() -> mil.Program:
    return flexible(ct.Shape((1, 64, 1, ct.RangeDim(32, 128))), "x")


@violates("enumerated")
def enumerated() -> mil.Program:
    return flexible(ct.EnumeratedShapes([(1, 64, 1, 32), (1, 64, 1, 64)]), "x")


@violates("enumerated-limit")
def enumerated_129() -> mil.Program:
    program = enumerated()
    function = program.function()
    many = dataclasses.replace(function.inputs[0], enumerated=tuple((1, 64, 1, n) for n in range(32, 161)))
    return with_function(program, inputs=[many])


def with_function(program: mil.Program, **changes: Any) -> mil.Program:
    function = dataclasses.replace(program.function(), **changes)
    return dataclasses.replace(program, functions={function.name: function})


@violates("last-axis", "last-axis-inner")
def decode() -> mil.Program:
    return build(network, tensor((1, 64, 1, 1)))


@violates("dim-16384")
def long_axis() -> mil.Program:
    return build(lambda x: mb.relu(x=x), tensor((1, 20_000, 1, 32)))


def sized(size: int) -> mil.Program:
    program = build(network)
    sparse(program.path, size)
    return program


violates("size-2gb")(lambda: sized(2_100_000_000))
violates("size-1gb")(lambda: sized(1_100_000_000))
violates("size-chunk")(lambda: sized(300_000_000))
violates("size-floor")(lambda: build(network))


@violates("fp32-compute", "fp32-io")
def fp32() -> mil.Program:
    return build(lambda x: mb.relu(x=x), tensor(X, types.fp32), compute_precision=ct.precision.FLOAT32)


@violates("int-ops", "dynamic-index", "vocab-uint16")
def embedding() -> mil.Program:
    def body(ids: Any) -> Any:
        return mb.gather(x=half(70_000, 32), indices=mb.add(x=ids, y=np.int32(1)), axis=0)

    return build(body, tensor((1, 32), types.int32))


@violates("index-width")
def narrow_index() -> mil.Program:
    return build(lambda ids: mb.gather(x=half(40_000, 32), indices=ids, axis=0), tensor((1, 32), types.int16))


@violates("mask-inf")
def infinite_mask() -> mil.Program:
    return build(lambda x: mb.softmax(x=mb.add(x=x, y=half(1, 1, 1, 64, value=-np.inf)), axis=-1))


@violates("mask-range")
def large_mask() -> mil.Program:
    return build(lambda x: mb.softmax(x=mb.add(x=x, y=half(1, 1, 1, 64, value=-6e4)), axis=-1))


@violates("fp16-square")
def plain_rms_norm() -> mil.Program:
    return build(lambda x: mb.rsqrt(x=mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[1], keep_dims=True)))


@violates("rms-norm")
def torch_rms_norm() -> mil.Program:
    traced = torch.jit.trace(torch.nn.RMSNorm(64).eval(), torch.ones(1, 8, 64))
    return save(ct.convert(traced, inputs=[ct.TensorType("x", (1, 8, 64))], skip_model_load=True))


@violates("fp16-logsumexp")
def logsumexp() -> mil.Program:
    return build(lambda x: mb.reduce_log_sum_exp(x=x, axes=[1], keep_dims=True))


@violates("op-off-ane")
def random() -> mil.Program:
    return build(lambda x: mb.add(x=x, y=mb.random_normal(shape=X, mean=np.float16(0), stddev=np.float16(1))))


@violates("op-disputed", "topk-consumer")
def topk() -> mil.Program:
    return build(lambda x: mb.relu(x=mb.topk(x=x, k=4, axis=1)[0]))


@violates("op-one-source")
def logical() -> mil.Program:
    def body(x: Any) -> Any:
        both = mb.logical_and(x=mb.greater(x=x, y=np.float16(0)), y=mb.less(x=x, y=np.float16(1)))
        return mb.select(cond=both, a=x, b=mb.relu(x=x))

    return build(body)


violates("op-family")(lambda: build(lambda x: mb.sin(x=x)))


@violates("unlisted-op")
def unlisted() -> mil.Program:
    program = build(network)
    operation(program, "silu").type = "gated_delta_net"
    return program


@violates("depthwise")
def depthwise() -> mil.Program:
    weight = half(1024, 1, 1, 3)
    return build(lambda x: mb.conv(x=x, weight=weight, groups=1024, pad_type="same"), tensor((1, 1024, 1, 32)))


@violates("sdpa")
def fused_attention() -> mil.Program:
    body = lambda q: mb.scaled_dot_product_attention(query=q, key=q, value=q)  # noqa: E731
    return build(body, tensor((1, 4, 32, 64)))


def stateful(*names: str, width: int = 64, transposed: bool = False) -> mil.Program:
    def body(x: Any, *states: Any) -> Any:
        for state in states:
            cache_ = mb.read_state(input=state)
            new = mb.transpose(x=x, perm=[0, 2, 1, 3]) if transposed else x
            kv = mb.slice_update(x=cache_, update=new, begin=[0, 0, 0, 0], end=new.shape)
            mb.coreml_update_state(state=state, value=kv)
        return mb.relu(x=x)

    arguments = "".join(f", {name}" for name in names)
    scope = {"body": body}
    exec(f"def main(x{arguments}): return body(x{arguments})", scope)
    states = [mb.StateTensorSpec((1, 32, 32, width), types.fp16) for _ in names]
    return build(scope["main"], tensor((1, 8, 8 if transposed else 1, width)), *states)


@violates("state-io")
def one_state() -> mil.Program:
    return stateful("kv")


violates("state-opset")(lambda: dataclasses.replace(one_state(), specification_version=8))
violates("state-dims")(lambda: stateful("kv", width=48))
violates("state-two")(lambda: stateful("k", "v"))
violates("state-many")(lambda: stateful("a", "b", "c"))
violates("state-transpose")(lambda: stateful("kv", transposed=True))


@violates("state-dtype")
def fp32_state() -> mil.Program:
    wrapped = mil.StateType(mil.TensorType("fp32", (1, 32, 32, 64)))
    state = dataclasses.replace(one_state().function().states[0], type=wrapped)
    return with_function(one_state(), states=[state])


def weighted(make: Callable[[], Any]) -> mil.Program:
    return build(lambda x: mb.conv(x=x, weight=make()))


@violates("shift-scale-offset")
def float_offset() -> mil.Program:
    data, scale = np.ones((64, 64, 1, 1), np.int8), half(64, 1, 1, 1)
    return weighted(lambda: mb.constexpr_blockwise_shift_scale(data=data, scale=scale, offset=scale))


@violates("scale-per-block")
def int4_blocks() -> mil.Program:
    data = np.ones((64, 64, 1, 1), types.np_int4_dtype)
    return weighted(lambda: mb.constexpr_blockwise_shift_scale(data=data, scale=half(64, 2, 1, 1)))


def palette(entries: int, dtype: type = np.float16) -> Any:
    bits = {4: types.np_uint2_dtype, 16: types.np_uint4_dtype}[entries]
    lut = np.arange(entries).astype(dtype).reshape(1, 1, 1, 1, entries, 1)
    return mb.constexpr_lut_to_dense(indices=np.zeros((64, 64, 1, 1), bits), lut=lut)


@violates("lut-int8")
def int8_table() -> mil.Program:
    def make() -> Any:
        lut = np.arange(16).astype(np.int8).reshape(1, 1, 1, 1, 16, 1)
        scaled = mb.constexpr_blockwise_shift_scale(data=lut, scale=half(1, 1, 1, 1, 1, 1))
        return mb.constexpr_lut_to_dense(indices=np.zeros((64, 64, 1, 1), types.np_uint4_dtype), lut=scaled)

    return weighted(make)


violates("low-bit")(lambda: weighted(lambda: palette(4)))


@violates("sparse-lut")
def sparse_table() -> mil.Program:
    def make() -> Any:
        mask = np.ones((64, 64, 1, 1), types.np_uint1_dtype)
        indices, lut = np.zeros(64 * 64, types.np_uint4_dtype), half(1, 1, 1, 1, 16, 1)
        kept, values = mb.constexpr_lut_to_sparse(indices_mask=mask, indices_nonzero_data=indices, lut=lut)
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=kept)

    return weighted(make)


@violates("w8a8")
def quantised_activations() -> mil.Program:
    def body(x: Any) -> Any:
        small = mb.quantize(input=x, scale=np.float16(0.1), output_dtype="int8")
        return mb.dequantize(input=small, scale=np.float16(0.1))

    return build(body)


def int8_per_channel() -> Any:
    data, offset = np.ones((64, 64, 1, 1), np.int8), np.zeros((64, 1, 1, 1), np.int8)
    return mb.constexpr_blockwise_shift_scale(data=data, scale=half(64, 1, 1, 1), offset=offset)


def masked(x: Any) -> Any:
    return mb.softmax(x=mb.add(x=x, y=half(1, 1, 1, 64, value=-4e4)), axis=-1)


ALLOWED: dict[str, Callable[[], mil.Program]] = {
    "mask-inf mask-range": lambda: build(masked),
    "shift-scale-offset scale-per-block": lambda: weighted(int8_per_channel),
    "lut-int8 low-bit sparse-lut": lambda: weighted(lambda: palette(16)),
    "state-two state-many state-dims state-dtype state-opset state-transpose": one_state,
    "depthwise": lambda: build(lambda x: mb.conv(x=x, weight=half(64, 1, 1, 3), groups=64, pad_type="same")),
    "dynamic-index int-ops": lambda: build(
        lambda x: mb.slice_by_index(x=x, begin=[0, 0, 0, 0], end=[1, 32, 1, 64])
    ),
    "fp16-square rms-norm": lambda: build(lambda x: mb.layer_norm(x=x, axes=[1], epsilon=np.float16(1e-5))),
    "linear": lambda: build(lambda x: mb.matmul(x=x, y=x, transpose_y=True)),
    "vocab-uint16 index-width": lambda: build(
        lambda ids: mb.gather(x=half(65_536, 32), indices=ids, axis=0), tensor((1, 32), types.uint16)
    ),
    "fp16-square": torch_rms_norm,
    "enumerated-limit dynamic-range": enumerated,
}  # fmt: skip
