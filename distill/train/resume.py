"""A run on disk: <stage>.step_000120.pt while it works, <stage>.pt, its report and latest.pt once it is finished.

A resumable checkpoint has its sha256 beside it; the last `keep_checkpoints` are kept.
"""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill import checkpoint
from distill.artifacts import atomic_file, provenance, sweep, write_json
from distill.config import as_dict
from distill.errors import CheckpointError, ConfigError, InputError
from distill.train.prepare import Run, State


def _resume_of(path: Path, it: Run) -> checkpoint.Checkpoint:
    """The checkpoint at `path`, if it is this run's; ConfigError if it is another's."""
    found = checkpoint.load(path)
    if (found.resume or {}).get("fingerprint") != it.mark:
        raise ConfigError(
            f"{path} was made with another configuration or other data; --restart trains anew over it, "
            f"another `stage` or `checkpoints` keeps it"
        )
    return found


def resumable(it: Run) -> list[Path]:
    """The resumable checkpoints, newest first."""
    name = re.compile(re.escape(it.final.stem) + r"\.step_\d{6,}\.pt")
    found = [path for path in it.final.parent.glob(f"{_stem(it)}.step_*.pt") if name.fullmatch(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _stem(it: Run) -> str:
    return glob.escape(it.final.stem)


def finished(it: Run) -> dict[str, Any] | None:
    """The report of this run if it is finished."""
    if not it.final.exists() or resumable(it):
        return None
    resume = _resume_of(it.final, it).resume or {}
    report = resume.get("report")
    if not isinstance(report, dict):
        raise CheckpointError(f"{it.final}: has no report; --restart trains anew over it")
    return report


def find(it: Run, say: Callable[[str], None]) -> checkpoint.Checkpoint | None:
    """The newest resumable checkpoint of this run that is sound; a damaged one is told, and the one before it taken.

    CheckpointError if all are damaged, ConfigError if it is another run's.
    """
    paths = resumable(it)
    for path in paths:
        try:
            checkpoint.require_seal(path)
            return _resume_of(path, it)
        except ConfigError:
            raise
        except InputError as error:
            say(f"{error}; it is left aside, and the one before it is used")
    if paths:
        raise CheckpointError(f"{paths[0]}: no resumable checkpoint of this run is sound; --restart trains anew")
    return None


def clean(it: Run) -> None:
    """Remove what a killed process left half done. Only for the one process that trains this run."""
    folder = it.final.parent
    alone = (seal for seal in folder.glob(f"{_stem(it)}.step_*.pt.sha256") if not seal.with_suffix("").exists())
    for path in (*folder.glob(f".{_stem(it)}.step_*.tmp"), *alone):
        path.unlink(missing_ok=True)
    for path in (it.final, it.beside(".report.json"), _latest(it)):
        sweep(path)


def drop(it: Run) -> None:
    """Remove the resumable checkpoints."""
    _remove(resumable(it))


def _remove(paths: list[Path]) -> None:
    """The checkpoint first: one without its sha256 would look damaged."""
    for path in paths:
        path.unlink(missing_ok=True)
        checkpoint.seal_of(path).unlink(missing_ok=True)


def snapshot(it: Run, optimiser: torch.optim.Optimizer, state: State) -> dict[str, Any]:
    """A resumable checkpoint of this moment, on the CPU: what training changes next does not change it."""
    resume = {
        "fingerprint": it.mark,
        "optimiser": optimiser.state_dict(),
        "rng": _random_state(it.device),
        "tokens": state.tokens,
        "first_loss": state.first_loss,
        "before": state.before,
    }
    data = checkpoint.contents(it.start.student, it.start.tokenizer, step=state.step, loss=state.loss,
                               stage=it.config.stage, lineage=_lineage(it, state), resume=resume)  # fmt: skip
    return _copied(data)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def write(it: Run, data: dict[str, Any]) -> None:
    """Write a snapshot, and then remove those that are not to be kept."""
    path = it.beside(f".step_{data['step']:06d}.pt")
    checkpoint.write_sealed(path, data)
    later = [other for other in resumable(it) if _step_of(other) > data["step"]]  # found damaged
    _remove(later)
    _remove(resumable(it)[it.config.keep_checkpoints :])


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of PyTorch's generators; training draws from no other."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def restore(it: Run, optimiser: torch.optim.Optimizer, found: checkpoint.Checkpoint) -> State:
    """Put weights, optimiser and random state back; returns where the run stands."""
    resume = found.resume or {}
    try:
        it.start.student.load_state_dict(found.student.state_dict())
        optimiser.load_state_dict(resume["optimiser"])
        _check_moments(optimiser)
        torch.set_rng_state(resume["rng"]["cpu"])
        if it.device.type in resume["rng"] and it.device.type != "cpu":
            torch.get_device_module(it.device).set_rng_state(resume["rng"][it.device.type])
        if not 0 < found.step <= len(it.steps):
            raise ValueError(f"step {found.step} of {len(it.steps)}")
        before = {str(name): float(value) for name, value in resume["before"].items()}
        return State(found.step, float(resume["first_loss"]), found.loss, int(resume["tokens"]), before)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{it.final}: its run cannot be continued: {reason}; --restart trains anew") from error


def _check_moments(optimiser: torch.optim.Optimizer) -> None:
    """Every parameter has AdamW's moments, of its shape."""
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            kept = optimiser.state[parameter]
            shapes = {name: tuple(kept[name].shape) for name in ("step", "exp_avg", "exp_avg_sq")}
            own = tuple(parameter.shape)
            if shapes != {"step": (), "exp_avg": own, "exp_avg_sq": own}:
                raise ValueError(f"moments of shape {shapes} for a parameter of {own}")


def _lineage(it: Run, state: State) -> list[dict[str, Any]]:
    c = it.config
    entry = {
        "stage": c.stage, "step": state.step, "fingerprint": it.mark, "init": as_dict(c.init),
        "data_run_id": it.train.dataset.header.run_id,
    }  # fmt: skip
    return [*it.start.lineage, entry]


def _latest(it: Run) -> Path:
    return it.final.with_name("latest.pt")


def finish(it: Run, state: State, after: dict[str, float], speed: float) -> dict[str, Any]:
    """Write latest.pt, the report and, last, the stage's checkpoint; drop the resumable ones. Returns the report."""
    c = it.config
    report = _report(it, state, after)
    header = it.train.dataset.header
    dataset = {"run_id": header.run_id, "kind": header.config.get("kind"), "teacher": header.teacher.model}
    made = provenance(as_dict(c), {"data": c.data}) | {"dataset": dataset}

    def beside(whole: Path) -> None:
        if c.out is None:
            with atomic_file(_latest(it)) as temporary:
                shutil.copyfile(whole, temporary)
        write_json(it.beside(".report.json"), report | {"tokens_per_second": round(speed, 1), "provenance": made})

    data = checkpoint.contents(it.start.student, it.start.tokenizer, step=state.step, loss=state.loss, stage=c.stage,
                               lineage=_lineage(it, state), provenance=made,
                               resume={"fingerprint": it.mark, "report": report})  # fmt: skip
    checkpoint.write(it.final, data, beside=beside)
    drop(it)
    return report


def _report(it: Run, state: State, after: dict[str, float]) -> dict[str, Any]:
    c = it.config
    return {
        "stage": c.stage,
        "fingerprint": it.mark,
        "parameters": it.start.student.config.n_params(),
        "steps": state.step,
        "tokens": state.tokens,
        "first_loss": state.first_loss,
        "loss": state.loss,
        "sequences": len(it.train),
        "too_long": it.train.too_long,
        "loss_weights": it.weights,
        "held_out": {"records": len({e.record for e in it.val.items}), "target_tokens": it.val.carried,
                     "before": state.before, "after": after},
        "absent": [name for name, weight in as_dict(c.loss_weights).items() if weight and name not in it.weights],
    }  # fmt: skip
