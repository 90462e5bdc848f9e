"""`kd-dataset --dry-run`: what a mix holds, and what asking it is expected to take and can take at most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import msgspec

from distill.data.asking import longest_answer
from distill.data.budget import UNIT, Prices, prompt_bound, usd
from distill.data.generation import most_asked
from distill.data.journal import JOURNAL, Totals
from distill.data.ledger import ledger
from distill.data.mix_config import MixConfig
from distill.data.prompts.stream import Prompt, PromptStream
from distill.data.records import sidecar
from distill.data.schema import Usage

_ANSWER = 250  # tokens of a turn that nobody has measured yet
_RESULTS, _MOST_RESULTS = 150, 1000  # tokens that a turn's tool results add to the next request: likely, and at most
_REASONS = ("duplicate", "near_duplicate", "contaminated", "too_long")


class Load(NamedTuple):
    """Requests, and the tokens that they carry."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0

    def __add__(self, other: Load) -> Load:  # type: ignore[override]
        return Load(*(a + b for a, b in zip(self, other)))

    @property
    def tokens(self) -> int:
        """Prompts and answers."""
        return self.prompt + self.completion

    def cost(self, prices: Prices | None) -> int:
        """In 1e-12 dollars; 0 without prices."""
        return prices.cost(Usage(self.prompt, self.completion)) if prices else 0


class Forecast:
    """What a run over `total` prompts would take."""

    def __init__(self, stream: PromptStream, total: int, config: MixConfig, *, local: bool, out: Path) -> None:
        """`out`: the dataset to be, whose ledger tells how long this teacher's answers are and what is spent."""
        self._stream, self._config, self._local = stream, config, local
        self.spent, self.measured = _known(out)
        self.quotas = stream.quotas(total)
        self.prompts: Counter[str] = Counter()
        self.expected = dict.fromkeys(self.quotas, Load())
        self.longest = sorted({longest_answer(config, local=local, reasons=reasons) for reasons in (False, True)})
        """Longest answers: of a teacher that does not reason, and of one that does."""
        self.answer = min(self.measured or _ANSWER, self.longest[-1])
        self.most = {longest: dict.fromkeys(self.quotas, Load()) for longest in self.longest}
        """With every answer as long as it may be, in as many turns, and none rejected."""
        self.largest = Load()
        """The request that reserves most."""
        for prompt in stream:
            self._count(prompt)
            if all(self.prompts[name] == quota or name in stream.exhausted for name, quota in self.quotas.items()):
                break

    def _count(self, prompt: Prompt) -> None:
        name, messages = prompt.stratum, msgspec.to_builtins(prompt.messages)
        if self.prompts[name] == self.quotas[name]:
            return
        bound, turns = prompt_bound(messages, prompt.tools), self._config.max_turns if prompt.tools else 1
        self.prompts[name] += 1
        self.expected[name] += _turns(_likely_turns(prompt), prompt.needs_tokens, self.answer, _RESULTS)
        for longest in self.longest:
            self.most[longest][name] += _turns(turns, bound, longest, _MOST_RESULTS)
            last = Load(1, bound + (turns - 1) * (longest + _MOST_RESULTS), longest)
            self.largest = max(self.largest, last, key=lambda load: load.tokens)

    def worst(self, longest: int) -> Load:
        """As `most`, and as many prompts rejected as a run puts up with."""
        return sum((
            Load(*(n * most_asked(self.quotas[name]) // count for n in self.most[longest][name]))
            for name, count in self.prompts.items()
        ), Load())  # fmt: skip

    def lines(self) -> Iterator[str]:
        """All of it, for a person."""
        yield from self._strata()
        yield from self._cost()
        yield from self._budget()
        yield from self._evidence()

    def _strata(self) -> Iterator[str]:
        heads = ("quota", "prompts", "requests", "tokens", "same", "near", "contam.", "too long")
        yield f"{'stratum':<20} " + " ".join(f"{head:>9}" for head in heads)
        for name, quota in self.quotas.items():
            load = self.expected[name]
            drops = (self._stream.drops[name, reason] for reason in _REASONS)
            numbers = (quota, self.prompts[name], load.requests, load.tokens, *drops)
            yield f"{name:<20} " + " ".join(f"{number:>9}" for number in numbers)
        load = sum(self.expected.values(), Load())
        numbers = (sum(self.quotas.values()), self.prompts.total(), load.requests, load.tokens)
        yield f"{'in all':<20} " + " ".join(f"{number:>9}" for number in numbers)
        for name, why in self._stream.left_out.items():
            yield f"{name} is left out: {why}"
        for name, digest in self._stream.decontamination.items():
            yield f"held against {name} (sha256 {digest[:16]})"

    def _cost(self) -> Iterator[str]:
        prices = self._config.prices
        how = "as in its ledger" if self.measured else "assumed"
        rows = {f"expected, answers of {self.answer} tokens ({how})": sum(self.expected.values(), Load())}
        for longest in self.longest:
            rows[f"at most, answers of {longest:,} tokens, none rejected"] = sum(self.most[longest].values(), Load())
            rows[f"at most, answers of {longest:,} tokens, most rejected"] = self.worst(longest)
        width = max(map(len, rows))
        yield f"{'':{width}} {'requests':>10} {'prompt tok.':>14} {'answer tok.':>14}" + " " * 4 * bool(prices) + (
            f"{'USD':>10}" if prices else "")  # fmt: skip
        for name, load in rows.items():
            money = f" {usd(load.cost(prices)):>13}" if prices else ""
            yield f"{name:{width}} {load.requests:>10,} {load.prompt:>14,} {load.completion:>14,}{money}"
        if not self.measured:
            yield "how long answers are, a first run with --total 20 finds out; a longer run keeps its answers"
        if len(self.longest) > 1:
            yield f"max_tokens is null: {self.longest[1]:,} if the probe finds reasoning, else {self.longest[0]:,}"
        if prices is None and not self._local:
            yield "no `prices` in the mix: what it costs cannot be said (US dollars a million tokens: input, output)"
        yield "at most: prompts in bytes, as reservations count them; what is asked again comes on top, unless budgeted"

    def _budget(self) -> Iterator[str]:
        limits, prices = self._config.budget, self._config.prices
        if limits.usd is None and limits.tokens is None:
            yield "no budget is set: --budget-tokens N, or with prices --budget-usd N, is never passed"
        expected, worst = sum(self.expected.values(), Load()), self.worst(self.longest[-1])
        if limits.tokens is not None:
            needs = [load.tokens for load in (expected, worst, self.largest)]
            yield self._covers(f"{limits.tokens:,} tokens", limits.tokens - self.spent.tokens, *needs)
        if limits.usd is not None:
            left = int(Decimal(repr(limits.usd)) / UNIT) - self.spent.cost
            needs = [load.cost(prices) for load in (expected, worst, self.largest)]
            yield self._covers(f"{limits.usd:g} USD", left, *needs)

    def _covers(self, name: str, left: int, expected: int, worst: int, largest: int) -> str:
        """What a limit has left, against what is needed."""
        said = f"the budget of {name}" + (", less what is spent," if self.spent.attempts else "")
        if left < largest:
            return f"{said} is less than the largest request reserves: the run may stop before it"
        if left >= expected:
            enough = "whatever is answered" if left >= worst else "for what is expected, not for the most"
        else:
            enough = f"for about {self.prompts.total() * left // expected:,} of {self.prompts.total():,} records"
        return f"{said} is enough {enough}; {left // max(largest, 1):,} of the largest requests fit into it at a time"

    def _evidence(self) -> Iterator[str]:
        for reason in _REASONS:
            for drop in [drop for drop in self._stream.dropped if drop.reason == reason][:3]:
                yield f"{reason}: {drop.stratum}: {_shown(drop.text, 100)}"
                yield f"    {_shown(drop.evidence, 160)}"
                if drop.other and reason != "contaminated":  # whose evidence has the words that are shared
                    yield f"    collides with: {_shown(drop.other, 100)}"


def _shown(text: str, most: int) -> str:
    """The beginning of a text from a file, harmless on a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[:most])


def _turns(turns: int, prompt: int, answer: int, results: int) -> Load:
    """An episode: each turn's request holds the turns before it, and the results of their calls."""
    return sum((Load(1, prompt + turn * (answer + results), answer) for turn in range(turns)), Load())


def _likely_turns(prompt: Prompt) -> int:
    if not prompt.tools or prompt.expect == "no_call":
        return 1
    return 3 if prompt.fault or prompt.stratum == "tool_chain" else 2


def _known(out: Path) -> tuple[Totals, int | None]:
    """What earlier starts spent, and the mean length of an answer; None where there is no answer yet."""
    if not (sidecar(out) / JOURNAL).is_file():
        return Totals(), None
    found = ledger(out)
    counted, answers = found["counted"], found["answers"] + found["probe"]["attempts"]
    spent = Totals(counted["attempts"], counted["tokens"], int(Decimal(counted["cost_usd"]) / UNIT))
    return spent, -(-found["usage"]["completion"] // answers) or None if found["answers"] else None
