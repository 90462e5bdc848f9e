"""The training loop: every preset and configuration, in one process or several (distill/train/distributed.py).

run(config) -> Report          train, or continue, or say that it is done
  prepare.prepare              student, data, plan of all steps, fingerprint
  resume.find, .restore        the same command again continues where it stopped, bit for bit
  _train                       the steps, checkpoints and evaluations between them
  resume.finish                latest.pt, report, <stage>.pt
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from rich.console import Console

from distill.artifacts import atomic_file, require_writable
from distill.data.batches import Batch
from distill.errors import DistillError, Paused
from distill.train import evaluation, resume
from distill.train.background import Writer, ahead
from distill.train.config import TrainConfig
from distill.train.distributed import open_world
from distill.train.fake_quantisation import FakeQuantised
from distill.train.monitor import Monitor, StepLog, say
from distill.train.objective import COMPONENTS, Sums
from distill.train.optimiser import make_optimiser, set_learning_rate
from distill.train.prepare import Run, State, describe, device_of, fake_quantised, prepare
from distill.train.sampling import own_answers
from distill.train.served import ServedTeacher
from distill.train.sharded import full, local, trained
from distill.train.step import gradients, learning_rate, precision
from distill.train.tracker import open_tracker


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
    with open_world(device_of(config)) as world:
        return _prepared(prepare(config, world), config, restart, console if world.first else Console(quiet=True))


def _prepared(it: Run, config: TrainConfig, restart: bool, console: Console) -> Report:
    with contextlib.closing(it.teacher) if isinstance(it.teacher, ServedTeacher) else contextlib.nullcontext():
        return _trained(it, config, restart, console)


def _trained(it: Run, config: TrainConfig, restart: bool, console: Console) -> Report:
    folder = Path(config.runs) / config.stage / it.mark[:12]
    with StepLog(folder / "steps.jsonl") if it.world.first else contextlib.nullcontext() as log:
        if (done := it.world.from_first(lambda: _already(it, restart))) is not None:
            say(console, f"{it.final}: this run is finished already ({done['steps']} steps); --restart trains anew")
            return Report(it.final, done, True)
        optimiser = make_optimiser(it.model.train(), config)
        say(console, describe(it))
        torch.manual_seed(config.seed)
        state = State(0, math.inf, math.inf, 0, {}, {})
        if (stopped := resume.find(it, lambda text: say(console, text))) is not None:
            state = resume.restore(it, optimiser, stopped)
            say(console, f"continuing {it.final} at step {state.step} of {len(it.steps)}")
        fake = fake_quantised(it, stopped[0] if stopped else None)
        tracked = config.tracker if it.world.first else "none"
        tracker = open_tracker(tracked, folder, config.stage, it.mark[:12], state.step)
        with (
            Monitor(config.stage, len(it.steps), log, tracker, console) as monitor,
            Writer() as writer,
            _stop_signals() as stop,
        ):
            return _train(_Work(it, optimiser, monitor, writer, stop, fake), state)


def _already(it: Run, restart: bool) -> dict[str, Any] | None:
    """Clear up, and the report of this very run if it is finished."""
    require_writable(it.final.parent)
    resume.clean(it)
    if restart:
        resume.drop(it)
        return None
    return resume.finished(it)


class _Work(NamedTuple):
    """A run at work: what changes while it trains, beside its State."""

    it: Run
    optimiser: torch.optim.Optimizer
    monitor: Monitor
    writer: Writer
    stop: list[int]
    """Signals that came."""
    fake: FakeQuantised | None
    """The weights as deployed, where training goes through them."""

    def deployed(self) -> contextlib.AbstractContextManager[None]:
        """What is computed in here is computed with the weights that the device will have."""
        return contextlib.nullcontext() if self.fake is None else self.fake.applied()


def _train(work: _Work, state: State) -> Report:
    it, c, monitor = work.it, work.it.config, work.monitor
    _require_finite(work, state)
    if not state.step:
        state = _before(work, state)
    monitor.begin(state.step)
    numbers = range(state.step, len(it.steps))
    with ahead(lambda number: _read(it, number), numbers) as windows:
        for number in numbers:
            if c.eval_every and number and number % c.eval_every == 0:
                _evaluate(work, state)
            state = _step(work, state, windows)
            work.writer.check()
            if any(it.world.gather(bool(work.stop))):
                _pause(work, state)
            if c.save_every and state.step % c.save_every == 0 and state.step != len(it.steps):
                _save(work, state)
    speed = monitor.tokens_per_second
    _require_finite(work, state)
    after = _evaluate(work, state) if it.steps else state.before
    if not it.steps:
        loss = sum(weight * after.get(name, 0.0) for name, weight in it.weights.items())
        state = state._replace(first_loss=loss, loss=loss)
    work.writer.wait()
    _say_held_out(monitor, "after", after)
    student = it.whole(keep=it.world.first, device=torch.device("cpu"))
    report = it.world.from_first(lambda: resume.finish(it, student, state, after, speed, work.fake))
    return Report(it.final, report, False)


def _before(work: _Work, state: State) -> State:
    """The held-out values at the start."""
    if work.fake is not None:
        state = state._replace(unquantised=_evaluate(work._replace(fake=None), state))
        _say_held_out(work.monitor, "unquantised", state.unquantised)
    state = state._replace(before=_evaluate(work, state))
    _say_held_out(work.monitor, "before" if work.fake is None else "in its formats", state.before)
    return state


def _read(it: Run, number: int) -> list[Batch]:
    """This process's micro-batches of a step, but for the sequences that the student is to answer itself."""
    own = it.on_policy
    read = ([i for i in indices if not own.chosen(number, i)] for indices in it.world.mine(it.steps[number]))
    return [it.train.batch(indices) for indices in read if indices]


def _own(it: Run, number: int) -> list[Batch]:
    """The student's own answers, in micro-batches of their own."""
    own = it.on_policy
    if not own.share:
        return []
    student = it.whole()  # processes draw different numbers of tokens: shards could not follow
    chosen = ([i for i in indices if own.chosen(number, i)] for indices in it.world.mine(it.steps[number]))
    with precision(it.config.dtype, it.device, keep_copies=True):
        return [own_answers(student, it.train, some, own, number, it.start.tokenizer) for some in chosen if some]


def _step(work: _Work, state: State, windows: Iterator[list[Batch]]) -> State:
    it, c, number = work.it, work.it.config, state.step
    lr = learning_rate(number, len(it.steps), peak=c.lr, schedule=c.schedule, warmup=c.warmup, floor=c.min_lr_ratio)
    set_learning_rate(work.optimiser, lr)
    asked = time.monotonic()
    window = next(windows)
    waited = time.monotonic() - asked
    with work.deployed():
        window = [batch.to(it.device) for batch in window + _own(it, number)]
        sums = gradients(it.model, window, it.objective, it.world)
    norm = float(full(torch.nn.utils.clip_grad_norm_(it.model.parameters(), c.grad_clip or math.inf)))
    loss = sums.total(it.weights)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise _not_finite(it, number + 1, window, sums, loss, norm)
    work.optimiser.step()
    work.optimiser.zero_grad(set_to_none=True)
    every = c.quantisation.refit_every if c.quantisation else 0
    # not after the last one: the weights have learned with the tables that they leave with
    if work.fake is not None and every and (number + 1) % every == 0 and number + 1 < len(it.steps):
        work.fake.refit()
    tokens = sum(it.world.gather(sum(batch.tokens for batch in window)))
    work.monitor.step(number + 1, loss, tokens, {**sums.shown, "grad_norm": norm, "lr": lr}, waited)
    first = state.first_loss if number else loss
    return state._replace(step=number + 1, first_loss=first, loss=loss, tokens=state.tokens + tokens)


def _evaluate(work: _Work, state: State) -> dict[str, float]:
    """Per-token means over the held-out records, also by kind of span (`kl_div/tool_name`); {} where there are none.

    Also shows text samples.
    """
    stop = work.stop if work.it.world.size == 1 else []  # several go through it together, to its end
    try:
        with work.deployed():
            sums = evaluation.held_out(work.it, stop)
            texts = evaluation.samples(work.it, stop) if work.it.config.tracker != "none" else {}
    except evaluation.Interrupted:
        _pause(work, state)
    for name, value in sums.means.items():
        if not math.isfinite(value):
            raise DistillError(f"step {state.step}: {name} of the held-out records is {value}")
    work.monitor.scalars(state.step, {f"val/{name}": value for name, value in sums.shown.items()})
    work.monitor.texts(state.step, texts)
    return sums.means | sums.span_means


def _save(work: _Work, state: State) -> None:
    """Write a resumable checkpoint beside the loop, after the one before it."""
    _require_finite(work, state)
    work.writer.wait()
    if work.it.world.size > 1:
        work.it.world.gather(None)  # the one before it is whole
        resume.thin(work.it, state.step)
    work.monitor.sync()
    data = resume.snapshot(work.it, work.optimiser, state, work.fake)
    work.writer.start(lambda: resume.write(work.it, data))


def _require_finite(work: _Work, state: State) -> None:
    """DistillError if the last update has spoilt the weights: they are not written over sound ones."""
    sound = all(bool(local(value).isfinite().all()) for value in trained(work.it.model).values())
    if not all(work.it.world.gather(sound)):
        when = f" after its update (learning rate {work.it.config.lr:g})" if state.step else ", those it starts from"
        raise DistillError(f"step {state.step}: weights are not finite{when}")


def _pause(work: _Work, state: State) -> NoReturn:
    """Save and stop. Before the first step there is nothing to save."""
    if state.step:
        _save(work, state)
        work.writer.wait()
    if not work.it.world.first:
        raise SystemExit(Paused.exit_code)  # the first process says it
    raise Paused(f"stopped at step {state.step} of {len(work.it.steps)}; the same command continues")


def _say_held_out(monitor: Monitor, when: str, values: dict[str, float]) -> None:
    if values:
        monitor.say(
            f"held out, {when}: " + "  ".join(f"{name} {values[name]:.4f}" for name in COMPONENTS if name in values)
        )


def _not_finite(it: Run, step: int, window: list[Batch], sums: Sums, loss: float, norm: float) -> DistillError:
    """Save what made it, and say where."""
    process = f".{it.world.rank}of{it.world.size}" if it.world.size > 1 else ""
    path = it.beside(f".nan_step_{step}{process}.pt")
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
