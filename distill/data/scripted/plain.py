"""Answers without a call: to the controls of distill/data/prompts/tool_requests.py, to what no tool can do, and to
requests that lack something. {city_2} is the second city of a request."""

from __future__ import annotations

from typing import NamedTuple


class Reply(NamedTuple):
    """The tools that tempt, the request and its answer."""

    tools: tuple[str, ...]
    text: str
    answer: str


CONTROLS: dict[str, str] = {
    "Why is it often windy near the sea? I live in {city}.":
        "Land and water warm at different speeds, and the air moves between them; open water hardly slows it.",
    "In {city} it is {minutes} degrees now and it was {minutes} yesterday. Did it get warmer?":
        "{warmer}: it was {minutes_2} degrees yesterday and is {minutes} now.",
    "In your own words, what are {topic} about? No research, please.":
        "In short, about {topic} as people meet them: what there is, what it takes and what it costs.",
    "Give me two good search terms for {topic}; I'll search myself {when}.":
        "Try \"{topic} guide\" and \"{topic} comparison\".",
    "What does it mean to round {decimal} to the nearest whole number?":
        "It means to take the whole number that is closest to {decimal}.",
    "Which is longer, a mile or a kilometre? I only need to know for {spot}.": "A mile is longer than a kilometre.",
    "What is an exchange rate? {first} asked me before a trip with {currency}.":
        "It says how much of one currency is paid for one unit of another.",
    "How would you plan a calm day with {event} at {time}? Just advice, change nothing.":
        "Keep the hour before {time} free, and put nothing else next to {event}.",
    "Suggest a friendlier title for my event \"{event} with {first}\".": "How about \"Catching up with {first}\"?",
    "Draft a mail to {first} about {matter}. Don't send it, I want to read it first.":
        "Dear {first},\nI would like to talk with you about {matter}. When would it suit you?\nBest wishes",
    "Is \"Dear {first}\" or \"Hi {first}\" better in a mail about {matter}?":
        "\"Hi {first}\" if you know each other well, else \"Dear {first}\".",
    "What is usually kept in a folder called {folder}?": "Usually just what its name says, sorted by date or subject.",
    "What is the difference between a {extension} file and a plain text file? I have {file} in mind.":
        "A plain text file holds characters only; a {extension} file follows rules that its program reads.",
    "Give me a tip to keep notes about {topic} short.": "Write one line for each thought, and leave out what you know.",
    "Is it usually healthier to travel {mode} than to sit all day? I go to {spot} daily.":
        "Every move helps: whatever makes you walk a little is healthier than to sit all day.",
    "What makes a good {category}? I want to open one near {spot}.":
        "Friendly people, fair prices, and opening hours that suit the neighbours.",
    "Explain what a share such as {symbol} is to {first}, who is eleven.":
        "A share is a tiny piece of a company: whoever has one, {first}, owns a little of it.",
    "Which language is harder for English speakers, {language} or {language}, and why?":
        "That depends on the learner: {language} and {language_2} both share many words with English.",
    "Thanks, I have already set the reminder to {chore} for {date}!": "Very good, then nothing is left to do.",
    "{dish} needs {minutes} minutes and I have {minutes} minutes already. How would you decide when to stop?":
        "Compare the time that has passed with the {minutes} minutes, and look at the result before you stop.",
    "Why does music help {first} to concentrate in the {room}?":
        "Steady music covers sudden noises, so attention is disturbed less often.",
    "How can the {device} in the {room} save energy? Leave it as it is.":
        "Use the {device} only while somebody is in the {room}, and at the lowest setting that is enough.",
    "Is {identifier} a good name for something in {repository}? Just your opinion.":
        "I think so: {identifier} says what it is for.",
    "Reword this ticket title, I'll file it myself: \"{defect}\" in {project}.": "How about \"Bug: {defect}\"?",
    "My order {order} came {when}, all is well. Write a thank-you line to the shop.":
        "Thank you, order {order} has arrived and all is well!",
    "Which columns would you give a table called {table}? We have {number} rows on paper.":
        "For {table} I would take an id, a name, an amount and the date of creation.",
    "Which parts does the address {url} have, and what is each called?":
        "First the scheme \"https\", then the host name, and after the next slash the path.",
    "Use the words {word} and {word} in one sentence about {city}.":
        "In {city} somebody wrote \"{word}\" on one wall and \"{word_2}\" on the next.",
    "What should {first} pack for a short flight from {airport} to {airport}?":
        "An identity card, a charger, something to read and a light jacket.",
    "Is {date} before or after {date}?": "{date} is before {date_2}.",
    "{person} and {person} have the same birthday. What could I write on both cards?":
        "\"Happy birthday, and a year full of good days!\"",
    "What is the difference between a bug and a task? {first} asks because of {project}.":
        "A bug is something that works wrongly; a task is work that is still to be done.",
}  # fmt: skip

DECLINES = (
    Reply(("find_places", "set_timer"), "Order two pizzas to {spot} for {time}.",
          "I cannot order food; I can only look for places."),
    Reply(("web_search",), "Paint me a small picture of {city} at night.", "I cannot make pictures."),
    Reply(("set_device",), "Vacuum the {room}, please.", "I cannot vacuum: no device that I can switch does that."),
    Reply(("set_device", "get_directions"), "Lock the front door, I am already at {spot}.",
          "I cannot lock doors: none of my tools reaches a lock."),
    Reply(("convert_currency", "find_contact"), "Transfer {amount} {currency} to {person}.",
          "I cannot transfer money; I can only convert amounts."),
    Reply(("search_email",), "Delete the mails from {person}.", "I can search your mails, but I cannot delete them."),
    Reply(("read_file", "list_files"), "Rename {file} to something shorter.",
          "I can read files, but I cannot rename them."),
    Reply(("search_email", "find_contact"), "Read me the text messages from {first}.",
          "I cannot read text messages; I only have access to mails."),
    Reply(("translate",), "Translate \"{phrase}\" into Japanese with the tool.",
          "I cannot: the tool translates into French, German, Spanish and Italian only."),
    Reply(("get_stock_quote",), "Sell my {symbol} shares before the market closes.",
          "I can get the price of a share, but I cannot sell any."),
    Reply(("get_order",), "Change the delivery address of order {order} to {spot}.",
          "I can look up order {order}, but I cannot change it."),
    Reply(("get_order",), "Refund order {order} to the customer {first}.",
          "I can look up order {order}, but I cannot refund it."),
    Reply(("track_shipment",), "Have parcel {tracking} held back at the depot.",
          "I can track the parcel, but I cannot stop it."),
    Reply(("find_places", "search_flights"), "Book me a hotel room in {city} for {date}.",
          "I cannot book hotel rooms with the tools that I have."),
    Reply(("find_tickets", "create_ticket"), "Hand the oldest ticket of {project} over to {first}.",
          "I can list and open tickets, but I cannot assign one that exists."),
    Reply(("search_code",), "Fix {identifier} in {repository} and deploy the change.",
          "I can search the code, but I cannot change or deploy it."),
    Reply(("query_table",), "Add a row with the name {person} to the table {table}.",
          "I can read the table {table}, but I cannot add rows."),
    Reply(("set_reminder",), "Remove the old reminder to {chore}.", "I can set reminders, but I cannot remove them."),
    Reply(("append_to_note", "get_weather"), "Measure my pulse before {event}.",
          "I cannot measure a pulse: I have no tool for that."),
    Reply(("search_flights", "book_flight"), "Give back my seat on the flight from {airport} to {airport} on {date}.",
          "I can book flights, but I cannot cancel a booking."),
    Reply(("check_url",), "Restart the server behind {url}.", "I can check {url}, but I cannot restart the server."),
    Reply(("search_notes",), "Record a voice memo about {matter}.", "I cannot record sound."),
    Reply(("set_device", "set_timer"), "Water the flowers in the {room} for me.",
          "I cannot water flowers: no device that I can switch does that."),
    Reply(("find_contact",), "Save the new phone number of {first} in my contacts.",
          "I can look contacts up, but I cannot change them."),
    Reply(("find_events", "move_event"), "Remove {event} on {date} from my calendar.",
          "I can find and move events, but I cannot remove them."),
    Reply(("convert_currency",), "Convert {amount} {currency} to Mexican pesos.",
          "The tool does not know Mexican pesos, so I cannot convert that."),
    Reply(("play_music",), "Make a new song about {topic} and upload it.", "I can play music, but I cannot make any."),
    Reply(("create_event", "find_contact"), "Call {person} and say that I am late for {event}.",
          "I cannot make calls."),
)  # fmt: skip

CLARIFIES = (
    Reply(("set_timer",), "Set a timer for {dish}.", "For how many minutes shall I set the timer?"),
    Reply(("create_event",), "Put {event} into my calendar.", "On which day and at what time shall I put {event}?"),
    Reply(("set_reminder",), "Remind me to {chore}, please.", "On which day and at what time shall I remind you?"),
    Reply(("get_weather",), "What will the weather be like {when}?", "For which city do you want to know?"),
    Reply(("convert_currency",), "Convert {amount} {currency} for me.", "Into which currency shall I convert it?"),
    Reply(("convert_units",), "Convert {decimal} into another unit for me.",
          "From which unit to which shall I convert {decimal}?"),
    Reply(("track_shipment",), "{first} sent me a parcel. Track it, please.", "What is its tracking number?"),
    Reply(("get_order",), "Look up the order that I placed on {past}.", "What is the number of the order?"),
    Reply(("search_flights",), "Find me a flight on {date}.", "From which airport to which?"),
    Reply(("search_flights",), "Find flights that leave {airport} on {date}.", "To which airport do you want to fly?"),
    Reply(("search_flights",), "Find flights from {airport} to {airport}.", "On which day do you want to fly?"),
    Reply(("get_directions",), "Get me directions to {spot} {mode}.", "From where do you start?"),
    Reply(("send_email",), "Send a mail about {matter}.", "To which address, and what shall it say?"),
    Reply(("send_email",), "Mail {mail} for me, would you?", "What shall the mail to {mail} say?"),
    Reply(("translate",), "Translate \"{phrase}\" for {first}.",
          "Into which language: French, German, Spanish or Italian?"),
    Reply(("create_ticket",), "Open a ticket: {defect}.", "In which project shall I open it?"),
    Reply(("search_code",), "Search the code for {identifier}.", "In which repository shall I search?"),
    Reply(("set_device",), "Switch on the {device}.", "In which room?"),
    Reply(("set_device",), "Turn something off in the {room}.", "Which device in the {room} shall I turn off?"),
    Reply(("check_url",), "{first} says that the site is down. Check it.", "Which address shall I check?"),
    Reply(("book_flight",), "Book a seat for {person}.", "On which flight? I need its number."),
    Reply(("find_places",), "Find me a {category}.", "Near which place shall I look?"),
    Reply(("date_difference",), "Count the days from {date} on.", "Up to which day shall I count?"),
    Reply(("get_stock_quote",), "Get the share price that {first} wants.", "Of which share? I need its symbol."),
    Reply(("define_word",), "Look up the word that {first} used.", "Which word was it?"),
    Reply(("find_tickets",), "List the tickets that {first} works on.", "Of which project?"),
    Reply(("append_to_note",), "Append \"{chore}\" to one of my notes.",
          "To which note? I need its number."),
    Reply(("calculate",), "Work out the average for {first}.", "The average of which numbers?"),
    Reply(("move_event",), "Move one of my events to {date}.", "Which event, and to what time on that day?"),
    Reply(("list_files",), "List the {extension} files.", "In which folder shall I look?"),
    Reply(("search_notes",), "{first} needs one of my notes. Find it.", "What is the note about?"),
)  # fmt: skip
