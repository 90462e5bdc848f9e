"""Requests for which nothing is found: the result is an empty list, and the right answer says so."""

from __future__ import annotations

from distill.evaluate.contextual.requests import Maker
from distill.evaluate.contextual.scene import Scene, Task, about, maybe, on
from distill.evaluate.contextual.words import WORDS


def _nothing(s: Scene, vocabulary: str) -> None:
    """What an invented answer would name."""
    s.decoys += [word for word in WORDS[vocabulary] if not s.has(word)]


def no_events(s: Scene) -> Task:
    day, when = s.soon()
    calendar = s.choice("work", "home", "family")
    s.call("find_events", {"range": {"start": str(day), "end": str(day)}, "calendars": [calendar]}, {"events": []})
    _nothing(s, "appointment")
    return Task(f"Anything in my {calendar} calendar {when}? That single day only: titles and lengths, please.",
                f"No, your {calendar} calendar is empty {when}.")  # fmt: skip


def no_mail(s: Scene) -> Task:
    person, since = s.pick("person"), s.past()
    s.call("search_email", {"from": person, "unread_only": True, "since": on(str(since))}, {"messages": []})
    _nothing(s, "subject")
    return Task(f"Has {person} written anything since {s.said(since)} that is still unread? Subjects, please.",
                f"No, there is no unread message from {person} since {s.said(since)}.")  # fmt: skip


def no_files(s: Scene) -> Task:
    folder, (kind, ending) = s.pick("folder"), s.draw.choice((("TOML", "toml"), ("WAV", "wav"), ("SVG", "svg")))
    s.call("list_files", {"folder": folder, "extension": ending, "recursive": maybe(False)}, {"files": []})
    _nothing(s, "stem")
    return Task(f"Name the {kind} files in {folder}.", f"There are no {kind} files in {folder}.")


def no_note(s: Scene) -> Task:
    thing = s.pick("note")
    s.call("search_notes", {"query": about(thing.split()[-1], thing)}, {"notes": []})
    return Task(f"What number does my note on {thing} have?", f"I found no note on {thing}.")


def no_place(s: Scene) -> Task:
    spot, category, radius = s.pick("landmark"), s.choice("pharmacy", "museum", "hotel"), s.draw.choice((2, 3, 4))
    s.call("find_places", {"category": category, "near": spot, "radius_km": radius}, {"places": []})
    _nothing(s, "place")
    return Task(f"Is there any {category} within {radius} kilometres of {spot}? Its name, please.",
                f"No, there is no {category} within {radius} kilometres of {spot}.")  # fmt: skip


def no_contact(s: Scene) -> Task:
    person = s.pick("person")
    s.call("find_contact", {"name": person}, {"contacts": []})
    return Task(f"Read me the phone number that I saved for {person}.", f"Your address book has no entry for {person}.")


def no_ticket(s: Scene) -> Task:
    project = s.pick("project")
    s.call("find_tickets", {"project": project, "status": ["blocked"]}, {"tickets": []})
    _nothing(s, "defect")
    return Task(f"Which tickets of {project} are blocked, and who has them?", f"No ticket of {project} is blocked.")


def no_code(s: Scene) -> Task:
    name, repository = s.pick("identifier"), s.pick("repository")
    s.call("search_code", {"text": name, "repository": repository, "language": maybe("rust")}, {"matches": []})
    return Task(f"Does {name} still occur in the Rust repository {repository}? On which lines?",
                f"No, {name} does not occur in {repository}.")  # fmt: skip


def no_flight(s: Scene) -> Task:
    start, end, day = s.pick("airport"), s.pick("airport"), s.day()
    s.call("search_flights", {"from": start, "to": end, "date": on(str(day)), "direct_only": True,
                              "passengers": maybe({"adults": 1}), "cabin": maybe("economy")},
           {"flights": []})  # fmt: skip
    return Task(f"Which non-stop flights go from {start} to {end} on {s.said(day)}, and what do they cost?",
                f"There is no non-stop flight from {start} to {end} on {s.said(day)}.")  # fmt: skip


def no_page(s: Scene) -> Task:
    topic, site = s.pick("topic"), s.pick("host")
    s.call("web_search", {"query": about(topic.split()[0], topic), "site": site}, {"results": []})
    return Task(f"Does {site} have anything on {topic}? Search that site only and give me the link.",
                f"No, the search found nothing on {topic} at {site}.")  # fmt: skip


def no_line(s: Scene) -> Task:
    service, level, word = s.pick("service"), s.choice("warning", "error"), s.pick("stem")
    s.call("log_search", {"service": service, "level": level, "contains": word}, {"entries": []})
    return Task(f'Did {service} log any line of level {level} containing "{word}"? When?',
                f'No, {service} logged no line of level {level} containing "{word}".')  # fmt: skip


ABSENT: tuple[Maker, ...] = (no_events, no_mail, no_files, no_note, no_place, no_contact, no_ticket, no_code, no_flight,
                             no_page, no_line)  # fmt: skip
