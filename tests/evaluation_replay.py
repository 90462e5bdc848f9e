"""Episodes of an evaluation once more, from the model's own words: calls as they are written, and strict replay.

For evaluation_oracle.py, which says what is shared with what it audits.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from distill.chat import ToolCall
from distill.evaluate.items import Item
from distill.tools import arguments_problem

Row = dict[str, Any]
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


class Call(NamedTuple):
    """A call that was attempted; without a name where it cannot be read. `result` is None unless a fixture gave one."""

    name: str
    args: Any
    words: str
    valid: bool
    status: str = ""
    result: Any = None


class Run(NamedTuple):
    """An episode: its calls, what each turn says beside them, and the answer."""

    calls: list[Call]
    said: list[str]
    final: str


def rows(path: Path) -> list[Row]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]


def same(a: Any, b: Any) -> bool:
    """JSON equality: there is one kind of number, and true is not 1."""
    if isinstance(a, (bool, str, type(None))) or isinstance(b, (bool, str, type(None))):
        return type(a) is type(b) and bool(a == b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, (int, float)) and isinstance(b, (int, float)) and Fraction(a) == Fraction(b)


def moment(text: str) -> datetime.date | datetime.datetime | None:
    """A day or a moment in ISO 8601."""
    for read in (datetime.date.fromisoformat, datetime.datetime.fromisoformat):
        try:
            return read(text)
        except ValueError:
            continue
    return None


def holds(matcher: Row, value: Any) -> bool:
    """Whether an argument is what a matcher wants."""
    if "set" in matcher:
        left = list(value) if isinstance(value, list) else []
        for one in matcher["set"]:
            left = next((left[:i] + left[i + 1 :] for i, other in enumerate(left) if same(one, other)), [matcher])
        return isinstance(value, list) and not left
    if "num" in matcher:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        wanted, near, share = (Fraction(repr(matcher.get(key, 0))) for key in ("num", "abs", "rel"))
        return abs(Fraction(repr(value)) - wanted) <= max(near, share * abs(wanted))
    if "regex" in matcher:
        return isinstance(value, str) and re.fullmatch(matcher["regex"], value) is not None
    if "date" in matcher:
        return isinstance(value, str) and moment(value) is not None and moment(value) == moment(matcher["date"])
    wanted = [matcher["exact"]] if "exact" in matcher else matcher.get("enum", [])
    return bool(matcher.get("any")) or any(same(one, value) for one in wanted)


def fits(matchers: Row, args: Row) -> bool:
    """Whether each argument holds, those that must be there are, and there is no other."""
    needed = all(holds(one, args[key]) if key in args else one.get("optional") for key, one in matchers.items())
    return needed and args.keys() <= matchers.keys()


def read_call(name: Any, args: Any, words: str, tools: Row) -> Call:
    """A call that can be read; ValueError where it is none."""
    if not isinstance(name, str) or not isinstance(args, dict):
        raise ValueError("no call")
    words = words or json.dumps(args, ensure_ascii=False)
    return Call(name, args, words, name in tools and arguments_problem(ToolCall(name, args), tools[name]) is None)


def strict_json(text: str) -> Any:
    """JSON: NaN and infinities, 1e999 too, are none."""
    value = json.loads(text)
    json.dumps(value, allow_nan=False)
    return value


def read_reply(reply: Row, tools: Row) -> tuple[str, list[Call]]:
    """What a reply says beside its calls, and the calls that it attempts. Those that a server sends apart count; what
    is then written out as a call is none."""
    text = reply["text"].split(STOP)[0].split(END)[0]
    if text.startswith("<think>\n") and "\n</think>\n\n" in text:
        text = text.split("\n</think>\n\n", 1)[1]
    good: list[Call] = []
    bad: list[Call] = []
    apart = reply.get("calls")
    for whole in re.findall(r"<tool_call>.*?</tool_call>", text, re.DOTALL):
        try:
            found = strict_json(whole.removeprefix("<tool_call>").removesuffix("</tool_call>"))
            if apart is not None or set(found) != {"name", "arguments"}:
                raise ValueError(whole)
            good.append(read_call(found["name"], found["arguments"], "", tools))
        except (ValueError, TypeError, RecursionError):
            bad.append(Call("", None, whole, False))
    for one in apart or ():
        try:
            good.append(read_call(one["name"], strict_json(one["arguments"]), one["arguments"], tools))
        except (ValueError, RecursionError):
            bad.append(Call("", None, one["arguments"], False))
    rest = re.sub(r"<tool_call>.*?</tool_call>", "", text, flags=re.DOTALL)
    if "<tool_call>" in rest or "</tool_call>" in rest:
        bad.append(Call("", None, rest, False))
    return rest.strip(), good + bad


class Broker:
    """Strict replay of one episode: fixtures of the item before those of any, exact arguments before matchers."""

    def __init__(self, item: str, fixtures: Sequence[Row], tools: Row) -> None:
        self.ranks = [[row for row in fixtures if row.get("item") == owner and row.get("match", "exact") == how]
                      for owner in (item, None) for how in ("exact", "matchers")]  # fmt: skip
        self.tools, self.asked = tools, dict[str, int]()

    def answer(self, name: str, args: Row) -> Row | None:
        """The row that answers a call, if any."""
        for rank in self.ranks:
            answers = [row for row in rank if row["tool"] == name and self.is_for(row, args)]
            if answers:
                key = f"{self.ranks.index(rank)} {name} {json.dumps(answers[0]['args'], sort_keys=True)}"
                self.asked[key] = self.asked.get(key, 0) + 1
                numbered = {row.get("nth", "*"): row for row in answers}
                return numbered.get(self.asked[key], numbered.get("*"))
        return None

    def is_for(self, row: Row, args: Row) -> bool:
        """Whether a row answers these arguments; an exact one as its tool normalises them."""
        if row.get("match") == "matchers":
            return fits(row["args"], args)
        how = self.tools[row["tool"]].get("normalise", [])
        known = self.tools[row["tool"]]["parameters"].get("properties", {}) if "defaults" in how else {}

        def plain(value: Any) -> Any:
            if isinstance(value, list):
                return [plain(one) for one in value]
            if isinstance(value, dict):
                return {key: plain(one) for key, one in value.items()}
            if isinstance(value, str):
                value = " ".join(value.split()) if "whitespace" in how else value
                return value.casefold() if "casefold" in how else value
            return value

        default = {key: schema["default"] for key, schema in known.items() if "default" in schema}
        one, other = ({k: v for k, v in all_of.items() if v is not None or "nulls" not in how}
                      for all_of in (row["args"], args))  # fmt: skip
        return same(plain(default | one), plain(default | other))


def episode(item: Item, transcript: Row, broker: Broker, limits: dict[str, int]) -> Run:
    """What happened, from the model's replies. IndexError where the transcript breaks off."""
    tools = {tool["name"]: tool for tool in item.tools}
    run, tokens, replies = Run([], [], ""), 0, list(transcript["replies"])
    for _ in range(limits["max_turns"]):
        reply = replies.pop(0)
        tokens += reply.get("tokens", 0)
        content, calls = read_reply(reply, tools)
        run.said.append(content)
        spoken = reply["text"] if reply.get("calls") is not None else reply["text"].split(STOP)[0].split(END)[0]
        spoken += "".join(one["name"] + one["arguments"] for one in reply.get("calls") or ())
        cut = reply.get("stop") == "context" or any(token in spoken for token in (END, START, STOP))
        cut = cut or len(run.calls) + len(calls) > limits["max_calls"]
        if cut or not calls:
            run = Run(run.calls + calls, run.said, "" if cut else content)
            break
        for call in calls:
            row = broker.answer(call.name, call.args) if call.valid else None
            status = "" if not call.valid else "miss" if row is None else "hit"
            result = {"error": row["error"]} if row and "error" in row else (row or {}).get("result")
            run.calls.append(call._replace(status=status, result=result))
        if tokens >= limits["max_tokens"]:
            break
    assert not replies, "the transcript goes on after its end"
    return run
