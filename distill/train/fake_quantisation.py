"""Training through the deployed weights: fake quantisation, with the arithmetic of distill/formats.py.

    fake = FakeQuantised(student, Formats(blocks="int4/32", embedding="int8"))
    with fake.applied():                 # the parameters hold what the device will compute with
        loss(student).backward()
    optimiser.step()                     # and again what is trained

The gradient passes straight through to the trained weights (Bengio et al. 2013), but where one lies outside the range
of its scale: there it is zero. Parameters are swapped, not modules: names, tied weights, checkpoints, gradient
checkpointing and whoever reads `lm_head.weight` see nothing of it, and a step decodes each weight once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from distill.errors import ConfigError
from distill.formats import Compressed, Formats, deployed, encode, fit, saturated
from distill.model import Student


class FakeQuantised:
    """The scales and palettes of a student's weights, and the swap.

    Scales follow the weights: they are found as for a finished student, so none is trained (LSQ, Esser et al. 2020,
    does) and none needs a learning rate, moments or a shard. Palettes go on from where they were.
    """

    def __init__(
        self,
        student: Student,
        formats: Formats,
        importance: dict[str, Tensor] | None = None,
        tables: dict[str, Tensor] | None = None,
    ) -> None:
        """`importance`: of input channels by parameter (`input_moments`). `tables`: of a run that goes on; None: found
        from the weights. ConfigError where a weight cannot be stored as asked, or its tables are another's."""
        formats.require_fits(student)
        self._weights = dict(student.named_parameters())
        self._formats = {name: formats.of(name, weight.ndim) for name, weight in self._weights.items()}
        self.importance = importance or {}
        """Of input channels, by parameter; those left out count alike."""
        for name, weight in self._weights.items():
            if weight.dtype != torch.float32:
                raise ConfigError(f"{name}: fake quantisation needs weights in fp32, not {weight.dtype}")
        if tables is not None and set(tables) != set(self._weights):
            raise ConfigError("scales and palettes of another student")
        self.tables = {name: self._fit(name, None) for name in self._weights} if tables is None else dict(tables)
        """By parameter, fp16. With the weights, all that an exact resume needs."""

    def _fit(self, name: str, start: Tensor | None) -> Tensor:
        return fit(self._weights[name], self._formats[name], self.importance.get(name), start)

    def refit(self) -> None:
        """Scales anew from the present weights; palettes one step of k-means on. Between optimiser steps."""
        self.tables = {name: self._fit(name, self.tables[name]) for name in self._weights}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The deployed values in the parameters. On leaving, the trained ones are back, and the gradients of weights
        outside the range are zero. A backward pass belongs inside: outside, autograd refuses it."""
        trained = {name: weight.detach().clone() for name, weight in self._weights.items()}
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(deployed(weight, self._formats[name], self.tables[name]))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.copy_(trained.pop(name))
                    outside = None if weight.grad is None else saturated(weight, self._formats[name], self.tables[name])
                    if weight.grad is not None and outside is not None:
                        weight.grad.masked_fill_(outside, 0.0)

    def bake(self) -> dict[str, Compressed]:
        """What weight.bin is to hold, by parameter: decompressed, it is what `applied` puts there."""
        return {name: encode(weight, self._formats[name], self.tables[name]) for name, weight in self._weights.items()}


@torch.no_grad()
def input_moments(student: Student, rows: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean square of each input channel of every linear layer, by parameter, over rows of ids [B, T].

    A tied head has none: the same matrix is the embedding, whose inputs are ids.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_NI = inputs[0].flatten(0, -2)
        square_I = x_NI.double().square().sum(0)
        sums[name] = sums[name] + square_I if name in sums else square_I
        counts[name] = counts.get(name, 0) + len(x_NI)

    own = dict(student.named_parameters())
    hooks = [
        module.register_forward_pre_hook(partial(note, f"{name}.weight"))
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in own
    ]
    training = student.training
    student.eval()
    try:
        for ids_BT in rows:
            student(ids_BT)
    finally:
        student.train(training)
        for hook in hooks:
            hook.remove()
    return {name: (total / counts[name]).float() for name, total in sums.items()}
