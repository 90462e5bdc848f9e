"""What a user's words mean: days, numbers, units and names, as the tools want them."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence

from distill.data.prompts.strata import MONTHS, WEEKDAYS

CURRENCIES = {"euros": "EUR", "US dollars": "USD", "British pounds": "GBP", "Japanese yen": "JPY",
              "Swiss francs": "CHF", "Swedish kronor": "SEK", "Canadian dollars": "CAD", "Australian dollars": "AUD",
              "Indian rupees": "INR", "Brazilian reais": "BRL"}  # fmt: skip
UNITS = {"miles": "mile", "kilometres": "km", "feet": "foot", "metres": "m", "inches": "inch", "centimetres": "cm",
         "pounds": "pound", "kilograms": "kg", "ounces": "ounce", "grams": "g", "US gallons": "gallon_us",
         "litres": "l", "US cups": "cup_us", "degrees Fahrenheit": "fahrenheit", "Fahrenheit": "fahrenheit",
         "degrees Celsius": "celsius", "Celsius": "celsius", "kilowatt hours": "kwh", "kilojoules": "kj",
         "hours": "hour", "minutes": "minute", "days": "day"}  # fmt: skip
LANGUAGES = {"French": "fr", "German": "de", "Spanish": "es", "Italian": "it"}
MODES = {"on foot": "walk", "by bicycle": "bicycle", "by car": "car", "by public transport": "transit"}
EXTENSIONS = {"PDF": "pdf", "CSV": "csv", "Python": "py", "Markdown": "md", "JSON": "json", "text": "txt",
              "log": "log"}  # fmt: skip
_ARTICLES = ("the ", "our ")


class Unclear(Exception):
    """The words can be understood in more than one way: no gold call."""


class Said:
    """The values of one request, by kind and in order, and the day on which it is made."""

    def __init__(self, today: datetime.date, values: Mapping[str, Sequence[str]]) -> None:
        self.today, self._values = today, values

    def __call__(self, slot: str, nth: int = 0) -> str:
        """As it was said."""
        return self._values[slot][nth]

    def has(self, slot: str) -> bool:
        """Whether there is a value of a kind."""
        return slot in self._values

    def all(self, slot: str) -> list[str]:
        """Every value of a kind."""
        return list(self._values[slot])

    def number(self, slot: str, nth: int = 0) -> int | float:
        """A whole number without a point."""
        text = self(slot, nth)
        return float(text) if "." in text else int(text)

    def date(self, nth: int = 0, slot: str = "date") -> str:
        """`5 March 2026` as 2026-03-05."""
        day, month, year = self(slot, nth).split()
        return datetime.date(int(year), MONTHS.index(month) + 1, int(day)).isoformat()

    def time(self) -> str:
        """HH:MM."""
        return self("time").rjust(5, "0")

    def days(self) -> tuple[str, str]:
        """First and last day of `when`. Unclear where people would take it for different days."""
        first, last = _days(self("when"), self.today)
        return first.isoformat(), last.isoformat()

    def day(self) -> str:
        """The one day of `when`."""
        first, last = self.days()
        if first != last:
            raise Unclear(self("when"))
        return first

    def units(self) -> tuple[str, str]:
        """Both units of a conversion, as the tool calls them."""
        source, target = self("lengths").split(" to ")
        return UNITS[source], UNITS[target]

    def unit_names(self) -> tuple[str, str]:
        """Both units as people call them."""
        source, target = self("lengths").split(" to ")
        return source, f"degrees {target}" if source.startswith("degrees ") else target

    def bare(self, slot: str) -> str:
        """Without its article: what one searches for."""
        text = self(slot)
        return next((text.removeprefix(article) for article in _ARTICLES if text.startswith(article)), text)


def _days(when: str, today: datetime.date) -> tuple[datetime.date, datetime.date]:
    fixed = {"today": 0, "tonight": 0, "tomorrow": 1, "the day after tomorrow": 2}
    if when in fixed:
        day = today + datetime.timedelta(days=fixed[when])
        return day, day
    name = when.rpartition(" ")[2]
    if when == "this weekend":
        if today.weekday() >= WEEKDAYS.index("Saturday"):
            raise Unclear(when)  # it has begun
        name = "Saturday"
    wanted = WEEKDAYS.index(name)
    ahead = (wanted - today.weekday()) % 7 or 7
    if ahead == 7 and when.startswith("on "):
        raise Unclear(when)  # today, or in a week
    if when.startswith("next ") and today.weekday() < wanted:
        raise Unclear(when)  # of this week, or of the next
    day = today + datetime.timedelta(days=ahead)
    return day, day + datetime.timedelta(days=int(when == "this weekend"))
