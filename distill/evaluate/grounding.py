"""Where an answer's atoms come from: what tools returned in this episode, what was said, what follows from it.

Strict is equality of typed values: a number by value, a date the same day, a time the same minute, an address or an id
letter by letter, a quoted or declared text as words within one text. Lax adds numbers within 1% and letters of either
case; whatever is strict is lax.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from distill.broker import FIXTURE_MISS
from distill.data.atoms import places
from distill.evaluate.atoms import LONGEST_NUMBER, Atom, Kind, Value, atoms_in, folded, typed_atoms
from distill.evaluate.claims import attributed
from distill.evaluate.items import Fact

__all__ = ["Atom", "Evidence", "atoms_in", "attributed", "fact_in", "pointer"]
LAX = Decimal("0.01")
_YEARS = range(1900, 2101)
_APART = "\n\x1f\n"  # between texts: no atom and no quotation reaches across


class Evidence:
    """What an answer may rest on: results, each a JSON value, and texts.

    The leaves of a result count, and its keys for what they are typed: {"2026-03-12": 4} gives a date, {"open": false}
    does not give the text "open". A result that is an error, `{"error": {...}}`, gives its message and no more; a
    fixture miss gives nothing. A text is read as English and as the locale writes, since tools write as machines do:
    the text "1.234" gives a German answer either number. `derived` are texts too.
    """

    def __init__(self, results: Sequence[Any], texts: Sequence[str], derived: Sequence[str] = (), locale: str = "en"):
        self.locale = locale
        self._keys: list[str] = []
        self._leaves = [leaf for result in results for leaf in _leaves(_given(result), self._keys)]
        self._texts = [*(leaf for leaf in self._leaves if isinstance(leaf, str)), *texts, *derived]

    def grounded(self, atom: Atom) -> bool:
        """Whether this evidence gives the atom."""
        known = self._known
        if atom.kind in ("quoted", "declared"):
            return _holds(self._text, str(atom.value))
        if atom.kind == "url" and "://" not in str(atom.value):
            return atom.value in known["url"] or _holds(self._text, str(atom.value))
        if atom.kind == "time" and isinstance(atom.value, tuple):
            return atom.value in known["time"] or (len(atom.value) == 3 and (*atom.value[:2], -1) in known["time"])
        return atom.value in known[atom.kind]

    def grounded_lax(self, atom: Atom) -> bool:
        """The same for numbers within 1% of a given one, and letters of either case."""
        if self.grounded(atom):
            return True
        if isinstance(atom.value, Decimal):
            return _near(atom.value, self._numbers)
        if not isinstance(atom.value, str):
            return False
        if atom.kind in ("quoted", "declared") or (atom.kind == "url" and "://" not in atom.value):
            return _holds(self._folded, folded(atom.value))
        return folded(atom.value) in self._folded_values[atom.kind]

    def mentions(self, word: str) -> bool:
        """Whether a text or leaf holds these characters, in letters of either case."""
        return folded(word) in self._folded

    @functools.cached_property
    def _known(self) -> dict[Kind, set[Value]]:
        """Values by kind. Of a date also the day without its year, the month, and the year as a number; of a time with
        seconds the minute; of a time without them (hour, minute, -1): any second."""
        known: dict[Kind, set[Value]] = {kind: set() for kind in ("number", "date", "time", "url", "email", "id")}
        known["number"].update(number for leaf in self._leaves if (number := _number(leaf)) is not None)
        for locale in dict.fromkeys(("en", self.locale)):
            for atom in typed_atoms(_APART.join(self._texts + self._keys), locale):
                known[atom.kind].add(atom.value)
        for value in list(known["date"]):
            if isinstance(value, tuple) and value[0]:
                year, month, day = value
                known["date"].update([(0, month, day), (year, month, 0)] if day else [])
                known["number"].update([Decimal(year)] if year in _YEARS else [])
        for value in list(known["time"]):
            if isinstance(value, tuple):
                known["time"].add((*value, -1) if len(value) == 2 else value[:2])
        return known

    @functools.cached_property
    def _numbers(self) -> list[Decimal]:
        return sorted(value for value in self._known["number"] if isinstance(value, Decimal))

    @functools.cached_property
    def _text(self) -> str:
        return unicodedata.normalize("NFC", _APART.join(" ".join(text.split()) for text in self._texts))

    @functools.cached_property
    def _folded(self) -> str:
        return folded(self._text)

    @functools.cached_property
    def _folded_values(self) -> dict[Kind, set[str]]:
        return {kind: {folded(v) for v in values if isinstance(v, str)} for kind, values in self._known.items()}


class Present(NamedTuple):
    """Whether an answer holds a fact."""

    strict: bool
    lax: bool


def fact_in(fact: Fact, text: str, atoms: Sequence[Atom], locale: str = "en") -> Present:
    """Whether an answer, whose atoms these are, holds a fact: by its typed value, or as one of its renderings.

    A rendering counts where no word, number or other atom goes on beyond it: `12 March` is not in `12 March 2027`,
    nor `0.5 km` in `-0.5 km`. Lax: numbers within 1%, synonyms, letters of either case.
    """
    text, low = unicodedata.normalize("NFC", text), ""
    wanted = _values(fact, locale)
    same = [*fact.renderings, *([str(fact.value)] if fact.type in ("id", "string", "url") else [])]
    said = [atom for atom in atoms if atom.kind == fact.type]
    for atom in atoms:
        if atom.kind in ("quoted", "declared"):
            said += [inner for inner in typed_atoms(atom.text, locale) if inner.kind == fact.type]
    if any(_equal(atom.value, value) for atom in said for value in wanted) or _stand(same, text, atoms):
        return Present(True, True)
    if fact.type == "number":
        numbers = sorted(value for value in wanted if isinstance(value, Decimal))
        if any(isinstance(atom.value, Decimal) and _near(atom.value, numbers) for atom in said):
            return Present(False, True)
    low = folded(text)
    return Present(False, _stand([folded(one) for one in (*same, *fact.synonyms)], low, atoms))


def pointer(value: Any, path: str) -> Any:
    """The part of a JSON value that a pointer (RFC 6901) names; None where it has none, or the pointer is malformed."""
    if path and not path.startswith("/"):
        return None
    for part in path.split("/")[1:]:
        if re.search("~(?![01])", part):
            return None
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and re.fullmatch(r"0|[1-9][0-9]{0,8}", part) and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _given(result: Any) -> Any:
    """What of a result counts."""
    if not isinstance(result, dict) or set(result) != {"error"}:
        return result
    error = result["error"]
    if not isinstance(error, dict):
        return error if isinstance(error, str) else None
    message = error.get("message")
    return message if isinstance(message, str) and error.get("type") != FIXTURE_MISS else None


def _leaves(value: Any, keys: list[str]) -> Iterator[Any]:
    """Leaves, in no order, of a value nested however deep; its keys are added to `keys`."""
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, dict):
            keys += one
            stack += one.values()
        elif isinstance(one, (list, tuple)):
            stack += one
        else:
            yield one


def _number(leaf: Any) -> Decimal | None:
    """A JSON number's value; a boolean is none."""
    if isinstance(leaf, bool) or not isinstance(leaf, (int, float)) or abs(leaf) >= 10**LONGEST_NUMBER:
        return None
    return Decimal(repr(leaf)) if leaf == leaf else None  # not NaN


def _holds(text: str, value: str) -> bool:
    return bool(value) and next(places(text, " ".join(value.split())), None) is not None


def _near(value: Decimal, given: Sequence[Decimal]) -> bool:
    """Whether a number is within 1% of one of the given, which are sorted: the next one below or above, if any."""
    at = bisect_left(given, value)
    return any(abs(value - one) <= LAX * abs(one) for one in given[max(at - 1, 0) : at + 1])


def _values(fact: Fact, locale: str) -> set[Value]:
    """The typed value of a fact; two where a text, such as "1.234 kg", reads differently in the locale."""
    number = _number(fact.value)
    if number is not None:
        return {number}
    read = (typed_atoms(str(fact.value), how) for how in dict.fromkeys(("en", locale)))
    return {next(atom.value for atom in atoms if atom.kind == fact.type) for atoms in read
            if any(atom.kind == fact.type for atom in atoms)}  # fmt: skip


def _equal(one: Value, other: Value) -> bool:
    """Of two values of one kind: times are equal where one has no seconds and the minute is the same."""
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) != len(other):
        return one[:2] == other[:2]
    return one == other


def _stand(values: Sequence[str], text: str, atoms: Sequence[Atom]) -> bool:
    """Whether one of the values stands in the text by itself: no atom but a quotation reaches beyond it."""
    for value in values:
        value = unicodedata.normalize("NFC", value)
        for start in places(text, value) if value else ():
            end = start + len(value)
            over = atoms[bisect_right(atoms, start, key=_end) : bisect_left(atoms, end, key=_start)]
            if all(atom.kind == "quoted" or (start <= atom.span[0] and atom.span[1] <= end) for atom in over):
                return True
    return False


def _start(atom: Atom) -> int:
    return atom.span[0]


def _end(atom: Atom) -> int:
    return atom.span[1]
