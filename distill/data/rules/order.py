"""The prompts of the mix asked again: records and rejects stand in their order, and none is missing.

A generated set is what the journal's answers make of a mix's prompts, one after another, until each stratum has its
quota. The prompts are a function of the header's configuration and of the code that made them; those from files are
not looked for, since a header may name any file.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from distill.artifacts import code_version, sha256_file
from distill.data.budget import dollars
from distill.data.build import USED_UP, examples_of
from distill.data.episodes import Accepted, Protocol, Rejected, episode, replay
from distill.data.generation import most_asked
from distill.data.journal import Answer
from distill.data.prompts.stream import Prompt, PromptStream, open_prompts
from distill.data.rules.answers import Answers
from distill.data.rules.files import Reject
from distill.data.rules.header import capabilities_of, mix_of, prices_of, protocol_of
from distill.data.rules.report import Prompts
from distill.data.rules.whole import Whole, id_digest
from distill.data.schema import Header, Usage
from distill.errors import InputError

_UNANSWERED = 200  # prompts in a row, and the journal has no more
_FURTHER = 2_000  # prompts beyond four for each record and reject, and what is not found is not of the mix


_UNREAD = ("http", "malformed", "unanswered")  # ends of which no answer says what it used


class Found(NamedTuple):
    """A problem: the line of a record, or None of a reject or the whole."""

    line: int | None
    what: str


class Unknown(Exception):
    """Why the prompts cannot be made again."""


def prompts_of(header: Header) -> PromptStream:
    """The prompts of a header's configuration, from their beginning."""
    mix, can, protocol = mix_of(header), capabilities_of(header), protocol_of(header)
    if not header.teacher.asked:
        raise Unknown(f"a {header.teacher.kind} set: no prompts were drawn from a mix")
    if isinstance(mix, str) or can is None or protocol is None:
        raise Unknown("the header does not say what was asked: see `header`")
    if mix.sources or mix.tools or mix.fixtures:
        raise Unknown("the mix has prompts or tools from files")
    if sum(header.quotas.values()) != header.config["total"]:
        raise Unknown("the quotas do not sum to the total: see `header`")
    for name in mix.decontaminate:
        if not Path(name).is_file() or sha256_file(name) not in header.decontamination.values():
            raise Unknown(f"the evaluation set {Path(name).name} is not where it was")
    room = mix.context - protocol.sampling.max_tokens if header.teacher.kind == "gguf" else None
    try:
        return open_prompts(mix, header.config["seed"], tools=can.tools, room=room)
    except InputError as error:
        raise Unknown(f"the prompts cannot be made again: {error}") from error


def order_problems(
    header: Header, whole: Whole, rejects: Sequence[Reject], answers: Answers | None, stated: Prompts | None
) -> Iterator[Found]:
    """Records and rejects out of the order of the prompts; what was asked, or answered by the journal, that is
    neither; and what the report says otherwise of prompts that were not asked. Unknown where that cannot be known."""
    stream = prompts_of(header)
    same_code = header.created_by.get("code") == code_version()
    if (quotas := stream.quotas(header.config["total"])) != header.quotas:
        if not same_code:
            raise Unknown("made by other code, whose prompts are others")
        wrong = sorted(name for name in {*quotas, *header.quotas} if quotas.get(name) != header.quotas.get(name))
        yield Found(None, f"quotas are not those of the configuration: {', '.join(wrong)[:200]}")
    ids = [bytes(digest) for digest in whole.id_digests.view("V8")] if len(whole.id_digests) else []
    given = [id_digest(reject.id) for reject in rejects]
    walk = _Walk(header, set(ids) | set(given), {reject.id: reject for reject in rejects}, answers, stream)
    short = stated.short if stated is not None and same_code else {}
    places = walk.places(set(ids), {name for name, why in short.items() if USED_UP in why})
    missing = [n for n, digest in enumerate(ids) if digest not in places]
    if missing and not same_code:
        raise Unknown("made by other code, whose prompts are others")
    for n in missing:
        yield Found(int(whole.lines[n]), "its prompt is not one of the mix's")
    for n in _out_of_order([places.get(digest) for digest in ids]):
        yield Found(int(whole.lines[n]), "its prompt comes before that of the record above it")
    for n, digest in enumerate(given):
        if digest not in places:
            yield Found(None, f"the prompt of reject {n + 1} is not one of the mix's")
    for n in _out_of_order([places.get(digest) for digest in given]):
        yield Found(None, f"the prompt of reject {n + 1} comes before that of the one above it")
    for what in walk.problems:
        yield Found(None, what)
    if same_code and stated is not None:
        for what in walk.missed(stated.stopped) if answers is None else ():
            yield Found(None, what)
        yield from _report_problems(walk, stated, len(missing))


def _report_problems(walk: _Walk, stated: Prompts, missing: int) -> Iterator[Found]:
    """Where the prompts were drawn to their end, what was dropped on the way is known."""
    if stated.left_out != walk.left_out:
        yield Found(None, "report.json: its left_out is not what the mix leaves out")
    if walk.dropped is None or missing or stated.stopped:
        return
    if (stated.prompts_dropped, stated.dropped_examples) != walk.dropped:
        yield Found(None, "report.json: the dropped prompts are not those of the mix")


def _dropped(stream: PromptStream) -> tuple[dict[str, int], list[dict[str, str]]]:
    """What report.json says of prompts dropped so far."""
    return {f"{name}: {reason}": n for (name, reason), n in sorted(stream.drops.items())}, examples_of(stream.dropped)


def _out_of_order(places: Sequence[int | None]) -> Iterator[int]:
    before = -1
    for n, place in enumerate(places):
        if place is None:
            continue
        if place < before:
            yield n
        before = place


class _Walk:
    """The prompts up to the last that is in the set, and what the journal says of those that are no records."""

    def __init__(self, header: Header, wanted: set[bytes], rejects: dict[str, Reject], answers: Answers | None,
                 stream: PromptStream) -> None:  # fmt: skip
        self._header, self._wanted, self._rejects = header, wanted, rejects
        self._answers, self._stream = answers, stream
        self._accepted, self._asked = Counter[str](), Counter[str]()
        self._prices = prices_of(header)
        self._open, self._passed = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
        self.left_out = stream.left_out
        self.dropped: tuple[dict[str, int], list[dict[str, str]]] | None = None
        """What was dropped up to the last prompt that is in the set, as report.json says it; None if it is not found"""
        self.problems: list[str] = []

    def places(self, records: set[bytes], used_up: set[str]) -> dict[bytes, int]:
        """Of each id that is found, its place among the prompts. Strata said to be `used_up` are drawn to their end."""
        protocol, found, unanswered = protocol_of(self._header), dict[bytes, int](), 0
        limit = 4 * len(self._wanted) + _FURTHER
        for place in range(limit):
            if len(found) == len(self._wanted) and used_up <= self._stream.exhausted:
                if self.dropped is None:
                    self.dropped = _dropped(self._stream)
                if self._answers is None or unanswered > _UNANSWERED:
                    break
            if self._full() or (prompt := next(self._stream, None)) is None:
                break
            digest, name = id_digest(prompt.id), prompt.stratum
            if digest in self._wanted:
                found[digest], unanswered = place, 0
                self._passed[name] += self._open.pop(name, [])
            if digest in records:
                self._accepted[name] += 1
                self._asked[name] += 1
            elif self._answers is None:
                self._asked[name] += digest in self._wanted
                if digest not in self._wanted and self._wants(name):
                    self._open[name].append(prompt.id)
            elif protocol is not None and self._wants(name):
                answered = self._look(prompt, protocol, self._answers)
                self._asked[name] += answered
                unanswered += not answered
        for name in used_up & self._open.keys():
            self._passed[name] += self._open[name]
        return found

    def missed(self, stopped: set[str]) -> Iterator[str]:
        """Prompts that must have been asked and are neither record nor reject; where the run stopped early, some may
        have been in flight."""
        for name, ids in self._passed.items():
            if ids and name not in stopped:
                yield f"stratum {name}: a prompt that must have been asked is no record and no reject: {ids[0]}"

    def _wants(self, stratum: str) -> bool:
        """Whether the builder would have looked at another prompt of a stratum."""
        quota = self._header.quotas.get(stratum, 0)
        return self._accepted[stratum] < quota and self._asked[stratum] < most_asked(quota)

    def _full(self) -> bool:
        return not any(map(self._wants, self._header.quotas))

    def _look(self, prompt: Prompt, protocol: Protocol, answers: Answers) -> bool:
        """What became of a prompt that is no record; whether it was answered."""
        stated = self._rejects.get(prompt.id)
        asked: list[bytes] = []

        def answer(key: bytes) -> Answer | None:
            asked.append(key)
            return answers.answer(key)

        end = replay(episode(prompt, protocol, self._stream.broker), answer)
        if isinstance(end, Accepted):
            self.problems.append(f"the journal has a record for {prompt.id}, and the set has none")
        elif isinstance(end, Rejected) and stated is None:
            self.problems.append(f"the journal has a reject for {prompt.id} ({end.reason}), and the list has none")
        elif stated is not None and (not isinstance(end, Rejected) or not self._equal(stated, end, prompt)):
            self.problems.append(f"reject {prompt.id} is not what the journal's answers make of it")
        elif isinstance(end, Rejected) and end.reason not in _UNREAD and not self._settled(end, asked, answers):
            self.problems.append(f"the ledger settled something else for reject {prompt.id} than its answers used")
        return isinstance(end, Accepted | Rejected)

    def _settled(self, end: Rejected, asked: Sequence[bytes], answers: Answers) -> bool:
        """Whether the ledger has what a reject's answers used, at the configuration's prices."""
        paid = [found for found in map(answers.paid, asked) if found is not None]
        used = [found for found in paid if found.usage is not None]
        cost = None if self._prices is None else sum(map(self._prices.cost, end.usages))
        return (
            len(paid) == len(asked)
            and sum((found.usage for found in used if found.usage), Usage()) == sum(end.usages, Usage())
            and cost in (None, sum(found.cost or 0 for found in used))
        )

    def _equal(self, stated: Reject, end: Rejected, prompt: Prompt) -> bool:
        cost = None if self._prices is None else dollars(sum(map(self._prices.cost, end.usages)))
        first = end.detail.partition(":")[0]  # all that is kept of a server's own words
        known = stated.detail == end.detail or (end.reason in ("http", "unanswered") and stated.detail == first)
        made = (prompt.stratum, end.reason, cost)
        return known and (stated.stratum, stated.reason, stated.cost_usd) == made
