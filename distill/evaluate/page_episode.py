"""An episode for people, turn by turn: what was said and called, beside what should have been, and why it failed."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from distill.evaluate.answers import Answer, Said, evidence_of, matched_calls, read_answer
from distill.evaluate.episode import Episode, Made, Turn
from distill.evaluate.items import GoldCall
from distill.evaluate.scoring import Failure
from distill.markup import Markup, table, text, words

_EPISODE, _TURN = 24_000, 4_000
"""Most bytes of an episode's turns, and of a text in one."""
_SHOWN = 12
"""Most facts, claims or failures that are listed."""
STYLE = """
.badge { display: inline-block; border-radius: .6rem; padding: 0 .55rem; font-size: .8rem; color: #fff;
  background: #6e7781; white-space: nowrap }
.pass, .hit, .right, .better { background: #1a7f37 } .fail, .wrong, .worse { background: #c62a33 }
.inconclusive, .miss { background: #946200 } .error { background: #8250df }
.episode { border: 1px solid var(--line); border-radius: .4rem; padding: .2rem .8rem; margin: .5rem 0 }
.model { border-color: var(--bar); background: var(--soft) } .tool { margin-left: 1.5rem }
.gold { border-left: 3px solid #1a7f37; padding-left: .6rem; margin: .3rem 0 }
.why { margin: .4rem 0; padding-left: 1.2rem; overflow-wrap: anywhere }
mark { color: inherit; border-radius: .2rem; padding: 0 .1rem } mark.yes { background: #2da44e40 }
mark.no { background: #e5534b50; text-decoration: underline wavy #e5534b }
code { overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace } td { max-width: 42rem }
.v { white-space: nowrap; font-variant-numeric: tabular-nums } .episode table { margin: .6rem 0 }
"""


def value(said: object) -> Markup:
    """A short value that stays on one line."""
    return Markup(f'<span class="v">{text(said)}</span>')


def badge(kind: str, said: str | None = None) -> Markup:
    """A word in its colour; `kind` is one of ours."""
    return Markup(f'<span class="badge {kind}">{text(said or kind)}</span>')


def episode_html(episode: Episode, failures: Sequence[Failure], *, anchor: str) -> str:
    """A folded episode. Its size is bounded, whatever the model said."""
    item = episode.item
    gates = list(dict.fromkeys(words(failure.gate) for failure in failures))
    title = (f'<code>{text(item.id)}</code> <span class="who">{text(words(item.kind))}, {text(item.stratum)}, '
             f"{len(episode.turns)} turns, ends with {text(words(episode.end))}</span>")  # fmt: skip
    title += f"<br>{' '.join(badge('fail', gate) for gate in gates)}" if gates else f" {badge('pass')}"
    why = "".join(f"<li><b>{text(words(one.gate))}</b>: {text(one.excerpt, 800)}</li>\n" for one in failures[:_SHOWN])
    offered = text(", ".join(tool["name"] for tool in item.tools), 1_000)
    parts = [f'<ul class="why">{why}</ul>\n' if why else "", f'<p class="who">tools offered: {offered}</p>\n']
    parts += [_turn(message.role, _pre(message.content)) for message in item.messages]
    parts += _model_turns(episode)
    if item.integrates and episode.final:
        parts.append(_answer(read_answer(episode, matched_calls(episode), evidence_of(episode))))
    body = "".join(_within(parts, _EPISODE))
    right = f'<details><summary>a right answer</summary><div class="gold">{_pre(item.answer)}</div></details>\n'
    return f'<details class="episode" id="{anchor}"><summary>{title}</summary>\n{body}{right}</details>\n'


def _within(parts: Iterable[str], room: int) -> Iterable[str]:
    """The parts that there is room for, and how many there was none for."""
    left_out = 0
    for part in parts:
        room -= len(part.encode())
        if room >= 0:
            yield part
        else:
            left_out, room = left_out + 1, -1
    if left_out:
        yield f"<p>{left_out} more parts of this episode are not shown.</p>\n"


def _model_turns(episode: Episode) -> list[str]:
    matched = matched_calls(episode)
    right = {p: episode.item.calls[g] for g, p in matched.pairs}
    never = [call for g, call in enumerate(episode.item.calls) if g not in {pair[0] for pair in matched.pairs}]
    parts: list[str] = []
    place = 0
    for number, turn in enumerate(episode.turns, 1):
        final = number == len(episode.turns) and bool(episode.final)
        said = _marked_final(episode) if final else _pre(turn.content) if turn.content else _silent(turn)
        parts.append(_turn(f"model, turn {number}{', final answer' if final else ''}", said, "model"))
        for made in turn.calls:
            gold = right.get(place) if made.call is not None else None
            place += made.call is not None
            parts.append(_call(made, gold, [call for call in never if made.call and call.name == made.call.name]))
    if never:
        missing = "".join(_gold(call, "gold call") for call in never)
        parts.append(f"<p>Never made: {len(never)} of {len(episode.item.calls)} gold calls.</p>{missing}")
    if not episode.final:
        parts.append("<p>There is no final answer.</p>\n")
    return parts


def _silent(turn: Turn) -> str:
    return "" if turn.calls else '<div class="who">says nothing</div>\n'


def _turn(who: str, inner: str, kind: str = "") -> str:
    return f'<div class="turn {kind}"><div class="who">{text(who)}</div>\n{inner}</div>\n'


def _call(made: Made, gold: GoldCall | None, instead: Sequence[GoldCall]) -> str:
    """A call, whether it was right, and what it gave."""
    name = made.call.name if made.call is not None else ""
    label = badge("right") if gold else badge("wrong", "invalid" if made.problem else "not a gold call")
    why = text(gold.id if gold else made.problem)
    inner = f'<div>{label} <code>{text(name)}</code> <span class="who">{why}</span></div>{_pre(_pretty(made.raw))}\n'
    inner += "".join(_gold(call, "should have been") for call in instead[:2])
    if made.outcome is None:
        return _turn("call, not answered: the episode had ended", inner, "tool")
    kind = {"hit": "hit", "simulated": "hit", "miss": "miss"}.get(made.outcome.status, "wrong")
    said = f"{made.outcome.status}, error {made.outcome.error}" if made.outcome.error else made.outcome.status
    return _turn("call", f"{inner}<div>{badge(kind, said)}</div>{_pre(_pretty(made.outcome.content))}\n", "tool")


def _gold(call: GoldCall, said: str) -> str:
    after = f", after {', '.join(call.after)}" if call.after else ""
    return (f'<div class="gold"><span class="who">{text(said)}: {text(call.id)}{text(after)}</span> '
            f"<code>{text(call.name)} {text(_json(call.example), 1000)}</code></div>\n")  # fmt: skip


def _marked_final(episode: Episode) -> str:
    """The final answer with its checkable claims marked; only those of kinds that are scored by them."""
    if not episode.item.integrates:
        return _pre(episode.final)
    answer = read_answer(episode, matched_calls(episode), evidence_of(episode))
    whole = unicodedata.normalize("NFC", episode.final)
    out, at = "", 0
    for claim in sorted(answer.claims, key=lambda one: one.atom.span):
        start, end = claim.atom.span
        if start < at or len(out) > _TURN:
            continue
        shown = f'<mark class="{"yes" if claim.strict else "no"}">{text(whole[start:end])}</mark>'
        out += (text(whole[at:start], _TURN) if start > at else "") + shown
        at = end
    rest = text(whole[at:], _TURN) if at < len(whole) else ""
    return f"<pre>{out}{rest}</pre>\n"


def _answer(answer: Answer) -> str:
    """Which facts are said, and which claims rest on nothing."""
    out = ""
    if answer.facts:
        rows = [(_verdict(one), f"{one.fact.call}{one.fact.pointer}", _json(one.fact.value))
                for one in answer.facts[:_SHOWN]]  # fmt: skip
        out += table(("fact", "call and pointer", "value"), rows)
    loose = [claim for claim in answer.claims if not claim.strict]
    if loose:
        shown = ", ".join(
            f"<code>{text(one.atom.text)}</code>{' (nearly)' if one.lax else ''}" for one in loose[:_SHOWN]
        )
        more = f" and {len(loose) - _SHOWN} more" if len(loose) > _SHOWN else ""
        out += f"<p>Claims that neither results nor the question give: {shown}{more}.</p>\n"
    return out


def _verdict(one: Said) -> Markup:
    if not one.returned:
        return badge("wrong", "never returned")
    return (
        badge("right", "said") if one.strict else badge("miss", "nearly said") if one.lax else badge("wrong", "missing")
    )


def _pre(value: str, room: int = _TURN) -> str:
    """A text in full, or its two ends."""
    if len(value) > room:
        left_out = len(value) - room
        value = f"{value[: room * 2 // 3]}\n[... {left_out:,} characters ...]\n{value[len(value) - room // 3 :]}"
    return f"<pre>{text(value, 2 * room)}</pre>\n"


def _pretty(raw: str) -> str:
    """JSON in lines where it is longer than one; else as it is."""
    if len(raw) <= 80:
        return raw
    try:
        return msgspec.json.format(raw.encode(), indent=2).decode()
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return raw


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
