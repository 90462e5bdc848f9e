"""Rules that one record must keep. Each is a function from a `View` that yields what is wrong; RULES is their table.

Structural rules look at a record's parts alone; the others render it, read its texts or its distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from distill.broker import fixture_sha256
from distill.data.budget import dollars
from distill.data.episodes import Accepted, Rejected, reply_sha256
from distill.data.rules import texts
from distill.data.rules.header import SHA256
from distill.data.rules.replay import Played, cost_of, differences
from distill.data.rules.view import View
from distill.data.rules.whole import is_cost
from distill.data.schema import Call, split_of
from distill.data.store.distributions import Distribution, divergence, from_endpoint, same_entries, same_tokens
from distill.data.store.store import TopK
from distill.data.teacher.wire import Reply
from distill.tokenizer import CALL_END, CALL_START
from distill.tools import arguments_checker

FINISH_WITH_CALLS = ("tool_calls", "function_call", "stop")
"""Some servers end a turn that calls tools with `stop`."""
FINISH_WITHOUT = ("stop",)
_ROUNDING = 1e-6  # nats: what the same logarithms differ by on two machines


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


def _ids(view: View) -> Iterator[str]:
    """A generated record's id is its stratum and the hash of its prompt."""
    record = view.record
    if view.context.header.teacher.kind == "toy":
        return
    if not record.id.startswith(f"{record.stratum}-"):
        yield "its id does not begin with its stratum"
    elif view.context.protocol is not None and view.prompt is None:
        yield "its id is not the hash of what was asked"


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
        if not (turn.tool_calls or turn.content.strip()):
            yield f"messages[{index}]: the {turn.role} turn is empty"
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
    if view.record.expect == "any":
        return
    called = any(turn.tool_calls for _, turn in view.teachers)
    if called != (view.record.expect == "call"):
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
    turns, teachers = view.record.messages, [index for index, _ in view.teachers]
    for number, target in enumerate(view.record.targets):
        if target.msg not in teachers:
            yield f"targets[{number}] is on messages[{target.msg}], which the teacher did not write"
        elif target.source and not (0 <= target.source.msg < target.msg and turns[target.source.msg].role == "tool"):
            yield f"targets[{number}]: its source is not an earlier tool's result"


def _spans(view: View) -> Iterator[str]:
    """The targets are those of the rendered text, and their characters, bytes and tokens agree."""
    if isinstance(view.layout, str) or next(_loss(view), None):
        return  # `render` or `loss` says so
    size = view.layout.rendered.n_chars
    for number, target in enumerate(view.record.targets):
        if not 0 <= target.char[0] < target.char[1] <= size:
            yield f"targets[{number}] is empty, reversed or outside the rendered text"
            return
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
    ref, item, info = view.record.logprobs, view.stored, view.context.header.logprobs
    completion = None if isinstance(view.layout, str) else view.layout.completion
    heard = _heard(view, completion) if completion is not None else None
    if ref is None:
        if info and view.context.header.teacher.logits_engine:
            yield "has no distributions, though the teacher's logits gave one for each token"
        elif heard is not None and heard[0] is not None:
            yield "has no distributions, though the journal's answers give them"
        return
    if info is None:
        yield "logprobs is set, but the dataset has no distributions"
    if isinstance(item, str):
        yield item
    if not isinstance(item, Distribution) or completion is None:
        return
    if (len(item.token_ids), item.topk_ids.shape[1]) != (ref.n, ref.k):
        yield f"logprobs says n={ref.n}, k={ref.k}; its row has other sizes"
    elif not same_tokens(item, completion):
        yield "the tokens of its distributions are not those that the teacher wrote"
    elif heard is not None and view.context.store is not None:
        if heard[0] is None:
            yield "has distributions, and the journal's answers give none"
        elif problem := _differing(heard[0], item, view.context.store):
            yield problem


def _heard(view: View, completion: list[int]) -> tuple[Distribution | None] | None:
    """What the journal's answers say of its tokens, as it was made of them; None where that is not known."""
    store, tokenizer, played = view.context.store, view.context.tokenizer, view.played
    if view.context.header.teacher.logits_engine or store is None or tokenizer is None:
        return None
    if not isinstance(played, Played) or not isinstance(played.end, Accepted):
        return None  # `journal` says so
    return (from_endpoint([reply.logprobs for reply in played.end.replies], completion, tokenizer, k=store.k),)


def _differing(made: Distribution, item: Distribution, store: TopK) -> str | None:
    """In what stored distributions are not those that were made, but for what their codec loses."""
    if not same_entries(made, item):
        return "its distributions keep other tokens than the journal's answers"
    if (divergence(made, item) > 2 * divergence(made, store.as_kept(made)) + _ROUNDING).any():
        return "its distributions are not those of the journal's answers"
    return None


def _costs(view: View) -> Iterator[str]:
    """What a record says it took is possible; whether it sums up, files.py says."""
    cost, usage, prices = view.record.cost_usd, view.record.usage, view.context.prices
    if cost is not None and not is_cost(cost):
        yield "its cost is not an amount"
    elif view.context.generated and (cost is None) != (prices is None):
        yield "what it cost is not stated" if prices else "has a cost, and the configuration no prices"
    elif view.context.generated and cost and not usage:
        yield f"costs {cost} USD, and nothing was counted"
    if usage and not (0 <= usage.reasoning <= usage.completion and 0 <= usage.cached <= usage.prompt):
        yield "its usage is impossible: parts are more than their whole"
    elif usage and cost is not None and prices and cost.scaleb(12) != prices.cost(usage):
        yield f"its usage costs {dollars(prices.cost(usage))} USD by the configuration's prices, it says {cost}"
    elif (
        cost is not None
        and view.context.answers
        and isinstance(view.played, Played)
        and cost_of(view.played) not in (None, cost)
    ):
        yield f"the ledger settled {cost_of(view.played)} USD for its answers, it says {cost}"


def _provenance(view: View) -> Iterator[str]:
    """A request and an answer for each of the teacher's turns, a hash for each of the broker's results; hashes that
    can be made again from the record are equal."""
    record, stated = view.record, view.record.provenance
    results = [turn for turn in record.messages if turn.role == "tool" and turn.origin == "broker"]
    if stated is None:
        if results or view.context.header.teacher.asked:
            yield "provenance is missing"
        return
    asked = len(view.teachers) if view.context.header.teacher.kind != "scripted" else 0
    counts = {
        "request_sha256": asked,
        "response_sha256": asked,
        "fixture_sha256": len(results),
    }
    for name, n in counts.items():
        if len(getattr(stated, name)) != n:
            yield f"provenance has {len(getattr(stated, name))} {name}, the conversation {n}"
            return
        if not all(map(SHA256.fullmatch, getattr(stated, name))):
            yield f"provenance's {name} holds what is no sha256"
    calls = [call for _, turn in view.teachers for call in turn.tool_calls]
    for number, (call, turn, digest) in enumerate(zip(calls, results, stated.fixture_sha256)):
        if fixture_sha256(call, turn.content) != digest:
            yield f"fixture {number}, of {call.name}, is not the result that its hash names"
    last = record.messages[-1]
    if asked and not last.tool_calls:  # of calls, the record has the values and not the strings
        said = Reply(last.content, record.reasoning, (), last.finish_reason, None, "", "", None)
        if reply_sha256(said) != stated.response_sha256[-1]:
            yield "the last turn is not the answer that its hash names"
    if view.told is not None:
        for number, (made, digest) in enumerate(zip(view.told.requests, stated.request_sha256)):
            if made != digest:
                yield f"request {number} is not the one that its hash names"
                break
        if isinstance(view.told.end, Rejected):
            yield f"generation would have rejected it ({view.told.end.reason})"


def _journal(view: View) -> Iterator[str]:
    """The record is what the journal's answers make of its prompt."""
    if isinstance(view.played, str):
        yield view.played
    elif view.played is not None:
        yield from differences(view.record, view.played)


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
    "ids": Rule(_ids),
    "split": Rule(_split),
    "roles": Rule(_roles),
    "calls": Rule(_calls),
    "offered": Rule(_offered),
    "loss": Rule(_loss),
    "finish": Rule(_finish),
    "licence": Rule(_licence),
    "bytes": Rule(texts.bytes_problems),
    "costs": Rule(_costs),
    "leak": Rule(texts.leak_problems),
    "provenance": Rule(_provenance, structural=False),
    "journal": Rule(_journal, structural=False),
    "spans": Rule(_spans, structural=False),
    "render": Rule(_render, structural=False),
    "distributions": Rule(_distributions, structural=False),
    "secrets": Rule(texts.secrets_problems, structural=False),
    "personal_data": Rule(texts.personal_data_problems, structural=False),
    "contamination": Rule(texts.contamination_problems, structural=False),
}
"""By name, in the order of their cost."""
