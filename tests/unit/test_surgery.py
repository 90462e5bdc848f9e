# ruff: noqa: E501 (a graph is one line)
"""The ONNX surgery: each rewrite happens, leaves a valid model, and onnxruntime computes what it did before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.convert import surgery
from distill.convert.surgery import SurgeryReport, main, sanitize
from distill.convert.surgery_int32 import int64_to_int32
from distill.errors import InputError

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


def graph(text: str, opset: int = 18) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]> agraph {text}')


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """onnxruntime without its own optimiser, each feed in the type that the model now asks for."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    kinds = {"tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
    typed = {i.name: feeds[i.name].astype(kinds.get(i.type, np.float32)) for i in session.get_inputs()}
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, typed)))


def feeds_of(model: onnx.ModelProto, length: int = 4) -> dict[str, np.ndarray]:
    rng, feeds = np.random.default_rng(0), {}
    for value in model.graph.input:
        shape = [d.dim_value or length for d in value.type.tensor_type.shape.dim]
        feeds[value.name] = rng.integers(0, 3, shape) if is_integer(value) else rng.normal(size=shape)
    return feeds


def is_integer(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)


def apply(text: str, rewrite: Callable[[onnx.ModelProto], object]) -> tuple[onnx.ModelProto, object]:
    """The model after a rewrite that kept it valid and kept its results."""
    model = graph(text)
    feeds = feeds_of(model)
    before = run(model, feeds)
    result = rewrite(model)
    onnx.checker.check_model(model, full_check=True)
    after = run(model, feeds)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
        assert before[name].dtype == after[name].dtype
    return model, result


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


# --- the rewrites, one by one ----------------------------------------------------------------------------


def test_constant_subgraphs_become_initialisers() -> None:
    text = """(float[2] x) => (float[2] y) <float[2] w = {3,4}>
        { c = Constant <value_float = 2.0> () d = Mul(w, c) e = Sqrt(d) y = Add(x, e) }"""
    model, names = apply(text, surgery.fold_constants)
    assert ops(model) == ["Add"] and names == ["c", "d", "e"]


def test_the_shape_of_a_static_tensor_is_a_constant() -> None:
    text = """(float[2,3] x) => (float[3,2] y) <int64 one = {1}, int64[1] z = {0}, int64[1] m = {-1}>
        { h = Neg(x) s = Shape(h) d = Gather(s, one) u = Unsqueeze(d, z) t = Concat <axis = 0> (u, m)
          y = Reshape(h, t) }"""
    model, _ = apply(text, sanitize)
    assert ops(model) == ["Neg", "Reshape"]


def test_a_constant_too_large_for_the_file_is_left_to_be_computed() -> None:
    text = """(float[1] x) => (float[2000000] y) <int64[1] s = {2000000}>
        { c = ConstantOfShape <value = float[1] {0.5}> (s) y = Add(x, c) }"""
    assert apply(text, surgery.fold_constants)[1] == []


def test_a_constant_that_is_a_graph_output_keeps_its_node() -> None:
    text = "(float[1] x) => (float[1] y, float c) { c = Constant <value_float = 2.0> () y = Mul(x, c) }"
    assert ops(apply(text, sanitize)[0]) == ["Constant", "Mul"]


def test_ids_become_int32_with_their_lookup() -> None:
    text = "(int64[1,4] ids) => (float[1,4,2] y) <float[3,2] w = {1,2,3,4,5,6}> { y = Gather(w, ids) }"
    model, names = apply(text, int64_to_int32)
    assert names == ["ids"] and ops(model) == ["Gather"]
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT32


def test_ids_that_feed_arithmetic_become_int32_behind_a_cast() -> None:
    """ids * 2^40 would overflow int32: only the interface changes."""
    text = "(int64[4] ids) => (int64[4] y) <int64 k = {1099511627776}> { y = Mul(ids, k) }"
    model, _ = apply(text, sanitize)
    assert ops(model) == ["Cast", "Mul"]
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT32


def test_moved_and_compared_integers_become_int32_with_their_constants() -> None:
    text = """(int64[1,4] ids, float[4,1] x) => (float[4,1] y) <int64[2] s = {4,1}, int64 pad = {0}>
        { r = Reshape(ids, s) e = Equal(r, pad) z = Where(e, x, x) y = Neg(z) }"""
    model, names = apply(text, sanitize)
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert kinds == {"s": onnx.TensorProto.INT64, "pad": onnx.TensorProto.INT32}
    assert set(names.changed["int64_to_int32"]) == {"ids", "r", "pad"}  # type: ignore[attr-defined]


def test_a_widening_cast_narrows_and_a_rounding_one_does_not() -> None:
    text = """(float[4] x, float[3] t) => (float[4] y, float[4] z)
        { b = Greater(x, x) i = Cast <to = 7> (b) y = Gather(t, i) j = Cast <to = 7> (x) k = Sub(j, j)
          z = Gather(t, k) }"""
    model, _ = apply(text, sanitize)
    casts = {n.output[0]: n.attribute[0].i for n in model.graph.node if n.op_type == "Cast"}
    assert casts == {"i": onnx.TensorProto.INT32, "j": onnx.TensorProto.INT64}


@pytest.mark.parametrize(
    "text",
    [
        "(int64[2,3] ids) => (int64[3,2] y) { y = Transpose(ids) }",
        "(float[2,3] x) => (bool[2,1] y) <int64 k = {1}> { a = ArgMax <axis = 1> (x) y = Equal(a, k) }",
        "(int64[1] n, float[4] x) => (float[1,4] y) { y = Unsqueeze(x, n) }",
    ],
)
def test_what_must_be_int64_stays_so(text: str) -> None:
    """A graph output, what an operator makes as int64, and what it needs as int64."""
    model = graph(text)
    feeds = {name: array * 0 if name == "n" else array for name, array in feeds_of(model).items()}
    before, report = run(model, feeds), sanitize(model)
    onnx.checker.check_model(model, full_check=True)
    after = run(model, feeds)
    assert set(report.changed["int64_to_int32"]) <= {"ids", "n"}
    np.testing.assert_array_equal(before["y"], after["y"])
    assert before["y"].dtype == after["y"].dtype


def test_constants_that_do_not_fit_stay_int64() -> None:
    text = """(int64[2] ids) => (bool[2] y) <int64 big = {5000000000}> { i = Identity(ids) y = Equal(i, big) }"""
    model, _ = apply(text, sanitize)
    assert model.graph.initializer[0].data_type == onnx.TensorProto.INT64 and "Cast" in ops(model)


@pytest.mark.parametrize("shapes", [{"ids": (2, 5)}, {"batch": (2,), "length": (5,)}])
def test_named_dimensions_are_fixed_by_input_or_by_name(shapes: dict[str, tuple[int, ...]]) -> None:
    text = "(int64[batch,length] ids, float[length] m) => (float[batch,length] y) { f = Cast <to = 1> (ids) y = Add(f, m) }"
    model = graph(text)
    before = run(model, {"ids": np.ones((2, 5)), "m": np.arange(5)})
    assert surgery.static_shapes(model, shapes) == ["ids", "m"]
    dims = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.output)]
    assert dims == [[2, 5], [5], [2, 5]]
    np.testing.assert_array_equal(before["y"], run(model, {"ids": np.ones((2, 5)), "m": np.arange(5)})["y"])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"idz": (1, 2)}, "no input or dimension 'idz' to shape; there are: N, m, x"),
        ({"x": (1, 2, 3)}, "'x' has rank 2, not 3"),
        ({"x": (1, 3)}, "axis 1 is 2 and cannot be made 3"),
        ({"x": (4, 2), "m": (5,)}, "axis 0 is 4 and cannot be made 5"),
        ({"x": (0, 2)}, "at least 1"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    model = graph("(float[N,2] x, float[N] m) => (float[N,2] y) { y = Neg(x) }")
    with pytest.raises(InputError, match=message):
        sanitize(model, shapes)


def test_a_shape_that_breaks_the_graph_is_refused() -> None:
    model = graph("(float[N,4] x) => (float[2,4] y) <float[3,4] w = {1,2,3,4,1,2,3,4,1,2,3,4}> { y = Add(x, w) }")
    with pytest.raises(InputError, match=r"the ONNX model: .*Incompatible dimensions"):
        sanitize(model, {"x": (2, 4)})


def test_unused_weights_and_dead_nodes_go() -> None:
    text = (
        "(float[2] x) => (float[2] y) <float[2] w = {1,2}, float[2] v = {1,2}> { d = Add(x, w) e = Neg(d) y = Neg(x) }"
    )
    model, report = apply(text, sanitize)
    assert ops(model) == ["Neg"] and not model.graph.initializer
    assert report.changed["remove_dead_nodes"] == ["d", "e"]  # type: ignore[attr-defined]
    assert set(report.changed["remove_unused_initializers"]) == {"w", "v"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ("a = Identity(x) b = Identity(a) y = Neg(b)", ["Neg"]),
        ("a = Neg(x) y = Identity(a)", ["Neg"]),
        ("a = Neg(x) b = Abs(a) y = Identity(a)", ["Neg"]),
        ("y = Identity(x)", ["Identity"]),
        ("y = Dropout(x)", ["Identity"]),
        ("a = Dropout(x) y = Neg(a)", ["Neg"]),
        ("a = Dropout(x, r, off) y = Neg(a)", ["Neg"]),
        (
            "a, m = Dropout(x) n = Not(m) f = Cast <to = 1> (n) y = Add(a, f)",
            ["Dropout", "Not", "Cast", "Add"],
        ),
    ],
)
def test_identity_and_dropout_give_way(nodes: str, left: list[str]) -> None:
    text = f"(float[2] x) => (float[2] y) <float r = {{0.5}}, bool off = {{0}}> {{ {nodes} }}"
    assert ops(apply(text, sanitize)[0]) == left


def test_two_outputs_of_one_value_keep_both_names() -> None:
    text = "(float[2] x) => (float[2] y, float[2] z) { a = Neg(x) y = Identity(a) z = Identity(a) }"
    assert ops(apply(text, sanitize)[0]) == ["Neg", "Identity"]


def test_values_that_a_branch_reads_are_uses() -> None:
    branch = "{branch} = inner () => (float[2] {out}) {{ {out} = {op}(hidden) }}"
    then, other = (branch.format(branch=f"{b}_branch", out=b, op=op) for b, op in (("then", "Neg"), ("else", "Abs")))
    text = f"(float[2] x, bool c) => (float[2] y) {{ k = Neg(x) hidden = Identity(k) y = If(c) <{then}, {other}> }}"
    assert "Identity" in ops(apply(text, sanitize)[0])


def test_local_functions_are_inlined() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "mine" : 1]> agraph (float[2] x) => (float[2] y)
        { y = mine.twice(x) } <domain: "mine", opset_import: ["" : 18]> twice (a) => (b) { b = Add(a, a) }"""
    model = onnx.parser.parse_model(text)
    report = sanitize(model)
    assert ops(model) == ["Add"] and not model.functions and report.changed["inline_functions"] == ["mine.twice"]


# --- all of them -----------------------------------------------------------------------------------------

UNARY = ["Neg", "Abs", "Identity", "Dropout", "Tanh", "Relu"]
BINARY = ["Add", "Sub", "Mul", "Max"]


@st.composite
def graphs(draw: st.DrawFn) -> str:
    """Small graphs over floats [3,4] and integers [3], with constants, lookups and shape arithmetic."""
    floats, nodes = ["x", "w", "k"], []
    for index in range(draw(st.integers(1, 9))):
        kind, name = (
            draw(st.sampled_from(["unary", "binary", "constant", "shape", "lookup", "reshape"])),
            f"v{index}",
        )
        source = draw(st.sampled_from(floats))
        if kind == "unary":
            nodes.append(f"{name} = {draw(st.sampled_from(UNARY))}({source})")
        elif kind == "binary":
            nodes.append(f"{name} = {draw(st.sampled_from(BINARY))}({source}, {draw(st.sampled_from(floats))})")
        elif kind == "constant":
            nodes.append(f"c{index} = Constant <value_float = 1.5> () {name} = Mul({source}, c{index})")
        elif kind == "shape":
            nodes.append(f"s{index} = Shape({source}) f{index} = Cast <to = 1> (s{index})")
            nodes.append(f"g{index} = ReduceSum <keepdims = 0> (f{index}) {name} = Add({source}, g{index})")
        elif kind == "lookup":
            ids = draw(st.sampled_from(["ids", "fixed"]))
            nodes.append(f"i{index} = Identity({ids}) {name} = Gather({source}, i{index})")
        else:
            nodes.append(f"s{index} = Shape({source}) {name} = Reshape({source}, s{index})")
        floats.append(name)
    outputs = draw(
        st.lists(st.sampled_from([f for f in floats if f not in "xwk"]), min_size=1, max_size=3, unique=True)
    )
    weights = ", ".join(f"float[3,4] {n} = {{{','.join(str(i + 1) for i in range(12))}}}" for n in "wk")
    head = f"(float[3,4] x, int64[3] ids) => ({', '.join(f'float[3,4] {o}' for o in outputs)})"
    return f"{head} <{weights}, int64[3] fixed = {{2,0,-1}}> {{ {' '.join(nodes)} }}"


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=graphs())
def test_surgery_preserves_results_and_a_second_one_changes_nothing(text: str) -> None:
    model = apply(text, sanitize)[0]
    once = model.SerializeToString()
    report = sanitize(model)
    assert report.total == 0 and model.SerializeToString() == once
    assert not {"Constant", "Shape", "Dropout"} & set(ops(model))


def test_the_report_counts_what_was_there_and_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    report = apply(
        "(float[2] x) => (float[2] y) <float[2] w = {1,2}> { c = Neg(w) d = Identity(x) y = Add(d, c) }",
        sanitize,
    )[1]
    assert isinstance(report, SurgeryReport)
    assert report.nodes == (3, 1) and report.initializers == (1, 1) and report.total == 3


# --- the command -----------------------------------------------------------------------------------------


def test_the_command_writes_a_static_model_and_prints_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = graph(
        "(int64[N,T] ids) => (float[N,T,2] y) <float[3,2] w = {1,2,3,4,5,6}> { i = Identity(ids) y = Gather(w, i) }"
    )
    onnx.save(model, tmp_path / "a.onnx")
    out = tmp_path / "new" / "b.onnx"
    assert main(["--in", str(tmp_path / "a.onnx"), "--out", str(out), "--shape", "ids=1,4"]) == 0
    printed = capsys.readouterr().out
    assert "remove_identity" in printed and "2 -> 1" in printed
    written = onnx.load(out)
    onnx.checker.check_model(written, full_check=True)
    assert [d.dim_value for d in written.graph.input[0].type.tensor_type.shape.dim] == [1, 4]
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["--shape", "x=1,2,3"], "has rank 1"), (["--shape", "z=1"], "no input or dimension 'z'")],
)
def test_bad_input_is_exit_2_and_leaves_the_old_file(
    extra: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(graph("(float[N] x) => (float[N] y) { y = Neg(x) }"), tmp_path / "a.onnx")
    out = tmp_path / "b.onnx"
    out.write_text("precious")
    assert main(["--in", str(tmp_path / "a.onnx"), "--out", str(out), *extra]) == 2
    error = capsys.readouterr().err
    assert message in error and "a.onnx" in error and error.count("\n") == 1
    assert out.read_text() == "precious"


def test_a_missing_or_damaged_file_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"garbage")
    for name in ("bad.onnx", "none.onnx"):
        assert main(["--in", str(tmp_path / name), "--out", str(tmp_path / "o.onnx")]) == 2
        assert name in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["--in", "a", "--out", "b", "--shape", "ids"])
    assert caught.value.code == 2
