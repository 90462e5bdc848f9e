"""What LoRA and 8-bit moments cost and save: `python -m tests.bench_scale [--seeds 3] [--steps 100]`.

For each seed a toy worker is stopped early and then trained on in four ways, from the same checkpoint over the same
batches: every weight or adapters, moments in fp32 or in 8 bits. Judged by the held-out KL; bytes are those of the
gradients and of the moments, as they lie in memory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console

from distill.train import loop
from distill.train.config import InitSection, LoraSection
from distill.train.optimiser import make_optimiser, optimiser_bytes
from distill.train.prepare import prepare
from distill.train.step import gradients
from distill.train.toy import toy_model
from tests.unit.train_sets import config, write_set

LR, LORA_LR = 1e-3, 2e-3
WAYS: dict[str, dict[str, Any]] = {
    "every weight, adamw": {},
    "every weight, adamw8bit": {"optimiser": "adamw8bit"},
    "LoRA, adamw": {"lora": LoraSection(), "lr": LORA_LR},
    "LoRA, adamw8bit": {"lora": LoraSection(), "lr": LORA_LR, "optimiser": "adamw8bit"},
}


class Found(NamedTuple):
    """Held-out KL per token, training loss of the last step, and milliseconds a step once it is compiled."""

    held_out: float
    loss: float
    step_ms: float


def one_seed(seed: int, steps: int, folder: Path) -> tuple[float, dict[str, Found], dict[str, tuple[int, int]]]:
    """The worker's held-out KL, and of each way what was found, and its bytes of gradients and moments."""
    data = write_set(folder / "kd.jsonl", 96, val=32)
    shared: dict[str, Any] = {"epochs": 100, "batch_size": 8, "lr": LR, "seed": seed, "save_every": 0,
                              "tracker": "none", "schedule": "constant", "warmup": 0.0}  # fmt: skip
    quiet = Console(quiet=True)
    first = config(folder, data, **shared, model=toy_model(128, 4), max_steps=20, stage="start")
    start = loop.run(first, console=quiet)
    init = InitSection(checkpoint=str(start.checkpoint))
    settings = config(folder, data, **shared, model=None, tokenizer=None, init=init, max_steps=steps)
    found, held = {}, {}
    for number, (name, changes) in enumerate(WAYS.items()):
        way = msgspec.structs.replace(settings, **changes, stage=f"way{number}")
        report = loop.run(way, console=quiet).values
        it = prepare(way)
        optimiser = make_optimiser(it.model.train(), way)
        for timed in (False, True):
            gradients(it.model, [it.train.batch([0, 1])], it.objective)
            begun = time.monotonic()
            optimiser.step()
            took = 1000 * (time.monotonic() - begun) if timed else 0.0
        grads = sum(p.grad.numel() * p.grad.element_size() for p in it.model.parameters() if p.grad is not None)
        found[name] = Found(report["held_out"]["after"]["kl_div"], report["loss"], took)
        held[name] = grads, optimiser_bytes(optimiser)
    return start.values["held_out"]["after"]["kl_div"], found, held


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_scale", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    every, starts = [], []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as name:
            start, found, held = one_seed(seed, args.steps, Path(name))
        starts.append(start)
        every.append(found)
    print(f"{args.seeds} seeds, {args.steps} steps; the worker's held-out KL: {statistics.mean(starts):.3f}")
    print("| way | held-out KL | sd over seeds | gradients | moments | optimiser's step |\n|---|---|---|---|---|---|")
    for name in WAYS:
        values = [found[name].held_out for found in every]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        step = min(found[name].step_ms for found in every)
        grads, moments = (f"{size / 1024:,.0f} KiB" for size in held[name])
        print(f"| {name} | {statistics.mean(values):.3f} | {spread:.3f} | {grads} | {moments} | {step:.1f} ms |")


if __name__ == "__main__":
    main()
