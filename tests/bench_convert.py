"""Memory and time of a conversion beside the layers of the model: SmolLM2-135M's dimensions, random weights.

python -m tests.bench_convert [--layers 4 8 16 30] [--only decode prefill int4/32] [--check]

A program is traced in one process and converted in another, from its file to the package on disk. Resident and
private: the process's peaks above what it had once torch and coremltools were imported, as multiples of the fp32
weights; a tied head counts once. Time is the processor's, which other processes on the machine disturb least. With
--check the command exits with 1 where the peak of the whole model is not below twice its weights, or where the time
grows faster than layers to the power of 1.15.
"""

from __future__ import annotations

import argparse
import itertools
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from distill.artifacts import write_json
from distill.contract import Contract, read_contract
from distill.export import goldens, programs
from distill.export.deployed import deploy, promised, tables_of_matrices
from distill.export.twin import CachedTwin, PrefillTwin
from distill.formats import Formats
from distill.mil_tools.bench_cells import CONFIG
from distill.model import Student
from distill.versions import import_coremltools

LAYERS = (4, 8, 16, 30)
CONTEXT, SEQ = 256, 64
MOST_WEIGHTS, STEEPEST = 2.0, 1.15
KINDS = {"decode": None, "prefill": None, "int4/32": Formats("int4/32", "int8"), "lut4/16": Formats("lut4/16", "int8")}
"""Of what is compressed, the decode program."""
_MIB = 1 << 20


class Cost(NamedTuple):
    """What one conversion takes."""

    weights: int
    """Bytes in fp32."""
    resident: int
    private: int
    processor: float
    """Seconds."""
    package: int
    """Bytes of weight.bin."""


class _Loaded(NamedTuple):
    """What `deploy` asks of a checkpoint."""

    student: Student
    formats: Formats | None = None


def prepare(kind: str, layers: int, folder: Path) -> None:
    """Write the program and as much of its contract as conversion reads."""
    student = Student(msgspec.structs.replace(CONFIG, num_hidden_layers=layers)).init_weights(0).eval()
    formats, tables = deploy(_Loaded(student), KINDS[kind])  # type: ignore[arg-type]
    ref = None
    if formats is not None:
        matrices = tables_of_matrices(student, formats, tables)
        ref = programs.file_ref(goldens.write_goldens(folder / "tables.safetensors", matrices))
    shape = programs.Shape("prefill", SEQ, kind) if kind == "prefill" else programs.Shape("decode", CONTEXT, kind)
    twin = PrefillTwin(student, SEQ) if kind == "prefill" else CachedTwin(student, CONTEXT)
    fields = programs.interface(shape, student.config)
    example = tuple(torch.zeros(spec.shape, dtype=torch.int32) for spec in fields["inputs"])
    traced = programs.trace(twin, example)
    if kind != "prefill":
        traced.kv.zero_()
    contract = Contract(
        **fields, schema="distill-export/1", name="program", file=programs.save_program(traced, folder / "program.pt"),
        enumerated_T=[shape.length], shape_validation={}, model_config=student.config, rope="", mask="",
        tokenizer_sha256="", chat_template_sha256="", weights_sha256="", fp16_gain=1.0, sidecar={}, probes={},
        made_by={}, versions={}, formats=formats, weights=promised(student, formats), tables=ref,
    )  # fmt: skip
    write_json(folder / "program_contract.json", msgspec.to_builtins(contract))


def convert(folder: Path) -> Cost:
    """Convert what `prepare` wrote, once everything is imported."""
    import_coremltools()
    from distill.convert import coreml, halving  # noqa: F401
    from distill.convert.package import WEIGHT_FILE

    config = read_contract(folder / "program_contract.json").model_config
    before, stop, most = _now(), threading.Event(), [0]
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    watching = threading.Thread(target=_watch, args=(stop, most))
    watching.start()
    started = time.process_time()
    coreml.run(coreml.ConvertConfig(folder / "program.pt", folder / "made.mlpackage"))
    spent = time.process_time() - started
    stop.set()
    watching.join()
    resident = _status("VmHWM") - before["VmRSS"]
    package = (folder / "made.mlpackage" / WEIGHT_FILE).stat().st_size
    return Cost(4 * config.n_params(), resident, most[0] - before["RssAnon"], spent, package)


def _watch(stop: threading.Event, most: list[int]) -> None:
    while not stop.wait(0.02):
        most[0] = max(most[0], _status("RssAnon"))


def _now() -> dict[str, int]:
    return {key: _status(key) for key in ("VmRSS", "RssAnon")}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def measured(kind: str, layers: int) -> Cost:
    """The cost, each half in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        for step in ("prepare", "convert"):
            command = [sys.executable, "-m", "tests.bench_convert", "--step", step, "--in", name]
            subprocess.run([*command, "--only", kind, "--layers", str(layers)], check=True, stdout=subprocess.DEVNULL)
        return msgspec.json.decode((Path(name) / "cost.json").read_bytes(), type=Cost)


def exponent(costs: dict[int, Cost]) -> float:
    """Of what a layer adds: d log(time without the intercept) / d log(layers), from the first to the last pair."""
    (a, b), (c, d) = (sorted(costs)[:2], sorted(costs)[-2:])
    early = (costs[b].processor - costs[a].processor) / (b - a)
    late = (costs[d].processor - costs[c].processor) / (d - c)
    return 1 + math.log(late / early) / math.log((c + d) / (a + b))


def main(argv: list[str] | None = None) -> int:
    """Print a line a cell."""
    parser = argparse.ArgumentParser(prog="bench_convert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of program; all of them")
    parser.add_argument("--check", action="store_true", help="fail above the limits")
    parser.add_argument("--step", choices=("prepare", "convert"), help=argparse.SUPPRESS)
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step == "prepare":
        prepare(args.only[0], args.layers[0], args.folder)
        return 0
    if args.step == "convert":
        write_json(args.folder / "cost.json", convert(args.folder))
        return 0
    return _table(args)


def _table(args: argparse.Namespace) -> int:
    print("| program | layers | fp32 weights, MiB | resident | private | processor, s | weight.bin, MiB |")
    print("|---" * 7 + "|")
    missed = []
    for kind in args.only:
        costs: dict[int, Cost] = {}
        for layers in sorted(args.layers):
            cost = costs[layers] = measured(kind, layers)
            ratios = f"{cost.resident / cost.weights:.2f} | {cost.private / cost.weights:.2f}"
            sizes = f"{cost.weights / _MIB:,.0f} | {ratios} | {cost.processor:.1f} | {cost.package / _MIB:,.1f}"
            print(f"| {kind} | {layers} | {sizes} |", flush=True)
        largest = costs[max(costs)]
        if largest.resident >= MOST_WEIGHTS * largest.weights:
            missed.append(f"{kind}: {largest.resident / largest.weights:.2f} of its weights, limit {MOST_WEIGHTS}")
        if len(costs) > 2:
            steep = exponent(costs)
            rates = [(costs[b].processor - costs[a].processor) / (b - a) for a, b in itertools.pairwise(sorted(costs))]
            print(f"{kind}: s a layer {', '.join(f'{rate:.2f}' for rate in rates)}; exponent {steep:.2f}", flush=True)
            if steep > STEEPEST:
                missed.append(f"{kind}: time grows with layers to the power of {steep:.2f}, limit {STEEPEST}")
    for line in missed:
        print(line)
    return int(args.check and bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
