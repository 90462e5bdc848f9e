"""The toy exports where an extra is absent."""

from __future__ import annotations

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
