"""The optimiser of a run: AdamW, or AdamW whose two moments are kept in 8 bits (Dettmers et al. 2022), by torchao.

What is saved of either is plain tensors: 8-bit moments as their codes and the scale of each block of 256, so that a
checkpoint holds no class of another package.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

import torch
from torch import Tensor

from distill.errors import InputError
from distill.train.config import TrainConfig
from distill.train.distributed import launched
from distill.train.sharded import as_shard, local, rows

_BLOCK = 256
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""AdamW's moments, and whether each has a sign."""


def scale_package(name: str, key: str) -> Any:
    """A module of the extra `scale`, for the configuration key that asks for it. InputError where it is absent."""
    logging.disable(logging.WARNING)  # torchao tells of each of its GPU libraries that does not load here
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise InputError(f"{key}: the package {package} is not installed: pip install 'distill[scale]'") from None
    finally:
        logging.disable(logging.NOTSET)


def make_optimiser(student: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """For the parameters that train; weight decay on matrices only. InputError where adamw8bit lacks what it needs."""
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimiser == "adamw8bit":
        torchao = scale_package("torchao.optim", "optimiser: adamw8bit")
        _require_compiler(trained[0].device)
        # true, of no consequence, and nothing that who runs this can change
        warnings.filterwarnings("ignore", message="OptimState8bit does not implement _stable_hash_for_caching")
        made: torch.optim.Optimizer = torchao.AdamW8bit(
            groups, lr=config.lr, betas=config.betas, eps=1e-8, block_size=_BLOCK
        )
        return made
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=1e-8, fused=True)


def _require_compiler(device: torch.device) -> None:
    """torchao compiles its step; without a compiler that ends in a page of trace at the first one."""
    if device.type != "cpu":
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise InputError("optimiser: adamw8bit compiles its step: it needs a C++ compiler, and none is here") from None


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Of every group. torchao takes a tensor: a number would be compiled in."""
    for group in optimiser.param_groups:
        group["lr"] = lr if isinstance(optimiser, torch.optim.AdamW) else torch.tensor(lr)


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """What `restore_optimiser` needs; the optimiser's own tensors, not copies."""
    saved = optimiser.state_dict()
    if isinstance(optimiser, torch.optim.AdamW):
        return saved
    packed = {i: {name: _packed(x) for name, x in kept.items()} for i, kept in saved["state"].items()}
    return saved | {"state": packed}


def _packed(x: Any) -> Any:
    x = local(x)
    return {"codes": x.codes, "scale": x.scale} if hasattr(x, "codes") else x


def restore_optimiser(optimiser: torch.optim.Optimizer, parts: list[dict[str, Any]]) -> None:
    """Put back what as many processes saved as `parts`. AttributeError, KeyError, TypeError or ValueError where it is
    not this optimiser's."""
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    if any(set(part["state"]) != set(range(len(trained))) for part in parts):
        raise ValueError(f"moments of other parameters than these {len(trained)}")
    for i, parameter in enumerate(trained):
        kept = [part["state"][i] for part in parts]
        moments = {name: _moment(name, [_plain(one[name], optimiser) for one in kept], parameter) for name in _MOMENTS}
        optimiser.state[parameter] = {"step": _count(kept[0]["step"]), **moments}


def _plain(x: Any, optimiser: torch.optim.Optimizer) -> Any:
    """`x`, if it is plain tensors as this optimiser saves them: importing torchao makes its own classes loadable."""
    eight = isinstance(x, dict) and not isinstance(optimiser, torch.optim.AdamW)
    if not all(type(part) is Tensor for part in (x.values() if eight else [x])):
        raise TypeError(f"a moment that is a {type(x).__name__}")
    return x


def _count(step: Tensor) -> Tensor:
    if step.shape != () or step.dtype != torch.float32:
        raise ValueError(f"a step of shape {tuple(step.shape)}, {step.dtype}")
    return step.clone()


def _moment(name: str, parts: list[Any], parameter: Tensor) -> Tensor:
    """A moment of this process's shard of a parameter."""
    if not any(isinstance(x, dict) for x in parts):
        return rows(parts, parameter)
    world = launched()
    if len(parts) != world.size:
        raise ValueError(f"8-bit moments cannot be divided anew: go on with {len(parts)} processes, not {world.size}")
    mine = parts[world.rank]
    moment = _unpacked(name, mine) if isinstance(mine, dict) else mine
    if moment.shape != local(parameter).shape:
        raise ValueError(f"a moment of shape {tuple(moment.shape)} for {tuple(local(parameter).shape)}")
    return as_shard(moment.to(local(parameter).device), parameter)


def _unpacked(name: str, x: dict[str, Any]) -> Tensor:
    """An 8-bit moment, of the tensors it was saved as."""
    codes, scale = x["codes"], x["scale"]
    if codes.dtype != torch.uint8 or scale.dtype != torch.float32 or scale.shape != (codes.numel() // _BLOCK,):
        raise ValueError(f"{name}: {codes.dtype} codes {tuple(codes.shape)}, {scale.dtype} scales {tuple(scale.shape)}")
    states = scale_package("torchao.optim.subclass_8bit", "optimiser: adamw8bit")
    signed = _MOMENTS[name]
    levels = states.get_qmap_signed() if signed else states.get_qmap_unsigned()
    return states.OptimState8bit(codes, scale, torch.tensor(levels), signed, dtype=torch.float32)


def optimiser_bytes(optimiser: torch.optim.Optimizer) -> int:
    """Memory of its moments, 8-bit codes with their scales."""
    tensors: list[Tensor] = []
    for kept in optimiser_state(optimiser)["state"].values():
        for name in _MOMENTS:
            tensors += kept[name].values() if isinstance(kept[name], dict) else [kept[name]]
    return sum(x.numel() * x.element_size() for x in tensors)
