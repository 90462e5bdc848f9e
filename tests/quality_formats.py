"""What each weight format costs, and what training through it gives back: `make quality-formats` after `make quality`.

For each seed of `make quality`, its float student is put into each format as it is (scales and palettes calibrated on
32 training sequences) and then trained on through the deployed weights, at equal tokens; `fp16` is the control, that
trains on as well. Held-out KL to the teacher is exact. A run that was stopped goes on; a finished one is not repeated.
The teacher's weights were dequantised and lie on a 4-bit grid, which would flatter every 4-bit format: the first lines
say how much of that grid is left in the students.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distill import checkpoint
from distill.config import build, load_yaml
from distill.export.deployed import matrices
from distill.formats import Format, Formats, stored_bytes
from distill.model import Student
from distill.pretrained import from_pretrained
from distill.train import loop
from distill.train.config import TrainConfig
from tests.quality import BASE, BOTH

FORMATS = {
    "fp16": Formats(),
    "int8": Formats(blocks="int8", embedding="int8"),
    "int4/32": Formats(blocks="int4/32", embedding="int8"),
    "lut4/16": Formats(blocks="lut4/16", embedding="int8"),
    "lut3/16": Formats(blocks="lut3/16", embedding="int8"),
    "lut2/16": Formats(blocks="lut2/16", embedding="int8"),
}
"""By the format of the blocks' matrices."""
LEARNING_RATES = {"lut3/16": 1e-4, "lut2/16": 3e-4}
"""The coarser the format, the further a weight has to go to its next value."""


class Cell(NamedTuple):
    """A format and a seed: held-out values per token."""

    unquantised: dict[str, float]
    post_training: dict[str, float]
    trained: dict[str, float]
    checkpoint: Path


def config_of(name: str, seed: int, tokens: int, student: Path, folder: Path) -> TrainConfig:
    """The configuration of one run."""
    slug = f"{name.replace('/', '_')}_{seed}"
    data: dict[str, Any] = load_yaml(BASE) | {
        "stage": slug, "seed": seed, "token_budget": tokens, "loss_weights": BOTH,
        "teacher": {"folder": load_yaml(BASE)["init"]["from_pretrained"], "target": "dense"},
        "init": {"checkpoint": str(student)}, "lr": LEARNING_RATES.get(name, 3e-5), "warmup": 0.2, "weight_decay": 0.0,
        "quantisation": {"formats": {"blocks": FORMATS[name].blocks, "embedding": FORMATS[name].embedding},
                         "calibration_records": 32, "refit_every": 4},
        "save_every": 0, "out": str(folder / f"{slug}.pt"), "runs": str(folder / "runs"), "tracker": "none",
    }  # fmt: skip
    return build(data, TrainConfig, BASE)


def run(config: TrainConfig) -> Cell:
    """Train, or find it trained."""
    values = loop.run(config).values["held_out"]
    return Cell(values["unquantised"], values["before"], values["after"], config.final)


@torch.no_grad()
def on_grid(student: Student, size: int = 32) -> float:
    """Share of the blocks of `size` inputs whose values are 16 evenly spaced ones (to a twentieth of the spacing), as
    those of llama.cpp's Q4_1 are; of random values one block in 10^30 would be so."""
    found = total = 0
    for block in student.model.layers:
        for weight_OI in (p for p in block.parameters() if p.ndim == 2):
            x_BN = weight_OI.detach().float().reshape(-1, size)
            low_B1 = x_BN.amin(1, keepdim=True)
            steps_BN = (x_BN - low_B1) * 15 / (x_BN.amax(1, keepdim=True) - low_B1).clamp_min(1e-12)
            found += int(((steps_BN - steps_BN.round()).abs() < 0.05).all(1).sum())
            total += len(x_BN)
    return found / total


def stored(student: Student, formats: Formats) -> float:
    """Megabytes of the program's matrices in weight.bin."""
    sizes = []
    for matrix in matrices(student):
        form: Format = formats.of(matrix.parameter)
        sizes.append(stored_bytes(form, tuple(matrix.shape[:2])))
    return sum(sizes) / 1e6


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def row(name: str, cells: list[Cell], megabytes: float) -> str:
    """A line of the table."""
    columns = [_spread([getattr(cell, kind)[component] for cell in cells])
               for component in ("kl_div", "ce_teacher") for kind in ("post_training", "trained")]  # fmt: skip
    return f"{name:8} {megabytes:7.1f}  " + "  ".join(f"{column:>15}" for column in columns)


def main() -> int:
    """Train every cell that is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=10240, help="of each run")
    parser.add_argument("--students", default="runs/quality/100000/whole_distribution_{seed}.pt", help="one a seed")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    args = parser.parse_args()
    folder = Path("runs/quality_formats") / str(args.tokens)
    students = {seed: Path(args.students.format(seed=seed)) for seed in args.seeds}
    teacher = load_yaml(BASE)["init"]["from_pretrained"]
    print(f"blocks of 32 weights on a 4-bit grid: teacher {on_grid(from_pretrained(teacher)):.2%}")
    for seed, path in students.items():
        print(f"  student {seed}: {on_grid(checkpoint.load(path).student):.2%}", flush=True)
    cells: dict[str, list[Cell]] = {name: [] for name in args.formats}
    for seed, path in students.items():
        for name in args.formats:
            cells[name].append(run(config_of(name, seed, args.tokens, path, folder)))
    float_values = [cell.unquantised for cell in cells[args.formats[0]]]
    print(f"{len(args.seeds)} seeds, {args.tokens:,} tokens each; float students: "
          f"KL {_spread([v['kl_div'] for v in float_values])}, "
          f"cross-entropy {_spread([v['ce_teacher'] for v in float_values])}")  # fmt: skip
    print(
        f"{'blocks':8} {'MB':>7}  {'KL, as it is':>15}  {'KL, trained':>15}  {'CE, as it is':>15}  {'CE, trained':>15}"
    )
    student = checkpoint.load(students[args.seeds[0]]).student
    for name, found in cells.items():
        print(row(name, found, stored(student, FORMATS[name])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
