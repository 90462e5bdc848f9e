"""How people write the numbers and days of a result: the first form is the one that answers use."""

from __future__ import annotations

import datetime
from decimal import Decimal

MONTHS = {
    "en": ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
           "November", "December"),
    "de": ("Januar", "Februar", "März", "April", "Mai", "Juni", "Juli", "August", "September", "Oktober", "November",
           "Dezember"),
    "fr": ("janvier", "février", "mars", "avril", "mai", "juin", "juillet", "août", "septembre", "octobre",
           "novembre", "décembre"),
    "es": ("enero", "febrero", "marzo", "abril", "mayo", "junio", "julio", "agosto", "septiembre", "octubre",
           "noviembre", "diciembre"),
    "it": ("gennaio", "febbraio", "marzo", "aprile", "maggio", "giugno", "luglio", "agosto", "settembre", "ottobre",
           "novembre", "dicembre"),
}  # fmt: skip
WEEKDAYS = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "de": ("Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"),
    "fr": ("lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "dimanche"),
    "es": ("lunes", "martes", "miércoles", "jueves", "viernes", "sábado", "domingo"),
    "it": ("lunedì", "martedì", "mercoledì", "giovedì", "venerdì", "sabato", "domenica"),
}
# thousands (the first is the one that answers use) and decimals
_MARKS = {"en": ((",",), "."), "de": ((".",), ","), "es": ((".",), ","), "it": ((".",), ","),
          "fr": (("\u202f", "\u00a0", " "), ",")}  # fmt: skip


def number_forms(value: int | float, locale: str) -> tuple[str, ...]:
    """A number with and without thousands marks; of one with a decimal also with two, as money is written."""
    exact = Decimal(repr(value))
    if exact == exact.to_integral_value():
        exact = exact.to_integral_value()
    thousands, point = _MARKS[locale]
    plain = [exact]
    if -2 < int(exact.as_tuple().exponent) < 0:
        plain.append(exact.quantize(Decimal("0.01")))
    forms = []
    for number in plain:
        forms += [f"{number:,f}".replace(".", "\0").replace(",", mark).replace("\0", point) for mark in thousands]
        forms.append(f"{number:f}".replace(".", point))
    return tuple(dict.fromkeys(forms))


def day_forms(day: datetime.date, locale: str) -> tuple[str, ...]:
    """A day in words and in figures; last without its year, which the conversation says."""
    number, month, name = day.day, day.month, MONTHS[locale][day.month - 1]
    year = day.year
    if locale == "en":
        return (f"{number} {name} {year}", f"{name} {number}, {year}", f"{number} {name}", f"{name} {number}")
    figures = (f"{number:02}.{month:02}.{year}", f"{number}.{month}.{year}")
    if locale == "de":
        return (f"{number}. {name} {year}", *dict.fromkeys(figures), f"{number}. {name}")
    slashed = f"{number:02}/{month:02}/{year}"
    first = {"fr": "1er", "it": "1º"}.get(locale, "1") if number == 1 else str(number)
    joint = " de " if locale == "es" else " "
    return (f"{first}{joint}{name}{joint}{year}", slashed, f"{first}{joint}{name}")
