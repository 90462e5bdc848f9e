"""What a training run is: every key of configs/*.yaml, each documented where it stands. A key is read in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from distill.artifacts import canonical_json, sha256_text
from distill.config import as_dict
from distill.formats import Formats
from distill.model import ModelConfig
from distill.train.divergences import Divergence, Kind
from distill.train.sampling import OnPolicy
from distill.train.tracker import Kind as Tracker

Device = Literal["auto", "cpu", "cuda", "mps"]


class InitSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the student's first weights come from: a Hugging Face folder or a checkpoint; neither: random."""

    from_pretrained: str | None = None
    """Hugging Face folder (config.json, model.safetensors, tokenizer.json)."""
    checkpoint: str | list[str] | None = None
    """A checkpoint of this project; of several, the first that is there."""
    keep_layers: int | list[int] | None = None
    """Layers taken over from it: their indices, or how many, evenly spaced with the first and the last kept."""

    def __post_init__(self) -> None:
        if isinstance(self.checkpoint, list):
            if not self.checkpoint:
                raise ValueError("init.checkpoint: the list is empty")
            there = (path for path in self.checkpoint if Path(path).is_file())
            msgspec.structs.force_setattr(self, "checkpoint", next(there, self.checkpoint[-1]))
        if self.from_pretrained and self.checkpoint:
            raise ValueError("init: give from_pretrained or checkpoint, not both")
        if self.keep_layers is not None and not (self.from_pretrained or self.checkpoint):
            raise ValueError("init.keep_layers needs from_pretrained or checkpoint")

    @property
    def trained(self) -> str | None:
        """The checkpoint that a run starts from."""
        assert not isinstance(self.checkpoint, list)  # one was chosen
        return self.checkpoint


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


class SpanWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weight of a target token by the kind of span it belongs to (distill/data/spans.py). The step's denominator is
    the sum of its tokens' weights: they say what counts for more, and leave the size of the gradient as it is."""

    content: float = 1.0
    """Text before a call, and all else."""
    final: float = 1.0
    """The last answer."""
    reasoning: float = 1.0
    """Between <think> and </think>, where the student learns it."""
    tool_call: float = 1.0
    """A call's marks and JSON around its name and arguments; the decision to call is its first token."""
    tool_name: float = 1.0
    """The function's name."""
    tool_args: float = 1.0
    """The arguments' JSON."""
    integration: float = 1.0
    """Words of an answer that carry a value of a tool's result."""

    def __post_init__(self) -> None:
        values = msgspec.structs.asdict(self)
        for name, value in values.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"span_weights.{name} must be at least 0, not {value}")
        if not any(values.values()):
            raise ValueError("span_weights: all are 0")


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


class TeacherSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A teacher beside the student, in place of stored distributions: white-box, or served."""

    folder: str | None = None
    """Hugging Face folder of the student's family; with the student's tokenizer, but for `aligned`."""
    target: Literal["dense", "top_k", "sampled", "aligned"] = "dense"
    """Its whole distribution, its likeliest ids and the mass of the others, or draws; aligned: the likelihood of the
    same bytes, for a teacher with another tokenizer (distill/train/alignment.py says what that cannot do)."""
    k: int = 50
    """Ids or draws of each token."""
    url: str | None = None
    """An OpenAI-compatible completions endpoint with the student's tokenizer, for `top_k`."""
    model: str | None = None
    """The endpoint's model id, where it lists several."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"teacher.k must be at least 1, not {self.k}")
        if bool(self.folder) == bool(self.url):
            raise ValueError("teacher: give folder or url")
        if self.url and self.target != "top_k":
            raise ValueError(f"teacher.target {self.target} cannot be had from an endpoint: set top_k")


class OnPolicySection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sequences whose answer is the student's own (Agarwal et al. 2024, GKD), for the teacher beside it to judge."""

    share: float = 0.5
    """Of a step's sequences, each drawn by itself."""
    max_new_tokens: int = 128
    """Longest answer."""
    temperature: float = 1.0
    """Of its drawing; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Share of the mass that it is drawn from."""

    def __post_init__(self) -> None:
        try:
            OnPolicy(**msgspec.structs.asdict(self)).require_valid()
        except ValueError as error:
            raise ValueError(f"on_policy: {error}") from error


class LoraSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Low-rank adapters (Hu et al. 2021), the only weights that train. Without dropout: a text is seen few times, and
    the student is to meet the teacher's distribution as it is, not through noise."""

    rank: int = 16
    """Of each update."""
    alpha: float = 32.0
    """An update counts alpha / rank."""
    targets: list[str] = msgspec.field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """The linear layers of each block that get one."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank < 1 << 16:
            raise ValueError(f"lora.rank must lie in 1 to 65535, not {self.rank}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"lora.alpha must be above 0, not {self.alpha}")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(f"lora.targets must name layers, each once, not {self.targets}")


class QuantisationSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Train through the weights that the device will compute with (distill/train/fake_quantisation.py)."""

    formats: Formats
    """Of blocks, embedding and head (distill/formats.py): what is exported and converted is stored so."""
    calibration_records: int = 32
    """Training sequences, evenly spaced, whose inputs say how much each input channel counts when scales and palettes
    are found; 0: all count alike."""
    refit_every: int = 20
    """Steps after which scales and palettes follow the weights; 0: they stay as they were found."""

    def __post_init__(self) -> None:
        for name in ("calibration_records", "refit_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"quantisation.{name} must be at least 0, not {getattr(self, name)}")


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
    teacher: TeacherSection | None = None
    """A white-box teacher beside the student; None: the distributions that the dataset stores."""
    on_policy: OnPolicySection | None = None
    """Learn from the student's own answers too; needs `teacher`."""
    lora: LoraSection | None = None
    """Train low-rank adapters, merged when written (pip install 'distill[scale]'); None: every weight trains."""
    quantisation: QuantisationSection | None = None
    """Train in the weight formats of the device (the stage `qat`); None: fp32."""
    tokenizer: str | None = None
    """`toy` or a tokenizer.json; None: the one beside init's weights."""

    epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after so many steps. The schedule ends there too: another number is another run. 0, with `quantisation`: no
    training, its formats alone."""
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

    optimiser: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit: moments in 8 bits (pip install 'distill[scale]'): 2 bytes a weight, not 8. Its first step compiles."""
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
    span_weights: SpanWeights = SpanWeights()
    """Weights of a target token by its kind of span, in all components alike."""
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
    keep_checkpoints: int = 2
    """Resumable checkpoints kept: should the newest turn out damaged, the one before it is used."""
    eval_every: int = 0
    """Steps between held-out evaluations; 0: only before and after."""
    eval_records: int = 64
    """Held-out records evaluated (the first of split=val)."""
    checkpoints: str = "models/student/checkpoints"
    """Folder of <stage>.pt, <stage>.report.json and latest.pt."""
    out: str | None = None
    """The finished checkpoint's own path, its report beside it; None: in `checkpoints`, and copied to latest.pt."""
    runs: str = "runs"
    """Folder of steps.jsonl (a line a step) and of the tracker's files: in it, <stage>/<start of the fingerprint>."""
    tracker: Tracker = "tensorboard"
    """Who shows scalars and text samples: tensorboard, wandb (pip install 'distill[wandb]'; its own environment
    variables, WANDB_MODE=offline among them, say where they go) or none."""
    export: ExportSection = ExportSection()
    """For the export stage."""

    def __post_init__(self) -> None:
        _require_paths(self)
        for name in ("epochs", "max_length", "batch_size", "accumulation", "eval_records", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name, least in (("max_steps", 0 if self.quantisation else 1), ("token_budget", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        for name in ("weight_decay", "grad_clip", "threads", "save_every", "eval_every"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name, limit in (("seed", 1 << 63), ("threads", 1 << 12)):
            if not 0 <= getattr(self, name) < limit:
                raise ValueError(f"{name} must lie in 0 to {limit - 1}, not {getattr(self, name)}")
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
        if self.quantisation is not None and self.lora is not None:
            raise ValueError("quantisation with lora: adapters are merged when written, and would leave the formats")
        self.stages()  # its own rules
        Divergence(self.divergence, self.mix, self.temperature).require_valid()
        if self.teacher is not None and self.teacher.target != "dense" and self.temperature != 1.0:
            raise ValueError(f"temperature {self.temperature} with a teacher beside the student needs target: dense")
        if self.on_policy is not None and (self.teacher is None or not self.loss_weights.kl_div):
            raise ValueError("on_policy needs a teacher beside the student, and kl_div: nobody else judges its answers")
        if self.teacher is not None and self.teacher.target == "sampled" and self.divergence != "forward_kl":
            raise ValueError(f"draws from the teacher estimate forward_kl only, not {self.divergence}")
        lengths = [stage.max_length for stage in self.curriculum]
        if lengths != sorted(set(lengths)):
            raise ValueError(f"curriculum: max_length must grow from stage to stage, not {lengths}")

    def stages(self) -> list[LengthStage]:
        """The length curriculum; one stage where none is given."""
        alone = LengthStage(self.max_length, self.epochs, self.batch_size, self.batch_tokens, self.accumulation)
        return self.curriculum or [alone]

    @property
    def final(self) -> Path:
        """The finished checkpoint."""
        return Path(self.out) if self.out else Path(self.checkpoints) / f"{self.stage}.pt"


def _require_paths(config: TrainConfig) -> None:
    """ValueError where a path holds what no path does, and what would break the line that names it."""
    paths = {"data": config.data, "tokenizer": config.tokenizer, "checkpoints": config.checkpoints, "out": config.out,
             "runs": config.runs, "init.from_pretrained": config.init.from_pretrained,
             "init.checkpoint": config.init.trained}  # fmt: skip
    if config.teacher is not None:
        paths |= {"teacher.folder": config.teacher.folder, "teacher.url": config.teacher.url}
    for name, value in paths.items():
        if value is not None and not value.isprintable():
            raise ValueError(f"{name}: {value!r} is no path")


_NOT_THE_RESULT = (
    "checkpoints", "out", "runs", "save_every", "keep_checkpoints", "eval_every", "tracker", "export",
)  # fmt: skip


def identity(config: TrainConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """What makes a run's result: the settings that shape the weights, and the sha256 of what went in."""
    settings = {key: value for key, value in as_dict(config).items() if key not in _NOT_THE_RESULT}
    return {"config": settings, "inputs": inputs}


def fingerprint(made_of: dict[str, Any]) -> str:
    """sha256 of an identity."""
    return sha256_text(canonical_json(made_of))
