"""Low-rank adapters (LoRA, Hu et al. 2021) on a frozen student, by peft: few weights train, and few have gradients
and moments.

    y = W x + (alpha / rank) B A x        W frozen; A [rank, in] random, B [out, rank] zero at the start

Only a run at work has them. What is written is the plain student, each target's W + (alpha / rank) B A.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.errors import ConfigError
from distill.model import Student
from distill.train.config import LoraSection
from distill.train.optimiser import scale_package

_MARK = ".lora_"
"""In the name of an adapter's parameter."""


def add_adapters(student: Student, section: LoraSection, seed: int) -> None:
    """Freeze the student and put adapters on its targets, in place. ConfigError where a target names no linear layer of
    a block, InputError where peft is absent."""
    names = {name.rpartition(".")[2] for name, module in student.model.layers.named_modules()
             if isinstance(module, nn.Linear)}  # fmt: skip
    for target in section.targets:
        if target not in names:
            raise ConfigError(f"lora.targets: no linear layer of a block is called {target!r}; {sorted(names)} are")
    peft = scale_package("peft", "lora")
    how = peft.LoraConfig(r=section.rank, lora_alpha=section.alpha, target_modules=sorted(section.targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(how, student)


def adapters(student: Student) -> dict[str, Tensor]:
    """The adapters' weights by name, not copies; {} where the student has none."""
    return {name: p.detach() for name, p in student.named_parameters() if _MARK in name}


@torch.no_grad()
def plain(student: Student) -> Student:
    """The student without adapters, what they do added to its weights, on the CPU; itself where it has none. What no
    adapter changes is shared with it on a CPU."""
    if not adapters(student):
        return student
    layers = scale_package("peft.tuners.lora", "lora")
    weights = {name.replace(".base_layer", ""): value.cpu() for name, value in student.state_dict().items()
               if _MARK not in name}  # fmt: skip
    for name, module in student.named_modules():
        if isinstance(module, layers.LoraLayer):
            weights[f"{name}.weight"] = (module.get_base_layer().weight + module.get_delta_weight("default")).cpu()
    with torch.device("meta"):
        whole = Student(student.config)
    whole.load_state_dict(weights, assign=True)
    if student.config.tie_word_embeddings:
        whole.lm_head.weight = whole.model.embed_tokens.weight
    return whole
