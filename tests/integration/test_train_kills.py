"""Killed at any instant, a training run goes on to the same bits: weights, losses, report, and one line a step.

`TRAIN_KILLS=100 TRAIN_SEED=7 pytest tests/integration/test_train_kills.py -k random` for a long schedule.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console

from distill.train import loop
from distill.train.config import LengthStage, TrainConfig
from tests.unit.train_sets import config, write_set

KILLS = int(os.environ.get("TRAIN_KILLS", "12"))
SEED = int(os.environ.get("TRAIN_SEED", "1"))

pytestmark = pytest.mark.slow

_FORKS = multiprocessing.get_context("forkserver")  # a child starts in milliseconds, with torch imported
_FORKS.set_forkserver_preload(
    ["distill.train.loop", "tests.unit.train_sets", "torch._dynamo", "torch.utils.tensorboard"]
)


def _no_kill() -> None:
    pass


def _child(settings: TrainConfig, arm: Callable[..., None], *arguments: Any) -> None:
    arm(*arguments)
    loop.run(settings, console=Console(file=io.StringIO()))


def _start(settings: TrainConfig, arm: Callable[..., None] = _no_kill, *arguments: Any) -> BaseProcess:
    child = _FORKS.Process(target=_child, args=(settings, arm, *arguments))
    child.start()
    return child


def _run(settings: TrainConfig, arm: Callable[..., None] = _no_kill, *arguments: Any) -> int | None:
    child = _start(settings, arm, *arguments)
    child.join()
    return child.exitcode


class Outcome(NamedTuple):
    """What a finished run leaves, but for its speed."""

    files: list[str]
    checkpoint: dict[str, Any]
    report: dict[str, Any]
    steps: bytes


def _outcome(folder: Path) -> Outcome:
    found = torch.load(folder / "checkpoints/worker.pt")
    report = json.loads((folder / "checkpoints/worker.report.json").read_text())
    del report["tokens_per_second"], report["provenance"], found["provenance"]
    (steps,) = (folder / "runs").rglob("steps.jsonl")
    return Outcome(sorted(p.name for p in (folder / "checkpoints").iterdir()), found, report, steps.read_bytes())


def _require_same(one: Outcome, other: Outcome) -> None:
    assert one.files == other.files == ["latest.pt", "worker.pt", "worker.report.json"]
    assert one.steps == other.steps and one.report == other.report
    weights = one.checkpoint.pop("model"), other.checkpoint.pop("model")
    assert one.checkpoint == other.checkpoint
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] | weights[1])
    one.checkpoint["model"], other.checkpoint["model"] = weights


def _settings(folder: Path, data: Path, **changes: Any) -> TrainConfig:
    """Two lengths, two micro-batches a step, evaluations, checkpoints every other step: 24 steps."""
    stages = [LengthStage(160, 4, 2, None, 2), LengthStage(512, 4, 1, None, 2)]
    return config(folder, data, curriculum=stages, **({"save_every": 2, "eval_every": 5} | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("set") / "d.jsonl", 12, truth="No.")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Outcome, float]:
    """An undisturbed run, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    assert _run(_settings(folder / "first", data)) == 0  # the server of forks has started
    start = time.monotonic()
    assert _run(_settings(folder, data)) == 0
    outcome = _outcome(folder)
    lines = [json.loads(line) for line in outcome.steps.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, outcome.report["steps"] + 1))
    assert {"loss", "tokens", "kl_div", "ce_teacher", "support", "grad_norm", "lr"} <= lines[0].keys()
    return outcome, time.monotonic() - start


@pytest.mark.parametrize("seed", [SEED, SEED + 1, SEED + 2])
def test_killed_at_random_instants_a_run_ends_in_the_same_bits(
    tmp_path: Path, data: Path, whole: tuple[Outcome, float], seed: int
) -> None:
    draw, settings = random.Random(seed), _settings(tmp_path, data)
    kills = finished = writing = 0
    while kills < KILLS:
        child = _start(settings)
        child.join(draw.uniform(0, whole[1]))
        if child.exitcode is None:
            child.kill()
            child.join()
        if child.exitcode == 0:
            _require_same(_outcome(tmp_path), whole[0])
            shutil.rmtree(tmp_path / "checkpoints")
            finished += 1
            continue
        assert child.exitcode == -signal.SIGKILL
        kills += 1
        writing += any((tmp_path / "checkpoints").glob(".worker.*.tmp"))
    assert _run(settings) == 0
    _require_same(_outcome(tmp_path), whole[0])
    print(f"seed {seed}: {kills} kills, {writing} while a file was being written; {finished + 1} runs finished")


def _kill_before_event(number: int, folder: str) -> None:
    """SIGKILL just before the `number`th rename or removal in `folder`."""
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in ("os.rename", "os.remove") and str(arguments[0]).startswith(folder):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_killed_between_any_two_renames_and_removals_a_run_ends_in_the_same_bits(tmp_path: Path, data: Path) -> None:
    short = {"max_steps": 5, "tracker": "none", "eval_every": 0}
    assert _run(_settings(tmp_path / "whole", data, **short)) == 0
    expected = _outcome(tmp_path / "whole")
    for number in range(1, 200):
        folder = tmp_path / str(number)
        settings = _settings(folder, data, **short)
        code = _run(settings, _kill_before_event, number, str(folder / "checkpoints"))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert _run(settings) == 0
        _require_same(_outcome(folder), expected)
    assert number > 12, "there are more renames and removals in a run"


def _kill_at_byte(size: int) -> None:
    """The system kills the process in the middle of the write that makes a file longer."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [10_000, 500_000, 1_000_000])
def test_killed_inside_the_write_of_a_checkpoint_a_run_ends_in_the_same_bits(
    tmp_path: Path, data: Path, whole: tuple[Outcome, float], size: int
) -> None:
    settings = _settings(tmp_path, data)
    _run(settings, _kill_before_event, 12, str(tmp_path / "checkpoints"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").glob("worker.*")}
    assert any(name.endswith(".pt") for name in before)
    assert _run(settings, _kill_at_byte, size) == -signal.SIGXFSZ
    folder = tmp_path / "checkpoints"
    assert list(folder.glob(".worker.*.tmp")), "it was killed while it wrote"
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert _run(settings) == 0
    _require_same(_outcome(tmp_path), whole[0])
