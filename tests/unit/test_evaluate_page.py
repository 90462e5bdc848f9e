"""The pages of evaluations: the report's numbers, hostile models inert, never large; as a real browser shows them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.chat import ToolCall
from distill.evaluate import compare, page, report
from distill.evaluate.criteria import EvaluationConfig
from distill.evaluate.policies import CHEATS, Position, oracle, say_calls
from distill.evaluate.selftest import self_test
from distill.evaluate.sets import EvaluationSet
from tests.unit.chromium import Browser, browser, needs_chromium
from tests.unit.evaluation_sets import Say, header_of, transcripts, write_run, write_set

HOSTILE = (
    "</pre></code><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">'\">"
    "<svg onload=\"document.title='taken'\"></details><style>body{display:none}</style>"
    f"$body ${{title}} &lt;b&gt; <!-- ]]> {'unbroken' * 40}"
)
BIDI = "in \u202eesrever\u2066 and \x1b[31m\x00 raw"
TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "table", "tr", "th", "td", "p", "br", "span",
    "svg", "rect", "line", "circle", "details", "summary", "div", "pre", "ul", "li", "b", "a", "code", "mark",
}  # fmt: skip


def hostile(at: Position) -> str:
    """Says it in a call's name and arguments, in its text and in its answer."""
    call = ToolCall("parcel_status", {"number": HOSTILE, HOSTILE: BIDI})
    unknown = ToolCall(HOSTILE, {})
    return f"{HOSTILE} 48.13 {say_calls([call, unknown])}" if not at.turn else f"{HOSTILE} {BIDI} 2031-07-19 {HOSTILE}"


def mixed(at: Position) -> str:
    """Right on most items, and badly wrong in many ways on some."""
    place = int(at.item.id[-3:])
    names = sorted(CHEATS)
    return CHEATS[names[place % len(names)]].play(at) if place % 3 == 0 else oracle(at)


class Reader(HTMLParser):
    """The tags, attributes, rows and texts of a page, as a browser takes them apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.links: set[str] = set()
        self.rows: list[list[str]] = []
        self.said, self.comments, self._in_cell = "", 0, False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links |= {value or "" for name, value in attrs if name == "href"}
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.said += data
        if self._in_cell:
            self.rows[-1][-1] += data

    def handle_comment(self, data: str) -> None:
        self.comments += 1


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSet:
    return write_set(tmp_path_factory.mktemp("set") / "set.jsonl", 8)


def made(found: EvaluationSet, say: Say) -> tuple[str, dict[str, Any], report.Played]:
    """The page of a policy's evaluation, its report, and its episodes."""
    header, said = header_of(found), transcripts(found, say)
    played = report.play_back(found, header, said)
    facts = report.build(found, header, said, played, EvaluationConfig(), self_test(found, EvaluationConfig()))
    return page.page(facts, found, played), facts, played


def compared(found: EvaluationSet, folder: Path, *says: Say) -> str:
    """The page of a comparison of policies."""
    files = [str(write_run(folder / f"run{i}.jsonl", found, say)) for i, say in enumerate(says)]
    html = folder / "c.html"
    more = ["--report", str(folder / "c.json"), "--html", str(html), "--margin", "call_f1=0.03"]
    compare.main([*files, "--in", str(found.path), *more])
    return html.read_text(encoding="utf-8")


def test_what_a_model_says_is_text_and_nothing_else(found: EvaluationSet, tmp_path: Path) -> None:
    for shown in (made(found, hostile)[0], compared(found, tmp_path, oracle, hostile)):
        reader = Reader(shown)
        assert reader.tags <= TAGS and not reader.comments
        assert not {name for name in reader.attributes if name.startswith("on") or name in ("src", "style", "action")}
        assert all(link.startswith("#") for link in reader.links)
        assert reader.said.count("<script>document.title='taken'</script>") > 10, "it is there to be read"
        assert not {c for c in shown if not c.isprintable() and c != "\n"}


def test_a_page_forbids_scripts_and_loads_nothing(found: EvaluationSet, tmp_path: Path) -> None:
    for shown in (made(found, mixed)[0], compared(found, tmp_path, oracle, mixed)):
        assert "default-src 'none'" in shown and not re.search("https?:|url\\(|@import|<script|<link", shown)


def test_its_numbers_are_those_of_the_report(found: EvaluationSet) -> None:
    shown, facts, _ = made(found, mixed)
    rows = Reader(shown).rows
    gates = {row[1]: row for row in rows if len(row) == 7}
    for name, gate in facts["gates"].items():
        row = gates[name.replace("_", " ")]
        assert (
            row[0] == gate["status"]
            and row[3] == (gate.get("threshold") or "")
            and row[6] == (gate.get("reason") or "")
        )
        if isinstance(gate.get("observed"), float):
            assert row[2] == f"{gate['observed']:.4f}"
    metrics = {row[0]: row for row in rows if len(row) == 6}
    for name, metric in facts["metrics"].items():
        row = metrics[name.replace("_", " ")]
        assert row[2] == ("" if metric["value"] is None else f"{metric['value']:.4f}") and row[5] == f"{metric['n']:,}"
    kinds = {row[0]: row[2:] for row in rows if len(row) == 7}
    for kind, counts in facts["counts"]["by_kind"].items():
        assert kinds[kind] == [str(counts[name]) for name in ("items", "clean", "tp", "fp", "fn")]
    checks = {row[1]: row for row in rows if len(row) == 6}
    for check in facts["self_test"]:
        word = {"pass": "caught", "fail": "let through", "skipped": "not tried"}[check["status"]]
        assert checks[check["policy"]][0] == (word if check["policy"] != "oracle" else check["status"])
    prints = {row[0]: row[1] for row in rows if len(row) == 2}
    for name, value in facts["header"]["fingerprints"].items():
        assert prints[name.replace("_", " ")] == value


def test_every_failing_episode_is_there_once_and_its_gates_lead_to_it(found: EvaluationSet) -> None:
    shown, _, played = made(found, mixed)
    reader = Reader(shown)
    failing = [one for one in played.scores.values() if one.failures]
    assert sum(name.startswith("e") for name in reader.ids) == len(failing) > 5
    assert len(set(reader.ids)) == len(reader.ids)
    assert {link[1:] for link in reader.links} <= set(reader.ids), "no link leads nowhere"
    assert {f"#gate-{failure.gate}" for one in failing for failure in one.failures} <= reader.links
    for one in failing:
        assert one.item in reader.said


def test_an_episode_can_be_read_turn_by_turn(found: EvaluationSet) -> None:
    """A call with a wrong argument, an answer with a made-up number: each beside what it should have been."""

    def careless(at: Position) -> str:
        if at.item.kind != "required":
            return oracle(at)
        number = at.item.calls[0].example["number"]
        calls = [ToolCall("parcel_status", {"number": number}), ToolCall("parcel_status", {"number": "PK0001"})]
        return f"Let me look. {say_calls(calls)}" if not at.turn else "It weighs 77.125 kg."

    said = Reader(made(found, careless)[0]).said
    first = next(item for item in found.items if item.kind == "required")
    start = said.index(first.prompt)
    number = first.calls[0].example["number"]
    steps = [first.prompt, "Let me look.", "right", "c1", number, "hit", '"weight_kg"', "not a gold call", "PK0001",
             "miss", "fixture_miss", "final answer", "77.125", "missing", "c1/weight_kg",
             "Claims that neither results nor the question give: 77.125", first.answer]  # fmt: skip
    places = []
    for step in steps:
        places.append(said.index(step, places[-1] if places else start))
    assert places == sorted(places) and '<mark class="no">77.125</mark>' in made(found, careless)[0]


def test_a_gold_call_that_was_made_wrongly_stands_beside_the_call(found: EvaluationSet) -> None:
    said = Reader(made(found, CHEATS["wrong-args"].play)[0]).said
    assert "should have been: c1" in said and "Never made: 1 of 1 gold calls." in said


@pytest.mark.parametrize("text", ["word " * 1500, '"' * 6_000, "\U0001f600" * 6_000])
def test_a_page_stays_small_whatever_a_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def long(at: Position) -> str:
        calls = say_calls([ToolCall("send_note", {"to": text, "body": text})] * 3)
        return text + calls if at.turn < 3 else text

    found = write_set(tmp_path / "small.jsonl", 6)
    full = made(found, long)[0]
    assert 200_000 < len(full.encode()) < page.MOST
    monkeypatch.setattr(page, "MOST", 300_000)
    monkeypatch.setattr("distill.evaluate.compare_page.MOST", 300_000)
    for shown in (made(found, long)[0], compared(found, tmp_path, oracle, long)):
        assert len(shown.encode()) < 300_000 and re.search(r"\d+ more are not shown", shown)


def test_those_that_fail_at_most_gates_come_first(found: EvaluationSet) -> None:
    _, _, played = made(found, mixed)
    counts = [[len({f.gate for f in played.scores[item].failures}) for item in items]
              for items in page.by_gate(played).values()]  # fmt: skip
    assert counts and all(row == sorted(row, reverse=True) for row in counts)


def test_a_perfect_run_has_no_failing_episode(found: EvaluationSet) -> None:
    reader = Reader(made(found, oracle)[0])
    assert "Failing episodes\nNone." in reader.said and not [name for name in reader.ids if name.startswith("e")]


def test_a_comparison_shows_its_differences_and_what_was_lost(found: EvaluationSet, tmp_path: Path) -> None:
    reader = Reader(compared(found, tmp_path, oracle, CHEATS["wrong-args"].play, oracle))
    rows = [row for row in reader.rows if len(row) == 8 and row[0] == "call f1"]
    assert [row[2] for row in rows] == ["worse", "no difference shown"] and rows[0][3] == "1.0000"
    assert "Where run1 lost to run0" in reader.said and "Where run2 lost to run0\nNowhere." in reader.said
    assert "what the baseline answered" in reader.said


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as running:
        yield running


@needs_chromium
@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_a_browser_shows_a_page_whole_and_runs_nothing_in_it(
    found: EvaluationSet, tmp_path: Path, chromium: Browser, kind: str
) -> None:
    shown = made(found, hostile)[0] if kind == "report" else compared(found, tmp_path, oracle, hostile)
    file = tmp_path / "page.html"
    file.write_text(shown, encoding="utf-8")
    title = re.search("<title>(.*?)</title>", shown)
    backgrounds = []
    for width, dark in ((1200, False), (400, False), (1200, True)):
        seen = chromium.see(file, width, dark=dark)
        assert seen.complaints == [] and title and seen.title == title[1]
        assert seen.width == width, "it is read without scrolling sideways"
        assert seen.pixels.shape[1] == width and seen.pixels.shape[0] > 2000
        assert ink(seen.pixels) > 0.01 and ink(seen.pixels[:600]) > 0.005, "not blank"
        assert "<script>document.title='taken'</script>" in seen.text, "hostile text is there, as text"
        assert seen.live == []
        backgrounds.append(int(seen.pixels[0, 0].mean()))
    assert backgrounds[0] == backgrounds[1] == 255 and backgrounds[2] < 60, "light and dark"


@needs_chromium
def test_escaping_alone_holds_back_what_is_hostile(found: EvaluationSet, tmp_path: Path, chromium: Browser) -> None:
    """The page without its policy, which stands behind the escaping; and the fault itself, planted, is seen."""
    shown = re.sub("<meta http-equiv.*?>", "", made(found, hostile)[0])
    file = tmp_path / "page.html"
    file.write_text(shown, encoding="utf-8")
    assert chromium.see(file, 800).title != "taken"
    file.write_text(shown.replace("&lt;script&gt;", "<script>").replace("&lt;/script&gt;", "</script>")
                    .replace("&#x27;", "'"), encoding="utf-8")  # fmt: skip
    seen = chromium.see(file, 800)
    assert seen.title == "taken" and "SCRIPT" in seen.live
    wide = shown.replace("<h1>", '<div style="width: 3000px">wide</div><h1>')
    file.write_text(wide, encoding="utf-8")
    assert chromium.see(file, 800).width > 800
    file.write_text(shown.replace("</body>", "<script>console.error('no')</script></body>"), encoding="utf-8")
    assert chromium.see(file, 800).complaints


def ink(pixels: np.ndarray) -> float:
    """The share of pixels that are not the background's."""
    return float((np.abs(pixels.astype(int) - pixels[0, 0].astype(int)).max(2) > 40).mean())
