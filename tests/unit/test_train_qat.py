"""The stage `qat`: the distillation goes on through the weights that the device will have."""

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
from distill.config import as_dict
from distill.data.batches import Examples
from distill.data.records import Dataset
from distill.errors import CheckpointError, ConfigError
from distill.export import pytorch as export
from distill.export.deployed import deploy
from distill.formats import Formats
from distill.train import evaluation, loop, qat
from distill.train.config import InitSection, LoraSection, QuantisationSection, TrainConfig
from distill.train.fake_quantisation import FakeQuantised
from distill.train.kd import load_config
from distill.train.objective import Sums
from distill.train.prepare import describe, prepare
from tests.unit.train_sets import config, write_set

SHIPPED = Path(__file__).resolve().parents[2] / "configs/quant_qat_int8.yaml"
COARSE = QuantisationSection(Formats(blocks="lut2/16", embedding="int8"), calibration_records=4, refit_every=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The configuration of a worker that is trained."""
    folder = tmp_path_factory.mktemp("worker")
    settings = config(folder, write_set(folder / "d.jsonl", 24), epochs=20, lr=5e-3)
    _run(settings)
    return settings


def _run(settings: TrainConfig) -> loop.Report:
    return loop.run(settings, console=Console(file=io.StringIO()))


def _qat(worker: TrainConfig, folder: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "stage": "qat", "model": None, "tokenizer": None, "init": InitSection(checkpoint=str(worker.final)), "lr": 2e-3,
        "weight_decay": 0.0, "quantisation": COARSE, "epochs": 6, "checkpoints": str(folder / "checkpoints"),
        "runs": str(folder / "runs"),
    }  # fmt: skip
    return msgspec.structs.replace(worker, **(values | changes))


def _main(folder: Path, settings: TrainConfig, *arguments: str) -> int:
    path = folder / "qat.yaml"
    path.write_text(yaml.safe_dump(as_dict(settings)))
    return qat.main(["--config", str(path), *arguments])


def test_training_wins_back_what_two_bits_lost_and_the_checkpoint_is_what_was_judged(
    tmp_path: Path, trained: TrainConfig
) -> None:
    settings = _qat(trained, tmp_path)
    assert _main(tmp_path, settings) == 0
    held_out = read_json(tmp_path / "checkpoints/qat.report.json")["held_out"]
    lost = held_out["before"]["kl_div"] - held_out["unquantised"]["kl_div"]
    assert lost > 0.02 and held_out["after"]["kl_div"] < held_out["before"]["kl_div"] - 0.5 * lost
    made = checkpoint.load(tmp_path / "checkpoints/latest.pt")
    assert made.formats == COARSE.formats and [entry["stage"] for entry in made.lineage] == ["worker", "qat"]
    assert made.lineage[-1]["init"]["checkpoint"] == str(trained.final)
    # the deployed student, evaluated as any other, has the values of the report
    deploy(made, None)
    before = checkpoint.load(trained.final)
    values = {name: _held_out(settings, student) for name, student in (("after", made.student),
                                                                      ("unquantised", before.student))}  # fmt: skip
    for name, sums in values.items():
        assert sums.means == pytest.approx({key: held_out[name][key] for key in sums.means}, rel=1e-6), name


def _held_out(settings: TrainConfig, student: torch.nn.Module) -> Sums:
    it = prepare(msgspec.structs.replace(settings, quantisation=None))
    it.start.student.load_state_dict(student.state_dict())
    return evaluation.held_out(it, [])


def test_without_steps_the_formats_alone_are_judged_and_written(tmp_path: Path, trained: TrainConfig) -> None:
    settings = _qat(trained, tmp_path)
    assert _main(tmp_path, settings, "--max-steps", "0") == 0
    report = read_json(tmp_path / "checkpoints/qat.report.json")
    assert report["steps"] == 0 and report["held_out"]["after"] == report["held_out"]["before"]
    made, before = checkpoint.load(tmp_path / "checkpoints/qat.pt"), checkpoint.load(trained.final)
    assert all(torch.equal(a, b) for a, b in zip(made.student.parameters(), before.student.parameters()))
    assert made.formats == COARSE.formats and made.loss == pytest.approx(report["loss"])


def test_calibration_takes_the_inputs_of_the_training_set_into_account(tmp_path: Path, trained: TrainConfig) -> None:
    tables = {}
    for number in (0, 4):
        folder = tmp_path / str(number)
        section = msgspec.structs.replace(COARSE, calibration_records=number)
        _run(_qat(trained, folder, quantisation=section, max_steps=0))
        tables[number] = checkpoint.load(folder / "checkpoints/qat.pt").tables
    plain = FakeQuantised(checkpoint.load(trained.final).student, COARSE.formats).tables
    assert all(torch.equal(tables[0][name], plain[name]) for name in plain)
    assert any(not torch.equal(tables[4][name], plain[name]) for name in plain)


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, trained: TrainConfig) -> None:
    whole = _run(_qat(trained, tmp_path / "whole"))
    steps = whole.values["steps"]
    assert steps > 8
    stopped = _qat(trained, tmp_path / "stopped", save_every=4)
    with pytest.raises(RuntimeError, match="stop here"):
        _stop_after(stopped, 12)
    left = sorted(path.name for path in (tmp_path / "stopped/checkpoints").glob("*.pt"))
    assert left == ["qat.step_000004.pt", "qat.step_000008.pt"]
    went_on = _run(stopped)
    assert went_on.values == whole.values
    one, other = (torch.load(report.checkpoint) for report in (whole, went_on))
    for key in ("model", "tables"):
        assert all(torch.equal(one[key][name], other[key][name]) for name in one[key] | other[key]), key


def _stop_after(settings: TrainConfig, step: int) -> None:
    class Stopping(io.StringIO):
        def write(self, text: str) -> int:
            if f"step {step} of" in text:
                raise RuntimeError("stop here")
            return super().write(text)

    loop.run(settings, console=Console(file=Stopping()))


def test_what_is_exported_is_what_was_trained(tmp_path: Path, trained: TrainConfig) -> None:
    report = _run(_qat(trained, tmp_path, max_steps=3))
    made = checkpoint.load(report.checkpoint)
    fake = FakeQuantised(made.student, COARSE.formats, tables=made.tables)
    with fake.applied():
        inside = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    (contract,) = export.run(export.ExportConfig(report.checkpoint, tmp_path / "out", "prefill", None, (32,)))
    promised = read_json(contract)["weights"]
    assert {weight["format"] for weight in promised.values()} == {"lut2/16", "int8"}
    deploy(made, None)
    assert all(torch.equal(p.detach().half(), inside[name].half()) for name, p in made.student.named_parameters())


def test_the_formats_shape_what_is_learned(tmp_path: Path, trained: TrainConfig, monkeypatch: Any) -> None:
    """Planted: the step forgets to put the deployed weights in."""
    sound = _run(_qat(trained, tmp_path / "sound"))
    import contextlib

    monkeypatch.setattr(FakeQuantised, "applied", lambda self: contextlib.nullcontext())
    spoilt = _run(_qat(trained, tmp_path / "spoilt"))
    found = {}
    for name, report in (("sound", sound), ("spoilt", spoilt)):
        made = checkpoint.load(report.checkpoint)
        deploy(made, None)
        found[name] = _held_out(_qat(trained, tmp_path), made.student).means["kl_div"]
    assert found["sound"] < found["spoilt"]


def test_tables_that_no_training_gives_are_refused(tmp_path: Path, trained: TrainConfig) -> None:
    made = _run(_qat(trained, tmp_path, max_steps=0)).checkpoint
    for name, spoil in (
        ("model.embed_tokens.weight", lambda table: table.mul_(0)),
        ("model.layers.0.mlp.up_proj.weight", lambda table: table.copy_(table.flip(1))),
    ):
        data = torch.load(made)
        spoil(data["tables"][name])
        torch.save(data, tmp_path / "forged.pt")
        with pytest.raises(CheckpointError, match=f"tables: {name} has a scale that is not above 0, or a palette out"):
            checkpoint.load(tmp_path / "forged.pt")


def test_a_stage_without_formats_says_that_it_leaves_those_of_its_checkpoint(
    tmp_path: Path, trained: TrainConfig
) -> None:
    made = _run(_qat(trained, tmp_path, max_steps=0)).checkpoint
    later = _qat(trained, tmp_path, stage="later", quantisation=None, init=InitSection(checkpoint=str(made)))
    assert "were trained in formats (blocks lut2/16, embedding int8, head int8); this run" in describe(prepare(later))
    assert "were trained in formats" not in describe(prepare(_qat(trained, tmp_path)))


def test_of_several_checkpoints_the_first_that_is_there_is_taken(tmp_path: Path) -> None:
    first, second = tmp_path / "proc.pt", tmp_path / "worker.pt"
    both = [str(first), str(second)]
    assert InitSection(checkpoint=both).trained == str(second)
    second.touch()
    assert InitSection(checkpoint=both).trained == str(second)
    first.touch()
    assert InitSection(checkpoint=both).trained == str(first)
    with pytest.raises(ValueError, match="empty"):
        InitSection(checkpoint=[])


def test_what_cannot_be_trained_in_formats_is_named(
    tmp_path: Path, trained: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = _qat(trained, tmp_path)
    for changes, words in (
        ({"quantisation": None}, "quantisation.formats: the weight formats to train in are missing"),
        ({"init": InitSection(checkpoint=str(tmp_path / "no.pt"))}, "no such checkpoint; `make worker` trains"),
        ({"quantisation": QuantisationSection(Formats(blocks="int4/48"))}, "leave a rest"),
    ):
        assert _main(tmp_path, msgspec.structs.replace(settings, **changes)) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    with pytest.raises(ValueError, match="would leave the formats"):
        msgspec.structs.replace(settings, lora=LoraSection()).__post_init__()
    assert _main(tmp_path, msgspec.structs.replace(settings, quantisation=None, max_steps=2), "--max-steps", "0") == 2
    assert "--max-steps must be at least 1, not 0" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt"))


def test_the_shipped_configuration_is_one_and_starts_from_the_stages_before(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_config(str(SHIPPED))
    assert shipped.quantisation is not None and shipped.quantisation.formats == Formats("int8", "int8")
    assert shipped.stage == "qat" and shipped.init.trained == "models/student/checkpoints/worker.pt"
    with pytest.raises(ConfigError, match="no such checkpoint"):
        qat.require_formats(shipped)


def test_calibration_sequences_are_spread_over_the_training_set(trained: TrainConfig, monkeypatch: Any) -> None:
    from distill.train.prepare import fake_quantised

    it = prepare(_qat(trained, Path("unused")))
    asked: list[list[int]] = []
    batch = Examples.batch
    monkeypatch.setattr(Examples, "batch", lambda self, some: (asked.append(list(some)), batch(self, some))[1])
    fake_quantised(it, None)
    n = len(it.train)
    assert asked == [[i * n // 4] for i in range(4)] and len(Dataset.open(trained.data)) > n
