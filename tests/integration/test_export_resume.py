"""`make pytorch-worker` goes on where it was stopped, and what lies in its folder is of one run, wherever it died.

`EXPORT_STEP=1 pytest tests/integration/test_export_resume.py -k any_change` kills before every change of a file.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import checkpoint, cli
from distill.artifacts import sha256_file
from distill.contract import Contract, read_contract
from distill.export import pytorch, resume
from distill.export.toy import toy_student
from distill.export.twin import PrefillTwin
from distill.tokenizer import toy_tokenizer
from tests.integration.test_full_disk import no_file_larger_than

_FORKS = multiprocessing.get_context("forkserver")  # a child starts in milliseconds, with torch imported
_FORKS.set_forkserver_preload(["distill.export.pytorch", "distill.export.toy"])
STEP = int(os.environ.get("EXPORT_STEP", "7"))
LENGTHS = (16, 32, 48)
FIRST = "student_prefill_T16"


def save(path: Path, seed: int) -> Path:
    student, tokenizer = toy_student(seed), toy_tokenizer()
    return checkpoint.save(path, student, tokenizer, step=0, loss=math.nan, stage="random")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("trained")
    return save(folder / "one.pt", 0), save(folder / "two.pt", 1)


def export(saved: Path, out: Path, *more: str, mode: str = "prefill") -> int:
    lengths = map(str, LENGTHS)
    return cli.main(["export", "--checkpoint", str(saved), "--out", str(out), "--mode", mode, "--seq", "16",
                     "--enumerated-T", *lengths, *more])  # fmt: skip


def contracts(out: Path) -> dict[str, Contract]:
    return {path.name.removesuffix("_contract.json"): read_contract(path) for path in out.glob("*_contract.json")}


def require_consistent(out: Path) -> None:
    """Every contract names files that are there and are its own."""
    for name, contract in contracts(out).items():
        for ref in (contract.file, *contract.sidecar.values()):
            assert ref is not None and sha256_file(out / ref.name) == ref.sha256, (name, ref)


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """kept or made, shape by shape."""
    return [line.split(", ")[0] for line in capsys.readouterr().out.splitlines() if "=" in line]


def before_change(count: int) -> None:
    """SIGKILL before the change of a file or folder that comes after `count` others."""
    left = iter(range(count))

    def armed(change: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return run

    os.replace, os.unlink, os.rmdir = armed(os.replace), armed(os.unlink), armed(os.rmdir)


def after_shape(count: int) -> None:
    """SIGKILL when `count` shapes are finished and the next is begun."""
    stage, done = resume.Workspace.stage, []

    def run(*arguments: Any) -> None:
        stage(*arguments)
        done.append(1)

    def kept(*_: Any) -> None:
        if len(done) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    resume.Workspace.stage, resume.Workspace.kept = run, kept  # type: ignore[assignment]


def _child(saved: Path, out: Path, arm: Callable[[int], None], count: int) -> None:
    arm(count)
    pytorch.run(pytorch.ExportConfig(saved, out, "prefill", 16, LENGTHS))


def killed(saved: Path, out: Path, arm: Callable[[int], None], count: int) -> bool:
    child = _FORKS.Process(target=_child, args=(saved, out, arm, count))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def test_killed_at_any_change_of_a_file_no_contract_names_another_run_s_file_and_the_next_run_finishes(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = trained
    assert export(old, tmp_path / "old") == 0
    weights = {contract.weights_sha256 for contract in contracts(tmp_path / "old").values()}
    deaths = 0
    for count in range(1, 200, STEP):
        out = tmp_path / str(count)
        shutil.copytree(tmp_path / "old", out)
        died = killed(new, out, before_change, count)
        require_consistent(out)
        assert export(new, out) == 0
        require_consistent(out)
        found = contracts(out)
        assert len(found) == 3 and weights.isdisjoint(c.weights_sha256 for c in found.values())
        assert sorted(path.name for path in out.glob(".*")) == []
        deaths += died
        if not died:
            break
    assert deaths > 5


@pytest.mark.parametrize("finished", [1, 2])
def test_shapes_finished_before_a_kill_are_kept(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: int
) -> None:
    assert killed(trained[0], tmp_path, after_shape, finished)
    assert contracts(tmp_path) == {}
    assert export(trained[0], tmp_path) == 0
    states = ["kept"] * finished + ["made"] * (3 - finished)
    assert told(capsys) == [f"prefill T={t}: {state}" for t, state in zip(LENGTHS, states, strict=True)]


def test_a_second_run_keeps_everything_bit_for_bit(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(trained[0], tmp_path, mode="both") == 0
    before = {path.name: sha256_file(path) for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert export(trained[0], tmp_path, mode="both") == 0
    assert [line.split(": ")[1] for line in told(capsys)] == ["kept"] * 4
    assert {path.name: sha256_file(path) for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["{}.pt", "{}_goldens.safetensors", "{}_evaluation.json", "{}_contract.json"])
@pytest.mark.parametrize("damage", ["a bit", "half", "gone"])
def test_a_damaged_shape_is_made_again_and_the_others_are_kept(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    export(trained[0], tmp_path)
    path = tmp_path / name.format(FIRST)
    data = bytearray(path.read_bytes())
    spot = data.find(b'"max_abs_err": ') + 15 if name.endswith("contract.json") else len(data) // 2
    if damage == "gone":
        path.unlink()
    else:
        data[spot] ^= 1
        path.write_bytes(data if damage == "a bit" else data[: len(data) // 2])
    capsys.readouterr()
    assert export(trained[0], tmp_path) == 0
    assert told(capsys) == ["prefill T=16: made", "prefill T=32: kept", "prefill T=48: kept"]
    require_consistent(tmp_path)


def _other_lengths(saved: tuple[Path, Path], out: Path, _patch: pytest.MonkeyPatch) -> int:
    return cli.main(["export", "--checkpoint", str(saved[0]), "--out", str(out), "--mode", "prefill",
                     "--enumerated-T", "16", "32", "64"])  # fmt: skip


def _other_code(saved: tuple[Path, Path], out: Path, patch: pytest.MonkeyPatch) -> int:
    patch.setattr(resume, "_code", lambda _parts: {"changed": ""})
    return export(saved[0], out)


CHANGES: dict[str, Callable[[tuple[Path, Path], Path, pytest.MonkeyPatch], int]] = {
    "the checkpoint": lambda saved, out, _: export(saved[1], out),
    "the formats": lambda saved, out, _: export(saved[0], out, "--formats", "blocks=int8"),
    "the lengths": _other_lengths,
    "the code": _other_code,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_input_makes_all_anew(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:  # fmt: skip
    export(trained[0], tmp_path)
    capsys.readouterr()
    assert CHANGES[what](trained, tmp_path, monkeypatch) == 0
    assert [line.split(": ")[1] for line in told(capsys)] == ["made"] * 3
    require_consistent(tmp_path)


class _Off(PrefillTwin):
    """Wrong by one part in a hundred at one length, not finite at another, and out of memory at a third."""

    faults: dict[int, str] = {}  # noqa: RUF012

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = super().forward(input_ids)
        fault = self.faults.get(int(input_ids.shape[1]))
        if fault == "memory":
            torch.empty(1 << 60)
        return logits * {"off": 1.01, "nan": math.nan}.get(fault or "", 1.0)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, str]]:
    monkeypatch.setattr("distill.export.programs.PrefillTwin", _Off)
    monkeypatch.setattr(_Off, "faults", {})
    yield _Off.faults


REASONS = {"off": "differs from the training model", "nan": "differs from the training model by nan",
           "memory": "RuntimeError: "}  # fmt: skip


@pytest.mark.parametrize("fault", REASONS)
def test_a_secondary_shape_s_failure_is_recorded_in_every_contract_and_hides_no_other(
    trained: tuple[Path, Path], tmp_path: Path, faults: dict[int, str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    faults[32] = fault
    assert export(trained[0], tmp_path, mode="both") == 1
    said = capsys.readouterr().out
    assert "prefill T=32: made, fail" in said and "failed: student_prefill_T32" in said
    for t in LENGTHS:  # as a user reads it
        contract = json.loads((tmp_path / f"student_prefill_T{t}_contract.json").read_text())
        checked = contract.get("shape_validation", {})
        assert contract.get("enumerated_T", []) == [16, 32, 48]
        assert {k: v["status"] for k, v in checked.items()} == {"16": "pass", "32": "fail", "48": "pass"}
        assert REASONS[fault] in checked["32"]["reason"]
    assert contracts(tmp_path)["student_decode"].shape_validation["48"].status == "pass"
    faults.clear()
    assert export(trained[0], tmp_path, mode="both") == 0  # with the fault gone, only what failed is made
    assert told(capsys) == ["prefill T=16: kept", "prefill T=32: made", "prefill T=48: kept", "decode C=48: kept"]


def test_a_shape_without_a_program_leaves_none_of_an_earlier_run(
    trained: tuple[Path, Path], tmp_path: Path, faults: dict[int, str]
) -> None:
    export(trained[0], tmp_path)
    faults[32] = "memory"
    assert export(trained[1], tmp_path) == 1
    assert [path.name for path in tmp_path.glob("student_prefill_T32*")] == ["student_prefill_T32_contract.json"]
    assert contracts(tmp_path)["student_prefill_T32"].file is None


@pytest.mark.parametrize("fault", REASONS)
def test_the_primary_s_failure_keeps_nothing_and_leaves_the_earlier_export(
    trained: tuple[Path, Path], tmp_path: Path, faults: dict[int, str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    export(trained[0], tmp_path)
    before = {path.name: sha256_file(path) for path in tmp_path.iterdir()}
    faults[16] = fault
    capsys.readouterr()
    assert export(trained[1], tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: primary shape prefill T=16: {REASONS[fault][:10]}") or REASONS[fault] in error
    assert error.count("\n") == 1
    assert {path.name: sha256_file(path) for path in tmp_path.iterdir()} == before


def test_a_full_disk_at_the_second_shape_keeps_the_first(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(trained[0], tmp_path / "whole")
    sizes = [(tmp_path / f"whole/student_prefill_T{t}.pt").stat().st_size for t in LENGTHS]
    capsys.readouterr()
    with no_file_larger_than((sizes[0] + sizes[1]) // 2):
        assert export(trained[0], tmp_path / "e") == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "student_prefill_T32.pt" in captured.err
    assert list((tmp_path / "e").glob("student*")) == []
    assert export(trained[0], tmp_path / "e") == 0
    assert told(capsys) == ["prefill T=16: kept", "prefill T=32: made", "prefill T=48: made"]


def test_two_exports_into_one_folder_at_once_are_refused(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with resume.workspace(tmp_path):
        assert export(trained[0], tmp_path) == 2
    assert "another export is writing to it" in capsys.readouterr().err
