"""Bytes of one process of a run, by kind, and when they are held; tests/bench_memory.py holds them against real runs.

Parameters are counted on the meta device. Of several processes each has 1/ranks of weights, gradients and moments, and
whole, for a while, the blocks that are computed; embedding, final norm and head for the whole of a micro-batch.

Letters: T tokens of a micro-batch, D hidden, F width of the MLP, V vocabulary, K stored ids a token.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from distill.artifacts import read_json
from distill.errors import ConfigError
from distill.model import ModelConfig, Student
from distill.pretrained import config_from_huggingface
from distill.train.config import LengthStage, TrainConfig
from distill.train.divergence import head_bytes

FORWARD, TEACHER, LOSS, BACKWARD, UPDATE, GENERATION, SAVING = (
    "the end of the forward pass", "the teacher's forward pass", "the loss", "the backward pass", "the update",
    "generation", "saving",
)  # fmt: skip
MOMENTS = (FORWARD, TEACHER, LOSS, BACKWARD, UPDATE, GENERATION, SAVING)
_STUDENT = (FORWARD, TEACHER, LOSS, BACKWARD)
_TOGETHER = 32
"""Sequences drawn at one time (distill.train.sampling.sample)."""
_TEACHER_CHUNK = 256
"""Tokens whose whole distributions a teacher has at one time (distill.train.teacher)."""


class Row(NamedTuple):
    """Bytes of one kind, and the moments of a step at which they are held."""

    size: int
    why: str
    at: tuple[str, ...] = MOMENTS


class Case(NamedTuple):
    """A rank's part of a run, counted."""

    config: TrainConfig
    model: ModelConfig
    device: torch.device
    ranks: int
    parameters: int
    block: int
    """Parameters of one block."""
    trained: list[int]
    """Values of each tensor that has a gradient."""
    more: bool
    """A rank has several micro-batches a step, so that gradients are held while the next one is computed."""

    @property
    def tokens(self) -> int:
        """Of the largest micro-batch: the student's own answers come on top of what was there."""
        stages, own = self.config.stages(), self.config.on_policy
        return max(stage.largest + (_sequences(stage) * own.max_new_tokens if own else 0) for stage in stages)

    @property
    def bf16(self) -> bool:
        return self.config.dtype == "bf16"

    @property
    def root(self) -> int:
        """Parameters of embedding, final norm and head."""
        return self.parameters - self.block * self.model.num_hidden_layers


def case_of(config: TrainConfig, model: ModelConfig, device: torch.device, ranks: int) -> Case:
    with torch.device("meta"):
        student = Student(model)
    shapes, lora = [p.shape for p in student.parameters()], config.lora
    block = sum(p.numel() for p in student.model.layers[0].parameters())
    adapters: list[torch.Size] = []
    if lora is not None:
        for name, module in student.named_modules():
            if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in lora.targets:
                adapters += [torch.Size((lora.rank, module.in_features)), torch.Size((module.out_features, lora.rank))]
        block += sum(shape.numel() for shape in adapters) // model.num_hidden_layers
        shapes += adapters
    trained = [-(-shape[0] // ranks) * shape[1:].numel() for shape in adapters or shapes]
    batches = max(-(-stage.accumulation // ranks) for stage in config.stages())
    return Case(config, model, device, ranks, sum(shape.numel() for shape in shapes), block, trained,
                 batches > 1 or config.on_policy is not None)  # fmt: skip


def _sequences(stage: LengthStage) -> int:
    return -(-stage.batch_tokens // stage.max_length) if stage.batch_tokens else stage.batch_size


def rows_of(case: Case) -> dict[str, Row]:
    rows = {**_weight_rows(case), **_activation_rows(case), **_head_rows(case), **_teacher_rows(case),
            **_sequence_rows(case)}  # fmt: skip
    if case.device.type == "cpu":
        passing = sum(rows[name].size for name in _PASSING if name in rows)
        again = rows["one block"].size * 3 // 2 if case.config.gradient_checkpointing else 0
        rows["freed, kept"] = Row(passing * 3 // 10 + again, "by malloc, of what comes and goes (measured)", _STUDENT)
    return rows


_PASSING = ("gradients", "activations", "one block", "head's gradient", "its activations")


def _weight_rows(case: Case) -> dict[str, Row]:
    each = f", 1/{case.ranks} of them" if case.ranks > 1 else ""
    n = sum(case.trained)
    rows = {
        "weights": Row(4 * -(-case.parameters // case.ranks), f"fp32{each}"),
        "gradients": Row(4 * n, f"fp32{each}", MOMENTS[:5] if case.more else (UPDATE,)),
        "optimiser": Row(_moments(case), f"AdamW: two moments in {_bits(case)}{each}"),
    }
    if case.device.type != "cuda":
        always = MOMENTS if case.config.save_every else (SAVING,)
        rows["snapshot"] = Row(_snapshot(case), "weights and moments, while a checkpoint is written", always)
    if case.ranks > 1:
        narrow = 2 if case.bf16 else 4
        rows["blocks whole"] = Row(2 * case.block * narrow, "two blocks' weights: one computed, one on its way",
                                   (*_STUDENT, GENERATION))  # fmt: skip
        if case.config.lora is None:
            rows["block gradient"] = Row(8 * case.block, "one block's, whole, and on its way to the ranks", (BACKWARD,))
            rows["root gradient"] = Row(4 * case.root, "whole", (LOSS, BACKWARD))
        rows["root whole"] = Row(4 * case.root, "embedding, final norm and head, fp32", (*_STUDENT, GENERATION))
    elif case.bf16:
        copies = case.block * case.model.num_hidden_layers
        kept = (FORWARD, GENERATION) if case.config.gradient_checkpointing else (*_STUDENT, GENERATION)
        rows["copies"] = Row(2 * copies, "the blocks' weights in bf16", kept)
    return rows


def _bits(case: Case) -> str:
    return "fp32" if case.config.optimiser == "adamw" else "8 bits, and a scale for each 256"


def _moments(case: Case) -> int:
    """torchao keeps small tensors, and those that 256 does not divide, in fp32."""
    narrow = case.config.optimiser == "adamw8bit"
    return sum(2 * (n + n // 64) if narrow and n >= 4096 and n % 256 == 0 else 8 * n for n in case.trained)


def _snapshot(case: Case) -> int:
    return 4 * -(-case.parameters // case.ranks) + _moments(case)


def host_rows(case: Case) -> dict[str, Row]:
    if case.device.type != "cuda":
        return {}
    return {"snapshot": Row(_snapshot(case), "each rank's weights and moments, while a checkpoint is written")}


def _activation_rows(case: Case) -> dict[str, Row]:
    model, tokens = case.model, case.tokens
    layer = tokens * activation_bytes(model, case.bf16)
    ends = tokens * model.hidden_size * 4 * 4  # the final norm's, the hidden states of the targets and their gradient
    work = tokens * (3 * model.intermediate_size + 3 * model.hidden_size) * (2 if case.bf16 else 4)
    if case.config.gradient_checkpointing:
        kept = tokens * model.hidden_size * 4 * model.num_hidden_layers
        return {
            "activations": Row(kept + ends, f"{tokens:,} tokens: each block's input", _STUDENT),
            "one block": Row(layer + work, "recomputed, and its gradients", (BACKWARD,)),
        }
    return {
        "activations": Row(layer * model.num_hidden_layers + ends, f"{tokens:,} tokens: every block's", _STUDENT),
        "one block": Row(work, "its gradients", (BACKWARD,)),
    }


def _head_rows(case: Case) -> dict[str, Row]:
    v, d = case.model.vocab_size, case.model.hidden_size
    rows = {"head": Row(head_bytes(v, 0, case.bf16) + 2 * v * d * case.bf16, "the logits of one chunk", (LOSS,))}
    if case.ranks == 1 and case.config.lora is None:
        rows["head's gradient"] = Row(4 * v * d, "fp32", (LOSS, BACKWARD))
    return rows


def _teacher_rows(case: Case) -> dict[str, Row]:
    section = case.config.teacher
    if section is None or section.folder is None:
        return {}
    model = model_of(section.folder)
    files = sum(path.stat().st_size for path in Path(section.folder).glob("*.safetensors"))
    v, e, tokens = model.vocab_size, model.hidden_size, case.tokens
    head = v * e * (2 if case.bf16 else 4)
    logits = head_bytes(v, 0, case.bf16)
    if section.target in ("top_k", "sampled"):
        logits = 3 * _TEACHER_CHUNK * v * 4
    at = (LOSS,) if section.target == "dense" else (TEACHER,)
    return {
        "teacher": Row(files, f"its weights as stored, in {'each rank' if case.ranks > 1 else 'memory'}"),
        "its activations": Row(
            tokens * (activation_bytes(model, case.bf16) + 8 * e), "one block at a time", (TEACHER,)
        ),
        "its head": Row(head + logits, "a copy of its output matrix for products, and the logits of one chunk", at),
    }


def _sequence_rows(case: Case) -> dict[str, Row]:
    stages, model, own = case.config.stages(), case.model, case.config.on_policy
    k = _stored_ids(case.config)
    window = max(-(-stage.accumulation // case.ranks) * stage.largest for stage in stages) * (47 + 12 * k)
    twice = case.device.type == "cpu"
    rows = {"batches": Row(window * (2 if twice else 1), f"a step's, with {k} stored ids a token"
                           + (", and the next step's" if twice else ""))}  # fmt: skip
    if own is not None:
        read = max(min(_TOGETHER, _sequences(stage)) * (stage.max_length + own.max_new_tokens) for stage in stages)
        cache = read * model.num_hidden_layers * 2 * model.num_key_value_heads * model.head_dim * 4
        drawn = min(_TOGETHER, max(_sequences(stage) for stage in stages)) * model.vocab_size * 40
        rows["generation"] = Row(
            2 * cache + drawn, "the KV cache of one micro-batch, twice while it grows", (GENERATION,)
        )
    return rows


def _stored_ids(config: TrainConfig) -> int:
    """Ids stored of each token; of a dataset, which is not read for a plan, 50."""
    if config.teacher is None:
        return 50
    return 0 if config.teacher.target in ("dense", "aligned") else config.teacher.k


def model_of(folder: str) -> ModelConfig:
    source = f"{folder}/config.json"
    data = read_json(source)
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected an object")
    return config_from_huggingface(data, source)


def activation_bytes(model: ModelConfig, bf16: bool) -> int:
    """Bytes a token that one block keeps for its backward pass, attention being fused."""
    d, f = model.hidden_size, model.intermediate_size
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    narrow = 2 if bf16 else 4
    norms = 2 * (4 * d + 4 * d + narrow * d)  # of each: its input, the normalised value, the matrices' operand
    attention = narrow * (2 * q + 2 * kv + kv + q)  # q and k before and after RoPE, v, the output
    mlp = narrow * 4 * f  # gate, silu(gate), up, their product
    return norms + attention + mlp
