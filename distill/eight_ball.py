"""The whole pipeline in one sitting: a tiny student that answers like a magic 8-ball, asked through its package.

    make 8-ball

Dataset, training, export, conversion and verification are the stages that everything else uses; only sizes are small.
At the end 50 questions that are in no training set are answered by greedy decoding through the .mlpackage.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from distill import gates
from distill.artifacts import provenance, sha256_file, write_json
from distill.convert import coreml
from distill.data import toy
from distill.data.toy_material import ANSWERS
from distill.errors import stage_main
from distill.export import pytorch
from distill.gates import Gate
from distill.train import loop
from distill.train.toy import PRESETS, toy_config, toy_model
from distill.verify import contracts
from distill.verify.ask import answer
from distill.verify.runner import PackageRunner

SEQ = 64
QUESTIONS = 50
EXACT, DIFFERENT = 0.95, 10
"""Share of answers that must be one of the twenty, and how many of the twenty must occur."""


class EightBallConfig(NamedTuple):
    """Where everything goes."""

    data: Path = Path("data/8-ball.jsonl")
    checkpoint: Path = Path("models/8-ball/checkpoint.pt")
    exported: Path = Path("models/8-ball/exported")
    package: Path = Path("coreml/artifacts/8-ball/model.mlpackage")
    report: Path = Path("eval/reports/8-ball.json")
    samples: int = 128
    seed: int = 0


def run(config: EightBallConfig, console: Console) -> dict[str, Any]:
    """Run every step; returns the report."""
    started = time.perf_counter()
    _step(console, 1, f"{config.samples} samples")
    toy.write(config.data, "8-ball", config.samples, config.seed)
    _step(console, 2, "training")
    preset = PRESETS["8-ball"]
    training = toy_config(
        str(config.data), str(config.checkpoint), preset=preset, model=toy_model(), device="cpu", seed=config.seed
    )
    trained = loop.run(training, restart=True, console=console)
    _step(console, 3, "export to TorchScript")
    pytorch.run(pytorch.ExportConfig(trained.checkpoint, config.exported, "prefill", SEQ, (SEQ,), toy=True))
    _step(console, 4, "conversion to Core ML")
    source = config.exported / f"student_prefill_T{SEQ}.pt"
    coreml.run(coreml.ConvertConfig(source, config.package, seq=SEQ))
    _step(console, 5, "verification")
    verified = contracts.run(contracts.ContractsConfig(config.package, SEQ))
    result = {name: Gate(**value) for name, value in verified["gates"].items()}
    _step(console, 6, f"{QUESTIONS} questions that are in no training set, asked through the package")
    answers = _ask(config, console)
    result |= _judge(config, answers)
    size = sum(f.stat().st_size for f in config.package.rglob("*") if f.is_file())
    report = {
        "schema": "distill-8-ball/1",
        "losses": {"first": trained.values["first_loss"], "last": trained.values["loss"]},
        "sizes": {
            "parameters": trained.values["parameters"],
            "checkpoint_bytes": trained.checkpoint.stat().st_size,
            "package_bytes": size,
        },
        "answers": answers,
        "gates": gates.to_json(result),
        "counts": gates.count(result),
        "details": verified["details"],
        "made_by": provenance({"samples": config.samples, "seed": config.seed}, {"checkpoint": trained.checkpoint}),
    }
    write_json(config.report, report)
    _summary(console, config, report, result, time.perf_counter() - started)
    return report


def _step(console: Console, number: int, what: str) -> None:
    console.print(f"[bold]{number}/6[/bold] {what}", highlight=False)


def _ask(config: EightBallConfig, console: Console) -> list[dict[str, str]]:
    runner = PackageRunner(config.package)
    out = []
    for index, question in enumerate(toy.held_out_questions(QUESTIONS, config.seed)):
        text = "".join(answer(runner, question, SEQ))
        out.append({"question": question, "answer": text})
        if index < 5:
            console.print(f"    {question}  [italic]{text}[/italic]", highlight=False)
    return out


def _judge(config: EightBallConfig, answers: list[dict[str, str]]) -> dict[str, Gate]:
    asked = {json.loads(line)["prompt"] for line in config.data.read_text().splitlines()}
    overlap = sum(a["question"] in asked for a in answers)
    exact = sum(a["answer"] in ANSWERS for a in answers)
    different = len({a["answer"] for a in answers} & set(ANSWERS))
    return {
        "questions_unseen": gates.at_most(overlap, 0, reason="questions that the training set holds"),
        "answers_exact": gates.at_least(
            exact / len(answers),
            EXACT,
            n=len(answers),
            n_min=QUESTIONS,
            backend="distill.mil ieee16",
            reason=f"{exact} of {len(answers)}",
        ),
        "answers_different": gates.at_least(
            different, DIFFERENT, n=len(answers), n_min=QUESTIONS, reason=f"of {len(ANSWERS)}"
        ),
    }


def _summary(
    console: Console, config: EightBallConfig, report: dict[str, Any], result: dict[str, Gate], seconds: float
) -> None:
    losses, sizes = report["losses"], report["sizes"]
    common = Counter(a["answer"] for a in report["answers"]).most_common(3)
    console.print(gates.table(result), highlight=False, markup=False, soft_wrap=True)
    lines = [
        "",
        f"loss      {losses['first']:.2f} -> {losses['last']:.2f}",
        f"sizes     {sizes['parameters']:,} parameters, checkpoint {sizes['checkpoint_bytes'] / 1e6:.2f} MB, "
        f"package {sizes['package_bytes'] / 1e6:.2f} MB",
        "answers   most frequent: " + ", ".join(f"{text!r} {n}" for text, n in common),
        f"package   {config.package} (weights sha256 {sha256_file(config.package / contracts.WEIGHT_FILE)[:12]})",
        f"report    {config.report}",
        f"gates     {gates.summary(result)}",
        f"time      {seconds:.0f} s",
        "",
        f'Ask it:   distill ask {config.package} "Will it rain?"',
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Run the pipeline; exit 0 when every gate passes."""
    parser = argparse.ArgumentParser(prog="distill 8-ball", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of samples, first weights and questions")
    args = parser.parse_args(argv)
    report = run(EightBallConfig(seed=args.seed), Console())
    return gates.exit_code({name: Gate(**value) for name, value in report["gates"].items()})
