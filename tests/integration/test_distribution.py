"""The distributional verdict of real packages: a sound one passes, and each planted fault fails its limit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch

from distill import checkpoint, cli, gates
from distill.config import load
from distill.convert import coreml
from distill.data.batches import Examples
from distill.data.records import Dataset
from distill.errors import InputError
from distill.export import pytorch
from distill.formats import Formats
from distill.model import Student
from distill.train.fake_quantisation import FakeQuantised
from distill.verify import distribution
from distill.verify.distribution import Models, Verdict
from distill.verify.limits import LimitsConfig
from distill.verify.runner import PackageRunner
from tests.conftest import SEQ, Toy
from tests.integration.spoil import Spoilt
from tests.unit.train_sets import write_set

SHIPPED = Path(__file__).parents[2] / "configs/limits.yaml"
LIMITS = msgspec.structs.replace(load(SHIPPED, LimitsConfig), min_tokens=400)
"""A toy's answers are short: 80 of them have 440 tokens."""
FORMATS = Formats(blocks="lut3", embedding="int8")


class Held(NamedTuple):
    """A toy set of which 80 records are held out, the toy's package in weight formats, limits for so little text."""

    data: Path
    compressed: Path
    limits: Path


@pytest.fixture(scope="module")
def held(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Held:
    folder = tmp_path_factory.mktemp("held")
    (folder / "limits.yaml").write_text(SHIPPED.read_text() + f"min_tokens: {LIMITS.min_tokens}\n")
    data = write_set(folder / "kd.jsonl", 96, val=80)
    return Held(data, packaged(toy.checkpoint, folder, FORMATS), folder / "limits.yaml")


def packaged(made_from: Path, folder: Path, formats: Formats | None) -> Path:
    config = pytorch.ExportConfig(made_from, folder / "exported", "prefill", SEQ, (SEQ,), formats=formats)
    pytorch.run(config)
    coreml.run(coreml.ConvertConfig(folder / f"exported/student_prefill_T{SEQ}.pt", folder / "x.mlpackage"))
    return folder / "x.mlpackage"


def examples_for(held: Held, models: Models, capacity: int = SEQ) -> Examples:
    return distribution.held_out(Dataset.open(held.data), models.tokenizer, capacity)


def judged(held: Held, toy: Toy, runner: PackageRunner, limits: LimitsConfig = LIMITS) -> Verdict:
    models = distribution.load_models(runner, toy.checkpoint)
    return distribution.verdict(runner, models.reference, models.deployed, examples_for(held, models), limits)


def stage(held: Held, toy: Toy, *more: str, package: Path | None = None) -> int:
    return cli.main(["distribution", "--model", str(package or toy.prefill), "--checkpoint", str(toy.checkpoint),
                     "--data", str(held.data), "--limits", str(held.limits), *more])  # fmt: skip


# sound packages


def test_a_sound_package_keeps_every_limit_and_says_over_how_much_text(
    held: Held, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage(held, toy, "--report", str(tmp_path / "r.json")) == 0
    report, shown = json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out
    assert {gate["status"] for gate in report["gates"].values()} == {"pass"} and len(report["gates"]) == 5
    assert report["records"] == 80 == len(report["by_record"]) and report["records_left_out"] == 0
    assert f"5 pass, over {report['tokens']:,} tokens of 80 records" in shown
    assert report["tokens"] == sum(row["tokens"] for row in report["by_record"]) >= LIMITS.min_tokens
    assert report["pairs"]["format"]["kl_mean"]["value"] == 0  # no formats: nothing to lose there
    assert 0 < report["pairs"]["total"]["kl_mean"]["value"] < 1e-4


def test_the_numbers_are_those_of_numpy_by_hand(held: Held, toy: Toy) -> None:
    runner = PackageRunner(held.compressed)
    models = distribution.load_models(runner, toy.checkpoint)
    examples, kl, nll, agree = examples_for(held, models), [], [], []
    found = distribution.verdict(runner, models.reference, models.deployed, examples, LIMITS).details
    for example in examples.items:
        with torch.no_grad():
            p = softmax(models.reference(torch.from_numpy(example.ids.astype(np.int64))[None])[0].numpy())
        q = softmax(runner.logits(example.ids.tolist()))
        for place in example.places.tolist():
            a, b = p[place - 1], q[place - 1]
            kl.append(float(np.sum(a * np.log(a / b))))
            nll.append((-math.log(a[example.ids[place]]), -math.log(b[example.ids[place]])))
            agree.append(a.argmax() == b.argmax())
    total = found["pairs"]["total"]
    assert total["kl_mean"]["value"] == pytest.approx(np.mean(kl), rel=1e-9)
    assert total["kl_p99"]["value"] == pytest.approx(sorted(kl)[math.ceil(0.99 * len(kl)) - 1], rel=1e-9)
    assert total["top1_agreement"]["value"] == np.mean(agree)
    mine, theirs = np.mean(nll, axis=0)
    assert found["perplexity"]["package"] == pytest.approx(math.exp(theirs))
    assert total["perplexity_ratio"]["value"] == pytest.approx(math.exp(theirs - mine))
    assert found["tokens"] == len(kl)


def softmax(logits: np.ndarray) -> np.ndarray:
    power = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


def test_the_loss_is_divided_into_the_format_s_and_that_of_fp16_and_conversion(held: Held, toy: Toy) -> None:
    gates_, found = judged(held, toy, PackageRunner(held.compressed))
    total, of_format, conversion = (found["pairs"][name]["kl_mean"]["value"] for name in distribution.PAIRS)
    assert total == pytest.approx(of_format, rel=0.1) and conversion < 1e-4 < of_format / 10
    assert found["limits"]["total"]["formats"] == ["lut3*"] and found["limits"]["conversion"]["formats"] == ["fp16"]
    assert len(gates_) == 10
    assert {gates_[name].status for name in gates_ if name.startswith("conversion")} == {"pass"}


def test_a_package_with_a_state_gives_the_same_distributions(held: Held, toy: Toy) -> None:
    found = []
    for runner in (PackageRunner(toy.prefill), PackageRunner(toy.decode)):
        models = distribution.load_models(runner, toy.checkpoint)
        few = distribution.held_out(Dataset.open(held.data), models.tokenizer, runner.capacity, 4)
        found.append(distribution.verdict(runner, models.reference, models.deployed, few, LIMITS).details)
    once, stepwise = found
    assert stepwise["pairs"]["total"]["kl_mean"]["value"] < 1e-4 and stepwise["tokens"] == once["tokens"]
    assert stepwise["perplexity"]["package"] == pytest.approx(once["perplexity"]["package"], rel=1e-3)


def test_the_teacher_is_compared_with_all_three_where_its_distributions_are_stored(held: Held, toy: Toy) -> None:
    runner = PackageRunner(held.compressed)
    found = judged(held, toy, runner).details
    teacher = found["kl_teacher"]
    assert teacher["tokens"] == found["tokens"]
    added = teacher["package"]["value"] - teacher["float"]["value"]
    assert teacher["package_minus_float"]["value"] == pytest.approx(added, rel=1e-6) and added != 0
    bare = held._replace(data=write_set(held.data.parent / "bare.jsonl", 30, val=24, distributions=False))
    assert judged(bare, toy, runner).details["kl_teacher"] is None


# planted faults


def perturbed(toy: Toy, folder: Path) -> PackageRunner:
    noise = np.random.default_rng(0)
    spoilt = Spoilt(toy.prefill, folder)
    spoilt.edit("block_0_mlp_down_weight_to_fp16", lambda w: w + w.std() * noise.normal(size=w.shape))
    return PackageRunner(spoilt.seal())


def at_another_temperature(toy: Toy, folder: Path) -> PackageRunner:
    return PackageRunner(Spoilt(toy.prefill, folder).edit("head_0_weight_to_fp16", lambda w: w / 1.5).seal())


def shifted_by_one(toy: Toy, folder: Path) -> PackageRunner:
    class Shifted(PackageRunner):
        def logits(self, ids: Any) -> np.ndarray:
            return np.roll(super().logits(ids), 1, axis=0)

    return Shifted(toy.prefill)


def overflowing(toy: Toy, folder: Path) -> PackageRunner:
    return PackageRunner(Spoilt(toy.prefill, folder).edit("block_1_mlp_up_weight_to_fp16", lambda w: w * 6e4).seal())


FAULTS = [perturbed, at_another_temperature, shifted_by_one, overflowing]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_breaks_the_limits(
    held: Held, toy: Toy, fault: Callable[[Toy, Path], PackageRunner], tmp_path: Path
) -> None:
    found = judged(held, toy, fault(toy, tmp_path)).gates
    assert found["total_kl_mean"].status == found["total_kl_p99"].status == "fail"
    order = {found["total_top1_agreement"].status, found["total_topk_agreement"].status}
    if fault is at_another_temperature:
        assert order == {"pass"}  # which is why agreement alone would not do
    if fault in (shifted_by_one, overflowing):
        assert order == {"fail"}
    json.dumps(gates.to_json(found), allow_nan=False)


def test_overflow_fails_however_few_tokens_there_are(held: Held, toy: Toy, tmp_path: Path) -> None:
    found = judged(held, toy, overflowing(toy, tmp_path), LimitsConfig(LIMITS.rules, min_records=1000))
    assert {found.gates[f"total_{name}"].status for name in ("kl_mean", "kl_p99", "perplexity_ratio")} == {"fail"}
    assert found.gates["total_kl_mean"].reason == "not finite"


def test_the_package_of_another_student_breaks_the_limits(held: Held, toy: Toy) -> None:
    runner = PackageRunner(toy.prefill)
    models = distribution.load_models(runner, toy.checkpoint)
    other = Student(models.reference.config).init_weights(1)
    found = distribution.verdict(runner, other, other, examples_for(held, models), LIMITS).gates
    assert {gate.status for name, gate in found.items() if "perplexity" not in name} == {"fail"}


def test_a_fault_of_conversion_is_not_excused_by_a_coarse_format(held: Held, toy: Toy, tmp_path: Path) -> None:
    """A gain 20% off is far inside what three bits may lose, and outside what conversion may."""
    spoilt = Spoilt(held.compressed, tmp_path).edit("block_0_attention_norm_weight_to_fp16", lambda w: w * 1.2)
    found = judged(held, toy, PackageRunner(spoilt.seal())).gates
    sound = judged(held, toy, PackageRunner(held.compressed)).gates
    assert found["total_kl_mean"].status == sound["total_kl_mean"].status == "pass"
    assert found["conversion_kl_mean"].status == "fail" and sound["conversion_kl_mean"].status == "pass"


# which checkpoint, which text


@pytest.fixture(scope="module")
def trained(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint trained in formats from the toy's, as training leaves it, with its package beside it."""
    folder = tmp_path_factory.mktemp("trained")
    start = checkpoint.load(toy.checkpoint)
    fake = FakeQuantised(start.student, FORMATS)
    for parameter in start.student.parameters():
        parameter.data += 0.002 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    lineage = [*start.lineage, {"stage": "qat", "init": {"checkpoint": str(toy.checkpoint)}}]
    checkpoint.save(folder / "qat.pt", start.student, start.tokenizer, step=1, loss=0.0, stage="qat", lineage=lineage,
                    formats=FORMATS, tables=fake.tables)  # fmt: skip
    packaged(folder / "qat.pt", folder, None)
    return folder / "qat.pt"


def test_of_a_student_trained_in_formats_the_reference_is_the_one_it_started_from(toy: Toy, trained: Path) -> None:
    runner = PackageRunner(trained.parent / "x.mlpackage")
    models = distribution.load_models(runner, trained)
    start = checkpoint.load(toy.checkpoint).student.state_dict()
    assert all(torch.equal(value, start[name]) for name, value in models.reference.state_dict().items())
    assert models.files == {"checkpoint": trained, "reference": toy.checkpoint}
    assert not torch.equal(models.deployed.lm_head.weight, models.reference.lm_head.weight)


@pytest.mark.parametrize(("change", "message"), [
    ({"lineage": []}, "not in its lineage"),
    ({"lineage": [{"init": {"checkpoint": "/nowhere/worker.pt"}}]}, "(/nowhere/worker.pt) is not there"),
    ({"lineage": [{"stage": "another"}, {"init": {"checkpoint": "START"}}]}, "as it was then"),
    ({"lineage": [{"init": {"checkpoint": "ITSELF"}}]}, "was trained in weight formats, so it is no float student"),
])  # fmt: skip
def test_a_reference_that_is_not_the_one_is_refused(
    toy: Toy, trained: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    text = json.dumps(change).replace("START", str(toy.checkpoint)).replace("ITSELF", str(trained))
    checkpoint.write(tmp_path / "qat.pt", checkpoint.read(trained) | json.loads(text))
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        distribution.load_models(PackageRunner(trained.parent / "x.mlpackage"), tmp_path / "qat.pt")


def test_a_checkpoint_that_the_package_was_not_made_from_is_refused(
    held: Held, toy: Toy, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage(held, toy, package=trained.parent / "x.mlpackage") == 2
    assert "was not made from" in capsys.readouterr().err


def test_few_records_are_inconclusive_and_none_are_skipped(
    held: Held, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage(held, toy, "--records", "3") == 3
    assert "5 inconclusive" in (shown := capsys.readouterr().out) and "3 records, 20 needed" in shown
    none = held._replace(data=write_set(tmp_path / "kd.jsonl", 8, val=0))
    stage(none, toy)
    assert "SKIPPED" in (shown := capsys.readouterr().out) and "holds no record of split val" in shown
    assert stage(held, toy, "--records", "0") == 2
