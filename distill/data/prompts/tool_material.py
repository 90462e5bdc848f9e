"""The built-in tools: what a model is shown of each, and the JSON schema of what it returns."""

from __future__ import annotations

from typing import Any

from distill.broker import Tool
from distill.data.prompts.simulators import CURRENCIES, SIMULATORS, UNITS

Schema = dict[str, Any]
DATE, TIME, MOMENT = r"^\d{4}-\d{2}-\d{2}$", r"^\d{2}:\d{2}$", r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z?$"
PHONE = r"^\+1[2-9][0-9]{2}55501[0-9]{2}$"  # of the range kept for fiction
MAIL = r"^[^@\s]+@[^@\s]+\.[a-z]+$"


def text(what: str = "", **more: Any) -> Schema:
    """A string."""
    return {"type": "string"} | ({"description": what} if what else {}) | more


def date(what: str = "", **more: Any) -> Schema:
    """A date, YYYY-MM-DD."""
    return text(what, format="date", pattern=DATE) | more


def whole(low: int, high: int, what: str = "", **more: Any) -> Schema:
    """An integer in a range."""
    return {"type": "integer"} | ({"description": what} if what else {}) | {"minimum": low, "maximum": high} | more


def number(low: float, high: float, what: str = "", *, digits: int | None = None) -> Schema:
    """A number in a range; `digits` of a made-up one, other than 2."""
    out = whole(0, 0, what) | {"type": "number", "minimum": low, "maximum": high}
    return out if digits is None else out | {"x-digits": digits}


def flag(what: str = "") -> Schema:
    """A boolean."""
    return {"type": "boolean"} | ({"description": what} if what else {})


def one_of(*choices: str, what: str = "", **more: Any) -> Schema:
    """An enum of strings."""
    return {"type": "string", "enum": list(choices)} | ({"description": what} if what else {}) | more


def many(items: Schema, low: int, high: int, what: str = "") -> Schema:
    """An array of so many items."""
    out = {"type": "array", "items": items, "minItems": low, "maxItems": high}
    return out | ({"description": what} if what else {})


def record(needed: dict[str, Schema], optional: dict[str, Schema] | None = None, what: str = "") -> Schema:
    """An object with these keys and no others."""
    out: Schema = {"type": "object"} | ({"description": what} if what else {})
    out |= {"properties": needed | (optional or {}), "required": list(needed), "additionalProperties": False}
    return out


def echo(path: str, *otherwise: str) -> Schema:
    """The text of an argument, or one of these where it is not given."""
    return text(**{"x-argument": path}) | ({"examples": list(otherwise)} if otherwise else {})


def tool(name: str, what: str, needed: dict[str, Schema], optional: dict[str, Schema], returns: dict[str, Schema],
         *errors: tuple[str, str]) -> Tool:  # fmt: skip
    """A built-in tool."""
    function = {"name": name, "description": what, "parameters": record(needed, optional)}
    return Tool(function, record(returns), SIMULATORS.get(name), errors)


PEOPLE = ("Ada Winter", "Ben Okafor", "Carla Rossi", "David Lind", "Elif Kaya", "Farid Rahimi", "Grace Mensah",
          "Hugo Martin", "Ines Duarte", "Jonas Weber", "Kemi Adeyemi", "Liam Byrne", "Mina Park", "Nils Berg",
          "Olga Petrova", "Pablo Vega", "Rosa Conti", "Sam Taylor", "Tara Singh", "Yuki Mori")  # fmt: skip
SUBJECTS = ("Budget for the next quarter", "Notes of the planning meeting", "Invoice 2281", "Your booking is confirmed",
            "Draft of the contract", "Photos from the trip", "Change of the delivery date", "Feedback on the report",
            "Team lunch on Thursday", "Access to the shared folder")  # fmt: skip
EVENTS = ("Stand-up", "Design review", "Dentist", "Lunch with the team", "Interview", "Parents' evening", "Yoga",
          "Call with the supplier", "Release planning", "Piano lesson")  # fmt: skip
PATHS = ("notes/plan.md", "reports/summary.txt", "src/app/main.py", "data/sales.csv", "config/settings.yaml",
         "docs/setup.md", "logs/server.log", "src/app/parser.py")  # fmt: skip
PLACES = ("Corner House", "The Green Door", "Riverside", "Old Mill", "Harbour View", "Lantern", "Blue Heron",
          "Market Hall")  # fmt: skip
TITLES = ("Slow Rivers", "Paper Moon Road", "Northern Lamp", "A Quiet Engine", "Tin Roof Rain", "Second Summer")
LINES = (
    "timeout = 30",
    "retries = 4",
    "owner = ops",
    "# to be done",
    "total = 1288",
    "debug = false",
    "region = north",
)
NOT_FOUND, DENIED, BUSY = "not_found", "permission_denied", "unavailable"

TOOLS: tuple[Tool, ...] = (
    tool("get_weather", "Weather forecast for a city on a day.", {"city": text("City name", minLength=1)},
         {"date": date("Day; today where it is absent"), "units": one_of("celsius", "fahrenheit")},
         {"city": echo("city"), "condition": one_of("sunny", "cloudy", "rain", "snow", "thunderstorm", "fog"),
          "temperature": number(-18, 39, digits=1), "wind_kmh": whole(0, 90), "rain_chance": whole(0, 100)},
         (NOT_FOUND, "no weather station near {city}")),
    tool("web_search", "Search the web.", {"query": text("What to look for", minLength=1, maxLength=300)},
         {"max_results": whole(1, 10), "site": text("Only this domain"), "newer_than_days": whole(1, 3650)},
         {"results": many(record({"title": text(examples=[f"{a}: {b}" for a in ("Guide", "News", "Review", "Overview")
                                                          for b in TITLES]),
                                  "url": text(format="uri"), "published": date()}), 0, 4)},
         (BUSY, "the search index is being rebuilt")),
    tool("calculate", "Exact arithmetic on a list of numbers, from left to right.",
         {"operation": one_of("add", "subtract", "multiply", "divide", "power", "average"),
          "operands": many({"type": "number"}, 2, 12)}, {"round_to": whole(0, 10, "Decimals")},
         {"value": {"type": "number"}}),
    tool("convert_units", "Convert a measurement.",
         {"value": {"type": "number"}, "from_unit": one_of(*UNITS), "to_unit": one_of(*UNITS)}, {},
         {"value": {"type": "number"}, "unit": echo("to_unit")}),
    tool("convert_currency", "Convert an amount of money.",
         {"amount": {"type": "number", "exclusiveMinimum": 0}, "from": one_of(*CURRENCIES), "to": one_of(*CURRENCIES)},
         {"date": date("Rate of this day; today where it is absent")},
         {"amount": {"type": "number"}, "currency": echo("to"), "rate": {"type": "number"}},
         (BUSY, "no rates are available for {from} at the moment")),
    tool("find_events", "Events in the user's calendar within a range of days.",
         {"range": record({"start": date(), "end": date()})},
         {"query": text("Words in the title"), "calendars": many(one_of("work", "home", "family"), 1, 3)},
         {"events": many(record({"event_id": text(pattern="^EV-[0-9]{5}$"), "title": text(examples=list(EVENTS)),
                                 "start": text(format="date-time"), "minutes": whole(15, 180, multipleOf=15)}), 0, 4)}),
    tool("create_event", "Put an event into the user's calendar.",
         {"title": text(minLength=1), "start": text("Local time, YYYY-MM-DDTHH:MM:SS", pattern=MOMENT)},
         {"duration_minutes": whole(5, 480), "location": text(), "calendar": one_of("work", "home", "family"),
          "attendees": many(record({"name": text()}, {"email": text(pattern=MAIL)}), 1, 20)},
         {"event_id": text(pattern="^EV-[0-9]{5}$"), "title": echo("title"), "start": echo("start"),
          "conflicts": many(text(examples=list(EVENTS)), 0, 1)}),
    tool("move_event", "Move an event to another time.",
         {"event_id": text(pattern="^EV-[0-9]{5}$"), "new_start": text("YYYY-MM-DDTHH:MM:SS", pattern=MOMENT)},
         {"notify": flag("Tell the attendees")},
         {"event_id": echo("event_id"), "start": echo("new_start"), "notified": whole(0, 8)},
         ("conflict", "another event is at {new_start}")),
    tool("search_email", "Search the user's mailbox.", {},
         {"query": text("Words in subject or text"), "from": text("Sender's name or address"), "unread_only": flag(),
          "since": date(), "limit": whole(1, 20)},
         {"messages": many(record({"message_id": text(pattern="^MSG-[0-9]{6}$"), "from": text(examples=list(PEOPLE)),
                                   "subject": text(examples=list(SUBJECTS)), "received": text(format="date-time"),
                                   "unread": flag()}), 0, 4)}),
    tool("send_email", "Send an e-mail in the user's name.",
         {"to": many(text(pattern=MAIL), 1, 10), "subject": text(minLength=1), "body": text(minLength=1)},
         {"cc": many(text(pattern=MAIL), 1, 10), "priority": one_of("low", "normal", "high")},
         {"message_id": text(pattern="^MSG-[0-9]{6}$"), "status": one_of("sent", "queued")},
         ("rejected", "the mail server refused the recipient")),
    tool("list_files", "Files in a folder.", {"folder": text(minLength=1)},
         {"extension": text(pattern="^[a-z0-9]{1,8}$"), "sort": one_of("name", "size", "modified"),
          "recursive": flag()},
         {"files": many(record({"path": text(examples=list(PATHS)), "bytes": whole(20, 900_000),
                                "modified": date()}), 0, 4)},
         (NOT_FOUND, "there is no folder {folder}")),
    tool("read_file", "Lines of a text file.", {"path": text(minLength=1)},
         {"first_line": whole(1, 100_000), "last_line": whole(1, 100_000)},
         {"path": echo("path"), "lines": many(text(examples=list(LINES)), 1, 5)},
         (NOT_FOUND, "there is no file {path}"), (DENIED, "{path} may not be read")),
    tool("search_notes", "Search the user's notes.", {"query": text(minLength=1)},
         {"tags": many(text(pattern="^[a-z-]{2,20}$"), 1, 5)},
         {"notes": many(record({"note_id": text(pattern="^N-[0-9]{4}$"), "title": echo("query"), "edited": date(),
                                "excerpt": text(examples=["buy two, not one", "ask Rosa first", "see the second page",
                                                          "code 4471 on the box", "due at the end of May"])}), 0, 3)}),
    tool("append_to_note", "Add text to the end of a note.",
         {"note_id": text(pattern="^N-[0-9]{4}$"), "text": text(minLength=1)}, {"as_task": flag()},
         {"note_id": echo("note_id"), "characters": whole(20, 4000)}, (NOT_FOUND, "there is no note {note_id}")),
    tool("get_directions", "A route between two places.", {"origin": text(), "destination": text()},
         {"mode": one_of("walk", "bicycle", "car", "transit"), "depart_at": text(pattern=TIME),
          "avoid": many(one_of("tolls", "ferries", "motorways"), 1, 3)},
         {"minutes": whole(4, 420), "kilometres": number(0.4, 460, digits=1),
          "steps": many(text(examples=["turn left at the church", "follow the river", "take the second exit",
                                       "change to line 4", "cross the bridge"]), 1, 4)},
         ("no_route", "no route from {origin} to {destination}")),
    tool("find_places", "Places of a kind near an address.",
         {"category": one_of("restaurant", "cafe", "pharmacy", "hotel", "museum", "parking", "supermarket"),
          "near": text()}, {"radius_km": number(0.1, 50), "open_now": flag()},
         {"places": many(record({"name": text(examples=list(PLACES)), "rating": number(2.5, 5, digits=1),
                                 "metres": whole(40, 4900), "open_until": text(pattern="^(1[6-9]|2[0-3]):[03]0$")}),
                         0, 4)}),
    tool("find_contact", "People in the user's address book.", {"name": text("Whole or part", minLength=1)}, {},
         {"contacts": many(record({"name": echo("name"), "email": text(format="email"),
                                   "phone": text(pattern=PHONE)}), 0, 2)}),
    tool("get_stock_quote", "Last price of a share.", {"symbol": text("Ticker", pattern="^[A-Z]{1,5}$")},
         {"currency": one_of("USD", "EUR", "GBP")},
         {"symbol": echo("symbol"), "price": number(3, 900), "change_percent": number(-6, 6),
          "time": text(format="date-time")}, ("unknown_symbol", "{symbol} is not listed")),
    tool("translate", "Translate a short text.",
         {"text": text(minLength=1, maxLength=500), "target": one_of("fr", "de", "es", "it")}, {"source": one_of("en")},
         {"translation": text(), "target": echo("target")}),
    tool("set_reminder", "Remind the user of something.",
         {"text": text(minLength=1), "when": record({"date": date(), "time": text("HH:MM", pattern=TIME)})},
         {"repeat": one_of("daily", "weekly", "monthly")},
         {"reminder_id": text(pattern="^R-[0-9]{4}$"), "text": echo("text"), "date": echo("when/date"),
          "time": echo("when/time")}),
    tool("play_music", "Play music in a room.", {"query": text("Track, artist, album or style", minLength=1)},
         {"room": one_of("kitchen", "living room", "bedroom", "office"), "volume": whole(0, 100), "shuffle": flag()},
         {"playing": text(examples=list(TITLES)), "room": echo("room", "living room"), "seconds": whole(95, 420)},
         (BUSY, "the speaker is switched off")),
    tool("set_device", "Switch or set a device in the home.",
         {"device": one_of("lamp", "heating", "blinds", "fan", "coffee machine"),
          "room": one_of("kitchen", "living room", "bedroom", "office"),
          "state": record({"on": flag()}, {"level": whole(0, 100), "color": text(pattern="^#[0-9A-Fa-f]{6}$"),
                                           "degrees": number(5, 30)})}, {},
         {"device": echo("device"), "room": echo("room"), "on": {"type": "boolean", "x-argument": "state/on"},
          "since": text(format="date-time")}, ("offline", "the {device} in the {room} does not answer")),
    tool("search_code", "Search a repository's source.", {"text": text(minLength=1), "repository": text()},
         {"language": one_of("python", "typescript", "rust", "go", "swift"), "case_sensitive": flag(),
          "max_results": whole(1, 50)},
         {"matches": many(record({"path": text(examples=list(PATHS)), "line": whole(1, 1400),
                                  "excerpt": echo("text")}), 0, 4)}),
    tool("create_ticket", "Open a ticket in the tracker.",
         {"project": text(pattern="^[A-Z]{2,6}$"), "title": text(minLength=3, maxLength=120)},
         {"priority": one_of("low", "medium", "high", "urgent"), "labels": many(text(pattern="^[a-z-]{2,20}$"), 1, 6),
          "assignee": text(), "description": text()},
         {"ticket_id": text(pattern="^T-[0-9]{4}$"), "title": echo("title"), "status": one_of("open")},
         (NOT_FOUND, "there is no project {project}")),
    tool("find_tickets", "Tickets of a project.", {"project": text(pattern="^[A-Z]{2,6}$")},
         {"status": many(one_of("open", "in progress", "done", "blocked"), 1, 4), "assignee": text(),
          "updated_since": date()},
         {"tickets": many(record({"ticket_id": text(pattern="^T-[0-9]{4}$"), "assignee": text(examples=list(PEOPLE)),
                                  "status": one_of("open", "in progress", "done", "blocked"), "age_days": whole(0, 240),
                                  "title": text(examples=["Login is slow", "Wrong total", "Crash at start",
                                                          "Button hidden", "Typo in the help"])}), 0, 4)}),
    tool("get_order", "A customer's order.", {"order_id": text(pattern="^ORD-[0-9]{6}$")}, {"include_items": flag()},
         {"order_id": echo("order_id"), "status": one_of("paid", "packed", "shipped", "delivered", "returned"),
          "total": number(5, 900), "currency": one_of("EUR", "USD"), "placed": date(),
          "tracking_number": text(pattern="^[A-Z]{2}[0-9]{9}$")}, (NOT_FOUND, "there is no order {order_id}")),
    tool("track_shipment", "Where a parcel is.", {"tracking_number": text(pattern="^[A-Z]{2}[0-9]{9}$")}, {},
         {"tracking_number": echo("tracking_number"), "location": text(examples=["Lyon", "Leipzig", "Porto", "Gdansk"]),
          "status": one_of("in transit", "out for delivery", "delivered", "held at customs"), "expected": date()},
         (NOT_FOUND, "{tracking_number} is not known yet")),
    tool("query_table", "Rows of a table that meet all filters.",
         {"table": one_of("customers", "orders", "products", "employees"),
          "filters": many(record({"column": text(pattern="^[a-z_]{1,30}$"),
                                  "operator": one_of("=", "!=", "<", "<=", ">", ">="),
                                  "value": {"type": ["string", "number", "boolean"]}}), 0, 6)},
         {"limit": whole(1, 100), "order_by": text(pattern="^[a-z_]{1,30}$")},
         {"rows": many(record({"id": whole(1, 99_999), "name": text(examples=list(PEOPLE)), "amount": number(1, 5000),
                               "created": date()}), 0, 4), "matched": whole(0, 300)},
         ("bad_query", "a column of the filters is not in {table}")),
    tool("check_url", "Request a URL and report the HTTP status.", {"url": text(pattern="^https?://[^ ]{3,200}$")},
         {"method": one_of("GET", "HEAD"), "timeout_s": whole(1, 60)},
         {"status": {"type": "integer", "enum": [200, 200, 200, 204, 301, 403, 404, 500, 503]},
          "milliseconds": whole(8, 4000), "bytes": whole(0, 250_000)}, ("dns", "the host name does not resolve")),
    tool("set_timer", "Start a timer.", {"minutes": whole(1, 600)}, {"label": text(maxLength=60)},
         {"timer_id": text(pattern="^TM-[0-9]{3}$"), "minutes": {"type": "integer", "x-argument": "minutes"},
          "label": echo("label", "timer")}),
    tool("define_word", "Look a word up in an English dictionary.", {"word": text(pattern="^[A-Za-z-]{1,40}$")}, {},
         {"word": echo("word"), "found": flag(), "part_of_speech": text(), "definition": text()}),
    tool("search_flights", "Flights on a day.",
         {"from": text("Airport code", pattern="^[A-Z]{3}$"), "to": text("Airport code", pattern="^[A-Z]{3}$"),
          "date": date()},
         {"passengers": record({"adults": whole(1, 9)}, {"children": whole(0, 8)}),
          "cabin": one_of("economy", "premium", "business"), "direct_only": flag()},
         {"flights": many(record({"flight_id": text(pattern="^[A-Z]{2}[1-9][0-9]{3}$"), "departs": text(pattern=
                                  "^(0[6-9]|1[0-9]|2[0-2]):[0-5]5$"), "minutes": whole(55, 780),
                                  "price_eur": whole(39, 1200), "stops": whole(0, 2)}), 0, 4)}),
    tool("book_flight", "Book seats on a flight found before.",
         {"flight_id": text(pattern="^[A-Z]{2}[1-9][0-9]{3}$"), "passenger_names": many(text(minLength=2), 1, 9)},
         {"seat": one_of("window", "aisle", "any"), "bags": whole(0, 9)},
         {"booking": text(pattern="^[A-Z]{6}$"), "flight_id": echo("flight_id"), "paid_eur": whole(39, 2400)},
         ("sold_out", "no seats are left on {flight_id}")),
    tool("date_difference", "Time between two dates.", {"start": date(), "end": date()},
         {"unit": one_of("days", "weeks")}, {"value": {"type": "number"}, "unit": echo("unit", "days"),
                                             "weekday_of_end": text()}),
)  # fmt: skip

BY_NAME = {tool.name: tool for tool in TOOLS}
