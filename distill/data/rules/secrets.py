"""Secrets and personal data in a text, by kind and count. What was found is never returned.

A pattern runs only where its literal part occurs, and none backtracks: every repetition is of one class of characters
and bounded by what may follow it. Numbers that carry a check are checked: cards (Luhn), IBANs (mod 97).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from ipaddress import AddressValueError, IPv4Address
from typing import NamedTuple

from distill.data.teacher.spec import KEY_VARIABLES

SECRET_VARIABLES = (*KEY_VARIABLES, "HF_TOKEN")
"""Environment variables whose values are secrets wherever they stand."""


class Detector(NamedTuple):
    """A pattern; what a text must hold for it to be tried, one of some literals or a quick pattern; and what a match
    must pass."""

    hint: tuple[str, ...] | re.Pattern[str]
    pattern: re.Pattern[str]
    holds: Callable[[str], bool] = bool

    def count(self, text: str) -> int:
        """How often a text holds what it detects."""
        return sum(self.holds(match[0]) for match in self.pattern.finditer(text))


def _hinted(hint: tuple[str, ...] | re.Pattern[str], text: str) -> bool:
    if isinstance(hint, tuple):
        for literal in hint:  # runs for every text of a dataset: no generator  # noqa: SIM110
            if literal in text:
                return True
        return False
    return hint.search(text) is not None


def secret_in(text: str) -> str | None:
    """The kind of the first secret found in a text, or None."""
    plain = _unescaped(text)
    for kind, detector in SECRETS.items():
        if _hinted(detector.hint, plain) and detector.count(plain):
            return kind
    for name in SECRET_VARIABLES:
        if len(key := os.environ.get(name, "")) >= _SHORTEST_KEY and key in text:
            return f"value of {name}"
    return None


def personal_in(text: str) -> dict[str, int]:
    """How often each kind of personal data occurs in a text."""
    hinted = {hint for hint in _PERSONAL_HINTS if _hinted(hint, text)}
    counts = {kind: detector.count(text) for kind, detector in PERSONAL.items() if detector.hint in hinted}
    return {kind: n for kind, n in counts.items() if n}


def _unescaped(text: str) -> str:
    """Line breaks and quotes of JSON within JSON as spaces: an `n` before a key would hide where it begins."""
    return re.sub(r'\\[nrt"]', " ", text) if "\\" in text else text


def _has_digit(text: str) -> bool:
    return any(map(str.isdigit, text))


_PLACEHOLDER = re.compile(
    r"(?:your|my|the|new|old|some|super|strong|db|user|username|root|admin|test|example|dummy|fake|sample|secure|secret|"
    r"pass|password|passwd|pwd|passphrase|passcode|key|token|api|here|change|me|value|string|foo|bar|baz|x)*"
)
_NO_SECRET = re.compile(
    r"(?:sha|md|base|utf|u?int|float|str|char|varchar|bcrypt|argon|pbkdf|aes|hmac|step|part|v)[-_]?\d+[a-z]{0,2}"
)


def _assigned(text: str) -> bool:
    """Whether what is given to a name such as `password` can be one: letters and digits, no type, placeholder or
    expression of code."""
    value = re.split(r"(?::=|=>|[:=])\*{0,2}", text, maxsplit=1)[1].strip()
    quoted, value = value[:1] in "\"'`", value.strip("\"'`")
    lower = value.lower()
    if not (any(map(str.isdigit, value)) and any(map(str.isalpha, value))) or _NO_SECRET.fullmatch(lower):
        return False
    if not quoted and re.match(r"[.~]?/", value):
        return False  # a path: PWD is a folder, too
    if not quoted and re.fullmatch(r"[A-Za-z_]\w*(?:[._]\w+)+", value):
        return False  # a variable
    return not _PLACEHOLDER.fullmatch(re.sub(r"[^a-z]", "", lower))


_SHORTEST_KEY = 8
_KEY = r"(?<![A-Za-z0-9_-])"
SECRETS: dict[str, Detector] = {
    "API key": Detector(("sk-", "pk-", "rk-"), re.compile(_KEY + r"[spr]k-[A-Za-z0-9_-]{20,}"), _has_digit),
    "Stripe key": Detector(("k_live_", "k_test_"), re.compile(_KEY + r"[spr]k_(?:live|test)_[A-Za-z0-9]{16,}")),
    "AWS key id": Detector(("AKIA", "ASIA"), re.compile(r"\bA[KS]IA[0-9A-Z]{16}\b")),
    "GitHub token": Detector(
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})"),
    ),
    "GitLab token": Detector(("glpat-",), re.compile(r"\bglpat-[A-Za-z0-9_-]{20,}")),
    "Hugging Face token": Detector(("hf_",), re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")),
    "Slack token": Detector(
        ("xox", "hooks.slack.com/"),
        re.compile(r"\bxox[abeprs]-[A-Za-z0-9-]{10,}|hooks\.slack\.com/services/[A-Za-z0-9/]{20,}"), _has_digit,
    ),
    "Google API key": Detector(("AIza",), re.compile(r"\bAIza[0-9A-Za-z_-]{35}")),
    "npm token": Detector(("npm_",), re.compile(r"\bnpm_[A-Za-z0-9]{36}\b")),
    "PyPI token": Detector(("pypi-",), re.compile(r"\bpypi-[A-Za-z0-9_-]{50,}")),
    "SendGrid key": Detector(("SG.",), re.compile(r"\bSG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}")),
    "Telegram token": Detector((":AA",), re.compile(r"\b\d{8,10}:AA[A-Za-z0-9_-]{33}")),
    "JSON web token": Detector(
        ("eyJ",), re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}")
    ),
    "private key": Detector(
        ("PRIVATE KEY",), re.compile(r"-----BEGIN (?:[A-Z]{2,9} ){0,2}PRIVATE KEY(?: BLOCK)?-----")
    ),
    "bearer token": Detector(("earer ",), re.compile(r"\b[Bb]earer [A-Za-z0-9._~+/=-]{20,}"), _has_digit),
    "password in a URL": Detector(
        ("://",), re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>{}]{1,64}:[^\s/:@\"'<>{}]{3,64}@[A-Za-z0-9\[]")
    ),
    "AWS secret key": Detector(
        ("ecret", "ECRET"),
        re.compile(
            r"(?i:aws_?secret_?(?:access_?)?key|secret_?access_?key)[\"'`]?\s{0,4}(?::=|=>|[:=])\s{0,4}[\"'`]?"
            r"[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])"
        ),
    ),
    "password": Detector(
        ("assword", "ASSWORD", "asswd", "ASSWD", "assphrase", "ASSPHRASE", "asscode", "pwd", "PWD"),
        re.compile(
            r"(?i:passwor[dt]|passwd|passphrase|passcode|pwd)[\"'`]?(?:\s(?:is|was))?\*{0,2}\s{0,4}(?::=|=>|[:=])\*{0,2}\s{0,4}"
            r"(?:[\"'`][^\s\"'`<>{}$\\]{6,64}[\"'`]|[^\s\"'`<>(){}\[\]$|,;\\]{6,64}(?![\w(\[]))"
        ),
        _assigned,
    ),
    "assigned key": Detector(
        ("ecret", "ECRET", "oken", "OKEN", "pi_key", "PI_KEY", "pi-key", "pikey", "piKey", "ccess_key", "ACCESS_KEY"),
        re.compile(
            r"(?i:secret|secret[_-]?key|(?:auth|access|api|refresh|bearer)[_-]?token|api[_-]?key|access[_-]?key)"
            r"[\"'`]?\s{0,4}(?::=|=>|[:=])\s{0,4}"
            r"(?:[\"'`][A-Za-z0-9/+=_.-]{16,200}[\"'`]|[A-Za-z0-9/+=_-]{16,200}(?![\w(\[.]))"
        ),
        _assigned,
    ),
}  # fmt: skip


def _luhn(text: str) -> bool:
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [sum(divmod(2 * d, 10)) for d in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _iban(text: str) -> bool:
    """ISO 13616: the first four characters moved to the end, letters as 10 to 35, modulo 97 is 1."""
    compact = text.replace(" ", "")
    if len(compact) != _IBAN_LENGTHS.get(compact[:2]):
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def _public_address(text: str) -> bool:
    try:
        return IPv4Address(text).is_global
    except AddressValueError:
        return False


def _mail(text: str) -> bool:
    """Not of a domain kept for examples (RFC 2606)."""
    domain = text.rpartition("@")[2].lower().rstrip(".")
    return domain.rpartition(".")[2] not in _NO_DOMAINS and not re.search(r"(?:^|\.)example\.(?:com|net|org)$", domain)


def _phone(text: str) -> bool:
    """8 to 15 digits (E.164), and not of the range kept for fiction, 555-01xx."""
    digits = re.sub(r"\D", "", text)
    return 8 <= len(digits) <= 15 and "55501" not in digits[-7:]


def _ssn(text: str) -> bool:
    area, group, serial = text.split("-")
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


_NO_DOMAINS = {"example", "test", "invalid", "localhost", "local"}
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SD": 18,
    "SE": 24, "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22,
    "VG": 24, "XK": 20,
}  # fmt: skip
_SEVEN_DIGITS = re.compile(r"[0-9](?:[ .()-]{0,2}[0-9]){6}")  # so many has every number below but an address
PERSONAL: dict[str, Detector] = {
    "e-mail address": Detector(
        ("@",),
        re.compile(r"(?<![\w.+%-])[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,5}"),
        _mail,
    ),
    "phone number": Detector(
        _SEVEN_DIGITS,
        re.compile(
            r"(?<![\w.+-])(?:\+\d{1,3}(?:[ .()-]{0,2}\d{2,4}){2,5}|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}([.-])\d{3}\1\d{4})"
            r"(?![\w-])"
        ),
        _phone,
    ),
    "IBAN": Detector(_SEVEN_DIGITS, re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban),
    "card number": Detector(
        _SEVEN_DIGITS, re.compile(r"(?<![\w.+-])[2-6]\d{3}(?:[ -]?\d{3,6}){2,4}(?![\w-]|\.\d)"), _luhn
    ),
    "social security number": Detector(_SEVEN_DIGITS, re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])"), _ssn),
    "public IP address": Detector(
        re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]"),
        re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)"),
        _public_address,
    ),
}  # fmt: skip
_PERSONAL_HINTS = {detector.hint for detector in PERSONAL.values()}
