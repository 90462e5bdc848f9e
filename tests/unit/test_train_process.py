"""Process supervision: the stage `proc` trains a checkpoint on, with weights by kind of span."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import yaml
from rich.console import Console

from distill import checkpoint
from distill.artifacts import read_json
from distill.config import as_dict, build, load_yaml
from distill.data.spans import KINDS
from distill.errors import ConfigError
from distill.train import loop, process
from distill.train.config import InitSection, SpanWeights, TrainConfig
from distill.train.kd import load_config
from distill.train.prepare import prepare
from tests.unit.train_sets import config, tool_episode, write_records, write_set

SHIPPED = Path(__file__).resolve().parents[2] / "configs/process_supervision.yaml"


@pytest.fixture
def worker(tmp_path: Path) -> TrainConfig:
    """A trained worker's configuration; its files are under tmp_path."""
    settings = config(tmp_path, write_set(tmp_path / "d.jsonl", 16), epochs=4, lr=5e-3)
    _run(settings)
    return settings


def _run(settings: TrainConfig) -> loop.Report:
    return loop.run(settings, console=Console(file=io.StringIO()))


def _proc(worker: TrainConfig, **changes: Any) -> TrainConfig:
    init = InitSection(checkpoint=str(worker.final))
    values: dict[str, Any] = {"stage": "proc", "model": None, "tokenizer": None, "init": init, "lr": 1e-3,
                              "span_weights": SpanWeights(tool_args=3.0)}  # fmt: skip
    return msgspec.structs.replace(worker, **(values | changes))


def _main(folder: Path, settings: TrainConfig, *arguments: str) -> int:
    path = folder / "proc.yaml"
    path.write_text(yaml.safe_dump(as_dict(settings)))
    return process.main(["--config", str(path), *arguments])


def test_proc_trains_the_worker_on_and_becomes_the_latest_checkpoint(tmp_path: Path, worker: TrainConfig) -> None:
    before = worker.final.read_bytes()
    assert _main(tmp_path, _proc(worker)) == 0
    folder = worker.final.parent
    made = checkpoint.load(folder / "proc.pt")
    assert [entry["stage"] for entry in made.lineage] == ["worker", "proc"]
    assert made.lineage[1]["init"]["checkpoint"] == str(worker.final)
    assert (folder / "latest.pt").read_bytes() == (folder / "proc.pt").read_bytes()
    assert worker.final.read_bytes() == before
    start, end = (checkpoint.load(path).student.state_dict() for path in (worker.final, folder / "proc.pt"))
    assert any(not torch.equal(start[name], end[name]) for name in start)
    report = read_json(folder / "proc.report.json")
    assert report["held_out"]["before"] == read_json(folder / "worker.report.json")["held_out"]["after"]
    assert {f"{part}/tool_args" for part in ("kl_div", "ce_teacher")} < set(report["held_out"]["after"])
    assert report["provenance"]["config"]["span_weights"]["tool_args"] == 3.0


def test_a_run_that_does_not_start_from_a_checkpoint_is_refused(
    tmp_path: Path, worker: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(tmp_path, worker) == 2
    assert "init.checkpoint" in capsys.readouterr().err
    assert _main(tmp_path, _proc(worker, init=InitSection(checkpoint=str(tmp_path / "none.pt")))) == 2
    assert "none.pt: no such checkpoint; `make worker`" in capsys.readouterr().err
    before = worker.final.read_bytes()
    assert _main(tmp_path, _proc(worker, stage="worker"), "--restart") == 2
    assert "would write over" in capsys.readouterr().err and worker.final.read_bytes() == before


def test_a_weight_lowers_its_own_spans_loss_more(worker: TrainConfig) -> None:
    after = {}
    for name, weights in (("high", SpanWeights(final=0.01)), ("low", SpanWeights(tool_args=0.01, tool_call=0.01))):
        after[name] = _run(_proc(worker, stage=name, span_weights=weights, epochs=6)).values["held_out"]["after"]
    assert after["high"]["ce_teacher/tool_args"] < after["low"]["ce_teacher/tool_args"]
    assert after["high"]["ce_teacher/final"] > after["low"]["ce_teacher/final"]


def test_span_weights_are_part_of_what_a_run_is(worker: TrainConfig) -> None:
    marks = {prepare(_proc(worker, span_weights=SpanWeights(tool_args=w))).mark for w in (1.0, 3.0)}
    assert len(marks) == 2
    _run(_proc(worker))
    with pytest.raises(ConfigError, match="made with other settings: span_weights;"):
        _run(_proc(worker, span_weights=SpanWeights(tool_args=4.0)))


def test_weights_that_leave_nothing_to_learn_are_refused(tmp_path: Path) -> None:
    data = write_records(tmp_path / "d.jsonl", [tool_episode()], None)
    nothing = SpanWeights(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, integration=1.0)
    with pytest.raises(ConfigError, match="content, final, reasoning, tool_call, tool_name, tool_args; all weigh 0"):
        prepare(config(tmp_path, data, span_weights=nothing))
    zero = config(tmp_path, data, span_weights=SpanWeights(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    assert _run(zero).values["held_out"]["after"] == {}
    for wrong in ({"tool_name": -1}, dict.fromkeys(KINDS, 0), {"tool": 1}, {"final": float("inf")}):
        with pytest.raises(ConfigError, match="span_weights"):
            build({"data": "d", "model": None, "init": {"checkpoint": "c"}, "span_weights": wrong}, TrainConfig, "f")


def test_there_is_a_weight_for_every_kind_of_span() -> None:
    assert set(SpanWeights.__struct_fields__) == set(KINDS)


def test_the_shipped_configuration_starts_from_the_worker_and_favours_calls_and_integration() -> None:
    shipped = load_config(str(SHIPPED))
    assert (shipped.stage, shipped.init.checkpoint) == ("proc", "models/student/checkpoints/worker.pt")
    weights = shipped.span_weights
    assert min(weights.tool_name, weights.tool_args, weights.integration) > weights.final == weights.content == 1
    worker = load_config(str(SHIPPED.with_name("worker_9b.yaml")))
    assert shipped.lr < worker.lr and shipped.data == worker.data and shipped.loss_weights == worker.loss_weights
    assert "checkpoint" in load_yaml(SHIPPED)["init"]
