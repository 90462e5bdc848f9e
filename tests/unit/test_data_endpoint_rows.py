"""An endpoint's log-probabilities become rows of the student's tokens, or nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.store.distributions import from_endpoint, problem_of
from distill.data.teacher.wire import TokenLogprob, TopToken
from distill.tokenizer import toy_tokenizer


def _told(text: str, *, end: bool = True, by: str = "bytes", k: int = 4) -> list[TokenLogprob]:
    """A turn as a server reports it: the token itself at 0.6, others below."""
    tokenizer = toy_tokenizer()
    bytes_of = {identity: data for data, identity in tokenizer.ids_by_bytes.items()}
    rows = []
    for token in tokenizer.encode(text + ("<|im_end|>" if end else "")):
        top = []
        for rank, identity in enumerate([token, *(i for i in range(40, 60) if i != token)][:k]):
            data = bytes_of[identity]
            top.append(TopToken(
                "" if by == "id" else data.decode(errors="replace"), data if by == "bytes" else None,
                identity if by == "id" else None, float(np.log(0.6 if rank == 0 else 0.3 / 2**rank)),
            ))  # fmt: skip
        first = top[0]
        rows.append(TokenLogprob(first.token, first.bytes, first.id, first.logprob, tuple(top)))
    return rows


def _tokens(*texts: str) -> list[int]:
    return [token for text in texts for token in toy_tokenizer().encode(text + "<|im_end|>")]


@pytest.mark.parametrize("by", ["bytes", "id", "text"])
def test_an_endpoints_entries_become_rows_of_the_students_tokens(by: str) -> None:
    ids = _tokens("Hello there", "Yes.")
    item = from_endpoint([_told("Hello there", by=by), _told("Yes.", by=by)], ids, toy_tokenizer(), k=4)
    assert item is not None and problem_of(item, toy_tokenizer().vocab_size) is None
    assert item.token_ids.tolist() == ids and item.topk_ids[:, 0].tolist() == ids and item.known.all()
    mass = 0.6 + 0.3 * (1 / 2 + 1 / 4 + 1 / 8)
    np.testing.assert_allclose(item.tail_logprob, np.log1p(-mass), rtol=1e-5)


def test_an_end_of_turn_that_is_not_told_has_no_distribution() -> None:
    ids = _tokens("Hello", "Yes.")
    item = from_endpoint([_told("Hello", end=False), _told("Yes.")], ids, toy_tokenizer(), k=6)
    first = len(_tokens("Hello"))
    assert item is not None and item.known.tolist() == [i != first - 1 for i in range(len(ids))]
    assert (item.topk_ids[item.known][:, 4:] == -1).all()


@pytest.mark.parametrize(
    "turns",
    [
        [_told("Hello")], [_told("Hello"), None], [_told("Hello"), _told("No.")], [_told("Hello")[:-2], _told("Yes.")],
        [_told("Hello"), [*_told("Yes."), *_told("x")]], [[], []],
    ],
)  # fmt: skip
def test_turns_that_are_not_the_students_tokens_are_unusable(turns) -> None:
    assert from_endpoint(turns, _tokens("Hello", "Yes."), toy_tokenizer(), k=4) is None


def test_ids_that_contradict_the_bytes_beside_them_are_not_believed() -> None:
    rows = _told("Yes.")
    tops = [tuple(TopToken(t.token, t.bytes, 5, t.logprob) for t in row.top) for row in rows]
    wrong = [TokenLogprob(row.token, row.bytes, 5, row.logprob, top) for row, top in zip(rows, tops)]
    item = from_endpoint([wrong], _tokens("Yes."), toy_tokenizer(), k=4)
    assert item is not None and item.topk_ids[:, 0].tolist() == _tokens("Yes.")


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(-5, 1100) | st.none(), st.floats(allow_nan=True) | st.floats(-30, 0.01)), max_size=8
    ),
    st.floats(-30, 0.01) | st.none(),
)
def test_whatever_numbers_an_endpoint_gives_the_rows_are_distributions_or_absent(top, own) -> None:
    tokenizer = toy_tokenizer()
    candidates = tuple(TopToken("\ud800" if i is None else "", None, i, lp) for i, lp in top)
    (end,) = tokenizer.encode("<|im_end|>")
    item = from_endpoint([[TokenLogprob("", None, end, own, candidates)]], [end], tokenizer, k=5)
    assert item is not None and problem_of(item, tokenizer.vocab_size) is None


def test_a_mass_a_little_above_one_is_scaled_and_one_far_above_is_no_distribution() -> None:
    tokenizer = toy_tokenizer()
    (end,) = tokenizer.encode("<|im_end|>")
    for second, known in ((0.1004, True), (0.2, False)):
        top = (TopToken("", None, end, float(np.log(0.9))), TopToken("", None, 50, float(np.log(second))))
        item = from_endpoint([[TokenLogprob("", None, end, float(np.log(0.9)), top)]], [end], tokenizer, k=3)
        assert item is not None and item.known.tolist() == [known]
        assert not known or item.tail_logprob[0] == pytest.approx(np.log(1e-6), abs=0.01)
