"""Targets stand where they say, in characters, bytes and tokens, and only what a tool said is integrated."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import chat
from distill.data.atoms import LONGEST_CONTENT, MOST_ATOMS, atoms_of, integrations
from distill.data.schema import Call, Source, Target, Turn, completion_ids
from distill.data.targets import cover, lay_out, rendered, targets_of
from distill.tokenizer import Tokenizer, toy_tokenizer
from tests.unit.kd_sets import episode

text = st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from("aé東🙂👩‍👩‍👧 \n1."), max_size=25).filter(
    lambda t: not chat._THOUGHT_MARK.search(t) and "<" not in t
)
arguments = st.dictionaries(text, text | st.integers() | st.lists(text, max_size=2), max_size=2)
calls = st.lists(st.builds(Call, text, arguments), max_size=2).map(tuple)
teachers = st.builds(Turn, st.just("assistant"), text, calls, text, origin=st.just("teacher"))
turns = st.one_of(
    st.builds(Turn, st.just("user"), text),
    st.builds(Turn, st.just("tool"), text, origin=st.just("broker")),
    st.builds(Turn, st.just("assistant"), text, calls),
    teachers,
)
conversations = st.tuples(st.lists(turns, max_size=3), teachers).map(
    lambda parts: (Turn("user", "?"), *parts[0], parts[1])
)


def token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The bytes of each id, from the vocabulary's own alphabet (GPT-2), not from what is under test."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b): b for b in printable}
    alphabet |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in printable)}
    out: dict[int, bytes] = {}
    for token, identity in tokenizer._inner.get_vocab(with_added_tokens=True).items():
        added = identity in tokenizer._inner.get_added_tokens_decoder()
        out[identity] = token.encode() if added else bytes(alphabet[c] for c in token)
    return out


BYTES = token_bytes(toy_tokenizer())


@settings(deadline=None)
@given(conversations)
def test_characters_bytes_and_tokens_say_the_same(messages) -> None:
    tokenizer = toy_tokenizer()
    layout = lay_out(messages, [], tokenizer)
    whole = layout.text.encode()
    pieces = [BYTES[i] for i in chat.encode(tokenizer, messages).ids]
    edges = [0]
    for piece in pieces:
        edges.append(edges[-1] + len(piece))
    assert b"".join(pieces) == whole and layout.text == chat.render(messages)
    assert layout.rendered == rendered(messages, [], tokenizer)
    assert (layout.rendered.n_chars, layout.rendered.n_bytes, layout.rendered.n_tokens) == (
        len(layout.text), len(whole), len(pieces),
    )  # fmt: skip
    for target in layout.targets:
        (first, stop), tok = target.byte, target.tok
        assert layout.text[slice(*target.char)].encode() == whole[first:stop]
        inside = [n for n in range(len(pieces)) if edges[n] < stop and edges[n + 1] > first]
        assert tok == (inside[0], inside[-1] + 1)
        assert target.exact_tok == ((edges[tok[0]], edges[tok[1]]) == (first, stop))


@settings(deadline=None)
@given(conversations)
def test_the_targets_are_the_parts_of_the_teachers_turns(messages) -> None:
    layout = lay_out(messages)
    expected: list[tuple[str, int, int | None, str]] = []
    for index, turn in enumerate(messages):
        if turn.origin != "teacher":
            continue
        last = index == len(messages) - 1 and not turn.tool_calls
        parts = [("reasoning", None, turn.reasoning), ("final" if last else "content", None, turn.content)]
        for n, call in enumerate(turn.tool_calls):
            name, values = (json.dumps(part, ensure_ascii=False) for part in (call.name, call.arguments))
            parts += [("tool_call", n, chat.call_text(call)), ("tool_name", n, name[1:-1]), ("tool_args", n, values)]
        expected += [(kind, index, n, words) for kind, n, words in parts if words]
    found = [t for t in layout.targets if t.kind != "integration"]
    assert [(t.kind, t.msg, t.call, layout.text[slice(*t.char)]) for t in found] == expected
    assert all(target.tok is None for target in found)


@settings(deadline=None)
@given(conversations)
def test_the_completion_is_the_tokens_of_the_learned_turns(messages) -> None:
    encoded = chat.encode(
        toy_tokenizer(), messages, learned={i for i, t in enumerate(messages) if t.origin == "teacher"}
    )
    learned = [i for i, target in zip(encoded.ids, encoded.target, strict=True) if target]
    assert lay_out(messages, [], toy_tokenizer()).completion == learned


def test_a_record_has_the_completion_of_its_layout() -> None:
    record = episode(3, tokenizer=toy_tokenizer())
    assert lay_out(record.messages, record.tools, toy_tokenizer()).completion == completion_ids(record, toy_tokenizer())


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.data())
def test_a_cover_is_the_least(sizes, data) -> None:
    edges = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    first = data.draw(st.integers(0, edges[-1] - 1))
    stop = data.draw(st.integers(first + 1, edges[-1]))
    (begin, end), exact = cover(list(pairwise(edges)), first, stop)
    assert edges[begin] <= first < edges[begin + 1] and edges[end - 1] < stop <= edges[end]
    assert exact == (edges[begin] == first and edges[end] == stop)


def _integrated(answer: str, *results: Any) -> list[tuple[str, str]]:
    """(text, pointer) of what an answer takes up from results that are JSON values, or raw texts."""
    tools = [
        Turn("tool", r if isinstance(r, str) else json.dumps(r, ensure_ascii=False), origin="broker") for r in results
    ]
    messages = (Turn("user", "?"), *tools, Turn("assistant", answer, origin="teacher"))
    layout = lay_out(messages)
    return [(layout.text[slice(*t.char)], t.source.pointer) for t in layout.targets if t.source]


RESULT = {"t": 12.5, "n": 1234, "small": 7, "city": "Oslo", "day": "2024-01-15", "id": "A-17", "ok": True, "no": None,
          "deep": [{"a/b": "light rain", "c~d": "Oslo City Hall"}], "negative": -40, "東": "東京",
          "code": "007"}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("It is 12.5 degrees.", [("12.5", "/t")]),
        ("12.50 EUR, 1,234 of them, 1234!", [("12.50", "/t"), ("1,234", "/n"), ("1234", "/n")]),
        ("112.5, 12.55, 12.5.1, 2012.5, v12.5, 12-34, 1,2345, 1234-5, 12:1234", []),
        ("at -40, not 40", [("-40", "/negative")]),
        ("7 is True and None, true and null", []),
        ("In Oslo. Osloer do not count, nor does Oslo_2.", [("Oslo", "/city")]),
        ("On 2024-01-15, not 2024-01-150.", [("2024-01-15", "/day")]),
        ("(A-17) BA-17 A-171", [("A-17", "/id")]),
        ("Oslo City Hall", [("Oslo City Hall", "/deep/0/c~0d")]),
        ("light rain, light rainy", [("light rain", "/deep/0/a~1b")]),
        ("在東京は晴れ", [("東京", "/東")]),
        ("agent 007, not 1007 or 0.007", [("007", "/code")]),
        ("nothing of it", []),
    ],
)
def test_an_answer_takes_up_whole_values(answer: str, found: list[tuple[str, str]]) -> None:
    assert _integrated(answer, RESULT) == found


def test_a_result_that_is_not_json_is_one_value() -> None:
    assert _integrated("It said: all is well!", "all is well") == [("all is well", "")]


def test_of_equal_values_the_first_is_the_source_and_later_results_are_none() -> None:
    messages = (
        Turn("user", "?"),
        Turn("assistant", "Oslo first.", origin="teacher"),
        Turn("tool", '{"a": "Oslo", "b": "Oslo"}', origin="broker"),
        Turn("tool", '{"c": "Oslo"}', origin="broker"),
        Turn("assistant", "Oslo then.", origin="teacher"),
        Turn("tool", '"late"', origin="broker"),
        Turn("assistant", "done", origin="teacher"),
    )
    found = [target for target in targets_of(messages) if target.kind == "integration"]
    assert [(t.msg, t.source) for t in found] == [(4, Source(2, "/a"))]


@given(st.lists(st.sampled_from(["ab cd", "cd ef", "ab cd ef", "cd", "12.5", "125"]), min_size=1), text)
def test_no_match_lies_within_another_and_each_is_its_value(values, around) -> None:
    answer = f"{around} {' '.join(values)} {around}"
    atoms = atoms_of(Turn("tool", json.dumps(values)), 1)
    found = [span for span, _ in integrations(answer, atoms)]
    assert all(a[1] < b[1] and a[0] < b[0] for a, b in pairwise(found))
    assert {answer[slice(*span)] for span in found} <= set(values) | {"12.5", "125"}


@pytest.mark.parametrize(
    "result",
    [
        "[" * 5000,
        '{"a": 1e999999999}',
        '{"a": 1e99999999999999999999}',
        '{"a": 1e400, "b": NaN}',
        '{"a": ' + "9" * 5000 + "}",
        "",
        "\x00",
    ],
)
def test_hostile_results_are_only_texts(result: str) -> None:
    assert _integrated("It is 12.5.", result) == []


def test_the_search_is_bounded() -> None:
    many = json.dumps([f"value {n}" for n in range(3 * MOST_ATOMS)])
    assert len(atoms_of(Turn("tool", many), 1)) == MOST_ATOMS
    assert integrations("value 1 " * LONGEST_CONTENT, atoms_of(Turn("tool", many), 1)) == []


def test_tokens_of_split_characters_cover_them() -> None:
    """The toy tokenizer writes an emoji as several tokens, none of them a character."""
    messages = (Turn("user", "?"), Turn("tool", '"🙂🙃"'), Turn("assistant", "a🙂🙃b", origin="teacher"))
    layout = lay_out(messages, [], toy_tokenizer())
    (found,) = [target for target in layout.targets if target.kind == "integration"] or [None]
    final = layout.targets[0]
    assert isinstance(final, Target) and final.exact_tok and final.tok is not None
    assert final.tok[1] - final.tok[0] > 4
    assert found is None or found.exact_tok
