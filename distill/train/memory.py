"""The plan of a run, before anything is allocated: bytes a rank by kind, and tokens a step.

Not all kinds are held at one time: what a rank needs is the sum at the largest moment (distill/train/footprint.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from distill import checkpoint
from distill.errors import ConfigError
from distill.model import ModelConfig
from distill.train.config import LengthStage, TrainConfig
from distill.train.footprint import MOMENTS, Row, case_of, held, host_rows, model_of, rows_of
from distill.train.init import layers_kept

_GIB = 1 << 30
GPUS = {"H100": 78 * _GIB, "H200": 139 * _GIB}
"""Free memory of an 80 GB and of a 141 GB device before a run."""
_RANKS = [1 << i for i in range(11)]


class StagePlan(NamedTuple):
    """What a step of one stage of the curriculum reads, at most."""

    max_length: int
    batch: int
    """Tokens a micro-batch."""
    accumulation: int
    """Micro-batches a step."""
    of_rank: int
    """Micro-batches a step of the busiest rank."""
    idle: float
    """Share of all ranks' time in which they have no micro-batch."""


class Plan(NamedTuple):
    """Bytes by kind on the one device of a rank, what else its host holds, and what this machine has."""

    parameters: int
    trained: int
    random: bool
    shape: str
    rows: dict[str, Row]
    host: dict[str, Row]
    stages: list[StagePlan]
    device: str
    ranks: int
    local: int
    """Of them, on this machine."""
    available: int
    host_available: int
    fitting: dict[str, int | None]
    """Of each kind of GPU, the fewest ranks whose share fits; None: none up to 1,024."""

    @property
    def peak(self) -> str:
        """The moment at which most is held."""
        return max(MOMENTS, key=self.at)

    @property
    def needed(self) -> int:
        """Bytes at the peak."""
        return self.at(self.peak)

    @property
    def host_needed(self) -> int:
        """Bytes that this machine's ranks have in its memory, beside their GPUs: all have their snapshots, only one the
        whole student, and not then."""
        return max((row.size * (1 if name == "whole" else self.local) for name, row in self.host.items()), default=0)

    def at(self, moment: str) -> int:
        """Bytes held at a moment."""
        return held(self.rows)[moment]

    def table(self) -> str:
        """A line a kind, in brackets what is not held at the peak; then the stages, and what fits where."""
        peak, where = self.peak, "on one device" if self.ranks == 1 else f"on each of {self.ranks} devices"
        frozen = "" if self.trained == self.parameters else f", {self.trained:,} trained"
        lines = [f"student         {self.parameters:,} parameters{frozen} ({self.shape})"]
        for name, row in self.rows.items():
            size = _gib(row.size) if peak in row.at else f"({_gib(row.size)})"
            lines.append(f"{name:15s} {size:>12s}  {row.why}")
        lines.append(f"{'total':15s} {_gib(self.needed):>12s}  {where}, at {peak}")
        lines.append(f"{'this machine':15s} {_gib(self.available):>12s}  free ({self.device})")
        lines += [f"host: {name:9s} {_gib(row.size):>12s}  {row.why}" for name, row in self.host.items()]
        if self.host:
            lines.append(f"{'this host':15s} {_gib(self.host_available):>12s}  free")
        lines += ["", *self._stages(), *self._fitting(), *self._warnings()]
        return "\n".join(lines)

    def _stages(self) -> list[str]:
        lines = ["max length   tokens a micro-batch   micro-batches a step   tokens a step   micro-batches a rank"]
        for s in self.stages:
            lines.append(f"{s.max_length:10,d}   {s.batch:20,d}   {s.accumulation:20,d}   "
                         f"{s.batch * s.accumulation:13,d}   {s.of_rank:20,d}")  # fmt: skip
        return lines

    def _fitting(self) -> list[str]:
        if self.needed <= self.available and self.ranks == 1:
            return []
        found = [f"{name} from {n}" if n else f"{name} not up to {_RANKS[-1]:,}" for name, n in self.fitting.items()]
        return [f"fits, in devices of {', '.join(found)}"]

    def _warnings(self) -> list[str]:
        lines = [
            f"warning: {s.accumulation} micro-batches a step over {self.ranks} ranks: {s.idle:.0%} of the machines "
            f"idles (max_length {s.max_length}: make accumulation a multiple of {self.ranks})"
            for s in self.stages if s.idle
        ]  # fmt: skip
        if self.random and self.parameters > 10**8:
            lines.append(
                "warning: random initialisation at this size: ten thousand samples cannot train it; "
                "start from a pretrained folder (init.from_pretrained)"
            )
        return lines

    def require_fits(self) -> None:
        """ConfigError if the machine has less than the run needs."""
        among = self.local if self.device == "cpu" else 1  # that share what is available
        if self.needed * among > self.available:
            one = "one" if self.ranks == 1 else "each"
            where = f"for {among} processes" if among > 1 else f"on {one} device"
            raise ConfigError(
                f"training needs about {_gib(self.needed * among)} {where}; "
                f"{self.device} has {_gib(self.available)} free: "
                f"use a larger machine, a smaller student, a shorter max_length or gradient_checkpointing"
            )
        if self.host_needed > self.host_available:
            raise ConfigError(
                f"checkpoints of {self.local} processes need about {_gib(self.host_needed)} of this machine's memory "
                f"beside its devices; {_gib(self.host_available)} are free: "
                f"use a larger machine, or lora, optimiser: adamw8bit or more machines"
            )


def plan(config: TrainConfig, device: torch.device, ranks: int = 1) -> Plan:
    """What each of `ranks` processes will allocate, with a device for each. InputError where a folder it must look at
    cannot be read."""
    model = model_config(config)
    case = case_of(config, model, device, ranks)
    shape = (
        f"width {model.hidden_size}, {model.num_hidden_layers} layers, {model.num_attention_heads} query and "
        f"{model.num_key_value_heads} KV heads of {model.head_dim}, MLP {model.intermediate_size:,}, "
        f"vocabulary {model.vocab_size:,}"
    )
    fresh = not (config.init.from_pretrained or config.init.checkpoint)
    stages = [_stage_plan(stage, ranks) for stage in config.stages()]
    gpus = {n: case._replace(device=torch.device("cuda"), ranks=n) for n in _RANKS}
    most = {n: max(held(rows_of(one)).values()) for n, one in gpus.items()}
    fitting = {name: next((n for n in _RANKS if most[n] <= size), None) for name, size in GPUS.items()}
    trained = sum(gpus[1].trained)
    local = min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))  # torchrun's
    return Plan(case.parameters, trained, fresh, shape, rows_of(case), host_rows(case), stages, device.type, ranks,
                local, available_bytes(device), available_bytes(torch.device("cpu")), fitting)  # fmt: skip


def _stage_plan(stage: LengthStage, ranks: int) -> StagePlan:
    busiest = -(-stage.accumulation // ranks)
    idle = 1 - stage.accumulation / (busiest * ranks)
    return StagePlan(stage.max_length, stage.largest, stage.accumulation, busiest, idle)


def model_config(config: TrainConfig) -> ModelConfig:
    """The dimensions of the student, without its weights where they are in a Hugging Face folder."""
    init = config.init
    if init.from_pretrained:
        model = model_of(init.from_pretrained)
    elif init.trained:
        model = checkpoint.load(init.trained).student.config
    else:
        assert config.model is not None  # TrainConfig's own rule
        model = config.model
    if init.keep_layers is not None:
        n_layers = len(layers_kept(init, model.num_hidden_layers))
        model = msgspec.structs.replace(model, num_hidden_layers=n_layers)
    return model


def available_bytes(device: torch.device) -> int:
    """Free memory of the device; of the CPU, within the container's limit. 0 where there is no such device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else 0
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
