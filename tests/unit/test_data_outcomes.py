"""The table of what an exchange means, over the bodies and headers that providers really send."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.teacher.outcomes import LONGEST_WAIT, judge
from distill.data.teacher.wire import Exchange

NOW = 1_760_000_000.0  # Thu, 09 Oct 2025 08:53:20 GMT
ANSWER = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}
USAGE = {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}


def verdict(status: int, body: Any = b"", headers: dict[str, str] | None = None, problem: str = "",
            sent: bool = True) -> Any:  # fmt: skip
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return judge(Exchange(status, headers or {}, data, problem, sent), NOW)


def error(message: str = "", **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, **more}}


def test_an_answer_is_settled_where_its_usage_is_known() -> None:
    outcome = verdict(200, ANSWER | USAGE)
    assert outcome[:4] == ("answer", None, "settle", "") and outcome.reply.content == "hi"
    outcome = verdict(200, ANSWER)
    assert outcome[:3] == ("answer", None, "keep") and outcome.reply.usage is None
    assert verdict(200, ANSWER | {"usage": {"prompt_tokens": -1, "completion_tokens": 1}}).charge == "keep"


@pytest.mark.parametrize(
    ("status", "body", "kind", "charge"),
    [
        (400, error("bad"), "dead", "release"), (404, error("no such model"), "dead", "release"),
        (413, b"<html>too large</html>", "dead", "release"), (422, {"detail": [{"msg": "x"}]}, "dead", "release"),
        (401, error("bad key"), "refused", "release"), (403, b"", "refused", "release"),
        (301, b"", "refused", "release"), (307, b"", "refused", "release"), (101, b"", "refused", "release"),
        (402, error("Insufficient Balance"), "quota", "release"),
        (408, b"", "retry", "keep"), (409, b"", "retry", "release"), (425, b"", "retry", "release"),
        (429, b"", "cooldown", "release"), (429, error("Rate limit reached"), "cooldown", "release"),
        (499, b"", "retry", "keep"), (500, error("boom"), "retry", "release"), (501, b"", "retry", "release"),
        (502, b"<html>Bad Gateway</html>", "retry", "keep"), (503, b"", "retry", "release"),
        (504, b"", "retry", "keep"),
        (503, error("The model is overloaded"), "cooldown", "release"),
        (500, error("Overloaded", type="engine_overloaded"), "cooldown", "release"),
        (520, b"", "retry", "keep"), (521, b"", "retry", "release"), (524, b"", "retry", "keep"),
        (529, error("Overloaded", type="overloaded_error"), "cooldown", "release"),
        (999, b"", "retry", "release"), (204, b"", "retry", "keep"),
        (200, b"not json", "retry", "keep"), (200, {"choices": []}, "retry", "keep"), (200, [], "retry", "keep"),
        (200, error("upstream failed", code=502), "retry", "keep"), (200, {"error": "busy"}, "retry", "keep"),
        (200, error("Rate limit exceeded", code="rate_limit_exceeded"), "cooldown", "keep"),
        (200, error("slow down", code=429), "cooldown", "keep"), (200, error("bad", code=400), "dead", "keep"),
        (200, error("no money", code="insufficient_quota"), "quota", "keep"),
        (200, ANSWER | {"error": None} | USAGE, "answer", "settle"),
    ],
)  # fmt: skip
def test_every_status_has_its_row(status: int, body: Any, kind: str, charge: str) -> None:
    outcome = verdict(status, body)
    assert (outcome.kind, outcome.charge) == (kind, charge)
    assert (outcome.reply is not None) == (kind == "answer")
    assert kind == "answer" or outcome.detail


@pytest.mark.parametrize(
    "body",
    [
        error("You exceeded your current quota, please check your plan and billing details.", type="insufficient_quota",
              code="insufficient_quota"),  # OpenAI
        error("Your account is suspended, please check your plan and billing details",
              type="exceeded_current_quota_error"),  # Moonshot
        error("You exceeded your current token quota: 0, please check your account balance",
              type="exceeded_current_quota_error"),
        error("Insufficient Balance"),  # DeepSeek
        error("Your credit balance is too low", type="rate_limit_error"),  # Anthropic
    ],
)  # fmt: skip
def test_a_used_up_quota_is_no_rate_limit(body: Any) -> None:
    assert verdict(429, body)[:3] == ("quota", None, "release")
    assert verdict(200, body)[:3] == ("quota", None, "keep")


def test_a_quota_a_minute_is_a_rate_limit() -> None:
    google = error("You exceeded your current quota. Please retry in 17.5s.", status="RESOURCE_EXHAUSTED", details=[
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "17s"}])  # fmt: skip
    assert verdict(429, google)[:3] == ("cooldown", 17.0, "release")
    assert verdict(429, error("engine overloaded", type="engine_overloaded_error"))[:2] == ("cooldown", None)


def test_words_of_the_prompt_in_a_400_are_no_quota() -> None:
    assert verdict(400, error("invalid message: 'my billing quota exceeded'")).kind == "dead"
    assert verdict(400, error("Your credit balance is too low to access the API")).kind == "quota"


@pytest.mark.parametrize(
    ("headers", "body", "wait"),
    [
        ({"retry-after": "3"}, b"", 3.0), ({"retry-after": "0.5"}, b"", 0.5), ({"retry-after": "-4"}, b"", 0.0),
        ({"retry-after": " 7 "}, b"", 7.0), ({"retry-after": "soon"}, b"", None), ({"retry-after": "nan"}, b"", None),
        ({"retry-after": "inf"}, b"", None), ({"retry-after": ""}, b"", None), ({"retry-after": "5s"}, b"", 5.0),
        ({"retry-after": "Thu, 09 Oct 2025 08:53:30 GMT"}, b"", 10.0),
        ({"retry-after": "Thursday, 09-Oct-25 08:53:30 GMT"}, b"", 10.0),
        ({"retry-after": "Thu Oct  9 08:53:30 2025"}, b"", 10.0),
        ({"retry-after": "Wed, 08 Oct 2025 08:53:30 GMT"}, b"", 0.0),
        # our clock is a day slow, or the server's an hour fast: only the difference of its own two dates counts
        ({"retry-after": "Fri, 10 Oct 2025 09:00:05 GMT", "date": "Fri, 10 Oct 2025 09:00:00 GMT"}, b"", 5.0),
        ({"retry-after": "Thu, 09 Oct 2025 08:00:05 GMT", "date": "Thu, 09 Oct 2025 08:00:00 GMT"}, b"", 5.0),
        ({"retry-after-ms": "250", "retry-after": "1"}, b"", 0.25),
        ({"retry-after-ms": "x", "retry-after": "1"}, b"", 1.0),
        ({"x-ratelimit-reset-requests": "120ms", "x-ratelimit-reset-tokens": "6m0s"}, b"", 0.12),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-remaining-requests": "59",
          "x-ratelimit-reset-tokens": "6m0s", "x-ratelimit-remaining-tokens": "0"}, b"", 360.0),
        ({"x-ratelimit-reset-tokens": "7.66s"}, b"", 7.66), ({"x-ratelimit-reset": "1h2m3s"}, b"", None),
        ({"x-ratelimit-reset": "12"}, b"", 12.0), ({"x-ratelimit-reset": str(int(NOW) + 9)}, b"", 9.0),
        ({"x-ratelimit-reset": str(int(NOW) * 1000 + 1500)}, b"", 1.5), ({"ratelimit-reset": "4"}, b"", 4.0),
        ({"anthropic-ratelimit-requests-reset": "2025-10-09T08:53:40Z"}, b"", 20.0),
        ({"x-ratelimit-limit-requests": "9"}, b"", None),
        ({}, {"retry_after": 2.5}, 2.5), ({}, error("slow", retry_after=4), 4.0),
        ({}, error("slow", retry_after="4s"), None),
        ({}, error("slow", retry_after=True), None), ({}, error("slow", retry_after_ms=1500), 1.5),
        ({}, error("Rate limit reached for m. Limit 3, Used 3. Please try again in 20s. Visit 7"), 20.0),
        ({}, error("Please try again in 6ms."), 0.006), ({}, error("Please try again in 1m2.5s"), 62.5),
        ({}, error("max RPM: 3, please try again after 1 seconds"), 1.0),
        ({}, error("Please retry after 6 seconds. Please go to 2"), 6.0), ({}, error("Please wait 3 minutes"), 180.0),
        ({}, error("Please try again in 2 milliseconds"), 0.002),
        ({}, error("x", metadata={"headers": {"X-RateLimit-Reset": str(int(NOW) * 1000 + 3000)}}), 3.0),
        ({"retry-after": "1"}, error("try again in 20s"), 1.0),
    ],
)  # fmt: skip
def test_a_wait_is_understood_in_its_forms(headers: dict[str, str], body: Any, wait: float | None) -> None:
    outcome = verdict(429, body, headers)
    if headers == {"x-ratelimit-reset": "1h2m3s"}:
        assert outcome[:2] == ("quota", LONGEST_WAIT)
    else:
        assert outcome.kind == "cooldown" and outcome.wait == (None if wait is None else pytest.approx(wait, abs=1e-6))


def test_who_asks_for_hours_has_put_up_a_wall() -> None:
    assert verdict(429, headers={"retry-after": "1800"})[:2] == ("cooldown", LONGEST_WAIT)
    assert verdict(429, headers={"retry-after": "1801"})[:2] == ("quota", LONGEST_WAIT)
    assert verdict(429, error("try again in 5h0m0s"))[:2] == ("quota", LONGEST_WAIT)


def test_the_state_of_limits_says_nothing_about_other_errors() -> None:
    headers = {"x-ratelimit-reset-tokens": "6m0s"}
    assert verdict(500, headers=headers)[:2] == ("retry", None)
    assert verdict(503, headers={"retry-after": "2"})[:2] == ("retry", 2.0)


@pytest.mark.parametrize(
    ("exchange", "charge"),
    [
        (Exchange(0, {}, b"", "cannot connect", False), "release"),
        (Exchange(0, {}, b"", "silent for 9 s", True), "keep"),
        (Exchange(200, {}, b"", "cut off", True), "keep"), (Exchange(500, {}, b"", "cut off", True), "keep"),
    ],
)  # fmt: skip
def test_what_may_have_been_generated_stays_charged(exchange: Exchange, charge: str) -> None:
    outcome = judge(exchange, NOW)
    assert (outcome.kind, outcome.charge) == ("retry", charge) and exchange.problem in outcome.detail


def test_details_are_one_short_line() -> None:
    assert (
        verdict(400, error("a\n b" * 1000)).detail.startswith("HTTP 400: a ba b")
        and len(verdict(400, b"x" * 9999).detail) <= 500
    )
    assert verdict(400, {"errors": [{"message": "first"}]}).detail == "HTTP 400: first"
    assert verdict(400, {"object": "error", "message": "vllm's", "code": 400}).detail == "HTTP 400: vllm's"
    assert verdict(422, {"detail": "fastapi's"}).detail == "HTTP 422: fastapi's"
    assert verdict(500, b"").detail == "HTTP 500"


wild = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["insufficient_quota", "429", "try again in 9" + "9" * 300 + "s", "1e99", "6m0s", "9" * 40]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["error", "errors", "message", "code", "type", "status", "details", "retryDelay", "metadata",
                         "headers", "retry_after", "choices", "detail"]), inner, max_size=4), max_leaves=12,
)  # fmt: skip
names = st.sampled_from(["retry-after", "retry-after-ms", "date", "x-ratelimit-reset", "x-ratelimit-reset-tokens",
                         "x-ratelimit-remaining-tokens", "anthropic-ratelimit-tokens-reset"])  # fmt: skip
values = st.text(max_size=30) | st.sampled_from(
    ["Thu, 01 Jan 0000 00:00:00 GMT", "Fri, 31 Dec 9999 23:59:59 -2359", "1e99", "-1e99", "9" * 30,
     "0001-01-01T00:00:00",
     "9999-12-31T23:59:59-23:59", "999999999999d", "nan", "Thu, 09 Oct 2025 08:53:30 -0000"])  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 1000) | st.sampled_from([0, 200, 400, 429, 500, 503]), st.dictionaries(names, values, max_size=4),
       wild.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=40), st.sampled_from(["", "cut off"]),
       st.booleans(), st.floats(0, 4e9))  # fmt: skip
def test_nothing_raises_and_every_wait_is_bounded(
    status: int, headers: dict[str, str], body: bytes, problem: str, sent: bool, now: float
) -> None:
    outcome = judge(Exchange(status, headers, body, problem, sent), now)
    assert outcome.wait is None or (math.isfinite(outcome.wait) and 0 <= outcome.wait <= LONGEST_WAIT)
    assert "\n" not in outcome.detail and len(outcome.detail) <= 500
    assert (outcome.charge == "settle") <= (outcome.kind == "answer")
    assert outcome == judge(Exchange(status, headers, body, problem, sent), now)


@pytest.mark.parametrize(
    "body",
    [b"[" * 1_000_000, b'{"error": ' * 100_000, b'{"error": {"message": "' + b"try again in " * 80_000 + b'"}}',
     b'{"error": {"message": "' + b"retry 1 m" * 110_000 + b'"}}', b" " * (300 << 20)],
)  # fmt: skip
def test_a_huge_error_is_judged_at_once(body: bytes) -> None:
    start = time.perf_counter()
    assert verdict(429, body).kind in ("cooldown", "quota")
    assert verdict(200, body[: 1 << 22]).kind in ("retry", "cooldown", "quota")
    assert time.perf_counter() - start < 1
