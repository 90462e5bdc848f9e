"""A run before its first step: student, data, every step laid out, and the fingerprint of its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from distill import checkpoint
from distill.artifacts import sha256_file
from distill.data.batches import Examples, plan
from distill.data.records import Dataset
from distill.errors import ConfigError
from distill.model import Student
from distill.train import init
from distill.train.adapters import add_adapters
from distill.train.alignment import AlignedTeacher
from distill.train.config import TrainConfig, fingerprint, identity
from distill.train.distributed import ALONE, World, local_device
from distill.train.divergences import Divergence
from distill.train.fake_quantisation import FakeQuantised, input_moments
from distill.train.objective import COMPONENTS, Objective
from distill.train.sampling import OnPolicy
from distill.train.served import ServedTeacher
from distill.train.sharded import Model, outline, shard, whole
from distill.train.teacher import OnlineTeacher

_NEEDS = {
    "kl_div": "the teacher's distributions",
    "ce_teacher": "the teacher's text",
    "ce_ground_truth": "a ground truth",
}


Teacher = OnlineTeacher | AlignedTeacher | ServedTeacher


class Run(NamedTuple):
    """Everything a run needs, before its first step."""

    config: TrainConfig
    world: World
    start: init.Start
    """Its student is the one that is trained; of several processes, an outline of it."""
    model: Model
    """What is trained: the student on the device, or the process's shards of it."""
    train: Examples
    val: Examples
    steps: list[list[list[int]]]
    made_of: dict[str, Any]
    """Settings and inputs that its result follows from."""
    device: torch.device
    weights: dict[str, float]
    teacher: Teacher | None

    @property
    def mark(self) -> str:
        """The fingerprint of its result."""
        return fingerprint(self.made_of)

    @property
    def final(self) -> Path:
        """The finished checkpoint."""
        return self.config.final

    def beside(self, suffix: str) -> Path:
        """A file beside the finished checkpoint, named after it."""
        return self.final.with_name(self.final.stem + suffix)

    def whole(self, *, keep: bool = True, device: torch.device | None = None) -> Student:
        """The student with its present weights, put together; with `keep` False, for others. All processes call it."""
        return whole(self.model, self.start.student, device or self.device, keep=keep)

    @property
    def on_policy(self) -> OnPolicy:
        """Which sequences are the student's own, and how they are drawn."""
        section = self.config.on_policy
        return OnPolicy(**msgspec.structs.asdict(section), seed=self.config.seed) if section else OnPolicy(0.0, 1)

    @property
    def objective(self) -> Objective:
        """The loss of a training step."""
        c = self.config
        return Objective(self.weights, Divergence(c.divergence, c.mix, c.temperature), c.dtype,
                         span_weights=msgspec.structs.asdict(c.span_weights),
                         teacher=None if self.teacher is None else self.teacher.target)  # fmt: skip


class State(NamedTuple):
    """Where a run stands: steps done, the first and the last loss, tokens seen, the held-out values at the start."""

    step: int
    first_loss: float
    loss: float
    tokens: int
    before: dict[str, float]
    unquantised: dict[str, float]
    """The same of the weights as they were, where training goes through others."""


def prepare(config: TrainConfig, world: World = ALONE) -> Run:
    """Read student and data, lay out every step, put the student on its device or devices.

    ConfigError where there is nothing to learn from.
    """
    require_device(config)
    if config.quantisation is not None and world.size > 1:
        raise ConfigError("quantisation: one process trains; a palette or a scale would lie in several shards")
    dataset = Dataset.open(config.data)
    start, first, weights_sha256 = _first_weights(config, world)
    if config.quantisation is not None:
        config.quantisation.formats.require_fits(start.student)
    longest = config.stages()[-1].max_length
    if longest > start.student.config.max_position_embeddings:
        raise ConfigError(
            f"max_length {longest} exceeds the model's max_position_embeddings "
            f"{start.student.config.max_position_embeddings}"
        )
    wanted = msgspec.structs.asdict(config.loss_weights)
    active = [name for name, weight in wanted.items() if weight]
    device = device_of(config)
    teacher = _teacher(config, start, device)
    read = {*active, "ce_teacher"} - {"kl_div"} if teacher else active  # it needs the texts, not the store
    train = Examples(dataset, start.tokenizer, "train", max_length=longest, components=read)
    stored = dataset.header.tokenizer_sha256 == start.tokenizer.sha256 and teacher is None
    kinds = COMPONENTS if stored else COMPONENTS[1:]  # held-out KL is wanted even where it is not trained on
    val = Examples(dataset, start.tokenizer, "val", max_length=longest, components=kinds, limit=config.eval_records)
    if teacher is None:
        _require_temperature(config, dataset, train)
    weights = {name: wanted[name] for name in active if train.carried[name] or (teacher and name == "kl_div")}
    if not weights:
        left_out = f" ({train.too_long} are longer than {longest} tokens)" if train.too_long else ""
        raise ConfigError(f"{config.data}: no training record carries {' or '.join(active)}{left_out}")
    if not any(getattr(config.span_weights, kind) for kind in train.spans):
        raise ConfigError(f"{config.data}: its target tokens are {', '.join(train.spans)}; all weigh 0 (span_weights)")
    steps = plan(train.lengths, config.stages(), config.seed,
                 max_steps=config.max_steps, token_budget=config.token_budget)  # fmt: skip
    inputs = {
        "data": sha256_file(config.data),
        "distributions": dataset.header.files.get("logprobs.safetensors"),
        "tokenizer": start.tokenizer.sha256,
        "weights": weights_sha256,
    }
    if teacher is not None:
        inputs["teacher"] = teacher.sha256
    return Run(config, world, start, _placed(start, first, world, device), train, val, steps,
               identity(config, inputs), device, weights, teacher)  # fmt: skip


def _first_weights(config: TrainConfig, world: World) -> tuple[init.Start, dict[str, Tensor], str]:
    """The start, its weights and their sha256. Only the first process reads and holds weights: the others get the
    outline of the student."""
    weights: dict[str, Tensor] = {}

    def build() -> tuple[init.Start, str]:
        start = init.build(config)
        start.student.gradient_checkpointing = config.gradient_checkpointing
        sha256 = checkpoint.weights_sha256(start.student)
        if config.lora is not None:
            add_adapters(start.student, config.lora, config.seed)
        if world.size > 1:
            weights.update((name, p.detach()) for name, p in start.student.named_parameters())
            start = start._replace(student=outline(start.student))
        return start, sha256

    start, sha256 = world.from_first(build)
    return start, weights, sha256


def _placed(start: init.Start, weights: dict[str, Tensor], world: World, device: torch.device) -> Model:
    if world.size == 1:
        model: Model = start.student.to(device)
    else:
        model = shard(start.student, weights, world, device)
    return model


def _teacher(config: TrainConfig, start: init.Start, device: torch.device) -> Teacher | None:
    if config.teacher is None:
        return None
    if config.teacher.url:
        return ServedTeacher(config.teacher.url, start.tokenizer, k=config.teacher.k, model=config.teacher.model)
    assert config.teacher.folder is not None
    if config.teacher.target == "aligned":
        return AlignedTeacher(config.teacher.folder, start.tokenizer, device)
    return OnlineTeacher(config.teacher, start.tokenizer, device, config.seed, config.dtype)


def fake_quantised(it: Run, saved: dict[str, Any] | None) -> FakeQuantised | None:
    """The weights that the device will compute with, of a run that begins, or that goes on from a checkpoint."""
    section = it.config.quantisation
    if section is None:
        return None
    student = it.whole()
    if saved is not None:
        parts = saved["resume"].get("importance", {}), saved.get("tables", {})
        importance, tables = ({name: value.to(it.device) for name, value in part.items()} for part in parts)
        return FakeQuantised(student, section.formats, importance, tables)
    n = min(section.calibration_records, len(it.train))
    chosen = (it.train.batch([i * len(it.train) // n]).ids_T[None].to(it.device) for i in range(n))
    return FakeQuantised(student, section.formats, input_moments(student, chosen) if n else {})


def describe(it: Run) -> str:
    """What is about to be trained, in a few lines; what is absent is named."""
    c, carried = it.config, it.train.carried
    wanted = msgspec.structs.asdict(c.loss_weights)
    lines = [
        f"{c.stage}: {it.start.student.config.n_params():,} parameters, {c.dtype} on {it.device}; "
        f"{len(it.train):,} sequences, {len(it.steps):,} steps"
    ]
    if it.start.formats is not None and c.quantisation is None:
        lines.append(f"the weights it starts from were trained in formats ({it.start.formats}); this run trains them, "
                     "and is written, without")  # fmt: skip
    if it.world.size > 1:
        lines.append(f"{it.world.size} processes, a shard of the student each, share the micro-batches of a step")
    if c.lora is not None:
        trained = sum(p.numel() for p in it.start.student.parameters() if p.requires_grad)
        lines.append(f"lora: rank {c.lora.rank} on {', '.join(c.lora.targets)}: {trained:,} parameters train")
    if c.optimiser == "adamw8bit":
        lines.append("adamw8bit: the first step compiles, some seconds for each shape of parameter")
    if c.quantisation is not None:
        lines.append(f"weights as deployed: {c.quantisation.formats}; scales and palettes calibrated on "
                     f"{min(c.quantisation.calibration_records, len(it.train))} sequences")  # fmt: skip
        if it.steps and not 0 < c.quantisation.refit_every < len(it.steps):
            lines.append(f"scales and palettes stay as they are: refit_every is {c.quantisation.refit_every}")
    if it.teacher is not None:
        lines.append(f"kl_div: {it.teacher}")
        if c.on_policy is not None:
            lines.append(f"on policy: {c.on_policy.share:.0%} of the sequences end in the student's own words")
    elif wanted["kl_div"] and 0 < carried["kl_div"] < carried["ce_teacher"]:
        lines.append(f"kl_div: {carried['kl_div']:,} of {carried['ce_teacher']:,} target tokens have distributions")
    for name, weight in wanted.items():
        if name not in it.weights and weight:
            text_only = name == "kl_div" and it.train.dataset.header.logprobs is None
            lines.append(f"{name} is absent: {c.data} is text-only" if text_only
                         else f"{name} is absent: no record of {c.data} has {_NEEDS[name]}")  # fmt: skip
    if it.train.too_long:
        lines.append(
            f"{it.train.too_long:,} sequences are longer than {c.stages()[-1].max_length} tokens and are left out"
        )
    if not len(it.val):
        lines.append(f"held-out evaluation is absent: {c.data} has no record of split val")
    return "\n".join(lines)


def require_device(config: TrainConfig) -> None:
    """ConfigError where the device that the configuration names is not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here.get(config.device, True):
        raise ConfigError(f"device: {config.device}, but PyTorch sees none on this machine")


def device_of(config: TrainConfig) -> torch.device:
    """The device that a run, or this process of it, trains on."""
    if config.device != "auto":
        return local_device(config.device)
    if torch.cuda.is_available():
        return local_device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _require_temperature(config: TrainConfig, dataset: Dataset, train: Examples) -> None:
    info, store = dataset.header.logprobs, dataset.distributions
    if info is None or store is None or not config.loss_weights.kl_div:
        return
    if info.temperature != 1.0:
        raise ConfigError(f"{config.data}: its distributions were taken at temperature {info.temperature}; 1 is needed")
    rows = [e.row for e in train.items if e.row is not None] if config.temperature != 1.0 else []
    if any((store[row].tail_logprob > -np.inf).any() for row in rows):
        raise ConfigError(
            f"temperature {config.temperature} needs distributions without a tail; {config.data} keeps the top "
            f"{store.k} and their tail at temperature 1 only"
        )
