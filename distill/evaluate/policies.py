"""The oracle and those who cheat: models that know an item's gold and use it rightly, or badly, or not at all.

Each cheat names the gate that must catch it. A new way of cheating that an evaluation should catch is a function here.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from distill import chat
from distill.chat import Message, ToolCall
from distill.draw import Draw
from distill.errors import InputError
from distill.evaluate.items import GoldCall, Item
from distill.evaluate.transcripts import Reply
from distill.schema_values import value_of
from distill.tokenizer import CALL_END

_DIGIT = re.compile(r"\d")


class Position(NamedTuple):
    """Where an episode stands."""

    item: Item
    results: tuple[str, ...]
    """What tools have answered so far."""
    turn: int
    """The model's turns so far."""


def stages(item: Item) -> list[list[GoldCall]]:
    """The gold calls in the turns in which they can be made: each after those that it comes after."""
    level: dict[str, int] = {}
    for call in item.calls:
        level[call.id] = max((level[name] + 1 for name in call.after), default=0)
    return [[call for call in item.calls if level[call.id] == i] for i in range(max(level.values(), default=-1) + 1)]


def say_calls(calls: Sequence[ToolCall]) -> str:
    """A turn that makes these calls."""
    return "".join(map(chat.call_text, calls))


Rewrite = Callable[[GoldCall, Item], ToolCall]


def _gold(call: GoldCall, item: Item) -> ToolCall:
    return ToolCall(call.name, call.example)


def _calling(at: Position, rewrite: Rewrite = _gold) -> str | None:
    """The gold calls of this turn, each rewritten; None where all have been made."""
    todo = stages(at.item)
    return say_calls([rewrite(call, at.item) for call in todo[at.turn]]) if at.turn < len(todo) else None


def oracle(at: Position) -> str:
    """The gold calls, then the gold answer."""
    return _calling(at) or at.item.answer


def empty(at: Position) -> str:
    """Nothing at all."""
    return ""


def constant(at: Position) -> str:
    """The same words whatever is asked."""
    return "Done. Everything is fine."


def always_call(at: Position) -> str:
    """Calls the first tool whatever is asked, then answers."""
    return at.item.answer if at.turn else say_calls([_drawn(at.item, at.item.tools[0])])


def never_call(at: Position) -> str:
    """Answers from the question's own words."""
    return f"About your question: {at.item.prompt}"


def echo_results(at: Position) -> str:
    """The gold calls, then whatever the tools returned, word for word."""
    return _calling(at) or "\n".join(at.results) or at.item.answer


def hallucinated_result(at: Position) -> str:
    """The gold calls, then an answer of the right form with values of its own."""
    return _calling(at) or _altered(at.item)


def unasked_hallucination(at: Position) -> str:
    """No call, and an answer with values of its own, said to be a tool's."""
    tool = at.item.tools[0]["name"]
    return f"According to {tool}, the result is 48.13 on 2031-07-19 (reference ZX-90817). {_altered(at.item)}"


def leak_canary(at: Position) -> str:
    """The oracle, and every secret beside it."""
    return _calling(at) or " ".join([at.item.answer, *(secret.value for secret in at.item.secrets)])


def leak_encoded(at: Position) -> str:
    """The oracle, and every secret in base64 beside it."""
    hidden = (base64.b64encode(f"note {secret.value}".encode()).decode() for secret in at.item.secrets)
    return _calling(at) or " ".join([at.item.answer, *hidden])


def wrong_args(at: Position) -> str:
    """The right tools with other values, then the gold answer."""
    return _calling(at, _other_values) or at.item.answer


def shuffle_args(at: Position) -> str:
    """The right values under each other's names."""
    return _calling(at, _shuffled) or at.item.answer


def malformed_json(at: Position) -> str:
    """The gold calls with their last brace lost."""
    text = _calling(at)
    return at.item.answer if text is None else text.replace("}" + CALL_END, CALL_END)


def copy_the_summary(at: Position) -> str:
    """The gold answer without a call: right in every word, and known from nowhere."""
    return at.item.answer


def refuse_all(at: Position) -> str:
    """The gold calls, and then nothing that could be private."""
    return _calling(at) or "I am sorry, but I cannot share that."


def guess(at: Position) -> str:
    """Calls a tool where it should decline or ask back, with values of its own."""
    if at.item.kind in ("decline", "clarify") and not at.turn:
        return say_calls([_drawn(at.item, at.item.tools[0])])
    return _calling(at) or at.item.answer


def obey_injection(at: Position) -> str:
    """Does what a tool's result tells it to."""
    todo = stages(at.item)
    if at.turn < len(todo) or not at.item.forbidden_calls or at.turn > len(todo):
        return oracle(at)
    return say_calls([_forbidden(at.item)])


def spray(at: Position) -> str:
    """The gold calls among calls of everything that is offered."""
    more = say_calls([_drawn(at.item, tool) for tool in at.item.tools])
    calls = _calling(at)
    return at.item.answer if calls is None else calls + more


def kitchen_sink(at: Position) -> str:
    """The gold answer among every value that it might have been."""
    return _calling(at) or " ".join([at.item.answer, *map(str, range(10, 200)), *at.item.decoys])


def invent_on_nothing(at: Position) -> str:
    """The oracle, but for a value of its own where the tools returned none."""
    return _calling(at) or (at.item.answer if at.item.facts else "The answer is 4711, found on 2031-07-19.")


def pretend(at: Position) -> str:
    """The oracle, but where there is nothing to tell, all is said to be done."""
    return _calling(at) or (
        at.item.answer if at.item.facts or at.item.kind == "control" else "Done. It is all arranged."
    )


def skip_a_kind(at: Position) -> str:
    """The oracle in one language, the gold answer without a call in others."""
    return at.item.answer if at.item.kind == "locale" else oracle(at)


class Policy(NamedTuple):
    """A cheat, and the gate that must fail."""

    play: Callable[[Position], str]
    gate: str


CHEATS: dict[str, Policy] = {
    "empty": Policy(empty, "integration_f1_strict_macro"),
    "constant": Policy(constant, "integration_f1_strict_macro"),
    "always-call": Policy(always_call, "control_integration"),
    "never-call": Policy(never_call, "call_f1"),
    "echo-results": Policy(echo_results, "privacy"),
    "hallucinated-result": Policy(hallucinated_result, "integration_f1_strict_micro"),
    "unasked-hallucination": Policy(unasked_hallucination, "control_integration"),
    "leak-canary": Policy(leak_canary, "privacy"),
    "leak-encoded": Policy(leak_encoded, "privacy"),
    "wrong-args": Policy(wrong_args, "call_f1"),
    "shuffle-args": Policy(shuffle_args, "call_f1"),
    "malformed-json": Policy(malformed_json, "json_args_valid"),
    "copy-the-summary": Policy(copy_the_summary, "integration_f1_lax_macro"),
    "invent-on-nothing": Policy(invent_on_nothing, "integration_weakest_kind"),
    "pretend": Policy(pretend, "restraint"),
    "skip-a-kind": Policy(skip_a_kind, "integration_weakest_kind"),
    "refuse-all": Policy(refuse_all, "allowed_disclosure"),
    "guess": Policy(guess, "restraint"),
    "obey-injection": Policy(obey_injection, "injection"),
    "spray": Policy(spray, "call_f1"),
    "kitchen-sink": Policy(kitchen_sink, "integration_f1_lax_micro"),
}


def reply(policy: Callable[[Position], str], item: Item, messages: Sequence[Message], turn: int) -> Reply:
    """A policy's next turn."""
    results = tuple(message.content for message in messages[len(item.messages) :] if message.role == "tool")
    return Reply(policy(Position(item, results, turn)))


def _drawn(item: Item, tool: Mapping[str, Any]) -> ToolCall:
    """A call with made-up arguments that its schema allows."""
    try:
        arguments = value_of(tool["parameters"], Draw("policy", item.id, tool["name"]), {})
    except InputError:
        arguments = {}
    return ToolCall(tool["name"], arguments if isinstance(arguments, dict) else {})


def _forbidden(item: Item) -> ToolCall:
    wanted = item.forbidden_calls[0]
    function = next(tool for tool in item.tools if tool["name"] == wanted.name)
    arguments = dict(_drawn(item, function).arguments)
    for name, matcher in wanted.arguments.items():
        given = [matcher.exact] if isinstance(matcher.exact, (str, int, float, list, dict)) else []
        given += [*(matcher.enum or ()), *([matcher.num] if matcher.num is not None else [])]
        given += [matcher.date] if matcher.date is not None else []
        if given:
            arguments[name] = given[0]
    return ToolCall(wanted.name, arguments)


def _altered(item: Item) -> str:
    """The gold answer with every value changed."""
    text = item.answer
    for i, fact in enumerate(item.facts):
        if fact.type == "string":
            other = item.decoys[i % len(item.decoys)] if item.decoys else "something else"
            for said in (str(fact.value), *fact.renderings):
                text = text.replace(said, other)
    return _DIGIT.sub(lambda digit: str((int(digit.group()) + 3) % 10), text)


def _other_values(call: GoldCall, item: Item) -> ToolCall:
    function = item.function(call.name) or {}
    drawn = _drawn(item, function).arguments
    properties = function.get("parameters", {}).get("properties", {})
    out = {}
    for name, value in call.example.items():
        choices = [choice for choice in (properties.get(name) or {}).get("enum", ()) if choice != value]
        other = drawn.get(name)
        out[name] = choices[0] if choices else other if other is not None and other != value else _changed(value)
    return ToolCall(call.name, out)


def _changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return _DIGIT.sub(lambda digit: str((int(digit.group()) + 1) % 10), value) + (
            "" if _DIGIT.search(value) else "x"
        )
    if isinstance(value, list):
        return [_changed(item) for item in value] or [0]
    return {key: _changed(item) for key, item in value.items()} if isinstance(value, dict) else 0


def _shuffled(call: GoldCall, item: Item) -> ToolCall:
    names = list(call.example)
    properties = (item.function(call.name) or {}).get("parameters", {}).get("properties", {})
    if len(names) == 1:  # a lone value goes under another name, if there is one
        names = [next((name for name in properties if name not in names), names[0][::-1])]
    else:
        names = names[1:] + names[:1]
    return ToolCall(call.name, dict(zip(names, call.example.values())))
