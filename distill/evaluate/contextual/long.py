"""The one thing that matters among thousands of characters, in a result or in the conversation, at several depths."""

from __future__ import annotations

from distill.chat import Message
from distill.evaluate.contextual.carriers import filler
from distill.evaluate.contextual.requests import ORDER_STATES, PARCEL_STATES
from distill.evaluate.contextual.scene import Scene, Task, maybe
from distill.evaluate.contextual.unseen import TIERS

CHARACTERS = 6000
DEPTHS = {"start": 0.05, "middle": 0.5, "end": 0.95}


def _place(s: Scene, depth: float, n: int) -> int:
    """An index near that depth of n."""
    return min(n - 1, max(0, int(depth * n) + s.draw.between(-2, 2)))


def in_page(s: Scene, depth: float, characters: int = CHARACTERS) -> Task:
    """A price list on a web page, among much else."""
    url, station = f"https://{s.pick('host')}/{s.pick('page')}/{s.draw.between(100, 999)}", s.pick("station")
    paragraphs: list[str] = []
    while sum(map(len, paragraphs)) < characters:
        berth = s.code("A99")
        priced = f"Berth {berth} at {station} costs {s.draw.between(301, 2990)} euros a season."
        paragraphs.append(priced if s.draw.chance(0.2) else f"{filler(s)} {filler(s)}")
    place, berth, price = _place(s, depth, len(paragraphs)), s.code("A99"), s.draw.between(301, 2990)
    paragraphs[place] = f"Berth {berth} at {station} costs {price} euros a season."
    made = s.call("fetch_page", {"url": url}, {"title": s.pick("subject"), "updated": str(s.past()),
                                               "paragraphs": paragraphs})  # fmt: skip
    said = s.fact(made, f"/paragraphs/{place}", "string", s.said(price), str(price))
    return Task(f"According to {url}, what does berth {berth} at {station} cost a season, in euros?",
                f"Berth {berth} at {station} costs {said} euros a season.")  # fmt: skip


def in_log(s: Scene, depth: float, characters: int = CHARACTERS) -> Task:
    """A line of a long log."""
    service, level = s.pick("service"), s.choice("warning", "error")
    job = f"{s.pick('stem')}-{s.draw.between(100, 999)}"
    messages: list[str] = []
    while sum(map(len, messages)) + 40 * len(messages) < characters:
        messages.append(filler(s))
    place = _place(s, depth, len(messages))
    messages[place] = f"{job} was rolled back"
    rows = [{"time": f"{7 + minute // 60:02}:{minute % 60:02}", "code": s.code("L9999"), "message": message}
            for minute, message in enumerate(messages, 15)]  # fmt: skip
    made = s.call("log_search", {"service": service, "level": level, "limit": maybe(500)}, {"entries": rows})
    time, number = s.fact(made, f"/entries/{place}/time", "time"), s.fact(made, f"/entries/{place}/code", "id")
    return Task(f"Read every {level} of {service}, unfiltered. When was {job} rolled back, and under which code?",
                f"The job {job} was rolled back at {time}; the line has the code {number}.")  # fmt: skip


def in_conversation(s: Scene, depth: float, characters: int = CHARACTERS) -> tuple[Task, tuple[Message, ...]]:
    """Minutes that name an order, a parcel or a customer, in the request itself or in an earlier turn."""
    person = s.pick("person")
    sentences: list[str] = []
    while sum(map(len, sentences)) < characters:
        sentences.append(filler(s))
    which = s.draw.below(3)
    number = s.code(("ORD-999999", "AA999999999", "C-99999")[which])
    name = ("order", "parcel", "customer number")[which]
    sentences[_place(s, depth, len(sentences))] = f"{person} reported on {name} {number}."
    question, answer = (_order, _parcel, _customer)[which](s, number, person)
    text = " ".join(sentences)
    if s.draw.chance(0.5):
        return Task(f"{text}\n\nThat was the protocol. {question}", answer), ()
    earlier = (Message("user", f"Here is the protocol, questions follow.\n\n{text}"),
               Message("assistant", "I have read it. What would you like to know?"))  # fmt: skip
    return Task(question, answer), earlier


def _order(s: Scene, number: str, person: str) -> tuple[str, str]:
    made = s.call("get_order", {"order_id": number, "include_items": maybe(False)}, {"placed": str(s.past())})
    state, total = s.word(made, "/status", ORDER_STATES), s.fact(made, "/total", "number")
    return (f"Look up the order that {person} reported on: what is its status, and its total?",
            f"Its status is {state}, and the total is {total}.")  # fmt: skip


def _parcel(s: Scene, number: str, person: str) -> tuple[str, str]:
    made = s.call(
        "track_shipment", {"tracking_number": number}, {"location": s.pick("city"), "expected": str(s.day(9))}
    )
    state, day = s.word(made, "/status", PARCEL_STATES), s.fact(made, "/expected", "date")
    return (f"Track the parcel that {person} reported on: what is its status, and when is it expected?",
            f"Its status is {state}, and it is expected on {day}.")  # fmt: skip


def _customer(s: Scene, number: str, person: str) -> tuple[str, str]:
    name = s.pick("person")
    made = s.call("get_customer", {"customer_id": number, "fields": maybe(["tier", "balance"])},
                  {"contact": {"name": name, "email": s.mail(name)}, "remarks": []})  # fmt: skip
    tier, balance = s.word(made, "/tier", TIERS), s.fact(made, "/balance_eur", "number")
    return (f"Open the record of the customer that {person} reported on: which tier, and what balance in euros?",
            f"The tier is {tier}, and the balance {balance} euros.")  # fmt: skip
