"""What a report says of a dataset's records, counted as they are written."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from distill.data.schema import LogprobInfo, Record, Usage, tools_sha256, turn_text

_SAMPLES = 6  # conversations to show with tool calls, and as many without


class Lengths:
    """Any number of lengths: how many, their mean, the greatest, and how many lie up to each power of two."""

    def __init__(self) -> None:
        self._n = self._sum = self._most = 0
        self._bins: Counter[int] = Counter()

    def add(self, length: int) -> None:
        """One more."""
        self._n, self._sum, self._most = self._n + 1, self._sum + length, max(self._most, length)
        self._bins[max(length - 1, 0).bit_length()] += 1

    def merge(self, other: Lengths) -> None:
        """As if those of another had been added here."""
        self._n, self._sum, self._most = self._n + other._n, self._sum + other._sum, max(self._most, other._most)
        self._bins += other._bins

    def facts(self) -> dict[str, Any]:
        """Empty of no lengths. `up_to` counts by the upper edge of each bin, without gaps."""
        if not self._n:
            return {}
        edges = range(min(self._bins), max(self._bins) + 1)
        return {"mean": round(self._sum / self._n, 1), "max": self._most,
                "up_to": {str(1 << edge): self._bins[edge] for edge in edges}}  # fmt: skip


class Tally:
    """Counts of records, and some of them to show."""

    def __init__(self) -> None:
        self.counts = {"records": 0, "train": 0, "val": 0}
        """As the header has them."""
        self._shown: dict[bool, list[Record]] = {True: [], False: []}
        self._strata: Counter[str] = Counter()
        self._lengths = {"prompt_characters": Lengths(), "answer_characters": Lengths(), "answer_tokens": Lengths()}
        self._tool_turns: Counter[int] = Counter()
        self._usage: Usage | None = None
        self._tools: set[bytes] = set()

    @property
    def tools_sha256(self) -> str | None:
        """As the header has it."""
        return tools_sha256(self._tools)

    def add(self, record: Record) -> None:
        """One more record."""
        self.counts["records"] += 1
        self.counts[record.split] += 1
        self._strata[record.stratum] += 1
        self._tools.update(map(msgspec.json.encode, record.tools))
        learned = [turn for turn in record.messages if turn.origin == "teacher"]
        others = sum(len(turn.content) for turn in record.messages if turn.origin != "teacher")
        tool_turns = sum(bool(turn.tool_calls) for turn in learned)
        self._tool_turns[tool_turns] += 1
        self._show(record, calls=tool_turns > 0)
        self._lengths["prompt_characters"].add(others)
        self._lengths["answer_characters"].add(sum(len(turn_text(turn)) for turn in learned))
        if record.usage is not None:
            self._lengths["answer_tokens"].add(record.usage.completion)
            self._usage = (self._usage or Usage()) + record.usage

    def _show(self, record: Record, *, calls: bool) -> None:
        shown = self._shown[calls]
        if len(shown) < _SAMPLES and all(record.stratum != other.stratum for other in shown):
            shown.append(record)

    def merge(self, other: Tally) -> None:
        """As if the records of another, which come after those here, had been added here."""
        for name, n in other.counts.items():
            self.counts[name] += n
        self._strata += other._strata
        self._tools |= other._tools
        self._tool_turns += other._tool_turns
        for name, lengths in other._lengths.items():
            self._lengths[name].merge(lengths)
        if other._usage is not None:
            self._usage = (self._usage or Usage()) + other._usage
        for calls, shown in other._shown.items():
            for record in shown:
                self._show(record, calls=calls)

    @property
    def samples(self) -> list[Record]:
        """The first of some strata, those that call tools before the others."""
        return self._shown[True] + self._shown[False]

    def facts(self) -> dict[str, Any]:
        """For report.json."""
        usage = {name: {"sum": n, "per_record": round(n / self.counts["records"], 1)}
                 for name, n in msgspec.structs.asdict(self._usage).items()} if self._usage else None  # fmt: skip
        return {
            "counts": self.counts,
            "strata": {name: {"records": n} for name, n in self._strata.items()},
            "lengths": {name: found for name, lengths in self._lengths.items() if (found := lengths.facts())},
            "tool_turns": {str(turns): n for turns, n in sorted(self._tool_turns.items())},
            "usage": usage,
        }


def stored_facts(info: LogprobInfo, tokens: int, size: int) -> dict[str, Any]:
    """What report.json says of a store of so many tokens and bytes."""
    return {"k": info.k, "codec": info.codec, "tail": info.tail, "tokens": tokens, "bytes": size,
            "bytes_per_token": round(size / max(tokens, 1), 1), "kl_to_exact": info.kl_to_exact}  # fmt: skip
