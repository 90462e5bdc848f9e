"""Overlap of texts with evaluation sets, with its evidence.

A text is contaminated that shares a run of 13 words with an item, of 8 where either has fewer than 13; below 8 words
only the whole text counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distill.artifacts import sha256_file
from distill.data.prompts.similarity import U64, WORD, excerpt, grams, normalise, word_hashes
from distill.errors import DatasetError
from distill.jsonlines import decode_object, read_lines

LONG_GRAM, SHORT_GRAM = 13, 8


class Hit(NamedTuple):
    """A run of words that a text shares with an item of an evaluation set."""

    set: str
    item: str
    ngram: str
    excerpt: str
    """The item's beginning."""


def labels_of(paths: Iterable[str | Path]) -> list[str]:
    """What evaluation sets are called: their files' names, or their paths where two have one name."""
    files = [Path(path) for path in paths]
    names = [file.name for file in files]
    return [file.name if names.count(file.name) == 1 else str(file) for file in files]


class ContaminationIndex:
    """Evaluation sets by the hashes of their word runs. Of their texts it keeps the beginnings, as evidence."""

    def __init__(self, items: Mapping[str, Iterable[tuple[str, str]]] | None = None) -> None:
        """`items`: for each set its (item, text) pairs."""
        self.sha256s: dict[str, str] = {}
        self._items: list[tuple[str, str, str]] = []  # set, item, excerpt
        # word runs of items that are long enough for 13; 8-word runs of the others, and of these; whole short items
        runs: dict[str, list[tuple[U64, int]]] = {"long": [], "short": [], "all": [], "whole": []}
        for name, pairs in (items or {}).items():
            for item, text in pairs:
                self._enter(runs, name, item, text)
        self._tables = {kind: _table(found) for kind, found in runs.items()}

    @classmethod
    def load(cls, paths: Iterable[str | Path]) -> ContaminationIndex:
        """Read evaluation sets: kd/1 and contextual sets, JSONL with prompt, messages, question or text, or plain
        text with an item a line. DatasetError names file and line."""
        files = [Path(path) for path in paths]
        labels = labels_of(files)
        index = cls({label: evaluation_items(file) for label, file in zip(labels, files, strict=True)})
        index.sha256s = {label: sha256_file(file) for label, file in zip(labels, files, strict=True)}
        return index

    def __len__(self) -> int:
        return len(self._items)

    def hits(self, text: str, limit: int = 5) -> list[Hit]:
        """At most `limit` runs of the text that are in an evaluation set, one for each item."""
        words = WORD.findall(normalise(_body(text))) if self._items else []
        if not words:
            return []
        hashes = word_hashes(words)
        if len(words) >= LONG_GRAM:
            looks = (("long", LONG_GRAM), ("short", SHORT_GRAM))
        else:
            looks = (("all", SHORT_GRAM), ("whole", len(words)))
        found: dict[int, Hit] = {}
        for kind, n in looks:
            if n > len(words):
                continue
            keys, owners = self._tables[kind]
            runs = grams(hashes, n)
            at = np.searchsorted(keys, runs)
            inside = np.flatnonzero(at < len(keys))
            for place in inside[keys[at[inside]] == runs[inside]].tolist():
                owner = int(owners[at[place]])
                if owner not in found and len(found) < limit:
                    name, item, beginning = self._items[owner]
                    found[owner] = Hit(name, item, " ".join(words[place : place + n]), beginning)
        return list(found.values())

    def _enter(self, runs: dict[str, list[tuple[U64, int]]], name: str, item: str, text: str) -> None:
        words = WORD.findall(normalise(_body(text)))
        if not words:
            return
        hashes, owner = word_hashes(words), len(self._items)
        self._items.append((name, item, excerpt(_body(text))))
        if len(words) >= LONG_GRAM:
            runs["long"].append((grams(hashes, LONG_GRAM), owner))
        elif len(words) >= SHORT_GRAM:
            runs["short"].append((grams(hashes, SHORT_GRAM), owner))
        if len(words) >= SHORT_GRAM:
            runs["all"].append((grams(hashes, SHORT_GRAM), owner))
        else:
            runs["whole"].append((grams(hashes, len(words)), owner))


def evaluation_items(path: str | Path) -> Iterator[tuple[str, str]]:
    """(item, text) of each question in an evaluation set; the item is its id, or its line."""
    plain = Path(path).suffix not in (".jsonl", ".json", ".ndjson")
    for number, line in read_lines(path):
        if plain:
            yield f"line {number}", line.decode()
            continue
        row = decode_object(line, f"{path}:{number}")
        if row.get("__header__"):
            continue
        texts = [text for field in ("prompt", "question", "text", "messages") for text in _said(row.get(field))]
        if not texts:
            raise DatasetError(f"{path}:{number}: an item has a prompt, messages, question or text, and this has none")
        identity = row.get("id")
        label = str(identity)[:200] if isinstance(identity, str | int) and str(identity) else f"line {number}"
        for text in dict.fromkeys(texts):
            yield label, text


def _said(value: object, depth: int = 0) -> list[str]:
    """What users say in a field: a text, a message, or lists of them."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, list) and depth < 4:
        return [text for item in value for text in _said(item, depth + 1)]
    if isinstance(value, dict) and value.get("role") == "user":
        return _said(value.get("content"), depth + 1)
    return []


def _body(text: str) -> str:
    """Without the first line where it is the header of a contextual set, the same in every prompt of a tier."""
    return text.partition("\n")[2] if text.startswith('{"caws"') else text


def _table(runs: list[tuple[U64, int]]) -> tuple[U64, npt.NDArray[np.int64]]:
    """Sorted hashes and their items; of equal hashes the first item's."""
    if not runs:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    keys = np.concatenate([run for run, _ in runs])
    owners = np.concatenate([np.full(len(run), owner) for run, owner in runs])
    keys, first = np.unique(keys, return_index=True)
    return keys, owners[first]
