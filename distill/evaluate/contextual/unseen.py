"""Requests that one call of a held-out tool settles: schemas that no training prompt offers."""

from __future__ import annotations

from distill.evaluate.contextual.requests import Maker
from distill.evaluate.contextual.scene import Scene, Task, either, maybe, near, on, unordered

WAREHOUSES = ("antwerp", "basel", "gdynia", "trieste")
TIERS = ("basic", "silver", "gold", "platinum")


def tide(s: Scene) -> Task:
    station, (day, when), part = s.pick("station"), s.soon(), s.choice("high", "low")
    made = s.call("lookup_tide", {"station": station, "day": on(str(day)), "datum": "chart"}, {part: water(s, part)})
    time, height = s.fact(made, f"/{part}/time", "time"), s.fact(made, f"/{part}/height_m", "number")
    request = f"When is {part} water at {station} {when}, and how many metres above chart datum?"
    return Task(
        request, f"{part.capitalize()} water at {station} is at {time} {when}, {height} metres above chart datum."
    )


def water(s: Scene, part: str) -> dict[str, object]:
    """High or low water."""
    height = s.draw.between(210, 890) if part == "high" else s.draw.between(12, 139)
    return {"time": f"{s.draw.below(24):02}:{s.draw.between(10, 59)}", "height_m": height / 100}


def dinner(s: Scene) -> Task:
    place, day, time = s.pick("restaurant"), s.day(), s.choice("18:30", "19:00", "19:30", "20:15", "21:00")
    adults, seating = s.draw.between(2, 9), s.choice("indoor", "terrace", "bar")
    children = s.draw.below(4)
    party = (
        {"adults": adults, "children": children}
        if children
        else either({"adults": adults}, {"adults": adults, "children": 0})
    )
    made = s.call("reserve_table", {"restaurant": place, "party": party, "slot": {"date": str(day), "time": time},
                                    "seating": seating}, wanted=lambda r: r["table"] > 9)  # fmt: skip
    number, table = s.fact(made, "/reservation_id", "id"), s.fact(made, "/table", "number")
    people = f"{adults} adults" + (f" and {children} children" if children > 1 else " and 1 child" if children else "")
    where = {"indoor": "indoors", "terrace": "on the terrace", "bar": "at the bar"}[seating]
    request = (f"Get us a table at {place}, {where}, for {people}, on {s.said(day)} at {time}. "
               "I want the reservation id and the table number.")  # fmt: skip
    return Task(request, f"Your table at {place} is reserved for {s.said(day)} at {time}: {number}, table {table}.")


def shipping(s: Scene) -> Task:
    start, end, service = s.code("99999"), s.code("99999"), s.choice("economy", "standard", "express")
    weights = [s.draw.between(11, 290) / 10 for _ in range(s.draw.between(1, 2))]
    parcels = [{"weight_kg": weight} for weight in weights]
    arguments = {"from_zip": start, "to_zip": end, "service": service,
                 "parcels": unordered(parcels) if len(parcels) > 1 else parcels}  # fmt: skip
    made = s.call("estimate_shipping", arguments)
    price, carrier = s.fact(made, "/price_eur", "number"), s.fact(made, "/carrier", "string")
    what = " and ".join(f"one of {weight} kilograms" for weight in weights)
    request = (
        f"Parcels from {start} to {end}, {service} service: {what}. What is the price in euros, and who carries them?"
    )
    return Task(request, f"{carrier} carries them from {start} to {end} for {price} euros.")


def stock(s: Scene) -> Task:
    sku, places = s.code("AAA-9999"), s.draw.sample(WAREHOUSES, 2)
    levels = [{"warehouse": place, "units": s.draw.between(104, 8900)} for place in places]
    made = s.call("check_stock", {"sku": sku, "warehouses": unordered(places)},
                  {"levels": levels, "restock_on": str(s.day())})  # fmt: skip
    units, day = [s.fact(made, f"/levels/{i}/units", "number") for i in (0, 1)], s.fact(made, "/restock_on", "date")
    first, second = (place.capitalize() for place in places)
    request = f"Article {sku}: how many units do {first} and {second} have each, and when does more arrive?"
    return Task(request, f"{first} has {units[0]} units of {sku} and {second} {units[1]}; more arrives on {day}.")


def customer(s: Scene) -> Task:
    number, person = s.code("C-99999"), s.pick("person")
    made = s.call("get_customer", {"customer_id": number, "fields": maybe(["tier", "balance"])},
                  {"contact": {"name": person, "email": s.mail(person)}, "remarks": []})  # fmt: skip
    tier, balance = s.word(made, "/tier", TIERS), s.fact(made, "/balance_eur", "number")
    request = s.choice(
        f"For {number} I need the tier and the balance in euros.",
        f"Which tier does {number} have, and what is the balance on that account in euros?",
    )
    return Task(request, f"{number} has the tier {tier} and a balance of {balance} euros.")


def sensor(s: Scene) -> Task:
    number, day, kind = f"S{s.code('999')}", s.past(), s.choice("mean", "max", "min")
    hours = sorted(s.draw.sample(range(1, 23), 2))
    window = {"from": f"{day}T{hours[0]:02}:00:00", "to": f"{day}T{hours[1]:02}:00:00"}
    made = s.call("query_sensor", {"sensor_id": number, "window": window, "aggregate": kind},
                  wanted=lambda r: r["value"] > 9)  # fmt: skip
    value, unit = s.fact(made, "/value", "number"), s.word(made, "/unit", ("kPa", "lux", "ppm", "mm"))
    name = {"mean": "mean", "max": "highest", "min": "lowest"}[kind]
    request = (f"What was the {name} reading of sensor {number} on {s.said(day)} between {hours[0]:02}:00 and "
               f"{hours[1]:02}:00, with its unit?")  # fmt: skip
    return Task(request, f"The {name} reading of {number} was {value} {unit}.")


def expense(s: Scene) -> Task:
    amount, day = s.draw.between(1200, 98_000) / 100, s.past()
    money, category = s.choice("EUR", "GBP", "CHF", "NOK"), s.choice("travel", "lodging", "supplies")
    centre, receipt = f"CC{s.code('999')}", s.code("AA-9999")
    made = s.call("submit_expense", {"amount": near(amount), "currency": money, "day": on(str(day)),
                                     "category": category, "cost_centre": centre, "receipt": {"number": receipt}},
                  {"pay_day": str(s.day())})  # fmt: skip
    number, paid = s.fact(made, "/expense_id", "id"), s.fact(made, "/pay_day", "date")
    request = (f"Claim back {amount} {money} for {category}, spent on {s.said(day)}, receipt number {receipt}, cost "
               f"centre {centre}. Tell me the expense id and the day it is paid out.")  # fmt: skip
    return Task(request, f"The claim is filed as {number} and is paid out on {paid}.")


def logged(s: Scene) -> Task:
    service, level, word = s.pick("service"), s.choice("warning", "error"), s.pick("stem")
    row = {"time": s.time(), "code": s.code("L9999"), "message": f"{word}: retry budget spent"}
    made = s.call("log_search", {"service": service, "level": level, "contains": word}, {"entries": [row]})
    time, number = s.fact(made, "/entries/0/time", "time"), s.fact(made, "/entries/0/code", "id")
    request = (f'Has {service} logged any line of level {level} containing "{word}"? If so, give me its time of day '
               "and its code.")  # fmt: skip
    return Task(request, f"Yes, at {time}, with the code {number}.")


UNSEEN: tuple[Maker, ...] = (tide, dinner, shipping, stock, customer, sensor, expense, logged)
UNSEEN_READING: tuple[Maker, ...] = (tide, shipping, stock, customer, sensor, logged)
