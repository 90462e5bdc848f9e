"""report.html: the numbers of report.json, hostile texts inert, never large, the same bytes each time."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distill.data import records as kd
from distill.data import toy
from distill.data.page import page
from distill.data.schema import Call, Turn, turn_text
from distill.data.tally import Lengths, Tally
from tests.unit import kd_sets

HOSTILE = (
    "</pre><script>alert(1)</script><img src=x onerror=alert(2)>'\"><svg onload=a()>$body ${title} &lt;b&gt; <!-- ]]>"
)
TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "table", "tr", "th", "td", "p", "br", "span",
    "bdi", "figure", "svg", "rect", "text", "figcaption", "details", "summary", "div", "pre",
}  # fmt: skip


class Reader(HTMLParser):
    """The tags, attributes and texts of a page, as a browser takes them apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.rows: list[list[str]] = []
        self.said = ""
        self.comments = 0
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
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


def test_a_set_without_prices_says_so_and_where_all_tokens_are_counted(tmp_path: Path) -> None:
    free = Reader(written(tmp_path, "x")).said
    paid = Reader(written(tmp_path, "x", report=lambda: {"cost_usd": 1, "cost_usd_per_record": 1})).said
    assert "No cost: the mix has no prices." in free and "No cost" not in paid and "USD, rejected answers" in paid
    assert all("The tokens of rejected answers are not in this table" in said for said in (free, paid))


def hostile(record: kd.Record, text: str) -> kd.Record:
    """A record that says `text` wherever a teacher, a prompt or a tool can say something."""
    call = Call("get_weather", {text: [text]}, "call_0")
    messages = (
        Turn("system", text), Turn("user", text), Turn("assistant", text, (call,), origin="teacher"),
        Turn("tool", text, origin="broker", tool_call_id="call_0"), Turn("assistant", text, origin="teacher"),
    )  # fmt: skip
    tools = [{"type": "function", "function": {"name": text, "parameters": {}}}]
    return msgspec.structs.replace(
        record, prompt=text, teacher_text=turn_text(messages[-1]), messages=messages, tools=tools, reasoning=text,
        targets=(), render=None, logprobs=None,
    )  # fmt: skip


def written(tmp_path: Path, text: str, many: int = 1, report: Callable[[], dict[str, Any]] = dict) -> str:
    """The page of a dataset in which every text is this one."""
    made = toy.build("tools", many)
    records = [msgspec.structs.replace(hostile(record, text), stratum=f"{text[:2000]}{i}")
               for i, record in enumerate(made.records)]  # fmt: skip
    teacher = msgspec.structs.replace(made.header.teacher, model=text, host=text)
    header = msgspec.structs.replace(made.header, logprobs=None, teacher=teacher, decontamination={text: "0" * 64})
    kd.write_dataset(tmp_path / "h.jsonl", records, header, report=report)
    return (tmp_path / "h.jsonl.d" / "report.html").read_text(encoding="utf-8")


def dropped(text: str, many: int) -> dict[str, Any]:
    drop = {"id": text, "stratum": text, "evidence": text, "text": text, "other": text}
    return {
        "rejected": {text: 1}, "prompts_dropped": {f"{text}{i}": 1 for i in range(many)},
        "left_out": {f"{text}{i}": text for i in range(many)},
        "dropped_examples": [drop | {"reason": f"contaminated{i % 4}"} for i in range(many)],
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", [HOSTILE, "plain\u202egnp.exe\x00\x1b[31m\x85 words", "\U0001f600 \u6f22\u5b57 \u0623"]
)
def test_what_a_teacher_says_is_text_and_nothing_else(tmp_path: Path, text: str) -> None:
    shown = written(tmp_path, text, report=lambda: dropped(text, 3))
    reader = Reader(shown)
    assert reader.tags <= TAGS and not reader.comments
    assert not {name for name in reader.attributes if name.startswith("on") or name in ("src", "href", "style")}
    assert reader.said.count(text if text.isprintable() else "gnp.exe") > 10, "it is there to be read"
    assert not {c for c in shown if not c.isprintable() and c != "\n"}


def test_a_page_forbids_scripts_and_loads_nothing(tmp_path: Path) -> None:
    shown = written(tmp_path, "x")
    assert "default-src 'none'" in shown and "http:" not in shown and "https:" not in shown and "url(" not in shown


@pytest.mark.parametrize("text", ['"' * 20_000, "\U0001f600" * 20_000, "word " * 4_000])
def test_a_page_stays_small_whatever_is_in_the_set(tmp_path: Path, text: str) -> None:
    strata = {f"{text}{i}": {"quota": 9, "records": 1, "rejected": 8, "short": text} for i in range(200)}
    shown = written(tmp_path, text, 7, report=lambda: dropped(text, 200) | {"strata": strata})
    assert len(shown.encode()) < 300_000 and "more are not shown" in shown


def test_a_long_conversation_is_cut_and_says_so(tmp_path: Path) -> None:
    made = toy.build("8-ball", 1)
    turns = [Turn("user" if i % 2 else "assistant", f"turn {i} " + "word " * 300) for i in range(1, 80)]
    said = (*turns, made.records[0].messages[-1])
    header = msgspec.structs.replace(made.header, logprobs=None)
    record = msgspec.structs.replace(made.records[0], messages=said, targets=(), render=None, logprobs=None)
    kd.write_dataset(tmp_path / "l.jsonl", [record], header)
    shown = (tmp_path / "l.jsonl.d" / "report.html").read_text()
    assert "turn 3 " in shown and "turn 40 " not in shown and "more turns are not shown" in shown


def test_its_numbers_are_those_of_the_report(tmp_path: Path) -> None:
    kd_sets.write_set(tmp_path / "e.jsonl", 9)
    folder = tmp_path / "e.jsonl.d"
    report = json.loads((folder / "report.json").read_text())
    rows = Reader((folder / "report.html").read_text()).rows
    values = {row[0]: row[1] for row in rows if len(row) == 2}
    assert {name: values[name.replace("_", " ")] for name in report["counts"]} == {
        name: str(n) for name, n in report["counts"].items()
    }
    strata = {row[0]: row[2] for row in rows if len(row) == 5}
    assert {name: strata[name] for name in report["strata"]} == {
        name: str(found["records"]) for name, found in report["strata"].items()
    }
    spent = {row[0]: row[1:] for row in rows if len(row) == 3}
    for name, found in report["usage"].items():
        assert spent[f"{name} tokens"] == [str(found["sum"]), str(found["per_record"])]
    stored = report["distributions"]
    assert values["bytes"] == str(stored["bytes"]) == str((folder / "logprobs.safetensors").stat().st_size)
    assert values["KL(given || stored), p99, nats"] == str(stored["kl_to_exact"]["p99"])
    records = list(kd.Dataset.open(tmp_path / "e.jsonl"))
    for lengths in report["lengths"].values():
        assert sum(lengths["up_to"].values()) == len(records) == 9
    assert report["usage"]["completion"]["sum"] == sum(r.usage.completion for r in records if r.usage)
    assert report["tool_turns"] == {"1": 9} and {r.learned for r in records} == {(2, 5)}


def test_conversations_with_and_without_calls_are_shown() -> None:
    tally = Tally()
    plain = toy.build("8-ball", 30).records
    calls = [record for record in toy.build("tools", 60).records if record.messages[-1].tool_calls]
    for i, record in enumerate([*plain, *calls]):
        tally.add(msgspec.structs.replace(record, stratum=f"s{i % 20}"))
    assert [bool(r.messages[-1].tool_calls) for r in tally.samples] == [True] * 6 + [False] * 6
    assert len({r.stratum for r in tally.samples[:6]}) == len({r.stratum for r in tally.samples[6:]}) == 6


def test_conversations_are_readable_turn_by_turn(tmp_path: Path) -> None:
    kd_sets.write_set(tmp_path / "e.jsonl", 2)
    first = kd.Dataset.open(tmp_path / "e.jsonl")[0]
    said = Reader((tmp_path / "e.jsonl.d" / "report.html").read_text()).said
    places = [said.index(turn.content) for turn in first.messages if turn.content]
    assert places == sorted(places) and all(call.name in said for turn in first.messages for call in turn.tool_calls)
    assert first.reasoning is None or first.reasoning in said


def test_a_page_is_a_function_of_what_it_is_given(tmp_path: Path) -> None:
    toy.write(tmp_path / "a.jsonl", "tools", 8)
    header, facts = kd.read_header(tmp_path / "a.jsonl"), json.loads((tmp_path / "a.jsonl.d/report.json").read_text())
    samples = [next(iter(kd.Dataset.open(tmp_path / "a.jsonl")))]
    assert page(header, facts, samples) == page(header, facts, samples)
    assert header.files["report.html"] and html.escape(samples[0].prompt) in page(header, facts, samples)


def test_lengths_are_counted_by_powers_of_two() -> None:
    lengths = Lengths()
    assert lengths.facts() == {}
    for n in (0, 1, 2, 3, 4, 5, 100):
        lengths.add(n)
    found = lengths.facts()
    assert found["up_to"] == {"1": 2, "2": 1, "4": 2, "8": 1, "16": 0, "32": 0, "64": 0, "128": 1}
    assert (found["mean"], found["max"]) == (round(115 / 7, 1), 100)
