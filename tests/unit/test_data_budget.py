"""Reservations: the limit holds at every instant, whoever waits is served in order, sums are exact."""

from __future__ import annotations

import asyncio
import random
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.budget import UNIT, Budget, Limits, OutOfBudget, Prices, prompt_bound, usd
from distill.data.journal import Totals
from distill.data.schema import Usage

prices = st.decimals(0, 100, places=6).map(float)


@given(prices, prices, st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**7))
def test_a_cost_is_the_exact_product(price_in, price_out, prompt, cached, completion) -> None:
    made = Prices(price_in, price_out, price_in / 2 if price_in < 1 else None)
    cached = min(cached, prompt)
    rate = Decimal(repr(made.cached_input if made.cached_input is not None else price_in))
    exact = (
        (prompt - cached) * Decimal(repr(price_in)) + cached * rate + completion * Decimal(repr(price_out))
    ) / 10**6
    cost = made.cost(Usage(prompt, completion, 0, cached)) * UNIT
    # a price with more than six decimals is rounded up
    assert exact <= cost <= exact + (prompt + completion + 1) * UNIT


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3000),
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 100), st.booleans()), max_size=40),
    st.integers(0, 2**32),
)
def test_spent_and_reserved_never_pass_the_limit(limit, requests, seed) -> None:
    """Each request reserves, waits a little, and spends a part of what it reserved, all of it, or nothing."""
    draw = random.Random(seed)
    budget = Budget(Limits(tokens=limit), Totals())
    refused = 0

    async def one(tokens: int, share: int, drops: bool) -> None:
        nonlocal refused
        try:
            held = await budget.reserve(tokens, tokens * 3)
        except OutOfBudget:
            refused += 1
            return
        assert budget.spent.tokens + budget.reserved.tokens <= limit
        for _ in range(draw.randrange(4)):
            await asyncio.sleep(0)
        held.settle(None if drops else tokens * share // 100, None)
        held.settle(0, 0)  # a second time does nothing
        assert budget.spent.tokens + budget.reserved.tokens <= limit

    async def work() -> None:
        await asyncio.wait_for(asyncio.gather(*(one(*request) for request in requests)), 10)

    asyncio.run(work())
    assert budget.reserved == Totals() and budget.spent.tokens <= limit
    assert refused == 0 or budget.spent.tokens + max((r[0] for r in requests), default=0) > limit


def test_who_waits_gets_what_is_freed_in_order() -> None:
    async def work() -> list[str]:
        budget, seen = Budget(Limits(tokens=100), Totals()), []

        async def one(name: str, tokens: int) -> None:
            held = await budget.reserve(tokens, 0)
            seen.append(name)
            await asyncio.sleep(0.01)
            held.settle(tokens // 10, 0)

        await asyncio.gather(one("a", 100), one("big", 90), one("small", 10))
        return seen

    assert asyncio.run(work()) == ["a", "big", "small"]


def test_one_who_waits_and_is_cancelled_holds_nothing() -> None:
    async def work() -> None:
        budget = Budget(Limits(tokens=100), Totals())
        first = await budget.reserve(100, 0)
        waiting = [asyncio.create_task(budget.reserve(60, 0)) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        first.settle(0, 0)
        assert budget.reserved.tokens == 60
        (await waiting[1]).settle(0, 0)
        assert budget.reserved == Totals()

    asyncio.run(work())


def test_what_does_not_fit_says_how_much_is_spent() -> None:
    budget = Budget(Limits(usd=1.0, tokens=1000), Totals(3, 990, int(Decimal("0.5") / UNIT)))
    with pytest.raises(OutOfBudget, match=r"990 of 1,000 tokens are spent .* 0\.5000 of 1\.0000 USD"):
        asyncio.run(budget.reserve(11, 0))


def test_its_words_count_what_was_spent_until_they_are_read() -> None:
    async def work() -> None:
        budget = Budget(Limits(tokens=100), Totals())
        with pytest.raises(OutOfBudget, match="50 of 100 tokens are spent and a request may take 101") as raised:
            try:
                await budget.reserve(101, 0)
            finally:
                (await budget.reserve(60, 0)).settle(50, 0)
        assert raised.value.exit_code == 75

    asyncio.run(work())


@pytest.mark.parametrize(
    "wrong", [{"usd": 0}, {"usd": -1}, {"tokens": 0}, {"usd": float("nan")}, {"usd": float("inf")}]
)
def test_a_limit_must_be_a_positive_number(wrong) -> None:
    with pytest.raises(ValueError, match=r"budget\."):
        Limits(**wrong)


@pytest.mark.parametrize(
    "wrong", [(-1.0, 1.0, None), (1.0, float("inf"), None), (1.0, 1.0, 2.0), (1.0, float("nan"), None)]
)
def test_prices_that_cannot_be_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=r"prices\."):
        Prices(*wrong)


def test_dollars_are_rounded_up() -> None:
    assert usd(1) == "0.0001" and usd(0) == "0.0000" and usd(10**12) == "1.0000"


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_a_prompt_has_no_more_tokens_than_its_bound(texts) -> None:
    """A byte-level tokenizer needs at most a token a byte; a template adds a few for each message."""
    from distill import chat
    from distill.tokenizer import toy_tokenizer

    messages = [chat.Message("user", text.replace("<|", "")) for text in texts]
    ids = chat.encode(toy_tokenizer(), messages, add_generation_prompt=True).ids
    assert len(ids) <= prompt_bound([{"role": m.role, "content": m.content} for m in messages], ())
