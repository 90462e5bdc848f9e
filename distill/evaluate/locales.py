"""How the languages of evaluation sets write numbers, dates and times: patterns, none of which backtracks far.

Most begin with a digit and only then look behind it: so a search runs from digit to digit."""

# ruff: noqa: RUF001
from __future__ import annotations

import functools
import re
from typing import NamedTuple

SPACE = "[ \u00a0\u202f]"
_MONTHS = {
    "en": "january/jan february/feb march/mar april/apr may june/jun july/jul august/aug september/sept/sep"
    " october/oct november/nov december/dec",
    "de": "januar/jänner/jan februar/feb märz/mär/mrz april/apr mai juni/jun juli/jul august/aug september/sept/sep"
    " oktober/okt november/nov dezember/dez",
    "fr": "janvier/janv février/févr/fév mars avril/avr mai juin juillet/juil août septembre/sept octobre/oct"
    " novembre/nov décembre/déc",
    "es": "enero/ene febrero/feb marzo/mar abril/abr mayo/may junio/jun julio/jul agosto/ago"
    " septiembre/setiembre/sept/sep octubre/oct noviembre/nov diciembre/dic",
    "it": "gennaio/gen febbraio/feb marzo/mar aprile/apr maggio/mag giugno/giu luglio/lug agosto/ago"
    " settembre/sett/set ottobre/ott novembre/nov dicembre/dic",
    "pt": "janeiro/jan fevereiro/fev março/mar abril/abr maio/mai junho/jun julho/jul agosto/ago"
    " setembro/set outubro/out novembro/nov dezembro/dez",
    "sv": "januari/jan februari/feb mars/mar april/apr maj juni/jun juli/jul augusti/aug september/sept/sep"
    " oktober/okt november/nov december/dec",
    "nb": "januar/jan februar/feb mars/mar april/apr mai juni/jun juli/jul august/aug september/sept/sep"
    " oktober/okt november/nov desember/des",
}


class Convention(NamedTuple):
    """How a language writes."""

    language: str
    number: re.Pattern[str]
    """What may be a number without its sign: `body` and `exp`."""
    own: re.Pattern[str]
    """A body that is a number by the language's own marks."""
    decimal: str
    named_date: re.Pattern[str]
    time: re.Pattern[str]
    """A digit, and in groups `h`, `m`, `s` and `p` (am or pm), each with a figure for its form, what follows."""
    hints: tuple[str, ...]
    """What the months' names begin with, in lower case."""
    months: dict[str, int]
    """By names in lower case, English and the language's."""


def convention(locale: str) -> Convention:
    """Of a locale such as `de`, `pt-BR` or `en_GB`; an unknown one writes as English does."""
    language = re.split("[-_]", locale, maxsplit=1)[0].lower()
    language = {"no": "nb", "nn": "nb"}.get(language, language)
    return _convention(language if language in _MONTHS else "en")


@functools.cache
def _convention(language: str) -> Convention:
    thousands = {"en": ",", "de": ".", "es": ".", "it": ".", "pt": "."}.get(language, " ")
    spaces = "\u202f\u00a0\u2009" + (" " if thousands == " " else "")
    decimal = "." if language == "en" else ","
    number = re.compile(rf"(?P<body>\d++(?:[.,]\d++|[{spaces}]\d{{3}}(?!\d))*+)(?P<exp>[eE][+-]?\d{{1,3}}(?!\w))?")
    grouped = rf"[1-9]\d{{0,2}}(?:([{thousands}{spaces}])\d{{3}}(?:\1\d{{3}})*+)"
    own = re.compile(rf"(?:{grouped}|\d+)(?:[{decimal}]\d+)?")
    months = {
        name: 1 + i
        for tongue in ("en", language)
        for i, names in enumerate(_MONTHS[tongue].split())
        for name in names.split("/")
    }
    hints = tuple(sorted({name[:3] for name in months}))
    return Convention(language, number, own, decimal, _named_dates(language), _times(language), hints, months)


def _named_dates(language: str) -> re.Pattern[str]:
    """`12[-14] March [2026]`, `March 12[-14][, 2026]` with English names, `March 2026`. English names begin with a
    capital: may is a verb, too."""
    english = "|".join(form for name in re.split("[ /]", _MONTHS["en"]) for form in (name.title(), name.upper()))
    own = "|".join(sorted(re.split("[ /]", _MONTHS[language]), key=len, reverse=True))
    months = f"(?:{english})" if language == "en" else f"(?:{english}|(?i:{own}))"
    to = rf"(?:{SPACE}?[-–]{SPACE}?|{SPACE}(?:to|bis|au|al|till?){SPACE})"
    suffix, of = r"(?:st|nd|rd|th|er|\.|º|°)?", rf"(?:of{SPACE}|del?{SPACE}|d['’])?"
    day = rf"(?P<d>\d{{1,2}}){suffix}{SPACE}{{1,2}}{of}(?P<m>{months})(?!\w)"
    month = rf"(?P<m2>{english})\.?{SPACE}(?P<d2>\d{{1,2}}){suffix}(?:{to}(?P<d3>\d{{1,2}}){suffix})?"
    return re.compile(
        rf"(?<![\w,/])(?<!\d[.:-])"
        rf"(?:(?:(?P<d0>\d{{1,2}}){suffix}{to})?{day}(?:\.?,?{SPACE}{{1,2}}(?:del?{SPACE})?(?P<y>\d{{4}})(?!\w))?"
        rf"|{month}(?!\w|[.:]\d|,\d{{3}}(?!\d))(?:,?{SPACE}?(?P<y2>\d{{4}})(?!\w))?"
        rf"|(?P<m3>{months}){SPACE}(?:del?{SPACE})?(?P<y3>\d{{4}})(?!\w))"
    )


def _times(language: str) -> re.Pattern[str]:
    noon = rf"(?:{SPACE}?(?P<p0>[aApP])\.?[mM](?!\w)\.?)?" if language == "en" else ""
    clock = r"(?P<h0>\d?):(?P<m0>\d\d)(?::(?P<s0>\d\d)(?:[.,]\d{1,9}+)?)?(?!\d|:\d)"
    forms = [clock + noon + r"(?:[Zz]\b|[+-]\d\d:\d\d)?"]
    if language == "en":
        to = rf"(?:{SPACE}?[-–]{SPACE}?|{SPACE}to{SPACE})"  # 9 to 11:30 am
        end = rf"(?=\d{{1,2}}(?::\d\d)?{SPACE}?(?P<p2>[aApP])\.?[mM](?!\w))"
        forms.insert(0, rf"(?P<h2>\d?)(?::(?P<m2>\d\d))?{to}{end}")
        forms.append(rf"(?P<h1>\d?){SPACE}?(?P<p1>[aApP])\.?[mM](?!\w)\.?")
    if language == "de":
        forms.append(rf"(?P<h1>\d?)(?:\.(?P<m1>\d\d))?{SPACE}?Uhr(?!\w)(?:{SPACE}(?P<m2>\d\d)(?![\w.,]))?")
    if language in ("fr", "pt", "es", "it"):
        forms.append(rf"(?P<h1>\d?){SPACE}?h{SPACE}?(?P<m1>\d\d)(?!\w)")
        forms.append(rf"(?:(?<=à{SPACE}\d)|(?<=às{SPACE}\d)|(?<=dès{SPACE}\d))(?P<h2>\d?){SPACE}?h(?!\w)")
    if language in ("sv", "nb", "it"):
        words = ("ore", "alle") if language == "it" else ("kl", r"kl\.", "klockan", "klokken")
        behind = "|".join(rf"(?<={word}{SPACE}\d)" for word in words)
        forms.append(rf"(?i:{behind})(?P<h3>\d?)(?:\.(?P<m3>\d\d))?(?![\w:]|\.\d)")
    return re.compile(r"\d(?<![\w:]\d)(?<!\d[.,]\d)(?:" + "|".join(forms) + ")")
