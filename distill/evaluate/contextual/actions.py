"""Requests that one call of a built-in tool settles and that change something; each asks what came of it."""

from __future__ import annotations

from distill.evaluate.contextual.requests import Maker
from distill.evaluate.contextual.scene import Scene, Task, about, either, maybe, on


def appointment(s: Scene) -> Task:
    title, day, time = s.pick("appointment"), s.day(), s.time()
    length, calendar = s.draw.choice((25, 40, 50, 75, 100)), s.choice("work", "home", "family")
    made = s.call("create_event", {"title": title, "start": on(f"{day}T{time}:00"), "duration_minutes": length,
                                   "calendar": calendar}, {"conflicts": []})  # fmt: skip
    number = s.fact(made, "/event_id", "id")
    request = s.choice(
        f'Enter "{title}" in my {calendar} calendar: {s.said(day)}, {time}, {length} minutes. What is its event id?',
        f'My {calendar} calendar needs a new entry titled "{title}" on {s.said(day)}, starting {time} and lasting '
        f"{length} minutes. Tell me its event id.",
    )
    return Task(
        request, f'"{title}" is in your {calendar} calendar for {s.said(day)} at {time}; its event id is {number}.'
    )


def mail(s: Scene) -> Task:
    person, subject, thing = s.pick("person"), s.pick("subject"), s.pick("note")
    address = s.mail(person)
    made = s.call("send_email", {"to": [address], "subject": subject, "priority": maybe("normal"),
                                 "body": about(thing, f"Please bring the papers about {thing}.")})  # fmt: skip
    number, state = s.fact(made, "/message_id", "id"), s.word(made, "/status", ("sent", "queued"))
    request = (f'Write to {address} with the subject "{subject}" and ask for the papers about {thing}. '
               "Then give me the message id and whether it was sent or queued.")  # fmt: skip
    return Task(request, f"The mail to {address} was {state}; its message id is {number}.")


def reminder(s: Scene) -> Task:
    chore, day, time = s.pick("chore"), s.day(), s.time()
    made = s.call("set_reminder", {"text": either(chore, chore.capitalize()), "when": {"date": str(day), "time": time}})
    said = s.fact(made, "/reminder_id", "id")
    request = f'Set me a reminder that reads "{chore}" for {s.said(day)} at {time}, once only, and tell me its id.'
    return Task(request, f"The reminder is set for {s.said(day)} at {time}; its id is {said}.")


def music(s: Scene) -> Task:
    album, room, volume = s.pick("album"), s.choice("kitchen", "bedroom", "office"), s.draw.between(12, 70)
    made = s.call("play_music", {"query": about(album, album), "room": room, "volume": volume}, {"playing": album},
                  wanted=lambda r: r["seconds"] > 99)  # fmt: skip
    said = s.fact(made, "/seconds", "number")
    request = f"Start the album {album} in the {room}, volume {volume}. How many seconds does the first track last?"
    return Task(request, f"{album} is playing in the {room}; the first track lasts {said} seconds.")


def ticket(s: Scene) -> Task:
    project, title, priority = s.pick("project"), s.pick("defect"), s.choice("low", "medium", "high")
    made = s.call("create_ticket", {"project": project, "title": title, "priority": priority})
    said = s.fact(made, "/ticket_id", "id")
    request = (f'Log a {priority}-priority ticket under {project} with exactly this title: "{title}". '
               "Which ticket id does it have?")  # fmt: skip
    return Task(request, f"It is filed under {project} as {said}.")


def timer(s: Scene) -> Task:
    minutes, label = s.draw.between(3, 240), s.pick("chore")
    made = s.call("set_timer", {"minutes": minutes, "label": label})
    said = s.fact(made, "/timer_id", "id")
    request = f'Count down {minutes} minutes with a timer labelled "{label}". What is the id of the timer?'
    return Task(request, f"The timer is running for {minutes} minutes; its id is {said}.")


def seats(s: Scene) -> Task:
    flight_id, person, bags = s.code("QX9999"), s.pick("person"), s.draw.between(1, 3)
    seat = s.choice("window", "aisle")
    made = s.call("book_flight", {"flight_id": flight_id, "passenger_names": [person], "seat": seat, "bags": bags})
    said, paid = s.fact(made, "/booking", "id"), s.fact(made, "/paid_eur", "number")
    request = (f"Take flight {flight_id} for {person}: {seat} seat, bags: {bags}. "
               "Report the booking code and the euros paid.")  # fmt: skip
    return Task(request, f"Flight {flight_id} is booked for {person}: booking code {said}, {paid} euros paid.")


def shifted(s: Scene) -> Task:
    event, day, time = s.code("EV-99999"), s.day(), s.time()
    made = s.call("move_event", {"event_id": event, "new_start": on(f"{day}T{time}:00"), "notify": True},
                  wanted=lambda r: r["notified"] > 1)  # fmt: skip
    said = s.fact(made, "/notified", "number")
    request = f"Push {event} to {s.said(day)}, {time}, and let the attendees know. How many were told?"
    return Task(request, f"{event} now starts on {s.said(day)} at {time}; {said} attendees were told.")


def jotted(s: Scene) -> Task:
    number, chore = s.code("N-9999"), s.pick("chore")
    made = s.call("append_to_note", {"note_id": number, "text": chore, "as_task": True},
                  wanted=lambda r: r["characters"] > 99)  # fmt: skip
    said = s.fact(made, "/characters", "number")
    request = f'Attach "{chore}" as a task to the end of {number}. How many characters does that note have now?'
    return Task(request, f"Done; {number} now has {said} characters.")


WRITING: tuple[Maker, ...] = (appointment, mail, reminder, music, ticket, timer, seats, shifted, jotted)
