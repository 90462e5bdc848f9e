"""Texts that say the same: exact and near duplicates. Overlap with evaluation sets: contamination.py.

Exact: equal after `normalise`. Near: Jaccard similarity of the sets of word 5-shingles, candidates by MinHash and
locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman, Ullman, ch. 3), each verified on the sets themselves.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distill.errors import ConfigError

SHINGLE, PERMUTATIONS, RECALL = 5, 128, 0.995
U64 = npt.NDArray[np.uint64]

# scripts that put no spaces between words: each character counts as a word
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
# a + is not a -, but a comma may come and go
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s.,;:!?'\"()\u2018\u2019\u201c\u201d]")
_EXCERPT = 160
_KNOWN_WORDS = 1 << 18
_BLOCK = 1 << 13  # shingles hashed at once: 4 MB of uint32
_RECENT = 1 << 16  # band keys kept in a dict before they are sorted into an array


def normalise(text: str) -> str:
    """NFKC, casefold, single spaces: texts that differ in none of it are equal."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def excerpt(text: str) -> str:
    """The beginning of a text on one line, as evidence."""
    line = " ".join(text[: 4 * _EXCERPT].split())
    return line if len(line) <= _EXCERPT else line[: _EXCERPT - 3] + "..."


class Match(NamedTuple):
    """The first text found that is too similar."""

    key: str
    similarity: float


class Sketch(NamedTuple):
    """What is compared of a text: the sorted set of its shingles' hashes, and the keys of its bands."""

    shingles: U64
    bands: U64


class NearDuplicates:
    """An index of texts under keys. Of several matches the one inserted first is reported, so that the verdict on a
    text depends on nothing that comes after it. About 250 bytes a text, and eight a shingle."""

    def __init__(self, threshold: float = 0.8) -> None:
        if not 0 < threshold <= 1:
            raise ConfigError(f"a near-duplicate threshold must be in (0, 1], not {threshold}")
        self.threshold = threshold
        self._rows = rows_of_band(threshold)
        self._keys: list[str] = []
        self._shingles = np.zeros(1024, np.uint64)
        self._ends = np.zeros(256, np.int64)  # one more than texts: text i is shingles[ends[i]:ends[i + 1]]
        self._recent: dict[int, list[int]] = {}
        self._levels: list[tuple[U64, npt.NDArray[np.int64]]] = []  # sorted band keys and their texts

    def __len__(self) -> int:
        return len(self._keys)

    def sketch(self, texts: Sequence[str]) -> list[Sketch]:
        """Sketches of many texts, far quicker than one by one; every method takes one in place of its text."""
        sets = shingle_sets(texts)
        bands = band_keys(signatures(sets), self._rows)
        return [Sketch(shingles, row) for shingles, row in zip(sets, bands, strict=True)]

    def add(self, key: str, text: str | Sketch) -> str | None:
        """The key of a text like this one; None, and this one is inserted, where there is none."""
        sketch = self._sketch(text)
        match = self.find(sketch)
        if match is not None:
            return match.key
        self.insert(key, sketch)
        return None

    def find(self, text: str | Sketch) -> Match | None:
        """The first text inserted whose similarity reaches the threshold."""
        sketch = self._sketch(text)
        candidates = self._candidates(sketch.bands)
        if not candidates.size:
            return None
        sizes = self._ends[candidates + 1] - self._ends[candidates]
        size = len(sketch.shingles)
        small, large = np.minimum(sizes, size), np.maximum(sizes, size)
        mine = set(sketch.shingles.tolist())
        for index in candidates[small >= self.threshold * large - 1e-9].tolist():
            other = self._shingles[self._ends[index] : self._ends[index + 1]].tolist()
            shared = len(mine.intersection(other))
            similarity = shared / (size + len(other) - shared)
            if similarity >= self.threshold:
                return Match(self._keys[index], similarity)
        return None

    def insert(self, key: str, text: str | Sketch) -> None:
        """Put a text into the index, whatever is there."""
        sketch = self._sketch(text)
        index = len(self._keys)
        begin = int(self._ends[index])
        self._shingles = _room(self._shingles, begin + len(sketch.shingles))
        self._ends = _room(self._ends, index + 2)
        self._shingles[begin : begin + len(sketch.shingles)] = sketch.shingles
        self._ends[index + 1] = begin + len(sketch.shingles)
        self._keys.append(key)
        for band in sketch.bands.tolist():
            self._recent.setdefault(band, []).append(index)
        if len(self._recent) >= _RECENT:
            self._settle()

    def _sketch(self, text: str | Sketch) -> Sketch:
        return self.sketch([text])[0] if isinstance(text, str) else text

    def _candidates(self, bands: U64) -> npt.NDArray[np.int64]:
        found = [index for band in bands.tolist() for index in self._recent.get(band, ())]
        for keys, texts in self._levels:
            begins, ends = np.searchsorted(keys, bands), np.searchsorted(keys, bands, side="right")
            for begin, end in zip(begins[begins < ends], ends[begins < ends], strict=True):
                found += texts[begin:end].tolist()
        return np.unique(np.array(found, np.int64))

    def _settle(self) -> None:
        """Move the dict into a sorted array, and merge arrays of like size: few arrays, little copying."""
        keys = np.array([band for band, texts in self._recent.items() for _ in texts], np.uint64)
        texts = np.array([text for texts in self._recent.values() for text in texts], np.int64)
        self._recent = {}
        while self._levels and len(self._levels[-1][0]) <= 2 * len(keys):
            more_keys, more_texts = self._levels.pop()
            keys, texts = np.concatenate([more_keys, keys]), np.concatenate([more_texts, texts])
        order = np.argsort(keys, kind="stable")
        self._levels.append((keys[order], texts[order]))


def rows_of_band(threshold: float) -> int:
    """The most rows a band may have for a pair at the threshold to meet in one with probability RECALL."""
    rows = [r for r in range(1, 33) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= RECALL]
    return max(rows, default=1)


def jaccard(a: str, b: str) -> float:
    """Similarity of two texts: shared shingles over all shingles."""
    one, two = (set(shingles.tolist()) for shingles in shingle_sets([a, b]))
    return len(one & two) / len(one | two)


def shingle_sets(texts: Sequence[str]) -> list[U64]:
    """For each text the sorted hashes of its 5-shingles of words; a shorter text is one shingle."""
    normal = [normalise(text) for text in texts]
    words = [_TOKEN.findall(text) or [text] for text in normal]
    hashes = word_hashes([word for run in words for word in run])
    shingles = grams(hashes, SHINGLE) if len(hashes) >= SHINGLE else hashes[:0]
    out, begin = [], 0
    for run in words:
        end = begin + len(run)
        if len(run) < SHINGLE:
            out.append(grams(hashes[begin:end], len(run)))
        else:
            out.append(np.array(sorted(set(shingles[begin : end - SHINGLE + 1].tolist())), np.uint64))
        begin = end
    return out


def signatures(sets: Sequence[U64]) -> npt.NDArray[np.uint32]:
    """MinHash signatures, (sets, PERMUTATIONS): of each set and permutation the least hash."""
    out = np.empty((len(sets), PERMUTATIONS), np.uint32)
    begin = 0
    while begin < len(sets):
        end, size = begin + 1, len(sets[begin])
        while end < len(sets) and size + len(sets[end]) <= _BLOCK:
            size += len(sets[end])
            end += 1
        values = (np.concatenate(sets[begin:end]) >> np.uint64(32)).astype(np.uint32)
        if end == begin + 1:  # perhaps a long one
            least = [_permuted(values[at : at + _BLOCK]).min(axis=0) for at in range(0, len(values), _BLOCK)]
            out[begin] = np.min(least, axis=0)
        else:
            starts = np.cumsum([0] + [len(item) for item in sets[begin : end - 1]])
            out[begin:end] = np.minimum.reduceat(_permuted(values), starts, axis=0)
        begin = end
    return out


def band_keys(signed: npt.NDArray[np.uint32], rows: int) -> U64:
    """A 64-bit key for each band of each signature, (texts, bands); equal keys mean equal rows."""
    bands = PERMUTATIONS // rows
    cut = signed[:, : bands * rows].reshape(len(signed), bands, rows).astype(np.uint64)
    keys = np.broadcast_to(np.arange(bands, dtype=np.uint64), (len(signed), bands))
    for row in range(rows):
        keys = mix(keys * _ODD[0] + cut[:, :, row])
    return keys


def _permuted(values: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    return values[:, None] * _FACTORS[None, :] + _SHIFTS[None, :]


def grams(words: U64, n: int) -> U64:
    """Hashes of all runs of n words."""
    total = len(words) - n + 1
    out = np.full(total, n, np.uint64)
    for place in range(n):
        out = mix(out * _ODD[0] + words[place : place + total])
    return out


def mix(values: U64) -> U64:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _ODD[1]
    values = (values ^ (values >> np.uint64(27))) * _ODD[2]
    return values ^ (values >> np.uint64(31))


_words: dict[str, int] = {}


def word_hashes(words: Sequence[str]) -> U64:
    """64-bit hashes of words."""
    if len(_words) > _KNOWN_WORDS:
        _words.clear()
    for word in set(words):
        if word not in _words:
            _words[word] = int.from_bytes(
                hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            )
    return np.array([_words[word] for word in words], np.uint64)


def _room(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """The array, at least doubled if it is too small."""
    if size <= len(array):
        return array
    return np.concatenate([array, np.zeros(max(size - len(array), len(array)), array.dtype)])


def _constants() -> tuple[U64, npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    stream = np.frombuffer(hashlib.shake_256(b"distill minhash").digest(8 * PERMUTATIONS), "<u4").astype(np.uint32)
    odd = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
    return odd, stream[:PERMUTATIONS] | np.uint32(1), stream[PERMUTATIONS:]


_ODD, _FACTORS, _SHIFTS = _constants()
