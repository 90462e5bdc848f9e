"""The parts of an HTML page that loads nothing and runs nothing. Every text may be hostile: all go through `text`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from string import Template

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8884; --bar: #3b7dd8; --soft: #8881 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; overflow-wrap: break-word }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tr + tr td { border-top: 1px solid var(--line) }
figure { display: inline-block; margin: 0 1.5rem 1rem 0 } figcaption { font-size: .85rem }
svg text { font: 11px sans-serif; fill: currentColor } svg rect { fill: var(--bar) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; font: 13px/1.45 ui-monospace, monospace }
details { margin: .4rem 0 } summary { cursor: pointer }
.turn { border-left: 3px solid var(--line); padding: .1rem .8rem; margin: .6rem 0 }
.teacher { border-color: var(--bar); background: var(--soft) } .who { font-size: .8rem; opacity: .75 }
bdi { overflow-wrap: anywhere }
$style</style></head><body>
$body
</body></html>
""")


class Markup(str):
    """Text that is HTML already."""


def document(title: str, body: str, style: str = "") -> str:
    """A page of parts that are HTML already; `style`: rules beside those that all pages have."""
    return _PAGE.substitute(title=title, body=body, style=style)


def text(value: object, room: int = 300) -> Markup:
    """A value as inert text, cut where it takes more than `room` bytes."""
    whole = f"{value:f}" if isinstance(value, Decimal) else str(value)
    shown = _UNPRINTABLE.sub("\ufffd", whole[:room])
    while len(data := html.escape(shown).encode()) > room:
        shown = shown[: len(shown) * room // len(data)]
    return Markup(data.decode() + (" [...]" if len(shown) < len(whole) else ""))


def words(name: str) -> str:
    """A name in words."""
    return name.replace("_", " ")


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Numbers stand on the right; None is an empty cell; Markup stays as it is."""
    number = int | float | Decimal
    lines = [[(' class="n"' if isinstance(value, number) else "", _cell(value)) for value in row] for row in rows]
    classes = [kind for kind, _ in lines[0]] if lines else [""] * len(heads)
    top = "".join(f"<th{kind}>{text(head)}</th>" for kind, head in zip(classes, heads, strict=True))
    body = "".join("<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in line) + "</tr>\n" for line in lines)
    return Markup(f"<table>\n<tr>{top}</tr>\n{body}</table>")


def _cell(value: object) -> str:
    if isinstance(value, Markup):
        return value
    return "" if value is None else text(value)


def more(total: int, shown: int) -> str:
    """Says what was left out, if anything was."""
    return f"<p>{total - shown} more are not shown.</p>" if total > shown else ""
