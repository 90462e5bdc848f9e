"""report.html: what report.json says of a dataset, and some of its conversations, for people.

One file that loads nothing and runs nothing. Every text in it may be hostile: all of them go through `markup.text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from distill.data.schema import Header, Record, Turn
from distill.markup import document, more, table, text, words

_STRATA, _EXAMPLES, _LEFT_OUT = 60, 5, 30  # most rows: of strata, of drops for each reason, of strata left out
_TURN, _SAMPLE = 4_000, 10_000  # most bytes of a turn and of a conversation


def page(header: Header, facts: Mapping[str, Any], samples: Sequence[Record]) -> str:
    """The page of a dataset; `facts` is what its report.json holds."""
    title = text(f"{header.teacher.model}, run {header.run_id}")
    parts = {
        "Strata": _strata(facts),
        "Rejected answers": _rejected(facts),
        "Tokens and cost": _spent(facts),
        "Lengths": "".join(_histogram(words(name), lengths) for name, lengths in facts["lengths"].items()),
        "Tool calls": _bars("records by the number of turns that call tools", facts["tool_turns"]),
        "Distributions": _distributions(facts),
        "Dropped prompts": _dropped(header, facts),
        "Conversations": "".join(_sample(record, first=place == 0) for place, record in enumerate(samples)),
    }
    body = "".join(f"<h2>{name}</h2>\n{part}\n" for name, part in parts.items())
    return document(title, f"<h1>{title}</h1>\n{_overview(header, facts)}\n{body}")


def _overview(header: Header, facts: Mapping[str, Any]) -> str:
    counts, teacher = facts["counts"], header.teacher
    made_of = {"teacher": f"{teacher.kind} {teacher.model}, {teacher.text_engine}", "host": teacher.host}
    rows = [(words(name), str(value)) for name, value in (made_of | counts | header.sampling).items()
            if value is not None]  # fmt: skip
    return table(("", ""), rows)


def _spent(facts: Mapping[str, Any]) -> str:
    rows = [(f"{name} tokens", found["sum"], found["per_record"]) for name, found in (facts["usage"] or {}).items()]
    if facts.get("cost_usd") is not None:
        rows.append(("USD, rejected answers included", facts["cost_usd"], facts["cost_usd_per_record"]))
    out = table(("of the records", "in all", "each"), rows) if rows else "<p>The server counted nothing.</p>"
    if facts.get("cost_usd") is None:
        out += "<p>No cost: the mix has no prices.</p>"
    return out + "<p>The tokens of rejected answers are not in this table; distill kd-ledger counts them too.</p>"


def _strata(facts: Mapping[str, Any]) -> str:
    strata = facts["strata"]
    rows = [(name, found.get("quota"), found["records"], found.get("rejected"), found.get("short"))
            for name, found in list(strata.items())[:_STRATA]]  # fmt: skip
    out = table(("stratum", "quota", "records", "rejected", "why it is short"), rows) + more(len(strata), _STRATA)
    left_out = list(facts.get("left_out", {}).items())
    lines = (f"<p>{text(name)} is left out: {text(why)}</p>\n" for name, why in left_out[:_LEFT_OUT])
    return out + "".join(lines) + more(len(left_out), _LEFT_OUT)


def _rejected(facts: Mapping[str, Any]) -> str:
    accepted, reasons = facts["counts"]["records"], facts.get("rejected", {})
    said = f"<p>{accepted:,} answers were accepted, {facts['counts']['rejected']:,} rejected.</p>"
    return said + (table(("reason", "answers"), reasons.items()) + "<p>rejects.jsonl has each.</p>" if reasons else "")


def _distributions(facts: Mapping[str, Any]) -> str:
    stored = facts["distributions"]
    if stored is None:
        return "<p>None: the set is text only.</p>"
    rows = [(words(name), value) for name, value in stored.items() if name != "kl_to_exact"]
    rows += [(f"KL(given || stored), {name}, nats", value) for name, value in stored["kl_to_exact"].items()]
    if facts.get("unaligned_logprobs"):
        rows.append(("records whose tokens are not the student's", facts["unaligned_logprobs"]))
    return table(("", ""), rows)


def _dropped(header: Header, facts: Mapping[str, Any]) -> str:
    """How many prompts were not asked, and what collided with what."""
    counts, examples = facts.get("prompts_dropped", {}), facts.get("dropped_examples", [])
    held = "".join(f"<p>Held against {text(name)}.</p>\n" for name in list(header.decontamination)[:_LEFT_OUT])
    if not counts:
        return held + "<p>None.</p>"
    out = held + table(("stratum: reason", "prompts"), list(counts.items())[:_STRATA]) + more(len(counts), _STRATA)
    for reason in dict.fromkeys(drop["reason"] for drop in examples):
        out += f"<h3>{text(words(reason))}</h3>\n"
        for drop in [drop for drop in examples if drop["reason"] == reason][:_EXAMPLES]:
            other = f"<br>collides with <bdi>{text(drop['other'], 800)}</bdi>" if drop["other"] else ""
            out += (
                f"<p><bdi>{text(drop['text'], 800)}</bdi>{other}<br>"
                f'<span class="who">{text(drop["stratum"])}: <bdi>{text(drop["evidence"], 800)}</bdi></span></p>\n'
            )
    return out


def _histogram(name: str, lengths: Mapping[str, Any]) -> str:
    return _bars(f"records by {name} (up to); mean {lengths['mean']}, max {lengths['max']}", lengths["up_to"])


def _bars(caption: str, counts: Mapping[str, int]) -> str:
    """A bar for each count, under its value."""
    most, step, high = max(counts.values(), default=0), 46, 90
    bars = ""
    for place, (name, n) in enumerate(counts.items()):
        height = round(high * n / most) if most else 0
        middle = place * step + step // 2
        bars += (f'<rect x="{place * step + 5}" y="{15 + high - height}" width="{step - 10}" height="{height}">'
                 f"<title>{text(name)}: {n}</title></rect>"
                 f'<text x="{middle}" y="{11 + high - height}" text-anchor="middle">{n}</text>'
                 f'<text x="{middle}" y="{high + 30}" text-anchor="middle">{text(name)}</text>\n')  # fmt: skip
    width = max(1, len(counts)) * step
    return (f'<figure><svg width="{width}" height="{high + 36}" role="img" aria-label="{text(caption)}">\n{bars}</svg>'
            f"<figcaption>{text(caption)}</figcaption></figure>\n")  # fmt: skip


def _sample(record: Record, *, first: bool) -> str:
    out, room = "", _SAMPLE
    if record.tools:
        names = ", ".join(str(tool.get("function", tool).get("name")) for tool in record.tools)
        out += f'<p class="who">tools offered: {text(names, 1000)}</p>\n'
    for place, turn in enumerate(record.messages):
        if room < 400:
            out += f"<p>{len(record.messages) - place} more turns are not shown.</p>\n"
            break
        last = place == len(record.messages) - 1
        shown = _turn(turn, (record.reasoning if last else None) or turn.reasoning, min(room, _TURN))
        room -= len(shown.encode())
        out += shown
    title = f'{text(record.stratum)} <span class="who">{text(record.id)}, {record.split}</span>'
    return f"<details{' open' if first else ''}><summary>{title}</summary>\n{out}</details>\n"


def _turn(turn: Turn, reasoning: str, room: int) -> str:
    """A turn with its calls; reasoning is folded."""
    calls = text("".join(f"{call.name} {_pretty(call.arguments)}\n" for call in turn.tool_calls), room // 3)
    thought = text(reasoning, room // 3)
    content = text(turn.content, room - len((calls + thought).encode()))
    who = turn.role if turn.role == turn.origin or turn.origin == "dataset" else f"{turn.role} ({turn.origin})"
    out = f'<div class="turn{" teacher" if turn.origin == "teacher" else ""}"><div class="who">{text(who)}</div>\n'
    if thought:
        out += f"<details><summary>reasoning</summary><pre>{thought}</pre></details>\n"
    if content:
        out += f"<pre>{content}</pre>\n"
    if calls:
        out += f'<div class="who">calls</div><pre>{calls}</pre>\n'
    return out + "</div>\n"


def _pretty(arguments: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(arguments), indent=2).decode()
