"""The student's chat and tool-call template: ChatML turns, calls as <tool_call>{json}</tool_call>.

`segments` is the one renderer: a list of pieces, each either context or something the student learns to write.
Text and token ids both come from it, piece by piece, so that training sees exactly the ids that inference feeds.
`JINJA` is the same template for runners that render with Jinja; a test holds the two together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import msgspec

from distill.artifacts import sha256_text
from distill.errors import InputError
from distill.tokenizer import CALL_END, CALL_START, END_OF_TEXT, TURN_END, TURN_START, Tokenizer

ROLES = ("system", "user", "assistant", "tool")
THINK_START, THINK_END = "<think>\n", "\n</think>\n\n"
_CONTROL = re.compile("|".join(re.escape(token) for token in (END_OF_TEXT, TURN_START, TURN_END)))
_MARK = re.compile("|".join(re.escape(mark) for mark in (END_OF_TEXT, TURN_START, TURN_END, CALL_START, CALL_END)))
_THOUGHT_MARK = re.compile(_MARK.pattern + "|</?think>")
_THOUGHT = re.compile(re.escape(THINK_START) + r"(.*?)" + re.escape(THINK_END), re.DOTALL)
_CALL = re.compile(re.escape(CALL_START) + r"(.*?)" + re.escape(CALL_END), re.DOTALL)
TOOLS_HEAD = "Functions you can call, one JSON schema a line:\n"
TOOLS_TAIL = f'\nTo call one, write {CALL_START}{{"name": ..., "arguments": {{...}}}}{CALL_END}.'

JINJA = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    "{{- " + json.dumps(TOOLS_HEAD) + " }}"
    "{%- for tool in tools %}{{- (tool.function if tool.function is defined else tool) | tojson }}"
    "{%- if not loop.last %}{{- '\\n' }}{%- endif %}{%- endfor %}"
    "{{- " + json.dumps(TOOLS_TAIL) + " + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if not (tools and loop.first and message.role == 'system') %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- set thought = message.reasoning_content or message.reasoning %}"
    "{%- if thought %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- set f = call.function if call.function is defined else call %}"
    "{{- '<tool_call>{\"name\": ' + (f.name | tojson) + ', \"arguments\": ' }}"
    "{{- (f.arguments if f.arguments is string else (f.arguments | tojson)) + '}</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


class ToolCall(msgspec.Struct, frozen=True):
    """A call as a value: the function's name and its JSON arguments."""

    name: str
    arguments: dict[str, Any]


class Message(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One turn."""

    role: str
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    """What the turn opens with between <think> and </think>; empty for none."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} is not one of {', '.join(ROLES)}")
        if (self.tool_calls or self.reasoning) and self.role != "assistant":
            raise ValueError(f"a {self.role} turn cannot call tools or reason")


class Segment(NamedTuple):
    """A piece of rendered text; `target` where an assistant writes it."""

    text: str
    target: bool
    message: int | None = None
    """Index of the message whose body it is."""


class Encoded(NamedTuple):
    """Token ids and, aligned with them, 1 where the token is a target."""

    ids: list[int]
    target: list[int]


class Parsed(NamedTuple):
    """An assistant's text taken apart: what is outside calls, well-formed calls, raw text of the others, and the
    reasoning that it opens with."""

    content: str
    calls: list[ToolCall]
    malformed: list[str]
    reasoning: str = ""


def call_text(call: ToolCall) -> str:
    """`<tool_call>{"name": ..., "arguments": ...}</tool_call>`, the one form that the student writes."""
    return f"{CALL_START}{_json({'name': call.name, 'arguments': call.arguments})}{CALL_END}"


def thought_text(message: Message) -> str:
    """How a turn's reasoning is written before its content; empty where it has none."""
    return f"{THINK_START}{message.reasoning}{THINK_END}" if message.reasoning else ""


def segments(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, add_generation_prompt: bool = False
) -> list[Segment]:
    """Render a conversation. InputError if a message, call or tool holds a control token (prompt injection), or a
    call's arguments or a reasoning hold the marks that `parse` would cut it at. An assistant's content may be its text
    as written, reasoning and calls included."""
    out: list[Segment] = []
    for index, message in enumerate(messages):
        _refuse(_CONTROL, message.content, f"message {index} ({message.role})")
        _refuse(_THOUGHT_MARK, message.reasoning, f"the reasoning of message {index}")
        for call in message.tool_calls:
            _refuse(_MARK, _json([call.name, call.arguments]), f"message {index}, call {call.name!r}")
    if tools:
        system = messages[0].content + "\n\n" if messages and messages[0].role == "system" else ""
        listing = "\n".join(_json(tool.get("function", tool)) for tool in tools)
        _refuse(_CONTROL, listing, "a tool's schema")
        text = f"{TURN_START}system\n{system}{TOOLS_HEAD}{listing}{TOOLS_TAIL}{TURN_END}\n"
        out.append(Segment(text, False, 0 if system else None))
    for index, message in enumerate(messages):
        if tools and index == 0 and message.role == "system":
            continue
        if message.role == "assistant":
            body = thought_text(message) + message.content + "".join(map(call_text, message.tool_calls)) + TURN_END
            out += [Segment(f"{TURN_START}assistant\n", False), Segment(body, True, index), Segment("\n", False)]
        else:
            out.append(Segment(f"{TURN_START}{message.role}\n{message.content}{TURN_END}\n", False, index))
    if add_generation_prompt:
        out.append(Segment(f"{TURN_START}assistant\n", False))
    return out


def render(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, add_generation_prompt: bool = False
) -> str:
    """The conversation as text."""
    return "".join(s.text for s in segments(messages, tools, add_generation_prompt=add_generation_prompt))


def encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] = (),
    *,
    add_generation_prompt: bool = False,
    learned: Collection[int] | None = None,
) -> Encoded:
    """The conversation as ids. Each piece is tokenised on its own, so a target's ids never depend on what follows.

    `learned` are the indices of the assistant turns that are targets; None for all of them.
    """
    ids: list[int] = []
    target: list[int] = []
    for segment in segments(messages, tools, add_generation_prompt=add_generation_prompt):
        piece = tokenizer.encode(segment.text)
        ids += piece
        target += [int(segment.target and (learned is None or segment.message in learned))] * len(piece)
    return Encoded(ids, target)


def turn_of(text: str) -> str:
    """Generated text up to the token that ends the turn."""
    return text.split(TURN_END)[0].split(END_OF_TEXT)[0]


def parse(text: str) -> Parsed:
    """Take an assistant's text apart. Nothing is repaired: a call that is not exactly the template's is malformed."""
    text = turn_of(text)
    thought = _THOUGHT.match(text)
    reasoning, text = (thought.group(1), text[thought.end() :]) if thought else ("", text)
    calls: list[ToolCall] = []
    malformed: list[str] = []
    for match in _CALL.finditer(text):
        try:
            calls.append(msgspec.json.decode(match.group(1), type=_StrictCall).plain())
        except (msgspec.DecodeError, RecursionError):  # bottomless nesting is a model's, too
            malformed.append(match.group(0))
    rest = _CALL.sub("", text)
    if CALL_START in rest or CALL_END in rest:
        malformed.append(rest)
    return Parsed(rest.strip(), calls, malformed, reasoning)


def template_sha256() -> str:
    """Fingerprint of the template."""
    return sha256_text(JINJA)


class _StrictCall(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, Any]

    def plain(self) -> ToolCall:
        return ToolCall(self.name, self.arguments)


def _refuse(pattern: re.Pattern[str], text: str, where: str) -> None:
    if found := pattern.search(text):
        raise InputError(f"{where} contains the control token {found.group()}")


def _json(value: Any) -> str:
    """JSON with Python's default separators and key order kept: what Jinja's `tojson` writes in transformers."""
    return json.dumps(value, ensure_ascii=False)
