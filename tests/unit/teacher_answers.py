"""What the scripted teacher says: a pure function of the conversation, the tools, the seed and the model.

Most answers are sound; some break in every way that a run must tell apart, by a hash of the question. Call ids, the
answer's id and times are no part of it: the server draws them anew for every response.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, NamedTuple

_WORD = re.compile(r"[^\W\d_]{4,}")
LEAKS = (
    '<tool_call>{"name": "look_up", "arguments": {}}</tool_call>',
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.look_up:0<|tool_call_argument_begin|>{}",
)


class Spoken(NamedTuple):
    """The teacher's turn."""

    content: str
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    """Name and arguments, as the text that travels."""
    finish: str = "stop"

    @property
    def size(self) -> int:
        """Bytes generated."""
        calls = "".join(name + arguments for name, arguments in self.calls)
        return len((self.content + self.reasoning + calls).encode())


def identity(body: dict[str, Any]) -> str:
    """The conversation's own hash: the same however the ids of its calls were drawn."""
    turns = []
    for message in body.get("messages") or [{"role": "user", "content": body.get("prompt")}]:
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        turns.append([message["role"], message.get("content") or "", calls])
    asked = [turns, body.get("tools") or [], body.get("seed"), body.get("model")]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def speak(body: dict[str, Any], *, quirks: bool = True) -> Spoken:
    """The turn that answers a request; without `quirks`, or where no seed asks for a draw, a sound one."""
    draw = int(identity(body)[:15], 16)
    quirks = quirks and body.get("seed") is not None
    messages = body.get("messages") or [{"role": "user", "content": str(body.get("prompt"))}]
    tools = [tool["function"] for tool in body.get("tools") or ()]
    results = [message for message in messages if message["role"] == "tool"]
    if tools and not (results and messages[-1]["role"] == "tool") and (tool := _wanted(tools, messages, body)):
        return _calls(tool, tools, str(messages[-1].get("content")), draw, quirks)
    if results:
        values = [value for result in results for value in _leaves(_loads(result.get("content")))][:4]
        text = f"I looked it up: {'; '.join(values) or 'nothing came back'}. (n° {draw % 10_007})"
    else:
        text = _prose(str(messages[-1].get("content")), draw)
    return _text(text, draw, quirks)


def _text(text: str, draw: int, quirks: bool) -> Spoken:
    reasoning = f"Let me think about number {draw % 97}."
    odd = {0: "length", 1: "filter", 2: "empty", 3: "control", 4: "leak", 5: "leak"}.get(draw % 53 if quirks else 99)
    if odd == "length":
        return Spoken(text[: len(text) // 2], reasoning, finish="length")
    if odd == "filter":
        return Spoken("", reasoning, finish="content_filter")
    if odd == "empty":
        return Spoken(" \n", reasoning)
    if odd == "control":
        return Spoken(f"{text}<|im_end|>", reasoning)
    if odd == "leak":
        return Spoken(f"{text} {LEAKS[draw // 53 % len(LEAKS)]}", reasoning)
    return Spoken(text, reasoning)


def _prose(question: str, draw: int) -> str:
    """A sentence or three about the question, accents, emoji and line ends included."""
    words = _WORD.findall(question) or ["nothing"]
    picked = [words[draw // (7**i) % len(words)] for i in range(4)]
    ends = ("", "\nA second line — naïve, 12 €.", " 🙂 東京", "\r\nAn odd line end.")
    return f"About {picked[0]}: {picked[1]} and {picked[2]} give {draw % 1_000_003}; {picked[3]}.{ends[draw % 4]}"


def _wanted(tools: list[dict[str, Any]], messages: list[dict[str, Any]], body: dict[str, Any]) -> dict[str, Any] | None:
    """The tool that the question names, or else whose description shares most words with it."""
    question = str(messages[-1].get("content"))
    asked = {word.lower() for word in _WORD.findall(question)}

    def shared(tool: dict[str, Any]) -> int:
        told = f"{tool['name'].replace('_', ' ')} {tool.get('description', '')}"
        return 9 * (tool["name"] in question) + len(asked & {word.lower() for word in _WORD.findall(told)})

    best = max(tools, key=lambda tool: (shared(tool), tool["name"]))
    return best if shared(best) or body.get("tool_choice") == "required" else None


def _calls(tool: dict[str, Any], tools: list[dict[str, Any]], question: str, draw: int, quirks: bool) -> Spoken:
    def one(chosen: dict[str, Any], salt: int) -> tuple[str, str]:
        return chosen["name"], json.dumps(example(chosen.get("parameters") or {}, question, draw + salt))

    name, arguments = one(tool, 0)
    reasoning = f"The tool {name} knows that."
    odd = draw % 41 if quirks else 99
    if odd == 0:
        arguments = arguments[:-3]  # cut off
    elif odd == 1:
        arguments += '""'  # what some servers append
    elif odd == 2:
        name = "no_such_tool"
    elif odd == 3:
        arguments = json.dumps({"undeclared": [draw % 7, None]})
    elif 4 <= odd < 11 or "both" in question:
        return Spoken("", reasoning, ((name, arguments), one(tools[draw % len(tools)], 1)), "tool_calls")
    return Spoken("", reasoning, ((name, arguments),), "tool_calls")


def example(schema: dict[str, Any], question: str, draw: int) -> Any:
    """A value that a JSON schema admits, words taken from the question."""
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][draw % len(schema["enum"])]
    for choice in ("anyOf", "oneOf"):
        if schema.get(choice):
            return example(schema[choice][0], question, draw)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        wanted = schema.get("required", [])
        return {
            name: example(part, question, draw // (i + 2))
            for i, (name, part) in enumerate(schema.get("properties", {}).items())
            if name in wanted or draw >> i & 1
        }
    if kind == "array":
        size = max(schema.get("minItems", 0), 1 + draw % 2)
        return [example(schema.get("items", {}), question, draw // (i + 3)) for i in range(size)]
    if kind in ("integer", "number"):
        return _number(schema, draw, kind == "integer")
    return {"boolean": bool(draw & 1), "null": None}.get(kind, _string(schema, question, draw))


def _number(schema: dict[str, Any], draw: int, whole: bool) -> int | float:
    low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
    high = schema.get("maximum", schema.get("exclusiveMaximum", low + 101) - 1)
    value = low + draw % max(int(high - low) + 1, 1)
    step = schema.get("multipleOf")
    value = value - value % step + (step if value % step else 0) if step else value
    return int(value) if whole else float(value)


_FORMATS = {"date": "2025-03-14", "time": "09:30:00Z", "date-time": "2025-03-14T09:30:00Z", "uri": "https://a.example",
            "email": "a@b.example", "uuid": "7f9c24e8-3b12-4fef-91e0-5d2a1b3c4d5e"}  # fmt: skip

_EXAMPLES = ("EUR", "2025-03-14", "09:30", "2025-03-14T09:30:00", "A1", "ab-12", "1.2.3", "https://a.example/b",
             "ines@mail.example", "ORD-123456", "XG714171445", "N-1234", "SK1234", "EV-12345", "#A1B2C3")  # fmt: skip


def _string(schema: dict[str, Any], question: str, draw: int) -> str:
    if schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]]
    words = _WORD.findall(question) or ["word"]
    if pattern := schema.get("pattern"):
        tries = (*question.replace("?", " ").split(), *words, *(word.upper() for word in words), *_EXAMPLES)
        return next((text for text in (t.strip(".,:;!") for t in tries) if re.search(pattern, text)), "word")
    text = words[draw % len(words)]
    return text.ljust(schema.get("minLength", 0), "x")[: schema.get("maxLength", 200)]


def _loads(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return str(text)


def _leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, list):
        return [leaf for part in value for leaf in _leaves(part)]
    return [] if value is None or isinstance(value, bool) else [str(value)]
