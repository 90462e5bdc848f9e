"""The prompts of the mix asked again: records and rejects stand in their order, and none is missing.

A generated set is what the journal's answers make of a mix's prompts, one after another, until each stratum has its
quota. The prompts are a function of the header's configuration and of the code that made them; those from files are
not looked for, since a header may name any file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from distill.artifacts import code_version, sha256_file
from distill.data.budget import dollars
from distill.data.episodes import Accepted, Protocol, Rejected, episode, replay
from distill.data.generation import most_asked
from distill.data.prompts.stream import Prompt, PromptStream, open_prompts
from distill.data.rules.answers import Answers
from distill.data.rules.files import Reject
from distill.data.rules.header import capabilities_of, mix_of, prices_of, protocol_of
from distill.data.rules.whole import Whole, id_digest
from distill.data.schema import Header
from distill.errors import InputError

_LONGEST = 1_000_000  # tokens of a prompt: longer ones are not made for a header's sake
_UNANSWERED = 200  # prompts in a row, and the journal has no more
_FURTHER = 2_000  # prompts beyond four for each record and reject, and what is not found is not of the mix


class Found(NamedTuple):
    """A problem: the line of a record, or None of a reject or the whole."""

    line: int | None
    what: str


class Unknown(Exception):
    """Why the prompts cannot be made again."""


def prompts_of(header: Header) -> PromptStream:
    """The prompts of a header's configuration, from their beginning."""
    mix, can, protocol = mix_of(header), capabilities_of(header), protocol_of(header)
    if header.teacher.kind == "toy":
        raise Unknown("a toy set: no prompts were drawn from a mix")
    if isinstance(mix, str) or can is None or protocol is None:
        raise Unknown("the header does not say what was asked: see `header`")
    if mix.sources or mix.tools or mix.fixtures:
        raise Unknown("the mix has prompts or tools from files")
    if mix.long_context_tokens > _LONGEST:
        raise Unknown(f"prompts of more than {_LONGEST} tokens")
    for name in mix.decontaminate:
        if not Path(name).is_file() or sha256_file(name) not in header.decontamination.values():
            raise Unknown(f"the evaluation set {Path(name).name} is not where it was")
    room = mix.context - protocol.sampling.max_tokens if header.teacher.kind == "gguf" else None
    try:
        return open_prompts(mix, header.config["seed"], tools=can.tools, room=room)
    except InputError as error:
        raise Unknown(f"the prompts cannot be made again: {error}") from error


def order_problems(header: Header, whole: Whole, rejects: Sequence[Reject], answers: Answers | None) -> Iterator[Found]:
    """Records and rejects out of the order of the prompts, and what the journal answered that is neither. Unknown where
    that cannot be known."""
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
    places = walk.places(set(ids))
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
        self.problems: list[str] = []

    def places(self, records: set[bytes]) -> dict[bytes, int]:
        """Of each id that is found, its place among the prompts."""
        protocol, found, unanswered = protocol_of(self._header), dict[bytes, int](), 0
        limit = 4 * len(self._wanted) + _FURTHER
        for place, prompt in enumerate(self._stream):
            done = len(found) == len(self._wanted) and (self._answers is None or unanswered > _UNANSWERED)
            if done or place == limit or self._full():
                break
            digest = id_digest(prompt.id)
            if digest in self._wanted:
                found[digest], unanswered = place, 0
            if digest in records:
                self._accepted[prompt.stratum] += 1
                self._asked[prompt.stratum] += 1
            elif self._answers is not None and protocol is not None and self._wants(prompt.stratum):
                answered = self._look(prompt, protocol, self._answers)
                self._asked[prompt.stratum] += answered
                unanswered += not answered
        return found

    def _wants(self, stratum: str) -> bool:
        """Whether the builder would have looked at another prompt of a stratum."""
        quota = self._header.quotas.get(stratum, 0)
        return self._accepted[stratum] < quota and self._asked[stratum] < most_asked(quota)

    def _full(self) -> bool:
        return not any(map(self._wants, self._header.quotas))

    def _look(self, prompt: Prompt, protocol: Protocol, answers: Answers) -> bool:
        """What became of a prompt that is no record; whether it was answered."""
        stated = self._rejects.get(prompt.id)
        end = replay(episode(prompt, protocol, self._stream.broker), answers.answer)
        if isinstance(end, Accepted):
            self.problems.append(f"the journal has a record for {prompt.id}, and the set has none")
        elif isinstance(end, Rejected) and stated is None:
            self.problems.append(f"the journal has a reject for {prompt.id} ({end.reason}), and the list has none")
        elif stated is not None and (not isinstance(end, Rejected) or not self._equal(stated, end)):
            self.problems.append(f"reject {prompt.id} is not what the journal's answers make of it")
        return isinstance(end, Accepted | Rejected)

    def _equal(self, stated: Reject, end: Rejected) -> bool:
        cost = None if self._prices is None else dollars(sum(map(self._prices.cost, end.usages)))
        first = end.detail.partition(":")[0]  # all that is kept of a server's own words
        known = stated.detail == end.detail or (end.reason in ("http", "unanswered") and stated.detail == first)
        return known and (stated.reason, stated.cost_usd) == (end.reason, cost)
