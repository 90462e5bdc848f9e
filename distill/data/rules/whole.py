"""Rules over a whole dataset, from what is kept of each record: 64-bit digests, counts, sums and lengths.

A `Tally` of each block of lines is made wherever the block is read; the tallies are put together in the file's order.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from distill.data.prompts.similarity import NearDuplicates, Sketch
from distill.data.schema import Header, Record
from distill.data.tally import Tally as Facts
from distill.data.teacher.wire import Reply

NEAR_DUPLICATE = 0.8
SPREAD = 4.0
"""An outlier's length is so many times the interquartile range (of log lengths) outside the quartiles."""
_LEAST_SPREAD = math.log(2)
_SCRIPTS = (
    ("Latin", 0x41, 0x24F), ("Greek", 0x370, 0x3FF), ("Cyrillic", 0x400, 0x52F), ("Hebrew", 0x590, 0x5FF),
    ("Arabic", 0x600, 0x77F), ("Devanagari", 0x900, 0x97F), ("Thai", 0xE00, 0xE7F), ("Kana", 0x3040, 0x30FF),
    ("Han", 0x4E00, 0x9FFF), ("Hangul", 0xAC00, 0xD7AF),
)  # fmt: skip


_FINEST = Decimal("1e-15")
_EXACT = Context(prec=24, traps=[InvalidOperation, Inexact])


class Tally:
    """What is kept of the records of a block."""

    def __init__(self, sketching: NearDuplicates | None = None) -> None:
        """`sketching`: where prompts are compared; with it, what report.json says of the records is kept too."""
        self.lines: list[int] = []
        self.ids: list[str] = []
        self.digests: list[bytes] = []
        """Of each record: its id, its conversation, its question."""
        self.val: list[bool] = []
        self.rows: list[int] = []
        """-1 for none."""
        self.lengths: list[int] = []
        self.strata: Counter[str] = Counter()
        self.cost: Decimal | None = None
        self.foreign: list[int] = []
        """Lines whose answer is in another script than the question."""
        self.sketches: list[Sketch] = []
        self.facts = Facts() if sketching is not None else None
        """What report.json says of them."""
        self.models: set[str] = set()
        """What the journal's answers call their model, and their system fingerprints."""
        self.system_fingerprints: set[str] = set()
        self._sketching, self._prompts = sketching, list[str]()

    def see(self, record: Record, tools: bytes, line: int) -> None:
        """Keep what the rules need of a record; `tools` are its own as JSON."""
        answer = hashlib.sha256(tools)
        answer.update(msgspec.json.encode(record.context))
        asked = answer.digest()[:8]
        answer.update(record.teacher_text.encode("utf-8", "surrogatepass"))
        named = id_digest(record.id)
        self.digests.append(named + answer.digest()[:8] + asked)
        self.lines.append(line)
        self.ids.append(record.id)
        self.val.append(record.split == "val")
        self.rows.append(record.logprobs.row if record.logprobs else -1)
        self.lengths.append(len(record.teacher_text))
        self.strata[record.stratum] += 1
        if record.cost_usd is not None and is_cost(record.cost_usd):
            self.cost = (self.cost or Decimal()) + record.cost_usd
        if self._sketching is not None and self.facts is not None:
            self.facts.add(record)
            # as distill/data/prompts/stream.py compares prompts
            self._prompts.append("\n".join(turn.content for turn in record.messages if turn.role == "user"))
            if not (record.teacher_text.isascii() and record.prompt.isascii()) and _foreign(record):
                self.foreign.append(line)

    def hear(self, replies: Iterable[Reply]) -> None:
        """Keep who a record's answers say they are from."""
        for reply in replies:
            self.models |= {reply.model} - {""}
            self.system_fingerprints |= {reply.system_fingerprint} - {""}

    def shift(self, lines: int) -> None:
        """Count lines from the beginning of the file, of which so many come before."""
        self.lines = [line + lines for line in self.lines]
        self.foreign = [line + lines for line in self.foreign]

    def close(self) -> Tally:
        """Sketch the prompts, all at once; the tally can then go to another process."""
        if self._sketching is not None:
            self.sketches = self._sketching.sketch(self._prompts)
        self._sketching, self._prompts = None, []
        return self


def id_digest(identity: str) -> bytes:
    """What is kept of an id."""
    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()[:8]


def is_cost(cost: Decimal) -> bool:
    """Whether an amount is one: finite, not negative, below a billion, and so exact that sums of it are."""
    try:
        return cost.is_finite() and 0 <= cost < 10**9 and _EXACT.quantize(cost, _FINEST) == cost
    except ArithmeticError:  # more digits
        return False


class Clash(NamedTuple):
    """A rule broken at a line."""

    rule: str
    line: int
    what: str


class Whole:
    """The rules over all records."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._lines: list[NDArray[np.int64]] = []
        self._digests: list[NDArray[np.uint64]] = []
        self._val: list[NDArray[np.bool_]] = []
        self._rows: list[NDArray[np.int64]] = []
        self._lengths: list[NDArray[np.int64]] = []
        self._near = {split: NearDuplicates(near_duplicate(header)) for split in (False, True)}
        self._prompts = hashlib.sha256()
        self._foreign: list[int] = []
        self.facts: Facts | None = None
        """What report.json says of the records; None where nobody counted."""
        self.models: set[str] = set()
        self.system_fingerprints: set[str] = set()
        self.strata: Counter[str] = Counter()
        self.cost: Decimal | None = None

    def add(self, tally: Tally) -> Iterator[Clash]:
        """Take in the next block; yields what is too like an earlier record of the other split."""
        if not tally.lines:
            return
        self._prompts.update((("\n" if self._lines else "") + "\n".join(tally.ids)).encode("utf-8", "surrogatepass"))
        self._lines.append(np.array(tally.lines))
        self._digests.append(np.frombuffer(b"".join(tally.digests), "<u8").reshape(-1, 3))
        self._val.append(np.array(tally.val))
        self._rows.append(np.array(tally.rows))
        self._lengths.append(np.array(tally.lengths))
        self._foreign += tally.foreign
        if tally.facts is not None:
            self.facts = self.facts or Facts()
            self.facts.merge(tally.facts)
        self.models |= tally.models
        self.system_fingerprints |= tally.system_fingerprints
        self.strata += tally.strata
        if tally.cost is not None:
            self.cost = (self.cost or Decimal()) + tally.cost
        for line, val, sketch in zip(tally.lines, tally.val, tally.sketches):
            if (match := self._near[not val].find(sketch)) is not None:
                alike = f"its prompt is {match.similarity:.2f} alike that of line {match.key}, in the other split"
                yield Clash("near_duplicates", line, alike)
            self._near[val].insert(str(line), sketch)

    @property
    def counts(self) -> dict[str, int]:
        """Records, and those of each split."""
        val = sum(int(part.sum()) for part in self._val)
        total = sum(self.strata.values())
        return {"records": total, "train": total - val, "val": val}

    @property
    def prompts_sha256(self) -> str:
        """Of all ids, as the header states it."""
        return self._prompts.hexdigest()

    @property
    def tools_sha256(self) -> str | None:
        """Of all tools offered, as the header states it."""
        return self.facts.tools_sha256 if self.facts is not None else None

    @property
    def without_rows(self) -> int:
        """Records that have no distributions."""
        return sum(int((part < 0).sum()) for part in self._rows)

    def unused(self, rows: int) -> Iterator[str]:
        """Rows of a store of so many that no record names."""
        named = np.unique(np.concatenate(self._rows)) if self._rows else np.empty(0, np.int64)
        missing = np.setdiff1d(np.arange(rows), named)
        if missing.size:
            yield f"no record names {missing.size} of its {rows} rows; the first is row {missing[0]}"

    @property
    def id_digests(self) -> NDArray[np.uint64]:
        """Of each record's id, in order, as `id_digest` makes it."""
        return np.concatenate(self._digests)[:, 0] if self._digests else np.empty(0, np.uint64)

    @property
    def lines(self) -> NDArray[np.int64]:
        """Of each record, in order, its line."""
        return np.concatenate(self._lines) if self._lines else np.empty(0, np.int64)

    def finish(self) -> Iterator[Clash]:
        """What is wrong with the records taken together."""
        if not self._lines:
            return
        lines, digests = np.concatenate(self._lines), np.concatenate(self._digests)
        val, rows = np.concatenate(self._val), np.concatenate(self._rows)
        for again, first in _repeats(digests[:, 0]):
            yield Clash("ids", int(lines[again]), f"its id is that of line {lines[first]}")
        for again, first in _repeats(digests[:, 1]):
            yield Clash("duplicates", int(lines[again]), f"the same conversation as line {lines[first]}")
        for again, first in _repeats(digests[:, 2]):
            if val[again] != val[first]:
                what = f"its question is that of line {lines[first]}, in the other split"
                yield Clash("near_duplicates", int(lines[again]), what)
        used = np.flatnonzero(rows >= 0)
        for again, first in _repeats(rows[used]):
            what = f"row {rows[used[again]]} is that of line {lines[used[first]]}"
            yield Clash("distributions", int(lines[used[again]]), what)
        for place in np.flatnonzero(np.diff(rows[used]) < 0)[:1]:
            yield Clash("distributions", int(lines[used[place + 1]]), "its row stands before that of the record before")

    def among(self, rejects: Iterable[str]) -> Iterator[Clash]:
        """Records whose id is also that of a reject."""
        theirs = np.frombuffer(b"".join(map(id_digest, rejects)), "<u8")
        for place in np.flatnonzero(np.isin(self.id_digests, theirs)):
            yield Clash("ids", int(self.lines[place]), "its id is that of a reject, too")

    def quota_problems(self) -> Iterator[str]:
        """Strata with more or fewer records than the header wants."""
        quotas, tolerance = self._header.quotas, self._header.quota_tolerance
        for name, wanted in quotas.items():
            if not wanted * (1 - tolerance) <= (n := self.strata[name]) <= wanted:
                yield f"stratum {name}: {n} records, {wanted} wanted (tolerance {tolerance:.0%} below)"
        if quotas:
            for name in sorted(set(self.strata) - set(quotas)):
                yield f"stratum {name} has no quota and {self.strata[name]} records"

    def outliers(self) -> Iterator[Clash]:
        """Answers of unusual length, or in another script than the question: worth a look, never an error."""
        for line in self._foreign:
            yield Clash("outliers", line, "answers in another script than it is asked in")
        if sum(self.strata.values()) < 20:
            return
        lines = np.concatenate(self._lines)
        logs = np.log(np.maximum(np.concatenate(self._lengths), 1))
        low, high = np.quantile(logs, (0.25, 0.75))
        room = SPREAD * max(high - low, _LEAST_SPREAD)
        for at in np.flatnonzero((logs < low - room) | (logs > high + room)):
            yield Clash("outliers", int(lines[at]), f"an answer of {np.exp(logs[at]):.0f} characters")


def near_duplicate(header: Header) -> float:
    """The similarity from which two prompts count as one: the header's where it states one that can be."""
    stated = header.near_duplicates
    return stated if stated is not None and 0 < stated <= 1 else NEAR_DUPLICATE


def _repeats(values: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """(place, first place) of each value that occurred before, in order."""
    _, first, which = np.unique(values, return_index=True, return_inverse=True)
    for place in np.flatnonzero(first[which] != np.arange(len(values))):
        yield int(place), int(first[which[place]])


def _foreign(record: Record) -> bool:
    answer = _script(record.messages[-1].content)
    return answer is not None and answer not in {
        _script(turn.content) for turn in record.context if turn.role == "user"
    }


def _script(text: str) -> str | None:
    """The script of most of a text's letters; Han and Kana are one. None of fewer than 20 letters."""
    found: Counter[str] = Counter()
    for character, n in Counter(text).items():
        if character.isalpha():
            point = ord(character)
            found[next((name for name, low, high in _SCRIPTS if low <= point <= high), "other")] += n
    found["Han"] += found.pop("Kana", 0)
    return found.most_common(1)[0][0] if found.total() >= 20 else None
