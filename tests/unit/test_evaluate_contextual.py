"""The contextual set: enough of everything, right in itself, the same for the same seed, disjoint from training."""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill import broker, chat
from distill.chat import ToolCall
from distill.data.prompts import tool_requests
from distill.data.prompts.contamination import ContaminationIndex, evaluation_items
from distill.data.prompts.simulators import PHRASES
from distill.data.prompts.strata import TOOL_STRATA, built_in
from distill.data.prompts.tool_material import BY_NAME, EVENTS, PATHS, PEOPLE, PLACES, SUBJECTS, TITLES
from distill.errors import DatasetError, InputError
from distill.evaluate import sets
from distill.evaluate.contextual import make
from distill.evaluate.contextual.rendering import MONTHS, day_forms, number_forms
from distill.evaluate.contextual.scene import Built
from distill.evaluate.contextual.strata import STRATA
from distill.evaluate.contextual.tools import HELD_OUT, TOOLS
from distill.evaluate.contextual.words import WORDS
from distill.evaluate.episode import Limits, play
from distill.evaluate.fixtures import EpisodeBroker
from distill.evaluate.items import KINDS, USER, Item
from distill.evaluate.matching import arguments_match
from distill.evaluate.policies import oracle, reply
from distill.evaluate.scoring import score


@pytest.fixture(scope="module")
def made() -> list[Built]:
    return make.scenarios(seed=0)


@pytest.fixture(scope="module")
def items(made: list[Built]) -> list[Item]:
    return [one.item for one in made]


@pytest.fixture(scope="module")
def written(made: list[Built], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("contextual") / "set.jsonl"
    make.write(path, made, {"seed": 0, "scale": 1}, {})
    return path


def test_there_are_enough_items_for_every_gate_at_the_strictest_tier(items: list[Item]) -> None:
    kinds = Counter(item.kind for item in items)
    assert set(kinds) == set(KINDS)
    assert 1000 <= len(items) <= 1300
    assert sum(item.integrates for item in items) >= 240
    assert kinds["canary"] >= 220 and kinds["control"] >= 130 and kinds["injection"] >= 130
    assert kinds["decline"] + kinds["clarify"] >= 130
    assert sum(any(secret.disclose for secret in item.secrets) for item in items) >= 120
    assert sum(any(USER not in secret.audience for secret in item.secrets) for item in items) >= 220
    assert sum(len(item.calls) for item in items) >= 450


def test_every_check_of_a_set_holds_and_every_gold_call_has_a_fixture(written: Path, items: list[Item]) -> None:
    found = sets.load(written)
    assert found.covered == {(item.id, call.id) for item in items for call in item.calls}
    assert found.header is not None and found.header.files == found.sha256s
    assert found.header.template_sha256 == chat.template_sha256()
    assert {tool.name for tool in broker.read_tools(written.with_name("set.jsonl.d") / "tools.jsonl")} == set(TOOLS)


def oracle_failures(path: Path) -> list[tuple[str, str]]:
    """Items on which the oracle is not right in everything."""
    found = sets.load(path)
    out = []
    for item in found.items:
        playing = play(item, EpisodeBroker(item, found.fixtures), Limits())
        request = next(playing)
        try:
            while True:
                request = playing.send(reply(oracle, item, request.messages, len(request.replies)))
        except StopIteration as end:
            scored = score(end.value, found.covered)
        if scored.failures or (scored.strict is not None and scored.strict.f1 != 1):
            out.append((item.id, item.answer))
    return out


def test_the_oracle_says_every_fact_and_claims_nothing_else(written: Path) -> None:
    assert oracle_failures(written) == []


def test_an_answer_with_a_number_from_nowhere_is_noticed(made: list[Built], tmp_path: Path) -> None:
    one = next(one for one in made if one.item.kind == "required")
    item = msgspec.structs.replace(one.item, answer=one.item.answer + " That is 31.7 percent more than usual.")
    make.write(tmp_path / "set.jsonl", [Built(item, one.rows)], {"seed": 0, "scale": 1}, {})
    assert oracle_failures(tmp_path / "set.jsonl") == [(item.id, item.answer)]


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_set(written: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again.jsonl", tmp_path / "other.jsonl"
    assert make.main(["--out", str(again)]) == make.main(["--out", str(other), "--seed", "1"]) == 0
    for name in ("header.json", "fixtures.jsonl", "tools.jsonl"):
        same = (written.with_name("set.jsonl.d") / name).read_bytes()
        assert (tmp_path / "again.jsonl.d" / name).read_bytes() == same
    assert again.read_bytes() == written.read_bytes()
    shared = {item["messages"][-1]["content"] for item in map(json.loads, other.read_text().splitlines())}
    shared &= {item["messages"][-1]["content"] for item in map(json.loads, again.read_text().splitlines())}
    assert len(shared) < 0.1 * len(again.read_text().splitlines())


def test_a_larger_scale_holds_the_smaller_set(made: list[Built]) -> None:
    larger = make.scenarios(seed=0, scale=2)
    assert len(larger) == 2 * len(made)
    by_id = {one.item.id: one for one in larger}
    kept = sum(by_id[one.item.id] == one for one in made)
    assert kept >= 0.98 * len(made)  # but where a larger stratum said the same first


@pytest.mark.slow
def test_ten_thousand_items_can_be_made_and_the_oracle_is_right_on_all(tmp_path: Path) -> None:
    large = make.scenarios(seed=0, scale=10)
    make.write(tmp_path / "set.jsonl", large, {"seed": 0, "scale": 10}, {})
    assert oracle_failures(tmp_path / "set.jsonl") == []
    prompts = [one.item.messages[1:] for one in large]
    assert len(large) > 10_000 and len(set(map(str, prompts))) == len(prompts)


@pytest.mark.parametrize("scale", [0, -1, make.LARGEST_SCALE + 1])
def test_a_scale_that_there_is_not_is_refused(scale: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make.main(["--out", str(tmp_path / "set.jsonl"), "--scale", str(scale)]) == 2
    assert f"--scale {scale}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- disjoint ---------------------------------------------------------------------------------------------


def test_no_word_of_the_scenarios_is_material_of_training_prompts() -> None:
    theirs = {value.casefold() for values in tool_requests.SLOTS.values() if not callable(values) for value in values}
    for values in (PEOPLE, PLACES, EVENTS, SUBJECTS, TITLES, PATHS, tuple(PHRASES)):
        theirs |= {value.casefold() for value in values}
    theirs -= {"kitchen", "bedroom", "office"}
    assert {word for words in WORDS.values() for word in words if word.casefold() in theirs} == set()
    phrases = [phrase for phrases in tool_requests.REQUESTS.values() for phrase in phrases]
    assert {word for word in itertools.chain(*WORDS.values()) if any(word in phrase for phrase in phrases)} == set()


@pytest.fixture(scope="module")
def evaluated(items: list[Item]) -> ContaminationIndex:
    said = ((item.id, message.content) for item in items for message in item.messages if message.role == "user")
    return ContaminationIndex({"contextual": said})


@pytest.mark.parametrize("stratum", TOOL_STRATA)
def test_no_prompt_shares_a_run_of_words_with_those_that_training_draws(
    stratum: str, evaluated: ContaminationIndex
) -> None:
    drawn = itertools.islice(built_in(stratum, 0, 2000), 2000)
    hits = [(prompt.text, evaluated.hits(prompt.text)) for prompt in drawn]
    assert len(hits) == 2000
    assert [hit for hit in hits if hit[1]] == []


def test_no_tool_of_the_held_out_ones_is_built_in() -> None:
    assert len(HELD_OUT) >= 5
    assert not {tool.name for tool in HELD_OUT} & set(BY_NAME)


def test_an_item_that_is_in_a_training_set_is_refused_and_nothing_is_written(
    items: list[Item], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a prompt of its own, told in other words around it."""
    item = next(item for item in items if len(item.prompt.split()) > 20)
    train = tmp_path / "kd.jsonl"
    train.write_text(json.dumps({"id": "k7", "prompt": f"Hello there. {item.prompt.upper()} Thanks."}) + "\n")
    assert make.main(["--out", str(tmp_path / "out" / "set.jsonl"), "--train", str(train)]) == 2
    error = capsys.readouterr().err
    assert item.id in error and "kd.jsonl, k7" in error
    assert not (tmp_path / "out").exists()


def test_the_header_names_the_training_sets_that_were_held_against_it(tmp_path: Path) -> None:
    from distill.artifacts import sha256_file

    train = tmp_path / "kd.jsonl"
    train.write_text(json.dumps({"id": "k1", "prompt": "Say something about a river that nobody has seen."}) + "\n")
    assert make.main(["--out", str(tmp_path / "set.jsonl"), "--train", str(train)]) == 0
    header = json.loads((tmp_path / "set.jsonl.d" / "header.json").read_text())
    assert header["disjoint_from"] == {"kd.jsonl": sha256_file(train)}


def test_decontamination_of_training_prompts_reads_every_user_turn_of_the_set(written: Path, items: list[Item]) -> None:
    told = {(item.id, message.content) for item in items for message in item.messages if message.role == "user"}
    assert set(evaluation_items(written)) == told
    index = ContaminationIndex.load([written])
    earlier = next(item for item in items if len(item.messages) > 2)
    assert [hit.item for hit in index.hits(earlier.messages[1].content)] == [earlier.id]


# --- written ----------------------------------------------------------------------------------------------


def test_a_set_is_written_as_a_whole_or_not_at_all(made: list[Built], tmp_path: Path) -> None:
    (tmp_path / "set.jsonl.d" / "header.json").mkdir(parents=True)
    with pytest.raises(InputError, match=r"header\.json"):
        make.write(tmp_path / "set.jsonl", made[:5], {"seed": 0, "scale": 1}, {})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_changed_fact_is_noticed_where_the_set_is_read(made: list[Built], tmp_path: Path) -> None:
    one = next(one for one in made if one.item.kind == "required")
    fact = msgspec.structs.replace(one.item.facts[0], value="not this")
    item = msgspec.structs.replace(one.item, facts=(fact,))
    make.write(tmp_path / "set.jsonl", [Built(item, one.rows)], {"seed": 0, "scale": 1}, {})
    with pytest.raises(DatasetError, match="another value"):
        sets.load(tmp_path / "set.jsonl")


# --- right in itself --------------------------------------------------------------------------------------


def test_gold_matchers_take_the_example_and_no_other_value(items: list[Item]) -> None:
    for item in items:
        for call in item.calls:
            assert arguments_match(call.arguments, call.example)
            assert not arguments_match(call.arguments, call.example | {"unheard_of": 1})
            for name, value in call.example.items():
                rest = {key: other for key, other in call.example.items() if key != name}
                assert not arguments_match(call.arguments, rest), (item.id, call.name, name)
                assert not arguments_match(call.arguments, call.example | {name: other_than(value)}), (item.id, name)


def other_than(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value[::-1] + "?"
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, list):
        return [*value, *value]
    assert isinstance(value, dict)
    return {key: other_than(inner) for key, inner in value.items()}


def test_gold_matchers_take_the_same_in_other_forms(items: list[Item]) -> None:
    """A day in ISO 8601's basic form, 5.0 for 5, a list's items in another order."""
    tried: Counter[str] = Counter()
    for call in (call for item in items for call in item.calls):
        for name, matcher in call.arguments.items():
            value = call.example.get(name)
            if matcher.date is not None and len(matcher.date) == 10:
                same: object = matcher.date.replace("-", "")
            elif matcher.num is not None:
                same = float(matcher.num)
            elif matcher.set is not None:
                same = list(reversed(matcher.set))
            else:
                continue
            tried[type(value).__name__] += 1
            assert arguments_match(call.arguments, call.example | {name: same}), (call.name, name)
    assert all(tried[kind] > 10 for kind in ("str", "int", "float", "list"))


def test_what_must_be_said_stands_in_no_message(items: list[Item]) -> None:
    """Or it could be said without asking a tool."""
    for item in items:
        told = " ".join(message.content for message in item.messages)
        forms = [(str(fact.value), *fact.renderings) for fact in item.facts if fact.type != "number"]
        known = sum(any(form in told for form in one) for one in forms)
        assert known == 0 or known < len(item.facts), item.id


def test_every_tool_of_a_call_is_offered_beside_three_others_in_a_drawn_place(items: list[Item]) -> None:
    places: Counter[int] = Counter()
    for item in items:
        names = [tool["name"] for tool in item.tools]
        needed = {call.name for call in item.calls}
        assert needed <= set(names) and len(set(names) - needed) >= 3
        places.update(names.index(name) for name in needed)
    assert all(places[place] > 100 for place in range(4))


def test_chains_pass_on_what_only_an_earlier_result_holds(made: list[Built]) -> None:
    for one in (one for one in made if one.item.stratum in ("chain", "join", "handed_on")):
        told = " ".join(message.content for message in one.item.messages)
        rows = {row.id: row for row in one.rows}
        for call in (call for call in one.item.calls if call.after):
            before = json.dumps([rows[name].result for name in call.after], ensure_ascii=False)
            passed = [v for v in leaves(call.example) if str(v) in before and str(v) not in told]
            passed += [v for v in leaves(call.example) if any(str(w) in str(v) for w in secrets_of(one.item))]
            assert passed, (one.item.id, call.id)


def secrets_of(item: Item) -> list[str]:
    return [secret.value for secret in item.secrets if secret.disclose]


def leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    return [leaf for inner in value for leaf in leaves(inner)] if isinstance(value, list) else [value]


def test_derived_values_follow_from_the_results(made: list[Built]) -> None:
    tried = 0
    for one in (one for one in made if one.item.derived):
        numbers = [Decimal(str(fact.value)) for fact in one.item.facts if fact.type == "number"]
        first, second = numbers[:2]
        wanted = {first + second, abs(first - second)}
        assert {Decimal(form.replace(",", "")) for form in one.item.derived} <= wanted, one.item.id
        tried += 1
    assert tried >= 10


def test_an_error_that_passes_comes_first_and_then_the_result(made: list[Built]) -> None:
    for one in (one for one in made if one.item.stratum == "passing_error"):
        first, second = one.item.calls
        assert (first.name, first.arguments, first.example) == (second.name, second.arguments, second.example)
        assert second.after == (first.id,) and {fact.call for fact in one.item.facts} == {second.id}
        assert [(row.nth, row.error is None) for row in one.rows] == [(1, False), ("*", True)]
    for one in (one for one in made if one.item.stratum == "lasting_error"):
        assert one.item.facts == () and [row.error is None for row in one.rows] == [False]


def test_prompts_fit_a_small_student(made: list[Built]) -> None:
    """At some 3.5 characters a token: 1,500 tokens, and those with a long context two thousand more."""
    for one in made:
        shown = chat.render(one.item.messages, one.item.tools)
        results = sum(len(json.dumps(row.result)) for row in one.rows if row.error is None)
        most = 12_500 if one.item.kind == "long_context" else 5_600
        assert len(shown) + results < most, one.item.id
        if one.item.kind == "long_context":
            assert len(shown) + results > 6_000


def test_long_contexts_hold_what_matters_at_every_depth(made: list[Built]) -> None:
    for one in (one for one in made if one.item.stratum.startswith(("long_page", "long_log"))):
        rows = next(value for value in one.rows[0].result.values() if isinstance(value, list))
        depth = int(one.item.facts[0].pointer.split("/")[2]) / len(rows)
        low, high = {"start": (0, 0.2), "middle": (0.4, 0.6), "end": (0.8, 1)}[one.item.stratum.rpartition("_")[2]]
        assert low <= depth <= high


def test_secrets_stand_where_the_model_reads_them(made: list[Built]) -> None:
    for one in made:
        read = " ".join(message.content for message in one.item.messages)
        read += json.dumps([row.result for row in one.rows if row.error is None], ensure_ascii=False)
        assert all(secret.value in read for secret in one.item.secrets), one.item.id
        if one.item.kind == "injection":
            assert one.item.forbidden_calls or one.item.secrets


# --- rendering --------------------------------------------------------------------------------------------

MARKS = {"en": (",", "."), "de": (".", ","), "es": (".", ","), "it": (".", ","), "fr": ("\u202f\u00a0 ", ",")}


@given(st.sampled_from(sorted(MARKS)), st.integers(-(10**9), 10**9), st.integers(0, 4))
def test_every_form_of_a_number_reads_back_as_that_number(locale: str, digits: int, decimals: int) -> None:
    value = digits / 10**decimals
    thousands, point = MARKS[locale]
    for form in number_forms(value, locale):
        plain = "".join(sign for sign in form if sign not in thousands).replace(point, ".")
        assert Decimal(plain) == Decimal(repr(value))


@given(st.sampled_from(sorted(MONTHS)), st.dates(datetime.date(2000, 1, 1), datetime.date(2099, 12, 31)))
def test_every_form_of_a_day_names_it_and_the_first_says_it_all(locale: str, day: datetime.date) -> None:
    forms = day_forms(day, locale)
    assert str(day.year) in forms[0] and MONTHS[locale][day.month - 1] in forms[0] and str(day.day) in forms[0]
    assert len(set(forms)) == len(forms)
    for form in forms:
        numbers = [int(part) for part in "".join(c if c.isdigit() else " " for c in form).split()]
        assert set(numbers) <= {day.year, day.month, day.day}


def test_arguments_of_foreign_requests_are_json_and_answers_are_not_english(items: list[Item]) -> None:
    foreign = [item for item in items if item.kind == "locale"]
    assert Counter(item.locale for item in foreign) == dict.fromkeys(("de", "fr", "es", "it"), 18)
    comma = [item for item in foreign if any(isinstance(leaf, float) for c in item.calls for leaf in leaves(c.example))]
    assert len(comma) > 10
    for item in comma:
        (value,) = [leaf for call in item.calls for leaf in leaves(call.example) if isinstance(leaf, float)]
        assert number_forms(value, item.locale)[0] in item.prompt


def test_calls_of_one_tool_in_an_item_are_answered_by_one_fixture_each(made: list[Built], written: Path) -> None:
    found = sets.load(written)
    for one in made:
        answers = [found.fixtures.find(one.item.id, ToolCall(call.name, call.example)) for call in one.item.calls]
        same = Counter(map(id, answers))
        assert None not in answers
        assert one.item.stratum == "passing_error" or set(same.values()) <= {1}


def test_every_stratum_uses_all_of_its_templates(items: list[Item]) -> None:
    for name, stratum in STRATA.items():
        mine = [item for item in items if item.stratum == name]
        assert len(mine) == stratum.items and {item.kind for item in mine} == {stratum.kind}
    tools = {call.name for item in items for call in item.calls}
    assert tools >= {tool.name for tool in HELD_OUT} and len(tools) >= 35


# --- documented -------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[2] / "docs/evaluation.md").read_text()


def test_the_card_counts_what_is_there(items: list[Item]) -> None:
    card = PAGE.partition("## The contextual set")[2].partition("### Items of your own")[0]
    counted = {kind: int(n) for kind, n in re.findall(r"^\| (\w+) \| (\d+) \|", card, re.MULTILINE)}
    assert counted == Counter(item.kind for item in items)
    assert f"{len(items):,} items" in card
    disclosing = sum(any(secret.disclose for secret in item.secrets) for item in items)
    assert f"{disclosing} of them also disclose" in card


def test_the_documented_item_and_its_fixture_are_a_set(tmp_path: Path) -> None:
    item, fixture = re.findall(r"^```json\n(.*?)^```$", PAGE.partition("### Items of your own")[2], re.M | re.S)[:2]
    (tmp_path / "own.jsonl.d").mkdir()
    (tmp_path / "own.jsonl").write_text(json.dumps(json.loads(item)) + "\n")
    (tmp_path / "own.jsonl.d" / "fixtures.jsonl").write_text(json.dumps(json.loads(fixture)) + "\n")
    found = sets.load(tmp_path / "own.jsonl")
    assert found.covered == {("own-1", "c1")}
