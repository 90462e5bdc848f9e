"""`make coreml-worker`: packages of unchanged programs are kept; a shape that failed in export hides no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distill import cli
from distill.artifacts import sha256_file
from distill.convert import worker
from tests.integration.test_bad_input import tree
from tests.integration.test_export_resume import export, faults, trained  # noqa: F401  fixtures

NAMES = ["model.mlpackage", "prefill_T32.mlpackage", "prefill_T48.mlpackage"]


@pytest.fixture(scope="module")
def converted(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("converted")
    assert export(trained[0], folder / "e") == 0
    assert [p.name for p in worker.run(folder / "e", folder / "w").packages] == NAMES
    return folder


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "f"))


def convert_all(folder: Path) -> int:
    return cli.main(["convert-all", "--in", str(folder / "e"), "--out", str(folder / "w")])


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """kept or converting, package by package."""
    return [line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]]


def test_packages_of_unchanged_programs_are_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(folder)
    assert convert_all(folder) == 0
    assert told(capsys) == ["kept"] * 3 and tree(folder) == before


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of weight.bin": lambda w: _flip(w / "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"),
    "a sidecar file gone": lambda w: (w / "model.contract/goldens.safetensors").unlink(),
    "a file too many": lambda w: (w / "model.mlpackage/Data/more").write_text("?"),
    "the package gone": lambda w: shutil.rmtree(w / "model.mlpackage"),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_package_is_made_again(folder: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    before = tree(folder)
    DAMAGES[damage](folder / "w")
    assert convert_all(folder) == 0
    assert told(capsys) == ["converting", "kept", "kept"] and tree(folder) == before


def test_a_damaged_record_keeps_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "w/.converted.json").write_text("[")
    assert convert_all(folder) == 0
    assert told(capsys) == ["converting"] * 3


def test_a_program_of_another_model_is_refused(
    folder: Path, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    cli.main(["export", "--checkpoint", str(trained[1]), "--out", str(folder / "e"), "--mode", "decode",
              "--enumerated-T", "16", "32", "48"])  # fmt: skip
    before = tree(folder / "w")
    assert convert_all(folder) == 2
    assert "student_decode_contract.json is of another model" in capsys.readouterr().err
    assert tree(folder / "w") == before


def test_a_shape_that_failed_is_named_the_others_are_converted_and_its_old_package_goes(
    folder: Path, trained: tuple[Path, Path], faults: dict[int, str], capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    faults[32] = "memory"
    assert export(trained[1], folder / "e") == 1
    capsys.readouterr()
    assert convert_all(folder) == 1
    said = capsys.readouterr().out
    assert "not converted: student_prefill_T32 failed its validation when it was exported: " in said
    assert said.splitlines()[-1].endswith("2 packages in " + str(folder / "w") + "; failed: student_prefill_T32")
    assert sorted(p.name for p in (folder / "w").glob("*.mlpackage")) == ["model.mlpackage", "prefill_T48.mlpackage"]
    sha256 = json.loads((folder / "w/model.contract/contract.json").read_text())["made_by"]["inputs"]["source"][
        "sha256"
    ]
    assert sha256 == sha256_file(folder / "e/student_prefill_T16.pt")
