"""Bad input: exit code 2 and one line that names the thing; nothing is run, nothing is written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import checkpoint, cli
from distill.artifacts import sha256_file
from distill.convert import coreml
from distill.export import pytorch
from tests.conftest import Toy

Refused = Callable[..., str]


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden and temporary ones too, with its sha256."""
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a stage in an empty folder that must stay as it was; returns its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> str:
        before = tree(tmp_path)
        assert cli.main([str(a) for a in argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith(("error: ", "surgery: ")) and error.count("\n") == 1, error
        assert tree(tmp_path) == before
        return error

    return run


@pytest.mark.parametrize("argv", [
    ["toy-distill", "--in", "absent.x", "--out", "c.pt"],
    ["worker", "--config", "absent.x"],
    ["export", "--checkpoint", "absent.x", "--out", "d"],
    ["convert", "--in", "absent.x", "--out", "p.mlpackage"],
    ["convert", "--backend", "onnx", "--in", "absent.x", "--out", "p.mlpackage"],
    ["convert", "--in", "absent.x", "--out", "p.mlpackage", "--allow-placeholder"],
    ["convert-all", "--in", "absent.x", "--out", "d"],
    ["surgery", "--in", "absent.x", "--out", "clean.onnx"],
    ["contracts", "--model", "absent.x", "--report", "r.json"],
    ["probes", "--model", "absent.x", "--checkpoint", "c.pt"],
    ["ane", "absent.x"],
    ["ask", "absent.x", "Will it rain?"],
], ids=lambda argv: " ".join(argv[:2]))  # fmt: skip
def test_a_missing_file_is_named(argv: list[str], refused: Refused) -> None:
    assert "absent.x" in refused(*argv)


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe not this", b"{", b'{"a": 1}\n', b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("argv", [
    ["toy-distill", "--in", "bad.x", "--out", "c.pt"],
    ["worker", "--config", "bad.x"],
    ["export", "--checkpoint", "bad.x", "--out", "d"],
    ["convert", "--in", "bad.x", "--out", "p.mlpackage"],
    ["convert", "--backend", "onnx", "--in", "bad.x", "--out", "p.mlpackage"],
    ["surgery", "--in", "bad.x", "--out", "clean.onnx"],
    ["contracts", "--model", "bad.x"],
    ["ane", "bad.x"],
    ["ask", "bad.x", "Will it rain?"],
], ids=lambda argv: " ".join(argv[:2]))  # fmt: skip
def test_a_malformed_file_is_named(argv: list[str], content: bytes, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "bad.x").write_bytes(content)
    assert "bad" in refused(*argv)


@pytest.mark.parametrize("argv", [
    ["toy-distill", "--in", "pipe.x", "--out", "c.pt"],
    ["validate-kd", "--in", "pipe.x"],
    ["worker", "--config", "pipe.x"],
    ["export", "--checkpoint", "pipe.x", "--out", "d"],
    ["convert", "--in", "pipe.x", "--out", "p.mlpackage"],
], ids=lambda argv: argv[0])  # fmt: skip
def test_a_pipe_is_refused_and_not_waited_for(argv: list[str], refused: Refused, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.x")
    assert "pipe.x" in refused(*argv)


@pytest.mark.parametrize("name", ["u.mlpackage", "u.contract"])
def test_a_folder_of_the_user_s_in_the_way_of_a_package_is_kept(
    toy: Toy, name: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("mine")
    monkeypatch.setattr(coreml, "import_coremltools", lambda: pytest.fail("refused before the work, not after it"))
    source = toy.exported / "student_prefill_T64.pt"
    assert f"{name}: a folder that is not ours" in refused("convert", "--in", source, "--out", "u.mlpackage")


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "named"), [
    ("data: kd.jsonl\nbatchsize: 3\n", "unknown key 'batchsize'; the nearest key is 'batch_size'"),
    ("data: kd.jsonl\nmodel: {hiden_size: 64}\n", "'model.hiden_size'; the nearest key is 'model.hidden_size'"),
    ("data: kd.jsonl\nloss_weights: {kl: 1}\n", "the nearest key is 'loss_weights.kl_div'"),
    ("data: kd.jsonl\nlr: fast\n", "lr"),
    ("data: kd.jsonl\ndata: other.jsonl\n", "given twice"),
    ("data: [\n", "not valid YAML"),
    ("- 1\n", "expected a mapping"),
])  # fmt: skip
def test_a_wrong_key_or_value_of_a_configuration_is_named(
    text: str, named: str, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    error = refused("worker", "--config", "c.yaml")
    assert "c.yaml" in error and named in error


def test_flags_that_make_no_sense_are_named(toy: Toy, refused: Refused, tmp_path: Path) -> None:
    assert "--n 0" in refused("toy-kd", "--out", "d.jsonl", "--n", 0)
    assert "--n 99999" in refused("toy-kd", "--out", "d.jsonl", "--n", 99999)
    assert "--dmodel 50" in refused("toy-distill", "--in", toy.data, "--out", "c.pt", "--dmodel", 50)
    assert "--vocab" in refused("toy-training", "--out-dir", "t", "--vocab", 100)
    assert "--vocab" in refused("toy-training", "--out-dir", "t", "--vocab", 99999999999)
    assert "are free" in refused("toy-training", "--out-dir", "t", "--nlayers", 99999999)
    assert "--max-new-tokens" in refused("ask", toy.prefill, "Why?", "--max-new-tokens", -3)
    assert "not valid Unicode" in refused("ask", toy.prefill, "\udcff")
    assert "none.jsonl: no such dataset" in refused("validate-kd", "--in", "none.jsonl")
    assert "give one question" in refused("ask", toy.prefill)
    assert "ends in .mlpackage" in refused(
        "convert", "--in", toy.exported / "student_prefill_T64.pt", "--out", "model.zip"
    )
    assert "iOS18" in refused(
        "convert", "--in", toy.exported / "student_decode.pt", "--out", "p.mlpackage", "--target", "iOS16"
    )
    assert "leaves no room in its 64" in refused("ask", toy.prefill, "why? " * 100)


def test_a_length_that_is_not_enumerated_is_named_with_those_that_are(toy: Toy, refused: Refused) -> None:
    assert "--seq 96" in refused("export", "--checkpoint", toy.checkpoint, "--seq", 96, "--enumerated-T", 64, 128)
    assert "distinct" in refused("export", "--checkpoint", toy.checkpoint, "--enumerated-T", 64, 64)
    source = toy.exported / "student_prefill_T64.pt"
    error = refused("convert", "--in", source, "--out", "p.mlpackage", "--seq", 96)
    assert "--seq 96" in error and "T=96 is not enumerated" in error and "64, 128" in error
    assert "this file is T=64" in refused("convert", "--in", source, "--out", "p.mlpackage", "--seq", 128)
    error = refused("contracts", "--model", toy.prefill, "--seq", 128, "--report", "r.json")
    assert "--seq 128" in error and "[64]" in error


def test_lengths_beyond_the_model_s_positions_are_refused(toy: Toy, refused: Refused) -> None:
    error = refused("export", "--checkpoint", toy.checkpoint, "--out", "d", "--enumerated-T", 64, 1024)
    assert "1024" in error and "512" in error


# --- checkpoints and programs ----------------------------------------------------------------------------------------


def spoil_checkpoint(toy: Toy, path: Path, **changes: Any) -> Path:
    data = torch.load(toy.checkpoint, weights_only=True)
    for key, value in changes.items():
        data[key] = value(data[key]) if callable(value) else value
    torch.save({k: v for k, v in data.items() if v is not None}, path)
    return path


CHECKPOINTS: dict[str, tuple[dict[str, Any], str]] = {
    "of another depth": ({"config": lambda c: c | {"num_hidden_layers": 3}}, "weights of another model"),
    "of another width": ({"config": lambda c: c | {"hidden_size": 128}}, "weights of another model"),
    "with a key too many": ({"model": lambda m: m | {"extra": torch.zeros(1)}}, "weights of another model"),
    "with an unknown setting": ({"config": lambda c: c | {"n_experts": 8}}, "n_experts"),
    "without weights": ({"model": None}, "no key 'model'"),
    "without a tokenizer": ({"tokenizer": None}, "no key 'tokenizer'"),
    "with another tokenizer": ({"tokenizer": lambda t: t.replace("Will", "Wont", 1) + " "}, "tokenizer_sha256"),
    "with fewer rows than its tokenizer has ids": (
        {
            "config": lambda c: c | {"vocab_size": 512},
            "model": lambda m: m | {n: m[n][:512] for n in ("lm_head.weight", "model.embed_tokens.weight")},
        },
        "vocab_size 512 is smaller than the tokenizer's",
    ),
}


@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_a_checkpoint_that_is_not_one_of_ours_is_refused(
    toy: Toy, fault: str, refused: Refused, tmp_path: Path
) -> None:
    changes, named = CHECKPOINTS[fault]
    path = spoil_checkpoint(toy, tmp_path / "c.pt", **changes)
    error = refused("export", "--checkpoint", path, "--out", "d")
    assert str(path) in error and named in error


class Bomb:
    """Unpickling it would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_bomb_is_not_set_off(toy: Toy, refused: Refused, tmp_path: Path) -> None:
    marker = tmp_path / "went-off"
    bomb = tmp_path / "bomb.pt"
    torch.save({"model": Bomb(marker)}, bomb)
    torch.load(bomb, weights_only=False)
    assert marker.is_dir(), "the bomb is a dud: it proves nothing"
    marker.rmdir()
    assert "bomb.pt" in refused("export", "--checkpoint", bomb, "--out", "d")
    assert "bomb.pt" in refused("convert", "--in", bomb, "--out", "p.mlpackage")
    shutil.copy(toy.exported / "student_prefill_T64_contract.json", tmp_path / "bomb_contract.json")
    assert "bomb.pt" in refused("convert", "--in", bomb, "--out", "p.mlpackage")
    assert "bomb.pt" in refused("probes", "--model", toy.prefill, "--checkpoint", bomb)
    assert not marker.exists()


def copy_export(toy: Toy, folder: Path) -> Path:
    shutil.copytree(toy.exported, folder)
    return folder / "student_prefill_T64.pt"


def test_a_program_that_its_contract_does_not_describe_is_not_loaded(
    toy: Toy, refused: Refused, tmp_path: Path
) -> None:
    source = copy_export(toy, tmp_path / "e")
    source.write_bytes(source.read_bytes() + b"\0")
    error = refused("convert", "--in", source, "--out", "p.mlpackage")
    assert str(source) in error and "not loaded, since it is code" in error
    shutil.copy(toy.exported / "student_prefill_T128.pt", source)
    assert "not loaded" in refused("convert", "--in", source, "--out", "p.mlpackage")


def test_a_program_that_is_no_torchscript_is_refused_though_its_contract_matches(
    toy: Toy, refused: Refused, tmp_path: Path
) -> None:
    source = copy_export(toy, tmp_path / "e")
    contract = source.with_name("student_prefill_T64_contract.json")
    for content in (b"not TorchScript", source.read_bytes()[:-1000]):
        source.write_bytes(content)
        data = json.loads(contract.read_text())
        data["file"] |= {"sha256": sha256_file(source), "bytes": len(content)}
        contract.write_text(json.dumps(data))
        assert f"{source}: not a TorchScript program" in refused("convert", "--in", source, "--out", "p.mlpackage")


CONTRACTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no file": (lambda d: d.update(file=None), "is a package's contract"),
    "a package's": (lambda d: d.update(schema="distill-package/1"), "is a package's contract"),
    "an unknown schema": (lambda d: d.update(schema="distill-export/9"), "not a contract"),
    "a file outside the folder": (lambda d: d["sidecar"]["goldens"].update(name="../x"), "outside its folder"),
    "an unknown role": (lambda d: d["sidecar"].update(more=d["sidecar"]["goldens"]), "more"),
    "goldens of another sha256": (lambda d: d["sidecar"]["goldens"].update(sha256="0" * 64), "does not match"),
    "a shape that failed": (lambda d: d["shape_validation"]["64"].update(status="fail", reason="far off"), "far off"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CONTRACTS)
def test_a_wrong_contract_of_an_export_is_refused(toy: Toy, fault: str, refused: Refused, tmp_path: Path) -> None:
    change, named = CONTRACTS[fault]
    source = copy_export(toy, tmp_path / "e")
    contract = source.with_name("student_prefill_T64_contract.json")
    data = json.loads(contract.read_text())
    change(data)
    contract.write_text(json.dumps(data))
    assert named in refused("convert", "--in", source, "--out", "p.mlpackage")


def test_an_export_folder_that_lacks_a_program_is_not_converted_in_part(
    toy: Toy, refused: Refused, tmp_path: Path
) -> None:
    source = copy_export(toy, tmp_path / "e")
    for file in source.parent.glob("student_prefill_T128*"):
        file.unlink()
    assert "lacks the enumerated T = 128" in refused("convert-all", "--in", source.parent, "--out", "out")


# --- the machine -----------------------------------------------------------------------------------------------------


def test_another_python_is_named_with_the_one_that_is_needed(
    toy: Toy, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 12, 4, "final", 0))
    error = refused("export", "--checkpoint", toy.checkpoint, "--out", "d")
    assert "Python version error: needs Python 3.11, this is 3.12.4; run it with python3.11" in error


@pytest.fixture
def no_coremltools(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which coremltools is not installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "coremltools":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "coremltools", None)


def test_without_coremltools_conversion_says_what_is_required(toy: Toy, refused: Refused, no_coremltools: None) -> None:
    error = refused("convert", "--in", toy.exported / "student_prefill_T64.pt", "--out", "p.mlpackage")
    assert "placeholder required" in error and "pip install 'coremltools>=9.0'" in error
    assert "--allow-placeholder" in error


def test_a_placeholder_is_skipped_by_every_later_stage_and_passes_none(
    toy: Toy, no_coremltools: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package, report = tmp_path / "p.mlpackage", tmp_path / "r.json"
    source = toy.exported / "student_prefill_T64.pt"
    assert cli.main(["convert", "--in", str(source), "--out", str(package), "--allow-placeholder"]) == 0
    assert "SKIPPED" in capsys.readouterr().out
    assert cli.main(["contracts", "--model", str(package), "--report", str(report)]) == 2
    out = capsys.readouterr()
    data = json.loads(report.read_text())
    assert {gate["status"] for gate in data["gates"].values()} == {"skipped"} and data["counts"]["pass"] == 0
    assert "SKIPPED" in out.out and "PASS" not in out.out and "placeholder" in out.err
    assert cli.main(["ane", str(package)]) in (0, 2)
    out = capsys.readouterr()
    assert "placeholder" in out.out + out.err and "pass" not in (out.out + out.err).lower()
    for argv in (["probes", "--model", package, "--checkpoint", toy.checkpoint], ["ask", package, "Why?"]):
        assert cli.main([str(a) for a in argv]) == 2
        error = capsys.readouterr().err
        assert f"{package} is a placeholder" in error and error.count("\n") == 1


@pytest.mark.parametrize("target", coreml.TARGETS)
def test_every_target_that_is_offered_works(toy: Toy, target: str, tmp_path: Path) -> None:
    config = coreml.ConvertConfig(toy.exported / "student_prefill_T64.pt", tmp_path / "p.mlpackage", target=target)
    assert coreml.run(config) is not None


def test_converting_onnx_says_nothing_on_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy-onnx", "--out", str(tmp_path / "t.onnx")]) == 0
    capfd.readouterr()
    out = str(tmp_path / "t.mlpackage")
    assert cli.main(["convert", "--backend", "onnx", "--in", str(tmp_path / "t.onnx"), "--out", out]) == 0
    assert capfd.readouterr().err == ""


def test_allowing_a_placeholder_makes_none_where_conversion_works(toy: Toy, tmp_path: Path) -> None:
    package = tmp_path / "p.mlpackage"
    config = coreml.ConvertConfig(toy.exported / "student_prefill_T64.pt", package, allow_placeholder=True)
    assert coreml.run(config) is not None and not (package / "PLACEHOLDER").exists()


def test_the_export_of_a_checkpoint_that_saw_no_toy_set_needs_no_toy_flag(
    toy: Toy, refused: Refused, tmp_path: Path
) -> None:
    loaded = checkpoint.load(toy.checkpoint)
    other = checkpoint.save(tmp_path / "o.pt", loaded.student, loaded.tokenizer, step=1, loss=0.0, stage="worker")
    assert "--toy" in refused("export", "--checkpoint", other, "--out", "d", "--toy", "--enumerated-T", 64)
    pytorch.run(pytorch.ExportConfig(other, tmp_path / "d", "prefill", 32, (32,)))
