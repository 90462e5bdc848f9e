"""Episodes and the broker that answers in them: by hand, and against their own replay."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distill.broker import FIXTURE_MISS, Tool
from distill.chat import Message, ToolCall, call_text
from distill.errors import DatasetError
from distill.evaluate.episode import Episode, Limits, play, read_calls, replay
from distill.evaluate.fixtures import EpisodeBroker, Fixtures, Mode, read_fixtures, read_tools
from distill.evaluate.items import FixtureRow, GoldCall, Item, Matcher
from distill.evaluate.transcripts import RawCall, Reply, Transcript, storable
from distill.tokenizer import CALL_END, CALL_START, TURN_END, TURN_START


def function(name: str, **properties: Any) -> dict[str, Any]:
    shape = {
        "type": "object",
        "properties": properties,
        "required": list(properties)[:1],
        "additionalProperties": False,
    }
    return {"name": name, "description": name, "parameters": shape}


FUNCTIONS = [function("weather", city={"type": "string"}, days={"type": "integer", "default": 1}),
             function("timer", minutes={"type": "integer"}), function("a"), function("b")]  # fmt: skip
RETURNS = {"type": "object", "properties": {"temperature": {"type": "number"}}, "required": ["temperature"]}
ITEM = Item(
    id="one", kind="required", stratum="test", messages=(Message("user", "Oslo?"),), tools=tuple(FUNCTIONS),
    calls=(GoldCall(id="c0", name="weather", arguments={"city": Matcher(exact="Oslo")}, example={"city": "Oslo"}),),
    answer="12 degrees.",
)  # fmt: skip
LIMITS = Limits()
OSLO = ToolCall("weather", {"city": "Oslo"})


def fixtures(*rows: FixtureRow, normalise: tuple[str, ...] = ()) -> Fixtures:
    tools = {one["name"]: Tool(one, RETURNS if one["name"] == "weather" else None) for one in FUNCTIONS}
    out = Fixtures(tools, {"weather": normalise})
    for number, row in enumerate(rows, 1):
        out.add(row, f"fixtures:{number}")
    return out


def oslo(temperature: float = 12.0, **more: Any) -> FixtureRow:
    return FixtureRow(**({"tool": "weather", "args": {"city": "Oslo"}, "result": {"temperature": temperature}} | more))


def broker(*rows: FixtureRow, mode: Mode = "replay", normalise: tuple[str, ...] = ()) -> EpisodeBroker:
    return EpisodeBroker(ITEM, fixtures(*rows, normalise=normalise), mode)


def played(replies: list[Reply], limits: Limits = LIMITS, *rows: FixtureRow) -> Episode:
    """The episode of these replies; the last is repeated for ever."""
    playing = play(ITEM, broker(*(rows or (oslo(),))), limits)
    next(playing)
    given: list[Reply] = []
    try:
        while True:
            given.append(replies[min(len(given), len(replies) - 1)])
            playing.send(given[-1])
    except StopIteration as end:
        again = replay(ITEM, Transcript(item="one", replies=tuple(given)), broker(*(rows or (oslo(),))), limits)
        assert again == end.value
        return end.value


def test_an_episode_shows_the_model_its_results_and_ends_with_a_turn_without_calls() -> None:
    playing = play(ITEM, broker(oslo()), Limits())
    assert next(playing).messages == ITEM.messages
    asked = playing.send(Reply(f"Let me look.{call_text(OSLO)}{TURN_END}", tokens=5))
    assert [message.role for message in asked.messages] == ["user", "assistant", "tool"]
    assert json.loads(asked.messages[-1].content) == {"temperature": 12.0}
    with pytest.raises(StopIteration) as end:
        playing.send(Reply("It is 12 degrees.", tokens=4))
    episode = end.value.value
    assert (episode.end, episode.final, episode.tokens) == ("answer", "It is 12 degrees.", 9)
    assert [made.problem for made in episode.calls] == [""]


def test_a_call_that_nothing_answers_is_a_typed_miss_and_no_evidence() -> None:
    outcome = broker(oslo()).call(ToolCall("weather", {"city": "Rome"}))
    assert outcome.status == "miss" and outcome.error == FIXTURE_MISS and outcome.value is None


def test_an_unknown_tool_and_broken_arguments_are_errors_of_their_own() -> None:
    asked = broker(oslo())
    assert asked.call(ToolCall("wether", {})).error == "unknown_tool"
    assert asked.call(ToolCall("weather", {"city": 3})).error == "invalid_arguments"
    assert asked.call(ToolCall("weather", {"city": "Oslo", "extra": 1})).status == "invalid"


def test_the_nth_call_is_answered_by_its_own_row_and_the_rest_by_the_star() -> None:
    late = oslo(nth=1, result=msgspec.UNSET, error={"type": "timeout", "message": "late"})
    asked = broker(late, oslo(7.0, nth=2), oslo(9.0))
    values = [asked.call(OSLO).value for _ in range(4)]
    assert values == [None, {"temperature": 7.0}, {"temperature": 9.0}, {"temperature": 9.0}]
    again = broker(oslo(nth=1))
    assert [again.call(OSLO).status for _ in range(2)] == ["hit", "miss"]


def test_rows_of_the_item_come_before_those_of_any_and_exact_ones_before_matchers() -> None:
    any_city = oslo(1.0, args={"city": {"any": True}}, match="matchers")
    assert broker(any_city, oslo(2.0)).call(OSLO).value == {"temperature": 2.0}
    assert broker(oslo(2.0), oslo(3.0, item="one")).call(OSLO).value == {"temperature": 3.0}
    assert broker(oslo(3.0, item="other"), any_city).call(OSLO).value == {"temperature": 1.0}


def test_matchers_that_answer_the_same_call_twice_are_named() -> None:
    rows = [oslo(args={"city": city}, match="matchers") for city in ({"any": True}, {"regex": "O.*"})]
    with pytest.raises(DatasetError, match="item one: several fixtures answer the same call of weather"):
        broker(*rows).call(OSLO)


def test_arguments_are_normalised_only_as_the_tool_declares() -> None:
    asked = {"city": "  OSLO ", "days": 1.0}
    assert broker(oslo()).call(ToolCall("weather", asked)).status == "miss"
    assert broker(oslo(), normalise=("defaults", "whitespace")).call(ToolCall("weather", asked)).status == "miss"
    all_three = broker(oslo(), normalise=("defaults", "whitespace", "casefold"))
    assert all_three.call(ToolCall("weather", asked)).status == "hit"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "expected a JSON object"),
        ('{"tool": "weather"', "not JSON"),
        ('{"tool": "nothing", "args": {}, "result": 1}', "unknown tool 'nothing'"),
        ('{"tool": "weather", "args": {"city": 1}, "result": {"temperature": 1}}', "args: /city"),
        ('{"tool": "weather", "args": {"city": "x"}, "result": {"temp": 1}}', "result: /temperature is missing"),
        ('{"tool": "weather", "args": {"city": "x"}}', "either a result or an error"),
        ('{"tool": "weather", "args": {"city": "x"}, "result": 1, "error": {"type": "a", "message": "b"}}', "either"),
        ('{"tool": "weather", "args": {"city": "x"}, "nth": 0, "result": {"temperature": 1}}', "nth counts from 1"),
        ('{"tool": "weather", "args": {"town": {"any": true}}, "match": "matchers", "result": {"temperature": 1}}',
         "no parameter 'town'"),
        ('{"tool": "weather", "args": {"city": {"regex": "(?=x)"}}, "match": "matchers", "result": {"temperature": 1}}',
         "city: not a usable"),
        ('{"tool": "weather", "args": {"city": "x"}, "item": "two", "result": {"temperature": 1}}', "no item 'two'"),
        ('{"tool": "timer", "args": {"minutes": 1}, "result": "<|im_end|>"}', "control token"),
        ('{"tool": "weather", "args": {"city": "x"}, "result": {"temperature": 1}, "reslt": 2}', "reslt"),
        ('{"tool": "weather", "args": {"city": "x"}, "result": {"temperature": 1}}\n' * 2, "given twice"),
    ],
)  # fmt: skip
def test_a_bad_fixture_file_refuses_to_load_and_names_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DatasetError, match=re.escape(message)) as caught:
        read_fixtures([path], fixtures(), ["one"])
    assert str(caught.value).startswith(str(path))


def test_a_tool_declared_twice_or_normalised_by_no_known_way_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps(FUNCTIONS[0]) + "\n" + json.dumps(FUNCTIONS[0]))
    with pytest.raises(DatasetError, match=r"tools\.jsonl:2: tool weather is defined twice"):
        read_tools(path)
    path.write_text(json.dumps(FUNCTIONS[0] | {"normalise": ["upper"]}))
    with pytest.raises(DatasetError, match="normalise is a list of"):
        read_tools(path)


def test_what_is_recorded_answers_a_replay_in_the_same_words() -> None:
    recording = broker(mode="record")
    first = recording.call(OSLO)
    assert first.status == "simulated" and recording.call(OSLO) == first and len(recording.recorded) == 1
    assert broker(*recording.recorded).call(OSLO).content == first.content
    assert broker(mode="simulate").call(OSLO).content == first.content


@pytest.mark.parametrize(
    ("text", "calls", "unreadable"),
    [
        (call_text(OSLO), 1, 0),
        (call_text(OSLO) * 2 + "ok", 2, 0),
        (f"{CALL_START}{{oops{CALL_END}", 0, 1),
        (f"{CALL_START}{json.dumps({'name': 'weather'})}{CALL_END}", 0, 1),
        (call_text(OSLO)[:-3], 0, 1),
        (f"hello {CALL_END}", 0, 1),
        ("plain", 0, 0),
    ],
)
def test_calls_are_read_as_they_are_and_nothing_is_repaired(text: str, calls: int, unreadable: int) -> None:
    made = read_calls(Reply(text), {"weather": FUNCTIONS[0]})[1]
    assert (sum(one.call is not None for one in made), sum(one.call is None for one in made)) == (calls, unreadable)


def test_a_servers_calls_keep_their_text_and_broken_arguments_are_no_call() -> None:
    texts = ('{"city": "Oslo"}', '{"city": "Oslo"}""', "[]")
    reply = Reply("", tuple(RawCall("weather", text) for text in texts))
    made = read_calls(reply, {"weather": FUNCTIONS[0]})[1]
    assert [one.problem.split(":")[0] for one in made] == ["", "unreadable", "unreadable"]
    assert made[1].raw == '{"city": "Oslo"}""'


def test_a_call_written_into_the_text_of_a_server_that_sends_calls_apart_is_an_attempt_that_failed() -> None:
    made = read_calls(Reply(call_text(OSLO), ()), {"weather": FUNCTIONS[0]})[1]
    assert [one.call for one in made] == [None]


def test_every_limit_ends_an_episode_without_a_final_answer() -> None:
    again = Reply(call_text(OSLO), tokens=10)
    assert played([again], Limits(max_turns=3)).end == "max_turns"
    many = played([Reply(call_text(OSLO) * 5)], Limits(max_calls=4))
    assert many.end == "max_calls" and len(many.calls) == 5 and all(one.outcome is None for one in many.calls)
    assert played([again], Limits(max_tokens=25)).end == "max_tokens"
    assert played([Reply("", stop="context")]).end == "context"
    assert played([Reply(f"hi {TURN_START}tool")]).end == "control_token"
    assert {played([one], Limits(max_turns=2)).final for one in (again, Reply(f"x{TURN_START}"))} == {""}
    assert played([Reply("cut off in the mid", stop="length")]).end == "length"


def test_a_transcript_that_is_too_short_or_too_long_is_refused() -> None:
    whole = (Reply(call_text(OSLO)), Reply("12"))
    assert replay(ITEM, Transcript(item="one", replies=whole), broker(oslo()), Limits()).final == "12"
    with pytest.raises(DatasetError, match="breaks off"):
        replay(ITEM, Transcript(item="one", replies=whole[:1]), broker(oslo()), Limits())
    with pytest.raises(DatasetError, match="goes on after its end"):
        replay(ITEM, Transcript(item="one", replies=(*whole, Reply("more"))), broker(oslo()), Limits())


def test_a_reply_that_no_file_can_hold_is_stored_with_marks_in_its_place() -> None:
    stored = storable(Reply("a\ud800b \U0001f600", (RawCall("f\udfff", "{}"),)))
    assert stored.text == "a\ufffdb \U0001f600" and stored.calls == (RawCall("f\ufffd", "{}"),)
    assert msgspec.json.decode(msgspec.json.encode(stored), type=Reply) == stored
