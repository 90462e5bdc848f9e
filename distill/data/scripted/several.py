"""Requests that take several calls: the same tool for several things, and calls that need an earlier call's result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from distill.data.scripted import wording as w
from distill.data.scripted.gold import contact, kept, mail, money
from distill.data.scripted.said import CURRENCIES, EXTENSIONS, LANGUAGES, MODES, Said, Unclear

Json = dict[str, Any]


class Same(NamedTuple):
    """Arguments of each call; the answer from what was said and the results, in the order of the calls."""

    arguments: Callable[[Said], list[Json]]
    answer: Callable[[Said, list[Json]], str]


class Ask(Protocol):
    """Makes a call and gives its result; what raises there ends the conversation."""

    def __call__(self, tool: str, **arguments: Any) -> Json: ...


def _warmer(s: Said, rows: list[Json]) -> str:
    a, b = sorted(rows, key=lambda row: -row["temperature"])
    if a["temperature"] == b["temperature"]:
        return f"Neither: {a['city']} and {b['city']} both have {a['temperature']} degrees {s('when')}."
    return f"In {a['city']}, with {a['temperature']} degrees {s('when')}; {b['city']} has {b['temperature']} degrees."


def _moved(s: Said, rows: list[Json]) -> str:
    most = max(rows, key=lambda row: abs(row["change_percent"]))
    parts = w.listed([f"{row['symbol']} {row['change_percent']} percent" for row in rows])
    return f"{most['symbol']} moved most: {parts}."


def _both(s: Said, rows: list[Json]) -> str:
    up = [200 <= row["status"] < 400 for row in rows]
    parts = w.listed([f"{url} answers with {row['status']}" for url, row in zip(s.all("url"), rows, strict=True)])
    return f"{'Yes' if all(up) else 'No'}: {parts}."


def _alike(s: Said, rows: list[Json]) -> str:
    if rows[0]["lines"] == rows[1]["lines"]:
        return f"Yes, {rows[0]['path']} and {rows[1]['path']} say the same."
    parts = [f'{row["path"]} begins with "{row["lines"][0]}"' for row in rows]
    return f"No, they differ: {w.listed(parts)}."


def _devices(s: Said) -> list[Json]:
    return [{"device": device, "room": room, "state": {"on": False}}
            for device, room in zip(s.all("device"), s.all("room"), strict=True)]  # fmt: skip


def _all_off(s: Said, rows: list[Json]) -> str:
    names = [f"{row['device']} in the {row['room']}" for row in rows]
    return f"Switched off: {w.listed(names)}."


def _sentences(rows: list[str]) -> str:
    return " ".join(f"{row}." for row in rows)


SAME: dict[str, Same] = {
    "Compare the weather in {city}, {city} and {city} {when}.": Same(
        lambda s: [{"city": city, "date": s.day()} for city in s.all("city")],
        lambda s, r: _sentences([w.weather(row, s("when")) for row in r])),
    "Where will it be warmer {when}, in {city} or in {city}?": Same(
        lambda s: [{"city": city, "date": s.day()} for city in s.all("city")], _warmer),
    "Which of {symbol}, {symbol} and {symbol} moved most today?": Same(
        lambda s: [{"symbol": symbol} for symbol in s.all("symbol")], _moved),
    "What are {amount} {currency} in {currency} and in {currency}?": Same(
        lambda s: [money(s, 1), money(s, 2)],
        lambda s, r: f"{s('amount')} {s('currency')} are {r[0]['amount']} {s('currency', 1)} and {r[1]['amount']} "
                     f"{s('currency', 2)}."),
    "How do I say \"{phrase}\" in {language} and in {language}?": Same(
        lambda s: [{"text": s("phrase"), "target": LANGUAGES[language]} for language in s.all("language")],
        lambda s, r: f'In {s("language")} it is "{r[0]["translation"]}", in {s("language", 1)} '
                     f'"{r[1]["translation"]}".'),
    "What do {word}, {word} and {word} mean? Look them up.": Same(
        lambda s: [{"word": word} for word in s.all("word")],
        lambda s, r: _sentences([w.definition(row) for row in r])),
    "Where are my parcels {tracking} and {tracking}?": Same(
        lambda s: [{"tracking_number": number} for number in s.all("tracking")],
        lambda s, r: _sentences([w.parcel(row) for row in r])),
    "Check the orders {order}, {order} and {order}.": Same(
        lambda s: [{"order_id": order} for order in s.all("order")],
        lambda s, r: _sentences([w.order(row) for row in r])),
    "Are {url} and {url} both up?": Same(lambda s: [{"url": url} for url in s.all("url")], _both),
    "Turn off the {device} in the {room} and the {device} in the {room}.": Same(
        _devices, _all_off),
    "I need the numbers of {person}, {person} and {person}.": Same(
        lambda s: [{"name": name} for name in s.all("person")],
        lambda s, r: " ".join(contact(row, "phone", "The number", name)
                              for name, row in zip(s.all("person"), r, strict=True))),
    "Do {file} and {file} say the same?": Same(lambda s: [{"path": path} for path in s.all("file")], _alike),
}  # fmt: skip


def _settled(ask: Ask, s: Said) -> str:
    people = ask("find_contact", name=s("first"))["contacts"]
    if not people:
        return f"I found nobody called {s('first')} in your contacts, so I sent nothing."
    if len(people) > 1:
        return f"There are two entries for {s('first')}: to {people[0]['email']} or to {people[1]['email']}?"
    address = people[0]["email"]
    sent = ask("send_email", **mail([address], s.bare("matter"), f"{w.cap(s('matter'))} is settled for {s('date')}."))
    return f"The mail to {address} is {sent['status']}, as {sent['message_id']}."


def _where(ask: Ask, s: Said) -> str:
    order = ask("get_order", order_id=s("order"))
    return w.parcel(ask("track_shipment", tracking_number=order["tracking_number"])) + "."


def _move(ask: Ask, s: Said) -> str:
    day = s.date()
    events = ask("find_events", range={"start": day, "end": day}, query=s("event"))["events"]
    if not events:
        return f"I found no {s('event')} in your calendar on {s('date')}, so I moved nothing."
    if len(events) > 1:
        return f"There are several: {'; '.join(map(w.event, events))}. Which one shall I move?"
    moved = ask("move_event", event_id=events[0]["event_id"], new_start=f"{day}T{s.time()}:00")
    return f"{events[0]['title']} ({moved['event_id']}) is now on {w.moment(moved['start'])}."


def _newest(ask: Ask, s: Said) -> str:
    extension = EXTENSIONS[s("extension")]
    files = ask("list_files", folder=s("folder"), extension=extension, sort="modified")["files"]
    if not files:
        return f"There are no {s('extension')} files in {s('folder')}."
    read = ask("read_file", path=max(files, key=lambda row: row["modified"])["path"])
    return "\n".join((f"The newest is {read['path']}:", *read["lines"]))


def _book(ask: Ask, s: Said) -> str:
    flights = ask("search_flights", **{"from": s("airport"), "to": s("airport", 1)}, date=s.date())["flights"]
    if not flights:
        return f"There are no flights from {s('airport')} to {s('airport', 1)} on {s('date')}; I booked nothing."
    best = min(flights, key=lambda row: row["price_eur"])
    done = ask("book_flight", flight_id=best["flight_id"], passenger_names=[s("person")])
    return f"{done['flight_id']} is booked for {s('person')}: booking {done['booking']}, {done['paid_eur']} euros paid."


def _costs(ask: Ask, s: Said) -> str:
    target = CURRENCIES[s("currency")]
    if target in ("USD", "EUR", "GBP"):
        raise Unclear("the quote itself can be in this currency")
    price = ask("get_stock_quote", symbol=s("symbol"), currency="USD")["price"]
    made = ask("convert_currency", amount=price, **{"from": "USD", "to": target})
    return f"One {s('symbol')} share costs {price} US dollars, which is {made['amount']} {s('currency')}."


def _shares(ask: Ask, s: Said) -> str:
    price = ask("get_stock_quote", symbol=s("symbol"))["price"]
    total = ask("calculate", operation="multiply", operands=[s.number("number"), price])["value"]
    return f"{s('number')} shares of {s('symbol')} at {price} each cost {total}."


def _best(ask: Ask, s: Said) -> str:
    category = "parking" if s("category") == "car park" else s("category")
    places = ask("find_places", category=category, near=s("spot", 1))["places"]
    if not places:
        return f"I found no {s('category')} near {s('spot', 1)}."
    best = max(places, key=lambda row: row["rating"])
    way = ask("get_directions", origin=s("spot"), destination=best["name"], mode=MODES[s("mode")])
    return (f"The best rated is {best['name']} with {best['rating']}. {w.cap(s('mode'))} it is {way['kilometres']} "
            f"kilometres and takes {way['minutes']} minutes: {', then '.join(way['steps'])}.")  # fmt: skip


def _titles(ask: Ask, s: Said) -> str:
    tickets = kept(ask("find_tickets", project=s("project"), status=["open"])["tickets"], status="open")
    if not tickets:
        return f"{s('project')} has no open tickets, so I sent no mail."
    titles = [row["title"] for row in tickets]
    sent = ask("send_email", **mail([s("mail")], f"Open tickets of {s('project')}", "\n".join(titles)))
    return f"The mail with {w.listed(titles)} is {sent['status']}, as {sent['message_id']}."


def _file_defect(ask: Ask, s: Said) -> str:
    status = ask("check_url", url=s("url"))["status"]
    if status == 200:
        return f"{s('url')} answers with 200, so I opened no ticket."
    title = f"{s('url')} answers with {status}"
    made = ask("create_ticket", project=s("project"), title=title, priority="high")
    return f"{title}, so I opened ticket {made['ticket_id']} in {s('project')}."


def _heat(ask: Ask, s: Said) -> str:
    warm = ask("get_weather", city=s("city"), date=s.day(), units="celsius")["temperature"]
    if warm >= 10:
        return f"It gets {warm} degrees in {s('city')} {s('when')}, so I left the heating as it is."
    ask("set_device", device="heating", room=s("room"), state={"on": True})
    return f"It gets {warm} degrees in {s('city')} {s('when')}, so the heating in the {s('room')} is on."


def _save_link(ask: Ask, s: Said) -> str:
    results = ask("web_search", query=s("topic"))["results"]
    if not results:
        return f"I found no article about {s('topic')}, so I saved nothing."
    saved = ask("append_to_note", note_id=s("note"), text=results[0]["url"])
    return f"I saved {results[0]['url']}, the link of {results[0]['title']}, in note {saved['note_id']}."


def _converted(ask: Ask, s: Said) -> str:
    source, target = s.units()
    value = ask("convert_units", value=s.number("decimal"), from_unit=source, to_unit=target)["value"]
    total = ask("calculate", operation="multiply", operands=[value, s.number("number")])["value"]
    names = s.unit_names()
    return f"{s('decimal')} {names[0]} are {value} {names[1]}; times {s('number')} that is {total}."


def _add(ask: Ask, s: Said) -> str:
    notes = ask("search_notes", query=s.bare("matter"))["notes"]
    if not notes:
        return f"I found no note about {s('matter')}, so I added nothing."
    if len(notes) > 1:
        return f"There are several such notes, {w.listed([row['note_id'] for row in notes])}. Which one do you mean?"
    saved = ask("append_to_note", note_id=notes[0]["note_id"], text=f"ask {s('first')} {s('when')}")
    return f"It is added to note {saved['note_id']}."


CHAINS: dict[str, Callable[[Ask, Said], str]] = {
    "Find {first}'s address in my contacts and mail that {matter} is settled for {date}.": _settled,
    "Where is the parcel of order {order} right now?": _where,
    "Move my {event} on {date} to {time} the same day.": _move,
    "Add \"ask {first} {when}\" to my note about {matter}.": _add,
    "Show me the newest {extension} file in {folder}.": _newest,
    "Book the cheapest flight from {airport} to {airport} on {date} for {person}.": _book,
    "What does one {symbol} share cost in {currency}?": _costs,
    "What would {number} shares of {symbol} cost me at the last price?": _shares,
    "How do I get {mode} from {spot} to the best rated {category} near {spot}?": _best,
    "Mail {mail} the titles of the open tickets of {project}.": _titles,
    "If {url} does not answer with 200, open a high ticket in {project} that says so.": _file_defect,
    "If it gets below ten degrees in {city} {when}, switch on the heating in the {room}.": _heat,
    "Find an article about {topic} and save its link in note {note}.": _save_link,
    "Convert {decimal} {lengths}, then multiply the result by {number}.": _converted,
}  # fmt: skip
