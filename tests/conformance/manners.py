"""What the interpreter relies on and no result shows: an operator leaves its inputs as they were, and one that is
marked `fresh` hands out memory of its own, each output by itself (it is rounded in place).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

import distill.mil.ops  # noqa: F401  (fills the table)
from distill.mil.ops.registry import TABLE, Handler


def install() -> None:
    """Watch every operator of this process."""
    for name, handler in TABLE.items():
        TABLE[name] = handler._replace(function=watched(handler))


def watched(handler: Handler) -> Callable[..., Any]:
    @functools.wraps(handler.function)
    def call(**arguments: Any) -> Any:
        given = list(tensors(list(arguments.values())))
        before = [t.clone() for t in given]
        result = handler.function(**arguments)
        for tensor, old in zip(given, before):
            same = tensor.shape == old.shape and tensor.contiguous().numpy().tobytes() == old.numpy().tobytes()
            assert same, f"{handler.name} changed an input"
        if handler.fresh:
            taken = {t.untyped_storage().data_ptr() for t in given if t.numel()}
            for out in tensors(result):
                place = out.untyped_storage().data_ptr()
                assert not out.numel() or place not in taken, f"{handler.name} is marked fresh and shares memory"
                taken.add(place)
        return result

    return call


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
