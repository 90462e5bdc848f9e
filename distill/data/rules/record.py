"""Rules that one record must keep. Each is a function from a `View` that yields what is wrong; RULES is their table.

Structural rules look at a record's parts alone; the others render it, read its texts or its distributions.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from distill import chat
from distill.broker import fixture_sha256
from distill.data.budget import dollars
from distill.data.episodes import reply_sha256
from distill.data.rules import secrets
from distill.data.rules.view import View
from distill.data.rules.whole import is_cost
from distill.data.schema import Call, split_of
from distill.data.store.distributions import Distribution, same_tokens
from distill.data.teacher.wire import Reply, leak_of
from distill.tokenizer import CALL_END, CALL_START
from distill.tools import arguments_checker

FINISH_WITH_CALLS = ("tool_calls", "function_call", "stop")
"""Some servers end a turn that calls tools with `stop`."""
FINISH_WITHOUT = ("stop",)


class Rule(NamedTuple):
    """A rule of one record."""

    check: Callable[[View], Iterator[str]]
    structural: bool = True


def _run_id(view: View) -> Iterator[str]:
    if view.record.run_id != view.context.header.run_id:
        yield f"run_id {view.record.run_id[:40]!r} is not the header's"


def _split(view: View) -> Iterator[str]:
    share = view.context.header.config.get("val_share")
    if isinstance(share, (int, float)) and view.record.split != split_of(view.record.id, share):
        yield f"split {view.record.split} is not what its id gives"


_FOLLOWS = {"start": {"system", "user"}, "system": {"user"}, "user": {"assistant"}, "assistant": {"user"},
            "call": {"tool"}, "answered": {"assistant"}}  # fmt: skip
_ORIGINS = {"system": ("dataset",), "user": ("dataset",), "assistant": ("dataset", "teacher"),
            "tool": ("dataset", "broker")}  # fmt: skip


def _roles(view: View) -> Iterator[str]:
    """Turns follow each other legally; each tool's result answers, in order, a call of the turn before."""
    before, called, prompt = "start", 0, ""
    waiting: list[Call] = []
    for index, turn in enumerate(view.record.messages):
        if turn.role not in _FOLLOWS[before]:
            yield f"messages[{index}]: {turn.role} cannot follow {before}"
            return
        if turn.origin not in _ORIGINS[turn.role]:
            yield f"messages[{index}]: a {turn.role} turn cannot be the {turn.origin}'s"
        if turn.role == "tool":
            call = waiting.pop(0)
            if turn.tool_call_id != call.id:
                yield f"messages[{index}] answers {turn.tool_call_id[:40]!r}; the open call is {call.id!r}"
            before = "call" if waiting else "answered"
            continue
        if turn.tool_call_id:
            yield f"messages[{index}]: only a tool's result answers a call"
        if turn.tool_calls:
            ids = [f"call_{called + n}" for n in range(len(turn.tool_calls))]
            given = [call.id for call in turn.tool_calls]
            if given != ids and (turn.origin == "teacher" or any(given)):  # a dataset's own calls may have none
                yield f"messages[{index}]: the ids of its calls are not {ids[0]} and so on"
            called += len(ids)
            waiting = list(turn.tool_calls)
        before = "call" if turn.tool_calls else turn.role
        if turn.role == "user":
            prompt = turn.content
    if view.record.prompt != prompt:
        yield "prompt is not the last user turn"


def _calls(view: View) -> Iterator[str]:
    """A turn's calls are values: its text holds none, well-formed or not. The teacher calls where it should."""
    for index, turn in enumerate(view.record.messages):
        if turn.role == "assistant" and (CALL_START in turn.content or CALL_END in turn.content):
            yield f"messages[{index}]: its text holds the marks of a call"
    called = any(turn.tool_calls for _, turn in view.teachers)
    if view.record.expect != "any" and called != (view.record.expect == "call"):
        yield f"expect is {view.record.expect}, and the teacher {'called' if called else 'did not call'} a tool"


def _offered(view: View) -> Iterator[str]:
    """Called tools are offered, and the arguments fit their schema."""
    offered = _functions(view.tools)
    if isinstance(offered, str):
        yield offered
        return
    for index, turn in enumerate(view.record.messages):
        for call in turn.tool_calls:
            if call.name not in offered:
                yield f"messages[{index}] calls {call.name[:80]!r}, which is not offered"
            elif problem := offered[call.name](call.arguments):
                yield f"messages[{index}] calls {call.name}: {problem}"


@lru_cache(maxsize=256)
def _functions(tools: bytes) -> dict[str, Callable[[dict[str, Any]], str | None]] | str:
    """For each function offered, what checks its arguments; or why the list is none. Many records offer the same."""
    offered: dict[str, Callable[[dict[str, Any]], str | None]] = {}
    for tool in msgspec.json.decode(tools):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return "tools holds something that is not a function with a name"
        if function["name"] in offered:
            return f"tools holds {function['name'][:80]} twice"
        offered[function["name"]] = arguments_checker(function)
    return offered


def _loss(view: View) -> Iterator[str]:
    """Only what the teacher wrote is learned."""
    turns = view.record.messages
    size = view.record.render.n_chars if view.record.render else sys.maxsize
    teachers = {index for index, _ in view.teachers}
    for number, target in enumerate(view.record.targets):
        start, end = target.char
        if target.msg not in teachers:
            yield f"targets[{number}] is on messages[{target.msg}], which the teacher did not write"
        elif not 0 <= start < end <= size:
            yield f"targets[{number}] is empty, reversed or outside the rendered text"
        elif target.source and not (0 <= target.source.msg < target.msg and turns[target.source.msg].role == "tool"):
            yield f"targets[{number}]: its source is not an earlier tool's result"


def _spans(view: View) -> Iterator[str]:
    """The targets are those of the rendered text, and their characters, bytes and tokens agree."""
    if isinstance(view.layout, str) or next(_loss(view), None):
        return  # `render` or `loss` says so
    found, expected = view.record.targets, view.layout.targets
    if found == expected:
        return
    if len(found) != len(expected):
        yield f"{len(found)} targets; the rendered text has {len(expected)}"
        return
    for number, (target, right) in enumerate(zip(found, expected)):
        names = [name for name in right.__struct_fields__ if getattr(target, name) != getattr(right, name)]
        if names:
            yield f"targets[{number}] ({right.kind}): {', '.join(names)} differ from the rendered text's"


def _render(view: View) -> Iterator[str]:
    """Rendering the record again gives the text that it was made from."""
    if isinstance(view.layout, str):
        yield f"it cannot be rendered: {view.layout}"
    elif view.record.render is None:
        yield "render is missing"
    elif view.record.render != view.layout.rendered:
        stated, made = view.record.render, view.layout.rendered
        names = [name for name in made.__struct_fields__ if getattr(stated, name) != getattr(made, name)]
        yield f"{', '.join(names)} of render differ from the rendered text's"


def _distributions(view: View) -> Iterator[str]:
    ref, item = view.record.logprobs, view.stored
    if ref is None:
        return
    if view.context.header.logprobs is None:
        yield "logprobs is set, but the dataset has no distributions"
    if isinstance(item, str):
        yield item
    if not isinstance(item, Distribution) or isinstance(view.layout, str) or view.layout.completion is None:
        return
    if (len(item.token_ids), item.topk_ids.shape[1]) != (ref.n, ref.k):
        yield f"logprobs says n={ref.n}, k={ref.k}; its row has other sizes"
    elif not same_tokens(item, view.layout.completion):
        yield "the tokens of its distributions are not those that the teacher wrote"


_LOST = re.compile("[\ufffd\ud800-\udfff]")


def _bytes(view: View) -> Iterator[str]:
    """The teacher's text came through undamaged, and what is unusual about its lines is flagged."""
    record = view.record
    for index, turn in view.teachers:
        for text in (turn.content, turn.reasoning):
            if "\x00" in text or (not text.isascii() and _LOST.search(text)):
                yield f"messages[{index}] holds characters that stand for lost bytes"
    returns = any("\r" in turn.content for turn in record.messages)
    if returns != ("crlf" in record.flags):
        yield "holds carriage returns, which flags does not say" if returns else "is flagged crlf and holds none"


def _costs(view: View) -> Iterator[str]:
    """What a record says it took is possible; whether it sums up, files.py says."""
    cost, usage = view.record.cost_usd, view.record.usage
    if cost is not None and not is_cost(cost):
        yield "its cost is not an amount"
    if usage and not (0 <= usage.reasoning <= usage.completion and 0 <= usage.cached <= usage.prompt):
        yield "its usage is impossible: parts are more than their whole"
    elif usage and cost is not None and (prices := view.context.prices) and dollars(prices.cost(usage)) != cost:
        yield f"its usage costs {dollars(prices.cost(usage))} USD by the configuration's prices, it says {cost}"


def _leak(view: View) -> Iterator[str]:
    """No call or control markup of another template is left in what the teacher wrote; for ours, see `calls`."""
    for index, turn in view.teachers:
        if family := _family(turn.content, turn.reasoning):
            yield f"messages[{index}] holds {family} markup"
    if view.record.reasoning and (family := _family("", view.record.reasoning)):
        yield f"its reasoning holds {family} markup"


def _family(content: str, reasoning: str) -> str | None:
    if not any(mark in text for text in (content, reasoning) for mark in "<["):
        return None
    family = leak_of(Reply(content, reasoning, (), None, None, "", "", None))
    return None if family == "tool_call" else family


def _secrets(view: View) -> Iterator[str]:
    if not secrets.secret_in(view.text):
        return
    for place, text in view.texts:
        if kind := secrets.secret_in(text):
            yield f"{place} holds what looks like a secret ({kind})"


def _personal_data(view: View) -> Iterator[str]:
    if not secrets.personal_in(view.text):
        return
    for place, text in view.texts:
        for kind, n in secrets.personal_in(text).items():
            yield f"{place} holds what looks like personal data ({kind}, {n})"


def _contamination(view: View) -> Iterator[str]:
    """No run of words of an evaluation set in any text of a record, each by itself: joined, a short one is missed."""
    if view.context.evaluation is None:
        return
    record = view.record
    texts = {record.ground_truth or "", record.reasoning or ""}
    for turn in record.messages:
        texts |= {turn.content, turn.reasoning, *(chat.call_text(call) for call in turn.tool_calls)}
    hits = (hit for text in sorted(texts) if text for hit in view.context.evaluation.hits(text, limit=3))
    for hit in itertools.islice(hits, 3):
        yield f"shares {hit.ngram!r} with {hit.item} of {hit.set}"


def _provenance(view: View) -> Iterator[str]:
    """A request and an answer for each of the teacher's turns, a hash for each of the broker's results; hashes that
    can be made again from the record are equal."""
    record, stated = view.record, view.record.provenance
    results = [turn for turn in record.messages if turn.role == "tool" and turn.origin == "broker"]
    if stated is None:
        if results or view.context.header.teacher.kind != "toy":
            yield "provenance is missing"
        return
    counts = {
        "request_sha256": len(view.teachers),
        "response_sha256": len(view.teachers),
        "fixture_sha256": len(results),
    }
    for name, n in counts.items():
        if len(getattr(stated, name)) != n:
            yield f"provenance has {len(getattr(stated, name))} {name}, the conversation {n}"
            return
    calls = [call for _, turn in view.teachers for call in turn.tool_calls]
    for number, (call, turn, digest) in enumerate(zip(calls, results, stated.fixture_sha256)):
        if fixture_sha256(call, turn.content) != digest:
            yield f"fixture {number}, of {call.name}, is not the result that its hash names"
    last = record.messages[-1]
    if not last.tool_calls:  # of calls, the record has the values and not the strings
        said = Reply(last.content, record.reasoning, (), last.finish_reason, None, "", "", None)
        if reply_sha256(said) != stated.response_sha256[-1]:
            yield "the last turn is not the answer that its hash names"


def _finish(view: View) -> Iterator[str]:
    for index, turn in enumerate(view.record.messages):
        if turn.origin != "teacher":
            if turn.finish_reason is not None:
                yield f"messages[{index}] is not the teacher's and has a finish reason"
        elif turn.finish_reason not in (FINISH_WITH_CALLS if turn.tool_calls else FINISH_WITHOUT):
            kind = "with" if turn.tool_calls else "without"
            yield f"messages[{index}]: a turn {kind} calls cannot end with {str(turn.finish_reason)[:40]!r}"


def _licence(view: View) -> Iterator[str]:
    learned = [index for index, turn in view.teachers if turn.reasoning]
    if learned and not view.context.header.licence.reasoning_allowed:
        yield f"messages[{learned[0]}]: reasoning is learned, which the header's licence does not allow"
    last = view.record.messages[-1].reasoning
    if last and last != view.record.reasoning:
        yield "the reasoning of the last turn is not that of the record"


RULES: dict[str, Rule] = {
    "run_id": Rule(_run_id),
    "split": Rule(_split),
    "roles": Rule(_roles),
    "calls": Rule(_calls),
    "offered": Rule(_offered),
    "loss": Rule(_loss),
    "finish": Rule(_finish),
    "licence": Rule(_licence),
    "bytes": Rule(_bytes),
    "costs": Rule(_costs),
    "leak": Rule(_leak),
    "provenance": Rule(_provenance, structural=False),
    "spans": Rule(_spans, structural=False),
    "render": Rule(_render, structural=False),
    "distributions": Rule(_distributions, structural=False),
    "secrets": Rule(_secrets, structural=False),
    "personal_data": Rule(_personal_data, structural=False),
    "contamination": Rule(_contamination, structural=False),
}
"""By name, in the order of their cost."""
