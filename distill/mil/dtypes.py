"""MIL data types: names, widths, and the numpy arrays that hold them.

Sub-byte integers live one element to a byte; bf16 and fp8 have no numpy type and are widened to float32
(exact).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# No tensor of a package may declare more elements than this; a hostile shape is refused before anything is
# allocated.
MAX_ELEMENTS = 2**32


class DType(NamedTuple):
    """One MIL data type: bits per stored element, the numpy type that holds it, and its number in
    MIL.proto.
    """

    name: str
    bits: int
    numpy: np.dtype
    proto: int
    blob: int | None  # the type's number in weight.bin (MILBlob/Blob/BlobDataType.hpp)


def _table() -> dict[str, DType]:
    rows = [
        ("bool", 8, "?", 1, None),
        ("fp16", 16, "<f2", 10, 1),
        ("fp32", 32, "<f4", 11, 2),
        ("fp64", 64, "<f8", 12, None),
        ("bf16", 16, "<f4", 13, 5),
        ("int8", 8, "i1", 21, 4),
        ("int16", 16, "<i2", 22, 6),
        ("int32", 32, "<i4", 23, 14),
        ("int64", 64, "<i8", 24, None),
        ("int4", 4, "i1", 25, 8),
        ("uint8", 8, "u1", 31, 3),
        ("uint16", 16, "<u2", 32, 7),
        ("uint32", 32, "<u4", 33, 15),
        ("uint64", 64, "<u8", 34, None),
        ("uint4", 4, "u1", 35, 11),
        ("uint2", 2, "u1", 36, 10),
        ("uint1", 1, "u1", 37, 9),
        ("uint6", 6, "u1", 38, 13),
        ("uint3", 3, "u1", 39, 12),
        ("fp8e4m3fn", 8, "<f4", 40, 16),
        ("fp8e5m2", 8, "<f4", 41, 17),
    ]
    return {n: DType(n, bits, np.dtype(numpy), proto, blob) for n, bits, numpy, proto, blob in rows}


DTYPES = _table()
STRING = "string"
BY_PROTO = {d.proto: d.name for d in DTYPES.values()} | {2: STRING}
BY_BLOB = {d.blob: d.name for d in DTYPES.values() if d.blob is not None}
FLOATS = frozenset({"fp16", "fp32", "fp64", "bf16", "fp8e4m3fn", "fp8e5m2"})


def packed_size(dtype: str, count: int) -> int:
    """Bytes that `count` elements take on disk: sub-byte elements are packed without gaps."""
    return (count * DTYPES[dtype].bits + 7) // 8


def unpacks(dtype: str) -> bool:
    """Whether `unpack` makes a copy."""
    return DTYPES[dtype].bits < 8 or dtype in _WIDEN


def unpack(dtype: str, raw: np.ndarray, count: int) -> np.ndarray:
    """Turn `raw` (uint8, exactly `packed_size` bytes) into `count` elements; whole-byte types stay a view."""
    kind = DTYPES[dtype]
    if kind.bits < 8:
        return _unpack_bits(raw, kind.bits, count, signed=dtype.startswith("int"))
    if dtype in _WIDEN:
        return _WIDEN[dtype](raw)
    return raw.view(kind.numpy)


def _unpack_bits(raw: np.ndarray, bits: int, count: int, signed: bool) -> np.ndarray:
    """Low bits first; an element may straddle two bytes: 3 and 6 bits are read by words of three bytes."""
    words = raw if 8 % bits == 0 else _words_of_three(raw)
    values = np.empty((len(words), (8 if words is raw else 24) // bits), np.uint8)
    for i in range(values.shape[1]):
        part = words >> i * bits
        part &= 2**bits - 1
        values[:, i] = part
    flat = values.reshape(-1)[:count]
    if not signed:
        return flat
    half = 1 << (bits - 1)
    flat ^= np.uint8(half)
    integers = flat.view(np.int8)
    integers -= np.int8(half)
    return integers


def _words_of_three(raw: np.ndarray) -> np.ndarray:
    """Each three bytes as one little-endian integer; zeros fill the last."""
    lanes = np.zeros((-(-len(raw) // 3), 4), np.uint8)
    whole = len(raw) // 3
    lanes[:whole, :3] = raw[: 3 * whole].reshape(whole, 3)
    lanes[whole:, : len(raw) % 3] = raw[3 * whole :]
    return lanes.view("<u4").reshape(-1)


def _bf16(raw: np.ndarray) -> np.ndarray:
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _fp8(raw: np.ndarray, exponent_bits: int, finite: bool) -> np.ndarray:
    """E4M3FN has no infinity and one NaN pattern; E5M2 follows IEEE. Decoded through a table of all 256
    patterns.
    """
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent = (codes >> mantissa_bits) & (2**exponent_bits - 1)
    fraction = (codes & (2**mantissa_bits - 1)) / 2**mantissa_bits
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    if finite:
        value = np.where(codes & 0x7F == 0x7F, np.nan, value)
    else:
        value = np.where(exponent == 2**exponent_bits - 1, np.where(fraction == 0, np.inf, np.nan), value)
    return (sign * value).astype(np.float32)[raw]


_WIDEN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bf16": _bf16,
    "fp8e4m3fn": lambda raw: _fp8(raw, 4, finite=True),
    "fp8e5m2": lambda raw: _fp8(raw, 5, finite=False),
}
