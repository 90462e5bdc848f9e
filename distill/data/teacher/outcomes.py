"""What an exchange with a teacher means: an answer, or what to do instead and what it may have cost. Pure.

|exchange|outcome|of the reservation|
|---|---|---|
|200 with an answer|answer|settle; keep where the server does not say what it used|
|200 that is malformed (MALFORMED) or breaks off|retry|keep: it may have been generated|
|200 that holds an error|as its code says, else retry|keep|
|no answer to a request that was sent; 408, 499, 502, 504, 520, 524|retry|keep|
|nothing was sent|retry|release|
|429, 529; 500 and 503 that speak of an overload|cooldown|release|
|402, a used-up quota, a wait beyond LONGEST_WAIT|quota|release|
|other 5xx, 409, 425|retry|release|
|401, 403, redirects|refused|release|
|other 4xx|dead|release|
"""

from __future__ import annotations

import email.utils
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import msgspec

from distill.data.teacher.wire import Exchange, Reply, ReplyError, read_reply

LONGEST_WAIT = 1800.0
"""Seconds; whoever asks for more has put up a wall, and the run pauses."""
MALFORMED = "malformed answer"
"""How the detail of a whole answer that cannot be read begins."""
Kind = Literal["answer", "retry", "cooldown", "quota", "refused", "dead"]
Charge = Literal["settle", "release", "keep"]
_LARGEST_ERROR = 1 << 20
_UNKNOWN_COST = {408, 499, 502, 504, 520, 524}  # a gateway gave up on a server that may have gone on
_WALL = re.compile(
    r"insufficient[_ ]?(?:quota|balance|credits?|funds)|exceeded_current_quota|credit balance|payment[_ ]required"
    r"|account (?:is )?(?:suspended|in arrears|deactivated)",
    re.IGNORECASE,
)
_QUOTA = re.compile(
    r"current (?:token )?quota|quota[_ ]exceeded|billing", re.IGNORECASE
)  # a wall unless it names a wait
_OVERLOAD = re.compile(r"rate[_ ]?limit|too many requests|overloaded", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d{1,15}(?:\.\d{0,9})?(?:e\d{1,2})?")
_PART = re.compile(
    r"(\d{1,12}(?:\.\d{1,9})?) ?(ms|milliseconds?|s|secs?|seconds?|m|mins?|minutes?|h|hours?|d|days?)(?![a-z])"
)
_UNITS = {"ms": 1e-3, "mi": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_ADVICE = re.compile(r"(?:try again|retry(?:ing)?|wait)(?: again)?(?: in| after| for|:)? {0,2}(\d[^,;()\n]{0,40})")
_RESET = re.compile(r"(?:x-)?ratelimit-reset(?:-[a-z-]{1,40})?|anthropic-ratelimit-[a-z-]{1,40}-reset")


class Outcome(NamedTuple):
    """What to do about one exchange."""

    kind: Kind
    """answer: `reply` is usable. retry: try again, an attempt is used. cooldown: everybody waits, no attempt is used.
    quota: pause the run. refused: the key or the URL is wrong, stop. dead: this request will never be answered."""
    wait: float | None
    """Seconds that the server asks for, 0 to LONGEST_WAIT; None where it does not say."""
    charge: Charge
    """Of the reservation: settle by `reply.usage`, release, or keep it as uncertain spend."""
    detail: str
    """One line."""
    reply: Reply | None = None
    """The answer, read."""


def judge(exchange: Exchange, now: float) -> Outcome:
    """Judge an exchange at `now`, seconds since 1970. Never raises."""
    status, problem = exchange.status, exchange.problem
    error = _error(exchange.body) if exchange.body and (status != 200 or problem) else None
    if status == 0:
        return Outcome("retry", None, "keep" if exchange.sent else "release", problem or "no answer")
    if 200 <= status < 300:
        if not problem:
            try:
                reply = read_reply(exchange.body)
            except ReplyError as unusable:
                problem, error = f"{MALFORMED}: {unusable}", _error_instead(exchange.body)
            else:
                return Outcome("answer", None, "keep" if reply.usage is None else "settle", "", reply)
        if error is None or not error.text:
            return Outcome("retry", None, "keep", problem)
        limits = _WALL.search(error.text) or _QUOTA.search(error.text) or _OVERLOAD.search(error.text)
        kind, wait = _refusal(error.code or (429 if limits else 500), error, exchange, now)
        return Outcome(kind, wait, "keep", f"an error with HTTP {status}: {error.line or problem}"[:500])
    error = error or _Error(None, "", {}, "")
    kind, wait = _refusal(status, error, exchange, now)
    charge: Charge = "keep" if status in _UNKNOWN_COST or (problem and status >= 500) else "release"
    return Outcome(kind, wait, charge, f"HTTP {status}: {error.line or problem}"[:500].rstrip(": "))


def _error_instead(body: bytes) -> _Error | None:
    """The error that stands where an answer should; not one in the words of a broken answer."""
    try:
        top = msgspec.json.decode(body if len(body) <= _LARGEST_ERROR else b"")
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None
    return _error(body) if isinstance(top, dict) and "choices" not in top else None


class _Error(NamedTuple):
    """What the body of a refusal says."""

    code: int | None
    """A status of HTTP, where its code is one."""
    text: str
    """Its type, code and message, to search in."""
    fields: Mapping[str, Any]
    line: str
    """For people."""


def _error(body: bytes) -> _Error | None:
    """The error in a body, in any of the forms in use; of another body its first words. Without a text: no error."""
    try:
        top = msgspec.json.decode(body if len(body) <= _LARGEST_ERROR else b"")
    except (msgspec.MsgspecError, RecursionError, ValueError):
        words = _words(body[:2000].decode(errors="replace"))
        return _Error(None, words, {}, words)
    if not isinstance(top, dict):
        return None
    error = top.get("error", top.get("errors", top.get("detail", top if "message" in top else None)))
    if not error:
        return _Error(None, "", top, "")
    if isinstance(error, list):
        error = error[0]
    if not isinstance(error, dict):
        error = {"message": error}
    named = [str(error[name]) for name in ("type", "code", "status", "message") if error.get(name) is not None]
    code = next((int(n) for n in named if re.fullmatch(r"[45]\d\d", n)), None)
    line = _words(str(error.get("message") or " ".join(named) or error))
    fields = {**top, **error} if error is not top else error
    return _Error(code, _words(" ".join(named)), fields, line)


def _refusal(status: int, error: _Error, exchange: Exchange, now: float) -> tuple[Kind, float | None]:
    """What a status and the words beside it mean, and how long to wait."""
    if status == 402 or (status in (400, 403, 429) and _WALL.search(error.text)):
        return "quota", None
    throttled = status in (429, 529) or (status in (500, 503) and bool(_OVERLOAD.search(error.text)))
    if throttled or status in (408, 409, 425, 499) or status >= 500:
        wait = _asked_wait(exchange.headers, error, now, limits=status == 429)
        if (wait is None and status == 429 and _QUOTA.search(error.text)) or (wait or 0) > LONGEST_WAIT:
            return "quota", None if wait is None else LONGEST_WAIT
        return "cooldown" if throttled else "retry", wait
    if status in (401, 403) or status < 400:
        return "refused", None
    return "dead", None


def _asked_wait(headers: Mapping[str, str], error: _Error, now: float, *, limits: bool) -> float | None:
    """Seconds to wait by whatever the server says about it, not negative, the most exact first. Dates count from the
    server's own, so that neither clock need be right. `limits`: whether the state of its limits is to blame."""
    here = _instant(headers.get("date", "")) or now
    found = (
        _number(headers.get("retry-after-ms"), 1e-3),
        _until(headers.get("retry-after", ""), here),
        _in_body(error, here),
        _reset(headers, here) if limits else None,
    )
    return next((max(wait, 0.0) for wait in found if wait is not None), None)


def _in_body(error: _Error, here: float) -> float | None:
    """A field such as retry_after, Google's retryDelay, OpenRouter's copy of the headers, or words in the message."""
    fields = error.fields
    for name, unit in (
        ("retry_after_ms", 1e-3),
        ("retry_after", 1.0),
        ("retryAfter", 1.0),
        ("retry_after_seconds", 1.0),
    ):
        if (wait := _number(fields.get(name), unit)) is not None:
            return wait
    details = fields.get("details")
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, dict) and (wait := _duration(str(detail.get("retryDelay", "")))) is not None:
            return wait
    metadata = fields.get("metadata")
    copied = metadata.get("headers") if isinstance(metadata, dict) else None
    if isinstance(copied, dict) and (wait := _reset({str(k).lower(): str(v) for k, v in copied.items()}, here)):
        return wait
    advice = _ADVICE.search(error.text.lower())
    return _duration(advice[1]) if advice else None


def _reset(headers: Mapping[str, str], here: float) -> float | None:
    """When the limit that is used up is reset; where none says that it is, the next reset of any."""
    resets, used_up = [], []
    for name, value in headers.items():
        if _RESET.fullmatch(name) and (wait := _until(value, here)) is not None:
            resets.append(wait)
            if _number(headers.get(name.replace("reset", "remaining"))) == 0:
                used_up.append(wait)
    return max(used_up) if used_up else min(resets, default=None)


def _until(value: str, here: float) -> float | None:
    """Seconds until a reset, given as a duration (6m0s), seconds, an instant in seconds or milliseconds, or a date."""
    number = _number(value)
    if number is not None:
        instant = number / 1e3 if number > 1e11 else number
        return instant - here if instant > 1e9 else number
    instant_of_date = _instant(value)
    return _duration(value) if instant_of_date is None else instant_of_date - here


def _number(value: object, unit: float = 1.0) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    text = str(value).strip()
    return float(text) * unit if _NUMBER.fullmatch(text) else None


def _duration(text: str) -> float | None:
    """Of `1m2.5s`, `20ms`, `3 seconds`: all its parts, up to the first other word."""
    total, end = 0.0, 0
    while part := _PART.match(text, end):
        total += float(part[1]) * (1e-3 if part[2].startswith(("ms", "milli")) else _UNITS[part[2][0]])
        end = part.end() + (text[part.end() : part.end() + 1] == " ")
    return total if end else _number(text.strip(" ."))


def _instant(text: str) -> float | None:
    """Seconds since 1970 of an HTTP or ISO date."""
    if not 10 <= len(text) <= 64:
        return None
    for parse in (email.utils.parsedate_to_datetime, datetime.fromisoformat):
        try:
            date = parse(text)
            return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
    return None


def _words(text: str) -> str:
    return " ".join(text.split())[:500]
