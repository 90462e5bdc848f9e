"""The training loop: one process, one device, every preset and configuration.

run(config) -> Report          train, or continue, or say that it is done
  prepare.prepare              student, data, plan of all steps, fingerprint
  resume.find, .restore        the same command again continues where it stopped, bit for bit
  _train                       the steps
  resume.finish                report, <stage>.pt, latest.pt
"""

from __future__ import annotations

import contextlib
import math
import signal
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from rich.console import Console

from distill.artifacts import atomic_file
from distill.data.batches import Batch, micro_batches
from distill.errors import DistillError, Paused
from distill.train import resume
from distill.train.config import TrainConfig
from distill.train.divergences import Divergence
from distill.train.monitor import Monitor
from distill.train.objective import COMPONENTS, Sums
from distill.train.prepare import Run, State, describe, prepare
from distill.train.step import evaluate, gradients, learning_rate


class Report(NamedTuple):
    """A finished run: its checkpoint, its report as written, and whether it was finished already."""

    checkpoint: Path
    values: dict[str, Any]
    already: bool


def run(config: TrainConfig, *, restart: bool = False, console: Console | None = None) -> Report:
    """Train as `config` says. Continues a stopped run; does nothing if this very run is finished already.

    Another run's checkpoint in the way is a ConfigError, unless `restart`.
    """
    with _threads(config.threads):
        return _run(config, restart, console or Console())


def _run(config: TrainConfig, restart: bool, console: Console) -> Report:
    it = prepare(config)
    if restart:
        it.partial.unlink(missing_ok=True)
    elif (done := resume.finished(it)) is not None:
        _say(console, f"{it.final}: this run is finished already ({done['steps']} steps); --restart trains anew")
        return Report(it.final, done, True)
    stopped = resume.find(it)
    student = it.start.student.to(it.device).train()
    student.gradient_checkpointing = config.gradient_checkpointing
    optimiser = _optimiser(student, config)
    _say(console, describe(it))
    if stopped is None:
        torch.manual_seed(config.seed)
        state = State(0, math.inf, math.inf, 0, _held_out(it))
        _say_held_out(console, "before", state.before)
    else:
        state = resume.restore(it, optimiser, stopped)
        _say(console, f"continuing {it.partial} at step {state.step} of {len(it.steps)}")
    folder = Path(config.runs) / config.stage / it.mark[:12]
    with Monitor(config.stage, len(it.steps), state.step, folder, console) as monitor, _stop_signals() as stop:
        if not state.step:
            monitor.scalars(0, _named("val", state.before))
        state = _train(it, optimiser, state, monitor, stop)
        speed = monitor.tokens_per_second
        after = _held_out(it)
        monitor.scalars(state.step, _named("val", after))
    _say_held_out(console, "after", after)
    return Report(it.final, resume.finish(it, state, after, speed), False)


def _train(it: Run, optimiser: torch.optim.Optimizer, state: State, monitor: Monitor, stop: list[int]) -> State:
    c, student = it.config, it.start.student
    parameters = list(student.parameters())
    for number in range(state.step, len(it.steps)):
        lr = learning_rate(number, len(it.steps), peak=c.lr, schedule=c.schedule, warmup=c.warmup, floor=c.min_lr_ratio)
        for group in optimiser.param_groups:
            group["lr"] = lr
        window = [it.train.batch(indices).to(it.device) for indices in it.steps[number]]
        sums = gradients(student, window, it.objective)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, c.grad_clip or math.inf))
        loss = sums.total(it.weights)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _not_finite(it, number + 1, window, sums, loss, norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        tokens = sum(batch.tokens for batch in window)
        first = state.first_loss if number else loss
        state = State(number + 1, first, loss, state.tokens + tokens, state.before)
        monitor.step(state.step, loss, sums.means, tokens, {"grad_norm": norm, "lr": lr})
        last = state.step == len(it.steps)
        if stop and not last:
            resume.save_partial(it, optimiser, state)
            raise Paused(f"stopped at step {state.step} of {len(it.steps)}; the same command continues")
        if c.save_every and state.step % c.save_every == 0 and not last:
            resume.save_partial(it, optimiser, state)
        if c.eval_every and state.step % c.eval_every == 0 and not last:
            values = _held_out(it)
            monitor.scalars(state.step, _named("val", values))
    return state


def _held_out(it: Run) -> dict[str, float]:
    """Per-token means over the held-out records, in fp32 at temperature 1, by component; {} where there are none."""
    stage = msgspec.structs.replace(it.config.stages()[-1], batch_tokens=it.config.stages()[-1].largest)
    batches = (it.val.batch(part).to(it.device) for part in micro_batches(range(len(it.val)), it.val.lengths, stage))
    every = it.objective._replace(weights=dict.fromkeys(COMPONENTS, 1.0), divergence=Divergence(), dtype="fp32")
    return evaluate(it.start.student, batches, every).means


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _say_held_out(console: Console, when: str, values: dict[str, float]) -> None:
    if values:
        _say(console, f"held out, {when}: " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))


def _named(group: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{group}/{name}": value for name, value in values.items()}


def _optimiser(student: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    matrices = [p for p in student.parameters() if p.ndim >= 2]
    vectors = [p for p in student.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=1e-8, fused=True)


def _not_finite(it: Run, step: int, window: list[Batch], sums: Sums, loss: float, norm: float) -> DistillError:
    """Save what made it, and say where."""
    path = it.beside(f".nan_step_{step}.pt")
    ids = [it.train.dataset[r].id for batch in window for r in batch.records]
    batches = [batch.to(torch.device("cpu"))._asdict() for batch in window]
    with atomic_file(path) as temporary:
        torch.save({"step": step, "records": ids, "batches": batches, "sums": sums._asdict()}, temporary)
    parts = ", ".join(f"{name} {value:.4g}" for name, value in sums.means.items())
    return DistillError(
        f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g} ({parts}); its batch is saved in {path}"
    )


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """`number` CPU threads for a while; 0 leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM is noted (the step is completed and saved); a second one acts as ever."""
    noted: list[int] = []
    old: dict[signal.Signals, Any] = {}

    def note(number: int, frame: types.FrameType | None) -> None:
        noted.append(number)
        signal.signal(number, old[signal.Signals(number)])

    try:
        for which in (signal.SIGINT, signal.SIGTERM):
            old[which] = signal.signal(which, note)
    except ValueError:  # not the main thread: signals are its business
        pass
    try:
        yield noted
    finally:
        for which, handler in old.items():
            signal.signal(which, handler)
