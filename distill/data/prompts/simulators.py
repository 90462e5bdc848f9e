"""The built-in tools whose results follow from their arguments, as pure functions of arguments and a draw."""

from __future__ import annotations

import datetime
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

from distill.broker import ToolError
from distill.draw import Draw

Arguments = Mapping[str, Any]

# of each unit: what it measures, and how many of the base unit it is
UNITS = {
    "m": ("length", 1.0), "km": ("length", 1000.0), "cm": ("length", 0.01), "mile": ("length", 1609.344),
    "foot": ("length", 0.3048), "inch": ("length", 0.0254), "kg": ("mass", 1.0), "g": ("mass", 0.001),
    "pound": ("mass", 0.45359237), "ounce": ("mass", 0.028349523125), "l": ("volume", 1.0), "ml": ("volume", 0.001),
    "gallon_us": ("volume", 3.785411784), "cup_us": ("volume", 0.2365882365), "celsius": ("temperature", 1.0),
    "fahrenheit": ("temperature", 5 / 9), "kwh": ("energy", 3.6e6), "kj": ("energy", 1000.0),
    "kcal": ("energy", 4184.0), "hour": ("time", 3600.0), "minute": ("time", 60.0), "day": ("time", 86400.0),
}  # fmt: skip
# units of each currency for one euro; a draw moves them by up to 2%
CURRENCIES = {"EUR": 1.0, "USD": 1.09, "GBP": 0.85, "JPY": 165.0, "CHF": 0.96, "SEK": 11.3, "CAD": 1.48, "AUD": 1.66,
              "INR": 91.0, "BRL": 5.9}  # fmt: skip
PHRASES = {
    "good morning": ("bonjour", "guten Morgen", "buenos días", "buongiorno"),
    "thank you very much": ("merci beaucoup", "vielen Dank", "muchas gracias", "grazie mille"),
    "where is the station": ("où est la gare", "wo ist der Bahnhof", "dónde está la estación", "dov'è la stazione"),
    "the bill, please": ("l'addition, s'il vous plaît", "die Rechnung, bitte", "la cuenta, por favor",
                         "il conto, per favore"),
    "see you tomorrow": ("à demain", "bis morgen", "hasta mañana", "a domani"),
    "happy birthday": ("joyeux anniversaire", "alles Gute zum Geburtstag", "feliz cumpleaños", "buon compleanno"),
    "i am sorry": ("je suis désolé", "es tut mir leid", "lo siento", "mi dispiace"),
    "how much does it cost": ("combien ça coûte", "wie viel kostet das", "cuánto cuesta", "quanto costa"),
    "we need help": ("nous avons besoin d'aide", "wir brauchen Hilfe", "necesitamos ayuda", "abbiamo bisogno di aiuto"),
    "the train is late": ("le train est en retard", "der Zug hat Verspätung", "el tren llega tarde",
                          "il treno è in ritardo"),
    "a table for two": ("une table pour deux", "ein Tisch für zwei", "una mesa para dos", "un tavolo per due"),
    "good night": ("bonne nuit", "gute Nacht", "buenas noches", "buonanotte"),
}  # fmt: skip
WORDS = {
    "ephemeral": ("adjective", "lasting for a very short time"),
    "candid": ("adjective", "open and honest in what is said"),
    "ubiquitous": ("adjective", "found everywhere at once"),
    "meander": ("verb", "to follow a winding path without hurry"),
    "lucid": ("adjective", "easy to understand; thinking clearly"),
    "thrift": ("noun", "care in spending money"),
    "wane": ("verb", "to become smaller or weaker by degrees"),
    "brevity": ("noun", "shortness, of speech or of time"),
    "diligent": ("adjective", "working with steady care"),
    "quaint": ("adjective", "pleasantly old-fashioned"),
    "resilient": ("adjective", "able to recover after difficulty"),
    "obsolete": ("adjective", "no longer used, since something newer exists"),
    "scrutiny": ("noun", "close and careful examination"),
    "harbinger": ("noun", "a sign of something that is about to come"),
    "tacit": ("adjective", "understood without being said"),
    "frugal": ("adjective", "using no more than is needed"),
}
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_LANGUAGES = ("fr", "de", "es", "it")
_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv,
    "power": operator.pow,
}  # fmt: skip


def calculate(arguments: Arguments, draw: Draw) -> dict[str, Any]:
    """Arithmetic from left to right."""
    name, operands = arguments["operation"], [float(value) for value in arguments["operands"]]
    try:
        if name == "average":
            value = sum(operands) / len(operands)
        else:
            value = functools.reduce(_OPERATIONS[name], operands)
        return {"value": _number(value, arguments.get("round_to", 10))}
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ToolError("math_error", "the result is not a finite real number") from error


def convert_units(arguments: Arguments, draw: Draw) -> dict[str, Any]:
    """Exact factors; temperatures by their offset too."""
    (kind, factor), (other, divisor) = UNITS[arguments["from_unit"]], UNITS[arguments["to_unit"]]
    if kind != other:
        raise ToolError(
            "incompatible_units", f"{arguments['from_unit']} measures {kind}, {arguments['to_unit']} {other}"
        )
    zero = {"fahrenheit": 32.0}
    base = (arguments["value"] - zero.get(arguments["from_unit"], 0.0)) * factor
    value = base / divisor + zero.get(arguments["to_unit"], 0.0)
    return {"value": _number(value, 4), "unit": arguments["to_unit"]}


def convert_currency(arguments: Arguments, draw: Draw) -> dict[str, Any]:
    """Near today's order of magnitude, never a real rate."""
    same = arguments["from"] == arguments["to"]
    rate = CURRENCIES[arguments["to"]] / CURRENCIES[arguments["from"]]
    rate = 1.0 if same else float(f"{rate * (0.98 + 0.04 * draw.uniform()):.4g}")
    return {"amount": _number(arguments["amount"] * rate, 2), "currency": arguments["to"], "rate": rate}


def find_events(arguments: Arguments, draw: Draw) -> dict[str, Any]:
    """Events inside the range."""
    start, end = _day(arguments["range"]["start"]), _day(arguments["range"]["end"])
    if end < start:
        raise ToolError("invalid_range", "the range ends before it starts")
    titles = ("Stand-up", "Design review", "Dentist", "Lunch with the team", "Interview", "Yoga", "Piano lesson")
    events = []
    for _ in range(draw.below(4)):
        day = start + datetime.timedelta(days=draw.below((end - start).days + 1))
        title = f"{draw.choice(titles)}{': ' + arguments['query'] if arguments.get('query') else ''}"
        events.append({"event_id": f"EV-{draw.between(10_000, 99_999)}", "title": title,
                       "start": f"{day}T{draw.between(8, 18):02}:{draw.choice(('00', '30'))}:00Z",
                       "minutes": 15 * draw.between(1, 8)})  # fmt: skip
    return {"events": sorted(events, key=lambda event: str(event["start"]))}


def translate(arguments: Arguments, draw: Draw) -> dict[str, Any]:
    """A phrase book."""
    known = PHRASES.get(" ".join(arguments["text"].lower().strip(" .!?\"'").split()))
    if known is None:
        raise ToolError("not_supported", "the phrase book has no translation of this text")
    return {"translation": known[_LANGUAGES.index(arguments["target"])], "target": arguments["target"]}


def define_word(arguments: Arguments, draw: Draw) -> dict[str, Any]:
    """A small dictionary."""
    part, meaning = WORDS.get(arguments["word"].lower(), ("", ""))
    return {"word": arguments["word"], "found": bool(part), "part_of_speech": part, "definition": meaning}


def date_difference(arguments: Arguments, draw: Draw) -> dict[str, Any]:
    """Days or weeks from start to end."""
    start, end = _day(arguments["start"]), _day(arguments["end"])
    days, unit = (end - start).days, arguments.get("unit", "days")
    return {
        "value": days if unit == "days" else _number(days / 7, 2),
        "unit": unit,
        "weekday_of_end": _WEEKDAYS[end.weekday()],
    }


def query_table(arguments: Arguments, draw: Draw) -> dict[str, Any]:
    """Rows in the order and number asked for."""
    names = ("Ada Winter", "Ben Okafor", "Carla Rossi", "David Lind", "Elif Kaya", "Farid Rahimi", "Grace Mensah")
    matched = draw.choice((0, 1, 2, 3, 7, 18, 64, 211))
    day = datetime.date(2026, 1, 1)
    rows = [
        {"id": draw.between(1, 99_999), "name": name, "amount": _number(1 + 4999 * draw.uniform(), 2),
         "created": str(day + datetime.timedelta(days=draw.below(300)))}
        for name in draw.sample(names, min(matched, 4, arguments.get("limit", 4)))
    ]  # fmt: skip
    return {"rows": rows, "matched": matched}


def search_flights(arguments: Arguments, draw: Draw) -> dict[str, Any]:
    """Flights in the order of departure."""
    if arguments["from"] == arguments["to"]:
        raise ToolError("invalid_route", "origin and destination are the same airport")
    stops = (0,) if arguments.get("direct_only") else (0, 0, 1, 2)
    flights = []
    for _ in range(draw.below(5)):
        changes = draw.choice(stops)
        flights.append({"flight_id": f"{draw.choice(('QA', 'ZN', 'VX', 'OB'))}{draw.between(1000, 9999)}",
                        "departs": f"{draw.between(6, 22):02}:{draw.below(6)}5", "minutes": draw.between(55, 260)
                        + 160 * changes, "price_eur": draw.between(39, 700), "stops": changes})  # fmt: skip
    return {"flights": sorted(flights, key=lambda flight: str(flight["departs"]))}


def _day(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ToolError("invalid_date", f"{text} is not a day of the calendar") from error


def _number(value: float, digits: int) -> int | float:
    """Rounded; a whole number without its `.0`."""
    if not abs(value) < 1e300:
        raise ToolError("math_error", "the result is not a finite number")
    value = round(value, digits)
    return int(value) if value == int(value) and abs(value) < 2**53 else value


SIMULATORS: dict[str, Callable[[Arguments, Draw], Any]] = {
    function.__name__: function
    for function in (calculate, convert_units, convert_currency, find_events, translate, define_word, date_difference,
                     query_table, search_flights)
}  # fmt: skip
