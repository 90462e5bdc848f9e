"""What each kind of teacher signal is worth at equal tokens: `make quality` [SEEDS="0 1 2"] [TOKENS=100000].

One student (18 of SmolLM2-135M-Instruct's 30 layers), one dataset (from `make mini` or `make kd-dataset`), one budget
of tokens; only what the student learns from differs: the teacher's text, its likeliest 50 ids and the mass of the rest,
50 draws, or its whole distribution. Held-out KL is exact (the whole distribution, whatever the run learned from).
Every run is an ordinary run of the engine under runs/quality: stopped, it goes on; finished, it is not repeated.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distill import checkpoint
from distill.config import build, load_yaml
from distill.train import loop
from distill.train.config import TrainConfig
from distill.train.evaluation import held_out
from distill.train.prepare import prepare

BASE = "configs/worker_mini.yaml"


class Signal(NamedTuple):
    """What a run learns from."""

    weights: dict[str, float]
    target: str


TEXT = {"kl_div": 0.0, "ce_teacher": 1.0, "ce_ground_truth": 0.0}
BOTH = {"kl_div": 0.9, "ce_teacher": 0.1, "ce_ground_truth": 0.0}
SIGNALS = {
    "text only": Signal(TEXT, "dense"),
    "top 50 and tail": Signal(BOTH, "top_k"),
    "50 draws": Signal(BOTH, "sampled"),
    "whole distribution": Signal(BOTH, "dense"),
}
"""The teacher stands beside text-only runs too, for the held-out KL alone."""


def config_of(name: str, seed: int, tokens: int, folder: Path) -> TrainConfig:
    """The configuration of one run."""
    signal, slug = SIGNALS[name], name.replace(" ", "_")
    data: dict[str, Any] = load_yaml(BASE) | {
        "stage": f"{slug}_{seed}", "seed": seed, "token_budget": tokens, "loss_weights": signal.weights,
        "teacher": {"folder": load_yaml(BASE)["init"]["from_pretrained"], "target": signal.target},
        "out": str(folder / f"{slug}_{seed}.pt"), "runs": str(folder / "runs"), "tracker": "none",
    }  # fmt: skip
    return build(data, TrainConfig, BASE)


def run(config: TrainConfig) -> dict[str, float]:
    """Train, or find it trained; its held-out values per token."""
    return loop.run(config).values["held_out"]["after"]


def agreement(config: TrainConfig) -> float:
    """Share of held-out tokens at which student and teacher would say the same."""
    it = prepare(config)
    it.start.student.load_state_dict(checkpoint.load(it.final).student.state_dict())
    assert it.teacher is not None
    same = total = 0
    with torch.no_grad():
        for index in range(len(it.val)):
            batch = it.val.batch([index])
            hidden = it.start.student.eval().hidden(batch.ids_T[None], lengths=batch.lengths)[0]
            ours = it.start.student.lm_head(hidden.index_select(0, batch.positions_N)).argmax(1)
            dense = it.teacher.dense(batch)
            same += int((ours == (dense.hidden_NE.float() @ dense.weight_VE.T).argmax(1)).sum())
            total += len(ours)
    return same / total


def row(name: str, found: list[dict[str, float]]) -> str:
    """Mean and spread over the seeds."""
    cells = []
    for key in ("kl_div", "ce_teacher", "top1"):
        values = [value[key] for value in found]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):8.4f}{spread}")
    return f"{name:20s} " + "  ".join(cells)


def main() -> None:
    """Run all, print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=100_000, help="of each run, prompts included")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    args = parser.parse_args()
    folder = args.out / str(args.tokens)
    table: dict[str, list[dict[str, float]]] = {name: [] for name in SIGNALS}
    for seed in args.seeds:
        for name in SIGNALS:
            config = config_of(name, seed, args.tokens, folder)
            table[name].append(run(config) | {"top1": agreement(config)})
            print(f"seed {seed}: {row(name, table[name][-1:])}", flush=True)
    first = prepare(config_of("whole distribution", args.seeds[0], args.tokens, folder))
    before = held_out(first, []).means
    print(f"\n{args.tokens:,} tokens a run, seeds {args.seeds}, held out: {len(first.val)} records")
    print(f"{'learned from':20s} exact KL  cross-entropy  top-1 as the teacher; mean ± standard deviation")
    print(f"{'(initialisation)':20s} {before['kl_div']:8.4f}  {before['ce_teacher']:8.4f}")
    for name, found in table.items():
        print(row(name, found))


if __name__ == "__main__":
    main()
