"""The table of stages, in pipeline order. A stage is imported only when it runs.

distill STAGE [arguments]        the same thing as the doors: `python -m training.distill_kd` is `distill worker`
"""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

import distill
from distill.errors import stage_main


class Stage(NamedTuple):
    """A stage: where its `main(argv) -> int` lives, its door, and what it does in a line."""

    home: str
    door: str | None
    help: str


STAGES: dict[str, Stage] = {
    "versions": Stage("distill.versions:main", "infra.version_gate", "are Python and the packages the ones proved"),
    "toy-kd": Stage(
        "distill.data.toy:main", "data.make_toy_kd", "write a toy dataset with its teacher's distributions"
    ),
    "scripted-kd": Stage("distill.data.scripted.make:main", None, "write tool-use data by a scripted teacher"),
    "kd-dataset": Stage("distill.data.mix:main", "scripts.make_kd_mix_hardened", "ask a teacher, write a KD dataset"),
    "bench-store": Stage("distill.data.store.bench:main", None, "size and fidelity of a dataset's distributions"),
    "kd-ledger": Stage("distill.data.ledger:main", None, "what a dataset's generation has spent"),
    "teacher": Stage("distill.data.teacher.local:main", None, "a local teacher as a Hugging Face folder"),
    "validate-kd": Stage("distill.data.validate:main", "scripts.validate_kd_data", "check a KD dataset rule by rule"),
    "toy-training": Stage("distill.train.toy:make_main", "training.make_toy_training", "write a tiny training set-up"),
    "toy-distill": Stage("distill.train.toy:main", "training.run_toy_distill", "train a toy student"),
    "worker": Stage("distill.train.kd:main", "training.distill_kd", "distil a student as a configuration says"),
    "proc": Stage(
        "distill.train.process:main", "training.process_supervision", "train on, with weights by kind of span"
    ),
    "qat": Stage("distill.train.qat:main", "training.quantise", "train on, through the weights as deployed"),
    "held-out": Stage("distill.train.held_out:main", None, "what training changed on held-out data, judged"),
    "toy-block": Stage(
        "distill.export.toy:block_main", "conversion.make_toy_block", "export one tiny transformer block"
    ),
    "toy-torch": Stage(
        "distill.export.toy:torch_main", "conversion.make_toy_torch", "export a tiny student to TorchScript"
    ),
    "toy-onnx": Stage("distill.export.toy:onnx_main", "conversion.make_toy_onnx", "export a tiny student to ONNX"),
    "export": Stage("distill.export.pytorch:main", "conversion.export_pytorch", "checkpoint to programs and contracts"),
    "port": Stage("distill.export.port:main", None, "checkpoint to a Hugging Face, GGUF or MLX folder"),
    "surgery": Stage("distill.convert.surgery:main", None, "rewrite an ONNX file for Core ML, and say what changed"),
    "convert": Stage("distill.convert.coreml:main", "conversion.convert_coreml", "exported program to Core ML package"),
    "convert-all": Stage("distill.convert.worker:main", None, "every program of an export folder to packages"),
    "package": Stage("distill.convert.functions:main", None, "checkpoint to one package: prefill, decode, one state"),
    "coreai": Stage("distill.convert.coreai:main", None, "checkpoint to Core AI asset, Apple's format of OS 27"),
    "coreai-verify": Stage(
        "distill.verify.coreai:main", None, "does a Core AI asset keep its contract, by Apple's runtime"
    ),
    "ane": Stage("distill.verify.ane:main", None, "is a package eligible for the Neural Engine"),
    "probes": Stage("distill.verify.probes:main", None, "compare PyTorch and a package point by point"),
    "contracts": Stage("distill.verify.contracts:main", "evaluation.toy_contracts", "does a package keep its contract"),
    "distribution": Stage("distill.verify.distribution:main", None, "what a package loses, by KL and agreement"),
    "contextual": Stage(
        "distill.evaluate.contextual.make:main", "data.make_contextual", "write the set that tool use is evaluated on"
    ),
    "eval": Stage("distill.evaluate.local:main", None, "play an evaluation set's episodes with a model, and judge it"),
    "eval-compare": Stage("distill.evaluate.compare:main", None, "runs of one evaluation set, item against item"),
    "bfcl": Stage("distill.evaluate.bfcl:main", None, "a model on BFCL's single-turn questions, offline"),
    "harness": Stage("distill.evaluate.harness:main", None, "a model on any task of lm-evaluation-harness"),
    "ask": Stage("distill.verify.ask:main", None, "ask a package one question, or a file of them"),
    "speed": Stage("distill.evaluate.speed:main", None, "speed by compute unit, and what no chip can beat"),
    "gates": Stage("distill.evaluate.tiers:main", None, "the quality gates of each tier, from what is there"),
    "deploy": Stage("distill.deploy.main:main", None, "the last student to a verified bundle; verify one"),
    "mil": Stage("distill.mil_tools.main:main", None, "look into any Core ML package, run it, compare two"),
    "8-ball": Stage(
        "distill.eight_ball:main", None, "the whole pipeline in one sitting: a model that answers like an 8-ball"
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one stage; exit code 2 for an unknown one."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] == "--version":
        print(f"distill {distill.__version__}")
        return 0
    stage = STAGES.get(args[0])
    if stage is None:
        import difflib

        near = difflib.get_close_matches(args[0], STAGES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"error: no stage {args[0]!r}{hint} (distill --help lists them)", file=sys.stderr)
        return 2
    # the stage turns its own errors and signals into exit codes; those of its imports are turned here
    return stage_main(lambda rest: load(stage)(rest))(args[1:])


def load(stage: Stage):  # type: ignore[no-untyped-def]
    """The stage's `main`."""
    module, function = stage.home.split(":")
    return getattr(importlib.import_module(module), function)


def usage() -> str:
    """The help page: every stage in pipeline order."""
    width = max(map(len, STAGES))
    rows = "\n".join(f"  {name:{width}s}  {stage.help}" for name, stage in STAGES.items())
    return f"{(distill.__doc__ or '').strip()}\n\nusage: distill STAGE [--help] ...\n\n{rows}"


if __name__ == "__main__":
    raise SystemExit(main())
