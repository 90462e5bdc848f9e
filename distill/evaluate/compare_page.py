"""A comparison of runs for people: differences with their intervals, and the episodes that one run lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluate import charts
from distill.evaluate.page import MOST, STYLE
from distill.evaluate.page_episode import badge, episode_html, value
from distill.evaluate.report import Played
from distill.markup import document, more, table, text, words

_PER_KIND = (
    "call_f1",
    "integration_f1_strict_micro",
    "integration_f1_lax_micro",
    "json_args_valid",
    "fixture_hit_rate",
)
"""Metrics that most kinds have, drawn kind by kind."""


def page(result: Mapping[str, Any], played: Mapping[str, Played]) -> str:
    """The page of what compare.compare made of these runs."""
    names = list(result["comparisons"])
    title = f"{', '.join(names)} against {result['baseline']}"
    body = f"<h1>{text(title)}</h1>\n<p>{result['items']:,} items that every run has a score for.</p>\n{_runs(result)}"
    if result.get("gates"):
        body += "<h2>Margins</h2>\n" + _margins(result["gates"])
    for name, found in result["comparisons"].items():
        body += f"<h2>{text(name)} against {text(result['baseline'])}</h2>\n"
        body += _differences(found["metrics"], (result["baseline"], name)) + _kinds(found, result["baseline"], name)
    room = (MOST - len(document(text(title), body, STYLE).encode())) // len(names) - 5_000
    for number, (name, found) in enumerate(result["comparisons"].items()):
        body += f"<h2>Where {text(name)} lost to {text(result['baseline'])}</h2>\n"
        body += _lost(found["changed"]["worse"], played[result["baseline"]], played[name], name, number, room)
    return document(text(title), body, STYLE)


def _runs(result: Mapping[str, Any]) -> str:
    rows = [(name, run["file"], text(run["model"].get("runner", "")), str(run["model"].get("weights"))[:12],
             run["failed"], run["left_out"]) for name, run in result["runs"].items()]  # fmt: skip
    return table(("run", "results", "runner", "weights", "items with a failure", "items left out"), rows)


def _margins(gates: Mapping[str, Any]) -> str:
    rows = [(badge(gate["status"]), words(name), _signed(gate.get("observed")), _signed(gate.get("threshold")),
             gate.get("reason")) for name, gate in gates.items()]  # fmt: skip
    return table(("status", "run: metric", "difference", "limit", "reason"), rows)


def _differences(metrics: Mapping[str, Any], runs: Sequence[str]) -> str:
    reach = _reach(metrics.values())
    rows = [_row(words(name), one, reach) for name, one in metrics.items()]
    said = f"<p>Drawn from -{reach:g} to {reach:g}. More is better, but for what should not happen.</p>\n"
    return said + table(("metric", *_heads(runs)), rows)


def _heads(runs: Sequence[str]) -> Sequence[str]:
    return ("difference", "verdict", *runs, "difference", "95% interval", "n")


def _row(name: str, one: Mapping[str, Any], reach: float) -> Sequence[object]:
    ends = "" if one["ci95"] is None else f"{one['ci95'][0]:+.4f} to {one['ci95'][1]:+.4f}"
    rates = [value(_rate(one[which]["value"])) for which in ("baseline", "run")]
    kind = one["verdict"] if one["verdict"] in ("better", "worse") else "none"
    n = f"{one['baseline']['n']:,}" + (f" / {one['run']['n']:,}" if one["run"]["n"] != one["baseline"]["n"] else "")
    plot = charts.difference(one["difference"], one["ci95"], reach, one["verdict"])
    numbers = [value(said) for said in (_signed(one["difference"]), ends, n)]
    return (value(name), plot, badge(kind, one["verdict"]), *rates, *numbers)


def _kinds(found: Mapping[str, Any], baseline: str, name: str) -> str:
    kinds = [("all", found["success"]), *((kind, one["success"]) for kind, one in found["by_kind"].items())]
    rows = [(words(kind), one["n"], one["baseline"], charts.share(one["baseline"], one["n"]), one["run"],
             charts.share(one["run"], one["n"]), one["wins"], one["losses"], f"{one['p']:.3g}")
            for kind, one in kinds]  # fmt: skip
    heads = ("kind", "items", baseline, "", name, "", "won", "lost", "McNemar p")
    out = "<h3>Items without any failure</h3>\n" + table(heads, rows)
    agreed = found["triggers"]
    ends = "" if agreed["ci95"] is None else f" ({agreed['ci95'][0]:.4f} to {agreed['ci95'][1]:.4f})"
    out += (f"<h3>Whether a tool is called at all</h3>\n<p>F1 {_rate(agreed['f1'])}{ends}: both {agreed['both']}, "
            f"only {text(baseline)} {agreed['baseline_only']}, only {text(name)} {agreed['run_only']}, neither "
            f"{agreed['neither']}.</p>\n")  # fmt: skip
    for metric in _PER_KIND:
        of_kind = {kind: one["metrics"][metric] for kind, one in found["by_kind"].items() if metric in one["metrics"]}
        if of_kind:
            reach = _reach(of_kind.values())
            shown = [_row(words(kind), one, reach) for kind, one in of_kind.items()]
            out += (f"<details><summary>{text(words(metric))} by kind</summary>\n"
                    f"{table(('kind', *_heads((baseline, name))), shown)}</details>\n")  # fmt: skip
    return out


def _lost(items: Sequence[str], before: Played, after: Played, name: str, number: int, room: int) -> str:
    """The episodes that the baseline has without failure and the run has not: the run's, with the baseline's answer."""
    if not items:
        return "<p>Nowhere.</p>\n"
    out, shown = "", 0
    for item in items:
        made = episode_html(after.episodes[item], after.scores[item].failures, anchor=f"c{number}-{shown}")
        told = (f"<details><summary>{text(item, 80)}: what the baseline answered</summary><pre>"
                f"{text(before.episodes[item].final, 4_000)}</pre></details>\n")  # fmt: skip
        room -= len((made + told).encode())
        if room <= 0:
            break
        out, shown = out + made + told, shown + 1
    return out + more(len(items), shown)


def _reach(found: Any) -> float:
    """The least of 0.1, 0.2, 0.5 and 1 that holds every interval."""
    widest = max((abs(end) for one in found for end in one["ci95"] or ()), default=0.0)
    return next(reach for reach in (0.1, 0.2, 0.5, 1.0) if widest <= reach or reach == 1.0)


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.4f}"


def _signed(number: Any) -> str:
    return "" if number is None else f"{number:+.4f}" if isinstance(number, (int, float)) else str(number)
