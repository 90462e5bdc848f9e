"""Results of a run as files: `OUT.jsonl` with an episode a line, `OUT.jsonl.d/` with what made it and, while it goes
on, the journal.

An episode is written to the journal as soon as it is over, so a kill loses at most those under way. A line holds the
transcript, from which all else follows, and for people and other programs also what followed from it: calls, results,
final answer, score. Reading a line back, only the transcript is believed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from distill.artifacts import atomic_file, read_json, require_regular, write_json
from distill.errors import DatasetError, InputError, describe_os_error
from distill.evaluate.episode import Episode
from distill.evaluate.items import Item
from distill.evaluate.scoring import Score
from distill.evaluate.transcripts import Transcript
from distill.jsonlines import MAX_LINE, read_lines


class RunHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a run is: equal headers may share a journal; those that differ in `shard` alone may be merged."""

    schema: str = "eval-run/1"
    model: dict[str, Any]
    """Model.identity()."""
    inputs: dict[str, Any]
    """Files that were read, each with its sha256 (artifacts.provenance)."""
    files: dict[str, str]
    """sha256 of the set's files."""
    broker: str
    limits: dict[str, int]
    seed: int
    items: int | None = None
    """The first so many of the set, of each kind in turn; None: all."""
    shard: tuple[int, int] = (1, 1)

    def whole(self) -> dict[str, Any]:
        """What all shards of a run share."""
        return {name: value for name, value in msgspec.to_builtins(self).items() if name != "shard"}


class Line(msgspec.Struct, frozen=True):
    """What is read back of a line of results; the rest of it is computed anew."""

    item: str
    transcript: Transcript


def folder(out: str | Path) -> Path:
    """Beside the results: header and journal."""
    return Path(f"{out}.d")


class Journal:
    """The episodes of a run that are over, appended to a file that a kill leaves whole but for its last line."""

    def __init__(self, out: Path, header: RunHeader, *, restart: bool = False) -> None:
        """InputError where another run is there, or one is at work."""
        self._folder = folder(out)
        self.path = self._folder / "journal.jsonl"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"cannot write {describe_os_error(error, self._folder)}") from error
        try:
            self.transcripts = self._begin(out, header, restart)
            self._file = open(self.path, "ab")  # noqa: SIM115 - open as long as the run
        except BaseException:
            os.close(self._lock)
            raise

    def _begin(self, out: Path, header: RunHeader, restart: bool) -> dict[str, Transcript]:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{out}: another evaluation is writing it") from error
        before = self._folder / "run.json"
        now = msgspec.json.decode(msgspec.json.encode(header))  # as it is read back: tuples are lists
        require_regular(self.path)
        if restart:
            self.path.unlink(missing_ok=True)
        elif before.is_file() and self.path.is_file() and (known := read_json(before)) != now:
            known = known if isinstance(known, dict) else {}
            changed = [name for name, value in now.items() if known.get(name) != value]
            raise InputError(f"{out}: holds an unfinished evaluation of something else ({', '.join(changed)} differ): "
                             "finish it, write elsewhere, or --restart")  # fmt: skip
        write_json(before, now)
        return {line.item: line.transcript for line in _whole_lines(self.path)}

    def add(self, transcript: Transcript) -> None:
        """An episode that is over, on the disk when this returns."""
        self.transcripts[transcript.item] = transcript
        line = msgspec.json.encode({"item": transcript.item, "transcript": transcript}) + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {describe_os_error(error)}") from error

    def close(self, *, written: bool) -> None:
        """Let others write; once the results are written the journal is needed no more."""
        self._file.close()
        if written:
            self.path.unlink(missing_ok=True)
        os.close(self._lock)


def _whole_lines(path: Path) -> Iterator[Line]:
    """The lines of a journal; what a kill left of the last one is cut off."""
    if not path.is_file():
        return
    good = 0
    with open(path, "rb+") as file:
        for line in iter(lambda: file.readline(MAX_LINE + 1), b""):
            try:
                found = msgspec.json.decode(line, type=Line) if line.endswith(b"\n") else None
            except (msgspec.DecodeError, RecursionError):
                found = None
            if found is None:
                if file.read(1):
                    raise DatasetError(f"{path}: damaged before its last line: --restart to evaluate anew")
                file.truncate(good)
                return
            good += len(line)
            yield found


def write(out: Path, header: RunHeader, episodes: Iterable[tuple[Transcript, Episode, Score | None]]) -> None:
    """Write results, in the order of the items' ids, and what made them."""
    ordered = sorted(episodes, key=lambda made: made[0].item)
    with atomic_file(out) as temporary, open(temporary, "wb") as file:
        for transcript, episode, score in ordered:
            file.write(msgspec.json.encode(_line(transcript, episode, score)) + b"\n")
    folder(out).mkdir(parents=True, exist_ok=True)
    write_json(folder(out) / "run.json", msgspec.to_builtins(header))


def _line(transcript: Transcript, episode: Episode, score: Score | None) -> dict[str, Any]:
    return {
        "item": transcript.item, "kind": episode.item.kind, "end": episode.end, "final": episode.final,
        "calls": [
            {"turn": number, "name": made.call.name if made.call else None, "raw": made.raw, "problem": made.problem,
             "status": made.outcome.status if made.outcome else None,
             "result": made.outcome.content if made.outcome else None}
            for number, turn in enumerate(episode.turns) for made in turn.calls
        ],
        "score": score, "transcript": transcript,
    }  # fmt: skip


def read(out: Path, items: Mapping[str, Item]) -> tuple[RunHeader, dict[str, Transcript]]:
    """A run's header and transcripts; DatasetError where they are malformed, or of another set."""
    where = folder(out) / "run.json"
    try:
        header = msgspec.convert(read_json(where), RunHeader)
    except (msgspec.ValidationError, ValueError) as error:
        raise DatasetError(f"{where}: not the header of a run: {error}") from error
    found: dict[str, Transcript] = {}
    for number, text in read_lines(out):
        try:
            line = msgspec.json.decode(text, type=Line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise DatasetError(f"{out}:{number}: not a result: {error}") from error
        if line.item not in items or line.transcript.item != line.item:
            raise DatasetError(f"{out}:{number}: the set has no item {line.item[:80]!r}")
        if line.item in found:
            raise DatasetError(f"{out}:{number}: the item {line.item[:80]!r} is there twice")
        found[line.item] = line.transcript
    return header, found
