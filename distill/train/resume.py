"""A run on disk: <stage>.pt.partial while it works, <stage>.pt, its report and latest.pt once it is finished."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from distill import checkpoint
from distill.artifacts import atomic_file, provenance, write_json
from distill.config import as_dict
from distill.errors import CheckpointError, ConfigError
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


def finished(it: Run) -> dict[str, Any] | None:
    """The report of this run if it is finished."""
    if not it.final.exists() or it.partial.exists():
        return None
    resume = _resume_of(it.final, it).resume or {}
    report = resume.get("report")
    if not isinstance(report, dict):
        raise CheckpointError(f"{it.final}: has no report; --restart trains anew over it")
    return report


def find(it: Run) -> checkpoint.Checkpoint | None:
    """The resumable checkpoint of this run, if it was stopped."""
    return _resume_of(it.partial, it) if it.partial.exists() else None


def save_partial(it: Run, optimiser: torch.optim.Optimizer, state: State) -> None:
    """Write the resumable checkpoint."""
    resume = {
        "fingerprint": it.mark,
        "optimiser": optimiser.state_dict(),
        "rng": torch.get_rng_state(),
        "tokens": state.tokens,
        "first_loss": state.first_loss,
        "before": state.before,
    }
    checkpoint.save(it.partial, it.start.student, it.start.tokenizer, step=state.step, loss=state.loss,
                    stage=it.config.stage, lineage=_lineage(it, state), resume=resume)  # fmt: skip


def restore(it: Run, optimiser: torch.optim.Optimizer, found: checkpoint.Checkpoint) -> State:
    """Put weights, optimiser and random state back; returns where the run stands."""
    resume = found.resume or {}
    it.start.student.load_state_dict(found.student.state_dict())
    try:
        optimiser.load_state_dict(resume["optimiser"])
        torch.set_rng_state(resume["rng"])
        return State(found.step, resume["first_loss"], found.loss, resume["tokens"], resume["before"])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{it.partial}: cannot be continued: {error}; --restart trains anew") from error


def _lineage(it: Run, state: State) -> list[dict[str, Any]]:
    c = it.config
    entry = {
        "stage": c.stage, "step": state.step, "fingerprint": it.mark, "init": as_dict(c.init),
        "data_run_id": it.train.dataset.header.run_id,
    }  # fmt: skip
    return [*it.start.lineage, entry]


def finish(it: Run, state: State, after: dict[str, float], speed: float) -> dict[str, Any]:
    """Write the stage's checkpoint, its report and latest.pt, and drop the resumable one."""
    c = it.config
    report = {
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
    header = it.train.dataset.header
    dataset = {"run_id": header.run_id, "kind": header.config.get("kind"), "teacher": header.teacher.model}
    made = provenance(as_dict(c), {"data": c.data}) | {"dataset": dataset}
    checkpoint.save(it.final, it.start.student, it.start.tokenizer, step=state.step, loss=state.loss, stage=c.stage,
                    lineage=_lineage(it, state), provenance=made,
                    resume={"fingerprint": it.mark, "report": report})  # fmt: skip
    write_json(it.beside(".report.json"), report | {"tokens_per_second": round(speed, 1), "provenance": made})
    if c.out is None:
        with atomic_file(it.final.with_name("latest.pt")) as temporary:
            shutil.copyfile(it.final, temporary)
    it.partial.unlink(missing_ok=True)
    return report
