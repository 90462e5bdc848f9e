"""Does an answer claim that a tool gave it something? What says so in an answer before which no tool was called.

An answer is attributed to a tool by one of these, and by nothing else; knowledge with numbers in it is not.

1. Marks of a result: a tool's turn of the chat template, <tool_response>, [TOOL_RESULTS].
2. A JSON object that names an offered tool, or has a key such as `tool` or `observation`, and holds an atom that the
   prompt does not give; where the prompt does not speak of JSON also one with a key `result` or `results`, and an
   answer that is nothing but JSON objects.
3. A sentence that names a source, where it or the next sentence holds an atom that the prompt does not give. It names

   a) an offered tool by its name, where that is no plain word: get_weather, getWeather;
   b) an offered tool in words (`get weather`, `calculator`) as what said or gave something, or was asked: "according to
      the calculator", "the calculator returned", "the calculator tool";
   c) a tool or search of no name as the same: "according to the tool", "the search results show", "I looked it up".

   Not a source is what was not or might be used: "I did not call get_weather", "I could use the calculator".
"""

# ruff: noqa: RUF001
from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from distill.data.atoms import places
from distill.evaluate.atoms import Atom, atoms_in

EXCERPT = 200
_MOST_OBJECTS = 32
_MARK = re.compile(
    r"<\|im_start\|>[ \n]?tool|</?(?:tool|function)_(?:response|result|output)s?>"
    r"|\[/?TOOL_(?:RESULT|RESPONSE|OUTPUT)S?\]",
    re.I,
)
_FENCE = re.compile(r"\A```\w{0,16}\s|```\Z")
_SENTENCE = re.compile(r"(?<=[.!?])[ \t]+|\n+")
_TOOL_KEYS = {"tool", "tool_name", "tool_call_id", "tool_result", "tool_response", "function", "observation"}
_RESULT_KEYS = {"result", "results"}
_SAID = r"(?:has |have |just )?(?:returned|reported|responded|said|says|showed|gave|told|found|confirmed|indicated)\b"
_THING = r"(?:tool|function|api|lookup|results?|output|response|call)\b"
_SOURCE = (
    r"(?:tool(?: (?:results?|outputs?|responses?|call))?"
    r"|(?:(?:web |online )?search|lookup) (?:results?|outputs?|responses?))"
)
_NAMELESS = re.compile(
    rf"according to (?:the |my |an? )?(?:{_SOURCE}|api|lookup|(?:web |online )?search)\b"
    rf"|\b{_SOURCE} (?:{_SAID}|(?:returns|reports|shows?|gives?|confirms?|indicates?)\b)"
    rf"|\b{_SOURCE}\W{{0,4}}:|^\W{{0,8}}observation\W{{0,4}}:"
    r"|\bi(?:['’]ve| have)?(?: just| also)? (?:looked (?:\w{1,20} ){0,3}up\b|(?:searched|queried|retrieved|fetched)\b"
    r"|(?:checked|called|ran|used|consulted|asked)(?: \w{1,20}){0,3} (?:tool|api|lookup|web|internet|online)\b)"
    r"|\b(?:laut|selon|d['’]après|según|secondo|segundo|enligt|ifølge) (?:dem |der |l['’]|la |lo |a |o )?"
    r"(?:werkzeug|tool|abfrage|outil|herramienta|búsqueda|strumento|ferramenta|busca|verktyget|verktøyet|api)\b"
)
_UNUSED = re.compile(
    r"(?:n['’]t|\bnot|\bnever|\bwithout|\bno need to|\bcould|\bcan|\bwould|\bmay|\bmight|\bshould|\bwill|['’]ll)\s"
    r"(?:\w{1,20}\s){0,2}?(?:us|call|need|check|ask|run|query|try|look)\w{0,4}\s(?:\S{1,20}\s){0,3}$"
)


class Given(Protocol):
    """What the prompt gives: grounding.Evidence without results."""

    locale: str

    def grounded(self, atom: Atom) -> bool: ...

    def mentions(self, word: str) -> bool: ...


def attributed(text: str, tools: Sequence[str], evidence: Given) -> list[str]:
    """Excerpts of an answer that claim to come from a tool. `tools`: names of those offered; `evidence`: the prompt."""
    out = [text[match.start() :] for match in _MARK.finditer(text)]
    out += _objects_claiming(text, tools, evidence)
    sentences = [one for one in _SENTENCE.split(text) if one and not one.isspace()]
    named = _names(tools)
    for i, sentence in enumerate(sentences):
        if _is_source(sentence, tools, named):
            claim = " ".join(sentences[i : i + 2])
            if _ungrounded(claim, tools, evidence):
                out.append(claim)
    return [" ".join(one[:EXCERPT].split()) for one in out]


def _ungrounded(text: str, tools: Sequence[str], evidence: Given) -> bool:
    return any(not evidence.grounded(atom) for atom in atoms_in(text, evidence.locale) if atom.value not in tools)


def _objects_claiming(text: str, tools: Sequence[str], evidence: Given) -> list[str]:
    found = list(_objects(text))
    asked = evidence.mentions("json")
    bare = _FENCE.sub("", text.strip()).strip()
    alone = not asked and bool(found) and bare[:1] in ("{", "[") and bare[-1:] in ("}", "]")
    out = []
    for value, raw in found:
        keys = set(value)
        names = keys & (_TOOL_KEYS | set(tools)) or any(one in tools for one in value.values() if isinstance(one, str))
        if alone or ((names or (keys & _RESULT_KEYS and not asked)) and _ungrounded(raw, tools, evidence)):
            out.append(raw)
    return out


def _objects(text: str) -> Iterator[tuple[dict[str, Any], str]]:
    """JSON objects that stand in a text, the outermost, and what they are written as: the first few."""
    decoder, at = json.JSONDecoder(), 0
    for _ in range(_MOST_OBJECTS):
        at = text.find("{", at)
        if at < 0:
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        if value:
            yield value, text[at:end]
        at = end


def _names(tools: Sequence[str]) -> re.Pattern[str] | None:
    """Form b."""
    words = [re.sub(r"[_.-]+|(?<=[a-z])(?=[A-Z])", " ", name).strip().casefold() for name in tools]
    if not any(words):
        return None
    name = "(?:" + "|".join(re.escape(one) for one in sorted(words, key=len, reverse=True) if one) + ")"
    asked = r"\b(?:according to|as per|via|called|queried|consulted|ran)(?: the| my| an?)?"
    return re.compile(rf"{asked} {name}\b|\b{name} (?:{_THING}|{_SAID})")


def _is_source(sentence: str, tools: Sequence[str], named: re.Pattern[str] | None) -> bool:
    low = sentence.casefold()
    starts = [at for name in tools if not (name.isalpha() and name[1:].islower()) for at in places(sentence, name)]
    if starts and len(low) != len(sentence):
        low = sentence
    starts += [match.start() for pattern in (named, _NAMELESS) if pattern for match in pattern.finditer(low)]
    return any(_UNUSED.search(low[max(at - 80, 0) : at]) is None for at in starts)
