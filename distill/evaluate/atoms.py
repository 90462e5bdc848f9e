"""The checkable atoms of an answer: what it says that is right or wrong, and not a matter of words.

In this order, each hiding what lies within it, so that nothing is counted twice:

- url: with a scheme or `www.`, a host with a path, a host under a common top-level domain; email.
- date: ISO 8601 (its time is a time), numeric with the day first (`en`: month first, unless that is no month), and with
  the month's name in English or the locale's language. A part that is not said is 0: (0, 3, 12), (2026, 3, 0).
- time: 14:30[:05], 3 pm, 14 Uhr, à 14 h, 14h30, kl. 14.30; a zone is not read.
- id: a run of letters, digits and `_` that has letters and digits, or several such runs joined by `-` or `.`:
  EV-12345, QA1234, room-12, v1.2.3, UUIDs, hex; also 192.168.0.1 and more than 40 digits. Not an id but numbers:
  5km, 2h30, 4x6, 1990s and ordinals (1st, 2nd: 1, 2), a number and words (10-day), mid-2026, Nr.5.
- number: by value, as the locale writes it; machine notation (12.5) too where it can mean nothing else. Per cent and
  currency are no part, and nothing is scaled: 50k is an id. One digit is a number as well. The number of a list's item
  at the start of a line is none where it counts on from 1.
- declared: texts that the item names, in any case of letters, unless they are within one of the above.
- quoted: 3 to 200 characters of one line in quotation marks. A quotation hides at most one atom: one that holds
  several is none, so that quotation marks never make an answer's claims fewer.

Each pass is linear in the text: repetitions are bounded or possessive.
"""

# ruff: noqa: RUF001, SIM905
from __future__ import annotations

import datetime
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Literal, NamedTuple

from distill.data.atoms import places
from distill.evaluate.locales import SPACE, convention

Kind = Literal["number", "date", "time", "url", "email", "id", "quoted", "declared"]
Value = Decimal | tuple[int, ...] | str
LONGEST_NUMBER = 40
"""Characters; a longer one is an id."""
SHORTEST_QUOTE, LONGEST_QUOTE = 3, 200


class Atom(NamedTuple):
    """Something checkable that a text says."""

    kind: Kind
    text: str
    value: Value
    """Of a number a Decimal, of a date (year, month, day), of a time (hour, minute[, second]), of others a text."""
    span: tuple[int, int]
    """Half-open, in the text in Unicode's form NFC."""


def atoms_in(text: str, locale: str = "en", declared: Sequence[str] = ()) -> list[Atom]:
    """The atoms of a final answer, in the order of its text. `declared`: texts that are atoms wherever they stand."""
    text = unicodedata.normalize("NFC", text)
    found = _Scan(text, locale).typed()
    if declared:
        found = _merged(found + _declared(text, declared))
    return _with_quotes(text, found)


def typed_atoms(text: str, locale: str) -> list[Atom]:
    """Atoms of all kinds but quoted and declared, a list's numbers included: what a text gives to go by."""
    return _Scan(unicodedata.normalize("NFC", text), locale).typed(lists=True)


def folded(text: str) -> str:
    """Casefolded, character by character, so that places stay where they are; white space is spaces."""
    low = text.casefold()
    if len(low) != len(text):
        low = "".join(c.casefold() if len(c.casefold()) == 1 else c for c in text)
    return _WHITE.sub(" ", low)


_UNITS = frozenset(
    "km m cm mm mi ft in yd kg g mg lb lbs oz t l ml cl dl h hr hrs min mins s sec secs ms us µs ns d w kb KB mb MB gb "
    "GB tb TB kib KiB mib MiB gib GiB Hz kHz MHz GHz W kW MW GW kWh MWh Wh V mV A mA mAh mph kph kmh ppm ppb px pt dpi "
    "fps bpm rpm Pa hPa kPa psi bar dB x eur EUR usd USD gbp GBP chf CHF sek SEK nok NOK dkk DKK "
    "st nd rd th e er re ère ème".split(" ")
)
_NAMES = frozenset(  # written with a digit by everyone: they claim nothing
    "co2 h2o o2 no2 so2 o3 n2 ch4 pm2.5 pm10 mp3 mp4 2d 3d 4d 4k 8k 3g 4g 5g b2b b2c covid-19".split()
)
_PREFIXES = frozenset(("mid", "pre", "post", "top", "sub", "non", "late", "early"))
_WHITE = re.compile(r"\s")
_DIGIT = re.compile(r"\d")
_LETTER = re.compile(r"[^\W\d_]")
_IN_URL = r"""[^\s<>"'`{}|\\^\[\]“”„«»]"""
_URL = re.compile(rf"(?:https?|ftp)://{_IN_URL}++|www\.(?<![\w./@-]www\.){_IN_URL}++", re.I)
_MAIL = re.compile(r"[\w.+%-](?<![\w.+%-].)[\w.+%-]{0,63}+@[\w-]++(?:\.[\w-]++)++")
_HOST = re.compile(
    rf"[A-Za-z0-9](?<![\w@./-].)[A-Za-z0-9-]*+\.(?:[A-Za-z0-9-]++\.)*(?:[A-Za-z]{{2,24}}+/{_IN_URL}*+"
    r"|(?:com|org|net|io|dev|app|edu|gov|info)\b(?![\w@-]|\.\w))",
    re.A,
)
_DOTTED = re.compile(r"[A-Za-z0-9]\.[A-Za-z]")
_NUMERIC_DATE = re.compile(
    r"\d(?<!\w\d)(?<!\d[.-]\d)(?:(?P<y>\d{3})(?P<sep>[-/.])(?P<m>\d{1,2})(?P=sep)(?P<d>\d{1,2})"
    r"(?P<t>[Tt](?P<h>\d\d):(?P<mi>\d\d)(?::(?P<s>\d\d)(?:[.,]\d{1,9}+)?)?(?:[Zz]|[+-]\d\d:?\d\d)?)?"
    r"|(?P<ym>\d{3})-(?P<mm>\d\d)(?!-)"
    rf"|(?<!/\d)(?P<a>\d?)(?P<sep2>[./-]){SPACE}?(?P<b>\d{{1,2}})(?P=sep2){SPACE}?(?P<yy>\d{{4}}|\d{{2}})(?!/))"
    r"(?!\w|[.-]\d)"
)
_SHORT_DATE = re.compile(  # a day and month behind a preposition, not of English
    rf"(?<!\w)(?P<p>(?:am|vom|zum|bis|le|du|au|el|del|al|il|dal|em|dia|den|fra){SPACE})"
    r"(?P<a>\d{1,2})[./](?P<b>\d{1,2})(?!\d|[./]\d)(?:\.(?=\s))?(?!\w)",
    re.I,
)
_LIST_ITEM = re.compile(r"^[ \t>*_#-]{0,8}+(\d{1,3})[.)](?=[ \t*_])", re.M)
_CHUNK = re.compile(r"\w(?<!\w\w)(?<!\w[-.]\w)(?:(?<=\d)|(?=(?:[^\W\d]++|[-.](?=\w))*+\d))\w*+(?:[-.]\w++)*+")
_SIGN = re.compile(r"(?:(?<![\w)\]\x00])([-+−–]))?[$€£¥]?\Z")
_EXPONENT = re.compile(r"\d+(?:\.\d+)?[eE][+-]?\d{1,3}")
_MEASURE = re.compile(r"\d++(?:[.-]\d++)*+([^\W\d_]++)")
_FIGURES = re.compile(r"[\d.-]*")
_DOT_DECIMAL = re.compile(r"(?:[1-9]\d{0,2}(?:,\d{3})++|\d+)\.\d+")
_COMMA_DECIMAL = re.compile(r"[1-9]\d{0,2}(?:\.\d{3})++,\d+")
_OPEN = r"(?<![^\s(\[{:=,;/*_–—-])"
_LONG = f"{{{SHORTEST_QUOTE},{LONGEST_QUOTE}}}"
_QUOTES = re.compile(
    rf'{_OPEN}(?:"(?=\S)([^"\n]{_LONG})"(?!\w)|[“„]([^“”„"\n]{_LONG})[”“"]|”(?=\S)([^“”„"\n]{_LONG})”(?!\w)'
    rf"|«([^«»\n]{_LONG})»|»(?=\S)([^«»\n]{_LONG})«|[‘‚](?=\S)([^‘\n]{_LONG}?)[’‘](?!\w)"
    rf"|'(?=\w)((?:[^'\n]|(?<=\w)'(?=\w)){_LONG}+)'(?!\w))"
)


class _Scan:
    """One text, read pass by pass; what is read is blanked out for the next."""

    def __init__(self, text: str, locale: str) -> None:
        self._how = convention(locale)
        self._text, self._found, self._item = text, list[Atom](), 0

    def typed(self, *, lists: bool = False) -> list[Atom]:
        rest = self._text
        if "://" in rest or "www." in rest.lower():
            rest = _URL.sub(self._url, rest)
        if "@" in rest:
            rest = _MAIL.sub(lambda match: self._keep("email", match[0], match.span()), rest)
        if _DOTTED.search(rest):
            rest = _HOST.sub(self._url, rest)
        if _DIGIT.search(rest):
            passes: list[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]] = [
                (_NUMERIC_DATE, self._numeric_date),
                *([(_SHORT_DATE, self._short_date)] if self._how.language != "en" else []),
                *([(self._how.named_date, self._named_date)] if self._names_month(rest) else []),
                (self._how.time, self._time),
                *([] if lists else [(_LIST_ITEM, self._list_item)]),
                (_CHUNK, self._chunk),
                (self._how.number, self._number),
            ]
            for pattern, reader in passes:
                rest = pattern.sub(reader, rest)
        return sorted(self._found, key=lambda atom: atom.span)

    def _names_month(self, text: str) -> bool:
        low = text.lower()
        return any(hint in low for hint in self._how.hints)

    def _keep(self, kind: Kind, value: Value, span: tuple[int, int]) -> str:
        self._found.append(Atom(kind, self._text[span[0] : span[1]], value, span))
        return "\x00" * (span[1] - span[0])

    def _url(self, match: re.Match[str]) -> str:
        text = match[0].rstrip(".,;:!?*…")
        extra = text.count(")") - text.count("(")
        while extra > 0 and text.endswith(")"):
            text, extra = text[:-1].rstrip(".,;:!?*…"), extra - 1
        self._keep("url", text.rstrip("/"), (match.start(), match.start() + len(text)))
        return "\x00" * len(match[0])

    def _numeric_date(self, match: re.Match[str]) -> str:
        start, end = match.span()
        if match["ym"]:
            day = (int(match[0][:4]), int(match["mm"]), 0)
        elif match["y"]:
            day = (int(match[0][:4]), int(match["m"]), int(match["d"]))
        else:
            english, separator = self._how.language == "en", match["sep2"]
            if len(match["yy"]) == 2 and (separator == "-" or (english and separator == ".")):
                return match[0]  # a version, or part of a telephone's number
            first, second = int(match[0][0] + match["a"]), int(match["b"])
            if english and separator != "." and first <= 12:
                first, second = second, first
            day = (int(match["yy"]) + (2000 if len(match["yy"]) == 2 else 0), second, first)
        if not _is_day(*day):
            return match[0]
        if match["t"] is None:
            return self._keep("date", day, (start, end))
        moment = tuple(int(match[name]) for name in ("h", "mi", "s") if match[name])
        self._keep("date", day, (start, match.start("t")))
        self._keep("time", moment, (match.start("t") + 1, end))
        return "\x00" * (end - start)

    def _short_date(self, match: re.Match[str]) -> str:
        day = (0, int(match["b"]), int(match["a"]))
        return match["p"] + self._keep("date", day, (match.start("a"), match.end())) if _is_day(*day) else match[0]

    def _named_date(self, match: re.Match[str]) -> str:
        found = {name: text for name, text in match.groupdict().items() if text}
        month, year = (next((text for name, text in found.items() if name[0] == letter), "") for letter in "my")
        days = [name for name in found if name[0] == "d"]  # two of a range
        said = [(int(year or 0), self._how.months[month.lower()], int(found[name])) for name in days]
        said = said or [(int(year), self._how.months[month.lower()], 0)]
        if not all(_is_day(*day) for day in said):
            return match[0]
        middle = match.end(days[0]) if len(days) == 2 else match.start()
        if len(days) == 2:
            self._keep("date", said[0], (match.start(), middle))
        self._keep("date", said[-1], (middle, match.end()))
        return "\x00" * len(match[0])

    def _time(self, match: re.Match[str]) -> str:
        found = {name[0]: text for name, text in match.groupdict().items() if text}
        hour, minute, second = int(match[0][0] + found.get("h", "")), int(found.get("m", 0)), int(found.get("s", 0))
        if "p" in found and 1 <= hour <= 12:
            hour = hour % 12 + (12 if found["p"] in "pP" else 0)
        if hour > 24 or minute > 59 or second > 59 or (hour == 24 and minute):
            return match[0]
        return self._keep("time", (hour % 24, minute, second) if "s" in found else (hour % 24, minute), match.span())

    def _list_item(self, match: re.Match[str]) -> str:
        number = int(match[1])
        if number not in (1, self._item + 1):
            return match[0]
        self._item = number
        return "\x00" * len(match[0])

    def _chunk(self, match: re.Match[str]) -> str:
        text = match[0]
        if _LETTER.search(text) is None or _are_numbers(text):
            return text
        start = match.start() + len(text) - len(text.lstrip("_"))
        text = text.strip("_")
        if text.lower() not in _NAMES:
            self._keep("id", text, (start, start + len(text)))
        return "\x00" * len(match[0])

    def _number(self, match: re.Match[str]) -> str:
        body, start = match["body"], match.start("body")
        plain = self._plain(body)
        if plain is not None:
            before = _SIGN.search(match.string, max(0, start - 3), start)
            sign = "-" if before and before[1] and before[1] != "+" else ""
            self._decimal(sign + plain + (match["exp"] or ""), (before.start() if before else start, match.end()))
        elif body.count(".") > 1 and "," not in body:
            self._keep("id", body, (start, start + len(body)))
        else:  # a list without spaces
            for piece in re.finditer(r"[\d.]+" if self._how.language == "en" else r"\d+", body):
                span = (start + piece.start(), start + piece.end())
                if (plain := self._plain(piece[0])) is not None:
                    self._decimal(plain, span)
                else:
                    self._keep("id", piece[0], span)
        return match[0]

    def _plain(self, body: str) -> str | None:
        """A number's digits with a point for the decimal mark; None where it is no number in any reading."""
        if body.isdecimal():
            return body
        if self._how.own.fullmatch(body):
            whole, _, decimals = body.partition(self._how.decimal)
            return re.sub(r"\D", "", whole) + (f".{decimals}" if decimals else "")
        if _DOT_DECIMAL.fullmatch(body):
            return body.replace(",", "")
        return body.replace(".", "").replace(",", ".") if _COMMA_DECIMAL.fullmatch(body) else None

    def _decimal(self, text: str, span: tuple[int, int]) -> None:
        if len(text) > LONGEST_NUMBER:
            self._keep("id", self._text[span[0] : span[1]], span)
        else:
            self._keep("number", Decimal(text), span)


def _is_day(year: int, month: int, day: int) -> bool:
    try:
        datetime.date(year or 2024, month, day or 1)  # a leap year
    except ValueError:
        return False
    return True


def _are_numbers(text: str) -> bool:
    """Whether letters beside digits are units or words, and the digits numbers."""
    if _EXPONENT.fullmatch(text):
        return True
    tails = _MEASURE.findall(text)
    if tails and all(tail.rstrip("²³") in _UNITS for tail in tails) and _FIGURES.fullmatch(_MEASURE.sub("", text)):
        return True
    if "_" in text:
        return False
    if "-" not in text:  # Nr.5
        return all(part.isdecimal() or part.isalpha() for part in text.split("."))
    first, *others = text.split("-")
    if first.lower() in _PREFIXES:
        return all(part.replace(".", "").isdecimal() for part in others)
    words = all(part.isalpha() and part.islower() and len(part) > 2 for part in others)
    return words and first.replace(".", "").isdecimal()


def _declared(text: str, declared: Sequence[str]) -> list[Atom]:
    low = folded(text)
    found: list[Atom] = []
    for value in dict.fromkeys(unicodedata.normalize("NFC", one).strip() for one in declared):
        for start in places(low, folded(value)) if value else ():
            span = (start, start + len(value))
            found.append(Atom("declared", text[span[0] : span[1]], value, span))
    return found


def _merged(found: list[Atom]) -> list[Atom]:
    """Without those that overlap a longer one; of equally long ones a declared text gives way."""
    out: list[Atom] = []
    for atom in sorted(found, key=lambda atom: (atom.span[0], -atom.span[1], atom.kind == "declared")):
        if not out or atom.span[0] >= out[-1].span[1]:
            out.append(atom)
        elif atom.span[1] - atom.span[0] > out[-1].span[1] - out[-1].span[0]:
            out[-1] = atom
    return out


def _with_quotes(text: str, found: list[Atom]) -> list[Atom]:
    starts, ends = [atom.span[0] for atom in found], [atom.span[1] for atom in found]
    out, done = list[Atom](), 0
    for match in _QUOTES.finditer(text):
        content = match[match.lastindex or 0]
        inner = " ".join(content.split()).rstrip(" .,;:!?")
        low, high = bisect_left(ends, match.start() + 1), bisect_left(starts, match.end())
        if len(inner) < SHORTEST_QUOTE or content[-1].isspace() != content[0].isspace() or high - low > 1:
            continue
        if high > low and (len(found[low].text) >= len(inner) or not _within(found[low].span, match.span())):
            continue
        out += [*found[done:low], Atom("quoted", match[0], inner, match.span())]
        done = high
    return out + found[done:]


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]
