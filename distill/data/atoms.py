"""Atoms: the values in a tool's result that an answer can take up, and where a text does.

A result that is JSON has an atom for each leaf that is

- a string of at least 3 characters (of Chinese, Japanese and Korean: 2), matched as it is written, at the edges of
  words where its script has spaces between words;
- a number of at least 2 digits, matched by value as a whole number: 12.5 is in "12.50 EUR", 1234 in "1,234", and
  neither is in "112.5", "2024-12-50" or "A12".

Booleans, nulls, one-digit numbers and shorter strings stand in any text by chance and are none. A result that is
not JSON is one string.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec

from distill import chat
from distill.data.schema import Source, Span

SHORTEST_STRING = 3
FEWEST_DIGITS = 2
MOST_ATOMS = 2000
"""Of one result."""
LONGEST_CONTENT = 1 << 20
"""Characters of a turn that are searched."""
_LONGEST_NUMBER = 24
_UNSPACED = "\u0e00"  # from here on most scripts write no spaces between words, or join particles to them
_WIDE = "\u2e80"
_NUMBER = re.compile(
    r"(?<![\w.,:/\-])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?(?![\w]|[.,:/\-]\d)", re.ASCII
)
_DECODER = msgspec.json.Decoder(float_hook=Decimal)


class Atom(NamedTuple):
    """A value and where it comes from."""

    value: str | Decimal
    source: Source


def atoms_of(turn: chat.Message, msg: int) -> list[Atom]:
    """The atoms of a tool's result, in the order of its JSON; none of any other turn."""
    if turn.role != "tool":
        return []
    try:
        leaves = _leaves(_DECODER.decode(turn.content))
    except (msgspec.DecodeError, RecursionError, ArithmeticError):
        leaves = iter([("", turn.content)])
    out: list[Atom] = []
    for pointer, value in leaves:
        atom = _value_of(value)
        if atom is not None:
            out.append(Atom(atom, Source(msg, pointer)))
        if len(out) == MOST_ATOMS:
            break
    return out


def integrations(text: str, atoms: Sequence[Atom]) -> list[tuple[Span, Source]]:
    """Where `text` takes up an atom, in order: the longest matches that do not overlap, the leftmost first. Of equal
    atoms the first is the source."""
    if not atoms or len(text) > LONGEST_CONTENT:
        return []
    strings: dict[str, Source] = {}
    numbers: dict[Decimal, Source] = {}
    for value, source in atoms:
        (strings if isinstance(value, str) else numbers).setdefault(value, source)  # type: ignore[arg-type]
    found = [(start, start + len(value), source) for value, source in strings.items() for start in places(text, value)]
    if numbers:
        for match in _NUMBER.finditer(text):
            if (origin := numbers.get(Decimal(match[0].replace(",", "")))) is not None:
                found.append((match.start(), match.end(), origin))
    out: list[tuple[Span, Source]] = []
    reached = 0
    for start, end, source in sorted(found, key=lambda item: (item[0], -item[1])):
        if end > reached:  # else it lies within a longer one
            out.append(((start, end), source))
            reached = end
    return out


def _leaves(value: Any, pointer: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{pointer}/{index}")
    else:
        yield pointer, value


def _value_of(leaf: Any) -> str | Decimal | None:
    if isinstance(leaf, str):
        text = leaf.strip()
        return text if len(text) + sum(map(_WIDE.__le__, text)) >= SHORTEST_STRING else None
    if isinstance(leaf, bool) or not isinstance(leaf, (int, Decimal)):
        return None
    number = Decimal(leaf)
    if abs(number.adjusted()) > _LONGEST_NUMBER or len(number.as_tuple().digits) > _LONGEST_NUMBER:
        return None
    number = number.normalize()
    return number if sum(map(str.isdigit, f"{number:f}")) >= FEWEST_DIGITS else None


def places(text: str, value: str) -> Iterator[int]:
    """Where `value` begins in `text` as words of its own: no word or number goes on beyond it."""
    start = text.find(value)
    while start >= 0:
        end = start + len(value)
        if not (_joined(text, start, -1) or _joined(text, end - 1, 1)):
            yield start
        start = text.find(value, start + 1)


def _joined(text: str, edge: int, step: int) -> bool:
    """Whether the word or number at `edge` goes on beyond it."""
    beyond = edge + step
    if not 0 <= beyond < len(text):
        return False
    inner, outer = text[edge], text[beyond]
    if _in_word(inner) and _in_word(outer):
        return True
    further = beyond + step
    return inner.isdigit() and outer in ".,:/-" and 0 <= further < len(text) and text[further].isdigit()


def _in_word(character: str) -> bool:
    return (character.isalnum() or character == "_") and character < _UNSPACED
