"""The store of distributions: one safetensors file that says what it holds, read by row, checked before use.

    rows      U8          the completions, each as its codec writes it
    offsets   I64 [R+1]   where each begins in `rows`
    tokens    I64 [R+1]   tokens before each
    crc32     U32 [R]     of each completion's bytes
    codebook  U8          of codec compact (distill/data/store/codec.py); else empty

The metadata names schema, codec, alignment, k, temperature, kind, tail, hashes of tokenizer, template and teacher, the
KL between what was given and what is stored, and the CRC32 of index, codebook and of itself.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from distill.artifacts import canonical_json, require_regular
from distill.data.store import bits, codebook, codec
from distill.data.store.codec import Tokens
from distill.data.store.distributions import Distribution, divergence, joined, problem_of
from distill.errors import DatasetError, InputError

SCHEMA = "kd-topk/2"
ALIGNMENT = "row j is the distribution of completion token j given everything before it"
COMPACT, EXACT = codec.NAME, "exact"
"""Codecs: that of codec.py, and one that keeps every number (ids packed, log-probabilities in fp32)."""
CODECS = (COMPACT, EXACT)
MAX_K = 4096
MAX_VOCAB = bits.MAX_NUMBER // 2
_TYPES = {"rows": "U8", "offsets": "I64", "tokens": "I64", "crc32": "U32", "codebook": "U8"}
_TOGETHER = 1024
"""Tokens that are decoded at once for measuring."""
_KL_EDGES = np.geomspace(1e-12, 100, 2801)  # 1.16 % apart


def metadata(
    *,
    tokenizer_sha256: str,
    template_sha256: str,
    teacher: str,
    k: int,
    temperature: float,
    vocab_size: int,
    run_id: str,
    kind: Literal["raw", "processed", "unknown"] = "raw",
    tail: Literal["logsumexp", "log1mexp"] = "logsumexp",
    teacher_sha256: str | None = None,
) -> dict[str, str]:
    """What the caller knows of a store; `Writer.finish` adds the rest."""
    return {
        "schema": SCHEMA, "alignment": ALIGNMENT, "tokenizer_sha256": tokenizer_sha256,
        "template_sha256": template_sha256, "teacher": teacher, "teacher_sha256": teacher_sha256 or "", "k": str(k),
        "temperature": repr(temperature), "kind": kind, "tail": tail, "vocab_size": str(vocab_size), "run_id": run_id,
    }  # fmt: skip


def pack_exact(item: Distribution, vocab_size: int) -> bytes:
    """A completion with every number kept."""
    width = vocab_size.bit_length()
    ids = np.concatenate([item.token_ids[:, None], item.topk_ids], 1).astype(np.int64).ravel()
    packed = bits.pack(np.where(ids < 0, vocab_size, ids), np.full(ids.size, width))
    values = np.concatenate([item.tail_logprob[:, None], item.topk_logprobs], 1).astype("<f4")
    return packed + values.tobytes()


def unpack_exact(data: bytes, n: int, k: int, vocab_size: int) -> Distribution:
    """What `pack_exact` wrote; ValueError where the size is not that of `n` tokens."""
    count, width = n * (k + 1), vocab_size.bit_length()
    head = (count * width + 7) // 8
    if len(data) != head + 4 * count:
        raise ValueError(f"{len(data)} bytes are not those of {n} tokens")
    ids = bits.Stream(data[:head]).fixed(0, width, count).reshape(n, k + 1).astype(np.int32)
    ids[ids == vocab_size] = -1
    values = np.frombuffer(data, "<f4", offset=head).reshape(n, k + 1)
    return Distribution(ids[:, 0], ids[:, 1:], values[:, 1:].copy(), values[:, 0].copy())


class Fidelity:
    """Mean, 99th percentile and maximum of the KL of any number of tokens, in constant memory."""

    def __init__(self) -> None:
        self._n, self._sum, self._max = 0, 0.0, 0.0
        self._bins = np.zeros(len(_KL_EDGES) + 1, np.int64)

    def add(self, kl: NDArray[np.float64]) -> None:
        """Some tokens' KL in nats."""
        if kl.size:
            self._n, self._sum, self._max = (
                self._n + kl.size,
                self._sum + float(kl.sum()),
                max(self._max, float(kl.max())),
            )
            self._bins += np.bincount(np.searchsorted(_KL_EDGES, kl), minlength=self._bins.size)

    def summary(self) -> dict[str, float]:
        """In nats; p99 is the upper edge of its bin, at most 1.2 % above it. Empty of no tokens."""
        if not self._n:
            return {}
        place = int(np.searchsorted(np.cumsum(self._bins), 0.99 * self._n))
        p99 = min(float(_KL_EDGES[min(place, len(_KL_EDGES) - 1)]), self._max)
        return {"mean": _short(self._sum / self._n), "p99": _short(p99), "max": _short(self._max)}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


class Writer:
    """Collects completions in a temporary file beside the target, then encodes them: memory stays at one completion
    and the codebook's sample."""

    def __init__(self, folder: Path, k: int, *, vocab_size: int, codec: str = COMPACT) -> None:
        if codec not in CODECS or not 1 <= k <= MAX_K or not k <= vocab_size <= MAX_VOCAB:
            raise InputError(f"a store cannot have codec {codec!r}, k {k} and a vocabulary of {vocab_size}")
        self.k, self.vocab_size, self.codec, self.tokens = k, vocab_size, codec, 0
        self._short = False
        self._sizes, self._counts = array("q"), array("q")
        self._spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    @property
    def rows(self) -> int:
        """Completions so far."""
        return len(self._counts)

    def add(self, item: Distribution) -> int:
        """Append a completion; returns its row. InputError where it is not one over the vocabulary."""
        n = len(item.token_ids)
        for name in ("topk_ids", "topk_logprobs", "tail_logprob"):
            expected = (n, self.k) if name.startswith("topk") else (n,)
            if getattr(item, name).shape != expected:
                raise InputError(f"{name} has shape {list(getattr(item, name).shape)}, expected {list(expected)}")
        if problem := problem_of(item, self.vocab_size):
            raise InputError(f"not the teacher's distributions: {problem}")
        data = pack_exact(item, self.vocab_size)
        self._spool.write(data)
        self._sizes.append(len(data))
        self._counts.append(n)
        self.tokens += n
        self._short = self._short or bool((item.topk_ids < 0).any())
        return self.rows - 1

    def finish(self, path: Path, metadata: Mapping[str, str]) -> dict[str, float]:
        """Write the store at `path`, a temporary one that the caller renames; returns the KL of given to stored."""
        kl = Fidelity()
        book = self._train() if self.codec == COMPACT else None
        with tempfile.TemporaryFile(dir=path.parent) as body:
            sizes, sums = array("q"), array("L")
            for data in self._encoded(book, kl):
                body.write(data)
                sizes.append(len(data))
                sums.append(zlib.crc32(data))
            body.seek(0)
            index = {
                "offsets": np.cumsum([0, *sizes], dtype="<i8"), "tokens": np.cumsum([0, *self._counts], dtype="<i8"),
                "crc32": np.asarray(sums, "<u4"),
                "codebook": np.frombuffer(book.to_bytes() if book else b"", np.uint8),
            }  # fmt: skip
            described = dict(metadata) | {
                "codec": self.codec, "kl_to_exact": canonical_json(kl.summary()),
                "layout": msgspec.json.encode(book.layout).decode() if book else "",
            }  # fmt: skip
            _write(path, index, body, sum(sizes), _sealed(described, index))
        return kl.summary()

    def _encoded(self, book: codec.Codebook | None, kl: Fidelity) -> Iterator[bytes]:
        """The rows as they are stored; compared with what was given, some at a time."""
        self._spool.seek(0)
        given: list[Distribution] = []
        made: list[tuple[bytes, int]] = []
        costs = book.costs() if book else None
        for row, (size, n) in enumerate(zip(self._sizes, self._counts)):
            data = self._spool.read(size)
            if book is None or costs is None:
                kl.add(np.zeros(n))
            else:
                given.append(unpack_exact(data, n, self.k, self.vocab_size))
                made.append((book.encode(_tokens(given[-1]), costs), n))
                data = made[-1][0]
                if sum(n for _, n in made) >= _TOGETHER or row == self.rows - 1:
                    stored = joined([_distribution(tokens) for tokens in book.decode(made)], self.k)
                    kl.add(divergence(joined(given, self.k), stored))
                    given, made = [], []
            yield data

    def _train(self) -> codec.Codebook:
        stride, parts, at = max(-(-self.tokens * self.k // codebook.SAMPLE), 1), [], 0
        for row, (size, n) in enumerate(zip(self._sizes, self._counts)):
            if row % stride == 0:
                self._spool.seek(at)
                parts.append(unpack_exact(self._spool.read(size), n, self.k, self.vocab_size))
            at += size
        return codebook.train(_tokens(joined(parts, self.k)), self.k, self.vocab_size, short=self._short)

    def close(self) -> None:
        """Drop the temporary file."""
        self._spool.close()


def _tokens(item: Distribution) -> Tokens:
    return Tokens(
        item.token_ids.astype(np.int64), item.topk_ids.astype(np.int64), item.topk_logprobs, item.tail_logprob
    )


def _distribution(tokens: Tokens) -> Distribution:
    return Distribution(tokens.token_ids.astype(np.int32), tokens.ids.astype(np.int32),
                        tokens.logprobs.astype(np.float32), tokens.tail.astype(np.float32))  # fmt: skip


def _sealed(described: Mapping[str, str], index: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """The metadata with the CRC32 of the index, the codebook and itself."""
    sums = {f"{name}_crc32": str(zlib.crc32(index[name].tobytes())) for name in sorted(index)}
    plain = {k: v for k, v in described.items() if not k.endswith("_crc32")} | sums
    return plain | {"metadata_crc32": str(zlib.crc32(canonical_json(plain).encode()))}


def _write(path: Path, index: Mapping[str, NDArray[Any]], body: Any, size: int, described: Mapping[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": dict(described)}
    end = 0
    for name in ("offsets", "tokens", "crc32", "codebook"):  # those of 8 bytes an element first: aligned
        length = index[name].nbytes
        header[name] = {"dtype": _TYPES[name], "shape": list(index[name].shape), "data_offsets": [end, end + length]}
        end += length
    header["rows"] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in ("offsets", "tokens", "crc32", "codebook"):
            out.write(index[name].tobytes())
        shutil.copyfileobj(body, out, 1 << 20)


class TopK:
    """A store opened for reading: memory-mapped, checked before use, safe to read from a hostile file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        require_regular(path)
        try:
            self._file = safe_open(self.path, framework="np")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            if self.metadata.get("schema") != SCHEMA:
                raise DatasetError(f"{path}: schema {self.metadata.get('schema')!r} is not {SCHEMA}")
            index = self._index()
        except (OSError, SafetensorError) as error:
            raise DatasetError(f"cannot read {path}: {error}") from error
        if _sealed(self.metadata, index) != self.metadata:
            raise DatasetError(f"{path}: damaged: the checksums of its index are not those of its metadata")
        self._check(index)

    def _index(self) -> dict[str, NDArray[Any]]:
        if set(self._file.keys()) != set(_TYPES):
            raise DatasetError(f"{self.path}: holds {', '.join(sorted(self._file.keys()))}; not {', '.join(_TYPES)}")
        slices = {name: self._file.get_slice(name) for name in _TYPES}
        for name, kind in _TYPES.items():
            if slices[name].get_dtype() != kind or len(slices[name].get_shape()) != 1:
                raise DatasetError(f"{self.path}: {name} is not a list of {kind}")
        self._rows = slices.pop("rows")
        self._size = self._rows.get_shape()[0]
        return {name: np.asarray(self._file.get_tensor(name)) for name in slices}

    def _check(self, index: Mapping[str, NDArray[Any]]) -> None:
        self._offsets, self._tokens, self._crc32 = index["offsets"], index["tokens"], index["crc32"]
        rows = len(self._crc32)
        if not len(self._offsets) == len(self._tokens) == rows + 1:
            raise DatasetError(f"{self.path}: offsets, tokens and crc32 are not those of {rows} rows")
        for name, values, end in (("offsets", self._offsets, self._size), ("tokens", self._tokens, None)):
            if values[0] != 0 or (np.diff(values) < 0).any() or (end is not None and values[-1] != end):
                raise DatasetError(f"{self.path}: {name} do not rise from 0 to their end")
        if (np.diff(self._tokens) > np.diff(self._offsets)).any():
            raise DatasetError(f"{self.path}: a row claims more tokens than it has bytes")
        self.tokens = int(self._tokens[-1])
        self.k, self.vocab_size = self._whole("k", MAX_K), self._whole("vocab_size", MAX_VOCAB)
        self.codec = self.metadata.get("codec", "")
        if self.codec not in CODECS or self.k > self.vocab_size:
            raise DatasetError(f"{self.path}: codec {self.codec!r}, k {self.k}, vocabulary {self.vocab_size} not known")
        self._book = self._codebook(index["codebook"].tobytes()) if self.codec != EXACT else None
        self._costs: NDArray[np.uint8] | None = None

    def _codebook(self, data: bytes) -> codec.Codebook:
        try:
            layout = msgspec.json.decode(self.metadata.get("layout", ""), type=codec.Layout)
            return codec.from_bytes(data, layout, self.k, self.vocab_size)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise DatasetError(f"{self.path}: {error}") from error

    def _whole(self, name: str, limit: int) -> int:
        text = self.metadata.get(name, "")
        if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= limit):
            raise DatasetError(f"{self.path}: metadata lacks a whole number {name} from 1 to {limit}")
        return int(text)

    def __len__(self) -> int:
        """Number of completions."""
        return len(self._crc32)

    def __getstate__(self) -> str:
        return str(self.path)

    def __setstate__(self, path: str) -> None:
        self.__init__(path)  # type: ignore[misc]

    def __getitem__(self, row: int) -> Distribution:
        """Completion `row`, as copies. DatasetError if it is damaged, or not distributions over the vocabulary."""
        return self.take([row])[0]

    def take(self, rows: Sequence[int]) -> list[Distribution]:
        """Several completions; together they take less time than one by one."""
        pieces = [self._bytes(row) for row in rows]
        try:
            if self._book is None:
                found = [unpack_exact(data, n, self.k, self.vocab_size) for data, n in pieces]
            else:
                found = [_distribution(tokens) for tokens in self._book.decode(pieces)] if pieces else []
        except ValueError as error:
            named = f"row {rows[0]}" if len(rows) == 1 else f"among rows {min(rows)} to {max(rows)}"
            raise DatasetError(f"{self.path}: {named}: {error}") from error
        for row, item in zip(rows, found):
            if problem := problem_of(item, self.vocab_size):
                raise DatasetError(f"{self.path}: row {row}: {problem}")
        return found

    def as_kept(self, item: Distribution) -> Distribution:
        """What the store would give back of a completion: with what its codec loses."""
        if self._book is None:
            return item
        if self._costs is None:
            self._costs = self._book.costs()
        data = self._book.encode(_tokens(item), self._costs)
        return _distribution(self._book.decode([(data, len(item.token_ids))])[0])

    def _bytes(self, row: int) -> tuple[bytes, int]:
        if not 0 <= row < len(self):
            raise DatasetError(f"{self.path}: there is no row {row}; it holds {len(self)}")
        start, stop = int(self._offsets[row]), int(self._offsets[row + 1])
        data = np.asarray(self._rows[start:stop]).tobytes()
        if zlib.crc32(data) != self._crc32[row]:
            raise DatasetError(f"{self.path}: row {row} is damaged: its checksum is another")
        return data, int(self._tokens[row + 1] - self._tokens[row])
