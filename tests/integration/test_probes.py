"""Probes: a good package passes against its checkpoint, and a spoilt one names the op where the meaning changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill import checkpoint, cli
from distill.convert import coreml
from distill.convert.surgery import main as surgery
from distill.export import toy as toys
from distill.verify import parity, probes
from tests.conftest import Toy
from tests.integration.spoil import Spoilt


def test_every_point_of_a_good_package_agrees_with_its_checkpoint(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "r.json"
    code = cli.main(
        ["probes", "--model", str(toy.prefill), "--checkpoint", str(toy.checkpoint), "--report", str(report)]
    )
    data, shown = json.loads(report.read_text()), capsys.readouterr().out
    assert code == 0 and {gate["status"] for gate in data["gates"].values()} == {"pass"}
    assert [point["name"] for point in data["points"]] == ["block_0", "block_1", "final_norm"]
    assert all(point["psnr"] > 50 for point in data["points"])
    assert data["logits"]["top1"] > 0.95 and data["logits"]["kl"] < 1e-4
    assert data["gates"]["exact"]["observed"] <= parity.EXACT_TOLERANCE
    assert "PSNR" in shown and "3 pass" in shown


CONVS = [f"block_{i}.{name}" for i in range(2) for name in ("attention.q", "attention.v", "mlp.gate", "mlp.down")]


@pytest.mark.parametrize("module", [*CONVS, "head_0"])
def test_a_fault_in_one_convolution_names_that_op_as_the_first_to_diverge(
    toy: Toy, module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = f"{module.replace('.', '_')}_weight_to_fp16"
    package = Spoilt(toy.prefill, tmp_path).edit(constant, lambda values: values * 1.01).seal()
    result = probes.run(package, toy.checkpoint)
    assert result.first is not None
    assert (result.first.name, result.first.op) == (module, "conv")
    assert result.gates["exact"].status == "fail" and f"conv -> {result.first.value}" in str(
        result.gates["exact"].reason
    )
    assert cli.main(["probes", "--model", str(package), "--checkpoint", str(toy.checkpoint)]) == 1
    assert ": op conv -> " in capsys.readouterr().out


def test_a_nan_fails_every_comparison_behind_it(toy: Toy, tmp_path: Path) -> None:
    package = Spoilt(toy.prefill, tmp_path).edit("block_1_mlp_up_weight_to_fp16", lambda v: v * float("nan")).seal()
    result = probes.run(package, toy.checkpoint)
    assert {gate.status for gate in result.gates.values()} == {"fail"}
    assert result.first is not None and result.first.name == "block_1.mlp.up"


def test_a_package_made_from_another_checkpoint_is_refused(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = checkpoint.load(toy.checkpoint)
    loaded.student.model.norm.weight.data[0] += 1e-3
    other = checkpoint.save(tmp_path / "other.pt", loaded.student, loaded.tokenizer, step=1, loss=0.0, stage="toy")
    assert cli.main(["probes", "--model", str(toy.prefill), "--checkpoint", str(other)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(other) in error and "other weights" in error


def test_a_decode_package_is_refused(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probes", "--model", str(toy.decode), "--checkpoint", str(toy.checkpoint)]) == 2
    assert "this one is decode" in capsys.readouterr().err


def test_a_package_from_onnx_is_compared_at_its_named_points(tmp_path: Path) -> None:
    """Through surgery, as `make smoke_toy` does."""
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    source, clean = tmp_path / "toy.onnx", tmp_path / "clean.onnx"
    contract = toys.make_onnx(source, 0)
    assert surgery(["--in", str(source), "--out", str(clean)]) == 0
    package = tmp_path / "x.mlpackage"
    coreml.run(coreml.ConvertConfig(clean, package, "onnx", 64, contract=contract))
    result = probes.run(package, tmp_path / "toy_checkpoint.pt")
    names = [point.name for point in result.points]
    assert set(names) <= {"block_0", "block_1", "final_norm"} and "final_norm" in names
    assert {name: gate.status for name, gate in result.gates.items()} == {
        "points_fp16": "pass", "logits_fp16": "pass", "exact": "skipped",
    }  # fmt: skip
    assert cli.main(["contracts", "--model", str(package), "--seq", "64"]) == 0
