"""weight.bin: constants stored beside the program (MILBlob/Blob/StorageFormat.hpp).

Header of 64 bytes: u32 count, u32 version = 2. Each blob: a 64-byte record (u32 sentinel, u32 dtype, u64 size
in bytes, u64 absolute data offset, u64 padding in bits), then its data. The program's offset points at the
record.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill.errors import PackageError
from distill.mil import dtypes

_HEADER = struct.Struct("<II")
_RECORD = struct.Struct("<IIQQQ")
_RECORD_BYTES = 64
_SENTINEL = 0xDEADBEEF


class BlobRecord(NamedTuple):
    """Where one blob's data lies; checked against the file's bounds."""

    offset: int  # of the record: what a program's BlobFileValue holds
    dtype: str
    data_offset: int
    size: int  # bytes


class BlobReader:
    """One weight file, mapped into memory; every offset and size is checked before it is used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = path.stat().st_size
                # Copy-on-write, so that torch can wrap the pages without a warning; nothing ever writes to
                # them.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if self.size else None
        except OSError as error:
            raise PackageError(f"{path}: cannot read weights: {error.strerror or error}") from error
        if self._map is None or self.size < _RECORD_BYTES:
            raise PackageError(f"{path}: {self.size} bytes is no weight file (the header alone is 64)")
        self.count, self.version = _HEADER.unpack_from(self._map, 0)
        if self.version != 2:
            raise PackageError(f"{path}: weight file version is {self.version}, expected 2")

    def record(self, offset: int) -> BlobRecord:
        """The metadata record at `offset`."""
        assert self._map is not None
        if offset % _RECORD_BYTES or not _RECORD_BYTES <= offset <= self.size - _RECORD_BYTES:
            raise PackageError(f"{self.path}: blob offset {offset} is not a record in a file of {self.size} bytes")
        sentinel, code, size, data, _padding = _RECORD.unpack_from(self._map, offset)
        if sentinel != _SENTINEL:
            raise PackageError(f"{self.path}: no blob record at offset {offset} (sentinel is {sentinel:#x})")
        if code not in dtypes.BY_BLOB:
            raise PackageError(f"{self.path}: blob at offset {offset} has unknown data type {code}")
        if data < offset + _RECORD_BYTES or data > self.size or size > self.size - data:
            raise PackageError(
                f"{self.path}: blob at offset {offset} claims {size} bytes from {data}, "
                f"but the file has {self.size} bytes"
            )
        return BlobRecord(offset, dtypes.BY_BLOB[code], data, size)

    def check(self, offset: int, dtype: str, count: int) -> None:
        """Raise unless the blob at `offset` holds exactly `count` elements of `dtype`."""
        record = self.record(offset)
        if record.dtype != dtype:
            raise PackageError(
                f"{self.path}: blob at offset {offset} holds {record.dtype}, but the program declares {dtype}"
            )
        expected = dtypes.packed_size(dtype, count)
        if record.size != expected:
            raise PackageError(
                f"{self.path}: blob at offset {offset} has {record.size} bytes, "
                f"but {count} elements of {dtype} take {expected}"
            )

    def read(self, offset: int, dtype: str, count: int) -> np.ndarray:
        """The blob's elements, flat. Whole-byte types are a view of the mapped file."""
        self.check(offset, dtype, count)
        record = self.record(offset)
        assert self._map is not None
        raw = np.frombuffer(self._map, dtype=np.uint8, count=record.size, offset=record.data_offset)
        return dtypes.unpack(dtype, raw, count)
