"""BFCL's questions as items, and replies to them judged: on questions of our own in its form, and, where its data are
(`make bfcl-data`), on its own beside its own checker."""

from __future__ import annotations

import base64
import hashlib
import json
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import DatasetError, InputError, Paused
from distill.evaluate import bfcl
from distill.evaluate.bfcl_answers import CHANGES, RECASED, REPUNCTUATED, RIGHT, answers, reply_of
from distill.evaluate.bfcl_check import REASONS, UNEXPLAINED, Reference, compare, misjudged
from distill.evaluate.bfcl_data import CATEGORIES, OUT_OF_SCOPE, Case, Source, case_of
from distill.evaluate.bfcl_judge import judge, wilson
from distill.evaluate.bfcl_literals import Language, read, write
from distill.evaluate.episode import Request
from distill.evaluate.transcripts import ProviderFault, RawCall, Reply
from distill.tools import arguments_problem, schema_problem

DATA = Path(__file__).parents[2] / bfcl.DATA
needs_data = pytest.mark.skipif(not list(DATA.glob("bfcl_eval-*.whl")), reason="BFCL's data are absent: make bfcl-data")
FUNCTION = {
    "name": "post.parcel",
    "description": "Post a parcel.",
    "parameters": {
        "type": "dict",
        "required": ["to", "weight"],
        "properties": {
            "to": {"type": "dict", "properties": {"city": {"type": "string"}, "floor": {"type": "integer"}}},
            "weight": {"type": "float", "description": "in kg"},
            "pieces": {"type": "integer", "default": 1},
            "marks": {"type": "array", "items": {"type": "string"}, "enum": ["fragile", "cold"]},
            "insured": {"type": "boolean"},
            "note": {"type": "string", "default": None},
            "anything": {"type": "any"},
            "contents": {"type": "array", "items": {"type": "dict"}},
            "span": {"type": "tuple", "items": {"type": "integer"}},
        },
    },
}
OTHER = {"name": "weigh", "description": "Weigh.", "parameters": {"type": "dict", "properties": {}}}
FIRST = {"post.parcel": {
    "to": [{"city": ["Oslo", "Christiania"], "floor": [3, ""]}], "weight": [2.5, 2], "pieces": ["", 4],
    "marks": [["fragile", "cold"], ["cold"]], "insured": [True, ""], "note": ["To the 2nd-floor.", ""],
    "anything": ["", "x"], "contents": [[{"what": ["book"], "n": [1, 2]}, {"what": ["pen", ""]}]], "span": [[1, 5]],
}}  # fmt: skip
SECOND = {"post.parcel": {"to": [{"city": ["Bergen"]}], "weight": [1.0], "note": ["-5", ""]}}
JAVA = {
    "name": "Store.put", "description": "Put.", "parameters": {"type": "dict", "required": ["id"], "properties": {
        "id": {"type": "long", "description": "key"}, "tags": {"type": "ArrayList", "items": {"type": "String"}},
        "sizes": {"type": "Array", "items": {"type": "integer"}}, "meta": {"type": "HashMap"},
        "on": {"type": "boolean"}, "name": {"type": "String"}, "where": {"type": "any"}, "share": {"type": "double"},
    }},
}  # fmt: skip
JAVA_GOLD = {"Store.put": {
    "id": [7], "tags": [["a, b", "c"]], "sizes": [[1, 2]], "meta": [{"k": ["v"], "n": [3]}], "on": [True],
    "name": ["x"], "where": ["new Path(\"/tmp\")"], "share": [0.5, ""],
}}  # fmt: skip


def question(category: str, functions: Sequence[Any], *truth: Any, name: str = "") -> Case:
    row = {"id": name or f"{category}_0", "question": [[{"role": "user", "content": "Do it."}]], "function": functions}
    return case_of(category, row, truth)


SIMPLE = question("simple_python", [FUNCTION], FIRST)
PARALLEL = question("parallel_multiple", [FUNCTION, OTHER], FIRST, SECOND)
IN_JAVA = question("simple_java", [JAVA], JAVA_GOLD)
OURS = (SIMPLE, PARALLEL, IN_JAVA, question("multiple", [OTHER, FUNCTION], SECOND))


def said(*calls: tuple[str, Any]) -> Reply:
    return Reply("", tuple(RawCall(name, arguments if isinstance(arguments, str) else json.dumps(arguments))
                           for name, arguments in calls))  # fmt: skip


def test_a_function_s_document_becomes_a_schema_that_its_right_calls_obey() -> None:
    for case in OURS:
        for tool in case.item.tools:
            assert schema_problem(tool["parameters"]) is None
        for kind, calls in answers(case, 0):
            for call, raw in zip(calls, reply_of(case, calls).calls or ()):
                function = case.item.function(call.name)
                if kind == "right":
                    made = call.__class__(raw.name, json.loads(raw.arguments))
                    assert function is not None and arguments_problem(made, function) is None
    rules = SIMPLE.item.tools[0]["parameters"]["properties"]
    assert SIMPLE.item.tools[0]["name"] == "post_parcel"
    assert rules["weight"] == {"type": "number", "description": "in kg"}
    assert rules["note"]["type"] == ["string", "null"] and "type" not in rules["anything"]
    assert rules["marks"] == {"type": "array", "items": {"type": "string", "enum": ["fragile", "cold"]}}
    assert {rule["type"] for rule in IN_JAVA.item.tools[0]["parameters"]["properties"].values()} == {"string"}


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.category)
@pytest.mark.parametrize("seed", range(5))
def test_every_right_answer_is_right_and_every_fault_is_not(case: Case, seed: int) -> None:
    seen = {}
    for kind, calls in answers(case, seed):
        verdict = judge(case, reply_of(case, calls))
        assert verdict.exact == (kind in RIGHT), (kind, calls)
        assert verdict.bfcl or not verdict.exact
        seen[kind] = verdict
    if case is PARALLEL:
        assert seen.keys() == {*RIGHT, *CHANGES}
        assert all(one.bfcl and not one.exact for kind, one in seen.items() if kind in (RECASED, REPUNCTUATED))


def test_possible_answers_multiply_out_and_say_what_may_be_absent() -> None:
    gold = SIMPLE.item.calls[0].arguments
    assert gold["to"].enum == ({"city": "Oslo", "floor": 3}, {"city": "Oslo"},
                               {"city": "Christiania", "floor": 3}, {"city": "Christiania"})  # fmt: skip
    assert len(gold["contents"].enum or ()) == 2 * 3
    assert gold["pieces"].enum == (4,) and gold["pieces"].optional and not gold["weight"].optional
    assert gold["note"].enum == ("To the 2nd-floor.", "")


def test_no_possible_answer_means_that_the_argument_is_absent() -> None:
    case = question("simple_python", [FUNCTION], {"post.parcel": {"to": [{}], "weight": [1], "pieces": []}})
    assert judge(case, said(("post_parcel", {"to": {}, "weight": 1}))).exact
    assert not judge(case, said(("post_parcel", {"to": {}, "weight": 1, "pieces": 1}))).bfcl


def test_calls_are_matched_at_best_whatever_their_order() -> None:
    """Taking the first gold call that fits, the second call would have none left."""
    loose = {"post.parcel": {"to": [{"city": ["Oslo", "Bergen"]}], "weight": [1]}}
    tight = {"post.parcel": {"to": [{"city": ["Oslo"]}], "weight": [1]}}
    case = question("parallel", [FUNCTION], loose, tight)
    oslo, bergen = (("post_parcel", {"to": {"city": city}, "weight": 1}) for city in ("Oslo", "Bergen"))
    for calls in ((oslo, bergen), (bergen, oslo), (oslo, oslo)):
        assert judge(case, said(*calls)).exact
    assert not judge(case, said(bergen, bergen)).bfcl


def test_an_unreadable_call_is_a_call_for_us_and_silence_for_bfcl() -> None:
    none, some = question("irrelevance", [FUNCTION]), question("live_relevance", [FUNCTION])
    good = {"to": {"city": "Oslo"}, "weight": 1}
    for reply, exact, bfcl_, wanted in (
        (Reply("I cannot."), True, True, (False, False)),
        (said(("post_parcel", good)), False, False, (True, True)),
        (said(("post_parcel", '{"to": ')), False, True, (False, False)),
        (Reply("<tool_call>{'name': 1}</tool_call>"), False, True, (False, False)),
        (said(("post_parcel", {"weight": "x"})), False, False, (False, True)),
        (said(("no_such", {})), False, False, (False, True)),
    ):
        assert judge(none, reply)[:2] == (exact, bfcl_)
        assert judge(some, reply)[:2] == wanted
    assert not judge(SIMPLE, said(("post_parcel", '{"to": '))).bfcl


def test_arguments_of_java_are_texts_or_wrong() -> None:
    ((_, calls), *_) = answers(IN_JAVA, 0)
    (raw,) = reply_of(IN_JAVA, calls).calls or ()
    arguments = json.loads(raw.arguments)
    assert arguments["id"] == "7L" and arguments["meta"].startswith("new HashMap")
    assert judge(IN_JAVA, said((raw.name, arguments))).exact
    assert not judge(IN_JAVA, said((raw.name, arguments | {"id": 7}))).bfcl
    assert not judge(IN_JAVA, said((raw.name, arguments | {"id": "7"}))).bfcl


@pytest.mark.parametrize(("text", "kind", "items", "language", "value"), [
    ("new String[]{\"a\", 'b,c'}", "Array", "String", "java", ["a", "b,c"]),
    ("new ArrayList<String>(Arrays.asList(\"a\", \"b\"))", "ArrayList", "String", "java", ["a", "b"]),
    ("new ArrayList<>(List.of(1L, 2L))", "ArrayList", "long", "java", [1, 2]),
    ("new ArrayList<Integer>()", "ArrayList", "integer", "java", []),
    ("Arrays.asList(true, 1.5, \"x\", null)", "ArrayList", "any", "java", [True, 1.5, "x", None]),
    ("new HashMap<String, Object>() {{ put(\"a\", 1); put(\"b\", \"}{\"); }}", "HashMap", "any", "java",
     {"a": 1, "b": "}{"}),
    ("new HashMap<String, String>()", "HashMap", "any", "java", {}),
    ("1e3", "double", "", "java", 1000.0), ("2.5f", "float", "", "java", 2.5), ("5", "long", "", "java", "5"),
    ("ids", "Array", "integer", "java", "ids"), ("f(new int[]{1})", "Array", "integer", "java", "f(new int[]{1})"),
    ("{a: [1, 2], 'b': {c: \"x\"}}", "dict", "any", "javascript", {"a": [1, 2], "b": {"c": "x"}}),
    ("[f(1, 2), 'x']", "array", "String", "javascript", ["f(1, 2)", "x"]),
    ("new Array(1, 2)", "array", "integer", "javascript", [1, 2]), ("12n", "Bigint", "", "javascript", 12),
    ("'it\\'s'", "String", "", "javascript", "it's"), ("true", "Boolean", "", "javascript", True),
    ("{a: 1, b}", "dict", "any", "javascript", "{a: 1, b}"), ("[1, 2", "array", "integer", "javascript", "[1, 2"),
])  # fmt: skip
def test_literals_are_read_as_their_language_means_them(
    text: str, kind: str, items: str, language: Language, value: Any
) -> None:
    assert read(text, kind, items, language) == value


SCALARS = st.text(max_size=8) | st.integers(-(10**9), 10**9) | st.booleans()


@given(st.lists(SCALARS, max_size=4), st.dictionaries(st.text(max_size=5), SCALARS, max_size=3))
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read_back(values: list[Any], fields: dict[str, Any]) -> None:
    for value, kinds in ((values, (("Array", "java"), ("ArrayList", "java"), ("array", "javascript"))),
                         (fields, (("HashMap", "java"), ("dict", "javascript")))):  # fmt: skip
        for kind, language in kinds:
            assert read(write(value, kind, "any", language), kind, "any", language) == value  # type: ignore[arg-type]


@pytest.mark.parametrize("hostile", [
    "[" * 60_000, "new int[]{" + "{" * 50_000, "new ArrayList<>(" * 4000, "new HashMap<A,B>() {{ put(" * 2000,
    "{" + "a:" * 30_000, "'" + "\\" * 60_000, "9" * 60_000, "new " + " " * 60_000, "[1" + ",[1" * 20_000,
])  # fmt: skip
def test_hostile_source_text_takes_no_time_and_is_no_literal(hostile: str) -> None:
    began = time.monotonic()
    for kind, language in (("Array", "java"), ("ArrayList", "java"), ("HashMap", "java"), ("long", "java"),
                           ("array", "javascript"), ("dict", "javascript"), ("String", "javascript")):  # fmt: skip
        assert read(hostile, kind, "integer", language) == hostile  # type: ignore[arg-type]
    assert time.monotonic() - began < 2


def test_intervals_are_wilson_s() -> None:
    for hits, n in ((0, 5), (5, 5), (3, 7), (400, 1053)):
        theirs = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def packed(folder: Path, altered: str = "", **data: list[Any]) -> Path:
    """A package in bfcl-eval's form, with questions of our own."""
    files = {f"bfcl_eval/data/{name.replace('__', '/')}.json": "".join(json.dumps(row) + "\n" for row in rows)
             for name, rows in data.items()}  # fmt: skip
    digests = {name: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
               for name, text in files.items()}  # fmt: skip
    record = "".join(f"{name},sha256={digest},{len(files[name])}\n" for name, digest in digests.items())
    wheel = folder / "bfcl_eval-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text + altered)
        archive.writestr("bfcl_eval-1.0.dist-info/RECORD", record)
    return wheel


def rows(case: Case, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    name = f"{case.category}_{number}"
    asked = {"id": name, "question": [[{"role": "user", "content": f"Do it, {number}."}]], "function": case.functions}
    return asked, {"id": f"{name}-spelt-otherwise", "ground_truth": case.gold}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    simple, java = [rows(SIMPLE, i) for i in range(6)], [rows(IN_JAVA, i) for i in range(3)]
    return packed(
        tmp_path, BFCL_v4_simple_python=[one[0] for one in simple], BFCL_v4_simple_java=[one[0] for one in java],
        possible_answer__BFCL_v4_simple_python=[one[1] for one in simple],
        possible_answer__BFCL_v4_simple_java=[one[1] for one in java],
        BFCL_v4_irrelevance=[rows(SIMPLE, i)[0] | {"id": f"irrelevance_{i}"} for i in range(4)],
    )  # fmt: skip


SMALL = ("simple_python", "simple_java", "irrelevance")


def test_a_file_that_was_not_packed_so_is_refused(tmp_path: Path) -> None:
    wheel = packed(tmp_path, altered=" ", BFCL_v4_irrelevance=[rows(SIMPLE, 0)[0]])
    with pytest.raises(DatasetError, match=r"not the file that bfcl-eval 1\.0 was packed with"):
        Source(wheel).cases("irrelevance")
    with pytest.raises(InputError, match="make bfcl-data"):
        Source(tmp_path / "absent")
    with pytest.raises(DatasetError, match="not a question of BFCL"):
        Source(packed(tmp_path, BFCL_v4_irrelevance=[{"id": "x", "question": [], "function": [{}]}])).cases(
            "irrelevance"
        )


def test_a_wheel_and_the_folder_it_is_unpacked_to_give_the_same(small: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(small) as archive:
        archive.extractall(tmp_path / "unpacked")
    for name in SMALL:
        assert Source(small).cases(name) == Source(tmp_path).cases(name) == Source(tmp_path / "unpacked").cases(name)


class Oracle:
    """Answers rightly what it is asked, until it is stopped; `faults` are questions that it cannot be asked."""

    together = 2

    def __init__(self, source: Source, faults: Sequence[str] = (), last: int = 10**6) -> None:
        self.cases = {case.item.id: case for name in SMALL for case in source.cases(name)}
        self.faults, self.last, self.asked = faults, last, 0

    def identity(self) -> dict[str, Any]:
        return {"runner": "oracle", "weights": None}

    def reply(self, item: Any, messages: Any, replies: Any) -> Reply:
        raise NotImplementedError

    def replies(self, batch: Sequence[Request]) -> list[Reply | ProviderFault]:
        out: list[Reply | ProviderFault] = []
        for request in batch:
            if self.asked == self.last:
                raise KeyboardInterrupt
            self.asked += 1
            case = self.cases[request.item.id]
            calls = next(answers(case, 0))[1] if case.expects == "calls" else []
            out.append(ProviderFault("down") if request.item.id in self.faults else reply_of(case, calls))
        return out


def test_the_oracle_is_right_everywhere_and_a_stopped_run_goes_on_where_it_was(small: Path, tmp_path: Path) -> None:
    source, report = Source(small), tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        bfcl.run(source, Oracle(source, last=7), SMALL, report)
    assert not report.exists()
    rest = Oracle(source)
    found = bfcl.run(source, rest, SMALL, report)
    assert rest.asked == 13 - 6  # a batch that was under way is asked again
    whole = bfcl.run(source, Oracle(source), SMALL, tmp_path / "whole.json")
    assert found == whole
    assert [row["exact"]["right"] for row in found["categories"].values()] == [6, 3, 4]
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_question_that_cannot_be_asked_is_not_judged_and_a_dead_endpoint_pauses(small: Path, tmp_path: Path) -> None:
    source = Source(small)
    found = bfcl.run(source, Oracle(source, faults=["irrelevance_1"]), SMALL, tmp_path / "r.json")
    assert found["categories"]["irrelevance"]["n"] == 3 and found["categories"]["irrelevance"]["unanswered"] == 1
    assert found["unanswered"] == {"irrelevance_1": "down"}
    again = Oracle(source)
    assert bfcl.run(source, again, SMALL, tmp_path / "r.json")["unanswered"] == {} and again.asked == 1
    with pytest.raises(Paused, match="down"):
        bfcl.run(source, Oracle(source, faults=list(again.cases)), SMALL, tmp_path / "dead.json")


def test_a_category_out_of_scope_is_refused_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    for name, reason in OUT_OF_SCOPE.items():
        assert bfcl.main(["--self-check", "--category", name]) == 2
        assert reason in capsys.readouterr().err
    assert not OUT_OF_SCOPE.keys() & CATEGORIES.keys()


@needs_data
@pytest.mark.parametrize("category", list(CATEGORIES))
def test_every_question_of_the_package_is_read_and_can_be_offered(category: str) -> None:
    from distill import chat

    cases = Source(DATA).cases(category)
    assert len({case.item.id for case in cases}) == len(cases) > 0
    for case in cases[:60]:
        chat.segments(case.item.messages, case.item.tools, add_generation_prompt=True)
        assert not any(schema_problem(tool["parameters"]) for tool in case.item.tools)


@needs_data
def test_our_judgement_and_bfcl_s_own_checker_part_only_for_known_reasons() -> None:
    """A tenth of the questions, and all that are known to part them; `distill bfcl --self-check` takes all."""
    source = Source(DATA)
    reasons, right = set(), [0, 0]
    with Reference(source.path) as reference:
        for name, (_, expects) in CATEGORIES.items():
            for one in compare(source.cases(name)[:: 10 if expects == "calls" else 1], reference):
                assert not misjudged(one) and one.reason != UNEXPLAINED, (one.case.item.id, one.kind, one.calls)
                reasons.add(one.reason)
                if one.kind == "right":
                    right[0] += one.ours.exact
                    right[1] += 1
    assert right[0] == right[1] > 300
    assert {"", "number", "leniency"} <= reasons <= {"", *REASONS}


@needs_data
def test_a_disagreement_without_a_known_reason_is_found() -> None:
    """Their checker is given another answer than ours."""
    source = Source(DATA)
    case = source.cases("simple_python")[0]
    ((name, arguments),) = case.gold[0].items()
    key = next(iter(arguments))
    planted = case._replace(gold=({name: arguments | {key: [12345]}},))
    with Reference(source.path) as reference:
        assert {one.reason for one in compare([planted], reference) if one.kind == "right"} == {UNEXPLAINED}
