"""The toy runs: presets of the real path.

python -m training.run_toy_distill --in F --out CKPT --epochs 2 --mps 0      train on a toy set
python -m training.make_toy_training --out-dir D --samples 10 --steps 5      the inputs of `training.distill_kd`
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import yaml

from distill import checkpoint
from distill.artifacts import write_text
from distill.config import as_dict
from distill.data import toy
from distill.data.records import Dataset
from distill.errors import ConfigError, InputError, stage_main
from distill.model import ModelConfig, Student
from distill.tokenizer import toy_tokenizer
from distill.train import loop
from distill.train.config import Device, InitSection, LossWeights, TrainConfig
from distill.train.memory import available_bytes

MAX_VOCAB = 1 << 20
_TRAINING_BYTES = 16
"""Of each parameter: weight, gradient and AdamW's two moments, all fp32."""


class Preset(NamedTuple):
    """What a toy set needs to be learned in."""

    epochs: int
    batch_size: int
    lr: float
    loss_weights: LossWeights


PRESETS = {
    "tools": Preset(epochs=2, batch_size=2, lr=5e-3, loss_weights=LossWeights(0.5, 0.25, 0.25)),
    "8-ball": Preset(epochs=10, batch_size=4, lr=3e-3, loss_weights=LossWeights(0.5, 0.25, 0.25)),
}
"""By the kind of the dataset."""


def toy_model(hidden: int = 64, layers: int = 2, vocab: int | None = None) -> ModelConfig:
    """The toy student: heads of 32, one KV head, MLP four times as wide, untied; the toy tokenizer's vocabulary."""
    if hidden < 32 or hidden % 32:
        raise ConfigError(f"--dmodel {hidden} is not a multiple of 32, the width of a head")
    vocab = vocab or -(-toy_tokenizer().vocab_size // 64) * 64
    toy_tokenizer().require_fits(vocab, "--vocab")
    if vocab > MAX_VOCAB:
        raise ConfigError(f"--vocab {vocab} is above {MAX_VOCAB}")
    model = ModelConfig(vocab, hidden, 4 * hidden, layers, hidden // 32, 1, head_dim=32, max_position_embeddings=512)
    needed, free = _TRAINING_BYTES * model.n_params(), available_bytes(torch.device("cpu"))
    if needed > free:
        raise ConfigError(f"--dmodel {hidden}, --nlayers {layers}, --vocab {vocab}: training {model.n_params():,} "
                          f"parameters needs {needed >> 20:,} MiB, {free >> 20:,} MiB are free")  # fmt: skip
    return model


def toy_config(data: str, out: str, *, preset: Preset, model: ModelConfig, device: Device, seed: int) -> TrainConfig:
    """A toy run as a TrainConfig."""
    return TrainConfig(
        data=data, out=out, stage="toy", model=model, tokenizer="toy", epochs=preset.epochs,
        batch_size=preset.batch_size, lr=preset.lr, loss_weights=preset.loss_weights, device=device, seed=seed,
        max_length=512, warmup=0.1, weight_decay=0.0, save_every=0, threads=1,
    )  # fmt: skip


def _preset(data: str) -> Preset:
    kind = Dataset.open(data).header.config.get("kind")
    return PRESETS.get(str(kind), PRESETS["tools"])


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Train a toy student. Always from the start: it takes seconds."""
    parser = argparse.ArgumentParser(prog="distill toy-distill", description="Train a toy student on a toy KD dataset.")
    parser.add_argument("--in", dest="data", required=True, help="toy KD dataset, F.jsonl")
    parser.add_argument("--out", required=True, help="checkpoint to write")
    parser.add_argument("--epochs", type=int, help="passes over the data (default: the set's preset)")
    parser.add_argument("--mps", type=int, choices=(0, 1), default=0, help="1: train on Metal where it is present")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the order of the data")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the set's preset)")
    parser.add_argument("--batch-size", type=int, help="sequences a step (default: the set's preset)")
    parser.add_argument("--dmodel", type=int, default=64, help="hidden width")
    parser.add_argument("--nlayers", type=int, default=2, help="layers")
    args = parser.parse_args(argv)
    given = {"epochs": args.epochs, "lr": args.lr, "batch_size": args.batch_size}
    preset = _preset(args.data)._replace(**{key: value for key, value in given.items() if value is not None})
    metal = bool(args.mps) and torch.backends.mps.is_available()
    if args.mps and not metal:
        print("--mps 1: Metal is absent here; training on the CPU")
    try:
        config = toy_config(args.data, args.out, preset=preset, model=toy_model(args.dmodel, args.nlayers),
                            device="mps" if metal else "cpu", seed=args.seed)  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"run_toy_distill: {error}") from error
    report = loop.run(config, restart=True)
    print(f"{report.checkpoint}: {report.values['steps']} steps, loss {report.values['first_loss']:.4f} -> "
          f"{report.values['loss']:.4f}")  # fmt: skip
    return 0


@stage_main
def make_main(argv: list[str] | None = None) -> int:
    """Write a toy dataset, a configuration and first weights for `training.distill_kd`."""
    parser = argparse.ArgumentParser(prog="distill toy-training", description=make_main.__doc__)
    parser.add_argument("--out-dir", required=True, help="folder to write into")
    parser.add_argument("--samples", type=int, default=10, help="records of the dataset")
    parser.add_argument("--steps", type=int, default=5, help="training steps of the configuration")
    parser.add_argument("--dmodel", type=int, default=64, help="hidden width")
    parser.add_argument("--nlayers", type=int, default=2, help="layers")
    parser.add_argument("--vocab", type=int, default=32000, help="rows of the embedding")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the first weights")
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise InputError(f"--steps must be at least 1, not {args.steps}")
    folder = Path(args.out_dir)
    data, weights, config_file = (
        folder / name for name in ("toy_dataset.jsonl", "toy_model_init.pt", "toy_config.yaml")
    )
    try:
        model = toy_model(args.dmodel, args.nlayers, args.vocab)
    except ValueError as error:
        raise ConfigError(f"make_toy_training: {error}") from error
    toy.write(data, "tools", args.samples, args.seed)
    student = Student(model).init_weights(args.seed)
    checkpoint.save(weights, student, toy_tokenizer(), step=0, loss=float("inf"), stage="init")
    config = TrainConfig(
        data=str(data), stage="toy", init=InitSection(checkpoint=str(weights)), epochs=args.steps, max_steps=args.steps,
        batch_size=2, lr=3e-3, save_every=0, device="cpu", threads=1, seed=args.seed,
        checkpoints=str(folder / "checkpoints"), runs=str(folder / "runs"),
    )  # fmt: skip
    write_text(config_file, "# Made by training.make_toy_training; python -m training.distill_kd --config reads it.\n"
               + yaml.safe_dump(_changed(config), sort_keys=False))  # fmt: skip
    print(
        f"{data}: {args.samples} samples\n{config_file}: {args.steps} steps\n{weights}: {model.n_params():,} parameters"
    )
    return 0


def _changed(config: TrainConfig) -> dict[str, Any]:
    """The settings that differ from the defaults."""
    default = msgspec.to_builtins(TrainConfig(data="", init=InitSection(checkpoint="-")))
    return {key: value for key, value in as_dict(config).items() if value != default[key]}
