"""The memory that a run needs, before anything is allocated: parameters counted on the meta device, bytes by kind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from distill import checkpoint
from distill.artifacts import read_json
from distill.errors import ConfigError
from distill.model import ModelConfig, Student
from distill.pretrained import config_from_huggingface
from distill.train.config import TrainConfig
from distill.train.divergence import head_bytes
from distill.train.init import layers_kept

_GIB = 1 << 30


class Plan(NamedTuple):
    """Bytes by kind on the one device that trains, and what the machine has."""

    parameters: int
    random: bool
    shape: str
    rows: dict[str, tuple[int, str]]
    device: str
    available: int

    @property
    def needed(self) -> int:
        """All of it."""
        return sum(size for size, _ in self.rows.values())

    def table(self) -> str:
        """A line a kind."""
        lines = [f"student      {self.parameters:,} parameters ({self.shape})"]
        lines += [f"{name:12s} {_gib(size):>11s}  {why}" for name, (size, why) in self.rows.items()]
        lines += [
            f"{'total':12s} {_gib(self.needed):>11s}  on one device",
            f"{'this machine':12s} {_gib(self.available):>11s}  free ({self.device})",
        ]
        if self.random and self.parameters > 10**8:
            lines.append(
                "warning: random initialisation at this size: ten thousand samples cannot train it; "
                "start from a pretrained folder (init.from_pretrained)"
            )
        return "\n".join(lines)

    def require_fits(self) -> None:
        """ConfigError if the machine has less than the run needs."""
        if self.needed > self.available:
            raise ConfigError(
                f"training needs about {_gib(self.needed)} on one device; "
                f"{self.device} has {_gib(self.available)} free: "
                f"use a larger machine, a smaller student, a shorter max_length or gradient_checkpointing"
            )


def plan(config: TrainConfig, device: torch.device) -> Plan:
    """Count what `config` will allocate."""
    model = model_config(config)
    with torch.device("meta"):
        n = sum(p.numel() for p in Student(model).parameters())
    bf16 = config.dtype == "bf16"
    tokens = max(stage.largest for stage in config.stages())
    layer = tokens * activation_bytes(model, bf16)
    kept = tokens * model.hidden_size * 4 * model.num_hidden_layers
    if config.gradient_checkpointing:
        activations, how = kept + layer, "each block's input, and one block recomputed"
    else:
        activations, how = layer * model.num_hidden_layers, "every block's"
    rows = {
        "weights": (n * (6 if bf16 else 4), "fp32, and bf16 copies for the matrix products" if bf16 else "fp32"),
        "gradients": (n * 4, "fp32"),
        "optimiser": (n * 8, "AdamW: two moments in fp32"),
        "snapshot": (0 if device.type == "cuda" else n * 12, "weights and moments, while a checkpoint is written"),
        "activations": (activations, f"{tokens:,} tokens: {how}"),
        "head": (
            head_bytes(model.vocab_size, model.hidden_size, bf16),
            "its gradient in fp32, and the logits of one chunk",
        ),
    }
    shape = (
        f"width {model.hidden_size}, {model.num_hidden_layers} layers, {model.num_attention_heads} query and "
        f"{model.num_key_value_heads} KV heads of {model.head_dim}, MLP {model.intermediate_size:,}, "
        f"vocabulary {model.vocab_size:,}"
    )
    fresh = not (config.init.from_pretrained or config.init.checkpoint)
    return Plan(n, fresh, shape, rows, device.type, available_bytes(device))


def model_config(config: TrainConfig) -> ModelConfig:
    """The dimensions of the student, without its weights where they are in a Hugging Face folder."""
    init = config.init
    if init.from_pretrained:
        source = f"{init.from_pretrained}/config.json"
        data = read_json(source)
        if not isinstance(data, dict):
            raise ConfigError(f"{source}: expected an object")
        model = config_from_huggingface(data, source)
    elif init.checkpoint:
        model = checkpoint.load(init.checkpoint).student.config
    else:
        assert config.model is not None  # TrainConfig's own rule
        model = config.model
    if init.keep_layers is not None:
        n_layers = len(layers_kept(init, model.num_hidden_layers))
        model = msgspec.structs.replace(model, num_hidden_layers=n_layers)
    return model


def activation_bytes(model: ModelConfig, bf16: bool) -> int:
    """Bytes a token that one block keeps for its backward pass, attention being fused."""
    d, f = model.hidden_size, model.intermediate_size
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    narrow = 2 if bf16 else 4
    norms = 2 * (4 * d + 4 * d + narrow * d)  # of each: its input, the normalised value, the matrices' operand
    attention = narrow * (2 * q + 2 * kv + kv + q)  # q and k before and after RoPE, v, the output
    mlp = narrow * 4 * f  # gate, silu(gate), up, their product
    return norms + attention + mlp


def available_bytes(device: torch.device) -> int:
    """Free memory of the device; of the CPU, within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = [line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
        free = int(found[0]) * 1024 if found else free
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        used = int((limit.parent / "memory.current").read_text())
        free = min(free, max(0, int(text) - used))
    return free


def _gib(size: int) -> str:
    return f"{size / _GIB:,.1f} GiB" if size >= _GIB // 10 else f"{size / (1 << 20):,.1f} MiB"
