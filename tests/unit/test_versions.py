"""The version gate asks the packages' metadata, and says how to mend what it finds."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distill import versions
from distill.errors import InputError

Pretend = Callable[[str, str | None], None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Make one distribution look like another version, or absent (None)."""
    real = importlib.metadata.version

    def as_if(name: str, found: str | None) -> None:
        def version(asked: str) -> str:
            if asked != name:
                return real(asked)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(asked)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)

    return as_if


def test_this_machine_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert versions.main(["--skip-ort"]) == 0
    out = capsys.readouterr().out
    assert "SKIPPED      onnxruntime" in out and "--skip-ort" in out and "version gate:" in out.splitlines()[-1]


@pytest.mark.parametrize(("name", "found", "cure"), [
    ("coremltools", "8.3", "pip install 'coremltools==9.0'"),
    ("coremltools", None, "pip install 'coremltools==9.0'"),
    ("numpy", "2.4.1", "<2.4"),
    ("torch", "2.9.0", "pip install 'torch~=2.13.0'"),
])  # fmt: skip
def test_a_wrong_version_fails_and_says_how_to_mend_it(
    name: str, found: str | None, cure: str, pretend: Pretend, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(name, found)
    assert versions.main([]) == 1
    line = next(row for row in capsys.readouterr().out.splitlines() if f" {name} " in row)
    assert line.startswith("FAIL") and cure in line and (found or "absent") in line


def test_an_absent_extra_is_skipped_and_a_wrong_version_of_it_fails(pretend: Pretend) -> None:
    pretend("onnxruntime", None)
    gate = versions.check()["onnxruntime"]
    assert gate.status == "skipped" and "distill[onnx]" in str(gate.reason)
    pretend("onnxruntime", "1.2")
    assert versions.check()["onnxruntime"].status == "fail"


def test_another_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 12, 1, "final", 0))
    assert versions.check()["python"].status == "fail"
    with pytest.raises(InputError, match=r"needs Python 3\.11, this is 3\.12\.1; run it with python3\.11"):
        versions.require_python("export")


def test_an_output_folder_of_a_package_s_name_is_not_mistaken_for_it(
    pretend: Pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnx").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    pretend("onnx", None)
    assert versions.installed("onnx") is None and versions.check()["onnx"].status == "skipped"
    with pytest.raises(InputError, match=r"pip install 'distill\[onnx\]'"):
        versions.optional("onnx", "onnx")


@pytest.mark.parametrize("found", [None, "8.3.0"])
def test_conversion_without_coremltools_9_names_the_placeholder(found: str | None, pretend: Pretend) -> None:
    pretend("coremltools", found)
    with pytest.raises(InputError, match=r"placeholder required.*--allow-placeholder"):
        versions.import_coremltools()
