"""A white-box teacher's distributions over completions, as the student's template renders them: in bulk, resumable.

Records are taken a window at a time, sorted by length and put into padded batches, and all learned turns of a record
come from one forward pass. What a batch gave is appended to a spool file before the next begins, under a hash of its
tokens and of the teacher; started again, a capture goes on with the first batch that the file lacks. Which records
share a batch follows from the records alone, so a capture that was killed ends with the bytes of one that was not.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill import chat
from distill.data.schema import Record
from distill.data.store.distributions import Distribution, capture
from distill.data.store.store import pack_exact, unpack_exact
from distill.errors import InputError
from distill.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from distill.data.teacher.local import WhiteBox

WINDOW = 1024
"""Records that are sorted by length together, and so held in memory."""
BATCH_TOKENS = 1024
"""Tokens of a batch, padding included, unless one sequence alone is longer: measured best on a processor."""
_GPU_BATCHES = 16
"""As many times more on a GPU."""
LOGIT_ROWS = 512
"""Positions whose logits exist at once."""
_FRAME = b"kdsp"
_HEAD = 4 + 32 + 8 + 4


class _Sequence(NamedTuple):
    """A record's tokens up to the last learned one, and where the learned ones are."""

    record: str
    ids: NDArray[np.int32]
    learned: NDArray[np.int64]


def teacher_distributions(
    box: WhiteBox,
    records: Iterable[Record],
    k: int,
    *,
    identity: str = "",
    spool: Path | None = None,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> Iterator[Distribution]:
    """The teacher's distribution of each completion token, a record at a time, in order.

    `records` are read up to WINDOW ahead. `identity` is what the numbers depend on besides the tokens: weights and
    number format. `spool` keeps what was captured; drop it when the result is safe. `on_tokens` hears how many
    tokens each batch gave, those found in the spool included.
    """
    kept = Spool(spool) if spool else None
    room = BATCH_TOKENS * (1 if box.device == "cpu" else _GPU_BATCHES)
    try:
        stream = iter(records)
        while window := list(itertools.islice(stream, WINDOW)):
            found: dict[int, Distribution] = {}
            sequences = [_sequence(record, box) for record in window]
            for batch in _batches([len(s.ids) for s in sequences], room):
                part = [sequences[i] for i in batch]
                found |= zip(batch, _kept_or_captured(box, part, k, identity, kept))
                on_tokens(sum(len(s.learned) for s in part))
            yield from (found[i] for i in range(len(window)))
    finally:
        if kept:
            kept.close()


def _sequence(record: Record, box: WhiteBox) -> _Sequence:
    ids, learned = learned_tokens(box.tokenizer, record.messages, record.tools, record.learned)
    limit = getattr(box.model.config, "max_position_embeddings", None)
    if limit and len(ids) > limit:
        raise InputError(f"record {record.id}: {len(ids)} tokens, the teacher reads {limit}")
    return _Sequence(record.id, ids, learned)


def learned_tokens(
    tokenizer: Tokenizer, messages: Sequence[chat.Message], tools: Sequence[dict[str, Any]], learned: Collection[int]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The conversation's ids up to the last token of a `learned` turn, and the places of all those tokens."""
    encoded = chat.encode(tokenizer, messages, tools, learned=learned)
    places = np.flatnonzero(encoded.target)
    return np.asarray(encoded.ids[: int(places[-1]) + 1], np.int32), places


def _batches(lengths: Sequence[int], room: int) -> Iterator[list[int]]:
    """Indices, longest first so that what does not fit into memory fails at once; each batch is of like lengths."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > room:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _kept_or_captured(
    box: WhiteBox, part: Sequence[_Sequence], k: int, identity: str, spool: Spool | None
) -> list[Distribution]:
    """From the spool where it has them, else from the teacher."""
    vocab = box.tokenizer.vocab_size
    key = _key(part, k, f"{identity}\n{box.tokenizer.sha256}")
    data = spool.get(key) if spool else None
    if data is None:
        made = capture_batch(box, part, k)
        if spool:
            spool.put(key, b"".join(pack_exact(item, vocab) for item in made))
        return made
    sizes = [((n * (k + 1) * vocab.bit_length() + 7) // 8) + 4 * n * (k + 1) for n in (len(s.learned) for s in part)]
    edges = list(itertools.accumulate(sizes, initial=0))
    return [unpack_exact(data[a:b], len(s.learned), k, vocab) for a, b, s in zip(edges, edges[1:], part)]


def _key(part: Sequence[_Sequence], k: int, identity: str) -> bytes:
    digest = hashlib.sha256(f"kd-capture/1\n{k}\n{identity}".encode())
    for s in part:
        digest.update(f"\n{len(s.record.encode())} {len(s.ids)} {len(s.learned)}\n{s.record}".encode())
        digest.update(s.ids.astype("<i4").tobytes() + s.learned.astype("<i8").tobytes())
    return digest.digest()


def capture_batch(box: WhiteBox, part: Sequence[_Sequence], k: int) -> list[Distribution]:
    """Distributions of the learned tokens of some sequences, from one forward pass. They are padded on the right,
    where no causal model looks from a real token."""
    import torch

    width = max(len(s.ids) for s in part)
    ids_BT = torch.full((len(part), width), box.tokenizer.pad, dtype=torch.long)
    mask_BT = torch.zeros((len(part), width), dtype=torch.long)
    for row, s in enumerate(part):
        ids_BT[row, : len(s.ids)] = torch.from_numpy(s.ids.astype(np.int64))
        mask_BT[row, : len(s.ids)] = 1
    # the logits that predict a token stand one place before it
    before_M = torch.from_numpy(np.concatenate([row * width + s.learned - 1 for row, s in enumerate(part)]))
    with torch.inference_mode(), _Head(box.model, before_M.to(box.device)) as head:
        parts = [
            capture(logits_NV[:, : box.tokenizer.vocab_size], k)  # rows beyond it are padding
            for logits_NV in head.logits(ids_BT.to(box.device), mask_BT.to(box.device))
        ]
    arrays = [np.concatenate(list(columns)) for columns in zip(*parts)]
    cuts = np.cumsum([len(s.learned) for s in part])[:-1]
    rows = zip(*(np.split(array, cuts) for array in arrays))
    return [Distribution(s.ids[s.learned], *row) for s, row in zip(part, rows)]


class _Head:
    """Keeps a model from computing logits at any but the wanted positions, and from holding them all at once."""

    def __init__(self, model: Any, positions_M: torch.Tensor) -> None:
        self._model, self._positions_M = model, positions_M
        self._layer = model.get_output_embeddings()
        self._whole = False
        self._hidden_MH: torch.Tensor | None = None

    def __enter__(self) -> _Head:
        self._hook = self._layer.register_forward_pre_hook(self._select)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _select(self, layer: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        self._hidden_MH = given[0].flatten(0, 1)[self._positions_M]
        return (self._hidden_MH[None] if self._whole else self._hidden_MH[None, :1], *given[1:])

    def logits(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> Iterator[torch.Tensor]:
        """[N, V] at a time, of the positions in order."""
        import torch

        first_1V = self._model(ids_BT, attention_mask=mask_BT, use_cache=False).logits[0]
        hidden_MH = self._hidden_MH
        assert hidden_MH is not None
        self._hook.remove()
        if not torch.equal(self._layer(hidden_MH[None, :1])[0], first_1V):
            # the model scales or caps its logits after the layer: let it do so with all of them
            self._whole = True
            self._hook = self._layer.register_forward_pre_hook(self._select)
            yield self._model(ids_BT, attention_mask=mask_BT, use_cache=False).logits[0]
            return
        for chunk_NH in hidden_MH.split(LOGIT_ROWS):
            yield self._layer(chunk_NH)


class Spool:
    """Blocks of bytes under 32-byte keys in a file that only grows. One cut off by a kill or a crash is dropped."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._file: IO[bytes] = os.fdopen(descriptor, "r+b")
        self._places: dict[bytes, tuple[int, int, int]] = {}
        self._end = self._scan(os.fstat(descriptor).st_size)
        self._file.truncate(self._end)

    def _scan(self, size: int) -> int:
        """Index whole blocks; returns where they end."""
        at = 0
        while at + _HEAD <= size:
            self._file.seek(at)
            head = self._file.read(_HEAD)
            length, crc = int.from_bytes(head[36:44], "little"), int.from_bytes(head[44:], "little")
            if head[:4] != _FRAME or length > size - at - _HEAD:
                break
            if at + _HEAD + length == size and zlib.crc32(self._file.read(length)) != crc:
                break  # the last one: a crash may have left its place without its bytes
            self._places[head[4:36]] = (at + _HEAD, length, crc)
            at += _HEAD + length
        return at

    def get(self, key: bytes) -> bytes | None:
        """What was put under `key`; None where it is absent or damaged."""
        if key not in self._places:
            return None
        at, length, crc = self._places[key]
        self._file.seek(at)
        data = self._file.read(length)
        return data if len(data) == length and zlib.crc32(data) == crc else None

    def put(self, key: bytes, data: bytes) -> None:
        """Append a block; it is in the file when this returns."""
        crc = zlib.crc32(data)
        self._file.seek(self._end)
        self._file.write(_FRAME + key + len(data).to_bytes(8, "little") + crc.to_bytes(4, "little") + data)
        self._file.flush()
        self._places[key] = (self._end + _HEAD, len(data), crc)
        self._end += _HEAD + len(data)

    def close(self) -> None:
        """Close the file; it stays."""
        self._file.close()
