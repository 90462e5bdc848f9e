"""The plan of a run beside what it takes: peak resident memory of real runs on this CPU, one process a cell.

python -m tests.bench_memory [--only NAME ...]

Growth is the process's peak above what it had after a first tiny run; the plan's total should be 0.9 to 1.3 of it.
Exits 1 where it is not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from distill.model import ModelConfig, Student
from distill.pretrained import save_pretrained
from distill.tokenizer import toy_tokenizer
from distill.train import loop, memory
from distill.train.config import LoraSection, OnPolicySection, TeacherSection, TrainConfig
from tests.unit.train_sets import config, write_set

LOW, HIGH = 0.9, 1.3


class Cell(NamedTuple):
    """A student, and what differs from two steps of one micro-batch without checkpoints on the way."""

    width: int
    layers: int
    vocabulary: int
    tokens: int = 2048
    tied: bool = False
    teacher: str | None = None
    settings: dict[str, Any] | None = None


CELLS = {
    "small": Cell(256, 4, 8192),
    "narrow": Cell(256, 4, 8192, 8192),
    "deep": Cell(256, 12, 8192, 4096),
    "wide": Cell(576, 8, 49152),
    "tied": Cell(576, 8, 49152, tied=True),
    "accumulation": Cell(576, 6, 49152, settings={"accumulation": 3}),
    "recomputed": Cell(512, 6, 8192, 2048, settings={"gradient_checkpointing": True}),
    "checkpoints": Cell(512, 8, 16384, 1024, settings={"save_every": 1}),
    "dense teacher": Cell(384, 6, 32768, teacher="dense"),
    "top-k teacher": Cell(384, 6, 32768, teacher="top_k"),
    "on policy": Cell(256, 4, 8192, 1024, teacher="dense", settings={"on_policy": OnPolicySection(0.5, 32)}),
    "LoRA": Cell(512, 8, 16384, settings={"lora": LoraSection()}),
    "8-bit moments": Cell(576, 8, 49152, settings={"optimiser": "adamw8bit"}),
}


def settings_of(cell: Cell, folder: Path) -> TrainConfig:
    """The cell's configuration, with its data and its teacher in `folder`."""
    heads = cell.width // 64
    model = ModelConfig(cell.vocabulary, cell.width, cell.width * 8 // 3, cell.layers, heads,
                        heads // (3 if heads % 2 else 2), head_dim=64, tie_word_embeddings=cell.tied)  # fmt: skip
    data = write_set(folder / "d.jsonl", 400, val=4)
    section = None
    if cell.teacher:
        save_pretrained(Student(model).init_weights(1), folder / "teacher")
        (folder / "teacher/tokenizer.json").write_text(toy_tokenizer().to_json())
        section = TeacherSection(folder=str(folder / "teacher"), target=cell.teacher)  # type: ignore[arg-type]
    values = {"model": model, "teacher": section, "batch_tokens": cell.tokens, "max_steps": 2, "save_every": 0,
              "tracker": "none", "threads": 2}  # fmt: skip
    return config(folder, data, **(values | (cell.settings or {})))


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Plan and peak growth, in bytes. For a process of its own."""
    settings, quiet = settings_of(cell, folder), Console(quiet=True)
    tiny = folder / "tiny"
    loop.run(config(tiny, write_set(tiny / "d.jsonl", 4, val=2), max_steps=2, tracker="none"), console=quiet)
    planned = memory.plan(settings, torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    loop.run(settings, console=quiet)
    return {"planned": planned.needed, "measured": _status("VmHWM") - before, "peak": planned.peak,
            "rows": {name: row.size for name, row in planned.rows.items() if planned.peak in row.at}}  # fmt: skip


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def in_process(name: str) -> dict[str, Any]:
    """The same in a new process."""
    made = subprocess.run([sys.executable, "-m", "tests.bench_memory", "--cell", name], check=True, text=True,
                          stdout=subprocess.PIPE, env=os.environ | {"PYTHONHASHSEED": "0"})  # fmt: skip
    return dict(json.loads(made.stdout.splitlines()[-1]))


def main(argv: list[str] | None = None) -> int:
    """Print a line a cell."""
    parser = argparse.ArgumentParser(prog="bench_memory", description="The plan of a run beside what it takes.")
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS), help="cells; all of them")
    parser.add_argument("--cell", choices=CELLS, help=argparse.SUPPRESS)
    parser.add_argument("-v", action="store_true", help="also the rows of the peak")
    args = parser.parse_args(argv)
    if args.cell:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tiny").mkdir()
            print(json.dumps(measure(CELLS[args.cell], Path(folder))))
        return 0
    print("| run | student | tokens | planned, MiB | measured | planned / measured |\n|---|---|---|---|---|---|")
    missed = 0
    for name in args.only:
        cell, found = CELLS[name], in_process(name)
        ratio = found["planned"] / found["measured"]
        missed += not LOW <= ratio <= HIGH
        print(f"| {name} | {cell.width} x {cell.layers}, {cell.vocabulary:,} ids | {cell.tokens:,} | "
              f"{found['planned'] >> 20:,} | {found['measured'] >> 20:,} | {ratio:.2f} |", flush=True)  # fmt: skip
        if args.v:
            print("   ", found["peak"], {k: v >> 20 for k, v in found["rows"].items()}, flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
