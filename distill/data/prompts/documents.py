"""Long documents made from a seed, each with a question whose answer stands in it once.

A document is a row of entries; each names a thing that no other entry names, and a few values of it. The question
asks for one value of one entry. Entries, values and asides are drawn, so two documents share few runs of five words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from distill.draw import Draw


class Question(NamedTuple):
    """A document with what is asked about it."""

    text: str
    answer: str


class _Entry(NamedTuple):
    text: str
    asks: tuple[tuple[str, str], ...]
    """(question, answer)"""


_SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "qui", "ro", "su", "ta", "ve",
              "wi",
              "xo", "za", "bren", "cal", "dor", "fen", "gal", "hol", "lin", "mar", "nor", "pol", "ras", "sten", "tor",
              "ulm", "vik")  # fmt: skip
_FIRST = ("Ada", "Bruno", "Clara", "Dario", "Elin", "Farah", "Goran", "Hana", "Ivo", "Jana", "Karl", "Lena", "Milan",
          "Nora", "Otto", "Petra", "Ravi", "Sofia", "Tomas", "Vera")  # fmt: skip
_SERVICES = ("billing", "search", "mail", "auth", "images", "export", "stock", "routing", "reports", "chat", "archive")
_STATES = ("finished", "was retried", "timed out", "was rejected", "was queued", "was cancelled", "was delayed")
_GOODS = ("copper wire", "oak boards", "glass jars", "printer paper", "steel bolts", "wool blankets", "paint",
          "seed potatoes",
          "bicycle tyres", "candles", "roof tiles", "coffee beans", "rope", "ceramic cups", "solar lamps")  # fmt: skip
_COLOURS = ("red", "green", "blue", "grey", "white", "black", "yellow", "brown", "orange", "violet")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
           "December")  # fmt: skip
_TOPICS = ("the heating", "the new timetable", "the garden", "the library corner", "parking", "the summer party",
           "first aid",
           "the website", "noise in the yard", "the lift", "recycling", "the notice board", "the kitchen",
           "opening hours",
           "the bicycle shed")  # fmt: skip
_ASIDES = (
    "The {a} {b} was mentioned again, without result.", "Some had expected more of the {a} {b}.",
    "Nobody objected, although the {a} {b} would have been cheaper.", "This follows the rule about the {a} {b}.",
    "Compared with the {a} {b}, that is little.", "A photograph of the {a} {b} is kept on file.",
    "The weather was {a}, and the {b} stayed closed.", "Later the {a} {b} will be looked at as well.",
    "There is still a question about the {a} {b}.", "Whoever needs the {a} {b} should ask in time.",
)  # fmt: skip
_QUALITIES = ("old", "second", "northern", "spare", "small", "wooden", "shared", "temporary", "larger", "broken",
              "former",
              "empty", "quiet", "damp", "public", "narrow", "early", "heavy", "borrowed", "cheaper")  # fmt: skip
_NOUNS = ("shelf", "contract", "gate", "ladder", "meeting room", "trolley", "ledger", "window", "warehouse", "key",
          "pump",
          "fence", "catalogue", "roof", "crane", "boat", "lamp", "bridge", "workshop", "cellar", "stair", "label",
          "engine",
          "van", "drawer")  # fmt: skip


def long_question(draw: Draw, tokens: int) -> Question:
    """A document of about so many tokens, and a question about it."""
    kind = draw.choice(tuple(_KINDS))
    make, title, closing = _KINDS[kind]
    used: set[str] = set()
    entries: list[_Entry] = []
    size = 0
    while size < tokens:
        entries.append(make(draw, used))
        size += estimate_tokens(entries[-1].text)
    question, answer = draw.choice(draw.choice(entries).asks)
    document = title.format(n=draw.between(2, 99), place=_name(draw, used)) + "\n\n"
    document += "\n".join(entry.text for entry in entries)
    return Question(f"{document}\n\n{closing} {question}", answer)


def estimate_tokens(text: str) -> int:
    """Tokens of a text, about: a digit is one in most tokenizers, other text takes some four bytes a token."""
    digits = sum(map(text.count, "0123456789"))
    return digits + (len(text.encode("utf-8", "surrogatepass")) - digits + 2) // 3


def _name(draw: Draw, used: set[str]) -> str:
    """A made-up name that the document has not used."""
    while True:
        name = "".join(draw.choice(_SYLLABLES) for _ in range(draw.between(2, 3))).capitalize()
        if name not in used:
            used.add(name)
            return name


def _aside(draw: Draw) -> str:
    return (
        " " + draw.choice(_ASIDES).format(a=draw.choice(_QUALITIES), b=draw.choice(_NOUNS)) if draw.chance(0.6) else ""
    )


def _log(draw: Draw, used: set[str]) -> _Entry:
    job, service, state = _name(draw, used), draw.choice(_SERVICES), draw.choice(_STATES)
    worker, took = f"{draw.choice(_FIRST).lower()}-{draw.between(1, 40)}", draw.between(12, 9800)
    minute = 3 * len(used) + draw.below(3)
    time = f"{minute // 60 % 24:02}:{minute % 60:02}"
    text = f"{time} {service}: job {job} {state} on {worker} after {took} ms.{_aside(draw)}"
    return _Entry(text, ((f"On which worker did job {job} run?", worker),
                         (f"After how many milliseconds does the log report job {job}? Answer with the number.",
                          str(took)),
                         (f"Which service reported job {job}?", service)))  # fmt: skip


def _stock(draw: Draw, used: set[str]) -> _Entry:
    place, goods, colour = _name(draw, used), draw.choice(_GOODS), draw.choice(_COLOURS)
    count, keeper = draw.between(3, 990), draw.choice(_FIRST)
    form = draw.choice((
        "Hall {p}: {n} units of {g} behind the {c} door, counted by {k}.",
        "In {p}, {k} counted {n} units of {g}; the door is {c}.",
        "{k} keeps the {c} key of {p}, where {n} units of {g} are stored.",
        "Behind the {c} door of {p} there are {n} units of {g}, says {k}.",
    ))  # fmt: skip
    text = form.format(p=place, n=count, g=goods, c=colour, k=keeper) + _aside(draw)
    return _Entry(text, ((f"How many units are stored in {place}? Answer with the number.", str(count)),
                         (f"What is stored in {place}?", goods), (f"What colour goes with {place}?", colour),
                         (f"Who is named for {place}?", keeper)))  # fmt: skip


def _minutes(draw: Draw, used: set[str]) -> _Entry:
    group, topic, who = _name(draw, used), draw.choice(_TOPICS), draw.choice(_FIRST)
    day, cost = f"{draw.between(1, 28)} {draw.choice(_MONTHS)}", draw.between(40, 9900)
    form = draw.choice((
        "The group {g} spoke about {t}. {w} will report by {d}; up to {c} euros may be spent.",
        "{w} explained for {g} what is planned for {t}: {c} euros, to be settled by {d}.",
        "On {t}, {g} decided that {w} takes over. The limit is {c} euros and the date {d}.",
        "By {d}, {w} is to bring {g} an offer for {t} below {c} euros.",
    ))  # fmt: skip
    text = form.format(g=group, t=topic, w=who, d=day, c=cost) + _aside(draw)
    return _Entry(text, ((f"Which date is set for the group {group}?", day), (f"Who acts for the group {group}?", who),
                         (f"How many euros does the text name for the group {group}? Answer with the number.",
                          str(cost)),
                         (f"What does the group {group} deal with?", topic)))  # fmt: skip


_Kind = tuple[Callable[[Draw, set[str]], _Entry], str, str]
_KINDS: dict[str, _Kind] = {
    "log": (_log, "Log of cluster {n} ({place})", "According to the log:"),
    "stock": (_stock, "Stock report {n} of the {place} warehouses", "Going by the report:"),
    "minutes": (_minutes, "Minutes of assembly {n} in {place}", "Using only the minutes:"),
}
