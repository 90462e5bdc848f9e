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

FORWARD, TEACHER, LOSS, BACKWARD, END, UPDATE, EVALUATION, GENERATION, SAVING = (
    "the end of the forward pass", "the teacher's forward pass", "the loss", "the start of the backward pass",
    "the end of the backward pass", "the update", "held-out evaluation", "generation", "saving",
)  # fmt: skip
MOMENTS = (FORWARD, TEACHER, LOSS, BACKWARD, END, UPDATE, EVALUATION, GENERATION, SAVING)
_STEP = MOMENTS[:5]
_PASSING = ("gradients", "activations", "its gradients", "head's gradient")
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
    shapes: list[torch.Size]
    """Of the tensors that train."""
    merged: int
    """Values of the matrices that adapters change."""

    @property
    def trained(self) -> list[int]:
        """Values that a rank has of each tensor that trains."""
        return [-(-shape[0] // self.ranks) * shape[1:].numel() for shape in self.shapes]

    @property
    def more(self) -> bool:
        """A rank has several micro-batches a step, so that gradients are held while the next one is computed."""
        batches = max(-(-stage.accumulation // self.ranks) for stage in self.config.stages())
        return batches > 1 or self.config.on_policy is not None

    @property
    def tokens(self) -> int:
        """Of the largest micro-batch: the student's own answers come on top of what was there."""
        stages, own = self.config.stages(), self.config.on_policy
        return max(stage.largest + (_sequences(stage) * own.max_new_tokens if own else 0) for stage in stages)

    @property
    def bf16(self) -> bool:
        return self.config.dtype == "bf16"

    @property
    def matrices(self) -> int:
        """Values of a block's matrices, without norms: what has a copy in bf16."""
        return self.block - 2 * self.model.hidden_size

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
    merged = 0
    if lora is not None:
        for name, module in student.named_modules():
            if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in lora.targets:
                merged += module.weight.numel()
                adapters += [torch.Size((lora.rank, module.in_features)), torch.Size((module.out_features, lora.rank))]
        block += sum(shape.numel() for shape in adapters) // model.num_hidden_layers
        shapes += adapters
    return Case(config, model, device, ranks, sum(shape.numel() for shape in shapes), block, adapters or shapes, merged)


def _sequences(stage: LengthStage) -> int:
    return -(-stage.batch_tokens // stage.max_length) if stage.batch_tokens else stage.batch_size


def rows_of(case: Case) -> dict[str, Row]:
    rows = {**_weight_rows(case), **_shard_rows(case), **_activation_rows(case), **_head_rows(case),
            **_teacher_rows(case), **_sequence_rows(case)}  # fmt: skip
    if case.device.type == "cpu":
        passing = sum(rows[name].size for name in _PASSING if name in rows)
        again = rows["its gradients"].size * 3 // 2 if case.config.gradient_checkpointing else 0
        rows["malloc"] = Row(passing * 3 // 10 + again, "kept of what comes and goes, about (fitted)", _STEP)
    return rows


def held(rows: dict[str, Row]) -> dict[str, int]:
    """Bytes at each moment."""
    return {moment: sum(row.size for row in rows.values() if moment in row.at) for moment in MOMENTS}


def host_rows(case: Case) -> dict[str, Row]:
    """What the rank has on the machine that its GPU is in."""
    if case.device.type != "cuda":
        return {}
    each = "its weights and moments, while a checkpoint is written"
    rows = {"snapshot": Row(_snapshot(case) + _merged(case), each)}
    if case.ranks > 1:
        rows["whole"] = Row(4 * case.parameters, "of the first rank alone: the student, when it is read and at the end")
    return rows


def _weight_rows(case: Case) -> dict[str, Row]:
    each = f", 1/{case.ranks} of them" if case.ranks > 1 else ""
    n, config = sum(case.trained), case.config
    rows = {
        "weights": Row(4 * -(-case.parameters // case.ranks), f"fp32{each}"),
        "gradients": Row(4 * n, f"fp32{each}", (*_STEP, UPDATE) if case.more else (END, UPDATE)),
        "optimiser": Row(_moments(case), f"AdamW: two moments in {_bits(case)}{each}"),
    }
    if case.device.type != "cuda":
        always = MOMENTS if config.save_every else (SAVING,)
        rows["snapshot"] = Row(_snapshot(case), "weights and moments, while a checkpoint is written", always)
        if _merged(case):
            rows["merged"] = Row(_merged(case), "weights with what adapters add", (SAVING,))
    if config.quantisation is not None:
        rows["weights aside"] = Row(4 * n, "those that train, while the deployed ones are in their place",
                                    (*_STEP, EVALUATION, GENERATION))  # fmt: skip
    if case.bf16:
        all_blocks = 2 * case.matrices * case.model.num_hidden_layers
        again = config.gradient_checkpointing
        rows["copies"] = Row(2 * case.matrices if again else all_blocks, "weights in bf16, of "
                             + ("one block" if again else "all blocks"), _STEP[:-1])  # fmt: skip
        rows["a copy"] = Row(2 * case.matrices, "the first block's weights in bf16", (END,))
        if config.on_policy is not None:
            head = 2 * case.model.vocab_size * case.model.hidden_size
            rows["drawn from"] = Row(all_blocks + head, "weights in bf16", (GENERATION,))
    return rows


def _shard_rows(case: Case) -> dict[str, Row]:
    """What several ranks put together for a while, in fp32."""
    if case.ranks == 1:
        return {}
    config = case.config
    rows = {
        "blocks whole": Row(8 * case.block, "one that is computed, one on its way", (*_STEP, EVALUATION)),
        "root whole": Row(4 * case.root, "embedding, final norm and head", (*_STEP, EVALUATION)),
    }
    if config.lora is None:
        rows["block gradient"] = Row(8 * case.block, "one block's, and on its way to the ranks", (BACKWARD, END))
        rows["root gradient"] = Row(8 * case.root, "whole, and on its way to the ranks", (END,))
    here = case.device.type == "cpu"  # where the first rank also draws the tracker's samples, whatever the device
    draws = config.on_policy is not None or (here and config.tracker != "none")
    whole = ((GENERATION,) if draws else ()) + ((SAVING,) if here else ())
    if whole:
        rows["student whole"] = Row(4 * case.parameters, "to draw from it, or to write it", whole)
    return rows


def _bits(case: Case) -> str:
    return "fp32" if case.config.optimiser == "adamw" else "8 bits, and a scale for each 256"


def _moments(case: Case) -> int:
    """torchao keeps small tensors, and those that 256 does not divide, in fp32."""
    narrow = case.config.optimiser == "adamw8bit"
    return sum(2 * (n + n // 64) if narrow and n >= 4096 and n % 256 == 0 else 8 * n for n in case.trained)


def _snapshot(case: Case) -> int:
    """Of several ranks each keeps what it trains; one alone writes the plain student, and its adapters beside it."""
    if case.config.lora is None or case.ranks > 1:
        return 4 * sum(case.trained) + _moments(case)
    return 4 * case.parameters + _moments(case)


def _merged(case: Case) -> int:
    """Weights that are put together before they are copied (distill.train.adapters.plain)."""
    if case.config.lora is None or case.ranks > 1:
        return 0
    return 4 * (case.merged if case.device.type == "cpu" else case.parameters - sum(case.trained))


def _activation_rows(case: Case) -> dict[str, Row]:
    model, tokens, narrow = case.model, case.tokens, 2 if case.bf16 else 4
    d, f, n_layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    layer = tokens * activation_bytes(model, case.bf16, frozen=case.config.lora is not None)
    ends = tokens * d * 4 * 4  # the final norm's, the hidden states of the targets and their gradient
    one = (4 if case.more else 0) + (2 if case.bf16 else 0)  # a gradient before it is added to what there is
    work = tokens * max(2 * f * narrow, 4 * d * 4) + (0 if case.config.lora else one * f * d)
    again = case.config.gradient_checkpointing
    kept, what = (tokens * d * 4 * n_layers, "each block's input") if again else (layer * n_layers, "every block's")
    seen = case.config.stages()[-1].largest * forward_bytes(model, bf16=False)
    return {
        "activations": Row(kept + ends, f"{tokens:,} tokens: {what}", _STEP[:-1]),
        "a block's": Row(layer + ends, "activations of the first block", (END,)),
        "its gradients": Row(work + (layer if again else 0), "of one block" + (", recomputed" if again else ""),
                             (BACKWARD,)),
        "held-out": Row(seen, "one block at a time, fp32", (EVALUATION,)),
    }  # fmt: skip


def _head_rows(case: Case) -> dict[str, Row]:
    model, config = case.model, case.config
    v, d = model.vocab_size, model.hidden_size
    extra = (4 if _dense(config) else 0) + (config.temperature != 1.0)
    held_out = _head(case, config.stages()[-1].largest, bf16=False, extra=4 * (config.teacher is not None))
    rows = {
        "head": Row(_head(case, case.tokens, bf16=case.bf16, extra=extra), "the logits of one chunk", (LOSS,)),
        "held-out head": Row(held_out, "likewise", (EVALUATION,)),
    }
    if config.lora is None:
        added = case.ranks == 1 and case.more  # to what the micro-batches before it gave
        rows["head's gradient"] = Row(4 * v * d, "fp32", (LOSS,) if added else (LOSS, BACKWARD))
        if case.ranks == 1 and (case.more or model.tie_word_embeddings):
            rows["embedding's"] = Row(4 * v * d, "gradient, before it is added", (END,))
    return rows


def _head(case: Case, tokens: int, *, bf16: bool, extra: int) -> int:
    model = case.model
    return head_bytes(tokens, model.vocab_size, model.hidden_size, bf16=bf16, cuda=case.device.type == "cuda",
                      extra=extra)  # fmt: skip


def _dense(config: TrainConfig) -> bool:
    return config.teacher is not None and config.teacher.target == "dense"


def _teacher_rows(case: Case) -> dict[str, Row]:
    section = case.config.teacher
    if section is None or section.folder is None:
        return {}
    model = model_of(section.folder)
    files = sum(path.stat().st_size for path in Path(section.folder).glob("*.safetensors"))
    v, e, tokens = model.vocab_size, model.hidden_size, case.tokens
    seen = case.config.stages()[-1].largest
    chunk, held_out = (head_bytes(n, v, e, bf16=False, cuda=False) for n in (tokens, seen))
    stored = 4 if files > 3 * model.n_params() else 2  # bytes a value
    if _dense(case.config):
        head, at = chunk + (2 * v * e if case.bf16 else 0), LOSS
    else:
        head, at = 3 * 4 * v * min(_TEACHER_CHUNK, tokens), TEACHER
    wide = 0 if stored == 4 else 4 * v * e  # its weights as fp32 operands
    return {
        "teacher": Row(files, f"its weights as stored, in {'each rank' if case.ranks > 1 else 'memory'}"),
        "its work": Row(tokens * forward_bytes(model, case.bf16), "one block at a time", (TEACHER,)),
        "its states": Row(tokens * e * 8, "hidden, of the targets", (LOSS,)),
        "its head": Row(head + (0 if case.bf16 and _dense(case.config) else wide),
                        "logits of one chunk, and its weights as operands", (at,)),
        "its held-out": Row(max(seen * forward_bytes(model, bf16=False), held_out + wide), "likewise", (EVALUATION,)),
    }  # fmt: skip


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
        most = cache + max(cache + drawn, read * forward_bytes(model, case.bf16))
        rows["generation"] = Row(most, "the KV cache, twice while it grows, or the reading of prompts", (GENERATION,))
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


def activation_bytes(model: ModelConfig, bf16: bool, *, frozen: bool = False) -> int:
    """Bytes a token that one block keeps for its backward pass, attention being fused. `frozen`: norms do not train."""
    d, f, narrow = model.hidden_size, model.intermediate_size, 2 if bf16 else 4
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    norms = 8 * d if frozen else 16 * d  # of each: its input, and the normalised value for its gain
    operands = 10 * d if bf16 else 8 * d  # in bf16 each of five matrices has a copy, in fp32 they share two
    attention = narrow * (3 * q + 2 * kv)  # q and k after RoPE, v, the output by document and as a whole
    mlp = narrow * 4 * f  # gate, silu(gate), up, their product
    return norms + operands + attention + mlp


def forward_bytes(model: ModelConfig, bf16: bool) -> int:
    """Bytes a token that one block takes where nothing is kept for a backward pass."""
    d, f, narrow = model.hidden_size, model.intermediate_size, 2 if bf16 else 4
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    cached = kv * (4 + narrow)  # k after RoPE and v, which are there until the next block's
    attention = 8 * d + narrow * (q + kv) + cached + 12 * q  # three of q while it is rotated, in fp32
    mlp = 12 * d + narrow * d + 2 * cached + narrow * 3 * f
    return max(attention, mlp) + (2 * d if bf16 else 0)
