"""The loop: how the work is cut up does not matter, a killed run continues bit for bit, a NaN stops it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch
import yaml
from rich.console import Console

from distill import checkpoint
from distill.config import as_dict
from distill.errors import ConfigError, DistillError, Paused
from distill.train import loop
from distill.train.config import InitSection, LossWeights, TrainConfig
from distill.train.objective import Objective
from distill.train.prepare import prepare
from distill.train.step import evaluate, gradients, learning_rate
from tests.unit.train_sets import config, write_set


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("set") / "d.jsonl", 16, truth="No.")


def _run(settings: TrainConfig, **options: bool) -> tuple[loop.Report, str]:
    out = io.StringIO()
    return loop.run(settings, console=Console(file=out, width=200), **options), out.getvalue()


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path).student.state_dict()


def _assert_equal(a: Path, b: Path) -> None:
    first, second = _weights(a), _weights(b)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_gradient_does_not_depend_on_how_the_window_is_cut_up(tmp_path: Path, data: Path) -> None:
    it = prepare(config(tmp_path, data))
    student, found = it.start.student, []
    for cuts, chunk in ([list(range(8))], 512), ([[i] for i in range(8)], 512), ([[0, 5, 2], [7, 1], [3, 4, 6]], 3):
        student.zero_grad()
        sums = gradients(student, [it.train.batch(c) for c in cuts], it.objective._replace(chunk=chunk))
        found.append((sums, torch.cat([p.grad.flatten() for p in student.parameters()])))
    for sums, gradient in found[1:]:
        assert sums.counts == found[0][0].counts
        assert sums.total(it.weights) == pytest.approx(found[0][0].total(it.weights), rel=1e-6)
        assert float((gradient - found[0][1]).norm() / found[0][1].norm()) < 1e-6


def test_chunked_gradient_is_autograd_s_over_the_whole_batch(tmp_path: Path, data: Path) -> None:
    it = prepare(config(tmp_path, data))
    student, batch = it.start.student, it.train.batch([0, 1, 2, 3])
    gradients(student, [batch], it.objective._replace(chunk=5))
    chunked = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    logits = student.lm_head(student.hidden(batch.ids_T[None], lengths=batch.lengths)[0])[batch.positions_N]
    nll = -logits.log_softmax(-1).gather(1, batch.labels_N[:, None])[:, 0]
    log_q = logits.log_softmax(-1).gather(1, batch.topk_ids_NK.clamp(min=0))
    q_rest = torch.log1p(-log_q.exp().sum(-1))
    kl = (batch.topk_logprobs_NK.exp() * (batch.topk_logprobs_NK - log_q)).sum(-1)
    kl = kl + batch.tail_logprob_N.exp() * (batch.tail_logprob_N - q_rest)
    loss = 0.6 * kl[batch.has_distribution_N].sum() + 0.2 * nll[batch.teacher_N].sum()
    loss = (loss + 0.2 * nll[batch.ground_truth_N].sum()) / len(batch.labels_N)
    for parameter, ours in zip(student.parameters(), chunked):
        (theirs,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        assert float((ours - theirs).norm()) <= 1e-4 * float(theirs.norm()) + 1e-7


def test_a_run_trains_reports_and_writes_everything(tmp_path: Path, data: Path) -> None:
    settings = config(tmp_path, data, epochs=8, lr=5e-3, eval_every=10)
    report, text = _run(settings)
    held_out = report.values["held_out"]
    assert set(held_out["before"]) == {"kl_div", "ce_teacher", "ce_ground_truth"}
    assert all(held_out["after"][name] < held_out["before"][name] for name in held_out["before"])
    assert "held out, before" in text and "held out, after" in text and "tokens/s" in text
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest.pt", "worker.pt", "worker.report.json"]
    data_ = torch.load(folder / "latest.pt", map_location="cpu")
    assert data_["step"] == report.values["steps"] and data_["loss"] == report.values["loss"]
    assert json.loads((folder / "worker.report.json").read_text())["held_out"] == held_out
    _assert_equal(folder / "latest.pt", folder / "worker.pt")
    events = list((tmp_path / "runs").rglob("events*"))
    assert events and b"train/kl_div" in events[0].read_bytes() and b"train/grad_norm" in events[0].read_bytes()


def test_a_finished_run_is_not_repeated_and_another_configuration_needs_restart(tmp_path: Path, data: Path) -> None:
    settings = config(tmp_path, data)
    _run(settings)
    before = (tmp_path / "checkpoints/worker.pt").stat().st_mtime_ns
    again, text = _run(settings)
    assert again.already and "finished already" in text
    assert (tmp_path / "checkpoints/worker.pt").stat().st_mtime_ns == before
    other = msgspec.structs.replace(settings, lr=2e-3)
    with pytest.raises(ConfigError, match="another configuration") as caught:
        _run(other)
    assert "--restart" in str(caught.value)
    assert not _run(other, restart=True)[0].already


def test_what_is_absent_is_said_and_never_zero(tmp_path: Path) -> None:
    path = write_set(tmp_path / "text.jsonl", distributions=False, truth=None, val=0)
    report, text = _run(config(tmp_path, path))
    assert (
        "kl_div is absent" in text and "ce_ground_truth is absent" in text and "held-out evaluation is absent" in text
    )
    assert report.values["absent"] == ["kl_div", "ce_ground_truth"] and set(report.values["loss_weights"]) == {
        "ce_teacher"
    }
    assert report.values["held_out"]["after"] == {}
    only = LossWeights(1.0, 0.0, 0.0)
    with pytest.raises(ConfigError, match="no training record carries kl_div"):
        prepare(config(tmp_path, path, loss_weights=only))


def test_cross_entropy_alone_still_reports_held_out_kl(tmp_path: Path, data: Path) -> None:
    report, _ = _run(config(tmp_path, data, loss_weights=LossWeights(0.0, 1.0, 0.0)))
    assert set(report.values["loss_weights"]) == {"ce_teacher"} and "kl_div" in report.values["held_out"]["after"]


def test_a_nan_stops_the_run_with_its_step_named_and_its_batch_saved(tmp_path: Path, data: Path) -> None:
    weights = tmp_path / "nan.pt"
    it = prepare(config(tmp_path, data))
    with torch.no_grad():
        it.start.student.model.norm.weight[3] = float("nan")
    checkpoint.save(weights, it.start.student, it.start.tokenizer, step=0, loss=0.0, stage="init")
    settings = config(tmp_path, data, model=None, tokenizer=None, init=InitSection(checkpoint=str(weights)))
    with pytest.raises(DistillError, match="step 1: loss nan") as caught:
        _run(settings)
    assert caught.value.exit_code == 1
    saved = torch.load(tmp_path / "checkpoints/worker.nan_step_1.pt")
    assert saved["records"] and len(saved["batches"][0]["lengths"]) == 2
    assert not (tmp_path / "checkpoints/worker.pt").exists()


_CHILD = """
import sys, time
from distill.train import loop, resume
from distill.train.kd import load_config
save = resume.save_partial
def slow(*arguments):
    save(*arguments)
    print("saved", flush=True)
    time.sleep(0.2)
resume.save_partial = slow
loop.run(load_config(sys.argv[1]))
"""


def test_a_killed_run_continues_bit_for_bit(tmp_path: Path, data: Path) -> None:
    files = {}
    for name in ("whole", "killed"):
        settings = config(tmp_path / name, data, epochs=3)
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(as_dict(settings)))
        if name == "whole":
            _run(settings)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(files["killed"])], stdout=subprocess.PIPE, text=True,
                             env=environment)  # fmt: skip
    assert child.stdout is not None
    seen = 0
    for line in child.stdout:
        seen += line.strip() == "saved"
        if seen == 4:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "killed/checkpoints/worker.pt").exists()
    _, text = _run(config(tmp_path / "killed", data, epochs=3))
    assert "continuing" in text
    _assert_equal(tmp_path / "whole/checkpoints/worker.pt", tmp_path / "killed/checkpoints/worker.pt")
    reports = [json.loads((tmp_path / n / "checkpoints/worker.report.json").read_text()) for n in ("whole", "killed")]
    for report in reports:
        del report["tokens_per_second"], report["provenance"]
    assert reports[0] == reports[1]


def test_an_interrupt_saves_the_step_and_pauses(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, data, save_every=0)
    whole = config(tmp_path / "whole", data, save_every=0)
    step = loop.Monitor.step

    def interrupt(self: loop.Monitor, number: int, *rest: object) -> None:
        step(self, number, *rest)  # type: ignore[arg-type]
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    monkeypatch.setattr(loop.Monitor, "step", interrupt)
    with pytest.raises(Paused, match="stopped at step 3"):
        _run(settings)
    monkeypatch.undo()
    assert "continuing" in _run(settings)[1]
    _run(whole)
    _assert_equal(tmp_path / "whole/checkpoints/worker.pt", tmp_path / "checkpoints/worker.pt")


def test_bf16_and_gradient_checkpointing_train_like_fp32(tmp_path: Path, data: Path) -> None:
    it = prepare(config(tmp_path, data))
    student, found = it.start.student.train(), {}
    for name, dtype, recompute in (("fp32", "fp32", False), ("checkpointed", "fp32", True), ("bf16", "bf16", False)):
        student.zero_grad()
        student.gradient_checkpointing = recompute
        gradients(student, [it.train.batch(list(range(8)))], it.objective._replace(dtype=dtype))
        assert all(p.grad.dtype == torch.float32 for p in student.parameters())
        found[name] = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert torch.equal(found["fp32"], found["checkpointed"])
    assert 0 < float((found["bf16"] - found["fp32"]).norm() / found["fp32"].norm()) < 0.05


def test_evaluation_leaves_no_trace(tmp_path: Path, data: Path) -> None:
    it = prepare(config(tmp_path, data))
    student = it.start.student.train()
    every = Objective(dict.fromkeys(("kl_div", "ce_teacher", "ce_ground_truth"), 1.0), chunk=7)
    one = evaluate(student, [it.val.batch([i]) for i in range(len(it.val))], every).means
    all_ = evaluate(student, [it.val.batch(list(range(len(it.val))))], every).means
    assert student.training and all(p.grad is None for p in student.parameters())
    assert one == pytest.approx(all_, rel=1e-5)


def test_learning_rate_rises_then_falls_to_its_floor() -> None:
    for schedule in ("cosine", "linear"):
        rates = [learning_rate(s, 100, peak=1.0, schedule=schedule, warmup=0.1, floor=0.1) for s in range(100)]
        assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
        assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.1)
        assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 1, peak=2.0, schedule="constant", warmup=0.0, floor=0.0) == 2.0
