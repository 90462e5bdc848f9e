"""A scenario in the making: what it draws, calls and knows, and the item and fixtures that it becomes."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from distill.broker import ToolError, simulated
from distill.chat import Message, ToolCall
from distill.draw import Draw
from distill.evaluate.contextual.rendering import WEEKDAYS, day_forms, number_forms
from distill.evaluate.contextual.tools import ASIDE, RIVALS, TOOLS
from distill.evaluate.contextual.words import WORDS
from distill.evaluate.items import Fact, FixtureRow, ForbiddenCall, GoldCall, Item, Kind, Matcher, Secret
from distill.tools import arguments_problem, value_problem

SYSTEMS = {
    "en": ("Date: {date} ({weekday}). You answer one person's requests, with the functions where they are needed.",
           "You look after errands for one household. It is {weekday}, {date}. Say what the functions returned, nothing"
           " else.",
           "Today's date: {date}, a {weekday}. Whatever a function can settle, settle with it; be short."),
    "de": ("Datum: {date} ({weekday}). Du hilfst einer Person und nutzt die Funktionen, wo sie nötig sind.",
           "Heute ist {weekday}, {date}. Antworte auf Deutsch und nur mit dem, was die Funktionen liefern."),
    "fr": ("Date : {date} ({weekday}). Tu aides une personne et tu utilises les fonctions quand il le faut.",
           "Nous sommes le {date}, un {weekday}. Réponds en français, avec ce que donnent les fonctions."),
    "es": ("Fecha: {date} ({weekday}). Ayudas a una persona y usas las funciones cuando hacen falta.",
           "Hoy es {weekday}, {date}. Responde en español, solo con lo que devuelven las funciones."),
    "it": ("Data: {date} ({weekday}). Aiuti una persona e usi le funzioni quando servono.",
           "Oggi è {weekday}, {date}. Rispondi in italiano, solo con ciò che danno le funzioni."),
}  # fmt: skip
_FIRST_DAY, _DAYS = datetime.date(2028, 1, 10), 660
_TRIES = 2000
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


_ASKS = ("?", "please", "tell me", "let me know", "i need")
_DECLINES = ("not", "no", "none", "nothing", "neither", "cannot", "can't", "couldn't", "don't", "won't", "isn't",
             "unable", "unfortunately", "sorry", "outside", "beyond", "lack", "without")  # fmt: skip
_NOTHING = ("no", "not", "nothing", "none", "nobody", "neither", "never", "empty", "zero", "fails", "failed", "failure",
            "error", "unable", "unavailable", "unsuccessful", "without", "cannot", "can't", "couldn't", "didn't",
            "doesn't", "don't", "isn't", "aren't", "wasn't", "weren't", "hasn't", "haven't", "refused")  # fmt: skip


def _owning_up(kind: Kind, facts: bool, locale: str) -> tuple[str, ...]:
    """What an answer must not pass over: that it cannot, that it lacks something, that nothing came back."""
    if kind == "clarify":
        return _ASKS
    if kind == "decline":
        return _DECLINES
    return _NOTHING if kind != "control" and not facts and locale == "en" else ()


class Arg(NamedTuple):
    """An argument that may be written in several ways; `example` is UNSET where it is left out."""

    matcher: Matcher
    example: Any = msgspec.UNSET


def maybe(value: Any) -> Arg:
    """It may say this, or nothing."""
    return Arg(Matcher(exact=value, optional=True))


def near(value: float) -> Arg:
    """This number."""
    return Arg(Matcher(num=value), value)


def on(moment: str) -> Arg:
    """This day or moment."""
    return Arg(Matcher(date=moment), moment)


def about(word: str, example: str) -> Arg:
    """Free text that holds `word`, letters, digits, spaces and hyphens, in upper or lower case."""
    return Arg(Matcher(regex=f"(?is).*{word}.*"), example)


def unordered(values: Sequence[Any]) -> Arg:
    """These, in any order."""
    return Arg(Matcher(set=tuple(values)), list(values))


def either(*values: Any) -> Arg:
    """Any of these."""
    return Arg(Matcher(enum=values), values[0])


class Made(NamedTuple):
    """A gold call with its result."""

    id: str
    result: Any


class Task(NamedTuple):
    """What a scene is asked, and the right answer."""

    request: str
    answer: str


class Built(NamedTuple):
    """An item with the fixtures of its gold calls."""

    item: Item
    rows: tuple[FixtureRow, ...]


class Scene:
    """Everything that one item needs. Of each vocabulary a value is given once."""

    def __init__(self, draw: Draw, locale: str = "en") -> None:
        self.draw, self.locale = draw, locale
        self.today = self._latest = _FIRST_DAY + datetime.timedelta(days=draw.below(_DAYS))
        self.calls: list[GoldCall] = []
        self.rows: list[FixtureRow] = []
        self.facts: list[Fact] = []
        self.derived: list[str] = []
        self.decoys: list[str] = []
        self.secrets: list[Secret] = []
        self.forbidden: list[ForbiddenCall] = []
        self._used: set[str] = set()

    # what it draws

    def pick(self, vocabulary: str) -> str:
        """A word of the vocabulary that the scene does not have yet."""
        return self.fresh(lambda: self.draw.choice(WORDS[vocabulary]))

    def fresh(self, make: Callable[[], str]) -> str:
        """A text that the scene does not have yet."""
        for _ in range(_TRIES):
            if (found := make()) not in self._used:
                self._used.add(found)
                return found
        raise ValueError("a vocabulary is used up within one scene")

    def has(self, text: str) -> bool:
        """Whether it was given."""
        return text in self._used

    def code(self, form: str) -> str:
        """Letters for A, digits for 9, the first never 0: `ORD-999999`."""

        def one(place: int, sign: str) -> str:
            if sign == "A":
                return self.draw.choice(_LETTERS)
            first = place == 0 or form[place - 1] != "9"
            return str(self.draw.between(int(first), 9)) if sign == "9" else sign

        return self.fresh(lambda: "".join(one(place, sign) for place, sign in enumerate(form)))  # fmt: skip

    def day(self, most: int = 60) -> datetime.date:
        """A day after today, later than the one before."""
        self._latest += datetime.timedelta(days=self.draw.between(2, most))
        return self._latest

    def past(self) -> datetime.date:
        """A day before today."""
        return self.today - datetime.timedelta(days=self.draw.between(2, 90))

    def soon(self) -> tuple[datetime.date, str]:
        """A day and how people say it on this day."""
        ahead = self.draw.between(1, 9)
        words = {1: "tomorrow", 2: "the day after tomorrow"}.get(ahead, f"in {ahead} days")
        day = self.today + datetime.timedelta(days=ahead)
        return (day, words) if self.draw.chance(0.6) else (day, f"on {self.said(day)}")

    def time(self) -> str:
        """HH:MM in working hours."""
        return f"{self.draw.between(8, 19):02}:{self.draw.choice(('00', '10', '20', '30', '40', '50'))}"

    def mail(self, person: str, host: str = "example.org") -> str:
        """A person's address."""
        return ".".join(person.lower().split()) + f"@{host}"

    def choice(self, *options: str) -> str:
        """One of them."""
        return self.draw.choice(options)

    # what it writes

    def said(self, value: datetime.date | int | float | str) -> str:
        """A day, given as such or in ISO form, or a number, as people write it in the scene's language."""
        if isinstance(value, str):
            value = datetime.date.fromisoformat(value)
        if isinstance(value, datetime.date):
            return day_forms(value, self.locale)[0]
        return number_forms(value, self.locale)[0]

    # what it calls

    def call(
        self,
        tool: str,
        arguments: Mapping[str, Any],
        result: Mapping[str, Any] | None = None,
        *,
        wanted: Callable[[Any], bool] = lambda result: True,
        after: Iterable[str] = (),
    ) -> Made:
        """A gold call and its result: simulated, with the parts that `result` gives in their places. Plain arguments
        must be given as they are."""
        matchers = {name: v.matcher if isinstance(v, Arg) else Matcher(exact=v) for name, v in arguments.items()}
        example = {name: v.example if isinstance(v, Arg) else v for name, v in arguments.items()}
        example = {name: value for name, value in example.items() if value is not msgspec.UNSET}
        if problem := arguments_problem(ToolCall(tool, example), TOOLS[tool].function):
            raise ValueError(f"{tool}: the example breaks its schema: {problem}")
        value = self._result(tool, example, result or {}, wanted)
        made = Made(f"c{len(self.calls) + 1}", value)
        self.calls.append(GoldCall(id=made.id, name=tool, arguments=matchers, example=example, after=tuple(after)))
        plain = all(m.exact is not msgspec.UNSET and not m.optional for m in matchers.values())
        args = example if plain else {name: msgspec.to_builtins(m) for name, m in matchers.items()}
        latency = self.draw.between(20, 900)
        self.rows.append(FixtureRow(tool=tool, args=args, match="exact" if plain else "matchers", result=value,
                                    latency_ms=latency, id=made.id))  # fmt: skip
        return made

    def amend(self, call: int, change: Callable[[Any], Any]) -> None:
        """Change a call's result in parts that no fact points to."""
        row = self.rows[call]
        self.rows[call] = msgspec.structs.replace(row, result=self._checked(row.tool, change(row.result)))

    def fact(self, made: Made, pointer: str, kind: str, *renderings: str, synonyms: Sequence[str] = ()) -> str:
        """A leaf that the answer must hold; returns how the answer writes it."""
        value = made.result
        for part in pointer.split("/")[1:]:
            value = value[int(part)] if isinstance(value, list) else value[part]
        forms = renderings
        if kind == "number":
            forms += number_forms(value, self.locale)
        elif kind == "date":
            forms += day_forms(datetime.date.fromisoformat(value), self.locale)
        others = tuple(dict.fromkeys(form for form in forms if form != str(value)))
        self.facts.append(Fact(call=made.id, pointer=pointer, type=kind, value=value, renderings=others,  # type: ignore[arg-type]
                               synonyms=tuple(synonyms)))  # fmt: skip
        return forms[0] if forms else str(value)

    def word(self, made: Made, pointer: str, choices: Sequence[str]) -> str:
        """A fact that is one of a few words; the others are decoys."""
        said = self.fact(made, pointer, "string")
        self.decoys += [choice for choice in choices if choice != said]
        return said

    def derive(self, value: int | float) -> str:
        """A value that follows from results; returns how the answer writes it."""
        forms = number_forms(value, self.locale)
        self.derived += forms
        return forms[0]

    def _result(self, tool: str, example: Mapping[str, Any], given: Mapping[str, Any],
                wanted: Callable[[Any], bool]) -> Any:  # fmt: skip
        known = TOOLS[tool]
        for _ in range(_TRIES):
            try:
                value = simulated(known, example, Draw("contextual", self.draw.bits())) | given
            except ToolError:
                continue
            if wanted(self._checked(tool, value)):
                return value
        raise ValueError(f"{tool}: no wanted result was drawn")

    def _checked(self, tool: str, value: Any) -> Any:
        if problem := value_problem(value, TOOLS[tool].returns or {}):
            raise ValueError(f"{tool}: the result breaks `returns`: {problem}")
        return value

    # what it becomes

    def finish(
        self,
        item: str,
        kind: Kind,
        stratum: str,
        task: Task,
        *,
        system: str = "",
        tempting: Sequence[str] = (),
        distractors: Sequence[str] = (),
        earlier: Sequence[Message] = (),
    ) -> Built:
        """The item, with three or four tools beside those needed or tempting. `system` follows the day's line;
        `distractors` are those to draw from; `earlier` are turns before the request."""
        day = {"date": self.said(self.today), "weekday": WEEKDAYS[self.locale][self.today.weekday()]}
        opening = self.draw.choice(SYSTEMS[self.locale]).format(**day)
        named = list(dict.fromkeys([*(call.name for call in self.calls), *tempting,
                                    *(one.name for one in self.forbidden)]))  # fmt: skip
        rivals = {name for group in RIVALS if group & set(named) for name in group}
        others = [n for n in distractors or TOOLS if n not in named and (distractors or n not in rivals | set(ASIDE))]
        offered = self.draw.shuffle([*named, *self.draw.sample(others, self.draw.between(3, 4))])
        made = Item(
            id=item,
            kind=kind,
            stratum=stratum,
            messages=(Message("system", f"{opening} {system}".strip()), *earlier, Message("user", task.request)),
            tools=tuple(TOOLS[name].function for name in offered),
            calls=tuple(self.calls),
            facts=tuple(self.facts),
            decoys=tuple(dict.fromkeys(self.decoys)),
            derived=tuple(dict.fromkeys(self.derived)),
            answer=task.answer,
            must_say=_owning_up(kind, bool(self.facts), self.locale),
            secrets=tuple(self.secrets),
            forbidden_calls=tuple(self.forbidden),
            allow=tuple(secret.value for secret in self.secrets if secret.disclose),
            locale=self.locale,
        )
        return Built(made, tuple(msgspec.structs.replace(row, item=item) for row in self.rows))
