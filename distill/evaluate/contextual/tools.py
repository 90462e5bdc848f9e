"""The tools of the set: the built-in ones, and some that no training prompt offers, so that unseen schemas count."""

from __future__ import annotations

from distill.broker import Tool
from distill.data.prompts.tool_material import (
    BY_NAME,
    MAIL,
    MOMENT,
    TIME,
    echo,
    many,
    number,
    one_of,
    record,
    text,
    tool,
    whole,
)
from distill.data.prompts.tool_material import date as day

CUSTOMER, SKU, SENSOR, CENTRE = r"^C-[0-9]{5}$", r"^[A-Z]{3}-[0-9]{4}$", r"^S[0-9]{3}$", r"^CC[0-9]{3}$"

HELD_OUT: tuple[Tool, ...] = (
    tool("lookup_tide", "High and low water at a tide station on a day.", {"station": text(minLength=1), "day": day()},
         {"datum": one_of("chart", "mean_sea_level")},
         {"station": echo("station"),
          "high": record({"time": text(pattern=TIME), "height_m": number(1.5, 9, digits=2)}),
          "low": record({"time": text(pattern=TIME), "height_m": number(0.1, 1.4, digits=2)})}),
    tool("reserve_table", "Reserve a table in a restaurant.",
         {"restaurant": text(minLength=1), "party": record({"adults": whole(1, 20)}, {"children": whole(0, 10)}),
          "slot": record({"date": day(), "time": text("HH:MM", pattern=TIME)})},
         {"seating": one_of("indoor", "terrace", "bar"), "remark": text(maxLength=200)},
         {"reservation_id": text(pattern="^RV-[0-9]{5}$"), "table": whole(1, 60), "deposit_eur": whole(5, 90)}),
    tool("estimate_shipping", "Price and duration of sending parcels between two postal codes.",
         {"from_zip": text(pattern="^[0-9]{5}$"), "to_zip": text(pattern="^[0-9]{5}$"),
          "parcels": many(record({"weight_kg": number(0.1, 30)}, {"length_cm": whole(1, 200)}), 1, 10)},
         {"service": one_of("economy", "standard", "express")},
         {"price_eur": number(4, 180), "working_days": whole(1, 9), "carrier": text(examples=["Nordfracht", "Velopost",
                                                                                              "Rhein Kurier"])}),
    tool("check_stock", "Units of an article in warehouses.",
         {"sku": text("Article number", pattern=SKU),
          "warehouses": many(one_of("antwerp", "basel", "gdynia", "trieste"), 1, 4)}, {},
         {"levels": many(record({"warehouse": text(), "units": whole(0, 9000)}), 1, 4), "restock_on": day()}),
    tool("get_customer", "A customer's record.", {"customer_id": text(pattern=CUSTOMER)},
         {"fields": many(one_of("contact", "tier", "balance", "remarks"), 1, 4)},
         {"customer_id": echo("customer_id"),
          "contact": record({"name": text(), "email": text(pattern=MAIL)}),
          "tier": one_of("basic", "silver", "gold", "platinum"), "balance_eur": number(10, 9000),
          "remarks": many(text(), 0, 6)}),
    tool("fetch_page", "The text of a web page, by paragraph.", {"url": text(pattern="^https?://[^ ]{3,200}$")},
         {"first_paragraph": whole(1, 500)},
         {"url": echo("url"), "title": text(), "updated": day(), "paragraphs": many(text(), 1, 120)}),
    tool("query_sensor", "A sensor's readings, aggregated over a span of time.",
         {"sensor_id": text(pattern=SENSOR),
          "window": record({"from": text("YYYY-MM-DDTHH:MM:SS", pattern=MOMENT),
                            "to": text("YYYY-MM-DDTHH:MM:SS", pattern=MOMENT)}),
          "aggregate": one_of("mean", "max", "min")}, {},
         {"value": number(1, 400), "unit": one_of("kPa", "lux", "ppm", "mm"), "samples": whole(12, 9000)}),
    tool("submit_expense", "File an expense for reimbursement.",
         {"amount": number(0.01, 10_000), "currency": one_of("EUR", "GBP", "CHF", "NOK"), "day": day(),
          "category": one_of("travel", "meals", "lodging", "supplies")},
         {"cost_centre": text(pattern=CENTRE), "receipt": record({"number": text()})},
         {"expense_id": text(pattern="^EX-[0-9]{6}$"), "pay_day": day()}),
    tool("log_search", "Lines of a service's log, the oldest first.",
         {"service": text(minLength=1), "level": one_of("debug", "info", "warning", "error")},
         {"contains": text(), "limit": whole(1, 500)},
         {"entries": many(record({"time": text(pattern=TIME), "code": text(pattern="^L[0-9]{4}$"), "message": text()}),
                          0, 160)}),
)  # fmt: skip

TOOLS: dict[str, Tool] = BY_NAME | {one.name: one for one in HELD_OUT}
ASIDE = ("web_search", "query_table", "calculate", "read_file", "fetch_page")
"""So general that they could stand in for others: offered only where a scenario names them."""
RIVALS: tuple[frozenset[str], ...] = tuple(map(frozenset, (
    ("find_contact", "get_customer", "search_email"), ("set_timer", "set_reminder", "create_event"),
    ("search_notes", "search_email", "append_to_note"), ("list_files", "search_code", "log_search", "search_notes"),
    ("find_tickets", "create_ticket", "log_search"), ("reserve_table", "create_event", "find_places"),
    ("estimate_shipping", "track_shipment", "get_order"), ("convert_units", "convert_currency"),
    ("check_url", "log_search"), ("find_events", "create_event", "move_event", "date_difference"),
    ("search_flights", "book_flight"),
)))  # fmt: skip
"""Where one is needed, the others might do as well or seem called for: not among its distractors."""
QUIET = ("set_timer", "play_music", "convert_units", "get_weather", "set_device", "get_stock_quote", "lookup_tide",
         "translate", "define_word", "query_sensor", "check_stock", "date_difference")  # fmt: skip
"""Distractors beside requests that no offered tool may be able to meet."""
