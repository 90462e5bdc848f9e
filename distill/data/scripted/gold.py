"""The gold call of each request phrase of distill/data/prompts/tool_requests.py, and the answer that its result gives.

Left out are phrases whose gold call can be argued about: "find three recent articles about {topic}" (how recent?) and
"count the {table} whose name starts with {first}" (no operator of the tool says so).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from distill.data.scripted import wording as w
from distill.data.scripted.said import CURRENCIES, EXTENSIONS, LANGUAGES, MODES, Said, Unclear


class Gold(NamedTuple):
    """Arguments of the one call, from what was said; the answer, from what was said and the result."""

    arguments: Callable[[Said], dict[str, Any]]
    answer: Callable[[Said, dict[str, Any]], str]


def money(s: Said, nth: int = 1) -> dict[str, Any]:
    """Arguments of a conversion to the nth currency."""
    return {"amount": s.number("amount"), "from": CURRENCIES[s("currency")], "to": CURRENCIES[s("currency", nth)]}


def mail(to: list[str], subject: str, body: str, **more: str) -> dict[str, Any]:
    """Arguments of a mail."""
    return {"to": to, "subject": w.cap(subject), "body": body, **more}


def kept(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """What a simulator made up without regard to the filter, filtered; Unclear where nothing is left of something."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    if rows and not found:
        raise Unclear("the result is not what was asked for")
    return found


def contact(r: dict[str, Any], key: str, what: str, name: str) -> str:
    """The answer about one detail of a contact."""
    if not r["contacts"]:
        return f"I found nobody called {name} in your contacts."
    if len(r["contacts"]) > 1:
        return f"There are two entries for {name}, with {w.listed([c[key] for c in r['contacts']])}."
    return f"{what} of {name} is {r['contacts'][0][key]}."


def _calc(operation: str, kinds: str, **more: int) -> Callable[[Said], dict[str, Any]]:
    def arguments(s: Said) -> dict[str, Any]:
        seen: dict[str, int] = {}
        operands = []
        for kind in kinds.split():
            operands.append(s.number(kind, seen.get(kind, 0)))
            seen[kind] = seen.get(kind, 0) + 1
        return {"operation": operation, "operands": operands, **more}

    return arguments


def _convert(slot: str) -> Gold:
    def arguments(s: Said) -> dict[str, Any]:
        source, target = s.units()
        return {"value": s.number(slot), "from_unit": source, "to_unit": target}

    return Gold(arguments, lambda s, r: f"{s(slot)} {s.unit_names()[0]} are {r['value']} {s.unit_names()[1]}.")


def _range(s: Said) -> dict[str, str]:
    return dict(zip(("start", "end"), s.days(), strict=True))


def _dates(s: Said) -> dict[str, Any]:
    return {"start": s.date(0), "end": s.date(1)}


def _start(s: Said) -> str:
    return f"{s.date()}T{s.time()}:00"


def _device(*, on: bool) -> Gold:
    return Gold(lambda s: {"device": s("device"), "room": s("room"), "state": {"on": on}},
                lambda s, r: f"Done: {r['device']} in the {r['room']} is {'on' if r['on'] else 'off'}.")  # fmt: skip


def _created(s: Said, r: dict[str, Any]) -> str:
    clash = f", at the same time as {w.listed(r['conflicts'])}" if r["conflicts"] else ""
    return f"{r['title']} is in your calendar for {w.moment(r['start'])} as {r['event_id']}{clash}."


def _newest(s: Said, r: dict[str, Any]) -> str:
    if not r["files"]:
        return f"There are no files in {s('folder')}."
    last = max(r["files"], key=lambda row: row["modified"])
    return f"In {s('folder')}, {last['path']} was changed last, on {last['modified']}."


def _timeout(s: Said, r: dict[str, Any]) -> str:
    lines = [line for line in r["lines"] if "timeout" in line]
    return f'{r["path"]} says "{lines[0]}".' if lines else f"{r['path']} says nothing about the timeout."


def _lines(s: Said, r: dict[str, Any]) -> str:
    return "\n".join((f"{r['path']} says:", *r["lines"]))


def _notes(s: Said, r: dict[str, Any]) -> str:
    rows = [f'{row["note_id"]} of {row["edited"]}: "{row["excerpt"]}"' for row in r["notes"]]
    return w.found(rows, "I found no note about that.")


def _mails(s: Said, r: dict[str, Any]) -> str:
    return w.found([w.mail(row) for row in r["messages"]], "I found no such mails.")


def _from(s: Said, r: dict[str, Any]) -> str:
    """Of one sender, who is not named again."""
    rows = [f'"{row["subject"]}", received on {row["received"].partition("T")[0]}' for row in r["messages"]]
    return w.found(rows, f"I found no such mails from {s('person')}.")


def _unread(s: Said, r: dict[str, Any]) -> str:
    return _from(s, {"messages": kept(r["messages"], unread=True)})


def _open(s: Said, r: dict[str, Any]) -> str:
    return _tickets(s, {"tickets": kept(r["tickets"], status="open")})


def _hits(s: Said, r: dict[str, Any]) -> str:
    rows = [f"{row['title']}, published {row['published']}: {row['url']}" for row in r["results"]]
    return w.found(rows, f"The search for {s('topic')} found nothing.")


def _places(s: Said, r: dict[str, Any]) -> str:
    rows = sorted(r["places"], key=lambda row: row["metres"])
    return w.found([w.place(row) for row in rows], f"I found no {s('category')} near {s('spot')}.")


def _code(s: Said, r: dict[str, Any]) -> str:
    rows = [f"{row['path']}, line {row['line']}" for row in r["matches"]]
    none = f"{s('identifier')} is not found in {s('repository')}."
    return f"{s('identifier')} is in {'; '.join(rows)}." if rows else none


def _tickets(s: Said, r: dict[str, Any]) -> str:
    return w.found([w.ticket(row) for row in r["tickets"]], f"There are no such tickets in {s('project')}.")


def _rows(s: Said, r: dict[str, Any]) -> str:
    above = s.number("number") if s.has("number") else 0
    before = s.date(slot="past") if s.has("past") else "9999"
    if any(row["amount"] <= above or row["created"] >= before for row in r["rows"]):
        raise Unclear("the result is not what was asked for")
    if not r["rows"]:
        return f"No {s('table')} match."
    rows = [f"{row['name']} ({row['amount']}, {row['created']})" for row in r["rows"]]
    return f"{r['matched']} {s('table')} match; the first: {'; '.join(rows)}."


def _flights(s: Said, r: dict[str, Any]) -> str:
    none = f"There are no such flights from {s('airport')} to {s('airport', 1)} on that day."
    return w.found([w.flight(row) for row in r["flights"]], none)


def _route(s: Said, r: dict[str, Any]) -> str:
    return (f"From {s('spot')} to {s('spot', 1)} {s('mode')} it is {r['kilometres']} kilometres and takes "
            f"{r['minutes']} minutes")  # fmt: skip


def _directions(s: Said) -> dict[str, Any]:
    return {"origin": s("spot"), "destination": s("spot", 1), "mode": MODES[s("mode")]}


def _category(s: Said) -> str:
    return "parking" if s("category") == "car park" else s("category")


def _forecast(s: Said) -> dict[str, Any]:
    return {"city": s("city"), "date": s.day()}


def _says(r: dict[str, Any]) -> str:
    return f"{r['playing']} is playing in the {r['room']}."


def _translated(s: Said, r: dict[str, Any]) -> str:
    return f'"{s("phrase")}" in {s("language")} is "{r["translation"]}".'


def _defined(s: Said, r: dict[str, Any]) -> str:
    return w.definition(r) + "."


def _answered(s: Said, r: dict[str, Any]) -> str:
    return f"{s('url')} answers with status {r['status']} after {r['milliseconds']} milliseconds."


def _timed(s: Said, r: dict[str, Any]) -> str:
    return f"The timer {r['timer_id']} for {r['label']} runs for {r['minutes']} minutes."


_PHRASE = Gold(lambda s: {"text": s("phrase"), "target": LANGUAGES[s("language")]}, _translated)
_WORD = Gold(lambda s: {"word": s("word")}, _defined)
_ORDER = Gold(lambda s: {"order_id": s("order")}, lambda s, r: w.order(r) + ".")
_PARCEL = Gold(lambda s: {"tracking_number": s("tracking")}, lambda s, r: w.parcel(r) + ".")
_STOCK = Gold(lambda s: {"symbol": s("symbol")}, lambda s, r: w.quote(r) + ".")
_URL = Gold(lambda s: {"url": s("url")}, _answered)
_TIMER = Gold(lambda s: {"minutes": s.number("minutes"), "label": s("dish")}, _timed)
_MONEY = Gold(money, lambda s, r: f"{s('amount')} {s('currency')} are {r['amount']} {s('currency', 1)}, "
                                  f"at a rate of {r['rate']}.")  # fmt: skip
_REMINDED = "I will remind you on {date} at {time} to {text}; the reminder is {reminder_id}."
_SENT = "The mail is {status}, as {message_id}."
_TICKET = 'Ticket {ticket_id}, "{title}", is {status}.'

GOLD: dict[str, Gold] = {
    "check the weather in {city} {when}": Gold(_forecast, lambda s, r: w.weather(r, s("when")) + "."),
    "tell me whether it will rain in {city} {when}": Gold(
        _forecast, lambda s, r: f"The chance of rain in {r['city']} {s('when')} is {r['rain_chance']} percent; the "
                                f"forecast says {r['condition']}."),
    "look up how warm it gets in {city} {when}, in degrees Fahrenheit": Gold(
        lambda s: _forecast(s) | {"units": "fahrenheit"},
        lambda s, r: f"It gets {r['temperature']} degrees Fahrenheit in {r['city']} {s('when')}."),
    "search the web for {topic}": Gold(lambda s: {"query": s("topic")}, _hits),
    "look up what example.org says about {topic}": Gold(
        lambda s: {"query": s("topic"), "site": "example.org"}, _hits),
    "work out {number} times {decimal}": Gold(
        _calc("multiply", "number decimal"), lambda s, r: f"{s('number')} times {s('decimal')} is {r['value']}."),
    "add up {decimal}, {decimal} and {decimal}": Gold(
        _calc("add", "decimal decimal decimal"), lambda s, r: f"The sum is {r['value']}."),
    "divide {number} by {number} and round to two decimals": Gold(
        _calc("divide", "number number", round_to=2),
        lambda s, r: f"{s('number')} divided by {s('number', 1)} is {r['value']}."),
    "find the average of {number}, {number} and {number}": Gold(
        _calc("average", "number number number"),
        lambda s, r: f"The average of {w.listed(s.all('number'))} is {r['value']}."),
    "convert {decimal} {lengths}": _convert("decimal"),
    "turn {number} {lengths}": _convert("number"),
    "convert {amount} {currency} to {currency}": _MONEY,
    "find out what {amount} {currency} are in {currency}": _MONEY,
    "list what is in my calendar {when}": Gold(
        lambda s: {"range": _range(s)},
        lambda s, r: w.found([w.event(row) for row in r["events"]], f"Your calendar is empty {s('when')}.")),
    "see whether {event} is in my calendar {when}": Gold(
        lambda s: {"range": _range(s), "query": s("event")},
        lambda s, r: (f"Yes: {'; '.join(w.event(row) for row in r['events'])}." if r["events"] else
                      f"No, {s('event')} is not in your calendar {s('when')}.")),
    "show my work appointments between {date} and {date}": Gold(
        lambda s: {"range": _dates(s), "calendars": ["work"]},
        lambda s, r: w.found([w.event(row) for row in r["events"]], "There are no work appointments in that time.")),
    "put {event} into my calendar for {date} at {time}": Gold(
        lambda s: {"title": s("event"), "start": _start(s)}, _created),
    "schedule {length} minutes with {person} on {date} at {time} about {matter}": Gold(
        lambda s: {"title": f"Meeting about {s('matter')}", "start": _start(s), "duration_minutes": s.number("length"),
                   "attendees": [{"name": s("person")}]}, _created),
    "find unread mails from {person}": Gold(lambda s: {"from": s("person"), "unread_only": True}, _unread),
    "look for mails about {matter}": Gold(lambda s: {"query": s.bare("matter")}, _mails),
    "show the last five mails from {person} since {past}": Gold(
        lambda s: {"from": s("person"), "since": s.date(slot="past"), "limit": 5}, _from),
    "mail {mail} that {matter} must wait": Gold(
        lambda s: mail([s("mail")], s.bare("matter"), f"{w.cap(s('matter'))} must wait."),
        lambda s, r: _SENT.format(**r)),
    "send {mail} and {mail} a note that we meet at {time} about {matter}": Gold(
        lambda s: mail(s.all("mail"), s.bare("matter"), f"We meet at {s('time')} about {s('matter')}."),
        lambda s, r: _SENT.format(**r)),
    "write to {mail} with high priority: please look at {matter} {when}": Gold(
        lambda s: mail([s("mail")], s.bare("matter"), f"Please look at {s('matter')} {s('when')}.", priority="high"),
        lambda s, r: _SENT.format(**r)),
    "list the {extension} files in {folder}": Gold(
        lambda s: {"folder": s("folder"), "extension": EXTENSIONS[s("extension")]},
        lambda s, r: w.found([row["path"] for row in r["files"]],
                             f"There are no {s('extension')} files in {s('folder')}.")),
    "show what was changed last in {folder}": Gold(lambda s: {"folder": s("folder"), "sort": "modified"}, _newest),
    "tell me how large the files in {folder} are": Gold(
        lambda s: {"folder": s("folder")},
        lambda s, r: w.found([f"{row['path']} with {row['bytes']} bytes" for row in r["files"]],
                             f"There are no files in {s('folder')}.")),
    "show me {file}": Gold(lambda s: {"path": s("file")}, _lines),
    "read the first {minutes} lines of {file}": Gold(
        lambda s: {"path": s("file"), "first_line": 1, "last_line": s.number("minutes")}, _lines),
    "tell me what {file} says about the timeout": Gold(lambda s: {"path": s("file")}, _timeout),
    "search my notes for {matter}": Gold(lambda s: {"query": s.bare("matter")}, _notes),
    "find the note about {topic}": Gold(lambda s: {"query": s.bare("topic")}, _notes),
    "get directions from {spot} to {spot} {mode}": Gold(
        _directions, lambda s, r: f"{_route(s, r)}: {', then '.join(r['steps'])}."),
    "find out how long it takes from {spot} to {spot} {mode}": Gold(_directions, lambda s, r: _route(s, r) + "."),
    "find a {category} near {spot}": Gold(
        lambda s: {"category": _category(s), "near": s("spot")}, _places),
    "look for a {category} within two kilometres of {spot} that is open now": Gold(
        lambda s: {"category": _category(s), "near": s("spot"), "radius_km": 2, "open_now": True}, _places),
    "look up the phone number of {person}": Gold(
        lambda s: {"name": s("person")}, lambda s, r: contact(r, "phone", "The phone number", s("person"))),
    "find the address that I have for {first}": Gold(
        lambda s: {"name": s("first")}, lambda s, r: contact(r, "email", "The address", s("first"))),
    "get the price of {symbol}": _STOCK,
    "see how the {symbol} share is doing": _STOCK,
    "translate \"{phrase}\" into {language}": _PHRASE,
    "tell me how to say \"{phrase}\" in {language}": _PHRASE,
    "remind me on {date} at {time} to {chore}": Gold(
        lambda s: {"text": s("chore"), "when": {"date": s.date(), "time": s.time()}},
        lambda s, r: _REMINDED.format(**r)),
    "set a weekly reminder from {date} at {time} to {chore}": Gold(
        lambda s: {"text": s("chore"), "when": {"date": s.date(), "time": s.time()}, "repeat": "weekly"},
        lambda s, r: f"From {r['date']} at {r['time']} I will remind you weekly to {r['text']}; the reminder is "
                     f"{r['reminder_id']}."),
    "play {music} in the {room}": Gold(lambda s: {"query": s("music"), "room": s("room")}, lambda s, r: _says(r)),
    "put on {music} in the {room} at volume {minutes}": Gold(
        lambda s: {"query": s("music"), "room": s("room"), "volume": s.number("minutes")}, lambda s, r: _says(r)),
    "turn off the {device} in the {room}": _device(on=False),
    "switch the {device} in the {room} on": _device(on=True),
    "set the {device} in the {room} to {minutes} percent": Gold(
        lambda s: {"device": s("device"), "room": s("room"), "state": {"on": True, "level": s.number("minutes")}},
        lambda s, r: f"Done: {r['device']} in the {r['room']} set to {s('minutes')} percent."),
    "find where {identifier} is used in {repository}": Gold(
        lambda s: {"text": s("identifier"), "repository": s("repository")}, _code),
    "search {repository} for the exact spelling {identifier}": Gold(
        lambda s: {"text": s("identifier"), "repository": s("repository"), "case_sensitive": True}, _code),
    "open a ticket in {project}: {defect}": Gold(
        lambda s: {"project": s("project"), "title": s("defect")}, lambda s, r: _TICKET.format(**r)),
    "file an urgent ticket in {project} for {first}: {defect}": Gold(
        lambda s: {"project": s("project"), "title": s("defect"), "priority": "urgent", "assignee": s("first")},
        lambda s, r: _TICKET.format(**r)),
    "list open tickets of {project}": Gold(lambda s: {"project": s("project"), "status": ["open"]}, _open),
    "show the tickets of {project} that {first} works on": Gold(
        lambda s: {"project": s("project"), "assignee": s("first")}, _tickets),
    "look up order {order}": _ORDER,
    "check what happened to order {order}": _ORDER,
    "track parcel {tracking}": _PARCEL,
    "find out where shipment {tracking} is": _PARCEL,
    "find the {table} with an amount above {number}": Gold(
        lambda s: {"table": s("table"),
                   "filters": [{"column": "amount", "operator": ">", "value": s.number("number")}]},
        _rows),
    "get ten rows of {table} created before {past}": Gold(
        lambda s: {"table": s("table"), "limit": 10,
                   "filters": [{"column": "created", "operator": "<", "value": s.date(slot="past")}]}, _rows),
    "check whether {url} is up": _URL,
    "see which HTTP status {url} gives": _URL,
    "set a timer of {minutes} minutes for {dish}": _TIMER,
    "start a {minutes}-minute timer called {dish}": _TIMER,
    "look up the word {word}": _WORD,
    "find the definition of {word}": _WORD,
    "find flights from {airport} to {airport} on {date}": Gold(
        lambda s: {"from": s("airport"), "to": s("airport", 1), "date": s.date()}, _flights),
    "search direct flights from {airport} to {airport} on {date} for two adults and a child": Gold(
        lambda s: {"from": s("airport"), "to": s("airport", 1), "date": s.date(), "direct_only": True,
                   "passengers": {"adults": 2, "children": 1}}, _flights),
    "count the days from {date} to {date}": Gold(
        _dates, lambda s, r: f"From {s('date')} to {s('date', 1)} it is {r['value']} days; the last one is a "
                             f"{r['weekday_of_end']}."),
    "find out how many weeks lie between {date} and {date}": Gold(
        lambda s: _dates(s) | {"unit": "weeks"},
        lambda s, r: f"Between {s('date')} and {s('date', 1)} lie {r['value']} weeks; the last day is a "
                     f"{r['weekday_of_end']}."),
}  # fmt: skip
