# ruff: noqa: E501 (a case is one line)
"""The ONNX frontend against onnxruntime: every lowering is converted, written and run by distill.mil.

A case is "opset: inputs -> outputs <constants> { nodes }" in ONNX's textual syntax; inputs are drawn by type.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections import Counter
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest

from distill import mil
from distill.convert import onnx as frontend
from distill.convert import onnx_graph
from distill.convert.onnx import convert, lower, mil_name, read
from distill.convert.onnx_ops import TABLE, lowers
from distill.errors import InputError, UnsupportedOpError

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


def graph(text: str, opset: int = 18) -> onnx.ModelProto:
    header = f'<ir_version: 9, opset_import: ["" : {opset}, "other" : 1]>'
    model = onnx.parser.parse_model(f"{header} agraph {text}")
    loose = onnx.ModelProto()
    loose.CopyFrom(model)
    for output in loose.graph.output:  # the syntax has no "of any shape": `float y` says rank 0
        output.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(loose)
    for output, found in zip(model.graph.output, inferred.graph.output):
        if found.type.tensor_type.HasField("shape"):
            output.CopyFrom(found)
    return model


def draw(model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feeds = {}
    given = {t.name for t in model.graph.initializer}
    for value in model.graph.input:
        if value.name in given:
            continue
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if kind.kind == "f":
            feeds[value.name] = rng.normal(size=shape).astype(kind)
        elif kind.kind == "b":
            feeds[value.name] = rng.integers(0, 2, shape).astype(bool)
        else:
            feeds[value.name] = rng.integers(-2, 2, shape).astype(kind)
    return feeds


def reference(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(model.SerializeToString(), options)
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds)))


def as_core_ml(array: np.ndarray) -> np.ndarray:
    """What Core ML's interface can carry: no rank 0, no bool, no int64."""
    array = array.astype(np.int32) if array.dtype.kind in "biu" else array
    return array.reshape(array.shape or (1,))


def execute(
    model: onnx.ModelProto, feeds: dict[str, np.ndarray], folder: Path, precision: str = "fp32"
) -> dict[str, np.ndarray]:
    path, package = folder / "case.onnx", folder / "case.mlpackage"
    onnx.save(model, path)
    convert(path, compute_precision=precision).save(str(package))
    program = mil.load(package)
    inputs = {mil_name(name): as_core_ml(array) for name, array in feeds.items()}
    policy = "fp32" if precision == "fp32" else "ieee16"
    outputs = program.predict(inputs, policy=policy)
    return {o.name: outputs[mil_name(o.name)] for o in model.graph.output}


def assert_same(model: onnx.ModelProto, folder: Path, atol: float = 1e-5) -> None:
    feeds = draw(model)
    expected, got = reference(model, feeds), execute(model, feeds, folder)
    for name, array in expected.items():
        assert got[name].shape in (array.shape, array.shape or (1,)), name
        want = np.asarray(array, np.float64).reshape(got[name].shape)
        np.testing.assert_allclose(got[name], want, atol=atol, rtol=1e-5, err_msg=name)


UNARY = [
    "Abs",
    "Atan",
    "Ceil",
    "Cos",
    "Erf",
    "Exp",
    "Floor",
    "Neg",
    "Relu",
    "Round",
    "Sigmoid",
    "Sign",
    "Sin",
]
UNARY += ["Softplus", "Tan", "Tanh", "Elu", "LeakyRelu", "HardSigmoid", "Identity", "Dropout", "Reciprocal"]
X = "(float[2,3,4] x)"


def one(node: str, inputs: str = X, consts: str = "", out: str = "float y") -> str:
    return f"{inputs} => ({out}) {f'<{consts}>' if consts else ''} {{ {node} }}"


def many(nodes: dict[str, str], inputs: str = X, consts: str = "", kind: str = "float") -> str:
    """One graph with an output for each node."""
    text = " ".join(f"{name} = {node}" for name, node in nodes.items())
    return one(text, inputs, consts, ", ".join(f"{kind} {name}" for name in nodes))


REDUCED = ["ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceProd", "ReduceL1", "ReduceSumSquare"]
COMPARED = ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]

CASES: dict[str, tuple[int, str]] = {
    "unary": (18, many({f"y{op}": f"{op}(x)" for op in UNARY})),
    "arithmetic-broadcast": (
        18,
        many(
            {f"y{op}": f"{op}(x, z)" for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum")},
            "(float[2,3,4] x, float[3,1] z)",
        ),
    ),
    "comparisons-float": (
        18,
        many({f"y{op}": f"{op}(x, z)" for op in COMPARED}, "(float[2,3,4] x, float[4] z)", kind="bool"),
    ),
    "comparisons-int": (
        18,
        many({f"y{op}": f"{op}(x, z)" for op in COMPARED}, "(int64[2,3,4] x, int64[4] z)", kind="bool"),
    ),
    "logical": (
        18,
        many({f"y{op}": f"{op}(x, z)" for op in ("And", "Or", "Xor")}, "(bool[2,3] x, bool[3] z)", kind="bool"),
    ),
    "reductions-attribute-axes": (
        13,
        many(
            {f"y{op}": f"{op} <axes = [-1]> (x)" for op in REDUCED}
            | {f"z{op}": f"{op} <axes = [0, 2], keepdims = 0> (x)" for op in REDUCED}
            | {f"a{op}": f"{op}(x)" for op in REDUCED}
        ),
    ),
    "reductions-input-axes": (
        18,
        many(
            {f"y{op}": f"{op} <keepdims = 0> (x, a)" for op in [*REDUCED, "ReduceSum"]}
            | {f"z{op}": f"{op}(x, a)" for op in [*REDUCED, "ReduceSum"]},
            consts="int64[2] a = {-1, 0}",
        ),
    ),
}
CASES |= {
    "Sqrt": (18, one("p = Abs(x) y = Sqrt(p)")),
    "Log": (18, one("p = Abs(x) y = Log(p)")),
    "rsqrt": (18, one("p = Abs(x) q = Sqrt(p) y = Reciprocal(q)")),
    "one-over-sqrt": (18, one("p = Abs(x) q = Sqrt(p) y = Div(one, q)", consts="float one = {1}")),
    "Not": (18, one("y = Not(x)", "(bool[2,3] x)", out="bool y")),
    "Equal-bool": (19, one("y = Equal(x, z)", "(bool[2,3] x, bool[3] z)", out="bool y")),
    "IsNaN": (18, one("q = Sqrt(x) y = IsNaN(q)", out="bool y")),
    "Div-int-truncates": (18, one("y = Div(x, d)", "(int64[5,7] x)", "int64[7] d = {-3,-2,-1,1,2,3,4}", "int64 y")),
    "Mod-int": (18, one("y = Mod(x, d)", "(int64[5,4] x)", "int64[4] d = {-3,-2,2,3}", "int64 y")),
    "Mod-fmod": (18, one("y = Mod <fmod = 1> (x, d)", X, "float[4] d = {-0.3, 0.7, 0.2, -1.1}")),
    "Pow-2": (18, one("y = Pow(x, e)", consts="float e = {2}")),
    "Pow-int-exponent": (18, one("y = Pow(x, e)", consts="int64 e = {3}")),
    "Pow-half": (18, one("p = Abs(x) y = Pow(p, e)", consts="float e = {0.5}")),
    "Pow-var": (18, one("p = Abs(x) y = Pow(p, e)", "(float[2,3] x, float[2,3] e)")),
    "Max-int-three": (18, one("y = Max(x, z, w)", "(int64[4] x, int64[4] z, int64[4] w)", out="int64 y")),
    "Clip": (18, one("y = Clip(x, l, h)", consts="float l = {-0.5}, float h = {0.25}")),
    "Clip-upper": (18, one("y = Clip(x, , h)", consts="float h = {0.25}")),
    "Clip-int": (18, one("y = Clip(x, l)", "(int64[6] x)", "int64 l = {0}", "int64 y")),
    "Where-wide-condition": (18, one("y = Where(c, x, z)", "(bool[2,3,1] c, float[4] x, float z)")),
    "Where-const": (18, one("y = Where(c, x, z)", "(bool[2,3,4] c, float[3,1] x)", "float z = {-7}")),
    "Gelu": (20, one("y = Gelu(x)")),
    "Gelu-tanh": (20, one('y = Gelu <approximate = "tanh"> (x)')),
    "Cast-float-int": (18, one("s = Mul(x, k) y = Cast <to = 7> (s)", X, "float k = {3.3}", "int64 y")),
    "Cast-bool-float": (18, one("y = Cast <to = 1> (x)", "(bool[2,3] x)")),
    "Cast-int-bool": (18, one("y = Cast <to = 9> (x)", "(int64[2,3] x)", out="bool y")),
    "Cast-double": (18, one("d = Cast <to = 11> (x) e = Add(d, d) y = Cast <to = 1> (e)")),
    "CastLike": (18, one("y = CastLike(x, z)", "(int64[2,3] x, float[1] z)")),
    "Reshape-copy-infer": (18, one("y = Reshape(x, s)", consts="int64[3] s = {0, -1, 2}")),
    "Reshape-allowzero": (18, one("y = Reshape <allowzero = 1> (x, s)", consts="int64[2] s = {6, 4}")),
    "Reshape-dynamic-chain": (
        18,
        one(
            "s = Shape(x) b = Gather(s, i) bb = Unsqueeze(b, z) t = Concat <axis = 0> (bb, m) y = Reshape(x, t)",
            consts="int64 i = {0}, int64[1] z = {0}, int64[1] m = {-1}",
        ),
    ),
    "Flatten": (18, one("y = Flatten <axis = 2> (x)")),
    "Flatten-negative": (18, one("y = Flatten <axis = -1> (x)")),
    "Transpose": (18, one("y = Transpose(x)")),
    "Transpose-perm": (18, one("y = Transpose <perm = [1, 0, 2]> (x)")),
    "Squeeze": (18, one("y = Squeeze(x)", "(float[2,1,3,1] x)")),
    "Squeeze-axes": (18, one("y = Squeeze(x, a)", "(float[2,1,3,1] x)", "int64[1] a = {-1}")),
    "Squeeze-to-scalar": (18, one("y = Squeeze(x)", "(float[1,1] x)")),
    "Unsqueeze": (18, one("y = Unsqueeze(x, a)", consts="int64[2] a = {-1, 0}")),
    "Concat": (18, one("y = Concat <axis = -2> (x, z, k)", "(float[2,3] x, float[1,3] z)", "float[1,3] k = {1,2,3}")),
    "Split-sizes": (18, one("y, z = Split <axis = -1> (x, s)", X, "int64[2] s = {1, 3}", "float y, float z")),
    "Split-num": (18, one("y, z = Split <axis = 1, num_outputs = 2> (x)", X, out="float y, float z")),
    "Split-equal-13": (13, one("y, z = Split <axis = 0> (x)", X, out="float y, float z")),
    "Slice": (18, one("y = Slice(x, b, e, a)", consts="int64[2] b = {1,-3}, int64[2] e = {9223372036854775807,-1}, int64[2] a = {1,-1}")),
    "Slice-steps": (18, one("y = Slice(x, b, e, a, s)", consts="int64[1] b = {-1}, int64[1] e = {-9223372036854775807}, int64[1] a = {2}, int64[1] s = {-2}")),
    "Slice-default-axes": (18, one("y = Slice(x, b, e)", consts="int64[2] b = {0,1}, int64[2] e = {1,9}")),
    "Expand": (18, one("y = Expand(x, s)", "(float[3,1] x)", "int64[4] s = {2,1,1,4}")),
    "Expand-bool": (18, one("y = Expand(x, s)", "(bool[3,1] x)", "int64[3] s = {2,1,4}", "bool y")),
    "Expand-scalar": (18, one("y = Expand(x, s)", "(float x)", "int64[2] s = {2,3}")),
    "Tile": (18, one("y = Tile(x, s)", consts="int64[3] s = {2,1,3}")),
    "Shape-and-Size": (18, one("s = Shape <start = 1> (x) n = Size(x) m = Mul(s, n) f = Cast <to = 1> (m) y = Mul(g, f)", "(float[2,3,2] x, float[2] g)")),
    "ConstantOfShape": (18, one("c = ConstantOfShape <value = float[1] {2.5}> (s) y = Add(x, c)", "(float[2,3] x)", "int64[2] s = {2,3}")),
    "Range": (18, one("r = Range(a, b, d) f = Cast <to = 1> (r) y = Add(x, f)", X, "int64 a = {1}, int64 b = {9}, int64 d = {2}")),
    "Constant-kinds": (18, one("c = Constant <value_float = 2.0> () d = Constant <value_ints = [1,2,3,4]> () e = Cast <to = 1> (d) p = Mul(x, c) y = Add(p, e)")),
    "Trilu": (18, one("y = Trilu(x)")),
    "Trilu-lower-k": (18, one("y = Trilu <upper = 0> (x, k)", consts="int64 k = {-1}")),
    "Trilu-bool": (18, one("y = Trilu <upper = 0> (x, k)", "(bool[3,3] x)", "int64 k = {1}", "bool y")),
    "ReduceSum-all-13": (13, one("y = ReduceSum <keepdims = 0> (x)")),
    "ReduceSum-int": (13, one("y = ReduceSum(x, a)", "(int64[3,4] x)", "int64[1] a = {-1}", "int64 y")),
    "ReduceLogSumExp": (18, one("y = ReduceLogSumExp(x, a)", consts="int64[1] a = {1}")),
    "CumSum": (18, one("y = CumSum(x, a)", consts="int64 a = {-1}")),
    "CumSum-exclusive-reverse": (18, one("y = CumSum <exclusive = 1, reverse = 1> (x, a)", consts="int64 a = {1}")),
    "ArgMax": (18, one("y = ArgMax <axis = -1, keepdims = 0> (x)", out="int64 y")),
    "ArgMin": (18, one("y = ArgMin <axis = 1> (x)", out="int64 y")),
    "TopK": (18, one("y, i = TopK(x, k)", X, "int64[1] k = {2}", "float y, int64 i")),
    "TopK-smallest": (18, one("y, i = TopK <axis = 1, largest = 0> (x, k)", X, "int64[1] k = {2}", "float y, int64 i")),
    "Softmax": (18, one("y = Softmax(x)")),
    "Softmax-axis": (13, one("y = Softmax <axis = 0> (x)")),
    "LogSoftmax": (18, one("y = LogSoftmax <axis = -2> (x)")),
    "LayerNorm": (18, one("y = LayerNormalization(x, g, b)", X, "float[4] g = {1,2,3,4}, float[4] b = {4,3,2,1}")),
    "LayerNorm-two-axes": (18, one("y = LayerNormalization <axis = -2, epsilon = 0.1> (x, g)", "(float[2,3,2] x)", "float[3,2] g = {1,2,3,4,5,6}")),
    "LayerNorm-input-scale": (18, one("y = LayerNormalization(x, g)", "(float[2,3,4] x, float[4] g)")),
    "RMSNorm": (23, one("y = RMSNormalization(x, g)", X, "float[4] g = {1,2,3,4}")),
    "RMSNorm-two-axes": (23, one("y = RMSNormalization <axis = -2, epsilon = 0.5> (x, g)", "(float[2,3,2] x)", "float[3,2] g = {1,2,3,4,5,6}")),
    "SimplifiedLayerNorm": (18, one("y = SimplifiedLayerNormalization <axis = -1, epsilon = 0.01> (x, g)", X, "float[4] g = {1,2,3,4}", "float[2,3,4] y")),
    "Swish": (24, one("y = Swish <alpha = 1.5> (x)")),
    "MatMul-weight": (18, one("y = MatMul(x, w)", X, "float[4,2] w = {1,2,3,4,5,6,7,8}")),
    "MatMul-weight-left": (18, one("y = MatMul(w, x)", "(float[4,2] x)", "float[2,4] w = {1,2,3,4,5,6,7,8}")),
    "MatMul-rank4-weight": (18, one("y = MatMul(x, w)", "(float[1,2,3,4] x)", "float[4,2] w = {1,2,3,4,5,6,7,8}")),
    "MatMul-batched": (18, one("y = MatMul(x, z)", "(float[2,1,3,4] x, float[5,4,2] z)")),
    "MatMul-vector-right": (18, one("y = MatMul(x, z)", "(float[2,3,4] x, float[4] z)")),
    "MatMul-vector-left": (18, one("y = MatMul(x, z)", "(float[4] x, float[2,4,3] z)")),
    "MatMul-vectors": (18, one("y = MatMul(x, z)", "(float[4] x, float[4] z)")),
    "Gemm": (18, one("y = Gemm(x, w, b)", "(float[3,2] x)", "float[2,2] w = {1,2,3,4}, float[2] b = {5,6}")),
    "Gemm-transB": (18, one("y = Gemm <transB = 1> (x, w)", "(float[3,2] x)", "float[4,2] w = {1,2,3,4,5,6,7,8}")),
    "Gemm-all": (18, one("y = Gemm <transA = 1, transB = 1, alpha = 0.5, beta = 2.0> (x, z, c)", "(float[2,3] x, float[4,2] z, float[3,1] c)")),
    "Conv-1x1": (18, one("y = Conv(x, w, b)", "(float[1,2,1,5] x)", "float[3,2,1,1] w = {1,2,3,4,5,6}, float[3] b = {1,2,3}")),
    "Conv-padded-strided": (18, one("y = Conv <pads = [1, 0, 2, 1], strides = [2, 1], kernel_shape = [3, 2]> (x, w)", "(float[1,1,5,6] x)", "float[1,1,3,2] w = {1,2,3,4,5,6}")),
    "Conv-causal-depthwise": (18, one("y = Conv <pads = [2, 0], group = 2> (x, w)", "(float[1,2,6] x)", "float[2,1,3] w = {1,2,3,4,5,6}")),
    "Conv-same-strided": (18, one('y = Conv <auto_pad = "SAME_LOWER", strides = [2]> (x, w)', "(float[1,1,7] x)", "float[1,1,3] w = {1,2,3}")),
    "Pad": (18, one("y = Pad(x, p, v)", X, "int64[6] p = {0,1,0,2,0,1}, float v = {9}")),
    "Pad-axes": (18, one("y = Pad(x, p, , a)", X, "int64[2] p = {1,0}, int64[1] a = {-1}")),
    "Gather-runtime-negative": (18, one("y = Gather(w, i)", "(int64[2,3] i)", "float[4,2] w = {1,2,3,4,5,6,7,8}")),
    "Gather-scalar": (18, one("y = Gather <axis = 1> (x, i)", X, "int64 i = {-1}")),
    "Gather-many": (18, one("y = Gather <axis = -1> (x, i)", X, "int64[2,2] i = {0,1,-2,3}")),
    "Gather-bool": (18, one("y = Gather(x, i)", "(bool[4,2] x, int64[3] i)", out="bool y")),
    "GatherElements": (18, one("y = GatherElements <axis = 1> (x, i)", "(float[2,3] x, int64[2,5] i)")),
    "GatherElements-shorter": (18, one("y = GatherElements <axis = -1> (x, i)", "(float[4,3] x, int64[2,2] i)")),
    "GatherND": (18, one("y = GatherND(x, i)", "(float[3,2,4] x, int64[5,2] i)")),
    "GatherND-batch": (18, one("y = GatherND <batch_dims = 1> (x, i)", "(float[2,3,2] x)", "int64[2,1] i = {-1,2}")),
    "ScatterND": (18, one("y = ScatterND(x, i, u)", "(float[4,3] x, float[2,3] u)", "int64[2,1] i = {1,-1}")),
    "ScatterND-add": (18, one('y = ScatterND <reduction = "add"> (x, i, u)', "(float[4,3] x, float[3] u)", "int64[3,2] i = {1,0,1,0,-1,2}")),
    "ScatterND-runtime": (18, one("y = ScatterND(x, i, u)", "(float[4,3] x, int64[1,1] i, float[1,3] u)")),
    "ScatterElements": (18, one("y = ScatterElements <axis = 1> (x, i, u)", "(float[2,4] x, float[2,2] u)", "int64[2,2] i = {0,-1,2,1}")),
    "standard-function-body": (18, one("y = Mish(x)")),
    "shared-output": (18, one("y = Identity(x) z = Identity(x)", out="float y, float z")),
    "constant-output": (18, one("y = Neg(x) z = Identity(k)", X, "float[2] k = {1,2}", "float y, float z")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_core_ml_computes_what_onnxruntime_computes(case: str, tmp_path: Path) -> None:
    opset, text = CASES[case]
    assert_same(graph(text, opset), tmp_path)


def test_every_lowering_has_a_case() -> None:
    used = {n.op_type for opset, text in CASES.values() for n in graph(text, opset).graph.node}
    assert TABLE.keys() - used == {"QuickGelu"}


# --- names, interface, structure -------------------------------------------------------------------------


def operators(program: ct.converters.mil.Program) -> Counter[str]:
    return Counter(op.op_type for op in program.functions["main"].operations if op.op_type != "const")


def test_values_keep_their_onnx_names_in_the_package(tmp_path: Path) -> None:
    text = """(int64[1,4] ids) => (float[1,4] add_0) <float[5,3] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}>
        { h = Gather(w, ids) k = Softplus(h) s = Softplus(k) add_0 = ReduceSum <keepdims = 0> (s, a) }"""
    model = graph(text.replace("<float", "<int64[1] a = {-1}, float"))
    model.graph.node[1].output[0] = model.graph.node[2].input[0] = "/blocks.0/soft:plus"
    package = tmp_path / "names.mlpackage"
    onnx.save(model, tmp_path / "names.onnx")
    convert(tmp_path / "names.onnx", compute_precision="fp32").save(str(package))
    seen = {name for step in mil.load(package).trace({"ids": np.zeros((1, 4), np.int32)}) for name in step.outputs}
    assert {"h", mil_name("/blocks.0/soft:plus"), "s", "add_0"} <= seen


def test_an_onnx_name_that_looks_like_one_of_coremltools_own_survives() -> None:
    """The pass that guards gather makes values called add_0, greater_equal_0 and select_0."""
    model = graph("(int64[2] i, float[4,2] select_0) => (float y) { add_0 = Gather(select_0, i) y = Neg(add_0) }")
    program = lower(model)
    frontend._reserve_names(program)
    converted = ct.convert(
        program,
        convert_to="milinternal",
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS18,
    )
    names = {out.name: op.op_type for op in converted.functions["main"].operations for out in op.outputs}
    assert names["add_0"] == "gather"


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # in a pass of coremltools
def test_the_interface_is_the_graphs_with_int32_for_int64_and_bool(tmp_path: Path) -> None:
    text = "(int64[1,2] ids, bool[2] m, float s, float16[2] h) => (int64 y, bool z, float16 k) "
    model = graph(text + "{ f = Cast <to = 7> (s) y = Add(ids, f) z = Not(m) k = Neg(h) }")
    onnx.save(model, tmp_path / "a.onnx")
    spec = convert(tmp_path / "a.onnx").get_spec().description
    array = ct.proto.FeatureTypes_pb2.ArrayFeatureType
    types = {f.name: f.type.multiArrayType.dataType for f in (*spec.input, *spec.output)}
    assert types == {
        "ids": array.INT32,
        "m": array.INT32,
        "s": array.FLOAT32,
        "h": array.FLOAT16,
        "y": array.INT32,
        "z": array.INT32,
        "k": array.FLOAT16,
    }
    feeds = draw(model)
    expected, got = reference(model, feeds), execute(model, feeds, tmp_path)
    assert all(np.array_equal(got[name].astype(np.float32), expected[name].astype(np.float32)) for name in got)


def test_one_weight_used_twice_is_one_const() -> None:
    weight = "<float[3,3] w = {1,2,3,4,5,6,7,8,9}>"
    program = lower(graph(f"(float[2,3] x) => (float y) {weight} {{ a = MatMul(x, w) y = MatMul(a, w) }}"))
    consts = [op for op in program.functions["main"].operations if op.op_type == "const" and op.val.val is not None]
    assert sum(np.size(op.val.val) == 9 for op in consts) == 1


@pytest.mark.parametrize("case", ["RMSNorm", "RMSNorm-two-axes", "SimplifiedLayerNorm"])
def test_rms_norm_is_never_the_faulty_mil_operator(case: str) -> None:
    counts = operators(lower(graph(*CASES[case][::-1])))
    assert counts["layer_norm"] == 1 and "rms_norm" not in counts


DECOMPOSED = "{{ s = Pow(x, two) m = ReduceMean <axes = [-1]> (s) v = Add(m, eps) r = Sqrt(v) {} }}"
CONSTS = "<float two = {2}, float eps = {0.00001}, float one = {1}>"
TAILS = ["q = Reciprocal(r) y = Mul(x, q)", "q = Div(one, r) y = Mul(q, x)", "y = Div(x, r)"]


@pytest.mark.parametrize("tail", TAILS)
def test_a_decomposed_rms_norm_survives_large_activations_in_fp16(tail: str, tmp_path: Path) -> None:
    """Squares of 400 overflow fp16; the [x,-x] form does not square."""
    model = graph(f"(float[2,64] x) => (float y) {CONSTS} {DECOMPOSED.format(tail)}", 17)
    feeds = {"x": (400 * np.random.default_rng(0).normal(size=(2, 64))).astype(np.float32)}
    expected, got = reference(model, feeds)["y"], execute(model, feeds, tmp_path, "fp16")["y"]
    np.testing.assert_allclose(got, expected, atol=5e-3)


def test_a_mask_made_from_the_lowest_float_stays_finite_in_fp16(tmp_path: Path) -> None:
    """(1 - mask) * finfo.min, as transformers writes it: in fp16 the constant is -inf, and 0 * -inf is NaN."""
    text = """(float[1,4] mask, float[3,4] scores) => (float y) <float low = {-3.4028235e38}, float one = {1}>
        { n = Sub(one, mask) m = Mul(n, low) a = Add(scores, m) y = Softmax(a) }"""
    model = graph(text)
    feeds = {"mask": np.float32([[1, 1, 0, 1]]), "scores": np.random.rand(3, 4).astype(np.float32)}
    expected, got = reference(model, feeds)["y"], execute(model, feeds, tmp_path, "fp16")["y"]
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_a_product_that_only_resembles_rms_norm_is_left_alone(tmp_path: Path) -> None:
    text = (
        "{ s = Mul(x, z) m = ReduceMean <axes = [-1]> (s) v = Add(m, eps) r = Sqrt(v) q = Reciprocal(r) y = Mul(x, q) }"
    )
    consts = "<float eps = {9}>"
    assert_same(graph(f"(float[2,4] x, float[2,4] z) => (float y) {consts} {text}", 17), tmp_path)


def test_the_bc1s_rms_norm_of_the_inference_twin_fuses_to_layer_norm(tmp_path: Path) -> None:
    text = """(float[1,4,1,3] x) => (float y) <float two = {2}, float eps = {0.00001}>
        { n = Neg(x) z = Concat <axis = 1> (x, n) m = ReduceMean <axes = [1]> (z) d = Sub(z, m) s = Mul(d, d)
          v = ReduceMean <axes = [1]> (s) e = Add(v, eps) r = Sqrt(e) q = Reciprocal(r) y = Mul(d, q) }"""
    onnx.save(graph(text, 17), tmp_path / "twin.onnx")
    package = convert(tmp_path / "twin.onnx", compute_precision="fp32")
    assert operators(package._mil_program)["layer_norm"] == 1
    assert_same(graph(text, 17), tmp_path)


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "mine" : 1]> agraph (float[2] x) => (float[2] y)
        { y = mine.twice(x) }
        <domain: "mine", opset_import: ["" : 18, "mine" : 1]> twice (a) => (b) { c = mine.neg(a) b = Add(c, c) }
        <domain: "mine", opset_import: ["" : 18]> neg (a) => (b) { b = Neg(a) }"""
    assert_same(onnx.parser.parse_model(text), tmp_path)


# --- a decoder, as torch exports it ----------------------------------------------------------------------


def decoder() -> object:
    import torch
    from torch import nn
    from torch.nn import functional

    class RMSNorm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(width) + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight

    def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    class Decoder(nn.Module):
        """One Llama-like block: RMSNorm, RoPE, GQA, SwiGLU, untied head."""

        def __init__(self, vocab: int = 61, width: int = 32, heads: int = 4, kv: int = 2) -> None:
            super().__init__()
            self.heads, self.kv, self.head_dim = heads, kv, width // heads
            self.embed = nn.Embedding(vocab, width)
            self.norms = nn.ModuleList([RMSNorm(width) for _ in range(3)])
            self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
            self.k, self.v = (nn.Linear(width, kv * self.head_dim, bias=True) for _ in range(2))
            self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
            self.down, self.head = (
                nn.Linear(2 * width, width, bias=False),
                nn.Linear(width, vocab, bias=False),
            )

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            batch, length = ids.shape
            inverse = 10000.0 ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)
            angle = torch.arange(length).float()[:, None] * inverse[None]
            cos, sin = (torch.cat((f, f), -1) for f in (angle.cos(), angle.sin()))
            x = self.embed(ids)
            y = self.norms[0](x)
            q = self.q(y).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
            k, v = (p(y).view(batch, length, self.kv, self.head_dim).transpose(1, 2) for p in (self.k, self.v))
            q, k = rope(q, cos, sin), rope(k, cos, sin)
            k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(attended.transpose(1, 2).reshape(batch, length, -1))
            y = self.norms[1](x)
            x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
            return self.head(self.norms[2](x))

    torch.manual_seed(0)
    return Decoder().eval()


EXPORTS = {
    "dynamo-18": {"dynamo": True, "opset_version": 18},
    "dynamo-23-attention": {"dynamo": True, "opset_version": 23},
    "dynamo-dynamic": {"dynamo": True, "opset_version": 20, "dynamic_shapes": ({1: "length"},)},
    "torchscript": {"dynamo": False, "opset_version": 17},
    "torchscript-dynamic": {
        "dynamo": False,
        "opset_version": 17,
        "dynamic_axes": {"input_ids": {1: "length"}},
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("export", EXPORTS)
def test_a_llama_like_decoder_from_torch_computes_the_same_logits(export: str, tmp_path: Path) -> None:
    import torch

    model, path = decoder(), tmp_path / "decoder.onnx"
    ids = torch.randint(0, 61, (1, 8))
    names = {"input_names": ["input_ids"], "output_names": ["logits"]}
    torch.onnx.export(model, (ids,), str(path), **names, **EXPORTS[export])  # type: ignore[arg-type]
    package = convert(path, compute_precision="fp32", shapes={"input_ids": (1, 8)})
    counts = operators(package._mil_program)
    assert counts["layer_norm"] == 3 and "rms_norm" not in counts and counts["gather"] == 1
    package.save(str(tmp_path / "decoder.mlpackage"))
    program = mil.load(tmp_path / "decoder.mlpackage")
    got = program.predict({"input_ids": ids.numpy().astype(np.int32)}, policy="fp32")["logits"]
    with torch.no_grad():
        np.testing.assert_allclose(got, model(ids).numpy(), atol=1e-5)  # type: ignore[operator]


# --- what cannot be lowered ------------------------------------------------------------------------------


def test_all_unknown_operators_are_named_at_once_with_their_kin(tmp_path: Path) -> None:
    model = graph("(float[2] x) => (float y) { a = Sigmoidd(x) b = other.Thing(a) c = Det(b) y = Neg(c) }")
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(UnsupportedOpError, match=r"odd\.onnx") as caught:
        convert(tmp_path / "odd.onnx")
    assert caught.value.missing == ["Det", "Sigmoidd", "other.Thing"]
    assert "nearest known: Sigmoid" in str(caught.value)


def test_registering_an_operator_twice_raises() -> None:
    with pytest.raises(ValueError, match="MatMul has a lowering already"):
        lowers("MatMul")(lambda n: n.var(0))


REFUSED = {
    "a weight does not fit": ("(int64[1] x) => (int64 y) <int64[1] big = {5000000000}> { y = Add(x, big) }", "'big': 5000000000"),
    "dynamic dimension": ("(float[N,2] x) => (float y) { y = Neg(x) }", r"'x' has dynamic dimensions: 0 \(N\)"),
    "shape at run time": ("(float[4] x, int64[2] s) => (float y) { y = Reshape(x, s) }", "Reshape.*'s' is computed at run time"),
    "no Core ML type": ("(float[4] x) => (uint8 y) { y = Cast <to = 2> (x) }", "no arithmetic in UINT8"),
    "no input": ("() => (float y) { y = Constant <value_float = 1.0> () }", "has no inputs"),
    "absurd constant": (
        "(float[1] x) => (float y) <int64[2] s = {9000000, 9000000}> { c = ConstantOfShape(s) y = Add(x, c) }",
        "absurdly large",
    ),
    "absurd expand": (
        "(float[1] x) => (float y) <float[1] c = {1}, int64[2] s = {9000000, 9000000}> { e = Expand(c, s) y = Add(x, e) }",
        "Expand",
    ),
    "impossible reshape": ("(float[4] x) => (float y) <int64[1] s = {5}> { y = Reshape(x, s) }", "cannot reshape"),
    "broken constants": (
        "(float[2] x) => (float y) <float[2] a = {1,2}, float[3] b = {1,2,3}> { c = Add(a, b) y = Add(x, c) }",
        "Add 'c' cannot be computed",
    ),
    "mismatched product": ("(float[2,3] x, float[2,3] z) => (float y) { y = MatMul(x, z) }", "MatMul 'y'"),
    "empty slice": ("(float[4] x) => (float y) <int64[1] a = {3}> { y = Slice(x, a, a) }", "is empty"),
    "axis outside": ("(float[4] x) => (float y) { y = Softmax <axis = 3> (x) }", "axis 3"),
    "second output": ("(float[4] x) => (float y, bool m) { y, m = Dropout(x) }", "mask output"),
    "training": ("(float[4] x) => (float y) <float r = {0.5}, bool t = {1}> { y = Dropout(x, r, t) }", "eval mode"),
    "cycle": ("(float[4] x) => (float y) { y = Add(x, z) z = Neg(y) }", "topologically sorted"),
    "old opset": ("(float[4] x) => (float y) { y = Neg(x) }", "opset 11"),
    "absurd input": ("(float[1099511627776,1099511627776] x) => (float y) { y = Neg(x) }", "no tensor can have"),
    "string input": ("(string[2] x) => (string y) { y = Identity(x) }", "not a tensor of"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_core_ml_cannot_hold_is_one_line_naming_the_file_and_the_thing(reason: str, tmp_path: Path) -> None:
    text, message = REFUSED[reason]
    onnx.save(graph(text, 11 if reason == "old opset" else 18), tmp_path / "case.onnx")
    with pytest.raises(InputError, match=message) as caught:
        convert(tmp_path / "case.onnx")
    assert str(caught.value).startswith(str(tmp_path / "case.onnx")) and "\n" not in str(caught.value)


@pytest.mark.parametrize("option", [{"compute_precision": "int8"}, {"minimum_deployment_target": "iOS99"}])
def test_an_unknown_option_is_refused_with_the_choices(option: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="choose from"):
        convert(tmp_path / "none.onnx", **option)  # type: ignore[arg-type]


def test_an_older_target_is_honoured(tmp_path: Path) -> None:
    onnx.save(graph("(float[2,3] x) => (float y) { y = Softmax(x) }"), tmp_path / "a.onnx")
    package = convert(tmp_path / "a.onnx", minimum_deployment_target="iOS16")
    assert package.get_spec().specificationVersion == ct.target.iOS16.value


# --- hostile files ---------------------------------------------------------------------------------------

GOOD = "(float[2] x) => (float y) <float[2] w = {1,2}> { y = Add(x, w) }"


@pytest.mark.parametrize("data", [b"", b"\x00" * 100, b"not onnx at all", b"\xff" * 64, b"\x08\x0a"])
def test_garbage_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(data)
    with pytest.raises(InputError, match=r"bad\.onnx: "):
        read(tmp_path / "bad.onnx")


def test_every_truncation_and_every_flipped_byte_is_read_or_refused(tmp_path: Path) -> None:
    data, path = graph(GOOD).SerializeToString(), tmp_path / "bad.onnx"
    damaged = [data[:n] for n in range(len(data))]
    damaged += [data[:n] + bytes([data[n] ^ 0x55]) + data[n + 1 :] for n in range(len(data))]
    refused = 0
    for blob in damaged:
        path.write_bytes(blob)
        try:
            lower(read(path), file=str(path))
        except InputError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert refused > len(damaged) // 2


@pytest.mark.parametrize(
    ("location", "extra", "message"),
    [
        ("../secret.bin", {}, "leaves the folder"),
        ("/etc/passwd", {}, "not a relative path"),
        ("link.bin", {}, "leaves the folder"),
        ("absent.bin", {}, "is missing"),
        ("short.bin", {"length": "80"}, "ends at byte 80"),
        ("short.bin", {"offset": "99"}, "ends at byte 99"),
        ("short.bin", {"length": "-8"}, "not a number"),
        ("short.bin", {"length": "4"}, "needs 8 bytes and has 4"),
        ("", {}, "not a relative path"),
    ],
)
def test_external_data_stays_in_the_folder_and_in_the_file(
    location: str, extra: dict[str, str], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(b"12345678")
    (folder / "short.bin").write_bytes(b"12345678")
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = graph(GOOD)
    weight = model.graph.initializer[0]
    weight.ClearField("float_data")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **extra}.items():
        weight.external_data.add(key=key, value=value)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=message):
        read(folder / "m.onnx")


def test_external_data_in_the_folder_is_read(tmp_path: Path) -> None:
    model, path = graph(GOOD), tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert onnx.numpy_helper.to_array(read(path).graph.initializer[0]).tolist() == [1, 2]


@pytest.mark.parametrize("dims", [[2**40, 2**40], [-3], [1] * 40])
def test_an_absurd_weight_is_refused_before_it_is_made(dims: list[int], tmp_path: Path) -> None:
    model = graph(GOOD)
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(dims)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"m\.onnx: tensor 'w' has the absurd shape"):
        read(tmp_path / "m.onnx")


def test_a_name_that_is_not_text_is_refused(tmp_path: Path) -> None:
    data = graph("(float[2] x) => (float y) { hidden = Neg(x) y = Neg(hidden) }").SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data.replace(b"hidden", b"hid\xa4en"))
    with pytest.raises(InputError, match=r"m\.onnx: .* is not UTF-8 text"):
        read(tmp_path / "m.onnx")


def test_recursive_functions_are_refused(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "mine" : 1]> agraph (float[2] x) => (float[2] y)
        { y = mine.loop(x) }
        <domain: "mine", opset_import: ["" : 18, "mine" : 1]> loop (a) => (b) { b = mine.loop(a) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    with pytest.raises(InputError, match="recursive"):
        read(tmp_path / "m.onnx")


def test_without_the_extra_one_line_names_it_even_beside_a_folder_called_onnx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnx").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.delitem(sys.modules, "onnx")
    onnx_graph._import_onnx.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'distill\[onnx\]'"):
        read(tmp_path / "a.onnx")
