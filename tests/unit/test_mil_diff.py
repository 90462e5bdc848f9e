"""distill mil diff: one fault is planted in a copy of a package, and the operation that holds it is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.proto import Model_pb2

from distill import mil
from distill.mil_tools.compare import Tolerance, align, compare
from distill.mil_tools.diff import diff
from distill.mil_tools.main import main
from distill.mil_tools.match import pair_values, plain_name
from tests.unit import mil_build as b

LAYERS = 3


class Net(torch.nn.Module):
    """Norm, product with its transpose, projection; a few times over."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(16) for _ in range(LAYERS))
        self.mixes = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, mix in zip(self.norms, self.mixes):
            h = norm(x)
            x = x + mix(torch.matmul(torch.softmax(torch.matmul(h, h.transpose(1, 2)) / 4, -1), h))
        return x


def convert(path: Path, module: torch.nn.Module, precision: str = "FLOAT16", **options: Any) -> Path:
    traced = torch.jit.trace(module.eval(), torch.zeros(1, 16, 16))
    model = ct.convert(
        traced, inputs=[ct.TensorType("x", (1, 16, 16))], outputs=[ct.TensorType("y")], skip_model_load=True,
        minimum_deployment_target=ct.target.iOS18, compute_precision=getattr(ct.precision, precision), **options,
    )  # fmt: skip
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("m") / "m.mlpackage", Net())


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("s") / "s.mlpackage", Net(), "FLOAT32")


def spoilt(package: Path, folder: Path, change: Any) -> Path:
    """A copy whose protobuf `change` has edited."""
    path = shutil.copytree(package, folder / "spoilt.mlpackage")
    file = path / "Data/com.apple.CoreML/model.mlmodel"
    model = Model_pb2.Model.FromString(file.read_bytes())
    change(model)
    file.write_bytes(model.SerializeToString())
    return path


def scale_weight(package: Path, folder: Path, operator: str, number: int, one: bool) -> tuple[Path, str]:
    """A copy in which a weight (or one element of it) is multiplied by 1.01, and the value that it makes."""
    path = shutil.copytree(package, folder / "scaled.mlpackage")
    function = mil.load(path).function()
    op = [op for op in function.block.walk() if op.type == operator][number]
    weight = function.constant(op.inputs["weight"][0])
    assert weight is not None and weight.is_blob
    file = path / "Data/com.apple.CoreML/weights/weight.bin"
    raw = bytearray(file.read_bytes())
    array = np.frombuffer(raw, np.float16, weight.type.count, weight.offset + 64)
    array[: 1 if one else None] *= np.float16(1.01)
    file.write_bytes(raw)
    return path, op.output_name


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main(["diff", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def first_line(out: str) -> str:
    return next(line for line in out.splitlines() if line.startswith("first to diverge: "))


def test_a_package_equals_itself(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, package, package)
    assert code == 0 and out.endswith("equal: nothing that was compared diverges\n")
    assert "without partner 0 and 0" in out and "0 not the same to the last bit" in out


@pytest.mark.parametrize("one", [True, False], ids=["one element", "the whole matrix"])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("policy", ["fp32", "ieee16"])
def test_a_weight_scaled_by_a_hundredth_is_named(
    package: Path, layer: int, one: bool, policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, value = scale_weight(package, tmp_path, "linear", layer, one)
    code, out, _ = run(capsys, package, other, "--policy", policy)
    assert code == 1 and first_line(out).startswith(f"first to diverge: linear {value!r}: relative ")
    assert f"  weight: {1 if one else 256} of 256 elements differ" in out
    assert out.splitlines()[-1].startswith("different: the outputs ")


def test_a_wrong_epsilon_is_named_with_both_values(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(model: Any) -> None:
        ops = b.operations(model)
        name = [op for op in ops if op.type == "layer_norm"][1].inputs["epsilon"].arguments[0].name
        const = next(op for op in ops if op.type == "const" and op.outputs[0].name == name)
        const.attributes["val"].immediateValue.tensor.bytes.values = np.float16(1e-3).tobytes()

    code, out, _ = run(capsys, package, spoilt(package, tmp_path, change))
    value = [op.output_name for op in mil.load(package).function().block.walk() if op.type == "layer_norm"][1]
    assert code == 1 and f"layer_norm {value!r}" in first_line(out)
    assert "  epsilon: 1.0013580322265625e-05 here, 0.0010004043579101562 there" in out


def test_a_dropped_transpose_is_found_where_its_value_is_used(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here both sides are 16 wide, so that no shape tells."""

    def change(model: Any) -> None:
        matmul = next(op for op in b.operations(model) if op.type == "matmul")
        name = matmul.inputs["transpose_y"].arguments[0].name
        const = next(op for op in b.operations(model) if op.type == "const" and op.outputs[0].name == name)
        const.attributes["val"].immediateValue.tensor.bools.values[0] ^= True

    code, out, _ = run(capsys, package, spoilt(package, tmp_path, change))
    value = next(op.output_name for op in mil.load(package).function().block.walk() if op.type == "matmul")
    assert code == 1 and f"matmul {value!r}" in first_line(out) and "  transpose_y: True here, False there" in out


def test_a_dropped_transpose_operation_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def body(keep: bool) -> Any:
        def program(x: Any) -> Any:
            h = mb.relu(x=x, name="active")
            h = mb.transpose(x=h, perm=[1, 0], name="turned") if keep else h
            return mb.exp(x=mb.cumsum(x=h, axis=0, name="sum"), name="y")

        return program

    paths = [b.build(tmp_path / f"{keep}.mlpackage", [b.tensor((8, 8))], body(keep)) for keep in (True, False)]
    code, out, _ = run(capsys, *paths)
    assert code == 1 and "cumsum 'sum_cast_fp16'" in first_line(out)
    assert "without partner 1 and 0" in out
    assert "  x: made by transpose here, relu there" in out


def test_half_and_single_precision_are_matched_by_name_and_agree(
    package: Path, single: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, package, single, "--rtol", "5e-3")
    matched = int(out.split(" values matched by name")[0].splitlines()[-1])
    assert code == 0 and matched > 5 * LAYERS
    assert "(different operations)" in out


def test_a_fault_is_found_across_precisions(
    package: Path, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, value = scale_weight(package, tmp_path, "linear", 1, one=False)
    code, out, _ = run(capsys, single, other, "--rtol", "3e-3")
    assert code == 1 and f"(there {value!r})" in first_line(out)


def test_compressed_weights_are_named_as_the_cause(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import coremltools.optimize as cto

    config = cto.coreml.OptimizationConfig(cto.coreml.OpLinearQuantizerConfig(dtype="int4", weight_threshold=1))
    model = ct.models.MLModel(str(package), skip_model_load=True)
    cto.coreml.linear_quantize_weights(model, config).save(str(tmp_path / "q.mlpackage"))
    code, out, _ = run(capsys, package, tmp_path / "q.mlpackage")
    value = next(op.output_name for op in mil.load(package).function().block.walk() if op.type == "linear")
    assert code == 1 and f"linear {value!r}" in first_line(out)
    assert "  weight: made by const here, constexpr_blockwise_shift_scale there" in out
    assert run(capsys, package, tmp_path / "q.mlpackage", "--rtol", "1")[0] == 0


def test_other_names_are_matched_by_structure(package: Path, tmp_path: Path) -> None:
    def rename(model: Any) -> None:
        """Every computed value gets a number that means nothing."""
        names: dict[str, str] = {}
        for op in b.operations(model):
            for out in op.outputs:
                if op.type != "const" and out.name != "y":
                    out.name = names.setdefault(out.name, f"v{len(names)}")
            for argument in op.inputs.values():
                for binding in argument.arguments:
                    binding.name = names.get(binding.name, binding.name)

    faulty, value = scale_weight(package, tmp_path, "linear", 1, one=True)
    a, other = mil.load(package), mil.load(spoilt(faulty, tmp_path, rename))
    report = diff(a, other, {"x": b.random((1, 16, 16))})
    assert report.first is not None and (report.first.op_type, report.first.value) == ("linear", value)
    assert report.first.found_by == "structure" and report.unmatched == (0, 0)


def test_names_that_are_only_numbers_are_not_believed(package: Path, tmp_path: Path) -> None:
    """With one operation more at the front, every name moves to the next operation."""

    def shift(offset: int) -> Any:
        def change(model: Any) -> None:
            names: dict[str, str] = {}
            for op in b.operations(model):
                for out in op.outputs:
                    if op.type != "const" and out.name != "y":
                        out.name = names.setdefault(out.name, f"var_{len(names) + offset}")
                for argument in op.inputs.values():
                    for binding in argument.arguments:
                        binding.name = names.get(binding.name, binding.name)

        return change

    (tmp_path / "a").mkdir()
    a, other = (mil.load(spoilt(package, folder, shift(n))) for n, folder in ((0, tmp_path), (1, tmp_path / "a")))
    report = diff(a, other, {"x": b.random((1, 16, 16))})
    assert report.first is None and report.unmatched == (0, 0)


def test_a_permuted_layout_is_no_difference(tmp_path: Path) -> None:
    def body(first: bool) -> Any:
        def program(x: Any) -> Any:
            if first:
                return mb.transpose(x=mb.cumsum(x=x, axis=1, name="sum"), perm=[0, 2, 1], name="y")
            return mb.cumsum(x=mb.transpose(x=x, perm=[0, 2, 1]), axis=2, name="y")

        return program

    a = b.load(tmp_path / "a.mlpackage", [b.tensor((1, 4, 8))], body(True), "fp32")
    other = b.load(tmp_path / "b.mlpackage", [b.tensor((1, 4, 8))], body(False), "fp32")
    assert diff(a, other, {"x": b.random((1, 4, 8))}).first is None


def test_an_output_of_another_shape_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def body(axes: list[int]) -> Any:
        return lambda x: mb.reduce_sum(x=x, axes=axes, keep_dims=True, name="y")

    paths = [b.build(tmp_path / f"{n}.mlpackage", [b.tensor((4, 4))], body(list(range(n)))) for n in (1, 2)]
    code, out, _ = run(capsys, *paths)
    assert code == 1 and "first to diverge: output 'y': shapes [1, 4] and [1, 1]" in out


def test_states_are_compared_after_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def build(factor: float) -> Path:
        @mb.program(input_specs=[b.tensor((3,), "fp16"), b.state((3,))], opset_version=ct.target.iOS18)
        def program(x: Any, total: Any) -> Any:
            new = mb.add(x=mb.read_state(input=total), y=mb.mul(x=x, y=np.float16(factor), name="scaled"), name="new")
            mb.coreml_update_state(state=total, value=new)
            return mb.identity(x=x, name="y")

        model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
        path = tmp_path / f"{factor}.mlpackage"
        model.save(str(path))
        return path

    code, out, _ = run(capsys, build(1.5), build(2.5), "--json")
    found = json.loads(out)
    states = [row for row in found["values"] if row["found_by"] == "state"]
    assert code == 1 and not found["outputs_agree"] and found["first"].startswith("scaled")
    assert [row["value"] for row in states] == ["total"] and states[0]["difference"]["max_error"] > 0.1


def test_an_output_that_no_operation_makes_is_compared(tmp_path: Path) -> None:
    def body(n: float) -> Any:
        return lambda x: (mb.relu(x=x, name="y"), mb.const(val=np.full(4, n, np.float32), name="c"))

    a, other = (b.load(tmp_path / f"{n}.mlpackage", [b.tensor((4,))], body(n), "fp32") for n in (1, 2))
    report = diff(a, other, {"x": b.random((4,))})
    assert report.first is not None and (report.first.value, report.first.found_by) == ("c", "output")


def test_packages_that_take_other_inputs_are_bad_input(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = b.build(tmp_path / "t.mlpackage", [b.tensor((4,)), b.tensor((4,))], lambda x, z: mb.add(x=x, y=z, name="y"))
    code, _, err = run(capsys, package, two)
    assert code == 2 and "takes x, z, the other package x" in err.splitlines()[-1]


@pytest.mark.parametrize("flags", [["--rtol", "-1"], ["--atol", "nan"]])
def test_a_tolerance_must_be_a_number(package: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, package, package, *flags)
    assert code == 2 and err.count("\n") == 1 and flags[0] in err


# --- the parts -----------------------------------------------------------------------------------------


def test_an_element_small_by_cancellation_is_judged_by_its_neighbours() -> None:
    a = np.array([1.0, -1.0, 1e-9])
    assert compare(a, a + 1e-7, Tolerance(0, 1e-6)).agrees
    assert not compare(a, a + np.array([0, 0, 1e-5]), Tolerance(0, 1e-6)).agrees


@pytest.mark.parametrize(("a", "c", "same"), [
    ([np.nan, 1], [np.nan, 1], True), ([np.inf, 1], [np.inf, 1], True), ([np.inf, 1], [-np.inf, 1], False),
    ([np.nan, 1], [0, 1], False), ([0.0, 0.0], [0.0, 1e-30], False), ([], [], True),
])  # fmt: skip
def test_what_is_not_finite_must_be_so_on_both_sides(a: list[float], c: list[float], same: bool) -> None:
    assert compare(np.array(a), np.array(c), Tolerance(0, 1e-3)).agrees is same


def test_integers_must_be_equal() -> None:
    assert compare(np.array([3, 4]), np.array([3, 4]), Tolerance(9, 9)).agrees
    assert compare(np.array([3, 4]), np.array([3, 5]), Tolerance(9, 9)).diverges


def test_layouts_are_aligned_by_the_permutation_that_fits_best() -> None:
    x = b.random((1, 4, 4, 5))
    turned = x.transpose(0, 3, 2, 1)
    found, note = align(x, turned)
    assert found is not None and np.array_equal(found, x) and note == "permuted [2, 1, 0]"
    assert align(x, b.random((4, 21)))[0] is None
    assert np.array_equal(align(x[:, :, :1], x[:, :, 0])[0], x[:, :, :1])


def test_partners_are_found_around_an_operation_that_only_one_has(tmp_path: Path) -> None:
    def body(extra: bool) -> Any:
        def program(x: Any) -> Any:
            h = mb.relu(x=x)
            h = mb.tanh(x=h) if extra else h
            return mb.exp(x=mb.sigmoid(x=h), name="y")

        return program

    a, other = (b.load(tmp_path / f"{e}.mlpackage", [b.tensor((4,))], body(e), "fp32") for e in (True, False))
    pairs = pair_values(a.function(), other.function()).values
    types = {v: op.type for p in (a, other) for v, op in p.function().producers.items()}
    assert {types[v] for v in pairs} == {"relu", "sigmoid", "exp"}
    assert all(a.function().producers[m].type == other.function().producers[n].type for m, n in pairs.items())


@pytest.mark.parametrize(("name", "plain"), [
    ("linear_0_cast_fp16", "linear_0"), ("x_to_fp16", "x"), ("g_cast_fp16_cast_uint16", "g"), ("fp16", "fp16"),
])  # fmt: skip
def test_what_casting_passes_append_is_no_part_of_a_name(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_nan_on_both_sides_is_equal_and_said(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = "x=" + ",".join(["nan"] * 256)
    code = main(["diff", str(package), str(package), "--input", values])
    out = capsys.readouterr().out
    assert code == 0 and "NaN on both sides in" in out and out.endswith("diverges; but NaN is no result\n")


def test_probabilities_of_other_labels_differ() -> None:
    assert compare({"a": 0.5, "b": 0.5}, {"b": 0.5, "a": 0.5}, Tolerance(0, 0)).agrees
    assert not compare({"a": 0.5, "b": 0.5}, {"a": 0.5, "c": 0.5}, Tolerance(0, 0)).agrees
