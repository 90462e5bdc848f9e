"""What an answer says that can be checked is read once, by value, in every locale, and in linear time."""

# ruff: noqa: RUF001
from __future__ import annotations

import datetime
import random
import re
import time
import unicodedata
from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.evaluate.atoms import Atom, atoms_in, typed_atoms

LOCALES = ("en", "de", "fr", "es", "it", "pt", "sv", "nb")
NAMES = {
    "en": "January February March April May June July August September October November December",
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "it": "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
    "pt": "janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro",
    "sv": "januari februari mars april maj juni juli augusti september oktober november december",
    "nb": "januar februar mars april mai juni juli august september oktober november desember",
}
MARKS = {"en": (",", "."), "de": (".", ","), "es": (".", ","), "it": (".", ","), "pt": (".", ","),
         "fr": ("\u202f", ","), "sv": ("\u00a0", ","), "nb": (" ", ",")}  # fmt: skip


def said(text: str, locale: str = "en", declared: tuple[str, ...] = ()) -> list[tuple[str, object]]:
    return [(atom.kind, atom.value) for atom in atoms_in(text, locale, declared)]


def n(*values: object) -> list[tuple[str, object]]:
    return [("number", Decimal(str(value))) for value in values]


@pytest.mark.parametrize(
    ("text", "locale", "atoms"),
    [
        ("It is −5 °C, +3, -7 and 5–6.", "en", n(-5, 3, -7, 5, 6)),
        ("$1,234.50 or -$5 or 40% or 1.5e-3", "en", n("1234.5", -5, 40, "0.0015")),
        ("1,2,3 and 12,500 and 007", "en", n(1, 2, 3, 12500, 7)),
        ("5km, 2h30, 4x6, 1990s, 1st, a 10-day trip, mid-2026, Nr.5, 12m²", "en",
         n(5, 2, 30, 4, 6, 1990, 1, 10, 2026, 5, 12)),
        ("50k is not fifty", "en", [("id", "50k")]),
        ("1.234,5 1.234 12.5 0.123 1,234.5 1.234.567", "de", n("1234.5", 1234, "12.5", "0.123", "1234.5", 1234567)),
        ("1 234,5 et 12.5 et 1\u202f234\u202f567", "fr", n("1234.5", "12.5", 1234567)),
        ("room 12 345", "en", n(12, 345)),
        ("EV-12345, ORD-1, N-4471, QA1234, room-12, v1.2.3, 1.2.3, 10.0.0.7", "en",
         [("id", one) for one in ("EV-12345", "ORD-1", "N-4471", "QA1234", "room-12", "v1.2.3", "1.2.3", "10.0.0.7")]),
        ("id 550e8400-e29b-41d4-a716-446655440000, 0x1f3a.", "en",
         [("id", "550e8400-e29b-41d4-a716-446655440000"), ("id", "0x1f3a")]),
        ("CO2 and COVID-19 claim nothing", "en", []),
        ("2026-03-12T14:30:00Z", "en", [("date", (2026, 3, 12)), ("time", (14, 30, 0))]),
        ("2026-03, May 2026, 12 March, March 12", "en",
         [("date", (2026, 3, 0)), ("date", (2026, 5, 0)), ("date", (0, 3, 12)), ("date", (0, 3, 12))]),
        ("12th of March 2026; Mar. 3rd, 2026; 5 may be", "en",
         [("date", (2026, 3, 12)), ("date", (2026, 3, 3)), *n(5)]),
        ("3/12/2026 13/12/2026 12.3.2026", "en",
         [("date", (2026, 3, 12)), ("date", (2026, 12, 13)), ("date", (2026, 3, 12))]),
        ("am 12.3. und 12.3.2026 und 12.03.26", "de", [("date", (0, 3, 12)), *[("date", (2026, 3, 12))] * 2]),
        ("le 12/03 et 12/03/2026, 1er mars 2026", "fr",
         [("date", (0, 3, 12)), ("date", (2026, 3, 12)), ("date", (2026, 3, 1))]),
        ("12–14 March 2026, 3 to 4 May", "en",
         [("date", (2026, 3, 12)), ("date", (2026, 3, 14)), ("date", (0, 5, 3)), ("date", (0, 5, 4))]),
        ("12 de março de 2026", "pt", [("date", (2026, 3, 12))]),
        ("30 February and 2026-02-30", "en", n(30, 2026, 2, 30)),
        ("14:30, 3 pm, 3:30 p.m., 12 am, 24:00, 14:30:05", "en",
         [("time", one) for one in ((14, 30), (15, 0), (15, 30), (0, 0), (0, 0), (14, 30, 5))]),
        ("9 to 11:30 am", "en", [("time", (9, 0)), ("time", (11, 30))]),
        ("99:30 is no time", "en", n(99, 30)),
        ("um 14 Uhr und 14.30 Uhr", "de", [("time", (14, 0)), ("time", (14, 30))]),
        ("à 14 h, 14h30 et 14 h 30, puis 3 h", "fr", [("time", (14, 0)), *[("time", (14, 30))] * 2, *n(3)]),
        ("kl. 14.30 och kl 9", "sv", [("time", (14, 30)), ("time", (9, 0))]),
        ("See https://a.b/c/1?x=2. Or (www.a.org/x_(y)), docs.acme.com/a1, acme.com.", "en",
         [("url", one) for one in ("https://a.b/c/1?x=2", "www.a.org/x_(y)", "docs.acme.com/a1", "acme.com")]),
        ("[here](https://a.b/c/) or mail a.b1@c-d.org.", "en", [("url", "https://a.b/c"), ("email", "a.b1@c-d.org")]),
        ('He said "Quarterly review," and \'it isn\'t so\', “abc”, “ab”', "en",
         [("quoted", one) for one in ("Quarterly review", "it isn't so", "abc")]),
        ("„Hallo Welt“ »und so« «oui non»", "de", [("quoted", one) for one in ("Hallo Welt", "und so", "oui non")]),
        ("The students' room, the teachers' desk, 'tis rock 'n' roll, 5\" x 7\"", "en", n(5, 7)),
        ('"Room 12" is one, "4 and 5" two, "42" a number', "en", [("quoted", "Room 12"), *n(4, 5, 42)]),
        ("１２ and ٣", "en", n(12, 3)),
    ],
)  # fmt: skip
def test_atoms_are_read_by_kind_and_value(text: str, locale: str, atoms: list[tuple[str, object]]) -> None:
    assert said(text, locale) == atoms


def test_only_numbers_that_count_a_list_are_left_out() -> None:
    assert said("1. Eggs\n2) Milk 4\n- 3. Rye") == n(4)
    assert said("1. Eggs\n7. Milk") == n(7)
    assert said("42. is the answer") == n(42)
    assert [atom.value for atom in typed_atoms("1. Eggs", "en")] == [1]


def test_declared_texts_are_atoms_in_either_case_at_the_edges_of_words() -> None:
    declared = ("Blue Harbour", "Harbour", "open", "Gate 12", "42")
    assert said("OPEN: blue harbour, reopened, Gate 12 or 42", "en", declared) == [
        ("declared", "open"), ("declared", "Blue Harbour"), ("declared", "Gate 12"), *n(42),
    ]  # fmt: skip
    assert said("Straße offen", "de", ("offen",)) == [("declared", "offen")]


def test_more_digits_than_any_number_has_are_an_id() -> None:
    assert said("9" * 40) == n("9" * 40)
    assert said("9" * 41) == [("id", "9" * 41)]


def formatted(value: Decimal, locale: str) -> str:
    thousands, point = MARKS[locale]
    whole, _, decimals = f"{abs(value):f}".partition(".")
    groups = re.findall(r"\d{1,3}", whole[::-1])
    text = thousands.join(group[::-1] for group in reversed(groups)) + (point + decimals if decimals else "")
    return ("−" if value < 0 else "") + text


decimals = st.decimals(min_value=-(10**12), max_value=10**12, places=2, allow_nan=False)
whole = st.integers(min_value=-(10**15), max_value=10**15).map(Decimal)


@pytest.mark.parametrize("locale", LOCALES)
@settings(max_examples=60, deadline=None)
@given(value=decimals | whole)
def test_numbers_as_a_locale_writes_them_are_read_back(locale: str, value: Decimal) -> None:
    assert said(f"x {formatted(value, locale)} kg.", locale) == [("number", value)]


@pytest.mark.parametrize("locale", LOCALES)
@settings(max_examples=40, deadline=None)
@given(day=st.dates(min_value=datetime.date(1000, 1, 1)), moment=st.times())
def test_dates_and_times_as_a_locale_writes_them_are_read_back(
    locale: str, day: datetime.date, moment: datetime.time
) -> None:
    name = NAMES[locale].split()[day.month - 1]
    joint = " de " if locale in ("es", "pt") else " "
    number = f"{day.day}." if locale in ("de", "nb") else str(day.day)
    figures = f"{day.month}/{day.day}/{day.year}" if locale == "en" else f"{day.day:02}/{day.month:02}/{day.year}"
    for text in (f"{number}{joint}{name}{joint}{day.year}", day.isoformat(), figures):
        assert said(f"x {text}, {moment:%H:%M}.", locale) == [
            ("date", (day.year, day.month, day.day)), ("time", (moment.hour, moment.minute)),
        ]  # fmt: skip


def naive(text: str) -> list[object]:
    """Word by word: an ISO date, or what Python's own number is."""
    found: list[object] = []
    for word in text.split(" "):
        word = word.strip(".,;:!?()")
        try:
            if re.fullmatch(r"\d{4}-\d\d-\d\d", word):
                found.append(tuple(datetime.date.fromisoformat(word).timetuple()[:3]))
            else:
                found.append(Decimal(word.replace(",", "")))
        except ArithmeticError:
            continue
    return found


plain_words = st.sampled_from(
    ["the", "order", "of", "Anna", "has", "costs", "then", "(about)", "over,", "again;", "please"]
)
plain_atoms = (
    st.integers(-9999, 10**7).map(lambda v: f"{v:,}")
    | st.decimals(0, 1000, places=2, allow_nan=False).map(str)
    | st.dates(min_value=datetime.date(1000, 1, 1)).map(str)
)
sentences = st.lists(plain_words | plain_atoms, min_size=1, max_size=12).map(lambda words: " ".join([*words, "x."]))


@settings(max_examples=200, deadline=None)
@given(sentences)
def test_simple_sentences_read_as_a_naive_reader_reads_them(text: str) -> None:
    assert [value for _, value in said(text)] == naive(text)


rich = st.sampled_from(
    ["It is 12.5 km.", "See EV-12345 on 12 March 2026.", 'He said "Quarterly review".', "At 14:30, not 3 pm!", "Hello.",
     "Mail a@b.org.", "Go to https://a.b/c now.", "Blue Harbour is open.", "“Room 12” costs $1,234.50.", "Why 7?"]
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(rich, max_size=8), st.randoms(), st.sampled_from("\n "))
def test_the_order_of_sentences_changes_no_atom(texts: list[str], random: random.Random, joint: str) -> None:
    shuffled = random.sample(texts, len(texts))
    one, other = (Counter(said(joint.join(order), "en", ("Blue Harbour",))) for order in (texts, shuffled))
    assert one == other


@settings(max_examples=200, deadline=None)
@given(st.lists(rich, min_size=1, max_size=5), st.data())
def test_quotation_marks_never_make_an_answers_claims_fewer(texts: list[str], data: st.DataObject) -> None:
    words = re.sub('["“”]', "", " ".join(texts)).split(" ")
    start = data.draw(st.integers(0, len(words) - 1))
    end = data.draw(st.integers(start + 1, len(words)))
    quoted = " ".join([*words[:start], "“" + " ".join(words[start:end]) + "”", *words[end:]])
    assert len(atoms_in(quoted)) >= len(atoms_in(" ".join(words)))


PIECES = "0123456789.,:-/ \n\"'“”«»aeMTZ@_+%$−\u202f\x00hpm)(é"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from(PIECES) | st.characters(), max_size=60), st.sampled_from(LOCALES))
def test_spans_are_those_of_the_text_in_order_and_apart(text: str, locale: str) -> None:
    normal, reached = unicodedata.normalize("NFC", text), 0
    for atom in atoms_in(text, locale, ("a", "12")):
        assert isinstance(atom, Atom) and normal[slice(*atom.span)] == atom.text and atom.span[0] >= reached
        assert isinstance(hash(atom.value), int)
        reached = atom.span[1]


HOSTILE = [
    "1", "a", "a-", "1.", "1,", "1-", "1:", "a1", "a@", "'a", ' "a', "«abc", " “ab", " 'ab ", "1 ", "12 M", "March ",
    "2026-", "http://a)", "\n1. ", "1.1/", "1e", "1 000 ", "e\u0301", "www.a", "A-1-", "5 am", "à 1", "a.com.", ")",
]  # fmt: skip


@pytest.mark.parametrize("locale", ["en", "fr"])
def test_no_text_of_100_kb_takes_a_second(locale: str) -> None:
    for part in HOSTILE:
        text = (part * 100_000)[:100_000] + "!"
        start = time.process_time()
        atoms_in(text, locale, ("ab", "12"))
        assert time.process_time() - start < 1, part
