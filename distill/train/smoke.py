"""The steps behind scripts/test_toy_training.sh: each checks one thing for real and prints the fact it found.

python -m distill.train.smoke dataset|model|step|checkpoint --dir D
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from distill import checkpoint
from distill.data.batches import Examples
from distill.data.records import Dataset
from distill.errors import DistillError, stage_main
from distill.train import init
from distill.train.kd import load_config
from distill.train.objective import TOTAL
from distill.train.prepare import prepare
from distill.train.step import gradients


def check_dataset(folder: Path) -> list[str]:
    """The set loads, tokenises, and every sequence fits its distributions."""
    config = load_config(str(folder / "toy_config.yaml"))
    dataset = Dataset.open(config.data)
    examples = Examples(dataset, dataset.tokenizer(), "train", max_length=config.max_length)
    for index in range(len(examples)):
        batch = examples.batch([index])
        if not bool(batch.has_distribution_N.all()) or not bool((batch.labels_N >= 0).all()):
            raise DistillError(f"{config.data}: sequence {index} lacks distributions")
    _require(len(examples) >= len(dataset) > 0, f"{config.data}: {len(examples)} sequences of {len(dataset)} records")
    return [str(len(dataset))]


def check_model(folder: Path) -> list[str]:
    """The model is built, and its logits have the right shape and are finite."""
    start = init.build(load_config(str(folder / "toy_config.yaml")))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        logits = start.student(ids)
    _require(bool(logits.isfinite().all()), "the first logits are not finite")
    n = sum(parameter.numel() for parameter in start.student.parameters())
    return [str(logits.shape), f"{n:,}"]


def check_step(folder: Path) -> list[str]:
    """One step's loss and gradient: every component present, every parameter reached."""
    it = prepare(load_config(str(folder / "toy_config.yaml")))
    student = it.start.student.train()
    sums = gradients(student, [it.train.batch(indices) for indices in it.steps[0]], it.objective)
    total = sums.total(it.weights)
    _require(math.isfinite(total) and total > 0, f"the loss is {total}")
    for name, parameter in student.named_parameters():
        grad = parameter.grad
        if grad is None or not bool(grad.isfinite().all()) or not bool(grad.count_nonzero()):
            raise DistillError(f"{name}: its gradient is absent, not finite or zero")
    return [f"{total:.4f}", str([*sums.means, TOTAL])]


def check_checkpoint(folder: Path) -> list[str]:
    """What the training run saved is complete, has moved, and survives a second save and load bit for bit."""
    config = load_config(str(folder / "toy_config.yaml"))
    path = Path(config.checkpoints) / f"{config.stage}.pt"
    first, found = init.build(config).student.state_dict(), checkpoint.load(path)
    _require(found.step == config.max_steps, f"{path}: step {found.step}, expected {config.max_steps}")
    weights = found.student.state_dict()
    still = [name for name, value in weights.items() if torch.equal(value, first[name])]
    _require(not still, f"{path}: training left {', '.join(still)} as it was")
    copy = folder / "toy_model_copy.pt"
    checkpoint.save(copy, found.student, found.tokenizer, step=found.step, loss=found.loss, stage=found.stage)
    again = checkpoint.load(copy).student.state_dict()
    _require(all(torch.equal(value, again[name]) for name, value in weights.items()), f"{copy}: differs from {path}")
    copy.unlink()
    return [str(found.step)]


CHECKS: dict[str, Callable[[Path], list[str]]] = {
    "dataset": check_dataset,
    "model": check_model,
    "step": check_step,
    "checkpoint": check_checkpoint,
}


def _require(ok: bool, otherwise: str) -> None:
    if not ok:
        raise DistillError(otherwise)


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Run one check; prints a fact a line."""
    parser = argparse.ArgumentParser(prog="smoke", description="One step of scripts/test_toy_training.sh.")
    parser.add_argument("check", choices=sorted(CHECKS))
    parser.add_argument("--dir", required=True, type=Path, help="what training.make_toy_training wrote")
    args = parser.parse_args(argv)
    print("\n".join(CHECKS[args.check](args.dir)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
