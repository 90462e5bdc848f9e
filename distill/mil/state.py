"""The states of one conversation: named tensors that outlive a prediction."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from distill.errors import InputError, PackageError
from distill.mil.program import Function
from distill.mil.values import RUNTIME, check_size, from_numpy


class State:
    """Made by `program.make_state()`. Functions with the same states (prefill, decode) may share one.

    A prediction that fails leaves it as it was. Values that MIL calls fp16 are held in float32; what is written
    was rounded to fp16 unless the policy is fp32.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> None:
        self._tensors = dict(tensors)
        self._dtypes = dict(dtypes)

    @classmethod
    def of(cls, function: Function) -> State:
        tensors = {}
        for feature in function.states:
            if any(d is None for d in feature.shape):
                raise PackageError(f"function {function.name}: state {feature.name!r} has a dynamic shape")
            shape = check_size([d for d in feature.shape if d is not None])
            tensors[feature.name] = torch.zeros(shape, dtype=RUNTIME[feature.type.dtype])
        return cls(tensors, {f.name: f.type.dtype for f in function.states})

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> np.ndarray:
        """A copy of one state (fp16 as float32, like outputs)."""
        return self.get(name).numpy().copy()

    def write(self, name: str, value: np.ndarray) -> None:
        """Replace one state; its shape stays, fp16 is rounded."""
        old = self.get(name)
        array = np.asarray(value)
        if array.shape != tuple(old.shape):
            raise InputError(f"state {name!r} has shape {list(old.shape)}, got {list(array.shape)}")
        if self._dtypes[name] == "fp16":
            array = array.astype(np.float16)
        self._tensors[name] = from_numpy(array, self._dtypes[name]).clone()

    def copy(self) -> State:
        """An independent state with the same contents."""
        return State({n: t.clone() for n, t in self._tensors.items()}, self._dtypes)

    def get(self, name: str) -> Tensor:
        """The tensor itself; for the interpreter."""
        if name not in self._tensors:
            raise InputError(f"no state {name!r}; this one holds {', '.join(self._tensors) or 'nothing'}")
        return self._tensors[name]

    def set(self, name: str, value: Tensor) -> None:
        """Replace the tensor itself; for the interpreter."""
        if self.get(name).shape != value.shape:
            raise InputError(f"state {name!r} has shape {list(self.get(name).shape)}, written with {list(value.shape)}")
        self._tensors[name] = value
