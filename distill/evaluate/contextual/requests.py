"""Requests that one call of a built-in tool settles and that change nothing. Each asks for just what its facts hold."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

from distill.evaluate.contextual.scene import Scene, Task, about, either, maybe, near, on, unordered

Maker = Callable[[Scene], Task]
CURRENCIES = {"EUR": "euros", "USD": "US dollars", "GBP": "pounds sterling", "CHF": "Swiss francs",
              "SEK": "Swedish kronor", "CAD": "Canadian dollars", "AUD": "Australian dollars",
              "JPY": "Japanese yen"}  # fmt: skip
MEASURES = (("foot", "cm", "feet", "centimetres"), ("inch", "cm", "inches", "centimetres"),
            ("kwh", "kj", "kilowatt hours", "kilojoules"), ("kcal", "kj", "kilocalories", "kilojoules"),
            ("day", "hour", "days", "hours"), ("hour", "minute", "hours", "minutes"), ("kg", "g", "kilograms", "grams"),
            ("celsius", "fahrenheit", "degrees Celsius", "degrees Fahrenheit"), ("km", "m", "kilometres", "metres"),
            ("l", "ml", "litres", "millilitres"))  # fmt: skip
ORDER_STATES = ("paid", "packed", "shipped", "delivered", "returned")
PARCEL_STATES = ("in transit", "out for delivery", "delivered", "held at customs")


def weather(s: Scene) -> Task:
    city, (day, when), unit = s.pick("city"), s.soon(), s.choice("celsius", "fahrenheit")
    made = s.call("get_weather", {"city": city, "date": on(str(day)), "units": unit},
                  {"temperature": s.draw.between(*((-60, 340) if unit == "celsius" else (110, 389))) / 10},
                  wanted=lambda r: r["rain_chance"] > 9)  # fmt: skip
    warm, rain = s.fact(made, "/temperature", "number"), s.fact(made, "/rain_chance", "number")
    name = f"degrees {unit.capitalize()}"
    request = s.choice(
        f"I am off to {city} {when}: what temperature in {name} should I pack for, and how likely is rain?",
        f"Give me the forecast temperature ({name}) and the chance of rain for {city} {when}.",
        f"Packing for {city} {when}. Temperature in {name}, and probability of rain?",
    )
    return Task(request, f"In {city} it will be {warm} {name} {when}, with a {rain} percent chance of rain.")


def currency(s: Scene) -> Task:
    source, target = s.draw.sample(tuple(CURRENCIES), 2)
    amount = s.draw.between(30, 4800)
    made = s.call(
        "convert_currency", {"amount": near(amount), "from": source, "to": target, "date": maybe(str(s.today))}
    )
    money, rate = s.fact(made, "/amount", "number"), s.fact(made, "/rate", "number")
    request = s.choice(
        f"A supplier wants {amount} {CURRENCIES[source]}. How many {CURRENCIES[target]} is that, and at which rate?",
        f"My budget is {amount} {CURRENCIES[source]}: state it in {CURRENCIES[target]} together with the rate used.",
    )
    return Task(
        request, f"{s.said(amount)} {CURRENCIES[source]} are {money} {CURRENCIES[target]}, at a rate of {rate}."
    )


def measure(s: Scene) -> Task:
    source, target, names, others = s.draw.choice(MEASURES)
    value = s.draw.between(11, 480)
    made = s.call("convert_units", {"value": near(value), "from_unit": source, "to_unit": target})
    said = s.fact(made, "/value", "number")
    request = s.choice(
        f"The data sheet says {value} {names}. What is that in {others}?",
        f"How many {others} are {value} {names}?",
    )
    return Task(request, f"{s.said(value)} {names} are {said} {others}.")


def files(s: Scene) -> Task:
    folder, (kind, ending) = s.pick("folder"), s.draw.choice((("TOML", "toml"), ("WAV", "wav"), ("SVG", "svg")))
    rows = [{"path": f"{folder}/{s.pick('stem')}.{ending}", "bytes": s.draw.between(1100, 880_000),
             "modified": str(s.past())} for _ in range(2)]  # fmt: skip
    made = s.call("list_files", {"folder": folder, "extension": ending, "recursive": maybe(False)}, {"files": rows})
    parts = [f"{s.fact(made, f'/files/{i}/path', 'string', str(row['path']).rpartition('/')[2])} with "
             f"{s.fact(made, f'/files/{i}/bytes', 'number')} bytes" for i, row in enumerate(rows)]  # fmt: skip
    request = s.choice(
        f"Which {kind} files lie in {folder}, and how many bytes has each?",
        f"List every .{ending} file in the folder {folder} together with its size in bytes.",
    )
    return Task(request, f"There are two: {parts[0]}, and {parts[1]}.")


def settings(s: Scene) -> Task:
    path, key = s.pick("settings"), s.pick("key")
    lines = [f"{s.pick('key')} = {s.draw.between(100, 9000)}" for _ in range(3)]
    value, place = s.draw.between(1201, 9899), s.draw.below(4)
    lines.insert(place, f"{key} = {value}")
    made = s.call("read_file", {"path": path}, {"lines": lines})
    said = s.fact(made, f"/lines/{place}", "string", *reversed((lines[place], *number(s, value))))
    request = s.choice(f"What is {key} set to in {path}?", f"Open {path} and tell me the number behind {key}.")
    return Task(request, f"In {path}, {key} is set to {said}.")


def number(s: Scene, value: int) -> tuple[str, ...]:
    """A whole number with and without marks."""
    return tuple(dict.fromkeys((s.said(value), str(value))))


def note(s: Scene) -> Task:
    thing = s.pick("note")
    row = {"note_id": s.code("N-9999"), "title": thing, "edited": str(s.past()), "excerpt": "measure twice, then order"}
    made = s.call("search_notes", {"query": about(thing.split()[-1], thing)}, {"notes": [row]})
    identity, day = s.fact(made, "/notes/0/note_id", "id"), s.fact(made, "/notes/0/edited", "date")
    request = s.choice(
        f"Under which number did I file the note on {thing}, and when was it edited last?",
        f"Dig out my note on {thing}: its note number and the date of the last edit, please.",
    )
    return Task(request, f"Your note on {thing} is {identity}, last edited on {day}.")


def route(s: Scene) -> Task:
    start, end = s.pick("landmark"), s.pick("landmark")
    mode, words = s.draw.choice((("walk", "walking"), ("bicycle", "cycling"), ("car", "driving"),
                                 ("transit", "taking the bus or train")))  # fmt: skip
    minutes = s.draw.between(12, 95)
    metres = minutes * {"walk": 80, "bicycle": 260, "car": 800, "transit": 450}[mode] // 100 * 100
    made = s.call("get_directions", {"origin": start, "destination": end, "mode": mode},
                  {"minutes": minutes, "kilometres": metres / 1000})  # fmt: skip
    took, far = s.fact(made, "/minutes", "number"), s.fact(made, "/kilometres", "number")
    request = (
        f"I set out from {start} and have to reach {end}, {words}. How many minutes and how many kilometres is it?"
    )
    return Task(request, f"From {start} to {end} it is {far} kilometres and takes {took} minutes.")


def nearest(s: Scene) -> Task:
    spot, radius = s.pick("landmark"), s.draw.choice((2, 3, 4))
    category = s.choice("restaurant", "cafe", "pharmacy", "hotel", "museum", "supermarket")
    first = s.draw.between(110, 700)
    rows: list[dict[str, Any]] = [
        {"name": s.pick("place"), "rating": s.draw.between(31, 49) / 10, "metres": first + 400 * i + s.draw.below(300),
         "open_until": "21:00"} for i in range(3)]  # fmt: skip
    rows = s.draw.shuffle(rows)
    made = s.call("find_places", {"category": category, "near": spot, "radius_km": radius}, {"places": rows})
    best = min(range(3), key=lambda i: rows[i]["metres"])
    name, metres = s.fact(made, f"/places/{best}/name", "string"), s.fact(made, f"/places/{best}/metres", "number")
    request = s.choice(
        f"Name the {category} closest to {spot}, searching within {radius} kilometres, and its distance in metres.",
        f"Within {radius} kilometres of {spot}, which {category} is nearest and how many metres is that?",
    )
    return Task(request, f"The nearest {category} is {name}, {metres} metres from {spot}.")


def contact(s: Scene) -> Task:
    person = s.pick("person")
    row = {"name": person, "email": s.mail(person, s.choice("example.org", "example.net")),
           "phone": s.code("+1202555019") + s.code("9")}  # fmt: skip
    made = s.call("find_contact", {"name": person}, {"contacts": [row]})
    if s.draw.chance(0.5):
        said = s.fact(made, "/contacts/0/email", "string")
        return Task(f"Which e-mail address have I saved for {person}?", f"The address of {person} is {said}.")
    said = s.fact(made, "/contacts/0/phone", "id")
    return Task(f"I have to ring {person}. Which number is in my address book?", f"The number of {person} is {said}.")


def share(s: Scene) -> Task:
    symbol, (code, name) = s.pick("symbol"), s.draw.choice((("USD", "US dollars"), ("EUR", "euros"), ("GBP", "pounds")))
    made = s.call("get_stock_quote", {"symbol": symbol, "currency": code})
    price, change = s.fact(made, "/price", "number"), s.fact(made, "/change_percent", "number")
    request = s.choice(
        f"Quote {symbol} in {name}, with the change in percent.",
        f"Where does the ticker {symbol} stand in {name}, and by how many percent has it moved?",
    )
    return Task(request, f"{symbol} stands at {price} {name}, a change of {change} percent.")


def code(s: Scene) -> Task:
    name, repository = s.pick("identifier"), s.pick("repository")
    row = {"path": f"src/{s.pick('stem')}.rs", "line": s.draw.between(103, 1390), "excerpt": f"fn {name}("}
    made = s.call(
        "search_code", {"text": name, "repository": repository, "language": maybe("rust")}, {"matches": [row]}
    )
    path, line = s.fact(made, "/matches/0/path", "string"), s.fact(made, "/matches/0/line", "number")
    request = s.choice(
        f"In which file of the Rust repository {repository} does {name} occur, and on what line?",
        f"Track down {name} in the Rust sources of {repository}: file and line, please.",
    )
    return Task(request, f"{name} occurs in {path} on line {line}.")


def blocked(s: Scene) -> Task:
    project, who = s.pick("project"), [s.pick("person") for _ in range(2)]
    ages = s.draw.sample(range(20, 230), 2)
    rows = [{"ticket_id": s.code("T-9999"), "assignee": name, "status": "blocked", "age_days": age,
             "title": s.pick("defect")} for name, age in zip(who, ages, strict=True)]  # fmt: skip
    made = s.call("find_tickets", {"project": project, "status": ["blocked"]}, {"tickets": rows})
    old = max((0, 1), key=lambda i: ages[i])
    said, name = s.fact(made, f"/tickets/{old}/ticket_id", "id"), s.fact(made, f"/tickets/{old}/assignee", "string")
    request = f"Among the blocked tickets of {project}, which has been there longest, and whose is it?"
    return Task(request, f"The oldest blocked ticket of {project} is {said}, assigned to {name}.")


def order(s: Scene) -> Task:
    number = s.code("ORD-999999")
    made = s.call("get_order", {"order_id": number, "include_items": maybe(False)}, {"placed": str(s.past())})
    state, total = s.word(made, "/status", ORDER_STATES), s.fact(made, "/total", "number")
    money, day = s.word(made, "/currency", ("EUR", "USD")), s.fact(made, "/placed", "date")
    request = s.choice(
        f"{number}: what state is it in, what was the total with its currency, and on which day was it placed?",
        f"A customer asks about {number}. Give me status, total with currency, and the day it was placed.",
    )
    return Task(request, f"{number} was placed on {day}; its status is {state} and the total is {total} {money}.")


def parcel(s: Scene) -> Task:
    number = s.code("AA999999999")
    made = s.call("track_shipment", {"tracking_number": number},
                  {"location": s.pick("city"), "expected": str(s.day(9))})  # fmt: skip
    state, day = s.word(made, "/status", PARCEL_STATES), s.fact(made, "/expected", "date")
    place = s.fact(made, "/location", "string")
    request = s.choice(
        f"Tracking number {number}: where is it, what is its status and which day is it expected?",
        f"How far has {number} come? I need place, status and expected day.",
    )
    return Task(request, f"{number} is in {place}; its status is {state}, and it is expected on {day}.")


def table(s: Scene) -> Task:
    name, limit = s.choice("orders", "products", "employees"), s.draw.between(210, 4900)
    words, sign = s.draw.choice((("above", ">"), ("below", "<")))
    made = s.call("query_table", {"table": name, "filters": [{"column": "amount", "operator": sign, "value": limit}],
                                  "limit": maybe(1)}, wanted=lambda r: r["matched"] > 9)  # fmt: skip
    said = s.fact(made, "/matched", "number")
    request = f"In the table {name}, how many rows have an amount {words} {limit}?"
    return Task(request, f"{said} rows of {name} have an amount {words} {s.said(limit)}.")


def address(s: Scene) -> Task:
    url = f"https://{s.pick('host')}/{s.pick('page')}"
    made = s.call("check_url", {"url": either(url, url + "/"), "method": maybe("GET")},
                  wanted=lambda r: r["milliseconds"] > 99)  # fmt: skip
    status, took = s.fact(made, "/status", "number"), s.fact(made, "/milliseconds", "number")
    request = s.choice(
        f"Does {url} respond? State the HTTP status code and the milliseconds it took.",
        f"Probe {url} once; I want the status code and the response time in milliseconds.",
    )
    return Task(request, f"{url} answered with status {status} in {took} milliseconds.")


def flight(s: Scene) -> Task:
    start, end, day, adults = s.pick("airport"), s.pick("airport"), s.day(), s.draw.between(2, 4)
    party = either({"adults": adults}, {"adults": adults, "children": 0})
    made = s.call("search_flights", {"from": start, "to": end, "date": on(str(day)), "passengers": party,
                                     "cabin": maybe("economy")},
                  wanted=lambda r: len({f["price_eur"] for f in r["flights"]}) == len(r["flights"]) > 1)  # fmt: skip
    rows = made.result["flights"]
    best = min(range(len(rows)), key=lambda i: rows[i]["price_eur"])
    said, price = s.fact(made, f"/flights/{best}/flight_id", "id"), s.fact(made, f"/flights/{best}/price_eur", "number")
    request = f"{start} to {end} on {s.said(day)} for {adults} adults: which flight costs least, and how many euros?"
    return Task(request, f"The cheapest flight from {start} to {end} is {said}, for {price} euros.")


def span(s: Scene) -> Task:
    start, end = s.day(150), s.day(150) + datetime.timedelta(days=12)
    made = s.call("date_difference", {"start": on(str(start)), "end": on(str(end)), "unit": maybe("days")})
    days, weekday = s.fact(made, "/value", "number"), s.fact(made, "/weekday_of_end", "string")
    request = (f"The loan runs from {s.said(start)} until {s.said(end)}. How many days is that, and on which weekday "
               "does it end?")  # fmt: skip
    return Task(request, f"That is {days} days; the last day is a {weekday}.")


def total(s: Scene) -> Task:
    values = [s.draw.between(1100, 98_900) / 100 for _ in range(3)]
    made = s.call("calculate", {"operation": "add", "operands": unordered(values), "round_to": maybe(2)},
                  wanted=lambda r: round(r["value"], 2) == r["value"])  # fmt: skip
    said = s.fact(made, "/value", "number")
    request = s.choice(
        f"Three receipts: {values[0]}, {values[1]} and {values[2]} euros. What do they come to, to the cent?",
        f"Sum these bills exactly: {values[0]}, {values[1]}, {values[2]}.",
    )
    return Task(request, f"They come to {said}.")


def agenda(s: Scene) -> Task:
    (day, when), title = s.soon(), s.pick("appointment")
    row = {"event_id": s.code("EV-99999"), "title": title, "start": f"{day}T{s.time()}:00Z",
           "minutes": s.draw.choice((45, 75, 90, 105))}  # fmt: skip
    calendar = s.choice("work", "home", "family")
    made = s.call("find_events", {"range": {"start": str(day), "end": str(day)}, "calendars": [calendar]},
                  {"events": [row]})  # fmt: skip
    name, minutes = s.fact(made, "/events/0/title", "string"), s.fact(made, "/events/0/minutes", "number")
    request = f"What does my {calendar} calendar hold {when}? Only that one day: title and length in minutes."
    return Task(request, f"There is one entry {when}: {name}, for {minutes} minutes.")


def inbox(s: Scene) -> Task:
    person, since = s.pick("person"), s.past()
    row = {"message_id": s.code("MSG-999999"), "from": person, "subject": s.pick("subject"),
           "received": f"{s.today}T{s.time()}:00Z", "unread": True}  # fmt: skip
    made = s.call("search_email", {"from": person, "unread_only": True, "since": on(str(since))}, {"messages": [row]})
    said, about_ = s.fact(made, "/messages/0/message_id", "id"), s.fact(made, "/messages/0/subject", "string")
    request = f"Is anything from {person} still unread since {s.said(since)}? I need its message id and subject."
    return Task(request, f'One unread message from {person}: {said}, "{about_}".')


def research(s: Scene) -> Task:
    topic, site = s.pick("topic"), s.pick("host")
    row = {"title": f"{topic.capitalize()} in practice",
           "url": f"https://{site}/{s.pick('stem')}/{s.draw.between(100, 999)}",
           "published": str(s.past())}  # fmt: skip
    made = s.call("web_search", {"query": about(topic.split()[0], topic), "site": site, "max_results": maybe(1)},
                  {"results": [row]})  # fmt: skip
    link, day = s.fact(made, "/results/0/url", "url"), s.fact(made, "/results/0/published", "date")
    request = f"What has {site} published on {topic}? Restrict the search to that site; link and date suffice."
    return Task(request, f"{site} published {link} on {day}.")


READING: tuple[Maker, ...] = (weather, currency, measure, files, settings, note, route, nearest, contact, share, code,
                              blocked, order, parcel, table, address, flight, span, total, agenda, inbox,
                              research)  # fmt: skip
"""Calls that change nothing: they may be made again."""
