"""The teacher's next-token distributions, top k and the mass that remains, in one safetensors file.

Row j of a completion is the teacher's distribution OF completion token j given everything before it, so row 0
belongs to the first token after the prompt and the last row to the token that ends the turn.

Shapes: R completions, N tokens of all of them, k kept entries, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from distill.artifacts import require_regular
from distill.errors import DatasetError, InputError

if TYPE_CHECKING:
    import torch

SCHEMA = "kd-topk/1"
ALIGNMENT = "row j is the distribution of completion token j given everything before it"
SUM_TOLERANCE = {"F32": 1e-3, "F16": 2e-3}
"""How far the kept probabilities may sum above 1: rounding each log-probability to fp16 costs up to 1e-3 more."""
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
}  # fmt: skip


class Distribution(NamedTuple):
    """One completion: its token ids [n], the kept ids [n, k] and log-probabilities [n, k], and the tail [n]."""

    token_ids: NDArray[np.int32]
    topk_ids: NDArray[np.int32]
    topk_logprobs: NDArray[Any]
    tail_logprob: NDArray[np.float32]


class TopEntries(NamedTuple):
    """What `capture` keeps of [n, V] logits."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail: NDArray[np.float32]


def capture(logits_NV: torch.Tensor | NDArray[Any], k: int, *, temperature: float = 1.0) -> TopEntries:
    """The k most probable entries of each row, sorted, and the log of the mass of all the others.

    The tail is a logsumexp over the complement, never 1 minus a sum: it stays exact when it is 1e-12. It is -inf
    only where nothing remains (k = V).
    """
    import torch

    logits = torch.as_tensor(logits_NV)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if not 1 <= k <= logits.shape[-1]:
        raise InputError(f"k = {k} does not fit a vocabulary of {logits.shape[-1]}")
    logits = logits / temperature if temperature != 1.0 else logits
    total_N1 = logits.logsumexp(-1, keepdim=True)
    top, ids = logits.topk(k, dim=-1)
    tail_N1 = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True) - total_N1
    return TopEntries(
        ids.to(torch.int32).cpu().numpy(),
        (top - total_N1).clamp(max=0).float().cpu().numpy(),
        tail_N1.squeeze(-1).clamp(max=0).float().cpu().numpy(),
    )


class Writer:
    """Collects completions in temporary files beside the target, so that memory stays at one completion."""

    def __init__(self, folder: Path, k: int, *, dtype: str = "F32") -> None:
        self.k, self.dtype, self.rows, self.tokens = k, dtype, 0, 0
        self._kinds = {"token_ids": "I32", "topk_ids": "I32", "tail_logprob": "F32", "topk_logprobs": dtype}
        self._files: dict[str, IO[bytes]] = {}
        self._offsets = [0]
        for name in self._kinds:
            self._files[name] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def add(self, item: Distribution) -> int:
        """Append a completion; returns its row."""
        n = len(item.token_ids)
        for name, kind in self._kinds.items():
            array = getattr(item, name)
            expected = (n, self.k) if name.startswith("topk") else (n,)
            if array.shape != expected:
                raise InputError(f"{name} has shape {list(array.shape)}, expected {list(expected)}")
            self._files[name].write(np.ascontiguousarray(array, dtype=_DTYPES[kind]).tobytes())
        self.tokens += n
        self.rows += 1
        self._offsets.append(self.tokens)
        return self.rows - 1

    def finish(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the safetensors file. `path` is a temporary one: the caller renames it."""
        offsets = np.asarray(self._offsets, dtype="<i8").tobytes()
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        header["offsets"] = {"dtype": "I64", "shape": [self.rows + 1], "data_offsets": [0, len(offsets)]}
        end = len(offsets)
        for name, kind in self._kinds.items():
            shape = [self.tokens, self.k] if name.startswith("topk") else [self.tokens]
            size = int(np.prod(shape)) * _DTYPES[kind].itemsize
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text + offsets)
            for file in self._files.values():
                file.seek(0)
                shutil.copyfileobj(file, out, 1 << 20)

    def close(self) -> None:
        """Drop the temporary files."""
        for file in self._files.values():
            file.close()


class TopK:
    """A store opened for reading: memory-mapped, checked before use, safe to read from a hostile file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        require_regular(path)
        try:
            self._open()
        except (OSError, SafetensorError) as error:
            raise DatasetError(f"cannot read {path}: {error}") from error
        self._check_layout()

    def _open(self) -> None:
        self._file = safe_open(self.path, framework="np")
        self.metadata: dict[str, str] = self._file.metadata() or {}
        names = set(self._file.keys())
        missing = {"offsets", "token_ids", "topk_ids", "topk_logprobs", "tail_logprob"} - names
        if missing:
            raise DatasetError(f"{self.path}: lacks {', '.join(sorted(missing))}")
        self._slices = {name: self._file.get_slice(name) for name in names}
        self._shapes = {name: tuple(part.get_shape()) for name, part in self._slices.items()}
        self.dtype = self._slices["topk_logprobs"].get_dtype()

    def _check_layout(self) -> None:
        types = {name: part.get_dtype() for name, part in self._slices.items()}
        if self.metadata.get("schema") != SCHEMA:
            raise DatasetError(f"{self.path}: schema {self.metadata.get('schema')!r} is not {SCHEMA}")
        wanted = {"offsets": "I64", "token_ids": "I32", "topk_ids": "I32", "tail_logprob": "F32"}
        wrong = [f"{name} is {types[name]}, not {kind}" for name, kind in wanted.items() if types[name] != kind]
        if self.dtype not in SUM_TOLERANCE:
            wrong.append(f"topk_logprobs is {self.dtype}, not F32 or F16")
        shapes = self._shapes
        if len(shapes["topk_ids"]) != 2 or len(shapes["offsets"]) != 1 or shapes["offsets"][0] < 1:
            wrong.append("topk_ids must have two axes and offsets at least one entry")
        else:
            n, k = shapes["topk_ids"]
            expected = {"token_ids": (n,), "tail_logprob": (n,), "topk_logprobs": (n, k)}
            wrong += [f"{a} has shape {shapes[a]}, not {b}" for a, b in expected.items() if shapes[a] != b]
        if wrong:
            raise DatasetError(f"{self.path}: {'; '.join(wrong)}")
        self.tokens, self.k = shapes["topk_ids"]
        self._offsets = self._file.get_tensor("offsets")
        if self._offsets[0] != 0 or self._offsets[-1] != self.tokens or (np.diff(self._offsets) < 0).any():
            raise DatasetError(f"{self.path}: offsets do not rise from 0 to {self.tokens}")
        self.vocab_size = self._metadata_int("vocab_size")
        if self._metadata_int("k") != self.k:
            raise DatasetError(f"{self.path}: k is {self.metadata['k']} in the metadata, {self.k} in the arrays")

    def _metadata_int(self, name: str) -> int:
        try:
            return int(self.metadata[name])
        except (KeyError, ValueError) as error:
            raise DatasetError(f"{self.path}: metadata lacks a whole number {name}") from error

    def __len__(self) -> int:
        """Number of completions."""
        return len(self._offsets) - 1

    def __getstate__(self) -> str:
        return str(self.path)

    def __setstate__(self, path: str) -> None:
        self.__init__(path)  # type: ignore[misc]

    def __getitem__(self, row: int) -> Distribution:
        """Completion `row`, as copies. DatasetError if its numbers are not distributions over the vocabulary."""
        if not 0 <= row < len(self):
            raise DatasetError(f"{self.path}: there is no row {row}; it holds {len(self)}")
        start, stop = int(self._offsets[row]), int(self._offsets[row + 1])
        names = ("token_ids", "topk_ids", "topk_logprobs", "tail_logprob")
        item = Distribution(*(np.asarray(self._slices[name][start:stop]) for name in names))
        if problem := problem_of(item, self.vocab_size, SUM_TOLERANCE[self.dtype]):
            raise DatasetError(f"{self.path}: row {row}: {problem}")
        return item


def problem_of(item: Distribution, vocab_size: int, tolerance: float = 1e-3) -> str | None:
    """Why `item` is not a list of distributions over `vocab_size` tokens; None if it is."""
    for name in ("token_ids", "topk_ids"):
        ids = getattr(item, name)
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            return f"{name} holds an id outside 0..{vocab_size - 1}"
    logprobs = item.topk_logprobs.astype(np.float32)
    if not (logprobs <= 0).all() or not (item.tail_logprob <= 0).all():  # a NaN fails this too
        return "a log-probability is NaN or above 0"
    if (np.diff(logprobs, axis=1) > 0).any():
        return "topk_logprobs is not sorted in descending order"
    ordered = np.sort(item.topk_ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        return "topk_ids holds one id twice"
    total = np.exp(logprobs).sum(1, dtype=np.float64) + np.exp(item.tail_logprob)
    if total.size and abs(total - 1).max() > tolerance:
        worst = total[abs(total - 1).argmax()]
        return f"kept probabilities and tail sum to {worst:.6f}, not to 1 within {tolerance}"
    return None


def metadata(
    *,
    tokenizer_sha256: str,
    template_sha256: str,
    teacher: str,
    k: int,
    temperature: float,
    vocab_size: int,
    run_id: str,
) -> dict[str, str]:
    """The store's description of itself."""
    return {
        "schema": SCHEMA,
        "alignment": ALIGNMENT,
        "tokenizer_sha256": tokenizer_sha256,
        "template_sha256": template_sha256,
        "teacher": teacher,
        "k": str(k),
        "temperature": repr(temperature),
        "vocab_size": str(vocab_size),
        "run_id": run_id,
    }


def full_logprobs(item: Distribution, vocab_size: int) -> NDArray[np.float64]:
    """[n, V] log-probabilities with the tail spread evenly over the entries that were not kept: for small V."""
    rest = max(vocab_size - item.topk_ids.shape[1], 1)
    out = np.repeat((item.tail_logprob.astype(np.float64) - np.log(rest))[:, None], vocab_size, 1)
    np.put_along_axis(out, item.topk_ids.astype(np.int64), item.topk_logprobs.astype(np.float64), 1)
    return out


def same_tokens(item: Distribution, ids: Sequence[int]) -> bool:
    """Whether the completion's tokens are exactly `ids`."""
    return len(item.token_ids) == len(ids) and bool((item.token_ids == np.asarray(ids)).all())
