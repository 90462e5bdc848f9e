"""The plan of a run beside what it takes: real runs on this CPU, in processes of their own.

python -m tests.bench_memory [--only NAME ...] [-v]

Tensors: the peak of all that PyTorch allocates from a run's start to its end, byte for byte, by its profiler (of the
first of two ranks, where there are two). The plan without its rows for malloc, and for the batches that another thread
makes, should be 0.95 to 1.25 of it; the command exits with 1 where it is not. Resident: how much the process grows,
without the profiler, from what it had after a first tiny run.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from distill.data.schema import Record, Turn
from distill.model import ModelConfig, Student
from distill.pretrained import save_pretrained
from distill.tokenizer import toy_tokenizer
from distill.train import loop, memory
from distill.train.config import LoraSection, OnPolicySection, TeacherSection, TrainConfig
from distill.train.distributed import launched
from distill.train.footprint import MOMENTS, SAVING
from distill.train.toy import toy_model
from tests.ranks import Ranks
from tests.unit.train_sets import config, episode, random_distribution, write_records

LOW, HIGH = 0.95, 1.25
_UNSEEN = ("malloc", "batches")
_LONGEST = 256
_MIB = 1 << 20
_IDS = toy_tokenizer().vocab_size
"""What a teacher's head is cut to: the plan counts with its whole vocabulary."""


class Cell(NamedTuple):
    """A student, and what differs from two steps of one micro-batch without checkpoints on the way."""

    width: int
    layers: int
    vocabulary: int
    tokens: int = 1024
    tied: bool = False
    teacher: str | None = None
    settings: Mapping[str, Any] = {}
    ranks: int = 1
    resident: bool = True


CELLS = {
    "plain": Cell(256, 4, 4096),
    "deep": Cell(128, 12, 4096),
    "wide vocabulary": Cell(256, 2, 32768),
    "tied": Cell(256, 2, 32768, tied=True),
    "accumulation": Cell(256, 4, 16384, settings={"accumulation": 3}),
    "recomputed": Cell(256, 6, 4096, 2048, settings={"gradient_checkpointing": True}),
    "bf16": Cell(256, 4, 4096, settings={"dtype": "bf16"}),
    "bf16, recomputed": Cell(256, 6, 4096, 2048, settings={"dtype": "bf16", "gradient_checkpointing": True}),
    "LoRA": Cell(256, 4, 4096, settings={"lora": LoraSection()}),
    "LoRA, checkpoints": Cell(256, 4, 4096, 256, settings={"lora": LoraSection(), "save_every": 1}),
    "8-bit moments": Cell(256, 4, 8192, settings={"optimiser": "adamw8bit"}, resident=False),
    "dense teacher": Cell(256, 3, _IDS, 2048, teacher="dense"),
    "top-k teacher": Cell(256, 3, _IDS, 2048, teacher="top_k"),
    "on policy": Cell(256, 6, _IDS, teacher="dense", settings={"on_policy": OnPolicySection(1.0, 32)}),
    "checkpoints": Cell(256, 4, 8192, 512, settings={"save_every": 1}),
    "two ranks": Cell(256, 4, 8192, 512, settings={"accumulation": 2}, ranks=2),
    "two ranks, recomputed": Cell(256, 6, 8192, settings={"accumulation": 4, "gradient_checkpointing": True}, ranks=2),
}


def prepared(cell: Cell, folder: Path) -> None:
    """Write the cell's data and its teacher."""
    n = 2 * cell.tokens * cell.settings.get("accumulation", 1) // _LONGEST
    records = [_record(i, "val" if i == n else "train", "on_policy" in cell.settings) for i in range(n + 1)]
    write_records(folder / "d.jsonl", records, [random_distribution(record) for record in records])
    if cell.teacher:
        save_pretrained(Student(_model(cell)).init_weights(1), folder / "teacher")
        (folder / "teacher/tokenizer.json").write_text(toy_tokenizer().to_json())


def _model(cell: Cell) -> ModelConfig:
    heads = cell.width // 64
    return ModelConfig(cell.vocabulary, cell.width, cell.width * 8 // 3, cell.layers, heads, heads // 2, head_dim=64,
                       tie_word_embeddings=cell.tied)  # fmt: skip


def settings_of(cell: Cell, folder: Path) -> TrainConfig:
    """The cell's configuration, where `prepared` has written."""
    section = TeacherSection(folder=str(folder / "teacher"), target=cell.teacher) if cell.teacher else None  # type: ignore[arg-type]
    values = {"model": _model(cell), "teacher": section, "batch_size": cell.tokens // _LONGEST, "max_length": _LONGEST,
              "max_steps": 2, "save_every": 0, "tracker": "none"}  # fmt: skip
    return config(folder, folder / "d.jsonl", **{**values, **cell.settings})


def _record(number: int, split: str, asked: bool) -> Record:
    """One long turn: the question where it is the student that answers."""
    long, short = ("It rains. " * 49).strip(), "Rain?"
    turns = [Turn("user", long if asked else short), Turn("assistant", short if asked else long, origin="teacher")]
    return msgspec.structs.replace(episode(turns, identity=f"episode-{number}"), split=split, tools=[])


def _measure(cell: Cell, folder: str, exact: bool) -> None:
    """A rank's measurement; the first one writes it, in bytes, into `folder`."""
    place, first = Path(folder), launched().first
    settings = settings_of(cell, place)
    found = tensors(settings) if exact else _growth(settings, place)
    if first:
        (place / "found").write_text(str(found))


def tensors(settings: TrainConfig) -> int:
    """Peak of what is allocated by the thread of the run and those of its backward passes. A checkpoint is freed in
    another thread, so that it counts until the run ends, as it may be written so long."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loop.run(settings, console=Console(quiet=True))
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def _growth(settings: TrainConfig, folder: Path) -> int:
    """Peak resident memory above that after a tiny run, which loads what is loaded once."""
    tiny = msgspec.structs.replace(settings, model=toy_model(32, 1), max_steps=1, teacher=None, on_policy=None,
                                   stage="tiny")  # fmt: skip
    loop.run(tiny, console=Console(quiet=True))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    loop.run(settings, console=Console(quiet=True))
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def measured(cell: Cell, *, exact: bool) -> int:
    """Bytes that the cell's run takes: tensors exactly, or growth of resident memory."""
    with tempfile.TemporaryDirectory() as folder:
        prepared(cell, Path(folder))
        codes = Ranks(cell.ranks, _measure, cell, folder, exact, silent=True).wait(300)
        if any(codes):
            raise RuntimeError(f"exit codes {codes}")
        return int((Path(folder) / "found").read_text())


def planned(cell: Cell) -> tuple[memory.Plan, str]:
    """The plan, and the moment of this run at which it has most: without save_every nothing is saved on the way."""
    with tempfile.TemporaryDirectory() as folder:
        prepared(cell, Path(folder))
        plan = memory.plan(settings_of(cell, Path(folder)), torch.device("cpu"), cell.ranks)
    moments = [m for m in MOMENTS if m != SAVING or plan.rows["snapshot"].at == MOMENTS]
    return plan, max(moments, key=plan.at)


def tensors_of(plan: memory.Plan, moment: str) -> int:
    """What the profiler should see."""
    return sum(row.size for name, row in plan.rows.items() if moment in row.at and name not in _UNSEEN)


def main(argv: list[str] | None = None) -> int:
    """Print a line a cell."""
    parser = argparse.ArgumentParser(prog="bench_memory", description="The plan of a run beside what it takes.")
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS), help="cells; all of them")
    parser.add_argument("--tensors", action="store_true", help="without resident memory")
    parser.add_argument("-v", action="store_true", help="also the rows of the peak")
    args = parser.parse_args(argv)
    print("| run | student | tokens | tensors, MiB | planned | resident, MiB | planned |\n" + "|---" * 7 + "|")
    missed = 0
    for name in args.only:
        cell = CELLS[name]
        (plan, moment), exact = planned(cell), measured(cell, exact=True)
        ratio = tensors_of(plan, moment) / exact
        missed += not LOW <= ratio <= HIGH
        line = f"| {name} | {cell.width} x {cell.layers}, {cell.vocabulary:,} ids | {cell.tokens:,} | "
        line += f"{exact / _MIB:,.1f} | {ratio:.2f} |"
        if cell.resident and not args.tensors:
            grown = measured(cell, exact=False)
            line += f" {grown / _MIB:,.0f} | {plan.at(moment) / grown:.2f} |"
        else:
            line += " | |"
        print(line, flush=True)
        if args.v:
            rows = {k: round(row.size / _MIB, 1) for k, row in plan.rows.items() if moment in row.at}
            print("   ", moment, rows, {m: round(plan.at(m) / _MIB, 1) for m in MOMENTS}, flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
