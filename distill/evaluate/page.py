"""A report of an evaluation for people: verdict, gates, metrics, self-test, and the episodes that failed.

One file that loads nothing and runs nothing. What a model said may be hostile: all of it goes through `markup.text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distill.evaluate import charts, page_episode
from distill.evaluate.metrics import COUNTED
from distill.evaluate.page_episode import badge, episode_html, value
from distill.evaluate.report import Played
from distill.evaluate.sets import EvaluationSet
from distill.markup import Markup, document, more, table, text, words

MOST = 2_000_000
"""Bytes of a page."""
_ROWS = 40
"""Most rows of what has no bound of its own: errors, items named."""
STYLE = "body { max-width: 70rem }" + page_episode.STYLE + charts.STYLE
_ORDER = {"error": 0, "fail": 1, "inconclusive": 2, "skipped": 3, "pass": 4}


def page(report: Mapping[str, Any], found: EvaluationSet, played: Played) -> str:
    """The page of a report that report.build made of these episodes."""
    header, failed = report["header"], by_gate(played)
    title = f"Evaluation of {_model(header['model'])} on {found.path.name}"
    passed = sum(gate["status"] == "pass" for gate in report["gates"].values())
    top = (f"<h1>{text(title)}</h1>\n<p>{badge(report['overall'])} {passed} of {len(report['gates'])} gates passed, "
           f"over {report['counts']['items']:,} items, {text(header['criteria']['tier'])}.</p>\n")  # fmt: skip
    parts = {
        "Gates": _gates(report, failed),
        "Metrics": _metrics(report),
        "Kinds": _kinds(report),
        "How episodes ended": table(("end", "episodes"), [(words(k), n) for k, n in report["counts"]["ends"].items()]),
        "Self-test": _self_test(report["self_test"]),
        "What was evaluated": _facts(report),
    }
    body = top + "".join(f"<h2>{name}</h2>\n{part}\n" for name, part in parts.items())
    episodes = failing(played, failed, MOST - len(document(text(title), body, STYLE).encode()))
    return document(text(title), f"{body}<h2>Failing episodes</h2>\n{episodes}", STYLE)


def by_gate(played: Played) -> dict[str, list[str]]:
    """Items by what they failed at; those that failed at most things first."""
    out: dict[str, list[str]] = {}
    ordered = sorted(
        played.scores.values(), key=lambda one: (-len({failure.gate for failure in one.failures}), one.item)
    )
    for one in ordered:
        for gate in dict.fromkeys(failure.gate for failure in one.failures):
            out.setdefault(gate, []).append(one.item)
    return dict(sorted(out.items()))


class _Shown(NamedTuple):
    """An episode on the page."""

    anchor: str
    gate: str
    """Where it stands."""
    html: str


def failing(played: Played, failed: Mapping[str, Sequence[str]], room: int) -> str:
    """The episodes of each gate, in turn as long as there is room; each stands at one of its gates."""
    if not failed:
        return "<p>None.</p>\n"
    room -= 10_000 * len(failed)  # headings, and links to those that stand elsewhere
    shown: dict[str, _Shown] = {}
    waiting = {gate: iter(items) for gate, items in failed.items()}
    while waiting and room > 0:
        for gate in list(waiting):
            item = next((name for name in waiting[gate] if name not in shown), None)
            if item is None:
                del waiting[gate]
                continue
            anchor = f"e{len(shown)}"
            made = episode_html(played.episodes[item], played.scores[item].failures, anchor=anchor)
            room -= len(made.encode())
            if room <= 0:
                break
            shown[item] = _Shown(anchor, gate, made)
    return "".join(_group(gate, items, shown) for gate, items in failed.items())


def _group(gate: str, items: Sequence[str], shown: Mapping[str, _Shown]) -> str:
    here = [shown[item].html for item in items if item in shown and shown[item].gate == gate]
    others = [f'<a href="#{shown[item].anchor}">{text(item, 80)}</a>' for item in items
              if item in shown and shown[item].gate != gate]  # fmt: skip
    out = f'<h3 id="gate-{gate}">{text(words(gate))}: {len(items)} episodes</h3>\n{"".join(here)}'
    if others:
        named = f" and {len(others) - _ROWS} more" if len(others) > _ROWS else ""
        out += f"<p>Shown elsewhere, since they fail at other gates too: {', '.join(others[:_ROWS])}{named}.</p>\n"
    return out + more(len(items), sum(item in shown for item in items))


def _gates(report: Mapping[str, Any], failed: Mapping[str, Sequence[str]]) -> str:
    rows = []
    for name, gate in sorted(report["gates"].items(), key=lambda pair: _ORDER.get(pair[1]["status"], 0)):
        group = next((one for one in failed if name.startswith(one)), None)
        link = f'<a href="#gate-{text(group)}">{text(words(name))}</a>' if group else text(words(name))
        n, n_min = (value("" if gate.get(key) is None else f"{gate[key]:,}") for key in ("n", "n_min"))
        rows.append((badge(gate["status"]), Markup(link), value(_short(gate.get("observed"))),
                     value(gate.get("threshold") or ""), n, n_min, gate.get("reason")))  # fmt: skip
    return table(("status", "gate", "observed", "threshold", "n", "n needed", "reason"), rows)


def _metrics(report: Mapping[str, Any]) -> str:
    rows = []
    for name, one in report["metrics"].items():
        threshold = str(report["gates"].get(name, {}).get("threshold") or "").split()
        limit = float(threshold[1]) if len(threshold) == 2 else None
        ends = one["ci95"]
        spread = "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"
        plain = one["den"] and name in COUNTED and not name.startswith("integration")
        counted = f"{one['num']:,} of {one['den']:,}" if plain else ""
        rows.append((words(name), charts.rate(one["value"], ends, limit), value(_short(one["value"])), value(spread),
                     value(counted), value(f"{one['n']:,}")))  # fmt: skip
    heads = ("metric", "0 to 1, with threshold", "value", "95% interval", "counted", "n")
    return table(heads, rows) + "<p>Intervals: percentile bootstrap by item.</p>"


def _kinds(report: Mapping[str, Any]) -> str:
    rows = [(words(kind), charts.share(one["clean"], one["items"]), one["items"], one["clean"], one["tp"], one["fp"],
             one["fn"]) for kind, one in report["counts"]["by_kind"].items()]  # fmt: skip
    heads = ("kind", "without any failure", "items", "without failure", "calls right", "calls wrong", "calls missing")
    return table(heads, rows)


def _self_test(checks: Sequence[Mapping[str, Any]]) -> str:
    if not checks:
        return "<p>It was not run.</p>"
    said = {"pass": "caught", "fail": "let through", "skipped": "not tried"}
    rows = []
    for check in checks:
        oracle = check["policy"] == "oracle"
        verdict = badge(check["status"], check["status"] if oracle else said.get(check["status"]))
        rows.append((verdict, check["policy"], words(check["gate"]), _short(check.get("observed")),
                     _short(check.get("n")), check.get("reason")))  # fmt: skip
    heads = ("", "policy", "gate", "observed", "n", "reason")
    intro = "<p>The oracle must be right on every item; every cheat must fail at the gate named for it.</p>"
    return intro + table(heads, rows)


def _facts(report: Mapping[str, Any]) -> str:
    header = report["header"]
    rows: list[tuple[str, Any]] = [(words(name), _code(value)) for name, value in header["fingerprints"].items()]
    rows += [(f"model: {words(name)}", _code(value)) for name, value in header["model"].items()
             if name not in header["fingerprints"]]  # fmt: skip
    rows += [(words(name), _code(header.get(name))) for name in ("broker", "seed", "limits")]
    rows += [("tokens generated", f"{report['tokens']['generated']:,}"), ("turns", f"{report['tokens']['turns']:,}")]
    rows += [("made by", report["made_by"]["made_by"]), ("code", report["made_by"]["code"])]
    changed = header["criteria"]["changed"]
    out = f"<p>Gates that are not the tier's own: {text(', '.join(changed))}.</p>" if changed else ""
    errors = report["harness_errors"]
    if errors:
        out += "<h3>Items that could not be asked</h3>" + table(
            ("item", "why"), [(error["item"], error["error"]) for error in errors[:_ROWS]]
        ) + more(len(errors), _ROWS)  # fmt: skip
    return table(("", ""), rows) + out


def _model(model: Mapping[str, Any]) -> str:
    files = model.get("files")
    name = next(iter(files), "") if isinstance(files, Mapping) else model.get("model", "")
    return f"{model.get('runner', 'a model')} {name}".strip()


def _code(value: Any) -> Markup:
    return Markup("not known") if value is None else Markup(f"<code>{text(value, 600)}</code>")


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
