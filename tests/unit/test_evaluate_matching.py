"""Matching of calls: against every subset tried one by one, and by hand."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.chat import ToolCall
from distill.evaluate.items import GoldCall, Matcher
from distill.evaluate.matching import argument_matches, arguments_match, call_matches, json_equal, match

FUNCTION = {
    "name": "f",
    "parameters": {
        "type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "string"}}, "required": ["x"],
    },
}  # fmt: skip


def gold(name: str, value: int | None, after: tuple[str, ...] = ()) -> GoldCall:
    matcher = Matcher(any=True) if value is None else Matcher(exact=value)
    return GoldCall(id=name, name="f", arguments={"x": matcher}, example={"x": value or 0}, after=after)


def largest(golds: list[GoldCall], values: list[int]) -> int:
    """Every way of giving calls to gold calls, and the most that keeps the order."""
    before = {one.id: set(one.after) for one in golds}
    for _ in golds:
        for one in golds:
            before[one.id] |= set().union(*(before[name] for name in before[one.id]), set())
    best = 0
    for chosen in itertools.product([None, *range(len(values))], repeat=len(golds)):
        used = [p for p in chosen if p is not None]
        if len(set(used)) < len(used):
            continue
        wanted = [one.arguments["x"] for one in golds]
        fits = all(p is None or one.any or one.exact == values[p] for one, p in zip(wanted, chosen))
        at = {one.id: p for one, p in zip(golds, chosen) if p is not None}
        ordered = all(at[first] < p for name, p in at.items() for first in before[name] if first in at)
        if fits and ordered:
            best = max(best, len(used))
    return best


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_matching_is_as_large_as_the_best_of_all(data: st.DataObject) -> None:
    golds: list[GoldCall] = []
    for i in range(data.draw(st.integers(0, 4))):
        earlier = [one.id for one in golds]
        after = data.draw(st.lists(st.sampled_from(earlier), unique=True)) if earlier else []
        golds.append(gold(f"g{i}", data.draw(st.sampled_from([None, 0, 1, 2])), tuple(after)))
    values = data.draw(st.lists(st.integers(0, 2), max_size=5))
    found = match(golds, [(ToolCall("f", {"x": value}), FUNCTION) for value in values], malformed=1)
    assert found.true_positive == largest(golds, values) == len(found.pairs)
    assert found.false_positive == len(values) + 1 - found.true_positive
    assert found.false_negative == len(golds) - found.true_positive
    assert len({g for g, _ in found.pairs}) == len({p for _, p in found.pairs}) == len(found.pairs)


def test_a_later_call_cannot_stand_for_one_that_comes_before() -> None:
    golds = [gold("a", 1), gold("b", 2, ("a",))]
    right = match(golds, [(ToolCall("f", {"x": 1}), FUNCTION), (ToolCall("f", {"x": 2}), FUNCTION)])
    wrong = match(golds, [(ToolCall("f", {"x": 2}), FUNCTION), (ToolCall("f", {"x": 1}), FUNCTION)])
    assert (right.true_positive, wrong.true_positive, wrong.false_positive, wrong.false_negative) == (2, 1, 1, 1)


def test_many_equal_calls_are_one_right_and_the_rest_wrong() -> None:
    found = match([gold("a", 1)], [(ToolCall("f", {"x": 1}), FUNCTION)] * 500)
    assert found[1:] == (1, 499, 0)


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [(5, 5.0, True), (True, 1, False), (0, False, False), ("5", 5, False), (None, False, False), ([1], [1.0], True),
     ({"a": 1, "b": 2}, {"b": 2.0, "a": 1}, True), ([1, 2], [2, 1], False), (2**53 + 1, float(2**53), False)],
)  # fmt: skip
def test_json_values_are_equal_as_json_says(a: Any, b: Any, equal: bool) -> None:
    assert json_equal(a, b) is equal


@pytest.mark.parametrize(
    ("matcher", "right", "wrong"),
    [
        (Matcher(exact="Oslo"), ["Oslo"], ["oslo", "Oslo ", None, ["Oslo"]]),
        (Matcher(enum=(1, "b")), [1, 1.0, "b"], ["1", True, 2]),
        (Matcher(num=10, abs=0.5), [10, 9.5, 10.5], [10.6, "10", True, float("nan"), float("inf"), 10**400]),
        (Matcher(num=200, rel=0.01), [198, 202], [197.9, -200]),
        (Matcher(regex="[a-c]+"), ["abc"], ["abcd", "xabc", "", 3, "abc\n"]),
        (Matcher(set=("a", 1)), [["a", 1], [1.0, "a"]], [["a"], ["a", 1, 1], "a1", ["a", True]]),
        (Matcher(date="2026-03-05"), ["2026-03-05", "20260305"], ["2026-03-06", "5 March 2026", 20260305]),
        (Matcher(date="2026-03-05T09:30"), ["2026-03-05T09:30:00", "2026-03-05 09:30"],
         ["2026-03-05T09:30:01", "2026-03-05", "2026-03-05T09:30Z"]),
        (Matcher(any=True), [None, 1, {}], []),
    ],
)  # fmt: skip
def test_a_matcher_takes_what_is_right_and_nothing_else(matcher: Matcher, right: list[Any], wrong: list[Any]) -> None:
    assert all(argument_matches(matcher, value) for value in right)
    assert not any(argument_matches(matcher, value) for value in wrong)


def test_an_argument_that_gold_does_not_name_is_wrong_and_an_optional_one_may_be_absent() -> None:
    matchers = {"x": Matcher(exact=1), "y": Matcher(exact="a", optional=True)}
    assert arguments_match(matchers, {"x": 1}) and arguments_match(matchers, {"x": 1, "y": "a"})
    assert not arguments_match(matchers, {"x": 1, "y": "b"})
    assert not arguments_match(matchers, {"x": 1, "z": 0})
    assert not arguments_match(matchers, {"y": "a"})


def test_a_call_that_its_schema_refuses_matches_nothing() -> None:
    loose = GoldCall(id="a", name="f", arguments={"x": Matcher(any=True)}, example={"x": 1})
    assert call_matches(loose, ToolCall("f", {"x": 1}), FUNCTION)
    assert not call_matches(loose, ToolCall("f", {"x": "1"}), FUNCTION)
    assert not call_matches(loose, ToolCall("f", {"x": 1}), None)
    assert not call_matches(loose, ToolCall("g", {"x": 1}), FUNCTION)


@pytest.mark.parametrize(
    "text", ['{"exact": 1, "any": true}', "{}", '{"exact": 1, "rel": 0.1}', '{"num": true}', '{"nun": 1}']
)
def test_a_matcher_that_says_two_things_or_none_is_refused(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=Matcher)
