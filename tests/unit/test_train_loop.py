"""The loop: how the work is cut up does not matter, a stopped run continues bit for bit, a NaN stops it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console

from distill import checkpoint
from distill.data.records import Dataset
from distill.errors import CheckpointError, ConfigError, DistillError, InputError, Paused
from distill.model import Student
from distill.pretrained import save_pretrained
from distill.tokenizer import toy_tokenizer
from distill.train import loop, resume
from distill.train.background import ahead
from distill.train.config import InitSection, LossWeights, OnPolicySection, TeacherSection, TrainConfig
from distill.train.monitor import StepLog
from distill.train.objective import Objective
from distill.train.prepare import Run, prepare
from distill.train.step import evaluate, gradients, learning_rate
from distill.train.toy import toy_model
from tests.unit.test_train_alignment import bpe
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
    assert {name.partition("/")[0] for name in held_out["before"]} == {"kl_div", "ce_teacher", "ce_ground_truth"}
    assert {"kl_div", "kl_div/final", "ce_teacher/tool_args"} < set(held_out["before"])
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
    with pytest.raises(ConfigError, match=r"made with other settings: lr;") as caught:
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
    with pytest.raises(DistillError, match="step 0: weights are not finite"):
        _run(settings)
    with pytest.raises(DistillError, match="step 2: loss nan") as caught:
        _run(config(tmp_path, data, lr=1e38, warmup=0.0, save_every=0))
    assert caught.value.exit_code == 1
    saved = torch.load(tmp_path / "checkpoints/worker.nan_step_2.pt")
    assert saved["records"] and len(saved["batches"][0]["lengths"]) == 2
    assert not (tmp_path / "checkpoints/worker.pt").exists()


def test_spoilt_weights_are_never_written(tmp_path: Path, data: Path) -> None:
    """The last update's too, which no step comes after."""
    for changes in ({"max_steps": 1, "save_every": 0}, {"save_every": 1}):
        with pytest.raises(DistillError, match="step 1: weights are not finite after its update"):
            _run(config(tmp_path, data, lr=1e38, warmup=0.0, **changes))
        assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(tmp_path: Path, data: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*checkpoints"):
        _run(config(tmp_path, data, save_every=0))
    assert _log(tmp_path) == b""


def _interrupt(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """SIGINT just after the `call`th call of `owner.name`."""
    wrapped, calls = getattr(owner, name), []

    def interrupted(*arguments: Any) -> Any:
        value = wrapped(*arguments)
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return value

    monkeypatch.setattr(owner, name, interrupted)


def _stopped(settings: TrainConfig, step: int) -> None:
    """Run it until it has done `step` steps, and leave its checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        _interrupt(patch, loop.Monitor, "step", step)
        with pytest.raises(Paused, match=f"stopped at step {step} of") as caught:
            _run(settings)
    assert caught.value.exit_code == 75


def _partials(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*.step_*"))


def _log(folder: Path) -> bytes:
    (path,) = (folder / "runs").rglob("steps.jsonl")
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Folder of an undisturbed run of 24 steps."""
    folder = tmp_path_factory.mktemp("whole")
    _run(config(folder, data, save_every=0))
    return folder


def _assert_same_run(one: Path, other: Path) -> None:
    _assert_equal(one / "checkpoints/worker.pt", other / "checkpoints/worker.pt")
    assert _log(one) == _log(other) and _partials(one) == _partials(other) == []


def test_an_interrupt_saves_the_step_and_pauses(tmp_path: Path, data: Path, whole: Path) -> None:
    settings = config(tmp_path, data, save_every=0)
    _stopped(settings, 3)
    assert _partials(tmp_path) == ["worker.step_000003.pt", "worker.step_000003.pt.sha256"]
    assert "at step 3 of 24" in _run(settings)[1]
    _assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(("call", "step"), [(1, 0), (2, 4), (7, 24)], ids=["before", "between", "after"])
def test_an_interrupt_during_an_evaluation_ends_it_at_once_and_loses_nothing(
    tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, call: int, step: int
) -> None:
    settings = config(tmp_path, data, save_every=3, eval_every=4)
    _interrupt(monkeypatch, loop.evaluation, "evaluate", call)
    with pytest.raises(Paused, match=f"stopped at step {step} of 24"):
        _run(settings)
    monkeypatch.undo()
    assert ("continuing" in _run(settings)[1]) == (step > 0)
    _assert_same_run(tmp_path, whole)


def test_an_evaluation_looks_for_a_signal_before_each_batch_and_each_sample(tmp_path: Path, data: Path) -> None:
    it = prepare(config(tmp_path, data))
    for work in (loop.evaluation.held_out, loop.evaluation.samples):
        with pytest.raises(loop.evaluation.Interrupted):
            work(it, [signal.SIGTERM])
        work(it, [])


def test_an_interrupt_while_a_checkpoint_is_being_written_waits_for_it(
    tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, write, done = config(tmp_path, data, save_every=2), resume.write, []

    def slow(it: Run, contents: dict[str, Any]) -> None:
        if not done:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        write(it, contents)
        done.append(contents["step"])

    monkeypatch.setattr(resume, "write", slow)
    with pytest.raises(Paused):
        _run(settings)
    monkeypatch.undo()
    assert done[0] == 2 and len(done) == 2
    assert f"worker.step_{done[1]:06d}.pt" in _partials(tmp_path)
    _run(settings)
    _assert_same_run(tmp_path, whole)


def test_the_last_checkpoints_are_kept_and_a_snapshot_is_of_its_own_step(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, write = config(tmp_path, data, save_every=1, keep_checkpoints=3), resume.write

    def late(it: Run, contents: dict[str, Any]) -> None:
        time.sleep(0.05)  # the next step is done before this one is written
        write(it, contents)

    monkeypatch.setattr(resume, "write", late)
    _stopped(settings, 7)
    names = [f"worker.step_{step:06d}.pt" for step in (5, 6, 7)]
    assert _partials(tmp_path) == sorted([*names, *(f"{name}.sha256" for name in names)])
    losses = [json.loads(line)["loss"] for line in _log(tmp_path).splitlines()]
    for step, name in zip((5, 6, 7), names):
        found = checkpoint.load(tmp_path / "checkpoints" / name)
        moments = (found.resume or {})["optimiser"]["state"]
        assert found.step == step and found.loss == losses[step - 1]
        assert {int(moment["step"]) for moment in moments.values()} == {step}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SPOILS: dict[str, Callable[[Path], object]] = {
    "a bit": _flip,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "unsealed": lambda path: checkpoint.seal_of(path).unlink(),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(
    tmp_path: Path, data: Path, whole: Path, spoil: Callable[[Path], object]
) -> None:
    settings = config(tmp_path, data, save_every=1)
    _stopped(settings, 6)
    newest = tmp_path / "checkpoints/worker.step_000006.pt"
    spoil(newest)
    text = _run(settings)[1]
    told = [line for line in text.splitlines() if str(newest) in line]
    assert len(told) == 1 and "the one before it is used" in told[0] and "at step 5 of 24" in text
    _assert_same_run(tmp_path, whole)


def test_where_every_checkpoint_is_damaged_the_run_says_so_and_restart_trains_anew(
    tmp_path: Path, data: Path, whole: Path
) -> None:
    settings = config(tmp_path, data, save_every=1)
    _stopped(settings, 4)
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        _flip(path)
    with pytest.raises(CheckpointError, match="no resumable checkpoint of this run is sound; --restart"):
        _run(settings)
    _run(settings, restart=True)
    _assert_same_run(tmp_path, whole)


class _Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("owned",))


def test_a_hostile_checkpoint_is_never_unpickled_and_its_nonsense_is_one_line(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = config(tmp_path, data, save_every=1)
    _stopped(settings, 2)
    newest = tmp_path / "checkpoints/worker.step_000002.pt"
    sound = torch.load(newest)
    first = next(iter(sound["resume"]["optimiser"]["state"]))

    def forge(change: Callable[[dict[str, Any]], object]) -> None:
        forged = torch.load(newest.with_name("kept"))
        change(forged["resume"])
        checkpoint.write_sealed(newest, forged)

    shutil.copy(newest, newest.with_name("kept"))
    forge(lambda found: found.update(extra=_Malice()))
    assert "holds something other than tensors" in _run(settings)[1] and not (tmp_path / "owned").exists()
    shutil.rmtree(tmp_path / "checkpoints")
    _stopped(settings, 2)
    shutil.copy(newest, newest.with_name("kept"))
    for change in (
        lambda found: found.update(rng={"cpu": torch.zeros(3)}),
        lambda found: found.update(before=[1]),
        lambda found: found.update(optimiser=None),
        lambda found: found["optimiser"]["state"][first].update(exp_avg=torch.zeros(2, 2)),
        lambda found: found["optimiser"]["state"].clear(),
    ):
        forge(change)
        with pytest.raises(CheckpointError, match="cannot be continued") as caught:
            _run(settings)
        assert "\n" not in str(caught.value)


def test_a_full_disk_during_a_background_save_ends_the_run_and_loses_nothing(
    tmp_path: Path, data: Path, whole: Path
) -> None:
    settings = config(tmp_path, data, save_every=2)
    _stopped(settings, 5)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*worker\.step_000006\.pt") as caught:
            _run(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before
    _run(settings)
    _assert_same_run(tmp_path, whole)


def test_a_second_process_on_the_same_run_is_refused(tmp_path: Path, data: Path) -> None:
    settings = config(tmp_path, data)
    folder = tmp_path / "runs/worker" / prepare(settings).mark[:12]
    with StepLog(folder / "steps.jsonl"), pytest.raises(InputError, match="another process is training this run"):
        _run(settings)
    assert not _run(settings)[0].already


def test_the_log_of_steps_loses_what_came_after_the_checkpoint_and_what_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    for lines, done, left in (
        (['{"step": 1, "loss": 1.0}', '{"step": 2, "loss": 1.0}', '{"step": 3, "los'], 2, 2),
        (['{"step": 1, "loss": 1.0}', '{"step": 3, "loss": 1.0}'], 3, 1),
        (["", '{"step": 1, "loss": 1.0}'], 3, 0),
    ):
        path.write_text("\n".join(lines))
        with StepLog(path) as log:
            log.begin(done)
            log.add({"step": done + 1, "loss": 2.5})
        assert path.read_text().splitlines() == [*lines[:left], f'{{"step": {done + 1}, "loss": 2.5}}']


def test_batches_built_ahead_come_in_order_one_step_ahead_and_an_error_in_its_place() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        if number == 3:
            raise InputError("row 3 is damaged")
        return number * number

    with ahead(make, range(9)) as results:
        assert next(results) == 0
        assert next(results) == 1 and next(results) == 4
        with pytest.raises(InputError, match="row 3"):
            next(results)
    assert made in ([0, 1, 2, 3], [0, 1, 2, 3, 4])
    with ahead(make, range(3)) as results:
        assert list(results) == [0, 1, 4]
    with ahead(make, range(0)) as results:
        assert list(results) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_a_run_with_batches_built_in_the_loop_gives_the_same_bits(
    tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def at_once(make: Callable[[int], Any], given: Iterable[int]) -> Iterator[Iterator[Any]]:
        yield map(make, given)

    monkeypatch.setattr(loop, "ahead", at_once)
    _run(config(tmp_path, data, save_every=0))
    _assert_same_run(tmp_path, whole)


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


@pytest.mark.parametrize("target", ["dense", "top_k", "sampled"])
def test_a_teacher_beside_the_student_takes_the_place_of_the_store(tmp_path: Path, target: Any) -> None:
    path = write_set(tmp_path / "text.jsonl", 12, distributions=False, truth=None)
    folder = tmp_path / "teacher"
    teacher = Student(toy_model(32, 2)).init_weights(7)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(8)  # one that prefers some ids
    save_pretrained(teacher, folder)
    (folder / "tokenizer.json").write_text(toy_tokenizer().to_json())
    section = TeacherSection(str(folder), target, 20)
    settings = config(tmp_path, path, teacher=section, loss_weights=LossWeights(1.0, 0.0, 0.0), epochs=6, lr=3e-3)
    report, text = _run(settings)
    held_out = report.values["held_out"]
    assert f"beside the student, {target}" in text and set(report.values["loss_weights"]) == {"kl_div"}
    assert held_out["after"]["kl_div"] < held_out["before"]["kl_div"]
    with pytest.raises(ConfigError, match="tokenizer is not the student's"):
        (folder / "tokenizer.json").write_text(toy_tokenizer().to_json().replace('"<tool_call>"', '"<other_call>"'))
        _run(settings, restart=True)


def _with_teacher(folder: Path, data: Path, **changes: Any) -> TrainConfig:
    teacher = folder / "teacher"
    if not teacher.exists():
        save_pretrained(Student(toy_model(32, 2)).init_weights(7), teacher)
        (teacher / "tokenizer.json").write_text(toy_tokenizer().to_json())
    values: dict[str, Any] = {"teacher": TeacherSection(str(teacher)), "divergence": "reverse_kl", "save_every": 0}
    return config(folder, data, **values | changes)


def test_on_policy_steps_learn_from_the_students_own_answers(tmp_path: Path, data: Path) -> None:
    own = OnPolicySection(share=0.5, max_new_tokens=12)
    it = prepare(_with_teacher(tmp_path, data, on_policy=own))
    own_tokens = read = 0
    for number in range(len(it.steps)):
        read += sum(len(batch.lengths) for batch in loop._read(it, number))
        for batch in loop._own(it, number):
            own_tokens += batch.targets
            assert not batch.teacher_N.any() and batch.targets <= 12 * len(batch.lengths)
            read += len(batch.lengths)
    assert own_tokens and read == sum(len(batch) for step in it.steps for batch in step), "each sequence once a pass"
    report, text = _run(_with_teacher(tmp_path, data, on_policy=own))
    assert "50% of the sequences end in the student's own words" in text
    assert report.values["held_out"]["after"]["kl_div"] > 0


def test_an_interrupted_on_policy_run_continues_bit_for_bit(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = OnPolicySection(share=0.7, max_new_tokens=8)
    _run(_with_teacher(tmp_path / "whole", data, on_policy=own))
    step = loop.Monitor.step

    def interrupt(self: loop.Monitor, number: int, *rest: Any) -> None:
        step(self, number, *rest)
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    monkeypatch.setattr(loop.Monitor, "step", interrupt)
    with pytest.raises(Paused, match="stopped at step 3"):
        _run(_with_teacher(tmp_path / "stopped", data, on_policy=own))
    monkeypatch.undo()
    _run(_with_teacher(tmp_path / "stopped", data, on_policy=own))
    _assert_equal(tmp_path / "whole/checkpoints/worker.pt", tmp_path / "stopped/checkpoints/worker.pt")


def test_on_policy_without_anybody_to_judge_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="on_policy needs a teacher"):
        config(tmp_path, data, on_policy=OnPolicySection())


def test_a_teacher_with_another_tokenizer_is_aligned_by_bytes(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "teacher"
    tokenizer = bpe([record.prompt + record.teacher_text for record in Dataset.open(data)], 400)
    save_pretrained(Student(toy_model(32, 2)).init_weights(7), folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    section = TeacherSection(str(folder), "aligned")
    settings = config(tmp_path, data, teacher=section, epochs=4, lr=3e-3)
    report, text = _run(settings)
    held_out = report.values["held_out"]
    assert "beside the student, aligned by bytes" in text
    assert held_out["after"]["kl_div"] < held_out["before"]["kl_div"]
