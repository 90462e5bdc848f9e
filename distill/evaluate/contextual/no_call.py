"""Requests whose right answer calls nothing: no tool is needed, none can do it, or something must be asked first."""

from __future__ import annotations

import re
from typing import NamedTuple

from distill.evaluate.contextual.scene import Scene, Task
from distill.evaluate.contextual.words import WORDS

_SLOT = re.compile(r"\{(\w+)\}")


class Case(NamedTuple):
    """A request and its right answer, and the tools that tempt. {city_b} is another city than {city}."""

    request: str
    answer: str
    tempting: tuple[str, ...]


def filled(s: Scene, case: Case) -> Task:
    """A case about drawn things."""
    values = {slot: _value(s, slot.partition("_")[0]) for slot in dict.fromkeys(_SLOT.findall(case.request))}
    return Task(case.request.format(**values), case.answer.format(**values))


def _value(s: Scene, slot: str) -> str:
    made = {"n": lambda: str(s.draw.between(21, 96)), "time": s.time, "day": lambda: s.said(s.day()),
            "order": lambda: s.code("ORD-999999"), "parcel": lambda: s.code("AA999999999"),
            "event": lambda: s.code("EV-99999"), "client": lambda: s.code("C-99999"),
            "ticket": lambda: s.code("T-9999"), "number": lambda: s.code("N-9999"),
            "mail": lambda: s.mail(s.pick("person")), "flight": lambda: s.code("QX9999"),
            "first": lambda: s.pick("person").split()[0]}  # fmt: skip
    return s.pick(slot) if slot in WORDS else made[slot]()


CONTROLS = (
    Case("My flat in {city} has thin walls and {first} plays the cello at {time}. Give me one kind sentence for a note "
         "under the door.",
         "Dear {first}, your cello is lovely, but the walls are thin; could you play a little earlier?",
         ("send_email", "append_to_note")),
    Case("For a crossword: what do sailors call the time when the sea stands lowest? {first} from {station} wants to "
         "know, and no figures please.", "Sailors call it low water, or low tide.", ("lookup_tide", "web_search")),
    Case("Proofreading for {first}: \"it is {n} degrees hot in {city}\" or \"the temperature in {city} is {n} "
         "degrees\", which is better style?",
         "The second: \"the temperature in {city} is {n} degrees\" is the more careful of the two.",
         ("get_weather", "convert_units")),
    Case("Polish this sentence for me, nothing more: \"{first} and me was at {landmark} before it have opened.\"",
         "Here it is: \"{first} and I were at {landmark} before it opened.\"", ("get_directions", "find_places")),
    Case("Yesterday I filed the ticket about \"{defect}\" under {project} on my own. Just say something cheering.",
         "Well done: it is reported now, and half of every repair is a good report.",
         ("create_ticket", "find_tickets")),
    Case("What is the polite way to decline a dinner at {restaurant} that {person} has proposed? One line will do.",
         "Thank you for thinking of me; sadly I cannot make it, and I hope you enjoy {restaurant}.",
         ("reserve_table", "send_email", "find_contact")),
    Case("In one sentence and from general knowledge, why does bread from {city} or anywhere else go stale?",
         "Its starch slowly crystallises and lets go of its water, so the crumb turns firm.",
         ("web_search", "define_word")),
    Case("The label on {parcel} fell off, but {first} has it in hand now, so there is nothing left to follow. Wish us "
         "luck!",
         "Good luck to you and {first}; may the next label stick better.", ("track_shipment", "get_order")),
    Case("Think of a friendlier name for a calendar entry that is now called \"{appointment}\". I will rename it later "
         "on my own, on {day}.", "How about \"{appointment}, with coffee\"?",
         ("create_event", "move_event", "find_events")),
    Case("Does it sound better to say that {symbol} shares rose or that they climbed? It is for {first}'s school "
         "essay.", "Both are right; \"rose\" is plainer, and \"climbed\" sounds a little livelier.",
         ("get_stock_quote", "define_word")),
    Case("Write two rhyming lines about {chore}, as a joke for {person}. No reminder, I am doing it right now.",
         "There is a task that no one would choose, and it is a fine one to do in old shoes.",
         ("set_reminder", "set_timer")),
    Case("Between us: is {identifier} a clear name for a function in {repository}, or is it too clever? I only want a "
         "feeling.", "It is clear enough, as long as the code around it uses the same words.",
         ("search_code", "create_ticket")),
    Case("A folder called {folder} and a folder called {folder_b}: which name comes first in the alphabet? Answer with "
         "the rule, not the name.",
         "Compare the names letter by letter; where they first differ, the earlier letter wins.",
         ("list_files", "read_file")),
    Case("What question should I put to {person} first if we meet at {landmark} to talk about {note}? A suggestion is "
         "enough.", "Ask what matters most to {person} about {note}; the rest follows from that.",
         ("find_contact", "search_notes", "create_event")),
    Case("I am nervous about flying with {flight} from {airport} to {airport_b}. Say something calm, I have my ticket "
         "already.", "You are in good hands: crews train for years, and a bumpy stretch is unpleasant but safe.",
         ("search_flights", "book_flight", "get_weather")),
    Case("Explain to {first}, aged nine, what the balance of a customer such as {client} means. Leave the real record "
         "closed.", "It is what the shop still owes the customer, or the customer owes the shop, all added up.",
         ("get_customer", "query_table")),
    Case("I walked past {landmark} and it was so foggy that I thought of {city}. How does fog come about, in a "
         "nutshell?",
         "Damp air cools until its water can no longer stay vapour, and tiny drops hang in the air.",
         ("get_weather", "get_directions", "web_search")),
    Case("Please never play {album} at breakfast. You need not do anything now, just acknowledge.",
         "Understood: no {album} at breakfast.", ("play_music", "set_device")),
    Case("Which tone fits a sign at {place}: \"{heard} only\" or \"Please leave this to {heard}\"?",
         "The second one: \"Please leave this to {heard}\" is friendlier.", ("find_places", "translate")),
    Case("I keep mixing up log levels. Roughly, when would {service} write a warning instead of an error? No lookup.",
         "A warning says that something odd happened and work goes on; an error says that something failed.",
         ("log_search", "check_url")),
)  # fmt: skip

DECLINES = (
    Case("Call me a taxi from {landmark} to {landmark_b} for {time}.",
         "I cannot order taxis with the functions I have. A taxi company in your area can do it by phone.",
         ("get_directions", "set_reminder")),
    Case("Delete everything in {folder} that has {stem} in its name.",
         "I can only list and read files; deleting them is not possible for me.", ("list_files", "read_file")),
    Case("Cancel {order} and have the money sent back.",
         "I cannot cancel orders or refund money; please turn to the shop's customer service.", ("get_order",)),
    Case("Redirect {parcel} to {landmark} in {city}.",
         "I can follow a shipment but not redirect it; the carrier can do that for you.", ("track_shipment",)),
    Case("Say \"{chore}\" in Finnish, using the translator.",
         "The translator that I have offers only French, German, Spanish and Italian, so Finnish is not possible.",
         ("translate", "define_word")),
    Case("Turn on the garden sprinkler behind {note} at once.",
         "I cannot reach a garden sprinkler: I have no function for that device.", ("set_device", "set_timer")),
    Case("Buy {n} shares of {symbol} at the best price.",
         "I can look up prices, but I cannot buy or sell shares.", ("get_stock_quote",)),
    Case("Ring {person} and put me through.", "I cannot make phone calls.", ("find_contact",)),
    Case("Print the file {settings} on the office printer, {n} copies.",
         "I have no function for printing, so I cannot do that.", ("read_file", "list_files")),
    Case("Post \"{defect}\" on our social media page.",
         "I have no access to social media, so I cannot post that.", ("create_ticket", "fetch_page")),
    Case("Convert {n} Icelandic krónur to Turkish lira with the currency converter.",
         "The converter knows neither Icelandic krónur nor Turkish lira, so I cannot convert that amount.",
         ("convert_currency",)),
    Case("Close {ticket} of {project} as a duplicate.",
         "I can find and open tickets, but I cannot close them.", ("find_tickets", "create_ticket")),
    Case("Raise the credit limit of customer {client}.",
         "I can read a customer's record but not change it.", ("get_customer",)),
    Case("Take a photo with the camera at {landmark} and show me who is there.",
         "I have no access to cameras, so I cannot do that.", ("find_places", "query_sensor")),
)  # fmt: skip

CLARIFIES = (
    Case("Get us a table at {restaurant} on {day}.",
         "For how many people, and at what time shall I reserve?", ("reserve_table",)),
    Case("What became of my order? {first} is asking, too.", "What is the order number?", ("get_order",)),
    Case("Where is the parcel from {city} by now?", "Which tracking number does the parcel have?", ("track_shipment",)),
    Case("Enter \"{appointment}\" in my calendar, please.",
         "On which day, and at what time does it start?", ("create_event",)),
    Case("Set a reminder to {chore}.", "For which day and time shall I set it?", ("set_reminder",)),
    Case("Flights to {airport} for {first}, please.",
         "From which airport, and on which day?", ("search_flights",)),
    Case("How long is the way to {landmark}?", "Where do you start?", ("get_directions",)),
    Case("Write to {mail} for me.", "What shall the subject be, and what shall I write?", ("send_email",)),
    Case("Move {event} to another time.", "To which day and time?", ("move_event",)),
    Case("Change my money into Swiss francs for {city}, I mean: how much would I get?",
         "How much money is it, and in which currency?", ("convert_currency",)),
    Case("How much is it to send a parcel to {person} in {city}?",
         "Please tell me both postal codes and the weight of the parcel.", ("estimate_shipping",)),
    Case("Claim back what I spent in {city} on {day}.",
         "How much was it, in which currency, and for which category: travel, meals, lodging or supplies?",
         ("submit_expense",)),
    Case("What was the mean of the sensor by {landmark}?",
         "Which sensor is it, and for which span of time do you want the mean?", ("query_sensor",)),
    Case("Book the flight for {person}.", "Which flight shall I book?", ("book_flight",)),
    Case("Attach \"{chore}\" to the note.", "Which note do you mean? I need its number.", ("append_to_note",)),
    Case("Log a new ticket about \"{defect}\".", "Under which project shall I file it?", ("create_ticket",)),
)  # fmt: skip
