"""The journal of a run: an append-only file, fsynced before an answer counts as received."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import IO

import msgspec

from distill.data.teachers import Answer
from distill.errors import DatasetError, InputError, describe_os_error


class Entry(msgspec.Struct, frozen=True):
    """One request's outcome. Times stay here: they are not part of the dataset."""

    key: str
    answer: Answer
    at: float


class Journal:
    """Answers by the key of their request. What a kill cut off in mid-line is dropped when it is opened again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers: dict[str, Answer] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = open(path, "ab+")  # noqa: SIM115
            self._load()
        except OSError as error:
            raise InputError(f"cannot open journal {describe_os_error(error, path)}") from error

    def _load(self) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                entry = msgspec.json.decode(line, type=Entry)
            except (msgspec.DecodeError, RecursionError) as error:
                raise DatasetError(f"{self.path}:{number}: {error}") from error
            self._answers.setdefault(entry.key, entry.answer)
        self._file.truncate(whole)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        """The answer to a request, if it was received."""
        return self._answers.get(key)

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer; it is on disk when this returns."""
        line = msgspec.json.encode(Entry(key, answer, time.time())) + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(f"cannot write journal {describe_os_error(error, self.path)}") from error
        self._answers[key] = answer

    def close(self) -> None:
        """Close the file."""
        self._file.close()
