"""Does a text hold a secret, however it is written, or data that look private?

A secret and a text are compared as letters and digits alone: NFKC, casefolded, all else left out, so that neither
spaces, hyphens, zero-width characters nor full-width letters hide it. Hidden forms of a text are decoded, whatever they
hold, and looked into as well: JSON and percent escapes, HTML entities, hexadecimal, base64 at every offset (standard or
URL-safe alphabet, padded or not), two of these one in the other, and each backwards.
"""

from __future__ import annotations

import base64
import functools
import html
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from urllib.parse import unquote

from distill.data.rules.secrets import PERSONAL, SECRETS

SHORTEST_SECRET = 6
"""Letters and digits: shorter ones stand in a text by chance."""
_DEPTH = 2
_NOT_PLAIN = re.compile(r"[\W_]+")
_ESCAPE = re.compile(r"\\(?:u\{([0-9a-fA-F]{1,6})\}|u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|([nrtbf/\"'\\]))")
_HEX_MARK = re.compile(r"0x|\\x|\\u00|&#x|%", re.I)
_HEX_RUN = re.compile(r"[0-9a-fA-F]{12,}")
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/=]+")
_BASE64_RUN = re.compile(r"[A-Za-z0-9+/]{8,}")
_MEANT = re.compile(r"[A-Za-z0-9+/_=%&;\\-]{8}")


def leaks(value: str, text: str) -> bool:
    """Whether a text gives a secret away. ValueError where the secret is too short to be told from chance."""
    secret = plain(value)
    if len(secret) < SHORTEST_SECRET:
        raise ValueError(f"a secret has at least {SHORTEST_SECRET} letters and digits: {value!r}")
    backwards = secret[::-1]
    return any(secret in view or backwards in view for view in _views(text))


def private_data(text: str, allow: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(detector, excerpt) of payment cards (Luhn, an issuer's prefix and length), IBANs (ISO 13616: length of the
    country, mod 97) and keys of known forms. `allow`: values that may be said, in any writing; a key that ends with
    one, such as `password: ...`, may be said, too."""
    found: list[tuple[str, str]] = []
    clean = _visible(text)
    if len(_DIGIT.findall(clean)) >= _FEWEST_DIGITS:
        rest = clean
        for start, end in _ibans(clean):
            found.append(("IBAN", clean[start:end]))
            rest = rest[:start] + " " * (end - start) + rest[end:]
        found += [("card number", number) for number in _cards(rest)]
    found += _keys(text)
    allowed = [plain(one) for one in allow]
    allowed = [one for one in allowed if len(one) >= SHORTEST_SECRET]
    return [(kind, excerpt) for kind, excerpt in dict.fromkeys(found) if not _may(kind, plain(excerpt), allowed)]


def plain(text: str) -> str:
    """Letters and digits alone, casefolded, in the form NFKC."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _NOT_PLAIN.sub("", folded)


@functools.lru_cache(maxsize=64)
def _views(text: str) -> tuple[str, ...]:
    """A text and what it hides, each as `plain` gives it. Cached: several secrets are looked for in one text."""
    views, texts = dict.fromkeys([text]), [text]
    for _ in range(_DEPTH):
        hidden = {form: None for one in texts for form in _decoded(one) if form not in views}
        views |= hidden
        texts = [form for form in hidden if _MEANT.search(form)]  # others are noise, and hide nothing further
    return tuple(dict.fromkeys(map(plain, views)))


def _decoded(text: str) -> Iterator[str]:
    """A text read in each hidden form. Decoding tells nothing of where a form begins: what is not one is noise."""
    seen = _unescaped(text)
    if seen != text:
        yield seen
    for one in dict.fromkeys((text, seen)):
        digits = _NOT_PLAIN.sub("", _HEX_MARK.sub("", one))
        for run in _HEX_RUN.findall(digits):
            for start in (0, 1):
                yield _text(bytes.fromhex(run[start : len(run) - (len(run) - start) % 2]))
        standard = one.replace("-", "+").replace("_", "/")
        for letters in dict.fromkeys(_NOT_BASE64.sub("", form) for form in (standard, one)):
            for run in _BASE64_RUN.findall(letters):
                for start in range(4):
                    part = run[start:]
                    part = part[: len(part) - (len(part) % 4 == 1)]
                    yield _text(base64.b64decode(part + "=" * (-len(part) % 4)))


def _unescaped(text: str) -> str:
    """Without escapes of JSON, URLs and HTML."""
    if "\\" in text:
        text = _ESCAPE.sub(_character, text)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")  # pairs of \ud83d\ude00
    if "%" in text:
        text = unquote(text, errors="ignore")
    return html.unescape(text) if "&" in text else text


def _character(match: re.Match[str]) -> str:
    if match[4]:
        return match[4] if match[4] in "/\"'\\" else " "
    code = int(match[1] or match[2] or match[3], 16)
    return chr(code) if code <= 0x10FFFF else ""


def _text(data: bytes) -> str:
    return data.decode("utf-8", "ignore")


_DIGIT = re.compile(r"[0-9]")
_FEWEST_DIGITS = 8
"""Of an IBAN: words that pass its check by chance have fewer."""
_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]+")
_DASH = re.compile(r"[\u2010-\u2015\u2212]")
_IBAN_START = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?=[ .-]?[A-Za-z0-9])")
_IBAN_LENGTHS = range(15, 34)
_IBAN_REST = re.compile(r"(?:[ .-]?[A-Za-z0-9]){11,30}+")
_CARD = re.compile(r"(?<![\w.+-])[2-6][0-9]{2,18}+(?!\w)(?:[ .-][0-9]{3,6}(?!\w)){0,8}+")
_GROUP = re.compile(r"[0-9]+")
_KEYS = tuple((kind, one, one.hint if isinstance(one.hint, tuple) else ()) for kind, one in SECRETS.items())
_HINTS = tuple({hint for _, _, hints in _KEYS for hint in hints})
_ISSUERS: tuple[tuple[re.Pattern[str], frozenset[int]], ...] = tuple(
    (re.compile(prefix), frozenset(lengths))
    for prefix, lengths in (
        ("4", (13, 16, 19)),  # Visa
        ("5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720", (16,)),  # Mastercard
        ("3[47]", (15,)),  # American Express
        ("30[0-5]|3[689]", (14, 16, 19)),  # Diners Club
        ("6011|64[4-9]|65", (16, 19)),  # Discover
        ("62", (16, 17, 18, 19)),  # UnionPay
        ("35(?:2[89]|[3-8])", (16, 19)),  # JCB
        ("5018|5020|5038|5893|6304|6759|676[1-3]", (13, 14, 15, 16, 17, 18, 19)),  # Maestro
    )
)
"""Prefix and lengths: ISO/IEC 7812 and the networks' published ranges."""


def _visible(text: str) -> str:
    return _DASH.sub("-", _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)))


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    """Spans, in order and apart. A word may follow: the country's length says where the number ends."""
    reached = 0
    for match in _IBAN_START.finditer(text):
        rest = _IBAN_REST.match(text, match.end())
        if rest is None or match.start() < reached:
            continue
        ends = [i + 1 for i in range(match.start(), rest.end()) if text[i].isalnum()]
        compact = re.sub("[ .-]", "", text[match.start() : rest.end()]).upper()
        for length in _IBAN_LENGTHS:
            number = compact[:length]
            if (
                len(number) == length
                and PERSONAL["IBAN"].holds(number)
                and len(_DIGIT.findall(number)) >= _FEWEST_DIGITS
            ):
                reached = ends[length - 1]
                if not text[reached : reached + 1].isalnum():
                    yield match.start(), reached
                break


def _cards(text: str) -> Iterator[str]:
    """Numbers of groups that follow each other, from any group on."""
    for match in _CARD.finditer(text):
        groups = list(_GROUP.finditer(match[0]))
        first = 0
        while first < len(groups):
            ends = range(len(groups) - 1, first - 1, -1)  # the longest: the beginning of a card may pass for one
            runs = ((match[0][groups[first].start() : groups[last].end()], last) for last in ends)
            excerpt, last = next(((run, last) for run, last in runs if _is_card(run)), ("", first))
            if excerpt:
                yield excerpt
            first = last + 1


def _is_card(text: str) -> bool:
    digits = re.sub("[^0-9]", "", text)
    issued = any(prefix.match(digits) and len(digits) in lengths for prefix, lengths in _ISSUERS)
    return issued and PERSONAL["card number"].holds(digits)


def _keys(text: str) -> Iterator[tuple[str, str]]:
    for one in dict.fromkeys((text, _unescaped(text))):
        known = {hint for hint in _HINTS if hint in one}
        for kind, detector, hints in _KEYS:
            if not hints or not known.isdisjoint(hints):
                yield from ((kind, match[0]) for match in detector.pattern.finditer(one) if detector.holds(match[0]))


def _may(kind: str, excerpt: str, allowed: Iterable[str]) -> bool:
    return any(excerpt == one or (kind in SECRETS and excerpt.endswith(one)) for one in allowed)
