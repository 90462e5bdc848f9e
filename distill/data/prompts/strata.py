"""The built-in kinds of prompt, each a stream that is a function of its name and a seed."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from distill.artifacts import canonical_json, sha256_text
from distill.broker import Fault
from distill.chat import Message
from distill.data.prompts import material
from distill.data.prompts import tool_requests as requests
from distill.data.prompts.documents import estimate_tokens, long_question
from distill.data.prompts.domain_material import DOMAIN, LOOK_ALIKES, REFUSALS
from distill.data.prompts.tool_material import BY_NAME
from distill.draw import Draw

Expect = Literal["any", "call", "no_call"]


class Prompt(NamedTuple):
    """A conversation that waits for the teacher's turn."""

    id: str
    stratum: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    ground_truth: str | None = None
    expect: Expect = "any"
    needs_tokens: int = 0
    """Room that the prompt itself takes, estimated."""
    fault: Fault = ""
    """Whether the broker lets calls fail: the model is not told."""
    source: str = ""
    """Of a prompt from a file: the file and line."""

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1].content


WEIGHTS: dict[str, float] = dict.fromkeys((*material.TEMPLATES, "arithmetic"), 1.0) | {
    "domain": 3.0, "tool_single": 3.0, "tool_parallel": 1.5, "tool_chain": 1.5, "tool_error": 1.0, "tool_control": 1.5,
    "long_context": 0.5, "refusal": 1.0,
}  # fmt: skip
"""The built-in strata with the share that each has unless a mix says otherwise."""
TOOL_STRATA = ("tool_single", "tool_parallel", "tool_chain", "tool_error", "tool_control")

_SYSTEMS = (
    "You are a helpful assistant.", "You help a busy person with everyday work. Be brief and exact.",
    "You are a patient assistant for people who write code.",
)  # fmt: skip
_TOOL_SYSTEMS = (
    "You are a helpful assistant with tools. Today is {day}.",
    "Today is {day}. Call a tool only where it is needed.",
    "You work for a busy person. It is {day}. Use the tools you have, and answer briefly.",
    "You are an assistant on a phone. The date is {day}. If a tool fails, say so.",
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
           "December")  # fmt: skip
_SLOT = re.compile(r"\{(\w+)\}")
_TIRED = 2000  # draws in a row that give nothing new: there is nothing new


def make_prompt(
    stratum: str,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] = (),
    *,
    ground_truth: str | None = None,
    expect: Expect = "any",
    fault: Fault = "",
    source: str = "",
) -> Prompt:
    """A prompt whose id is a hash of its stratum and all that the teacher is shown or answered."""
    said = [[message.role, message.content] for message in messages]
    identity = sha256_text("kd-prompt/1\n" + canonical_json([said, list(tools), ground_truth, expect, fault]))[:20]
    room = sum(8 + estimate_tokens(message.content) for message in messages)
    if tools:
        room += 40 + estimate_tokens(json.dumps(list(tools), ensure_ascii=False))
    return Prompt(f"{stratum}-{identity}", stratum, tuple(messages), tuple(tools), ground_truth, expect, room, fault,
                  source)  # fmt: skip


def built_in(name: str, seed: int, long_context_tokens: int) -> Iterator[Prompt]:
    """The prompts of a stratum, each different from all others, until there are no more."""
    if name in material.TEMPLATES:
        return _combinations(name, (material.TEMPLATES[name],), seed)
    if name == "domain":
        return _combinations(name, DOMAIN, seed, _SYSTEMS)
    if name == "refusal":
        return _combinations(name, REFUSALS + LOOK_ALIKES, seed)
    if name == "long_context":
        return _drawn(name, seed, lambda draw: _long_context(draw, long_context_tokens))
    return _drawn(name, seed, _MAKERS[name])


def capacity(name: str) -> int | None:
    """Most prompts that a stratum can have; None where there are more than anybody asks for."""
    templates = {"domain": DOMAIN, "refusal": REFUSALS + LOOK_ALIKES}.get(name)
    if name in material.TEMPLATES:
        templates = (material.TEMPLATES[name],)
    if templates is None:
        return None
    return sum(len(t.forms) * math.prod(len(part) for part in t.parts) for t in templates)


def _combinations(
    name: str, templates: Sequence[material.Template], seed: int, systems: Sequence[str] = ()
) -> Iterator[Prompt]:
    """All combinations of templates and subjects, in an order that the seed decides."""
    found = [
        (index, form, parts)
        for index, template in enumerate(templates)
        for form in range(len(template.forms))
        for parts in itertools.product(*(range(len(part)) for part in template.parts))
    ]
    found.sort(key=lambda c: hashlib.blake2b(f"{seed}\n{name}\n{c}".encode(), digest_size=8).digest())
    seen: set[str] = set()
    for index, form, parts in found:
        template = templates[index]
        text = template.forms[form].format(*(part[i] for part, i in zip(template.parts, parts, strict=True)))
        text = " ".join(text.split())
        if text in seen:
            continue
        seen.add(text)
        draw = Draw(seed, name, "system", text)
        system = template.system or (draw.choice(systems) if systems and draw.chance(0.5) else "")
        yield make_prompt(name, _messages(system, text))


def _drawn(name: str, seed: int, make: Callable[[Draw], Prompt]) -> Iterator[Prompt]:
    """Draws, without those that came before, until nothing new has come for long."""
    seen: set[str] = set()
    misses = 0
    for index in itertools.count():
        prompt = make(Draw(seed, name, index))
        key = prompt.id
        if key in seen:
            misses += 1
            if misses == _TIRED:
                return
            continue
        seen.add(key)
        misses = 0
        yield prompt


def _messages(system: str, text: str) -> tuple[Message, ...]:
    return ((Message("system", system),) if system else ()) + (Message("user", text),)


def _arithmetic(draw: Draw) -> Prompt:
    """Word problems with small numbers, whose answer we know."""
    problem = draw.choice(material.PROBLEMS)
    a, b = draw.between(11, 99), draw.between(2, 10)
    text = problem.text.format(a=a, b=b, name=draw.choice(material.NAMES), thing=draw.choice(material.THINGS))
    return make_prompt("arithmetic", _messages("", text), ground_truth=str(problem.answer(a, b)))


def _long_context(draw: Draw, tokens: int) -> Prompt:
    question = long_question(draw, draw.between(tokens // 3, tokens))
    return make_prompt("long_context", _messages("", question.text), ground_truth=question.answer)


def _tool_single(draw: Draw) -> Prompt:
    return _single("tool_single", draw, "")


def _tool_error(draw: Draw) -> Prompt:
    return _single("tool_error", draw, draw.choice(("once", "always")))


def _single(stratum: str, draw: Draw, fault: Fault) -> Prompt:
    scene = Scene(draw)
    name = draw.choice(tuple(requests.REQUESTS))
    phrase = scene.filled(draw.choice(requests.REQUESTS[name]))
    return scene.prompt(stratum, (name,), framed(draw.choice(requests.SINGLE), [phrase]), expect="call", fault=fault)


def _tool_parallel(draw: Draw) -> Prompt:
    scene = Scene(draw)
    if draw.chance(0.3):
        case = draw.choice(requests.SAME)
        return scene.prompt("tool_parallel", case.tools, scene.filled(case.text), expect="call")
    names = draw.sample(tuple(requests.REQUESTS), draw.between(2, 3))
    phrases = [scene.filled(draw.choice(requests.REQUESTS[name])) for name in names]
    form = draw.choice(requests.PARALLEL if len(names) == 2 else requests.TRIPLE)
    return scene.prompt("tool_parallel", tuple(names), framed(form, phrases), expect="call")


def _tool_chain(draw: Draw) -> Prompt:
    scene, case = Scene(draw), draw.choice(requests.CHAINS)
    return scene.prompt(
        "tool_chain", case.tools, draw.choice(requests.OPENINGS) + scene.filled(case.text), expect="call"
    )


def _tool_control(draw: Draw) -> Prompt:
    scene, case = Scene(draw), draw.choice(requests.CONTROLS)
    text = draw.choice(requests.OPENINGS) + scene.filled(case.text)
    return scene.prompt("tool_control", case.tools, text, expect="no_call")


class Scene:
    """A day on which somebody asks for something: `tomorrow` has to mean a date."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self.today = self._latest = datetime.date(2026, 1, 1) + datetime.timedelta(days=draw.below(730))
        self._used: dict[str, set[str]] = {}

    def filled(self, text: str) -> str:
        """Each place filled with a value of its kind that the scene does not have yet."""
        return self.fill(text)[0]

    def fill(self, text: str) -> tuple[str, dict[str, list[str]]]:
        """The same, and what it was filled with: the values of each kind in their order."""
        values: dict[str, list[str]] = {}

        def one(match: re.Match[str]) -> str:
            values.setdefault(match[1], []).append(self._value(match[1]))
            return values[match[1]][-1]

        return _SLOT.sub(one, text), values

    def prompt(self, stratum: str, needed: tuple[str, ...], text: str, *, expect: Expect, fault: Fault = "") -> Prompt:
        """The request with the tools that it needs, or that tempt, and two to four others."""
        others = [name for name in BY_NAME if name not in needed]
        offered = self._draw.shuffle([*needed, *self._draw.sample(others, self._draw.between(2, 4))])
        system = self._draw.choice(_TOOL_SYSTEMS).format(
            day=f"{WEEKDAYS[self.today.weekday()]}, {self.today.isoformat()}"
        )
        tools = [BY_NAME[name].offer for name in offered]
        return make_prompt(stratum, _messages(system, text), tools, expect=expect, fault=fault)

    def _value(self, slot: str) -> str:
        if slot == "date":
            self._latest += datetime.timedelta(days=self._draw.between(2, 150))
            return _written(self._latest)
        if slot == "past":
            return _written(self.today - datetime.timedelta(days=self._draw.between(1, 120)))
        options, taken = requests.SLOTS[slot], self._used.setdefault(slot, set())
        for _ in range(50):
            found = options(self._draw) if callable(options) else self._draw.choice(options)
            if found not in taken:
                break
        taken.add(found)
        return found


def _written(day: datetime.date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def framed(form: str, phrases: Sequence[str]) -> str:
    """A frame's {a}, {b}, {c} filled with phrases; {A} with a capital."""
    text = form
    for letter, phrase in zip("abc", phrases, strict=False):
        text = text.replace(f"{{{letter}}}", phrase).replace(f"{{{letter.upper()}}}", phrase[0].upper() + phrase[1:])
    return text


_MAKERS: dict[str, Callable[[Draw], Prompt]] = {
    "arithmetic": _arithmetic, "tool_single": _tool_single, "tool_parallel": _tool_parallel,
    "tool_chain": _tool_chain, "tool_error": _tool_error, "tool_control": _tool_control,
}  # fmt: skip
