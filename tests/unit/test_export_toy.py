"""The toy exports where an extra is absent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distill import cli, versions


@pytest.mark.parametrize("absent", ["onnx", "onnxscript", "onnxruntime"])
def test_the_onnx_toy_without_its_extra_says_what_to_install_and_writes_nothing(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    really = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: None if name == absent else really(name))
    assert cli.main(["toy-onnx", "--out", str(tmp_path / "onnx" / "toy.onnx")]) == 2
    assert f"{absent} is not installed: pip install 'distill[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


def test_a_stage_whose_import_lacks_an_extra_says_so_in_one_line(tmp_path: Path) -> None:
    """In a process of its own: the module must not be imported yet."""
    code = (
        "import importlib.metadata as m, sys\n"
        "really = m.version\n"
        "def version(name):\n"
        "    if name == 'onnx': raise m.PackageNotFoundError(name)\n"
        "    return really(name)\n"
        "m.version = version\n"
        "from distill.cli import main\n"
        f"sys.exit(main(['surgery', '--in', 'a.onnx', '--out', {str(tmp_path / 'b.onnx')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stderr == (
        "error: the package onnx is not installed: pip install 'distill[onnx]'\n"
    )
