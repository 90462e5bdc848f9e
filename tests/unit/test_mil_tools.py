"""distill mil info, run and ranges, and program.ranges: what they say is compared with numpy and with the files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize as cto
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb

from distill import mil
from distill.errors import DistillError
from distill.mil_tools import feeds, info
from distill.mil_tools.main import TOOLS, main
from tests.unit import mil_build as b

WEIGHT = b.random((32, 16), 1)


def two_layers(x: Any) -> Any:
    hidden = mb.relu(x=mb.linear(x=x, weight=WEIGHT, name="hidden"), name="active")
    return mb.linear(x=hidden, weight=b.random((4, 32), 2), name="y")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return b.build(tmp_path_factory.mktemp("m") / "m.mlpackage", [b.tensor((2, 16), "fp16")], two_layers)


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State `total` plus the input; the new total is the output."""

    @mb.program(input_specs=[b.tensor((3,), "fp16"), b.state((3,))], opset_version=ct.target.iOS18)
    def program(x: Any, total: Any) -> Any:
        new = mb.add(x=mb.read_state(input=total), y=x, name="new")
        return mb.identity(x=mb.coreml_update_state(state=total, value=new), name="y")

    path = tmp_path_factory.mktemp("c") / "c.mlpackage"
    ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True).save(str(path))
    return path


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


# --- the door ------------------------------------------------------------------------------------------


def test_the_help_page_shows_every_tool_with_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(f"usage: distill mil {name}" in text for name in TOOLS)
    assert "--state-out" in text and "--points" in text


def test_asking_for_help_does_not_load_torch() -> None:
    code = "import sys; from distill.mil_tools.main import usage; usage(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_answers_help(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([tool, "--help"])
    assert stopped.value.code == 0 and f"distill mil {tool}" in capsys.readouterr().out


def test_an_unknown_tool_exits_2_and_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "difff", "a", "b")
    assert code == 2 and err == "error: no tool 'difff'; did you mean 'diff'? (distill mil --help lists them)\n"


@pytest.mark.parametrize("tool", ["info", "run", "ranges"])
def test_a_package_that_is_not_there_is_one_line(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, tool, "nowhere.mlpackage")
    assert (code, err) == (2, "error: nowhere.mlpackage: no such package\n")


# --- info ----------------------------------------------------------------------------------------------


def test_info_tells_interface_operators_target_and_weights(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", package)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert "iOS 18 / macOS 15" in out and "opset CoreML8" in out and "runnable here: yes" in out
    assert ["input", "x", "fp16[2,", "16]"] in lines
    assert ["linear", "2"] in lines and ["relu", "1"] in lines


def test_info_counts_the_bytes_that_numpy_counts(package: Path) -> None:
    found = info.describe(mil.load(package))
    fp16 = next(row for row in found["weights"]["by_dtype"] if row["dtype"] == "fp16")
    constants = [v.numpy() for v in mil.load(package).function().constants.values() if v.type.dtype == "fp16"]
    assert fp16["tensors"] == len(constants)
    assert fp16["bytes"] == sum(c.astype(np.float16).nbytes for c in constants)
    assert fp16["elements"] >= WEIGHT.size + 4 * 32
    assert found["weights"]["compression"] == 1.0


def test_info_as_json_is_json_and_nothing_else(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", package, "--json")
    found = json.loads(out)
    assert code == 0 and found["functions"]["main"]["operators"]["linear"] == 2
    assert found["target"] == ["iOS 18", "macOS 15"] and found["missing_operators"] == []


def test_info_tells_how_far_quantisation_compresses(package: Path, tmp_path: Path) -> None:
    config = cto.coreml.OptimizationConfig(cto.coreml.OpLinearQuantizerConfig(dtype="int4", weight_threshold=1))
    model = ct.models.MLModel(str(package), skip_model_load=True)
    cto.coreml.linear_quantize_weights(model, config).save(str(tmp_path / "p.mlpackage"))
    found = info.describe(mil.load(tmp_path / "p.mlpackage"))
    by_type = {row["dtype"]: row for row in found["weights"]["by_dtype"]}
    assert by_type["int4"]["bytes"] == (32 * 16 + 4 * 32) // 2
    dense = info.describe(mil.load(package))["weights"]["bytes"]
    assert abs(found["weights"]["dense_bytes"] - dense) < 100  # but for the small constants of other passes
    assert found["weights"]["compression"] > 2.5


def test_info_counts_a_weight_that_two_functions_share_once(package: Path, tmp_path: Path) -> None:
    description = ct.utils.MultiFunctionDescriptor()
    description.add_function(str(package), "main", "first")
    description.add_function(str(package), "main", "second")
    description.default_function_name = "first"
    ct.utils.save_multifunction(description, str(tmp_path / "two.mlpackage"))
    one, two = (info.describe(mil.load(p)) for p in (package, tmp_path / "two.mlpackage"))
    assert set(two["functions"]) == {"first", "second"}
    large = [next(r for r in f["weights"]["by_dtype"] if r["dtype"] == "fp16")["bytes"] for f in (one, two)]
    assert large[1] < large[0] + 200
    assert set(info.describe(mil.load(tmp_path / "two.mlpackage"), "second")["functions"]) == {"second"}


def test_info_shows_states_flexible_shapes_and_missing_operators(counter: Path, tmp_path: Path) -> None:
    (state,) = info.describe(mil.load(counter))["functions"]["main"]["states"]
    assert (state["name"], state["dtype"], state["shape"]) == ("total", "fp16", [3])
    model = b.raw_model()
    array = model.description.input[0].type.multiArrayType
    array.shapeRange.sizeRanges.add(lowerBound=1, upperBound=-1)
    b.operations(model)[0].type = "frobnicate"
    found = info.describe(mil.load(b.write_package(tmp_path / "r.mlpackage", model)))
    assert found["functions"]["main"]["inputs"][0]["ranges"] == [[1, None]]
    assert found["missing_operators"] == ["frobnicate"]
    assert "[1..]" in info.render(found) and "no implementation of frobnicate" in info.render(found)


def test_names_with_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    model = b.raw_model()
    model.description.metadata.userDefined["k\x1b[31m"] = "v\nw"
    text = info.render(info.describe(mil.load(b.write_package(tmp_path / "r.mlpackage", model))))
    assert "\x1b" not in text and "k?[31m: v?w" in text


# --- run -----------------------------------------------------------------------------------------------


def test_run_saves_what_predict_gives(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = b.random((2, 16))
    np.save(tmp_path / "x.npy", x)
    code, out, _ = run(capsys, "run", package, "--input", f"x={tmp_path}/x.npy", "--out", tmp_path / "o.npz")
    expected = mil.load(package).predict({"x": x})["y"]
    with np.load(tmp_path / "o.npz") as saved:
        assert saved.files == ["y"] and np.array_equal(saved["y"], expected)
    row = out.splitlines()[1].split()
    assert code == 0 and row[:4] == ["y", "[2,", "4]", "fp16"]
    assert float(row[4]) == pytest.approx(expected.min(), rel=1e-3)
    assert float(row[6]) == pytest.approx(expected.mean(), rel=1e-3) and row[7:] == ["0", "0"]


def test_run_takes_npz_numbers_and_a_seed(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = b.random((2, 16))
    np.savez(tmp_path / "all.npz", x=x, other=x)
    numbers = ",".join(map(repr, x.reshape(-1).tolist()))
    answers = [
        run(capsys, "run", package, "--input", spec, "--json")[1]
        for spec in (f"{tmp_path}/all.npz", f"x={tmp_path}/all.npz", f"x={numbers}")
    ]
    assert answers[0] == answers[1] == answers[2]
    code, out, err = run(capsys, "run", package, "--seed", 3)
    assert code == 0 and err == "input x [2, 16]: random normal (seed 3)\n"
    assert run(capsys, "run", package, "--seed", 3)[1] == out != run(capsys, "run", package, "--seed", 4)[1]


def test_run_goes_on_from_a_saved_state(counter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "s.npz"
    assert run(capsys, "run", counter, "--input", "x=1,2,3", "--state-out", saved)[0] == 0
    code, out, _ = run(
        capsys, "run", counter, "--input", "x=1,2,3", "--state-in", saved, "--state-out", saved, "--json"
    )
    assert code == 0 and json.loads(out)["outputs"]["y"]["max"] == 6
    assert np.load(saved)["total"].tolist() == [2, 4, 6]


def test_a_trace_on_the_command_line_does_not_change_the_state(
    counter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "run", counter, "--input", "x=1,2,3", "--trace", "--state-out", tmp_path / "s.npz")
    assert np.load(tmp_path / "s.npz")["total"].tolist() == [1, 2, 3]


def test_a_trace_prints_the_values_that_match(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "run", package, "--seed", 0, "--trace", "relu")
    lines = out.split("trace\n")[1].split("  output")[0].splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "operator"], ["1", "relu"]]


def test_a_trace_matches_a_part_of_a_name_and_says_when_nothing_does(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, "run", package, "--seed", 0, "--trace", "idd*n", "--json")
    assert [row["value"] for row in json.loads(out)["trace"]] == ["hidden_cast_fp16"]
    _, out, _ = run(capsys, "run", package, "--seed", 0, "--trace", "zzz")
    assert out.startswith("trace: no operator and no value has 'zzz' in its name\n")


def test_strict_findings_are_printed(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "run", package, "--input", "x=" + ",".join(["60000"] * 32), "--policy", "strict")
    assert any(line.split()[:2] == ["overflow", "linear"] for line in out.splitlines())
    _, out, _ = run(capsys, "run", package, "--seed", 0, "--policy", "strict")
    assert "strict: " in out


class Marker:
    """Unpickling one would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_an_array_of_pickles_is_refused_and_not_run(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", np.array([Marker(tmp_path / "harm")], dtype=object), allow_pickle=True)
    code, _, err = run(capsys, "run", package, "--input", f"x={tmp_path}/x.npy")
    assert code == 2 and err.count("\n") == 1 and "x.npy: not an array that can be read safely" in err
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(("flags", "message"), [
    (["--input", "z=1"], "no input 'z'; there are x"),
    (["--input", "x=missing.npy"], "missing.npy: neither numbers nor a file that exists"),
    (["--input", "nothing.npz"], "nothing.npz: neither numbers nor a file that exists"),
    (["--input", "x=1,2,3"], "input 'x' has shape [3], expected [2, 16]"),
    (["--input", "x=1", "--input", "x=2"], "x is given twice"),
    ([], "needs input x"),
    (["--seed", "0", "--policy", "fp8"], "no numeric policy 'fp8'"),
    (["--seed", "0", "--function", "f"], "no function 'f'; it has main"),
    (["--seed", "0", "--state-in", "s.npz"], "function main keeps no state"),
    (["--seed", "0", "--state-out", "s.npz"], "function main keeps no state"),
    (["--seed", "-1"], "--seed must not be negative, not -1"),
    (["--seed", "0", "--out", "/proc/none/o.npz"], "cannot write /proc/none/o.npz"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    package: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "run", package, *flags)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and rubbish", b"\x93NUMPY\x01\x00"])
def test_a_broken_array_file_is_one_line(
    package: Path, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    code, _, err = run(capsys, "run", package, "--input", f"x={tmp_path}/x.npz")
    assert code == 2 and err.count("\n") == 1 and "x.npz" in err


def test_random_token_ids_stay_within_the_table_that_they_index(tmp_path: Path) -> None:
    def body(ids: Any) -> Any:
        return mb.gather(x=b.random((7, 4)), indices=mb.expand_dims(x=ids, axes=[0]), axis=0, name="y")

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((64,), "int32")], body)
    drawn = feeds.draw(program.function(), {}, 0)["ids"]
    assert set(drawn.tolist()) == set(range(7))


def test_random_inputs_take_the_enumerated_shape_of_those_given(tmp_path: Path) -> None:
    shapes = ct.EnumeratedShapes([(1, 4), (1, 8)], default=(1, 4))

    class Sum(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    traced = torch.jit.trace(Sum(), (torch.zeros(1, 4), torch.zeros(1, 4)))
    inputs = [ct.TensorType("x", shapes), ct.TensorType("y", shapes)]
    model = ct.convert(traced, inputs=inputs, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    model.save(str(tmp_path / "e.mlpackage"))
    function = mil.load(tmp_path / "e.mlpackage").function()
    given = feeds.parse_inputs(["x=1,2,3,4,5,6,7,8"], function)
    assert given["x"].shape == (1, 8) and feeds.draw(function, given, 0)["y"].shape == (1, 8)


def test_an_absurd_input_is_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = b.write_package(tmp_path / "r.mlpackage", b.raw_model(shape=(2**16, 2**15)))
    code, _, err = run(capsys, "run", path, "--seed", 0)
    assert code == 2 and err == "error: input 'x' of shape [65536, 32768] is too large to be drawn at random\n"


def test_damaged_packages_are_described_or_refused(tmp_path: Path) -> None:
    """A byte of the model changed at random: what still loads is described and gets inputs, or is refused."""
    model = b.raw_model()
    b.operations(model)[0].type = "gather"
    path = b.write_package(tmp_path / "r.mlpackage", model)
    file = path / "Data/com.apple.CoreML/model.mlmodel"
    raw, random, described = file.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(raw)
        damaged[random.integers(len(raw))] = random.integers(256)
        file.write_bytes(damaged)
        try:
            program = mil.load(path)
            info.render(info.describe(program))
            feeds.draw(program.function(), {}, 0)
            described += 1
        except DistillError:
            continue
    assert described > 10


# --- images and classifiers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mean of each channel of a BGR image decides between three labels, which are not in alphabetical order."""

    class Means(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x.mean((2, 3)) / 100, -1)

    traced = torch.jit.trace(Means(), torch.zeros(1, 3, 4, 5))
    model = ct.convert(
        traced, inputs=[ct.ImageType("image", (1, 3, 4, 5), color_layout=ct.colorlayout.BGR)], skip_model_load=True,
        classifier_config=ct.ClassifierConfig(["sea", "leaf", "brick"]), minimum_deployment_target=ct.target.iOS18,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("i") / "i.mlpackage"
    model.save(str(path))
    return path


def test_info_shows_colour_layout_and_labels(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "info", classifier)
    assert "BGR image" in out and "3 labels: sea, leaf, brick" in out and "string[]" not in out
    interface = json.loads(run(capsys, "info", classifier, "--json")[1])["functions"]["main"]
    assert interface["inputs"][0]["color"] == "BGR" and interface["outputs"][0]["labels"] == ["sea", "leaf", "brick"]


def test_run_shows_a_classifiers_label_and_saves_its_labels(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.new("RGB", (5, 4), (0, 200, 100)).save(tmp_path / "im.png")  # blue 100, green 200, red 0
    flags = ["--input", f"image={tmp_path}/im.png", "--out", tmp_path / "o.npz"]
    code, out, _ = run(capsys, "run", classifier, *flags)
    want = np.exp([1, 2, 0]) / np.exp([1, 2, 0]).sum()
    assert code == 0 and "classLabel: leaf" in out and "leaf 0.66" in out
    outputs = json.loads(run(capsys, "run", classifier, *flags, "--json")[1])["outputs"]
    assert outputs["classLabel"]["label"] == "leaf" and "min" not in outputs["classLabel"]
    probabilities = next(name for name in outputs if name != "classLabel")
    assert [top["label"] for top in outputs[probabilities]["top"]] == ["leaf", "sea", "brick"]
    with np.load(tmp_path / "o.npz") as saved:
        assert saved[f"{probabilities}.labels"].tolist() == ["sea", "leaf", "brick"]
        assert saved[probabilities] == pytest.approx(want, abs=1e-3)


def test_a_random_image_holds_whole_numbers_from_0_to_255(classifier: Path) -> None:
    drawn = feeds.draw(mil.load(classifier).function(), {}, 0)["image"]
    assert drawn.min() >= 0 and drawn.max() > 100 and np.array_equal(drawn, np.rint(drawn))


def test_an_image_file_for_an_array_is_one_line(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "im.png").write_bytes(b"\x89PNG\r\n\x1a\n and more")
    code, _, err = run(capsys, "run", package, "--input", f"x={tmp_path}/im.png")
    assert code == 2 and err.endswith(f"x takes an array, and {tmp_path}/im.png is neither .npy nor .npz\n")


# --- ranges --------------------------------------------------------------------------------------------


def test_ranges_are_those_that_numpy_finds_over_all_inputs(package: Path) -> None:
    program = mil.load(package)
    items = [{"x": b.random((2, 16), seed, scale)} for seed, scale in ((0, 1.0), (1, 50.0), (2, 1.0))]
    found = {r.name: r for r in program.ranges(iter(items))}
    seen = np.concatenate([item["x"].reshape(-1) for item in items])
    assert found["x"].op_type == "input" and found["x"].count == seen.size
    assert (found["x"].min, found["x"].max) == (seen.min(), seen.max())
    assert found["x"].smallest == np.abs(seen).min()
    assert found["x"].headroom == pytest.approx(65504 / np.abs(seen).max())
    assert found["x"].headroom_bits == pytest.approx(np.log2(65504 / np.abs(seen).max()))
    outputs = np.concatenate([program.predict(item, policy="fp32")["y"].reshape(-1) for item in items])
    assert (found["y"].min, found["y"].max) == (outputs.min(), outputs.max())


def test_the_value_with_least_head_room_comes_first_and_overflow_shows_its_true_size(package: Path) -> None:
    program = mil.load(package)
    big = {"x": np.full((2, 16), 60000, np.float32)}
    ranges = program.ranges([big])
    assert [r.headroom for r in ranges] == sorted(r.headroom for r in ranges)
    assert ranges[0].headroom < 1 and ranges[0].nonfinite == 0
    rounded = program.ranges([big], policy="ieee16")
    assert rounded[0].nonfinite > 0 and rounded[0].headroom == 0 and rounded[0].headroom_bits == -np.inf


def test_a_conversation_shares_a_state_and_two_do_not(counter: Path) -> None:
    program = mil.load(counter)
    one = {"x": np.array([1, 2, 3], np.float32)}
    assert next(r for r in program.ranges([one, one, one]) if r.name == "y").max == 3
    assert next(r for r in program.ranges([[one, one, one]]) if r.name == "y").max == 9
    state = program.make_state()
    assert next(r for r in program.ranges([one, one], state=state) if r.name == "y").max == 6
    assert state.read("total").tolist() == [2, 4, 6]


def test_ranges_read_prompts_from_a_file(counter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"x": [1, 2, 3]}\n\n[{"x": [1, 2, 3]}, {"x": [1, 2, 30000]}]\n')
    code, out, _ = run(capsys, "ranges", counter, "--prompts", prompts, "--json")
    rows = {row["value"]: row for row in json.loads(out)}
    assert code == 0 and rows["y"]["max"] == 30003 and rows["x"]["max"] == 30000
    code, out, _ = run(capsys, "ranges", counter, "--prompts", prompts, "--top", 1)
    assert len(out.splitlines()) == 3 and "0 do not fit fp16" in out


def test_prompts_take_the_inputs_shape_and_errors_name_their_line(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.jsonl"
    good = json.dumps({"x": list(range(32))})
    prompts.write_text(good)
    assert run(capsys, "ranges", package, "--prompts", prompts)[0] == 0
    for bad, message in (("{}", "needs input x"), ('{"x": [1, 2]}', "has shape [2], expected [2, 16]")):
        prompts.write_text(f"{good}\n\n{bad}\n")
        code, _, err = run(capsys, "ranges", package, "--prompts", prompts)
        assert code == 2 and err.startswith(f"error: {prompts}:3: ") and message in err


def test_a_value_without_a_finite_element_has_no_range(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "ranges", package, "--input", "x=" + ",".join(["nan"] * 32), "--json")
    row = next(row for row in json.loads(out) if row["value"] == "x")
    assert (row["min"], row["max"], row["max_abs"], row["headroom"], row["nonfinite"]) == ("nan", "nan", "nan", 0, 32)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "p.jsonl:1: not valid JSON"), ("[]", "p.jsonl:1: neither an object"), ("3", "p.jsonl:1: neither an object"),
    ("", "holds no prompt"), ('{"x": "a"}', "input 'x' is an array of"), ('{"z": 1}', "has no input z"),
    ('{"x": [[1], [1, 2]]}', "input 'x' is not an array"), ('{"x": {"a": 1}}', "input 'x' is"),
])  # fmt: skip
def test_bad_prompts_are_one_line(
    counter: Path, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    code, _, err = run(capsys, "ranges", counter, "--prompts", tmp_path / "p.jsonl")
    assert code == 2 and err.count("\n") == 1 and message in err
