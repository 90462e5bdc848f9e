"""The cost of the commonest torch calls, from the shapes of their operands alone.

Making a call without data, which guard.py does for all others, goes through torch's own Python definitions: the
first such call imports torch's compiler, which takes a second and 65 MiB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_aten = torch.ops.aten


def plain(func: Any, args: Sequence[Any]) -> tuple[int, int, int] | None:
    """(bytes, elements of operands and results, multiplications) of a call; None where it is not a common one."""
    given = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else [arg]) if isinstance(a, Tensor)]
    if not given:
        return None
    try:
        if func in _FREE or (func.is_view and func not in _RESULTS):  # reshape is a view that may copy
            return 0, 0, 0
        if (torch.Tag.pointwise in func.tags and not func._schema.is_mutable) or func in _POINTWISE:
            made, products = math.prod(np.broadcast_shapes(*(t.shape for t in given))), 0
        elif func in _RESULTS:
            made, products = _RESULTS[func](args)
        else:
            return None
    except (LookupError, RuntimeError, TypeError, ValueError):
        return None  # a call that will fail
    widest = max(4 if t.is_floating_point() and t.element_size() <= 4 else 8 for t in given)  # integers add up to int64
    widest = max(widest, *(a.itemsize for a in args if isinstance(a, torch.dtype)), 0)
    return widest * made, sum(t.numel() for t in given) + made, products


def _same(args: Sequence[Any]) -> tuple[int, int]:
    return args[0].numel(), 0


def _into(args: Sequence[Any]) -> tuple[int, int]:
    return 0, 0


def _cat(args: Sequence[Any]) -> tuple[int, int]:
    return sum(t.numel() for t in args[0]), 0


def _pick(args: Sequence[Any]) -> tuple[int, int]:
    x, axis, index = args
    return x.numel() // max(1, x.shape[axis]) * index.numel(), 0


def _matmul(args: Sequence[Any]) -> tuple[int, int]:
    """Operands whose batches broadcast are repeated before the product."""
    x, y = args
    if x.dtype != torch.float32 or min(x.dim(), y.dim()) < 2:
        raise TypeError("not a common product")
    batch = math.prod(np.broadcast_shapes(x.shape[:-2], y.shape[:-2]))
    (m, k), n = x.shape[-2:], y.shape[-1]
    return batch * (m * n + m * k + k * n), 2 * batch * m * n * k


_FREE = {_aten.resolve_conj.default, _aten.resolve_neg.default, _aten.alias.default}
_POINTWISE = {_aten.__and__.Scalar, _aten.__and__.Tensor, _aten.__or__.Scalar, _aten.__or__.Tensor}  # not tagged so
_RESULTS: dict[Any, Callable[[Sequence[Any]], tuple[int, int]]] = {
    _aten.reshape.default: _same,
    _aten.flatten.using_ints: _same,
    _aten.clone.default: _same,
    _aten.contiguous.default: _same,
    _aten.to.dtype: _same,
    _aten._to_copy.default: _same,
    _aten.softmax.int: _same,
    _aten._softmax.default: _same,
    _aten.sum.dim_IntList: _same,
    _aten.aminmax.default: _same,
    _aten.copy_.default: _into,
    _aten.item.default: _into,
    _aten.cat.default: _cat,
    _aten.index_select.default: _pick,
    _aten.matmul.default: _matmul,
}
