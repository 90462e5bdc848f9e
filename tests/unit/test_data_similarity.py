"""Exact and near duplicates against brute force, and overlap with evaluation sets against plain sets of words."""

import json
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.prompts.contamination import ContaminationIndex, Hit, evaluation_items
from distill.data.prompts.similarity import (
    PERMUTATIONS,
    NearDuplicates,
    jaccard,
    normalise,
    rows_of_band,
    shingle_sets,
    signatures,
)
from distill.errors import ConfigError, DatasetError

WORDS = [f"w{i}" for i in range(400)]


def words(rng: random.Random, n: int, vocabulary: list[str] = WORDS) -> list[str]:
    return [rng.choice(vocabulary) for _ in range(n)]


def plain_jaccard(a: str, b: str) -> float:
    """By hand: sets of tuples of five words."""
    one, two = ({tuple(w[i : i + 5]) for i in range(max(1, len(w) - 4))} for w in (a.split(), b.split()))
    return len(one & two) / len(one | two)


def varied(rng: random.Random, text: list[str], changes: int) -> list[str]:
    out = list(text)
    for _ in range(changes):
        out[rng.randrange(len(out))] = rng.choice(WORDS)
    return out


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), min_size=2, max_size=25), st.integers(1, 10))
def test_the_verdict_on_a_small_corpus_is_that_of_brute_force(corpus: list[list[str]], tenths: int) -> None:
    threshold = tenths / 10
    index = NearDuplicates(threshold)
    kept: list[tuple[str, str]] = []
    for number, letters in enumerate(corpus):
        text = " ".join(letters)
        expected = next((key for key, other in kept if plain_jaccard(text, other) >= threshold), None)
        if threshold >= 0.3 or expected is None:  # below, 128 permutations cannot promise to meet
            assert index.add(str(number), text) == expected
        else:
            index.add(str(number), text)
        if expected is None:
            kept.append((str(number), text))
        if len(index) != len(kept):
            return


def test_pairs_just_above_the_threshold_are_found() -> None:
    rng = random.Random(5)
    found = total = 0
    while total < 600:
        text = words(rng, rng.choice((30, 49, 80, 200)))
        near = text
        while jaccard(" ".join(text), " ".join(near)) > 0.84:
            near = varied(rng, near, 1)
        if jaccard(" ".join(text), " ".join(near)) < 0.8:
            continue
        index = NearDuplicates(0.8)
        index.insert("text", " ".join(text))
        total += 1
        found += index.find(" ".join(near)) is not None
    assert found >= 0.99 * total


def test_what_is_called_similar_is_similar() -> None:
    rng = random.Random(1)
    index = NearDuplicates(0.5)
    texts: dict[str, str] = {}
    for number in range(1500):
        base = words(rng, 20, WORDS[:12]) if number % 3 else varied(rng, words(random.Random(number // 30), 40), 2)
        text = " ".join(base)
        match = index.find(text)
        if match:
            assert match.similarity == pytest.approx(plain_jaccard(text, texts[match.key]))
            assert match.similarity >= 0.5
        index.insert(str(number), text)
        texts[str(number)] = text


def test_a_verdict_depends_on_nothing_that_comes_later() -> None:
    rng = random.Random(2)
    bases = [words(rng, 40) for _ in range(30)]
    texts = [" ".join(varied(rng, rng.choice(bases), rng.randrange(3))) for _ in range(400)]
    whole, half = NearDuplicates(), NearDuplicates()
    verdicts = [whole.add(str(i), text) for i, text in enumerate(texts)]
    assert [half.add(str(i), text) for i, text in enumerate(texts[:200])] == verdicts[:200]
    assert any(verdicts) and not all(verdicts)


def test_many_at_once_are_what_each_is_alone() -> None:
    rng = random.Random(3)
    texts = [" ".join(words(rng, n)) for n in (1, 3, 4, 5, 6, 50, 9000, 2, 20_000)] + ["", "???", "a,b", "日本語の文章"]
    index = NearDuplicates()
    for alone, together in zip((index.sketch([text])[0] for text in texts), index.sketch(texts), strict=True):
        assert np.array_equal(alone.shingles, together.shingles) and np.array_equal(alone.bands, together.bands)


def test_a_signature_is_the_least_hash_of_each_permutation() -> None:
    sets = shingle_sets([" ".join(words(random.Random(4), n)) for n in (7, 12_000, 300)])
    factors, shifts = signatures([np.array([1 << 32], np.uint64)]), signatures([np.array([0], np.uint64)])
    for signed, shingles in zip(signatures(sets), sets, strict=True):
        for place in (0, 1, PERMUTATIONS - 1):
            shift = int(shifts[0, place])
            factor = (int(factors[0, place]) - shift) % 2**32
            assert signed[place] == min(((int(s) >> 32) * factor + shift) % 2**32 for s in shingles.tolist())


def test_an_index_of_many_texts_still_finds_the_first_and_the_last() -> None:
    rng = random.Random(6)
    texts = [" ".join(words(rng, 12)) for _ in range(8000)]
    index = NearDuplicates()
    started = time.perf_counter()
    for begin in range(0, len(texts), 250):
        for number, sketch in enumerate(index.sketch(texts[begin : begin + 250]), begin):
            index.insert(str(number), sketch)
    assert time.perf_counter() - started < 8  # some 20,000 a second on an idle core
    assert index._levels  # what is recent has been sorted away
    for number in (0, 17, 4000, 7999):
        assert index.find(texts[number]) == (str(number), 1.0)
    assert index.find(" ".join(words(rng, 12))) is None


def test_bands_are_as_long_as_the_recall_allows() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9, 1.0):
        rows = rows_of_band(threshold)
        assert 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.99
    assert rows_of_band(0.9) > rows_of_band(0.8) > rows_of_band(0.5) >= 1


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        NearDuplicates(threshold)


def test_equal_but_for_case_width_and_spaces_is_equal() -> None:
    assert normalise("\uff33tra\u00dfe  No. 5\n") == normalise("STRASSE no. 5") != normalise("strasse no. 6")
    assert normalise(" A\tb ") == "a b"


def test_a_sign_counts_and_a_comma_does_not() -> None:
    index = NearDuplicates()
    assert index.add("a", "What is 7 + 2?") is None
    assert index.add("b", "What is 7 - 2?") is None
    assert index.add("c", "what is, 7 + 2!") == "a"


def test_texts_without_spaces_between_words_can_be_near_too() -> None:
    text = "東京の天気を教えてください。明日は傘が必要ですか、それとも晴れますか。電車で行くつもりです"
    index = NearDuplicates()
    index.add("a", text)
    assert index.add("b", text + "ね") == "a"
    assert index.add("c", "大阪の美味しいレストランを三つ教えてください") is None


# --- contamination


def write(path: Path, rows: list[object]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=40), min_size=1, max_size=4),
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=40),
)
def test_a_hit_is_a_shared_run_of_words(items: list[list[str]], text: list[str]) -> None:
    def runs(letters: list[str], n: int) -> set[tuple[str, ...]]:
        return {tuple(letters[i : i + n]) for i in range(len(letters) - n + 1)}

    expected = set()
    for number, item in enumerate(items):
        n = 13 if min(len(item), len(text)) >= 13 else 8
        whole = min(len(item), len(text)) < 8 and item == text
        if whole or runs(item, n) & runs(text, n):
            expected.add(str(number))
    index = ContaminationIndex({"set": [(str(i), " ".join(item)) for i, item in enumerate(items)]})
    hits = index.hits(" ".join(text), limit=99)
    assert {hit.item for hit in hits} <= expected  # of items that share one run the first is named
    assert bool(hits) == bool(expected)
    assert all(hit.ngram in " ".join(text) for hit in hits)


def test_evidence_names_the_set_the_item_and_the_words(tmp_path: Path) -> None:
    question = "Natalia sold clips to forty eight of her friends in April and then she sold half as many in May"
    files = [
        write(
            tmp_path / "gsm.jsonl", [{"question": "How many legs has a spider?"}, {"id": "q7", "question": question}]
        ),
        write(tmp_path / "plain.txt", ["An entirely different line", "with two lines"]),
    ]
    index = ContaminationIndex.load(files)
    assert index.hits(f"Please solve: {question.upper()}!!")[0] == Hit(
        "gsm.jsonl", "q7", "natalia sold clips to forty eight of her friends in april and then", question
    )
    assert index.hits("how many legs has a spider") == [
        Hit("gsm.jsonl", "line 1", "how many legs has a spider", "How many legs has a spider?")
    ]
    assert index.hits("An entirely different line") and not index.hits("An entirely other line")
    assert not index.hits("She sold clips to friends in April. How many legs has a spider with a broken leg, in May?")
    assert set(index.sha256s) == {"gsm.jsonl", "plain.txt"} and len(index) == 4


def test_a_short_item_is_found_in_a_long_text_and_the_other_way_round() -> None:
    short = "which planet of the sun has the largest moon"
    index = ContaminationIndex(
        {"set": [("1", short), ("2", f"a{' b' * 20} nine words that stand in a row at the end")]}
    )
    assert [h.item for h in index.hits(f"I ask you, before we begin: {short}? Say it in one word, please.")] == ["1"]
    assert [h.item for h in index.hits("Nine words that stand in a row at the end!")] == ["2"]
    assert not index.hits("I ask you, before we begin: which planet of the sun has the smallest moon, in one word?")


def test_the_forms_of_evaluation_sets_are_read(tmp_path: Path) -> None:
    header = '{"caws":{"tier":"tier_1","max_files":25,"max_loc":1000,"cov":80,"mut":50,"in":["src"],"out":["dist"]}}'
    rows = [
        {"__header__": True, "dataset_version": "1.1.0"},
        {"id": "c-1", "prompt": header + "\nList the files of the folder", "teacher_text": "no question"},
        {"id": 4, "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "first question"}]},
        {"question": [[{"role": "user", "content": "a nested question"}]]},
        {"text": "just a text"},
    ]
    found = list(evaluation_items(write(tmp_path / "set.jsonl", rows)))
    assert [item for item, _ in found] == ["c-1", "4", "line 4", "line 5"]
    index = ContaminationIndex.load([tmp_path / "set.jsonl"])
    assert index.hits("list the files of the folder") and index.hits("A nested question?")
    assert not index.hits(header + "\nWhat is the capital of the largest country that has no access to the sea?")


def test_sets_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files.append(write(tmp_path / folder / "test.txt", [f"only in {folder}"]))
    index = ContaminationIndex.load(files)
    assert index.hits("only in b")[0].set == str(files[1]) and len(index.sha256s) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "x"}\n{"prompt"\n', r":2: not JSON"),
        (b"[1]\n", r":1: expected a JSON object"),
        (b'{"prompt": "ok"}\n\n{"answer": "x"}\n', r":3: an item has"),
        (b'{"prompt": "\xff"}\n', r":1: not UTF-8 at byte 12"),
        (b'{"prompt": 5}\n', r":1: an item has"),
        (b'{"prompt": "' + b"x" * (17 << 20) + b'"}\n', r":1: the line is longer"),
        (b"[" * 100_000 + b"\n", r":1: not JSON"),
    ],
)
def test_a_set_that_cannot_be_read_is_refused_by_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=re.escape(str(path)) + message):
        ContaminationIndex.load([path])


def test_no_set_means_no_hit() -> None:
    assert ContaminationIndex().hits("anything at all") == []
    assert ContaminationIndex({"set": [("1", "...")]}).hits("...") == []
