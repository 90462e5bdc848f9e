"""Values at run time: torch tensors. What MIL calls fp16 is held in float32 (rounded by the policy), so every
kernel computes in float32; unsigned 16- and 32-bit integers are held in the next wider signed type, which
torch computes in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distill.errors import PackageError
from distill.mil import dtypes
from distill.mil.program import Value

RUNTIME: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "fp16": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.float32,
    "fp8e4m3fn": torch.float32,
    "fp8e5m2": torch.float32,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "int4": torch.int8,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
    "uint64": torch.int64,
    "uint4": torch.uint8,
    "uint2": torch.uint8,
    "uint1": torch.uint8,
    "uint6": torch.uint8,
    "uint3": torch.uint8,
}
_WRAP = {"uint16": 0xFFFF, "uint32": 0xFFFFFFFF}


def from_numpy(array: np.ndarray, dtype: str) -> Tensor:
    """A runtime tensor of MIL type `dtype`; shares memory where the representation allows."""
    if array.dtype in (np.uint16, np.uint32, np.uint64):
        array = array.astype(np.float64 if RUNTIME[dtype].is_floating_point else np.int64)
    return torch.from_numpy(np.ascontiguousarray(array)).to(RUNTIME[dtype]).reshape(array.shape)


def constant(value: Value) -> Tensor | str | list[Tensor | str]:
    """Decode a constant: a tensor, a Python string, or a list of them."""
    if value.type.dtype in ("list", "tuple"):
        return [constant(item) for item in value.items]  # type: ignore[misc]
    array = value.view()
    if value.type.dtype == dtypes.STRING:
        return str(array) if array.ndim == 0 else [str(item) for item in array.reshape(-1)]
    return from_numpy(array, value.type.dtype)


def to_dtype(x: Tensor, dtype: str) -> Tensor:
    """MIL's cast, without the rounding to fp16 (the policy's business)."""
    name = {"int": "int32", "float": "fp32", "half": "fp16", "double": "fp64"}.get(dtype, dtype)
    if name not in RUNTIME:
        raise ValueError(f"cast to unknown type {dtype!r}")
    wrap = _WRAP.get(name)
    if wrap is not None:
        return (x.long() & wrap).to(RUNTIME[name])
    if x.is_floating_point() and name in ("int8", "uint8", "int16"):
        return x.long().to(RUNTIME[name])  # through an integer: float to a narrow type is undefined in C
    return x.to(RUNTIME[name])


def overlaps(x: Tensor) -> bool:
    """Whether elements of `x` share memory with one another, as those of an expanded tensor do."""
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape) if n > 1):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False


def check_size(shape: Sequence[int]) -> list[int]:
    """`shape`, if an array of it may be allocated."""
    if any(d < 0 for d in shape) or math.prod(shape) > dtypes.MAX_ELEMENTS:
        raise PackageError(f"refusing to allocate shape {list(shape)}")
    return list(shape)
