"""The prompts of a mix: built-in strata and files, interleaved by weight, without duplicates, in one order for ever.

The order is a function of the mix and the seed alone, so a longer run begins with the prompts of a shorter one.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, Protocol

from distill.broker import Broker, Tool, read_fixtures, read_tools
from distill.data.prompts.contamination import ContaminationIndex
from distill.data.prompts.similarity import NearDuplicates, Sketch, excerpt
from distill.data.prompts.sources import Source, SourceConfig
from distill.data.prompts.strata import TOOL_STRATA, WEIGHTS, Prompt, built_in, capacity
from distill.data.prompts.tool_material import BY_NAME, TOOLS
from distill.errors import ConfigError, InputError

__all__ = [
    "STRATA",
    "WEIGHTS",
    "Dropped",
    "MixFiles",
    "Prompt",
    "PromptStream",
    "SourceConfig",
    "named",
    "open_prompts",
    "read_files",
]

STRATA = tuple(WEIGHTS)
MAX_DROPPED = 10_000  # drops kept with their evidence; all are counted
_TOO_LONG = 200  # in a row, and a stratum is given up
_CHUNK, _CHUNK_CHARACTERS = 128, 1 << 17  # of a stratum drawn ahead: hashing many at once is quick


class Mix(Protocol):
    """The keys of a mix that say which prompts are asked (distill/data/mix_config.py)."""

    @property
    def strata(self) -> Mapping[str, float]: ...
    @property
    def sources(self) -> Sequence[SourceConfig]: ...
    @property
    def tools(self) -> Sequence[str]: ...
    @property
    def fixtures(self) -> Sequence[str]: ...
    @property
    def long_context_tokens(self) -> int: ...
    @property
    def near_duplicates(self) -> float: ...
    @property
    def decontaminate(self) -> Sequence[str]: ...


class Dropped(NamedTuple):
    """A prompt that is not asked, and why."""

    id: str
    stratum: str
    reason: str
    """duplicate, near_duplicate, contaminated or too_long."""
    evidence: str
    text: str
    """Its beginning."""
    other: str
    """The beginning of the prompt or the evaluation item that it collides with."""


class _Stratum(NamedTuple):
    weight: float
    capacity: int | None
    """Most prompts it can have, where that is not beyond all wishes."""
    open: Callable[[], Iterator[Prompt]]


class PromptStream:
    """The prompts of a mix, one after another."""

    def __init__(
        self,
        strata: Mapping[str, _Stratum],
        *,
        near_duplicates: float = 0.8,
        evaluation: ContaminationIndex | None = None,
        room: int | None = None,
        left_out: Mapping[str, str] | None = None,
        broker: Broker | None = None,
    ) -> None:
        """`room`: tokens that a prompt may take; None for any number."""
        self.left_out = dict(left_out or {})
        """Strata that are not asked at all, each with the reason."""
        self.dropped: list[Dropped] = []
        """Prompts that were not asked, with evidence: the first MAX_DROPPED."""
        self.drops: Counter[tuple[str, str]] = Counter()
        """How many, by stratum and reason."""
        self.exhausted: set[str] = set()
        """Strata that have given their last prompt."""
        self.broker = broker or Broker(TOOLS)
        """Answers the calls of all tools that the prompts offer."""
        self._strata = dict(strata)
        self._threshold, self._room = near_duplicates, room
        self._evaluation = evaluation or ContaminationIndex()
        self._ahead = {name: _Ahead(stratum.open(), near_duplicates) for name, stratum in strata.items()}
        if room is not None:
            self._leave_out_long(room)
        if not self._strata:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.left_out.items())
            raise ConfigError(f"no stratum is left to ask ({reasons})")
        self._given = dict.fromkeys(self._strata, 0)
        self._index = NearDuplicates(near_duplicates)
        self._excerpts: dict[str, str] = {}

    @property
    def weights(self) -> dict[str, float]:
        """Of each stratum that is asked."""
        return {name: stratum.weight for name, stratum in self._strata.items()}

    @property
    def decontamination(self) -> dict[str, str]:
        """Evaluation sets that the prompts are held against: name and sha256."""
        return dict(self._evaluation.sha256s)

    def __iter__(self) -> PromptStream:
        return self

    def __next__(self) -> Prompt:
        while len(self.exhausted) < len(self._strata):
            # the stratum that is furthest behind its share: an even, seedless interleaving
            name = min(
                (name for name in self._strata if name not in self.exhausted),
                key=lambda s: ((self._given[s] + 1) / self._strata[s].weight, s),
            )
            prompt = self._kept(name, self._ahead[name], self._index, self._drop)
            if prompt is not None:
                self._given[name] += 1
                self._excerpts[prompt.id] = excerpt(said(prompt))
                return prompt
            self.exhausted.add(name)
        raise StopIteration

    def quotas(self, total: int) -> dict[str, int]:
        """Records wanted of each stratum, `total` in all, in proportion to the weights (largest remainder).

        A stratum that has fewer prompts gives what it has; its share falls to the others.
        """
        wanted = shares(self.weights, {}, total)
        limits: dict[str, int] = {}
        for name, stratum in self._strata.items():
            # counting what really is there takes time, and is needed only where it may run short
            if stratum.capacity is not None and 4 * wanted[name] > stratum.capacity:
                limits[name] = self._count(name, 4 * wanted[name])
        return shares(self.weights, limits, total)

    def _count(self, name: str, enough: int) -> int:
        """Prompts of a stratum by itself that would be kept, `enough` at most."""
        ahead, index = _Ahead(self._strata[name].open(), self._threshold), NearDuplicates(self._threshold)
        count = 0
        while count < enough and self._kept(name, ahead, index, lambda *_: None) is not None:
            count += 1
        return count

    def _kept(self, name: str, ahead: _Ahead, index: NearDuplicates,
              drop: Callable[[Prompt, str, str, str], None]) -> Prompt | None:  # fmt: skip
        """The next prompt of a stratum that is not dropped; None where there is none."""
        too_long = 0
        for prompt, sketch in ahead:
            if self._room is not None and prompt.needs_tokens > self._room:
                drop(prompt, "too_long", f"about {prompt.needs_tokens} tokens, and there is room for {self._room}", "")
                too_long += 1
                if too_long == _TOO_LONG:
                    return None
            elif hits := [hit for m in prompt.messages if m.role == "user" for hit in self._evaluation.hits(m.content)]:
                evidence = "; ".join(f"{hit.set} {hit.item}: {hit.ngram}" for hit in hits)
                drop(prompt, "contaminated", evidence, hits[0].excerpt)
            elif match := index.find(sketch):
                same = match.similarity == 1
                evidence = match.key if same else f"{match.key}, similarity {match.similarity:.2f}"
                drop(prompt, "duplicate" if same else "near_duplicate", evidence, self._excerpts.get(match.key, ""))
            else:
                index.insert(prompt.id, sketch)
                return prompt
        return None

    def _drop(self, prompt: Prompt, reason: str, evidence: str, other: str) -> None:
        self.drops[prompt.stratum, reason] += 1
        if len(self.dropped) < MAX_DROPPED:
            where = f"{prompt.source} " if prompt.source else ""
            text = excerpt(said(prompt))
            self.dropped.append(Dropped(prompt.id, prompt.stratum, reason, where + evidence, text, other))

    def _leave_out_long(self, room: int) -> None:
        """Leave out strata whose first prompts are all too long, so that nobody waits for one that fits."""
        for name in list(self._strata):
            least = min((prompt.needs_tokens for prompt in self._ahead[name].peek(16)), default=0)
            if least > room:
                self.left_out[name] = f"a prompt takes about {least} tokens, and there is room for {room}"
                del self._strata[name]


class _Ahead:
    """The prompts of a stratum with their sketches, drawn in growing chunks."""

    def __init__(self, prompts: Iterator[Prompt], threshold: float) -> None:
        self._prompts, self._maker = prompts, NearDuplicates(threshold)
        self._queue: deque[tuple[Prompt, Sketch]] = deque()
        self._size = 4

    def __iter__(self) -> Iterator[tuple[Prompt, Sketch]]:
        while self._queue or self._fill(self._size):
            yield self._queue.popleft()

    def peek(self, n: int) -> list[Prompt]:
        """The next n, without taking them."""
        self._fill(n - len(self._queue))
        return [prompt for prompt, _ in self._queue]

    def _fill(self, n: int) -> bool:
        chunk: list[Prompt] = []
        characters = 0
        for prompt in itertools.islice(self._prompts, max(0, n)):
            chunk.append(prompt)
            characters += len(prompt.text)
            if characters > _CHUNK_CHARACTERS:
                break
        self._size = min(_CHUNK, 2 * self._size)
        self._queue.extend(zip(chunk, self._maker.sketch([said(prompt) for prompt in chunk]), strict=True))
        return bool(chunk)


class MixFiles(NamedTuple):
    """The files that a mix names, read and checked."""

    sources: list[Source]
    broker: Broker
    evaluation: ContaminationIndex


def read_files(mix: Mix, name: str = "the mix") -> MixFiles:
    """Read all that a mix names, and check what no teacher decides. ConfigError and DatasetError say what is wrong
    with which key of the mix called `name`."""
    for stratum, weight in mix.strata.items():
        if stratum not in STRATA:
            near = difflib.get_close_matches(stratum, STRATA, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{name}: strata: unknown stratum '{stratum}'; the nearest is '{near}'")
        if not 0 <= weight < 1e9:
            raise ConfigError(f"{name}: strata: the weight of {stratum} must be 0 or more, not {weight}")
    with named(name, "tools"):
        user_tools = [tool for path in mix.tools for tool in read_tools(path)]
    with named(name, "sources"):
        sources = [Source(source, BY_NAME | {tool.name: tool for tool in user_tools}) for source in mix.sources]
        user_tools += _brought(sources)
        taken = {stratum for stratum, weight in mix.strata.items() if weight}
        for source in sources:
            if twice := taken & set(source.counts):
                raise ConfigError(
                    f"{source.path}: stratum {min(twice)} is in the mix already; name this one with `stratum`"
                )
            taken |= set(source.counts)
    if not taken:
        raise ConfigError(f"{name}: strata: no positive weight, and no `sources`")
    with named(name, "fixtures"):
        broker = Broker([*TOOLS, *user_tools], read_fixtures(mix.fixtures, user_tools))
    with named(name, "decontaminate"):
        return MixFiles(sources, broker, ContaminationIndex.load(mix.decontaminate))


@contextlib.contextmanager
def named(mix: str, key: str) -> Iterator[None]:
    """An error over a file says which key of which mix named it, and where a relative path was looked for."""
    try:
        yield
    except InputError as error:
        missing = error.__cause__ if isinstance(error.__cause__, FileNotFoundError) else None
        relative = missing and not Path(str(missing.filename)).is_absolute()
        looked = f" (looked in {Path.cwd()})" if relative else ""
        raise type(error)(f"{mix}: {key}: {error}{looked}") from error


def open_prompts(mix: Mix, seed: int, *, tools: bool, room: int | None, files: MixFiles | None = None) -> PromptStream:
    """The prompts of a mix for a teacher that can call `tools` or not, and has `room` tokens for a prompt, or no
    limit. `files`: what `read_files` gave, where it was called before."""
    sources, broker, evaluation = files or read_files(mix)
    strata: dict[str, _Stratum] = {}
    left_out: dict[str, str] = {}
    for name, weight in mix.strata.items():
        if weight and name in TOOL_STRATA and not tools:
            left_out[name] = "the teacher cannot call tools"
        elif weight:
            size = mix.long_context_tokens
            if name == "long_context" and room is not None and room < size:
                size = max(room * 9 // 10, min(1000, size))
            strata[name] = _Stratum(weight, capacity(name), _opener(name, seed, size))
    for source in sources:
        counts = source.counts
        for name, weight in source.weights.items():
            strata[name] = _Stratum(weight, counts[name], _file_opener(source, name, seed, tools))
            if not tools and next(strata[name].open(), None) is None:
                left_out[name] = "the teacher cannot call tools"
                del strata[name]
    return PromptStream(
        strata, near_duplicates=mix.near_duplicates, evaluation=evaluation, room=room, left_out=left_out, broker=broker,
    )  # fmt: skip


def shares(weights: Mapping[str, float], limits: Mapping[str, int], total: int) -> dict[str, int]:
    """Whole numbers in proportion to the weights that sum to `total`: largest remainder, then by name. None exceeds
    its limit, unless all are at theirs."""
    free, left = dict(weights), total
    out: dict[str, int] = {}
    while True:
        scale = Fraction(left) / sum(map(Fraction, free.values()))
        full = {name for name, weight in free.items() if limits.get(name, total) < Fraction(weight) * scale}
        if full == set(free):  # nobody has room: the total cannot be reached, and everybody is short in proportion
            free, left, out = dict(weights), total, {}
            scale = Fraction(left) / sum(map(Fraction, free.values()))
            break
        if not full:
            break
        out |= {name: limits[name] for name in full}
        left -= sum(limits[name] for name in full)
        free = {name: weight for name, weight in free.items() if name not in full}
    exact = {name: Fraction(weight) * scale for name, weight in free.items()}
    out |= {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (int(exact[name]) - exact[name], name))
    for name in by_remainder[: total - sum(out.values())]:
        out[name] += 1
    return {name: out[name] for name in weights}


def said(prompt: Prompt) -> str:
    """What is compared of a prompt: all that the user says."""
    return "\n".join(message.content for message in prompt.messages if message.role == "user")


def _opener(name: str, seed: int, size: int) -> Callable[[], Iterator[Prompt]]:
    return lambda: built_in(name, seed, size)


def _file_opener(source: Source, name: str, seed: int, tools: bool) -> Callable[[], Iterator[Prompt]]:
    return lambda: (prompt for prompt in source.prompts(name, seed) if tools or not prompt.tools)


def _brought(sources: Iterable[Source]) -> list[Tool]:
    """Tools that files of prompts define; equal definitions in two files are one."""
    found: dict[str, Tool] = {}
    for source in sources:
        for tool in source.tools.values():
            if found.setdefault(tool.name, tool) != tool:
                raise ConfigError(f"{source.path}: tool {tool.name} is defined otherwise in another file")
    return list(found.values())
