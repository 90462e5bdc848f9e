"""distill.mil: operators against torch and numpy. A family shares one program, an operator is an output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb

from distill.mil.ops.registry import TABLE
from distill.mil.policy import Acc16
from tests.unit import mil_build as b

Case = tuple[Callable[..., Any], Any]
X = b.random((2, 3, 4), 1)
POSITIVE = np.abs(X) + 0.5
IMAGE = b.random((1, 4, 5, 6), 2)
INTS = np.array([7, -7, 3, 0, -2, 5], np.int32)
T = torch.from_numpy


def check(
    tmp_path, inputs: dict[str, np.ndarray], cases: dict[str, Case], precision: str = "fp32", **tolerance
) -> None:
    """Build one program whose outputs are the cases, run it, compare."""
    kinds = {"f": "fp32", "i": "int32", "b": "bool"}
    specs = [b.tensor(v.shape, kinds[v.dtype.kind]) for v in inputs.values()]
    names = ", ".join(inputs)

    def outputs(*arguments):
        given = dict(zip(inputs, arguments, strict=True))
        return tuple(make(name, **given) for name, (make, _) in cases.items())

    body = eval(f"lambda {names}: outputs({names})", {"outputs": outputs})  # the builder reads parameter names
    program = b.load(tmp_path / "m.mlpackage", specs, body, precision)
    results = program.predict(inputs)
    assert results.keys() == cases.keys()
    for name, (_, expected) in cases.items():
        expected = np.asarray(expected)
        assert results[name].shape == expected.shape, name
        np.testing.assert_allclose(results[name], expected, err_msg=name, **{"rtol": 1e-5, "atol": 1e-6, **tolerance})


def unary(op: str, reference: Callable[[torch.Tensor], torch.Tensor], **fixed) -> Case:
    return (lambda name, x: getattr(mb, op)(x=x, name=name, **fixed), reference(T(POSITIVE)).numpy())


def test_unary_operators(tmp_path):
    cases = {
        op: unary(op, getattr(torch, op))
        for op in [
            "abs",
            "atan",
            "ceil",
            "cos",
            "cosh",
            "erf",
            "exp",
            "exp2",
            "floor",
            "round",
            "sign",
            "sin",
            "sinh",
            "sqrt",
            "square",
            "tan",
            "tanh",
        ]
    }
    cases["log"] = unary("log", torch.log, epsilon=0.0)
    cases["rsqrt"] = unary("rsqrt", lambda x: (x + 0.5).rsqrt(), epsilon=0.5)
    cases["inverse"] = unary("inverse", lambda x: 1 / (x + 0.25), epsilon=0.25)
    cases["clip"] = unary("clip", lambda x: x.clamp(0.7, 1.1), alpha=0.7, beta=1.1)
    cases["threshold"] = unary("threshold", lambda x: x.clamp(min=0.9), alpha=0.9)
    check(tmp_path, {"x": POSITIVE}, cases)


def test_activations(tmp_path):
    def case(op: str, reference: Callable[[torch.Tensor], torch.Tensor], **fixed) -> Case:
        return (lambda name, x: getattr(mb, op)(x=x, name=name, **fixed), reference(T(X)).numpy())

    slopes = np.array([0.1, 0.1, 0.1], np.float32)
    cases = {
        "relu": case("relu", torch.relu),
        "relu6": case("relu6", F.relu6),
        "leaky_relu": case("leaky_relu", lambda x: F.leaky_relu(x, 0.2), alpha=0.2),
        "prelu": case("prelu", lambda x: F.prelu(x, T(slopes)), alpha=slopes),
        "elu": case("elu", lambda x: F.elu(x, 0.7), alpha=0.7),
        "exact": case("gelu", F.gelu, mode="EXACT"),
        "tanh_gelu": case("gelu", lambda x: F.gelu(x, approximate="tanh"), mode="TANH_APPROXIMATION"),
        "sigmoid_gelu": case("gelu", lambda x: x * torch.sigmoid(1.702 * x), mode="SIGMOID_APPROXIMATION"),
        "sigmoid": case("sigmoid", torch.sigmoid),
        "hard": case("sigmoid_hard", lambda x: (0.2 * x + 0.5).clamp(0, 1), alpha=0.2, beta=0.5),
        "silu": case("silu", F.silu),
        "softplus": case("softplus", F.softplus),
        "softsign": case("softsign", F.softsign),
        "softmax": case("softmax", lambda x: torch.softmax(x, 1), axis=1),
        "scaled_tanh": case("scaled_tanh", lambda x: 2 * torch.tanh(0.5 * x), alpha=2.0, beta=0.5),
        "clamped": case("clamped_relu", lambda x: F.leaky_relu(x, 0.1).clamp(max=1), alpha=0.1, beta=1.0),
    }
    check(tmp_path, {"x": X}, cases)


def test_binary_operators_broadcast(tmp_path):
    y = b.random((3, 1), 5) + 3
    names = ["add", "sub", "mul", "maximum", "minimum", "floor_div", "mod"]
    references = [np.add, np.subtract, np.multiply, np.maximum, np.minimum, np.floor_divide, np.mod]
    cases: dict[str, Case] = {
        op: (lambda name, x, y, op=op: getattr(mb, op)(x=x, y=y, name=name), f(POSITIVE, y))
        for op, f in zip(names, references, strict=True)
    }
    cases["real_div"] = (lambda name, x, y: mb.real_div(x=x, y=y, name=name), POSITIVE / y)
    cases["pow"] = (lambda name, x, y: mb.pow(x=x, y=y, name=name), POSITIVE**y)
    check(tmp_path, {"x": POSITIVE, "y": y}, cases, rtol=1e-4)


def test_integer_arithmetic_rounds_as_numpy_does(tmp_path):
    cases: dict[str, Case] = {
        "floor_div": (lambda name, x: mb.floor_div(x=x, y=np.int32(2), name=name), INTS // 2),
        "mod": (lambda name, x: mb.mod(x=x, y=np.int32(3), name=name), INTS % 3),
        "square": (lambda name, x: mb.square(x=x, name=name), INTS * INTS),
        "total": (lambda name, x: mb.reduce_sum(x=x, axes=[0], keep_dims=True, name=name), [INTS.sum()]),
        "running": (
            lambda name, x: mb.cumsum(x=x, axis=0, exclusive=True, name=name),
            np.cumsum(INTS) - INTS,
        ),
    }
    check(tmp_path, {"x": INTS}, cases)


def test_comparisons_logic_and_select(tmp_path):
    y = np.roll(INTS, 1)
    pairs = {"equal": np.equal, "not_equal": np.not_equal, "less": np.less, "greater_equal": np.greater_equal}

    def chosen(op: str) -> Callable[..., Any]:
        return lambda name, x, y: mb.select(cond=getattr(mb, op)(x=x, y=y), a=x, b=y, name=name)

    cases: dict[str, Case] = {op: (chosen(op), np.where(f(INTS, y), INTS, y)) for op, f in pairs.items()}
    for op, reference in (("logical_and", np.logical_and), ("logical_xor", np.logical_xor)):
        cases[op] = (
            lambda name, x, y, op=op: mb.cast(
                x=getattr(mb, op)(x=mb.greater(x=x, y=np.int32(0)), y=mb.greater(x=y, y=np.int32(0))),
                dtype="int32",
                name=name,
            ),
            reference(INTS > 0, y > 0).astype(int),
        )
    check(tmp_path, {"x": INTS, "y": y}, cases)


def test_reductions(tmp_path):
    def case(op: str, expected: Any, **fixed) -> Case:
        return (lambda name, x: getattr(mb, op)(x=x, name=name, **fixed), expected)

    p = POSITIVE
    cases = {
        "sum": case("reduce_sum", p.sum((0, 2)), axes=[0, -1]),
        "mean": case("reduce_mean", p.mean(1, keepdims=True), axes=[1], keep_dims=True),
        "max": case("reduce_max", p.max(2), axes=[2]),
        "min": case("reduce_min", p.min((0, 1)), axes=[0, 1]),
        "prod": case("reduce_prod", p.prod(1), axes=[1]),
        "l1": case("reduce_l1_norm", np.abs(p).sum(2), axes=[2]),
        "l2": case("reduce_l2_norm", np.sqrt((p * p).sum(2)), axes=[2]),
        "squares": case("reduce_sum_square", (p * p).sum(2), axes=[2]),
        "log_sum": case("reduce_log_sum", np.log(p.sum(2)), axes=[2]),
        "log_sum_exp": case("reduce_log_sum_exp", np.log(np.exp(p).sum(2)), axes=[2]),
        "argmax": case("reduce_argmax", p.argmax(1), axis=1),
        "argmin": case("reduce_argmin", p.argmin(-1)[..., None], axis=-1, keep_dims=True),
    }
    check(tmp_path, {"x": p}, cases)


def test_shapes_and_slices(tmp_path):
    def case(op: str, expected: Any, **fixed) -> Case:
        return (lambda name, x: getattr(mb, op)(x=x, name=name, **fixed), expected)

    cases = {
        "reshape": case("reshape", X.reshape(2, 12), shape=[2, -1]),
        "zero": case("reshape", X.reshape(2, 4, 3), shape=[0, -1, 3]),
        "transpose": case("transpose", X.transpose(2, 0, 1), perm=[-1, 0, 1]),
        "expand": case("expand_dims", X[:, None, :, :, None], axes=[1, -1]),
        "slice": case(
            "slice_by_index",
            X[1:, :, 0:4:2],
            begin=[1, 0, 0],
            end=[2, 0, 4],
            stride=[1, 1, 2],
            end_mask=[False, True, False],
        ),
        "back": case(
            "slice_by_index",
            X[:, ::-1, :],
            begin=[0, -1, 0],
            end=[2, 0, 4],
            stride=[1, -1, 1],
            end_mask=[False, True, False],
        ),
        "squeezed": case(
            "slice_by_index", X[1, :, -1], begin=[1, 0, -1], end=[0, 3, 0], squeeze_mask=[True, False, True]
        ),
        "sized": case("slice_by_size", X[:1, 1:, 2:], begin=[0, 1, -2], size=[1, -1, 2]),
        "tile": case("tile", np.tile(X, (1, 2, 3)), reps=[1, 2, 3]),
        "reverse": case("reverse", X[::-1, :, ::-1], axes=[0, 2]),
        "zeros": case(
            "pad", np.pad(X, ((0, 0), (1, 0), (0, 2)), constant_values=3), pad=[1, 0, 0, 2], constant_val=3.0
        ),
        "mirror": case("pad", np.pad(X, ((0, 0), (1, 2), (2, 3)), "reflect"), pad=[1, 2, 2, 3], mode="reflect"),
        "edge": case("pad", np.pad(X, ((0, 0), (1, 2), (2, 4)), "edge"), pad=[1, 2, 2, 4], mode="replicate"),
        "windows": case("sliding_windows", np.stack([X[:, :, i : i + 2] for i in (0, 2)], 2), axis=2, size=2, stride=2),
        "band": case("band_part", np.tril(np.triu(X, -1), 2), lower=1, upper=2),
    }
    check(tmp_path, {"x": X}, cases)


def test_joining_and_parting(tmp_path):
    cases: dict[str, Case] = {
        "concat": (lambda name, x: mb.concat(values=(x, x), axis=-1, name=name), np.concatenate([X, X], -1)),
        "interleaved": (
            lambda name, x: mb.concat(values=(x, mb.mul(x=x, y=2.0)), axis=1, interleave=True, name=name),
            np.stack([X, 2 * X], 2).reshape(2, 6, 4),
        ),
        "stack": (lambda name, x: mb.stack(values=(x, x), axis=-1, name=name), np.stack([X, X], -1)),
        "even": (
            lambda name, x: mb.identity(x=mb.split(x=x, num_splits=2, axis=2)[1], name=name),
            X[:, :, 2:],
        ),
        "uneven": (
            lambda name, x: mb.identity(x=mb.split(x=x, split_sizes=[1, 2], axis=1)[1], name=name),
            X[:, 1:],
        ),
    }
    check(tmp_path, {"x": X}, cases)


def test_gather_family(tmp_path):
    index = np.array([[2, 0], [1, 1]], np.int32)
    along = np.array([[[1, 0, 2, 2]], [[0, 0, 1, 2]]], np.int32)
    nd = np.array([[1, 2], [0, 1]], np.int32)
    batched = np.stack([X[i].take(index[i], 0) for i in range(2)])
    cases: dict[str, Case] = {
        "gather": (lambda name, x, i, a, n: mb.gather(x=x, indices=i, axis=1, name=name), X.take(index, 1)),
        "batched": (
            lambda name, x, i, a, n: mb.gather(x=x, indices=i, axis=1, batch_dims=1, name=name),
            batched,
        ),
        "along": (
            lambda name, x, i, a, n: mb.gather_along_axis(x=x, indices=a, axis=1, name=name),
            np.take_along_axis(X, along, 1),
        ),
        "nd": (lambda name, x, i, a, n: mb.gather_nd(x=x, indices=n, name=name), X[nd[:, 0], nd[:, 1]]),
        "nd_batched": (
            lambda name, x, i, a, n: mb.gather_nd(x=x, indices=n, batch_dims=1, name=name),
            np.stack([X[0, 1, 2], X[1, 0, 1]]),
        ),
    }
    check(tmp_path, {"x": X, "i": index, "a": along, "n": nd}, cases)


def test_scatter_family(tmp_path):
    index = np.array([2, 0], np.int32)
    updates = b.random((2, 2, 4), 3)
    added, put = X.copy(), X.copy()
    added[:, index] += updates
    put[:, index] = updates
    cases: dict[str, Case] = {
        "add": (
            lambda name, x, i, u: mb.scatter(data=x, indices=i, updates=u, axis=1, mode="add", name=name),
            added,
        ),
        "put": (
            lambda name, x, i, u: mb.scatter(data=x, indices=i, updates=u, axis=1, mode="update", name=name),
            put,
        ),
        "slice": (
            lambda name, x, i, u: mb.slice_update(
                x=x, update=u, begin=[0, 2, 0], end=[2, 0, 4], stride=[1, -1, 1], name=name
            ),
            np.concatenate([X[:, :1], updates[:, ::-1]], 1),
        ),
    }
    check(tmp_path, {"x": X, "i": index, "u": updates}, cases)


def test_linear_algebra(tmp_path):
    y, weight, bias = b.random((2, 5, 4), 7), b.random((5, 4), 8), b.random((5,), 9)
    cases: dict[str, Case] = {
        "matmul": (
            lambda name, x, y: mb.matmul(x=x, y=y, transpose_y=True, name=name),
            X @ y.transpose(0, 2, 1),
        ),
        "transposed": (
            lambda name, x, y: mb.matmul(x=x, y=x, transpose_x=True, name=name),
            X.transpose(0, 2, 1) @ X,
        ),
        "linear": (
            lambda name, x, y: mb.linear(x=x, weight=weight, bias=bias, name=name),
            X @ weight.T + bias,
        ),
        "attention": (
            lambda name, x, y: mb.scaled_dot_product_attention(query=x, key=y, value=y, name=name),
            F.scaled_dot_product_attention(T(X), T(y), T(y)).numpy(),
        ),
        "einsum": (
            lambda name, x, y: mb.einsum(
                values=(x, mb.transpose(x=x, perm=[2, 1, 0])), equation="chw,whr->chr", name=name
            ),
            np.einsum("chw,whr->chr", X, X.transpose(2, 1, 0)),
        ),
    }
    check(tmp_path, {"x": X, "y": y}, cases, atol=1e-5)


def test_convolutions(tmp_path):
    def case(shape: tuple[int, ...], reference: Callable[..., torch.Tensor], **fixed) -> Case:
        weight, bias = b.random(shape, 4), b.random(shape[:1], 5)
        expected = reference(T(IMAGE), T(weight), T(bias)).numpy()
        return (lambda name, x: mb.conv(x=x, weight=weight, bias=bias, name=name, **fixed), expected)

    pad = {"pad_type": "custom", "pad": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}
    cases = {
        "pointwise": case((7, 4, 1, 1), F.conv2d, pad_type="valid"),
        "valid": case((7, 4, 3, 2), F.conv2d, pad_type="valid"),
        "grouped": case((8, 2, 3, 3), lambda *a: F.conv2d(*a, groups=2), pad_type="valid", groups=2),
        "same": case((3, 4, 2, 3), lambda *a: F.conv2d(*a, padding="same"), pad_type="same"),
        "custom": case((3, 4, 2, 2), lambda x, w, c: F.conv2d(F.pad(x, (2, 1, 1, 0)), w, c, (2, 1), 0, (1, 2)), **pad),
    }
    check(tmp_path, {"x": IMAGE}, cases, atol=1e-5)


def test_normalisations(tmp_path):
    gamma, beta = np.abs(b.random((4,), 6)) + 0.5, b.random((4,), 7)
    image = T(IMAGE)

    def case(op: str, expected: torch.Tensor, **fixed) -> Case:
        return (lambda name, x: getattr(mb, op)(x=x, name=name, **fixed), expected.numpy())

    moved = F.layer_norm(image.movedim(1, -1), (4,), T(gamma), T(beta), 1e-3).movedim(-1, 1)
    batch = F.batch_norm(image, T(beta), T(gamma), T(gamma), T(beta), eps=1e-3)
    norm = (image * image).sum((1, 2, 3), keepdim=True)
    cases = {
        "layer": case("layer_norm", moved, axes=[1], gamma=gamma, beta=beta, epsilon=1e-3),
        "batch": case("batch_norm", batch, mean=beta, variance=gamma, gamma=gamma, beta=beta, epsilon=1e-3),
        "instance": case("instance_norm", F.instance_norm(image, eps=1e-3), epsilon=1e-3),
        "l2": case("l2_norm", image / (norm + 1e-3).sqrt(), epsilon=1e-3),
        "local": case(
            "local_response_norm",
            F.local_response_norm(image, 3, 0.1, 0.7, 1.5),
            size=3,
            alpha=0.1,
            beta=0.7,
            k=1.5,
        ),
    }
    check(tmp_path, {"x": IMAGE}, cases, atol=1e-5)


def test_tensor_makers_and_searches(tmp_path):
    order = np.argsort(-X, 1, kind="stable")
    cases: dict[str, Case] = {
        "values": (
            lambda name, x, i: mb.identity(x=mb.topk(x=x, k=2, axis=1)[0], name=name),
            -np.sort(-X, 1)[:, :2],
        ),
        "indices": (lambda name, x, i: mb.identity(x=mb.topk(x=x, k=2, axis=1)[1], name=name), order[:, :2]),
        "argsort": (lambda name, x, i: mb.argsort(x=x, axis=1, name=name), order),
        "reversed": (
            lambda name, x, i: mb.cumsum(x=x, axis=2, reverse=True, name=name),
            np.cumsum(X[..., ::-1], -1)[..., ::-1],
        ),
        "one_hot": (
            lambda name, x, i: mb.one_hot(indices=i, one_hot_vector_size=4, axis=0, name=name),
            np.eye(4)[[2, 0]].T,
        ),
        "fill_like": (
            lambda name, x, i: mb.fill_like(ref_tensor=x, value=2.0, name=name),
            np.full(X.shape, 2),
        ),
        "non_zero": (
            lambda name, x, i: mb.non_zero(x=mb.greater(x=x, y=0.0), name=name),
            np.argwhere(X > 0),
        ),
        "range": (
            lambda name, x, i: mb.range_1d(
                start=np.int32(1),
                step=np.int32(2),
                end=mb.add(x=mb.reduce_max(x=i, axes=[0]), y=np.int32(5)),
                name=name,
            ),
            [1, 3, 5],
        ),
    }
    check(tmp_path, {"x": X, "i": np.array([2, 0], np.int32)}, cases)


def test_casts_truncate_towards_zero_and_fp16_overflows(tmp_path):
    x = np.array([1.9, -1.9, 70000.0, 2.0**-25], np.float32)
    with np.errstate(over="ignore"):
        halves = x.astype(np.float16).astype(np.float32)
    cases: dict[str, Case] = {
        "int": (lambda name, x: mb.cast(x=x, dtype="int32", name=name), [1, -1, 70000, 0]),
        "half": (lambda name, x: mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32", name=name), halves),
        "truth": (
            lambda name, x: mb.cast(x=mb.cast(x=x, dtype="bool"), dtype="int32", name=name),
            [1, 1, 1, 1],
        ),
    }
    check(tmp_path, {"x": x}, cases)


def test_acc16_accumulates_block_by_block_in_fp16():
    policy = Acc16()
    x, y = torch.full((1, 4096), 1.0), torch.full((4096, 1), 1.0)
    assert policy.matmul(x, y).item() == 4096
    x[0, 0], y[:, 0] = 32768.0, 0.25  # near 8192 fp16 counts in eights: a block of 32 quarters just fits
    y[0, 0] = 1.0  # near 32768 it counts in 32s: a block of eight is rounded away
    assert policy.matmul(x, y).item() == 32768
    small = torch.rand(3, 100)
    np.testing.assert_allclose(policy.matmul(small, small.T), small @ small.T, rtol=2e-3)
    np.testing.assert_allclose(policy.sum(small, [1], True), small.sum(1, keepdim=True), rtol=2e-3)
    image, weight = torch.rand(1, 64, 5, 5), torch.rand(8, 32, 3, 3)
    expected = F.conv2d(image, weight, groups=2)
    np.testing.assert_allclose(policy.conv(image, weight, [1, 1], [1, 1], 2), expected, rtol=4e-3)


def test_the_table_covers_what_the_decoder_needs():
    needed = """
        abs add cast concat conv expand_dims gather greater_equal identity layer_norm linear matmul mul pow
        read_state real_div reduce_max reduce_mean reduce_sum reshape rsqrt scaled_dot_product_attention
        select silu slice_by_index slice_update softmax split sqrt square squeeze sub tile transpose
        write_state
    """
    assert set(needed.split()) <= TABLE.keys()
