"""The scripted teacher: right calls, answers out of the results, and nothing of what students are evaluated on."""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from distill import chat
from distill.data import records as kd
from distill.data.atoms import atoms_of, integrations
from distill.data.prompts import tool_requests as requests
from distill.data.rules.block import Options
from distill.data.scripted import make, several
from distill.data.scripted.gold import GOLD
from distill.data.scripted.plain import CONTROLS
from distill.data.scripted.said import LANGUAGES, Said, Unclear
from distill.data.validate import validate
from distill.errors import InputError
from distill.evaluate.contextual.make import overlaps, scenarios
from distill.tokenizer import toy_tokenizer
from distill.tools import arguments_problem

DAY = datetime.timedelta(days=1)
ISO = re.compile(r"\d{4}-\d{2}-\d{2}")


@pytest.fixture(scope="module")
def made() -> list[kd.Record]:
    return make.build(1500)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scripted") / "tools.jsonl"
    make.write(path, 200, tokenizer=toy_tokenizer())
    return path


def test_equal_arguments_give_equal_bytes(path: Path, tmp_path: Path) -> None:
    again = tmp_path / path.name
    make.write(again, 200, tokenizer=toy_tokenizer())
    assert again.read_bytes() == path.read_bytes()
    for name in ("header.json", "report.json"):
        assert (kd.sidecar(again) / name).read_bytes() == (kd.sidecar(path) / name).read_bytes()
    assert [record.id for record in make.build(200, 1)] != [record.id for record in make.build(200, 0)]


def test_every_rule_of_a_dataset_holds(path: Path) -> None:
    report = validate(path, Options("all", "report", (), 1))
    assert not report.findings or {finding.rule for finding in report.findings} <= {"outliers", "personal_data"}
    skipped = {name for name, gate in report.gates.items() if gate.status.upper() != "PASS"}
    assert skipped == {"distributions", "contamination", "journal", "order", "costs"}


def test_a_header_that_another_script_would_write_is_found(path: Path) -> None:
    from distill.data.rules.header import header_problems

    header = kd.read_header(path)
    assert not list(header_problems(header, toy_tokenizer()))
    for change in ({"config": header.config | {"n": 0}}, {"config": header.config | {"n": 201}},
                   {"sampling": {"decoding": "argmax"}}):  # fmt: skip
        assert list(header_problems(msgspec.structs.replace(header, **change), toy_tokenizer()))


def test_the_strata_have_their_shares(made: list[kd.Record]) -> None:
    counts = Counter(record.stratum for record in made)
    assert counts == {"tool_single": 675, "tool_parallel": 225, "tool_chain": 150, "tool_error": 150,
                      "tool_control": 120, "tool_decline": 90, "tool_clarify": 90}  # fmt: skip
    assert 0.05 < sum(record.split == "val" for record in made) / len(made) < 0.15
    assert len({record.prompt for record in made}) == len(made)
    with pytest.raises(InputError, match="--n 0"):
        make.build(0)


def test_the_tables_name_phrases_that_there_are() -> None:
    assert GOLD.keys() < {text for texts in requests.REQUESTS.values() for text in texts}
    assert several.SAME.keys() == {case.text for case in requests.SAME}
    assert several.CHAINS.keys() < {case.text for case in requests.CHAINS}
    assert CONTROLS.keys() == {case.text for case in requests.CONTROLS}
    assert all(make.PHRASES.values())  # every tool can be asked for


def test_every_call_fits_its_schema_and_only_the_teacher_is_learned(made: list[kd.Record]) -> None:
    called = Counter()
    for record in made:
        offered = {tool["function"]["name"]: tool["function"] for tool in record.tools}
        assert record.learned == tuple(i for i, turn in enumerate(record.messages) if turn.role == "assistant")
        for turn in record.messages:
            for call in turn.tool_calls:
                assert arguments_problem(call, offered[call.name]) is None
                called[call.name] += 1
    assert len(called) == 34


def test_answers_take_up_what_the_results_hold(made: list[kd.Record]) -> None:
    answers = 0
    for record in made:
        results = [(n, turn) for n, turn in enumerate(record.messages) if turn.role == "tool"]
        good = [(n, turn) for n, turn in results if "error" not in json.loads(turn.content)]
        told = results if "I could not" in record.messages[-1].content else good  # an error's message is a value
        atoms = [atom for n, turn in told for atom in atoms_of(turn, n)]
        if not atoms:
            continue
        assert integrations(record.messages[-1].content, atoms), record.messages
        answers += 1
    assert answers > 1000


def test_numbers_of_an_answer_come_from_the_request_or_a_result(made: list[kd.Record]) -> None:
    for record in made:
        known = " ".join(turn.content for turn in record.messages[:-1])
        counts = {str(n) for n in range(10)}  # stops of a flight
        for number in re.findall(r"\d+(?:\.\d+)?", record.messages[-1].content):
            assert number in known or number in counts, (number, record.messages)


def test_what_failed_once_is_called_again_and_what_lasts_is_told(made: list[kd.Record]) -> None:
    kinds = Counter()
    for record in made:
        if record.stratum != "tool_error":
            continue
        calls = [turn.tool_calls for turn in record.messages if turn.tool_calls]
        first = json.loads(next(turn for turn in record.messages if turn.role == "tool").content)["error"]
        if len(calls) == 2:
            assert [chat.call_text(c) for c in calls[0]] == [chat.call_text(c) for c in calls[1]]
            kinds["again"] += 1
        else:
            assert first["message"] in record.messages[-1].content
            kinds["told"] += 1
    assert min(kinds["again"], kinds["told"]) > 40


def test_nothing_is_called_where_no_tool_helps(made: list[kd.Record]) -> None:
    for record in made:
        wanted = record.stratum in ("tool_control", "tool_decline", "tool_clarify")
        assert any(turn.tool_calls for turn in record.messages) != wanted
        assert "{" not in record.messages[-1].content


@pytest.mark.parametrize("when", requests.SLOTS["when"])
def test_words_for_days_are_the_days_that_a_calendar_gives(when: str) -> None:
    """Walking day by day, in place of arithmetic on weekdays."""
    names = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    understood = 0
    for start in range(7):
        today = datetime.date(2026, 12, 28) + start * DAY  # across the end of a year
        said = Said(today, {"when": [when]})
        week = [today + n * DAY for n in range(15)]
        name = when.split()[-1]
        if when in ("today", "tonight"):
            expected = [today]
        elif when in ("tomorrow", "the day after tomorrow"):
            expected = [week[1 if when == "tomorrow" else 2]]
        elif when == "this weekend":
            expected = [] if today.strftime("%w") in "06" else [
                day for day in week[:7] if day.strftime("%w") in "06"]  # fmt: skip
        else:
            candidates = [day for day in week[1:] if names[day.weekday()] == name]
            same_week = candidates[0].isocalendar()[:2] == today.isocalendar()[:2]
            unclear = same_week if when.startswith("next") else names[today.weekday()] == name
            expected = [] if unclear else candidates[:1]
        if expected:
            assert said.days() == (str(expected[0]), str(expected[-1]))
            understood += 1
        else:
            with pytest.raises(Unclear):
                said.days()
    assert understood >= 1


def test_written_dates_are_resolved_as_the_library_reads_them() -> None:
    for n in range(0, 800, 7):
        day = datetime.date(2026, 1, 1) + n * DAY
        said = Said(day, {"date": [f"{day.day} {day.strftime('%B %Y')}"]})
        assert said.date() == datetime.datetime.strptime(said("date"), "%d %B %Y").date().isoformat()


def test_every_word_of_a_vocabulary_is_understood() -> None:
    for language in requests.SLOTS["language"]:
        assert language in LANGUAGES
    for lengths in requests.SLOTS["lengths"]:
        assert len(set(Said(datetime.date(2026, 1, 1), {"lengths": [lengths]}).units())) == 2


def test_nothing_that_students_are_evaluated_on_is_in_it(path: Path) -> None:
    assert overlaps((one.item for one in scenarios()), [path])
