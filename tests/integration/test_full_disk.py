"""A full disk while writing: exit code 2, one line that names the file, the old files as they were, nothing left over.

The process's limit on the size of a file stands in for the disk: both reach the writer as a failed write(2).
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill import checkpoint, cli
from distill.errors import InputError
from tests.conftest import Toy
from tests.integration.test_bad_input import tree


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path) -> dict[str, str]:
    """Files but those of TensorBoard, which are a log."""
    return {name: sha256 for name, sha256 in tree(folder).items() if not name.startswith("runs/")}


def stage(name: str, toy: Toy) -> list[str]:
    """Arguments of each stage that writes something large."""
    program = str(toy.exported / "student_prefill_T64.pt")
    return {
        "dataset": ["toy-kd", "--out", "d.jsonl", "--n", "64"],
        "checkpoint": ["toy-distill", "--in", str(toy.data), "--out", "c.pt", "--epochs", "1"],
        "export": ["export", "--checkpoint", str(toy.checkpoint), "--out", "e", "--mode", "prefill", "--seq", "128",
                   "--enumerated-T", "128"],
        "package": ["convert", "--in", program, "--out", "p.mlpackage"],
        "report": ["contracts", "--model", str(toy.prefill), "--report", "r.json"],
    }[name]  # fmt: skip


CASES = [
    ("dataset", 5_000, "d.jsonl"),
    ("checkpoint", 300_000, "c.pt"),
    ("export", 500, "tokenizer.json"),
    ("export", 100_000, "student_prefill_T128.pt"),
    ("export", 1_600_000, "student_prefill_T128_goldens.safetensors"),
    ("package", 20_000, "temporary files"),
    ("package", 600_000, "p.contract"),
    ("report", 1_000, "r.json"),
]


@pytest.mark.parametrize(("what", "size", "named"), CASES, ids=lambda value: str(value))
def test_a_full_disk_leaves_what_was_there_and_names_the_file(
    toy: Toy, folder: Path, what: str, size: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = stage(what, toy)
    with no_file_larger_than(size):
        assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error, error
    assert written(folder) == {}
    assert cli.main(argv) == 0  # with room again, it works
    before = written(folder)
    with no_file_larger_than(size):
        assert cli.main([*argv, *(["--toy"] if what == "export" else [])]) == 2  # another input, or its files are kept
    assert written(folder) == before


@pytest.mark.parametrize("size", [1_000, 70_000, 500_000, 1_000_000, 1_050_000])
def test_a_checkpoint_cut_off_anywhere_is_an_error_and_not_a_file(toy: Toy, folder: Path, size: int) -> None:
    """Wherever in the archive the write fails: header, weights, or the directory at its end."""
    loaded = checkpoint.load(toy.checkpoint)
    with no_file_larger_than(size), pytest.raises(InputError, match=r"cannot write .*c\.pt"):
        checkpoint.save(folder / "c.pt", loaded.student, loaded.tokenizer, step=1, loss=0.0, stage="toy")
    assert tree(folder) == {}
