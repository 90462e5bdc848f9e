"""What a training run is: every key of configs/*.yaml, each documented where it stands. A key is read in one place."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from distill.artifacts import canonical_json, sha256_text
from distill.config import as_dict
from distill.model import ModelConfig
from distill.train.divergences import Divergence, Kind

Device = Literal["auto", "cpu", "cuda", "mps"]


class InitSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the student's first weights come from: a Hugging Face folder or a checkpoint; neither: random."""

    from_pretrained: str | None = None
    """Hugging Face folder (config.json, model.safetensors, tokenizer.json)."""
    checkpoint: str | None = None
    """A checkpoint of this project."""
    keep_layers: int | list[int] | None = None
    """Layers taken over from it: their indices, or how many, evenly spaced with the first and the last kept."""

    def __post_init__(self) -> None:
        if self.from_pretrained and self.checkpoint:
            raise ValueError("init: give from_pretrained or checkpoint, not both")
        if self.keep_layers is not None and not (self.from_pretrained or self.checkpoint):
            raise ValueError("init.keep_layers needs from_pretrained or checkpoint")


class LossWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weight of each component per target token. All three over one denominator: the step's target tokens."""

    kl_div: float = 0.6
    """KL(teacher || student) to the stored distributions."""
    ce_teacher: float = 0.2
    """Cross-entropy to the teacher's text."""
    ce_ground_truth: float = 0.2
    """Cross-entropy to the ground truth, where a record has one."""

    def __post_init__(self) -> None:
        values = msgspec.structs.asdict(self)
        for name, value in values.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"loss_weights.{name} must be at least 0, not {value}")
        if not any(values.values()):
            raise ValueError("loss_weights: all are 0")


class LengthStage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage of the sequence-length curriculum."""

    max_length: int
    """Longest sequence, in tokens; longer records wait for a later stage."""
    epochs: int = 1
    """Passes over the records that fit."""
    batch_size: int = 1
    """Sequences a micro-batch."""
    batch_tokens: int | None = None
    """Tokens a micro-batch, of as many whole sequences as fit; replaces batch_size."""
    accumulation: int = 1
    """Micro-batches a step."""

    def __post_init__(self) -> None:
        for name in ("max_length", "epochs", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_tokens is not None and self.batch_tokens < self.max_length:
            raise ValueError(f"batch_tokens {self.batch_tokens} is below max_length {self.max_length}")

    @property
    def largest(self) -> int:
        """Tokens of the largest micro-batch."""
        return self.batch_tokens or self.batch_size * self.max_length


class ExportSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Read by the export stage."""

    seq: list[int] = msgspec.field(default_factory=lambda: [512, 1024, 2048])
    """Prefill lengths T, one file each."""

    def __post_init__(self) -> None:
        if not self.seq or min(self.seq) < 1:
            raise ValueError(f"export.seq must list lengths of at least 1, not {self.seq}")


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A training run."""

    data: str
    """KD dataset (kd/1): plain JSONL, with its distributions in `<data>.d/`."""
    stage: str = "worker"
    """Names the stage's checkpoint, report and TensorBoard folder."""
    model: ModelConfig | None = None
    """Dimensions; may be left out where init gives them."""
    init: InitSection = InitSection()
    """First weights."""
    tokenizer: str | None = None
    """`toy` or a tokenizer.json; None: the one beside init's weights."""

    epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after so many steps (the schedule ends there too)."""
    token_budget: int | None = None
    """Stop after the step that reaches so many tokens, prompts included, padding not."""
    max_length: int = 512
    """Longest sequence; a longer record is left out, and counted, never cut."""
    batch_size: int = 8
    """Sequences a micro-batch, end to end: there is no padding."""
    batch_tokens: int | None = None
    """Tokens a micro-batch, of as many whole sequences as fit; replaces batch_size."""
    accumulation: int = 1
    """Micro-batches a step: one loss denominator over all of them."""
    curriculum: list[LengthStage] = []
    """Length curriculum; replaces epochs, max_length, batch_size, batch_tokens and accumulation."""

    lr: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up, down to min_lr_ratio of the peak."""
    warmup: float = 0.05
    """Share of the steps spent warming up linearly."""
    min_lr_ratio: float = 0.1
    """Last learning rate as a share of the peak."""
    weight_decay: float = 0.1
    """AdamW's, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0: no clipping (the norm is still reported)."""

    loss_weights: LossWeights = LossWeights()
    """Weights of the components."""
    divergence: Kind = "forward_kl"
    """What kl_div is: forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl or tvd (distill/train/divergences.py)."""
    mix: float | None = None
    """jsd: the teacher's share of the mixture (0.5); skew: the first distribution's share of the second (0.1)."""
    temperature: float = 1.0
    """Of the divergence, with T squared inside. Other than 1 needs distributions without a tail."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast, with fp32 master weights, gradients and optimiser; the losses are fp32 in any case."""
    device: Device = "auto"
    """auto: CUDA, then Metal, then CPU."""
    threads: int = 0
    """CPU threads; 0: PyTorch's choice. Tiny models are fastest with 1."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    seed: int = 0
    """Of the initial weights and of the order of the data."""

    save_every: int = 200
    """Steps between resumable checkpoints; 0: only the finished one."""
    eval_every: int = 0
    """Steps between held-out evaluations; 0: only before and after."""
    eval_records: int = 64
    """Held-out records evaluated (the first of split=val)."""
    checkpoints: str = "models/student/checkpoints"
    """Folder of <stage>.pt, <stage>.report.json and latest.pt."""
    out: str | None = None
    """The finished checkpoint's own path, its report beside it; None: in `checkpoints`, and copied to latest.pt."""
    runs: str = "runs"
    """TensorBoard's folder."""
    export: ExportSection = ExportSection()
    """For the export stage."""

    def __post_init__(self) -> None:
        for name in ("epochs", "max_length", "batch_size", "accumulation", "eval_records"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("max_steps", "token_budget"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name in ("weight_decay", "grad_clip", "threads", "save_every", "eval_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("warmup", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {list(self.betas)}")
        if not self.stage.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"stage must be a plain name, not {self.stage!r}")
        if self.model is None and not (self.init.from_pretrained or self.init.checkpoint):
            raise ValueError("model: needed where init gives no weights")
        if self.model is not None and self.init.keep_layers is not None:
            raise ValueError("model: leave it out where init.keep_layers cuts a model down")
        self.stages()  # its own rules
        Divergence(self.divergence, self.mix, self.temperature).require_valid()
        lengths = [stage.max_length for stage in self.curriculum]
        if lengths != sorted(set(lengths)):
            raise ValueError(f"curriculum: max_length must grow from stage to stage, not {lengths}")

    def stages(self) -> list[LengthStage]:
        """The length curriculum; one stage where none is given."""
        alone = LengthStage(self.max_length, self.epochs, self.batch_size, self.batch_tokens, self.accumulation)
        return self.curriculum or [alone]


_NOT_THE_RESULT = ("checkpoints", "out", "runs", "save_every", "eval_every", "export")


def fingerprint(config: TrainConfig, inputs: dict[str, Any]) -> str:
    """Identity of a run's result: the settings that shape the weights, and the sha256 of what went in."""
    settings = {key: value for key, value in as_dict(config).items() if key not in _NOT_THE_RESULT}
    return sha256_text(canonical_json({"config": settings, "inputs": inputs}))
