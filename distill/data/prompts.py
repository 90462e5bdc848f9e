"""Shipped prompts: seeded, stratified combinations of templates and subjects, each different from all others."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from distill.chat import Message
from distill.data import prompt_material as material
from distill.errors import ConfigError


class Prompt(NamedTuple):
    """A conversation that waits for the teacher's turn."""

    id: str
    stratum: str
    messages: tuple[Message, ...]
    ground_truth: str | None = None

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1].content


STRATA = (*material.TEMPLATES, "arithmetic")


def prompts(weights: Mapping[str, float], seed: int) -> Iterator[Prompt]:
    """Prompts without end until the strata run out: each stratum comes up in proportion to its weight.

    The order is a function of the arguments alone, so a longer run begins with the prompts of a shorter one.
    """
    unknown = sorted(set(weights) - set(STRATA))
    if unknown or not weights or min(weights.values()) < 0 or not sum(weights.values()):
        raise ConfigError(f"strata: {', '.join(unknown) or 'no positive weight'}; known: {', '.join(STRATA)}")
    sources = {name: _stratum(name, seed) for name, weight in weights.items() if weight > 0}
    given = dict.fromkeys(sources, 0)
    while sources:
        # the stratum that is furthest behind its share: an even, seedless interleaving
        name = min(sources, key=lambda s: ((given[s] + 1) / weights[s], s))
        given[name] += 1
        prompt = next(sources[name], None)
        if prompt is None:
            del sources[name]
        else:
            yield prompt


def _stratum(name: str, seed: int) -> Iterator[Prompt]:
    if name == "arithmetic":
        yield from _arithmetic(seed)
        return
    template = material.TEMPLATES[name]
    combinations = list(itertools.product(range(len(template.forms)), itertools.product(*template.parts)))
    combinations.sort(key=lambda c: _hash(f"{seed}\n{name}\n{c}"))
    seen: set[str] = set()
    for form, parts in combinations:
        text = template.forms[form].format(*parts)
        if text not in seen:
            seen.add(text)
            yield _prompt(name, text, template.system)


def _arithmetic(seed: int) -> Iterator[Prompt]:
    """Word problems with small numbers, whose answer we know."""
    seen: set[str] = set()
    for index in itertools.count():
        draw = _hash(f"{seed}\narithmetic\n{index}")
        problem = material.PROBLEMS[draw % len(material.PROBLEMS)]
        a, b = draw // 97 % 89 + 11, draw // 10_007 % 9 + 2
        name = material.NAMES[draw // 1_000_003 % len(material.NAMES)]
        thing = material.THINGS[draw // 100_000_007 % len(material.THINGS)]
        text = problem.text.format(a=a, b=b, name=name, thing=thing)
        if text not in seen:
            seen.add(text)
            yield _prompt("arithmetic", text, None, str(problem.answer(a, b)))


def _prompt(stratum: str, text: str, system: str | None, ground_truth: str | None = None) -> Prompt:
    messages = ((Message("system", system),) if system else ()) + (Message("user", text),)
    identity = hashlib.sha256(f"kd-prompt/1\n{system or ''}\n{text}".encode()).hexdigest()[:20]
    return Prompt(f"{stratum}-{identity}", stratum, messages, ground_truth)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
