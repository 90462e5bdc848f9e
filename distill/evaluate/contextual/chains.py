"""Requests that take several calls: chains in which an argument is what an earlier call returned, joins of two results,
and the same tool for several things at once."""

from __future__ import annotations

from distill.evaluate.contextual.actions import appointment, reminder, ticket, timer
from distill.evaluate.contextual.requests import CURRENCIES, ORDER_STATES, PARCEL_STATES, READING, Maker, contact
from distill.evaluate.contextual.scene import Scene, Task, about, either, maybe, near, on, unordered
from distill.evaluate.contextual.unseen import UNSEEN_READING, WAREHOUSES

JOINTS = (("", " Besides: ", " Finally: "), ("", " And another thing. ", " Last one: "),
          ("Several things. ", " ", " "), ("(a) ", " (b) ", " (c) "))  # fmt: skip


def write_to(s: Scene) -> Task:
    """Address book, then mail."""
    person, subject, thing = s.pick("person"), s.pick("subject"), s.pick("note")
    row = {"name": person, "email": s.mail(person, s.choice("example.net", "example.com")),
           "phone": s.code("+1202555019") + s.code("9")}  # fmt: skip
    found = s.call("find_contact", {"name": person}, {"contacts": [row]})
    made = s.call("send_email", {"to": [row["email"]], "subject": subject, "priority": maybe("normal"),
                                 "body": about(thing, f"The papers about {thing} are ready.")},
                  after=[found.id])  # fmt: skip
    address, number = s.fact(found, "/contacts/0/email", "string"), s.fact(made, "/message_id", "id")
    request = (f'Tell {person} by mail that the papers about {thing} are ready; subject "{subject}". The address is in '
               "my contacts. To which address did it go, and under what message id?")  # fmt: skip
    return Task(request, f"It went to {address} with the message id {number}.")


def follow_parcel(s: Scene) -> Task:
    """Order, then shipment."""
    number, parcel = s.code("ORD-999999"), s.code("AA999999999")
    found = s.call("get_order", {"order_id": number, "include_items": maybe(False)},
                   {"tracking_number": parcel, "status": "shipped", "placed": str(s.past())})  # fmt: skip
    made = s.call("track_shipment", {"tracking_number": parcel},
                  {"location": s.pick("city"), "expected": str(s.day(9))}, after=[found.id])  # fmt: skip
    state, day = s.word(made, "/status", PARCEL_STATES), s.fact(made, "/expected", "date")
    place = s.fact(made, "/location", "string")
    request = s.choice(
        f"The goods of {number} are on their way. Where is that shipment, what is its status, and when is it due?",
        f"Find the shipment that belongs to {number}: place, status, day of arrival.",
    )
    return Task(request, f"The shipment of {number} is in {place}; its status is {state}, and it is due on {day}.")


def fly(s: Scene) -> Task:
    """Flights, then a booking of the cheapest."""
    start, end, day, person = s.pick("airport"), s.pick("airport"), s.day(), s.pick("person")
    found = s.call("search_flights", {"from": start, "to": end, "date": on(str(day)), "cabin": maybe("economy"),
                                      "passengers": maybe({"adults": 1})},
                   wanted=lambda r: len({f["price_eur"] for f in r["flights"]}) == len(r["flights"]) > 1)  # fmt: skip
    best = min(found.result["flights"], key=lambda f: f["price_eur"])
    made = s.call("book_flight", {"flight_id": best["flight_id"], "passenger_names": [person], "seat": maybe("any"),
                                  "bags": maybe(0)}, {"paid_eur": best["price_eur"]}, after=[found.id])  # fmt: skip
    number, said, paid = (s.fact(made, p, kind) for p, kind in (("/flight_id", "id"), ("/booking", "id"),
                                                                ("/paid_eur", "number")))  # fmt: skip
    request = (f"{person} has to get from {start} to {end} on {s.said(day)} at the lowest fare: find that flight and "
               "book it. Which flight is it, what is the booking code, and how many euros were paid?")  # fmt: skip
    return Task(request, f"{person} flies on {number}; the booking code is {said} and {paid} euros were paid.")


def share_in(s: Scene) -> Task:
    """Quote, then exchange."""
    symbol, target = s.pick("symbol"), s.choice("CHF", "SEK", "CAD", "AUD")
    found = s.call("get_stock_quote", {"symbol": symbol, "currency": "EUR"})
    price = found.result["price"]
    made = s.call("convert_currency", {"amount": near(price), "from": "EUR", "to": target, "date": maybe(str(s.today))},
                  after=[found.id])  # fmt: skip
    euros, money = s.fact(found, "/price", "number"), s.fact(made, "/amount", "number")
    request = f"Quote {symbol} in euros, and convert that price to {CURRENCIES[target]}. I want both amounts."
    return Task(request, f"{symbol} costs {euros} euros, which is {money} {CURRENCIES[target]}.")


def postpone(s: Scene) -> Task:
    """Calendar, then a move."""
    title, day, time = s.pick("appointment"), s.day(), s.time()
    row = {"event_id": s.code("EV-99999"), "title": title, "start": f"{day}T07:30:00Z", "minutes": 45}
    arguments = {"range": {"start": str(day), "end": str(day)}, "query": maybe(title)}
    found = s.call("find_events", arguments, {"events": [row]})
    made = s.call("move_event", {"event_id": row["event_id"], "new_start": on(f"{day}T{time}:00"),
                                 "notify": True}, wanted=lambda r: r["notified"] > 1, after=[found.id])  # fmt: skip
    number, told = s.fact(made, "/event_id", "id"), s.fact(made, "/notified", "number")
    request = (f'My "{title}" of {s.said(day)} has to begin at {time} instead, same day; let the attendees know. Which '
               "event id is it, and how many were told?")  # fmt: skip
    return Task(request, f"{number} now begins at {time} on {s.said(day)}; {told} attendees were told.")


def jot_down(s: Scene) -> Task:
    """Notes, then an addition."""
    thing, chore = s.pick("note"), s.pick("chore")
    row = {"note_id": s.code("N-9999"), "title": thing, "edited": str(s.past()), "excerpt": "see the list overleaf"}
    found = s.call("search_notes", {"query": about(thing.split()[-1], thing)}, {"notes": [row]})
    made = s.call("append_to_note", {"note_id": row["note_id"], "text": chore, "as_task": True},
                  wanted=lambda r: r["characters"] > 99, after=[found.id])  # fmt: skip
    number, length = s.fact(made, "/note_id", "id"), s.fact(made, "/characters", "number")
    request = (f'Somewhere I keep a note on {thing}. Attach "{chore}" to it as a task, and tell me its note number and '
               "how many characters it has after that.")  # fmt: skip
    return Task(request, f"The note is {number}; it has {length} characters now.")


def invoice_customer(s: Scene) -> Task:
    """Customer's record, then mail."""
    number, person, subject = s.code("C-99999"), s.pick("person"), s.pick("subject")
    address = s.mail(person, "example.net")
    found = s.call("get_customer", {"customer_id": number, "fields": maybe(["contact"])},
                   {"contact": {"name": person, "email": address}, "remarks": []})  # fmt: skip
    made = s.call("send_email", {"to": [address], "subject": subject, "priority": "high",
                                 "body": about("invoice", "Please settle the open invoice.")},
                  after=[found.id])  # fmt: skip
    name, said = s.fact(found, "/contact/name", "string"), s.fact(made, "/message_id", "id")
    request = (f'Ask customer {number} by mail, high priority, subject "{subject}", to settle the open invoice. Take '
               "the address from the record. What is the customer's name, and the message id?")  # fmt: skip
    return Task(request, f"The mail went to {name} with the message id {said}.")


def readings(s: Scene) -> Task:
    """Two sensors, then their difference."""
    day = s.past()
    window = {"from": f"{day}T06:00:00", "to": f"{day}T18:00:00"}
    sensors = [f"S{s.code('999')}" for _ in range(2)]
    values = [s.draw.between(21_000, 38_000) / 100, s.draw.between(1100, 19_000) / 100]
    found = [s.call("query_sensor", {"sensor_id": one, "window": window, "aggregate": "mean"},
                    {"value": value, "unit": "kPa"}) for one, value in zip(sensors, values, strict=True)]  # fmt: skip
    made = s.call("calculate", {"operation": "subtract", "operands": values, "round_to": maybe(2)},
                  {"value": round(values[0] - values[1], 2)}, after=[one.id for one in found])  # fmt: skip
    said = [s.fact(one, "/value", "number") for one in (*found, made)]
    request = (f"Compare the mean readings of {sensors[0]} and {sensors[1]} from 06:00 to 18:00 on {s.said(day)}, and "
               f"have the second subtracted from the first exactly. All three figures, please.")  # fmt: skip
    return Task(
        request, f"{sensors[0]} read {said[0]} and {sensors[1]} {said[1]} kPa; the difference is {said[2]} kPa."
    )


def both_orders(s: Scene) -> Task:
    """Two orders, then their sum."""
    orders = [s.code("ORD-999999") for _ in range(2)]
    found = [s.call("get_order", {"order_id": one, "include_items": maybe(False)},
                    {"currency": "EUR", "placed": str(s.past()), "status": s.choice(*ORDER_STATES)})
             for one in orders]  # fmt: skip
    values = [one.result["total"] for one in found]
    made = s.call("calculate", {"operation": "add", "operands": unordered(values), "round_to": maybe(2)},
                  {"value": round(sum(values), 2)}, after=[one.id for one in found])  # fmt: skip
    said = [s.fact(one, pointer, "number") for one, pointer in ((found[0], "/total"), (found[1], "/total"),
                                                                 (made, "/value"))]  # fmt: skip
    request = (f"What are the totals of {orders[0]} and {orders[1]} in euros, and what do they add up to? Do the sum "
               "with the calculator.")  # fmt: skip
    return Task(request, f"{orders[0]} came to {said[0]} euros and {orders[1]} to {said[1]}, together {said[2]} euros.")


def cancel_in_time(s: Scene) -> Task:
    """Days between, then a reminder on the last of them; both follow from the request, so in any order."""
    start, end, chore, time = s.day(120), s.day(120), s.pick("chore"), s.time()
    found = s.call("date_difference", {"start": on(str(start)), "end": on(str(end)), "unit": maybe("days")},
                   wanted=lambda r: r["value"] > 1)  # fmt: skip
    made = s.call("set_reminder", {"text": either(chore, chore.capitalize()), "when": {"date": str(end), "time": time}})
    days, number = s.fact(found, "/value", "number"), s.fact(made, "/reminder_id", "id")
    request = (f'How many days lie between {s.said(start)} and {s.said(end)}? And set a reminder that reads "{chore}" '
               f"on the later day at {time}; what is its id?")  # fmt: skip
    return Task(request, f"{days} days lie between them; the reminder is {number}.")


def climates(s: Scene) -> Task:
    """One tool for two or three cities."""
    cities, (day, when) = [s.pick("city") for _ in range(s.draw.between(2, 3))], s.soon()
    made = [s.call("get_weather", {"city": city, "date": on(str(day)), "units": "celsius"}) for city in cities]
    said = [s.fact(one, "/temperature", "number") for one in made]
    parts = [f"{city} {warm}" for city, warm in zip(cities, said, strict=True)]
    request = f"Forecast temperatures in degrees Celsius {when}, please: {', '.join(cities)}."
    return Task(request, f"Degrees Celsius {when}: {', '.join(parts)}.")


def quotes(s: Scene) -> Task:
    """One tool for two shares, and their difference."""
    symbols = [s.pick("symbol") for _ in range(2)]
    made = [s.call("get_stock_quote", {"symbol": symbol, "currency": "EUR"}) for symbol in symbols]
    prices = [s.fact(one, "/price", "number") for one in made]
    gap = s.derive(round(abs(made[0].result["price"] - made[1].result["price"]), 2))
    request = f"In euros, what do {symbols[0]} and {symbols[1]} trade at, and how far apart are they?"
    return Task(
        request, f"{symbols[0]} trades at {prices[0]} euros and {symbols[1]} at {prices[1]}, {gap} euros apart."
    )


def offers(s: Scene) -> Task:
    """One tool with two services, and the saving."""
    start, end, weight = s.code("99999"), s.code("99999"), s.draw.between(11, 290) / 10
    services = ("economy", "express")
    made = [s.call("estimate_shipping", {"from_zip": start, "to_zip": end, "service": service,
                                         "parcels": [{"weight_kg": weight}]}, {"price_eur": price})
            for service, price in zip(services, (s.draw.between(401, 3900) / 100, s.draw.between(4100, 17_900) / 100),
                                      strict=True)]  # fmt: skip
    prices = [s.fact(one, "/price_eur", "number") for one in made]
    saved = s.derive(round(made[1].result["price_eur"] - made[0].result["price_eur"], 2))
    request = (f"One parcel of {weight} kilograms from {start} to {end}: what do economy and express cost in euros, "
               "and what does economy save?")  # fmt: skip
    return Task(request, f"Economy costs {prices[0]} euros and express {prices[1]}; economy saves {saved} euros.")


def articles(s: Scene) -> Task:
    """One tool for two articles, and the units of both."""
    place, skus = s.choice(*WAREHOUSES), [s.code("AAA-9999") for _ in range(2)]
    made = [s.call("check_stock", {"sku": sku, "warehouses": [place]},
                   {"levels": [{"warehouse": place, "units": s.draw.between(104, 8900)}]}) for sku in skus]  # fmt: skip
    units = [s.fact(one, "/levels/0/units", "number") for one in made]
    both = s.derive(sum(one.result["levels"][0]["units"] for one in made))
    request = f"How many units of {skus[0]} and of {skus[1]} does {place.capitalize()} hold, and how many in all?"
    return Task(request, f"{units[0]} units of {skus[0]} and {units[1]} of {skus[1]}, {both} in all.")


def independent(s: Scene) -> Task:
    """Two or three single requests in one message, of different tools."""
    pool: tuple[Maker, ...] = (*READING, *UNSEEN_READING, appointment, reminder, ticket, timer)
    chosen = s.draw.sample([maker for maker in pool if maker is not contact], s.draw.between(2, 3))
    tasks = [maker(s) for maker in chosen]
    request = "".join(mark + task.request for mark, task in zip(s.draw.choice(JOINTS), tasks, strict=False))
    return Task(request, " ".join(task.answer for task in tasks))


CHAINS: tuple[Maker, ...] = (write_to, follow_parcel, fly, share_in, postpone, jot_down, invoice_customer)
JOINS: tuple[Maker, ...] = (readings, both_orders, cancel_in_time)
SAME: tuple[Maker, ...] = (climates, quotes, offers, articles)
