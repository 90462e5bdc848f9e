"""`distill STAGE`: help is quick and loads no torch, every stage answers --help, an unknown stage names the nearest."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import distill
from distill import cli

ROOT = Path(__file__).resolve().parent.parent


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("code", ["import distill", "from distill.cli import main; main(['--help'])"])
def test_importing_the_package_and_asking_for_help_load_no_heavy_module(code: str) -> None:
    result = python("-c", f"import sys; {code}; print(sorted(sys.modules), file=sys.stderr)")
    assert result.returncode == 0
    loaded = set(eval(result.stderr))
    assert not loaded & {
        "torch",
        "numpy",
        "coremltools",
        "transformers",
        "onnx",
        "tokenizers",
        "msgspec",
        "yaml",
        "rich",
    }


def test_help_takes_less_than_three_tenths_of_a_second() -> None:
    """The best of five, since other work may share the machine."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert python("-m", "distill", "--help").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


def test_help_lists_every_stage_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == cli.main([]) == 0
    text = capsys.readouterr().out
    listed = [line.split()[0] for line in text.split("usage:")[2].splitlines()[2:] if line.strip()]
    assert listed == list(cli.STAGES)


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"distill {distill.__version__}\n"


@pytest.mark.parametrize("stage", cli.STAGES)
def test_every_stage_answers_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([stage, "--help"])
    assert stopped.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "nearest"), [("exprot", "export"), ("contract", "contracts"), ("8ball", "8-ball")])
def test_an_unknown_stage_exits_2_and_names_the_nearest(
    given: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and repr(given) in error and f"did you mean {nearest!r}?" in error


def test_an_unknown_flag_exits_2() -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", "--input", "x"])
    assert stopped.value.code == 2
