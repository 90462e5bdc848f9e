"""What a run shows: scalars of every part, text samples, a bar; TensorBoard's files are read back by TensorBoard."""

from __future__ import annotations

import builtins
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill import chat
from distill.errors import InputError, Paused
from distill.train import evaluation, loop
from distill.train.config import TrainConfig
from distill.train.prepare import prepare
from tests.unit.train_sets import config, write_set


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("set") / "d.jsonl", 12, truth="No.")


def _run(settings: TrainConfig, **terminal: Any) -> str:
    out = io.StringIO()
    loop.run(settings, console=Console(file=out, width=200, **terminal))
    return out.getvalue()


def _events(folder: Path) -> EventAccumulator:
    (found,) = {path.parent for path in (folder / "runs").rglob("events*")}
    events = EventAccumulator(str(found), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def _lines(folder: Path) -> list[dict[str, Any]]:
    (path,) = (folder / "runs").rglob("steps.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tensorboard_shows_every_part_the_mass_on_the_support_and_samples(tmp_path: Path, data: Path) -> None:
    settings = config(tmp_path, data, max_steps=6, eval_every=2)
    it = prepare(settings)  # its student is at the initialisation
    _run(settings)
    events, lines = _events(tmp_path), _lines(tmp_path)
    tags = set(events.Tags()["scalars"])
    parts = [
        "total",
        "kl_div",
        "ce_teacher",
        "ce_ground_truth",
        "support",
        "grad_norm",
        "lr",
        "tokens_per_s",
        "waited_s",
    ]
    assert {f"train/{name}" for name in parts} | {"val/kl_div", "val/support"} <= tags
    for name in ("kl_div", "support", "lr"):
        shown = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert shown == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines if name in line]
        assert len(shown) >= 4 and (name == "lr" or all(value > 0 for _, value in shown))
    assert all(line["support"] < 1 for line in lines if "support" in line)
    assert all(("support" in line) == ("kl_div" in line) for line in lines)  # absent, never zero
    assert [event.step for event in events.Scalars("val/kl_div")] == [0, 2, 4, 6]
    written = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/0/text_summary")]
    record = it.val.dataset[it.val.items[0].record]
    prompt = chat.encode(it.start.tokenizer, record.context, record.tools, add_generation_prompt=True).ids
    ids = it.start.student.eval().generate(prompt, 64, it.start.tokenizer.stop_ids)
    assert len(written) == 4 and record.context[-1].content.splitlines()[0] in written[0]
    assert it.start.tokenizer.decode(ids).splitlines()[0] in written[0]
    assert it.start.tokenizer.decode(ids) == next(iter(evaluation.samples(it, []).values()))


def test_a_run_that_went_on_shows_each_step_once(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, data, max_steps=6, save_every=2)
    step = loop.Monitor.step

    def dies(self: loop.Monitor, number: int, *rest: Any) -> None:
        step(self, number, *rest)
        if number == 5:
            raise InputError("the machine is gone")

    monkeypatch.setattr(loop.Monitor, "step", dies)
    with pytest.raises(InputError, match="gone"):
        _run(settings)
    assert len(_lines(tmp_path)) == 5
    monkeypatch.undo()
    time.sleep(1.1)  # files are read in the order of their names: those of one second by a number, 10 before 9
    assert "at step 4 of 6" in _run(settings)
    assert [event.step for event in _events(tmp_path).Scalars("train/total")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_without_a_tracker_there_is_the_log_of_steps_alone(tmp_path: Path, data: Path) -> None:
    _run(config(tmp_path, data, max_steps=3, tracker="none"))
    assert [path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()] == ["steps.jsonl"]


def test_a_terminal_has_a_bar_with_loss_speed_and_time_left(tmp_path: Path, data: Path) -> None:
    text = _run(config(tmp_path, data, max_steps=4, tracker="none"), force_terminal=True)
    assert "4/4" in text and "loss" in text and "tokens/s" in text and "0:00:00" in text


def test_an_absent_wandb_is_one_line_that_names_the_extra_before_anything_is_trained(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "wandb":
            raise ImportError(name)
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"wandb is not installed: pip install 'distill\[wandb\]'"):
        _run(config(tmp_path, data, tracker="wandb"))
    assert _lines(tmp_path) == []


def test_wandb_keeps_an_offline_run_that_goes_on(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = config(tmp_path, data, max_steps=4, tracker="wandb")
    step = loop.Monitor.step

    def stops(self: loop.Monitor, number: int, *rest: Any) -> None:
        step(self, number, *rest)
        if number == 2:
            raise Paused("here")

    monkeypatch.setattr(loop.Monitor, "step", stops)
    with pytest.raises(Paused, match="here"):
        _run(settings)
    monkeypatch.undo()
    _run(settings)
    kept = sorted((tmp_path / "runs").rglob("*.wandb"))
    identity = f"worker-{prepare(settings).mark[:12]}"
    assert [path.name for path in kept] == [f"run-{identity}.wandb"] * 2
    held = b"".join(path.read_bytes() for path in kept)
    assert all(name in held for name in (b"train/kl_div", b"train/support", b"val/ce_teacher", b"samples"))
    assert not (tmp_path / "wandb").exists() and [line["step"] for line in _lines(tmp_path)] == [1, 2, 3, 4]
