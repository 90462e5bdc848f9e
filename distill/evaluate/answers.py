"""An episode's calls beside the gold ones, and its final answer taken apart: what scores count, and reports show."""

from __future__ import annotations

import json
from typing import NamedTuple

from distill.data.atoms import places
from distill.evaluate.atoms import Atom, atoms_in
from distill.evaluate.episode import Episode
from distill.evaluate.fixtures import ANSWERED
from distill.evaluate.grounding import Evidence, Present, fact_in, pointer
from distill.evaluate.items import Fact, Item
from distill.evaluate.matching import Matched, json_equal, match


class Claim(NamedTuple):
    """Something checkable that an answer says, and whether it is grounded."""

    atom: Atom
    strict: bool
    lax: bool


class Said(NamedTuple):
    """A fact of the item."""

    fact: Fact
    returned: bool
    """In this episode, by its gold call. One that was not counts as not said."""
    strict: bool
    lax: bool


class Answer(NamedTuple):
    """A final answer taken apart."""

    claims: tuple[Claim, ...]
    facts: tuple[Said, ...]


def matched_calls(episode: Episode) -> Matched:
    """Its calls against the gold ones; of the pairs, the second is the place among the calls that can be read."""
    functions = {tool["name"]: tool for tool in episode.item.tools}
    readable = [(one.call, functions.get(one.call.name)) for one in episode.calls if one.call is not None]
    return match(episode.item.calls, readable, len(episode.calls) - len(readable))


def owns_up(item: Item, final: str) -> bool:
    """Whether the answer holds one of the texts that the item wants (Item.must_say)."""
    text = final.casefold().replace("\u2019", "'")
    return not item.must_say or any(next(places(text, one.casefold()), None) is not None for one in item.must_say)


def evidence_of(episode: Episode) -> Evidence:
    """What its final answer may rest on."""
    item = episode.item
    # what the broker itself says of a call may repeat the model's own words, and is no evidence
    given = [one.outcome for one in episode.calls if one.outcome is not None and one.outcome.status in ANSWERED]
    results = [json.loads(outcome.content) if outcome.error else outcome.value for outcome in given]
    return Evidence(results, [message.content for message in item.messages], item.derived, item.locale)


def read_answer(episode: Episode, matched: Matched, evidence: Evidence) -> Answer:
    """The claims and facts of its final answer."""
    item, text = episode.item, episode.final
    declared = [*item.decoys, *(str(fact.value) for fact in item.facts if fact.type == "string")]
    atoms = atoms_in(text, item.locale, declared)
    readable = [one for one in episode.calls if one.call is not None]
    outcomes = {item.calls[g].id: readable[p].outcome for g, p in matched.pairs}
    facts = []
    for fact in item.facts:
        outcome = outcomes.get(fact.call)
        returned = outcome is not None and json_equal(pointer(outcome.value, fact.pointer), fact.value)
        said = fact_in(fact, text, atoms, item.locale) if returned else Present(False, False)
        facts.append(Said(fact, returned, said.strict, said.lax))
    # what says a returned fact in another way is as well grounded as the fact
    ways = Evidence([], [way for one in facts if one.returned for way in one.fact.renderings], (), item.locale)
    claims = (Claim(atom, evidence.grounded(atom) or ways.grounded(atom),
                    evidence.grounded_lax(atom) or ways.grounded_lax(atom)) for atom in atoms)  # fmt: skip
    return Answer(tuple(claims), tuple(facts))
