"""Probes: named points of the student, compared between PyTorch and the package, and the first op that diverges.

    python -m distill.verify.probes --model X.mlpackage --checkpoint C.pt [--report R.json]

Two comparisons. The training model against the package as it will run (`ieee16`), within the derived fp16 error. Then
every module of the twin, its constants rounded to fp16, against the package without rounding (`fp32`), where only fp32
summation order differs: the first op that is further away than that is where the meaning changed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distill import checkpoint, gates
from distill.artifacts import provenance, write_json
from distill.checkpoint import weights_sha256
from distill.errors import InputError, stage_main
from distill.export.deployed import deploy
from distill.export.goldens import ProbeRecorder
from distill.export.tolerance import fp16_sigma, relative_error, tolerance_factor
from distill.export.twin import PrefillTwin, round_to_half
from distill.gates import Gate
from distill.model import Student
from distill.verify import parity
from distill.verify.parity import Point
from distill.verify.runner import PackageRunner

POINT_MARGIN = 3.0
"""A point's allowed relative error, in units of the derived eps of its depth."""


class Result(NamedTuple):
    """What the probes found."""

    points: list[Point]
    logits: parity.Comparison
    first: Point | None
    gates: dict[str, Gate]


def run(package: Path, checkpoint_path: Path, ids: list[int] | None = None) -> Result:
    """Compare a prefill package with the checkpoint it was made from. InputError if it was made from another."""
    runner = PackageRunner(package)
    if runner.contract.mode != "prefill":
        raise InputError(f"{package}: probes compare prefill packages, this one is {runner.contract.mode}")
    loaded = checkpoint.load(checkpoint_path)
    student = loaded.student.float().eval()
    if loaded.formats in (None, runner.contract.formats):
        deploy(loaded, runner.contract.formats)
    if weights_sha256(student) != runner.contract.weights_sha256:
        raise InputError(f"{package}: was not made from {checkpoint_path}: the contract names other weights")
    ids = ids or parity.load_goldens(runner)["input_ids"][-1].tolist()
    points, logits, sigmas = _as_it_runs(runner, student, ids)
    # a NaN is the worst of all, and max() does not see it
    worst = max(points, key=lambda p: math.inf if math.isnan(p.relative) else p.relative / _allowed(p.name, runner))
    result = {
        "points_fp16": gates.at_most(
            worst.relative / _allowed(worst.name, runner),
            1.0,
            backend="distill.mil ieee16",
            reason=f"share of the derived error, worst at {worst.name}",
        ),
        "logits_fp16": gates.at_most(sigmas, 1.0, backend="distill.mil ieee16", reason="share of the derived error"),
    }
    first = None
    if any("." in name for name in runner.contract.probes):
        first, result["exact"] = _exact(runner, student, ids)
    else:
        result["exact"] = gates.skipped("the package maps no modules of the twin (not made from one)")
    return Result(points, logits, first, result)


@torch.no_grad()
def _as_it_runs(
    runner: PackageRunner, student: Student, ids: list[int]
) -> tuple[list[Point], parity.Comparison, float]:
    expected, hidden = _student_points(student, ids)
    named = {name: value for name, value in expected.items() if name in runner.contract.probes}
    points = parity.compare_points(runner, named, ids, None, policy="ieee16", channels_first=_is_channels_first(runner))
    reference = student.lm_head(hidden).float()
    tolerance = fp16_sigma(student, hidden, runner.contract.fp16_gain) * tolerance_factor(student.config.vocab_size)
    result = parity.compare(runner.logits(ids)[None], reference.numpy(), tolerance.numpy())
    return points, result, result.sigmas


def _student_points(student: Student, ids: list[int]) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    """Each block's output and the final norm of the training model, [1, S, D]."""
    values: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, out: Any) -> None:
            values[name] = (out[0] if isinstance(out, tuple) else out).float().numpy()

        return hook

    handles = [block.register_forward_hook(keep(f"block_{i}")) for i, block in enumerate(student.model.layers)]
    handles.append(student.model.norm.register_forward_hook(keep("final_norm")))
    hidden = student.hidden(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return values, hidden


@torch.no_grad()
def _exact(runner: PackageRunner, student: Student, ids: list[int]) -> tuple[Point | None, Gate]:
    twin = round_to_half(PrefillTwin(student, runner.contract.sequence(), copy=True))
    recorder = ProbeRecorder(twin)
    padded = torch.zeros((1, runner.contract.sequence()), dtype=torch.int32)
    padded[0, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    twin(padded)
    expected = {n: v.numpy() for n, v in recorder.values.items() if n in runner.contract.probes}
    points = parity.compare_points(runner, expected, ids, None, policy="fp32")
    return parity.points_gate(points, runner.contract)


def _is_channels_first(runner: PackageRunner) -> bool:
    """Twins hold (1, D, 1, S); an ONNX graph of the training model holds (1, S, D)."""
    return any("." in name for name in runner.contract.probes)


def _allowed(point: str, runner: PackageRunner) -> float:
    layers = (
        runner.contract.model_config.num_hidden_layers
        if point == "final_norm"
        else int(point.removeprefix("block_")) + 1
    )
    return POINT_MARGIN * runner.contract.fp16_gain * relative_error(layers)


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Print the table of points, the gates and the closing line."""
    parser = argparse.ArgumentParser(prog="distill probes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="prefill package")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the checkpoint that it was made from")
    parser.add_argument("--report", type=Path, help="JSON report")
    args = parser.parse_args(argv)
    result = run(args.model, args.checkpoint)
    print(f"{'point':12s} {'op':10s} {'max error':>10s} {'relative':>10s} {'PSNR dB':>8s}")
    for p in result.points:
        print(f"{p.name:12s} {p.op:10s} {p.max_error:10.3g} {p.relative:10.3g} {p.psnr:8.1f}")
    c = result.logits
    print(
        f"{'logits':12s} {'':10s} {c.max_error:10.3g} {c.relative:10.3g} {c.psnr:8.1f}  "
        f"KL {c.kl:.2e}  top-1 {c.top1:.1%}"
    )
    print(gates.table(result.gates))
    print(f"{args.model}: {gates.summary(result.gates)}")
    if args.report is not None:
        points = [
            {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in p._asdict().items()}
            for p in result.points
        ]
        made = provenance({}, {"checkpoint": args.checkpoint})
        write_json(
            args.report,
            {
                "schema": "distill-probes/1",
                "points": points,
                "gates": gates.to_json(result.gates),
                "logits": {k: v if math.isfinite(v) else str(v) for k, v in c._asdict().items()},
                "made_by": made,
            },
        )
    return gates.exit_code(result.gates)
