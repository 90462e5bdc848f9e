"""distill mil bisect: a module of the user's own against its package, with a fault planted in either."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch

from distill import mil
from distill.mil_tools import torch_points
from distill.mil_tools.bisect import bisect
from distill.mil_tools.main import main
from tests.unit import mil_build as b
from tests.unit.test_mil_diff import scale_weight

SOURCE = """
import torch


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.q = torch.nn.Linear(16, 16)
        self.k = torch.nn.Linear(16, 16)
        self.v = torch.nn.Linear(16, 16)
        self.out = torch.nn.Linear(16, 16)

    def forward(self, x):
        h = self.norm(x)
        weights = torch.softmax(torch.matmul(self.q(h), self.k(h).transpose(1, 2)) / 4, -1)
        return x + self.out(torch.matmul(weights, self.v(h)))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(3))
        self.head = torch.nn.Linear(16, 8)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make():
    return Net()


def wrong_epsilon():
    net = Net()
    net.layers[1].norm.eps = 0.1
    return net


def broken():
    raise RuntimeError("no weights here\\nsecond line")


number = 3
model = Net()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """net.py, its package, and its TorchScript."""
    path = tmp_path_factory.mktemp("net")
    (path / "net.py").write_text(SOURCE)
    traced = torch.jit.trace(load(path).eval(), torch.zeros(1, 6, 16))
    traced.save(str(path / "net.pt"))
    model = ct.convert(traced, inputs=[ct.TensorType("x", (1, 6, 16))], outputs=[ct.TensorType("y")],
                       minimum_deployment_target=ct.target.iOS18, skip_model_load=True)  # fmt: skip
    model.save(str(path / "net.mlpackage"))
    return path


def load(folder: Path, name: str = "make") -> Any:
    return torch_points.load_module(f"{folder}/net.py:{name}", None)


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main(["bisect", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_module_agrees_with_the_package_made_from_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, folder / "net.mlpackage", "--module", f"{folder}/net.py:make")
    assert code == 0 and out.endswith("equal: nothing that was compared diverges\n")
    lines = [line.split() for line in out.splitlines()]
    points = [f"layers.{n}{part}" for n in range(3) for part in (".norm", ".q", ".k", ".v", ".out", "")] + ["head"]
    assert [line[0] for line in lines if line[1:2] == ["agrees"]] == points
    assert any(line[:3] == ["output", "y", "agrees"] for line in lines)


@pytest.mark.parametrize(("number", "point"), [(5, "layers.1.q"), (6, "layers.1.k"), (7, "layers.1.v"),
                                               (8, "layers.1.out"), (12, "head")])  # fmt: skip
def test_a_weight_scaled_by_a_hundredth_is_narrowed_to_one_operation(
    folder: Path, number: int, point: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The order of q, k and v in the package is coremltools' choice; the operations are told apart by likeness."""
    weights = ["q", "k", "v", "out"]
    ops = [op for op in mil.load(folder / "net.mlpackage").function().block.walk() if op.type == "linear"]
    layer = (number - 1) // 4 if number < 12 else None
    name = f"layers_{layer}_{weights[(number - 1) % 4]}_weight" if layer is not None else "head_weight"
    index = next(i for i, op in enumerate(ops) if str(op.inputs["weight"][0]).startswith(name))
    other, value = scale_weight(folder / "net.mlpackage", tmp_path, "linear", index, one=False)
    code, out, _ = run(capsys, other, "--module", f"{folder}/net.py:make", "--json")
    found = json.loads(out)
    assert code == 1 and found["suspects"] == [{"operator": "linear", "value": value}]
    if layer is not None:
        assert found["first"] == f"layers.{layer}.{weights[(number - 1) % 4]}"
    else:
        assert found["first"] in ("head", "output y")


def test_a_module_with_another_epsilon_is_narrowed_to_the_norm(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, folder / "net.mlpackage", "--module", f"{folder}/net.py:wrong_epsilon")
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("first point to diverge: layers.1.norm "))
    assert code == 1 and lines[at + 1].startswith("1 operations between") and "layer_norm" in lines[at + 2]


def test_every_node_of_a_torchscript_file_is_a_point(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = hashlib.sha256((folder / "net.pt").read_bytes()).hexdigest()
    code, out, _ = run(capsys, folder / "net.mlpackage", "--module", folder / "net.pt", "--sha256", digest)
    assert code == 0 and "softmax %" in out and "layers.2.q %" in out


def test_a_torchscript_file_narrows_a_fault(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = hashlib.sha256((folder / "net.pt").read_bytes()).hexdigest()
    other, value = scale_weight(folder / "net.mlpackage", tmp_path, "linear", 6, one=False)
    code, out, _ = run(capsys, other, "--module", folder / "net.pt", "--sha256", digest, "--json")
    assert code == 1 and json.loads(out)["suspects"] == [{"operator": "linear", "value": value}]


def test_every_node_of_an_exported_program_is_a_point(folder: Path) -> None:
    exported = torch.export.export(load(folder).eval(), (torch.zeros(1, 6, 16),))
    x = b.random((1, 6, 16))
    points = torch_points.record("exported", exported.module(), {"x": x})
    assert "softmax" in [name for name, _ in points.inner]
    report = bisect(mil.load(folder / "net.mlpackage"), {"x": x}, points.inner, points.outputs)
    assert report.first is None and sum(p.status == "agrees" for p in report.points) > 20


def test_points_given_by_name_are_compared_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = f"{folder}/net.py:make"
    ops = [op.output_name for op in mil.load(folder / "net.mlpackage").function().block.walk() if op.type == "linear"]
    code, out, _ = run(capsys, folder / "net.mlpackage", "--module", spec, "--points", f"layers.0.q={ops[4]}", "--json")
    row = next(p for p in json.loads(out)["points"] if p["name"] == "layers.0.q")
    assert row["value"] == ops[4] and row["relative"] > 0.1  # another layer's: given wrongly, and said so
    code, _, err = run(capsys, folder / "net.mlpackage", "--module", spec, "--points", "layers.0.z=a")
    assert code == 2 and "has no such point" in err.splitlines()[-1]
    code, _, err = run(capsys, folder / "net.mlpackage", "--module", spec, "--points", "layers.0.q=a")
    assert code == 2 and "computes no value 'a'" in err.splitlines()[-1]


def test_a_transposed_layout_is_recognised(tmp_path: Path) -> None:
    from coremltools.converters.mil import Builder as mb

    program = b.load(
        tmp_path / "m.mlpackage", [b.tensor((1, 4, 1, 6))],
        lambda x: mb.exp(x=mb.tanh(x=x, name="inner"), name="y"), "fp32",
    )  # fmt: skip
    x = b.random((1, 4, 1, 6))
    inner = np.tanh(x)[:, :, 0].transpose(0, 2, 1)
    report = bisect(program, {"x": x}, [("inner", inner)], [("output", np.exp(np.tanh(x)))])
    assert [(p.name, p.value, p.status) for p in report.points] == [("inner", "inner", "agrees")]


# --- what is run, and what is refused ------------------------------------------------------------------


def test_a_module_may_come_from_the_current_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    for name in ("make", "Net", "model"):
        assert run(capsys, "net.mlpackage", "--module", f"net:{name}")[0] == 0


class Harm:
    """Unpickling one would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", ["pt", "pt2", "pkl"])
def test_a_pickled_module_is_never_loaded(
    folder: Path, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"m.{suffix}"
    torch.save(Harm(tmp_path / "harm"), file) if suffix != "pkl" else file.write_bytes(
        pickle.dumps(Harm(tmp_path / "harm"))
    )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    code, _, err = run(capsys, folder / "net.mlpackage", "--module", file, "--sha256", digest)
    assert code == 2 and err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "harm").exists()


def test_a_torchscript_file_needs_its_sha256(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "net.pt"
    code, _, err = run(capsys, folder / "net.mlpackage", "--module", file)
    assert code == 2 and "a TorchScript file is code; if it is yours, say so with --sha256" in err
    code, _, err = run(capsys, folder / "net.mlpackage", "--module", file, "--sha256", "0" * 64)
    assert code == 2 and "not loaded, since it is code" in err
    copy = tmp_path / "net.pt"
    copy.write_bytes(file.read_bytes())
    contract = {"file": {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}}
    (tmp_path / "net_contract.json").write_text(json.dumps(contract))
    assert run(capsys, folder / "net.mlpackage", "--module", copy)[0] == 0


@pytest.mark.parametrize(("name", "message"), [
    ("broken", "RuntimeError: no weights here"), ("number", "number is a int, neither a module nor a callable"),
    ("missing", "has no 'missing'"), ("torch.zeros", "TypeError: "), ("torch.get_num_threads", "not a torch.nn.Module"),
])  # fmt: skip
def test_a_module_that_cannot_be_made_is_one_line(
    folder: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, folder / "net.mlpackage", "--module", f"{folder}/net.py:{name}", "--input", "x=0")
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: --module ") and message in last


@pytest.mark.parametrize(("spec", "message"), [
    ("nothing", "neither a file nor package.module:callable"), ("no.such:make", "ModuleNotFoundError"),
    ("no/such.py:make", "no file no/such.py"),
])  # fmt: skip
def test_a_module_that_is_not_there_is_one_line(
    folder: Path, spec: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, folder / "net.mlpackage", "--module", spec)
    assert code == 2 and message in err.splitlines()[-1]


def test_a_module_that_takes_other_inputs_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two.py").write_text(
        "import torch\nclass Two(torch.nn.Module):\n    def forward(self, a, b):\n        return a + b\n"
    )
    code, _, err = run(capsys, folder / "net.mlpackage", "--module", f"{tmp_path}/two.py:Two")
    assert code == 2 and "TypeError: " in err.splitlines()[-1] and "missing 1 required" in err.splitlines()[-1]


# --- outputs that are not floats, images -----------------------------------------------------------------


MIXED = """
import beside
import torch


class Mixed(torch.nn.Module):
    def __init__(self, sign=1, shift=0):
        super().__init__()
        self.sign, self.shift = sign, shift

    def forward(self, x):
        x = x / 255 + self.shift
        return torch.softmax(x.mean((2, 3)), -1), (x * self.sign).mean((2, 3)).argmax(-1)


class Scores(Mixed):
    def forward(self, x):
        return super().forward(x)[0]


class Nothing(Mixed):
    def forward(self, x):
        return "no tensor"


def least():
    return Mixed(-1)


def unlike():
    class Unlike(Mixed):
        def forward(self, x):
            return torch.softmax(-9 * x.mean((2, 3)), -1)
    return Unlike()


@torch.jit.script
def fails(x):
    return torch.matmul(x, torch.zeros(7, 7))


class Fails(torch.nn.Module):
    def forward(self, x):
        return fails(x)


def scripted():
    return torch.jit.script(Fails())
"""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of an image, and a package that returns scores and the index of the largest."""
    path = tmp_path_factory.mktemp("mixed")
    (path / "beside.py").write_text("")
    (path / "mixed.py").write_text(MIXED)
    images = [ct.ImageType("image", (1, 3, 4, 5), scale=1 / 255)]
    for name, made, options in (("both", "Mixed", {}), ("scores", "Scores", {"classifier_config": ["z", "y", "a"]})):
        module = torch_points.load_module(f"{path}/mixed.py:{made}", None).eval()
        traced = torch.jit.trace(torch.nn.Sequential(Undo(), module), torch.rand(1, 3, 4, 5))
        if options:
            options = {"classifier_config": ct.ClassifierConfig(options["classifier_config"])}
        ct.convert(traced, inputs=images, minimum_deployment_target=ct.target.iOS18, skip_model_load=True,
                   **options).save(str(path / f"{name}.mlpackage"))  # fmt: skip
    return path


class Undo(torch.nn.Module):
    """The package scales by 1/255 what the module scales itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 255


def test_integer_outputs_are_compared_exactly(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, mixed / "both.mlpackage", "--module", f"{mixed}/mixed.py:Mixed")
    assert code == 0 and sum(line.split()[:1] == ["output"] and "agrees" in line for line in out.splitlines()) == 2
    code, out, _ = run(capsys, mixed / "both.mlpackage", "--module", f"{mixed}/mixed.py:least")
    assert code == 1 and "reduce_argmax" in out.splitlines()[-1]


def test_an_output_without_a_partner_is_said(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, mixed / "both.mlpackage", "--module", f"{mixed}/mixed.py:Scores")
    assert code == 0 and "not compared: output " in out and out.endswith("; but 1 outputs have no partner\n")


def test_a_classifiers_probabilities_are_compared_with_the_scores(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = mixed / "scores.mlpackage"
    assert run(capsys, package, "--module", f"{mixed}/mixed.py:Scores")[0] == 0
    code, out, _ = run(capsys, package, "--module", f"{mixed}/mixed.py:unlike")
    assert code == 1 and "first point to diverge: output " in out


def test_nothing_compared_is_not_a_pass(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, mixed / "scores.mlpackage", "--module", f"{mixed}/mixed.py:Nothing")
    assert code == 2 and not out and "nothing could be compared" in err.splitlines()[-1]


def test_an_image_file_reaches_the_module_as_the_program_sees_it(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.new("RGB", (5, 4), (10, 200, 100)).save(tmp_path / "im.png")
    flags = ["--module", f"{mixed}/mixed.py:Mixed", "--input", f"image={tmp_path}/im.png"]
    assert run(capsys, mixed / "both.mlpackage", *flags)[0] == 0


def test_a_python_file_without_a_name_and_a_failing_script_say_what_is_wrong(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, mixed / "both.mlpackage", "--module", f"{mixed}/mixed.py")
    assert code == 2 and f"a Python file needs the name of a callable in it: {mixed}/mixed.py:NAME" in err
    code, _, err = run(capsys, mixed / "both.mlpackage", "--module", f"{mixed}/mixed.py:scripted")
    assert code == 2 and "TorchScript interpreter" not in err and "mat" in err.splitlines()[-1]
