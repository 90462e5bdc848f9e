"""Blocks of a dataset under the rules of one record, in this process or in several.

A file is read in blocks that end with a line; each is checked wherever a process is free, and comes back in the file's
order with what was found and a tally for the rules of the whole.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from distill.data import records as kd
from distill.data.episodes import Accepted
from distill.data.journal import JOURNAL
from distill.data.prompts.contamination import ContaminationIndex
from distill.data.prompts.similarity import NearDuplicates
from distill.data.rules import secrets
from distill.data.rules.answers import Answers
from distill.data.rules.files import STORE
from distill.data.rules.header import prices_of, protocol_of
from distill.data.rules.record import RULES
from distill.data.rules.replay import Played
from distill.data.rules.view import Context, View, repeated_key
from distill.data.rules.whole import Tally, near_duplicate
from distill.data.store.distributions import Distribution
from distill.data.store.store import TopK
from distill.errors import DatasetError, DistillError, InputError, describe_os_error
from distill.tokenizer import Tokenizer

MAX_FINDINGS = 1000  # kept in the report; all are counted
BLOCK = 4 << 20
_GROUP = 64  # records whose distributions are in memory at once


class Options(NamedTuple):
    """What is checked, and how."""

    rules: Literal["structural", "all"] = "all"
    pii: Literal["allow", "report", "refuse"] = "report"
    eval_sets: tuple[Path, ...] = ()
    jobs: int = 1


class Done(NamedTuple):
    """A block under the rules of one record. Lines count from 1 within it."""

    lines: int
    found: list[tuple[str, int, str]]
    broken: Counter[str]
    tally: Tally


class _Line(NamedTuple):
    number: int
    record: kd.Record
    raw: bytes


class Checker:
    """What holds blocks against the rules: one in each process."""

    def __init__(self, path: Path, header: kd.Header, options: Options) -> None:
        self._header, self._options = header, options
        self.deep = options.rules == "all"
        self.store: TopK | None = None
        self.answers: Answers | None = None
        self.problems: list[tuple[str, str, str]] = []
        tokenizer = self._open("header", kd.sidecar(path) / "tokenizer.json", Tokenizer.from_file)
        if self.deep:
            self.store = self._open("distributions", kd.sidecar(path) / STORE, TopK)
            if (kd.sidecar(path) / JOURNAL).exists():
                self.answers = self._opened("journal", kd.sidecar(path) / JOURNAL, Answers)
        evaluation = ContaminationIndex.load(options.eval_sets) if self.deep and options.eval_sets else None
        protocol = protocol_of(header) if self.deep else None
        self.context = Context(header, tokenizer, evaluation, prices_of(header), protocol, self.answers, self.store)
        self._sketching = NearDuplicates(near_duplicate(header)) if self.deep else None
        skipped_rules = {"personal_data"} if options.pii == "allow" else set()
        self._rules = [
            (name, rule.check) for name, rule in RULES.items()
            if (rule.structural or self.deep) and name not in skipped_rules
        ]  # fmt: skip

    def _open(self, rule: str, file: Path, opener: Callable[[Path], Any]) -> Any:
        return self._opened(rule, file, opener) if file.name in self._header.files else None

    def _opened(self, rule: str, file: Path, opener: Callable[[Path], Any]) -> Any:
        try:
            return opener(file)
        except InputError as error:
            self.problems.append((rule, file.name, str(error)))
            return None

    def check(self, data: bytes) -> Done:
        """Hold whole lines against the rules."""
        with _uncollected():
            return self._check(data)

    def _check(self, data: bytes) -> Done:
        lines = data.split(b"\n")
        done = Done(len(lines) - (not lines[-1]), [], Counter(), Tally(self._sketching))
        if lines.pop():
            self._note(done, "schema", done.lines, "the line is cut off")
        group: list[_Line] = []
        for number, line in enumerate(lines, 1):
            try:
                group.append(_Line(number, _DECODER.decode(line), line))
            except (msgspec.DecodeError, ValueError, RecursionError) as error:
                self._note(done, "schema", number, _why_no_record(line, error))
            if len(group) == _GROUP:
                self._check_group(group, done)
                group = []
        self._check_group(group, done)
        done.tally.close()
        return done

    def _check_group(self, group: list[_Line], done: Done) -> None:
        if self.store is None:
            stored = {}
        else:
            stored = self._take([line.record.logprobs.row for line in group if line.record.logprobs])
        for line in group:
            try:
                self._check_one(line, stored, done)
            except (ValueError, OverflowError, RecursionError) as error:
                self._note(done, "schema", line.number, f"holds values that cannot be written as JSON again: {error}")

    def _check_one(self, line: _Line, stored: dict[int, Distribution | str], done: Done) -> None:
        record = line.record
        if line.raw.endswith(b"\r"):
            self._note(done, "schema", line.number, "the line ends with a carriage return")
        if self.deep and _ENCODER.encode(record) != line.raw and repeated_key(line.raw):
            self._note(done, "schema", line.number, "gives a key twice")
        view = View(record, self.context, stored.get(record.logprobs.row) if record.logprobs else None, line.raw)
        done.tally.see(record, view.tools, line.number)
        for name, check in self._rules:
            for what in check(view):
                self._note(done, name, line.number, what)
        if self.answers is not None and isinstance(view.played, Played) and isinstance(view.played.end, Accepted):
            done.tally.hear(view.played.end.replies)

    def _take(self, rows: list[int]) -> dict[int, Distribution | str]:
        if self.store is None or not rows:
            return {}
        try:
            return dict(zip(rows, self.store.take(rows)))
        except InputError:
            return {row: self._one(self.store, row) for row in rows}

    @staticmethod
    def _one(store: TopK, row: int) -> Distribution | str:
        try:
            return store[row]
        except InputError as error:
            return str(error).removeprefix(f"{store.path}: ")

    @staticmethod
    def _note(done: Done, rule: str, line: int, what: str) -> None:
        done.broken[rule] += 1
        if done.broken[rule] <= MAX_FINDINGS:
            done.found.append((rule, line, withheld(what)))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No search for cycles: records have none, and looking at each of them takes as long as reading them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


_DECODER = msgspec.json.Decoder(kd.Record)
_ENCODER = msgspec.json.Encoder(decimal_format="number")
_TOO_LONG = b'"too long"'  # stands for a line that is not kept


def _why_no_record(line: bytes, error: Exception) -> str:
    if not line.strip():
        return "the line is blank"
    return f"the line is longer than {kd.MAX_LINE >> 20} MiB" if line == _TOO_LONG else str(error)


def withheld(what: str) -> str:
    """A finding as it may be shown: a message that quotes a secret or personal data is not."""
    if secrets.secret_in(what) or secrets.personal_in(what):
        return "withheld, for it quotes what looks like a secret or personal data"
    return what


def stream(path: Path, header: kd.Header, options: Options, checker: Checker, digest: Any) -> Iterator[Done]:
    """Every block under the rules, in the file's order; `digest` hears the file's bytes."""
    if options.jobs <= 1:
        for block in _blocks(path, digest):
            yield checker.check(block)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, _start, (path, header, options)) as pool:
        try:
            yield from _in_order(pool, _blocks(path, digest), 2 * options.jobs)
        except BrokenProcessPool as error:
            raise DistillError(f"{path}: a process that was checking it has died; try fewer --jobs") from error


def _in_order(pool: Executor, blocks: Iterator[bytes], ahead: int) -> Iterator[Done]:
    waiting: deque[Future[Done]] = deque()
    for block in blocks:
        waiting.append(pool.submit(_check, block))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_checker: Checker | None = None


def _start(path: Path, header: kd.Header, options: Options) -> None:
    global _checker
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _checker = Checker(path, header, options)


def _check(block: bytes) -> Done:
    assert _checker is not None
    return _checker.check(block)


def _blocks(path: Path, digest: Any) -> Iterator[bytes]:
    """The file in pieces that end with a line. Of a line that is absurdly long, only that it was there is kept."""
    rest, skipping = b"", False
    try:
        with open(path, "rb") as file:
            while data := file.read(BLOCK):
                digest.update(data)
                if skipping:
                    _, newline, data = data.partition(b"\n")
                    if not newline:
                        continue
                    yield _TOO_LONG + b"\n"
                    skipping = False
                end = data.rfind(b"\n") + 1
                if end:
                    yield rest + data[:end]
                    rest = b""
                rest += data[end:]
                if len(rest) > kd.MAX_LINE:
                    rest, skipping = b"", True
    except OSError as error:
        raise DatasetError(f"cannot read dataset {describe_os_error(error, path)}") from error
    if rest or skipping:
        yield _TOO_LONG if skipping else rest
