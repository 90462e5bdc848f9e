"""Files appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.artifacts import (
    atomic_dir,
    atomic_file,
    canonical_json,
    provenance,
    read_json,
    read_text,
    sha256_file,
    write_json,
    write_text,
)
from distill.errors import InputError


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path: Path) -> None:
    path = write_text(tmp_path / "deep/f.txt", "old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["f.txt"]


def test_a_folder_is_replaced_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "package"
    with atomic_dir(path) as temporary:
        (temporary / "config.json").write_text("1")
    with pytest.raises(RuntimeError), atomic_dir(path) as temporary:
        (temporary / "b").write_text("2")
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["config.json"] and [p.name for p in tmp_path.iterdir()] == ["package"]
    with atomic_dir(path) as temporary:
        (temporary / "b").write_text("2")
    assert [p.name for p in path.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["package"]


def test_a_file_in_the_way_of_a_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(InputError, match="in the way"), atomic_dir(tmp_path / "x"):
        pytest.fail("refused before the work, not after it")
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize("name", ["u.mlpackage", "u.contract", "u"])
def test_a_folder_that_is_not_ours_is_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=f"{name}: a folder that is not ours"), atomic_dir(tmp_path / name):
        pytest.fail("refused before the work, not after it")
    assert [p.name for p in tmp_path.rglob("*")] == [name, "thesis.txt"]


@pytest.mark.parametrize("mark", ["u.mlpackage/Manifest.json", "u.mlpackage/PLACEHOLDER", "u.contract/contract.json"])
def test_a_folder_that_is_ours_or_empty_is_replaced(tmp_path: Path, mark: str) -> None:
    target = (tmp_path / mark).parent
    target.mkdir()
    for _ in range(2):
        with atomic_dir(target) as temporary:
            (temporary / Path(mark).name).write_text("new")
    (target / "more").write_text("old")
    with atomic_dir(target):
        pass
    assert not list(target.iterdir())


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_no_regular_file_is_not_replaced_by_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "f"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("elsewhere")}[kind]()
    with pytest.raises(InputError, match="f: something other than a regular file"), atomic_file(path):
        pytest.fail("refused before the work, not after it")
    assert not path.is_file() and [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("read", [read_text, read_json, sha256_file])
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: not a regular file"):
        read(tmp_path / "pipe")


# RLIMIT_FSIZE stands in for a full disk: a write fails half-way, with nothing mocked
_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from distill import checkpoint
from distill.artifacts import atomic_dir, write_text
from distill.errors import InputError, stage_main
from distill.model import Student
from distill.tokenizer import toy_tokenizer
from distill.train.toy import toy_model
folder = Path(sys.argv[1])
student, tokenizer = Student(toy_model(64, 2)), toy_tokenizer()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

def package(path):
    with atomic_dir(path) as temporary:
        (temporary / "small").write_text("x")
        (temporary / "large").write_bytes(bytes(50_000))

attempts = {
    "text": lambda path: write_text(path, "x" * 50_000),
    "checkpoint": lambda path: checkpoint.save(path, student, tokenizer, step=1, loss=1.0, stage="worker"),
    "package": package,
}
def body(argv):
    attempts[sys.argv[2]](folder / "target")
    return 0
raise SystemExit(stage_main(body)(None))
"""


@pytest.mark.parametrize("what", ["text", "checkpoint", "package"])
def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path: Path, what: str) -> None:
    target = tmp_path / "target"
    if what == "package":
        target.mkdir()
        (target / "config.json").write_text("old")
    else:
        target.write_text("old")
    done = subprocess.run([sys.executable, "-c", _FULL_DISK, str(tmp_path), what], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "target" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert ((target / "config.json") if what == "package" else target).read_text() == "old"


def test_an_unwritable_place_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*file/below"):
        write_text(tmp_path / "file/below/x.txt", "x")


def test_json_has_no_nan_and_a_malformed_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "j.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())
    assert read_json(write_json(tmp_path / "j.json", {"a": [1, "é"]})) == {"a": [1, "é"]}
    (tmp_path / "j.json").write_text("{")
    with pytest.raises(InputError, match=r"j\.json"):
        read_json(tmp_path / "j.json")
    with pytest.raises(InputError, match=r"none\.json"):
        read_json(tmp_path / "none.json")


def test_provenance_holds_nothing_that_varies(tmp_path: Path) -> None:
    path = write_text(tmp_path / "in.txt", "x")
    first, second = (provenance({"a": 1}, {"data": path}) for _ in range(2))
    assert canonical_json(first) == canonical_json(second)
    assert first["inputs"]["data"]["sha256"] == sha256_file(path)
    assert canonical_json({"b": 1, "a": 2}) == '{"a":2,"b":1}'
