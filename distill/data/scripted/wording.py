"""How the scripted teacher tells what a tool gave. Values are copied from the result, nothing is added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TASKS = {
    "get_weather": "get the forecast", "web_search": "search the web", "calculate": "do the calculation",
    "convert_units": "convert that", "convert_currency": "convert the amount", "find_events": "look into your calendar",
    "create_event": "create the event", "move_event": "move the event", "search_email": "search your mailbox",
    "send_email": "send the mail", "list_files": "list the files", "read_file": "read the file",
    "search_notes": "search your notes", "append_to_note": "add to the note", "get_directions": "find a route",
    "find_places": "look for places", "find_contact": "look into your contacts", "get_stock_quote": "get the price",
    "translate": "translate that", "set_reminder": "set the reminder", "play_music": "play the music",
    "set_device": "switch the device", "search_code": "search the code", "create_ticket": "open the ticket",
    "find_tickets": "list the tickets", "get_order": "look up the order", "track_shipment": "track the parcel",
    "query_table": "query the table", "check_url": "check the address", "set_timer": "start the timer",
    "define_word": "look the word up", "search_flights": "search for flights", "book_flight": "book the flight",
    "date_difference": "count the time",
}  # fmt: skip
"""What each tool is for, after `I could not`."""


def failure(tool: str, message: str) -> str:
    """That it did not work, and why."""
    return f"I could not {TASKS[tool]}: {message}."


def cap(text: str) -> str:
    """With a capital."""
    return text[0].upper() + text[1:]


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def found(things: Sequence[str], none: str) -> str:
    """A sentence with all of them, or that there are none."""
    return f"I found {'; '.join(things)}." if things else none


def moment(text: str) -> str:
    """`2026-03-05T09:30:00Z` as `2026-03-05 at 09:30`."""
    day, _, time = text.partition("T")
    return f"{day} at {time[:5]}"


def event(row: dict[str, Any]) -> str:
    """An event of the calendar."""
    return f"{row['title']} on {moment(row['start'])} for {row['minutes']} minutes"


def mail(row: dict[str, Any]) -> str:
    """A mail in a list."""
    return f'"{row["subject"]}" from {row["from"]}, received on {row["received"].partition("T")[0]}'


def flight(row: dict[str, Any]) -> str:
    """A flight in a list."""
    stops = {0: "direct", 1: "1 stop"}.get(row["stops"], f"{row['stops']} stops")
    return f"{row['flight_id']} at {row['departs']}, {row['minutes']} minutes, {stops}, {row['price_eur']} euros"


def ticket(row: dict[str, Any]) -> str:
    """A ticket in a list."""
    return f'{row["ticket_id"]} "{row["title"]}", {row["status"]}, {row["age_days"]} days old'


def place(row: dict[str, Any]) -> str:
    """A place in a list."""
    return f"{row['name']}, {row['metres']} metres away, rated {row['rating']}, open until {row['open_until']}"


def weather(result: dict[str, Any], when: str) -> str:
    """A forecast."""
    return (f"The forecast for {result['city']} {when} says {result['condition']}, {result['temperature']} degrees "
            f"and a {result['rain_chance']} percent chance of rain")  # fmt: skip


def order(result: dict[str, Any]) -> str:
    """An order."""
    return (f"Order {result['order_id']} of {result['placed']} is {result['status']}; the total is {result['total']} "
            f"{result['currency']}")  # fmt: skip


def parcel(result: dict[str, Any]) -> str:
    """A parcel."""
    return (f"Parcel {result['tracking_number']} is {result['status']} in {result['location']}, expected on "
            f"{result['expected']}")  # fmt: skip


def definition(result: dict[str, Any]) -> str:
    """A word."""
    return f'"{result["word"]}" ({result["part_of_speech"]}) means: {result["definition"]}'


def quote(result: dict[str, Any]) -> str:
    """A share."""
    return f"{result['symbol']} is at {result['price']}, a change of {result['change_percent']} percent"
