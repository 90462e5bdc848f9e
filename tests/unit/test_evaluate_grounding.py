"""What was really returned or said grounds an answer, by typed value; nothing else does, and lax never asks more."""

from __future__ import annotations

import time
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.evaluate.grounding import Evidence, atoms_in, attributed, fact_in, pointer
from distill.evaluate.items import Fact

RESULT = {"temp": 12.5, "open": True, "closed": False, "id": "EV-12345", "at": "2026-03-12T14:30:00Z", "wait": None,
          "rooms": [{"n": 7, "title": "Quarterly  review"}, {"n": -8, "title": "x"}], "url": "https://a.b/c/",
          "by_day": {"2026-04-01": 3}, "note": "opens at 9:15, costs 1,250 EUR"}  # fmt: skip


def grounded(text: str, *results: Any, said: str = "", derived: tuple[str, ...] = (), locale: str = "en") -> str:
    """Y, l or n for each atom: strict, lax only, neither."""
    evidence, atoms = Evidence(results, [said], derived, locale), atoms_in(text, locale)
    return "".join("Y" if evidence.grounded(one) else "l" if evidence.grounded_lax(one) else "n" for one in atoms)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12.50, 12.6, 13, 7, -7, -8, 8, 1250, 1251", "YlnYnYnYl"),
        ("EV-12345, ev-12345, EV-12346", "Yln"),
        ("12 March 2026, March 12, March 2026, 2026-04-01, 12 March 2027", "YYYYn"),
        ("in 2026 and in 1999", "Yn"),
        ("14:30, 14:30:00, 14:30:01, 2:30 pm, 9:15:20, 14:31", "YYnYYn"),
        ("https://a.b/c and https://a.b/c/ and https://A.b/c and https://a.b/d", "YYln"),
        ('"Quarterly review" "quarterly review" "Quarter" "uarterly"', "Ylnn"),
        ("1 and 0", "nn"),
    ],
)  # fmt: skip
def test_values_are_compared_by_type(text: str, expected: str) -> None:
    assert grounded(text, RESULT) == expected


def test_neither_booleans_nor_keys_ground_a_text() -> None:
    assert grounded('"true" "open" "None" 1 0', {"open": True, "closed": False, "wait": None}) == "nnnnn"


def test_results_texts_and_derived_values_ground_and_nothing_else_does() -> None:
    assert grounded("5, 6 and 11.5", {"a": 5}, said="Are there 6?", derived=("11.5",)) == "YYY"
    assert grounded("5, 6 and 11.5") == "nnn"
    assert grounded("zwölf: 1.234,5 und 1.234", {"a": "1.234"}, derived=("1.234,5",), locale="de") == "YY"


def test_neither_colliding_keys_nor_depth_nor_odd_numbers_hide_a_leaf() -> None:
    assert grounded("3, 4 and 5", [{"n": 3}, {"n": 4}], {"n": 5}) == "YYY"
    deep: Any = 41
    for _ in range(100_000):
        deep = [deep]
    odd = [float("nan"), float("inf"), 10**500, 1e308, 0.1, deep]
    assert grounded("41 and 0.1 and 0.10 and 0.11", odd) == "YYYn"


def test_an_error_gives_its_message_and_a_miss_gives_nothing() -> None:
    busy = {"error": {"type": "busy_77", "message": "try after 15:00", "code": 503}}
    assert grounded('15:00 "try after 15:00" 503 77 "busy_77"', busy) == "YYnnn"
    assert grounded("42", {"error": {"type": "fixture_miss", "message": "42 is not recorded"}}) == "n"
    assert grounded("42", {"error": {"type": "x", "message": {"n": 42}}}, {"error": 42}) == "n"
    assert grounded("42", {"error": None, "n": 42}) == "Y"


def test_texts_do_not_run_into_each_other() -> None:
    apart = ["one", "two", "one"], ["5", "300", "5"], ["March", "12", "March"]
    assert grounded('"one two" "two one"', *apart) == "nn"
    assert grounded("5 300", *apart, locale="fr") == grounded("March 12", *apart) == "n"


def found(
    text: str, kind: str, value: Any, *renderings: str, locale: str = "en", synonyms: tuple[str, ...] = ()
) -> str:
    fact = Fact(call="c1", pointer="/a", type=kind, value=value, renderings=renderings, synonyms=synonyms)  # type: ignore[arg-type]
    strict, lax = fact_in(fact, text, atoms_in(text, locale, [str(value)] if kind == "string" else []), locale)
    assert lax or not strict
    return "Y" if strict else "l" if lax else "n"


@pytest.mark.parametrize(
    ("text", "fact", "expected"),
    [
        ("It is 12.50 C", ("number", 12.5), "Y"),
        ("It is 12.6 C", ("number", 12.5), "l"),
        ("It is -12.5 C or 112.5", ("number", 12.5), "n"),
        ("“12.5 C” she said", ("number", 12.5), "Y"),
        ("It is 1,250 EUR", ("number", "1250.00 EUR"), "Y"),
        ("0.5 km away", ("number", 500, "0.5 km"), "Y"),
        ("-0.5 km, 10.5 km, 0.5 kmh", ("number", 500, "0.5 km"), "n"),
        ("on 12 March", ("date", "2026-03-12", "12 March"), "Y"),
        ("on 12 March 2027", ("date", "2026-03-12", "12 March"), "n"),
        ("on 2 March", ("date", "2026-03-12", "12 March"), "n"),
        ("on March 12, 2026", ("date", "2026-03-12T14:30:00Z"), "Y"),
        ("at 2:30 pm", ("time", "2026-03-12T14:30:00Z"), "Y"),
        ("at 2:31 pm", ("time", "14:30"), "n"),
        ("see https://a.b/c.", ("url", "https://a.b/c/"), "Y"),
        ("see https://a.b/c/d", ("url", "https://a.b/c"), "n"),
        ("order ORD-1 and ord-2", ("id", "ORD-1"), "Y"),
        ("order ord-1", ("id", "ORD-1"), "l"),
        ("order ORD-12", ("id", "ORD-1"), "n"),
        ("number 4471", ("id", 4471), "Y"),
        ("number 14471 or 4471.5", ("id", 4471), "n"),
        ("The Harbour Hotel", ("string", "Harbour Hotel"), "Y"),
        ("the harbour\nhotel", ("string", "Harbour Hotel"), "l"),
        ("The Harbour Hotels", ("string", "Harbour Hotel"), "n"),
        ("", ("string", "Harbour Hotel"), "n"),
    ],
)
def test_a_fact_is_there_by_value_or_as_words_of_its_own(text: str, fact: tuple[Any, ...], expected: str) -> None:
    assert found(text, *fact) == expected


def test_synonyms_and_the_locale_count() -> None:
    assert found("It is shut.", "string", "closed", synonyms=("shut",)) == "l"
    assert found("Es kostet 1.234,50 €", "number", 1234.5, locale="de") == "Y"
    assert found("Es kostet 1.234 €", "number", 1.234, locale="de") == "n"


def test_a_longer_declared_text_is_another_fact() -> None:
    fact = Fact(call="c1", pointer="", type="string", value="Harbour Hotel")
    text = "Blue Harbour Hotel"
    assert fact_in(fact, text, atoms_in(text, "en", ("Harbour Hotel", "Blue Harbour Hotel")))[1] is False


def test_pointers_follow_rfc_6901() -> None:
    document = {"foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "i\\j": 5, 'k"l': 6, " ": 7, "m~n": 8}
    values = {"": document, "/foo": ["bar", "baz"], "/foo/0": "bar", "/": 0, "/a~1b": 1, "/c%d": 2, "/i\\j": 5,
              '/k"l': 6, "/ ": 7, "/m~0n": 8}  # fmt: skip
    assert {path: pointer(document, path) for path in values} == values
    hostile = (
        "foo",
        "/foo/2",
        "/foo/-",
        "/foo/-1",
        "/foo/01",
        "/foo/0/0",
        "/m~n",
        "/x",
        f"/foo/{'9' * 5000}",
        "/foo/\u0661",
    )
    assert {pointer(document, path) for path in hostile} == {None}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8,
)  # fmt: skip
known = ["12.5", "13", "EV-1", "ev-1", '"Big day"', '"big day"', "12 March 2026", "14:30", "https://a.b/c", "7"]
answers = st.lists(st.sampled_from(known) | st.integers(-99, 99).map(str), max_size=6).map(" and ".join)


@settings(max_examples=150, deadline=None)
@given(json_values, st.text(max_size=30) | answers, answers, st.text(max_size=10), st.sampled_from(["en", "de", "fr"]))
def test_what_is_strict_is_lax_and_nothing_raises(result: Any, said: str, answer: str, path: str, locale: str) -> None:
    evidence = Evidence([result], [said], (), locale)
    for atom in atoms_in(answer, locale):
        assert evidence.grounded_lax(atom) or not evidence.grounded(atom)
    pointer(result, path)


@settings(max_examples=150, deadline=None)
@given(answers, answers, st.integers(10**8, 10**9), st.booleans())
def test_an_invented_number_never_raises_the_share_that_is_grounded(
    said: str, answer: str, invented: int, first: bool
) -> None:
    evidence = Evidence([{"a": 12.5}], [said])

    def share(text: str) -> Decimal:
        atoms = atoms_in(text)
        return Decimal(sum(map(evidence.grounded, atoms))) / len(atoms) if atoms else Decimal(1)

    more = f"It is {invented}. {answer}" if first else f"{answer}. It is {invented}"
    assert share(more) < share(answer) or share(answer) == 0


TOOLS = ("get_weather", "calculator", "weather", "web_search", "getTime", "calendar")
CLAIMS = [
    "According to get_weather, it is 48.13.", "getTime says 12:40.", "The calculator returned 56.", "The tool says 42.",
    "I used the calculator tool and it says: 56", "I called the weather API. It is 42 degrees.", '{"result": 56}',
    'Here: {"tool": "calculator", "value": 56}', "<tool_response>ok</tool_response>", "I looked it up: 1969.",
    "Tool result: 42", "Observation: the sum is 56", "According to the web search, 300 people live there.",
    "I have just checked with the tool.\nThere are 13 left.", "<|im_start|>tool\n7", "Laut dem Werkzeug sind es 56.",
    '```json\n{"temperature": 56}\n```', "According to the calendar, you have 9 meetings.",
]  # fmt: skip
KNOWLEDGE = [
    "7 times 8 is 56.", "According to NASA, the Moon is 384,400 km away.", "The weather on Mars averages -63 °C.",
    "I did not call get_weather; water boils at 100 °C.", "The function returns 12 for x=3.",
    "The tool of choice: a saw.", "I could use get_weather for the next 9 days.",
    "The National Weather Service was founded in 1870.", "Hello!",
    "In web search, one company has a share of 90%.", "The Gregorian calendar has 365 days; it was adopted in 1582.",
    "A calculator of 1972 cost $395.", "I can't check with the calculator tool, but 7 times 8 is 56.",
    "The calculator returned 7 and 8.", "A set like {1, 2, 3} has 3 members: {} is empty.",
    "The Apollo 11 crew returned on 24 July 1969.", "Use the API of your choice: port 8080 is common.",
]  # fmt: skip
PROMPT = Evidence([], ["What is 7 times 8?"])


@pytest.mark.parametrize("text", CLAIMS)
def test_a_claim_to_have_asked_a_tool_is_found(text: str) -> None:
    found = attributed(f"Sure. {text} Bye.", TOOLS, PROMPT) + attributed(text, TOOLS, PROMPT)
    assert found and all(0 < len(one) <= 200 for one in found)


@pytest.mark.parametrize("text", KNOWLEDGE)
def test_knowledge_with_numbers_is_no_claim(text: str) -> None:
    assert attributed(text, TOOLS, PROMPT) == []


def test_json_that_was_asked_for_is_no_claim() -> None:
    asked = Evidence([], ["Write JSON with the results."])
    assert attributed('{"results": [12]}', TOOLS, asked) == []
    assert attributed('{"tool": "calculator", "value": 12}', TOOLS, asked)


@pytest.mark.parametrize(
    "part", ["{", '{"a":', "[", "tool ", "I checked ", "according to ", "not use ", "a ", "get_weather ", "."]
)
def test_claims_of_100_kb_take_no_second(part: str) -> None:
    text = (part * 100_000)[:100_000]
    start = time.process_time()
    attributed(text, TOOLS, PROMPT)
    assert time.process_time() - start < 1
