"""The divergence operator beside the naive computation, torch, liger-kernel and TRL: time, memory, gradient error.

make bench-kd [KINDS="forward_kl jsd"] [ROUNDS=3]      (python -m tests.bench_kd --help)

Every cell is a process of its own on the same tensors; the implementations take turns, round by round. Time is the
least over the rounds, memory the peak above what the inputs take, the error that of the weight's gradient against fp64
on the first 128 tokens. Exits 1 where a bar is missed: at most 1.05 times the naive time and 0.25 of its memory, and
less of both than each opponent.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.train.divergence import linear_divergence
from distill.train.divergences import Divergence, Kind
from distill.train.targets import Dense, Sampled, Target, TopK
from tests.unit.divergence_oracle import Case, plainly, top_k

OPPONENTS = Path(".bench")
REQUIREMENTS = """liger-kernel==0.8.5 trl==1.16.0
  datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 pandas==3.1.1 pyarrow==26.0.1 python-dateutil==4.0.0 six==1.17.0
  xxhash==4.1.0"""
"""And what they import; torch and transformers are ours."""
KINDS: tuple[Kind, ...] = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")
BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
CHECKED = 128
TIME_BAR, MEMORY_BAR = 1.05, 0.25


class Cell(NamedTuple):
    """A loss to compute: kind of divergence (or cross_entropy) and form of the target."""

    kind: str
    form: str

    @property
    def contenders(self) -> list[str]:
        """Who computes it: those that have it."""
        if self.kind == "cross_entropy":
            return ["naive", "ours", "torch"]
        return ["naive", "ours"] + (["liger", "trl"] if self.form == "dense" and self.kind in BETA else [])


CELLS = [
    *(Cell(kind, "dense") for kind in KINDS), *(Cell(kind, "top_k") for kind in ("forward_kl", "jsd")),
    Cell("forward_kl", "sampled"), Cell("cross_entropy", "labels"),
]  # fmt: skip
Step = Callable[[Tensor, Tensor], Tensor]
"""From hidden states and weight, both with a gradient, to a loss: the mean over the tokens."""


def tensors(n: int, width: int, vocabulary: int) -> dict[str, Tensor]:
    """Student and teacher at some distance, with a top 64 and 64 draws."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, width, generator=g), torch.randn(vocabulary, width, generator=g) * 0.1
    theirs = hidden + 0.3 * torch.randn(n, width, generator=g)
    parts, drawn = [], []
    for first in range(0, n, 128):
        logits = theirs[first : first + 128] @ weight.T
        parts.append(top_k(logits, 64))
        drawn.append(torch.multinomial(logits.softmax(-1), 64, replacement=True, generator=g))
    ids = torch.cat(drawn)
    lp = torch.cat([(theirs[i : i + 128] @ weight.T).log_softmax(-1).gather(1, ids[i : i + 128])
                    for i in range(0, n, 128)])  # fmt: skip
    stored = {name: torch.cat([getattr(p, name) for p in parts]) for name in TopK._fields}
    labels = torch.randint(0, vocabulary, (n,), generator=g)
    return {"hidden": hidden, "weight": weight, "theirs": theirs, "drawn": ids, "drawn_lp": lp, "labels": labels,
            **stored}  # fmt: skip


def target_of(cell: Cell, data: dict[str, Tensor]) -> Target | None:
    if cell.form == "dense":
        return Dense(data["theirs"], data["weight"])
    if cell.form == "top_k":
        return TopK(*(data[name] for name in TopK._fields))
    if cell.form == "sampled":
        return Sampled(data["drawn"], data["drawn_lp"], torch.full(data["drawn"].shape, 1 / 64))
    return None


def case_of(cell: Cell, data: dict[str, Tensor]) -> Case:
    n = len(data["hidden"])
    labels = data["labels"] if cell.kind == "cross_entropy" else None
    how = Divergence(cell.kind) if cell.kind in KINDS else Divergence()
    each = torch.full((n,), 1 / n)
    return Case(data["hidden"], data["weight"], target_of(cell, data), how, each, labels, each, len(data["weight"]))


def ours(cell: Cell, data: dict[str, Tensor]) -> Step:
    case = case_of(cell, data)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_divergence(
            hidden, weight, target=case.target, divergence=case.how, divergence_weight_N=case.divergence_weight_N,
            labels_N=case.labels_N, cross_entropy_weight_N=case.cross_entropy_weight_N,
        ).total  # fmt: skip

    return step


def naive(cell: Cell, data: dict[str, Tensor]) -> Step:
    """What one writes: logits, log_softmax, the formula, autograd."""
    from tests.unit.divergence_oracle import divergence_of

    case, n = case_of(cell, data), len(data["hidden"])

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        if case.labels_N is not None:
            return torch.nn.functional.cross_entropy(logits, case.labels_N)
        return divergence_of(case, logits).sum() / n

    return step


def torch_own(cell: Cell, data: dict[str, Tensor]) -> Step:
    return lambda hidden, weight: torch.nn.functional.linear_cross_entropy(hidden, weight, data["labels"])


def liger(cell: Cell, data: dict[str, Tensor]) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=BETA[cell.kind], compiled=shutil.which("g++") is not None)
    return lambda hidden, weight: loss(hidden, weight, data["theirs"], data["weight"], data["labels"])


def trl(cell: Cell, data: dict[str, Tensor]) -> Step:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        found, _ = ChunkedDivergenceFunction.apply(
            hidden, weight, None, data["theirs"], data["weight"], None, BETA[cell.kind]
        )
        return found.sum() / len(hidden)

    return step


CONTENDERS = {"ours": ours, "naive": naive, "torch": torch_own, "liger": liger, "trl": trl}


def measure(who: str, cell: Cell, folder: Path) -> dict[str, float]:
    """Seconds and peak bytes of loss and gradient, after a warm-up on few tokens; the error on the first tokens."""
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))
    data = load_file(folder / "tensors.safetensors")
    few = {name: x if name == "weight" else x[:CHECKED].clone() for name, x in data.items()}
    exact = load_file(folder / f"{cell.kind}.{cell.form}.safetensors")["gradient"]
    _, gradient = _once(CONTENDERS[who](cell, few), few)
    error = float((gradient.double() - exact).norm() / exact.norm())
    del few, exact, gradient
    step = CONTENDERS[who](cell, data)
    before = _reset_peak()
    seconds, _ = _once(step, data)
    return {"seconds": seconds, "bytes": _status("VmHWM") - before, "error": error}


def _once(step: Step, data: dict[str, Tensor]) -> tuple[float, Tensor]:
    hidden, weight = data["hidden"].requires_grad_(), data["weight"].detach().requires_grad_()
    hidden.grad = weight.grad = None
    start = time.perf_counter()
    step(hidden, weight).backward()
    seconds = time.perf_counter() - start
    assert weight.grad is not None
    return seconds, weight.grad


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def install() -> str | None:
    """The opponents in a folder of their own; why not, where that fails."""
    if (OPPONENTS / "trl").is_dir() and (OPPONENTS / "liger_kernel").is_dir():
        return None
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(OPPONENTS)]
    done = subprocess.run([*pip, *REQUIREMENTS.split()], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def run_cell(cell: Cell, folder: Path, rounds: int, absent: set[str]) -> dict[str, dict[str, float]]:
    """Each contender's least seconds and bytes, the rounds interleaved."""
    found: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for who in cell.contenders:
            if who in absent:
                continue
            environment = os.environ | {"PYTHONPATH": f".{os.pathsep}{OPPONENTS}"}
            command = [sys.executable, "-m", "tests.bench_kd", "--cell", who, *cell, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{who} {cell.kind} {cell.form}: {done.stderr.strip()[-2000:]}")
            new = json.loads(done.stdout.strip().splitlines()[-1])
            found[who] = {k: min(v, found.get(who, new)[k]) for k, v in new.items()}
    return found


def report(cell: Cell, found: dict[str, dict[str, float]]) -> list[str]:
    """Print a line a contender; the bars that are missed."""
    base, mine, missed = found["naive"], found["ours"], []
    for who, value in found.items():
        print(f"{cell.kind:16s} {cell.form:8s} {who:6s} {value['seconds']:8.2f} s {value['bytes'] / 2**20:8.0f} MiB"
              f" {value['seconds'] / base['seconds']:6.2f} x {value['bytes'] / base['bytes']:6.2f} x"
              f" {value['error']:10.1e}", flush=True)  # fmt: skip
        for what, key in (("time", "seconds"), ("memory", "bytes")):
            if who not in ("naive", "ours") and value[key] <= mine[key]:
                missed.append(f"{cell.kind} {cell.form}: {who} needs less {what}")
    if mine["seconds"] > TIME_BAR * base["seconds"]:
        missed.append(f"{cell.kind} {cell.form}: {mine['seconds'] / base['seconds']:.2f} of the naive time")
    if mine["bytes"] > MEMORY_BAR * base["bytes"]:
        missed.append(f"{cell.kind} {cell.form}: {mine['bytes'] / base['bytes']:.2f} of the naive memory")
    if mine["error"] > 1.5 * base["error"]:
        missed.append(f"{cell.kind} {cell.form}: gradient error {mine['error']:.1e}, naive {base['error']:.1e}")
    return missed


def main(argv: list[str] | None = None) -> int:
    """Run the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench_kd", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="*", default=[*KINDS, "cross_entropy"], help="divergences, or cross_entropy")
    parser.add_argument("--rounds", type=int, default=3, help="times that each contender has its turn")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    args: Any = parser.parse_args(argv)
    if args.cell:
        who, kind, form, folder = args.cell
        print(json.dumps(measure(who, Cell(kind, form), Path(folder))))
        return 0
    cells = [cell for cell in CELLS if cell.kind in args.kinds]
    problem = install() if any("trl" in cell.contenders for cell in cells) else None
    absent = {"liger", "trl"} if problem else set()
    if problem:
        print(f"SKIPPED liger, trl: {problem}")
    missed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = tensors(args.tokens, args.width, args.vocabulary)
        save_file(data, folder / "tensors.safetensors")
        few = {key: x if key == "weight" else x[:CHECKED].clone() for key, x in data.items()}
        del data
        print(
            f"{args.tokens} tokens, width {args.width}, vocabulary {args.vocabulary}, fp32, torch {torch.__version__}"
        )
        print("divergence       target   who        time     memory   of naive: time memory   error vs fp64")
        for cell in cells:
            exact = plainly(case_of(cell, few), torch.float64).weight
            save_file({"gradient": exact}, folder / f"{cell.kind}.{cell.form}.safetensors")
            missed += report(cell, run_cell(cell, folder, args.rounds, absent))
    print("\n".join(missed) or "every bar is met")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
