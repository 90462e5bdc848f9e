"""Money and tokens, reserved before they are spent: spent + reserved + new <= limit before anything is sent.

Amounts of currency are whole numbers of 1e-12 (prices a million tokens have at most six decimals), so sums are exact.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

import msgspec

from distill.data.journal import Totals
from distill.data.schema import Usage
from distill.errors import Paused

UNIT = Decimal(10) ** -12


class Prices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Price of a million tokens, in US dollars. Reasoning is billed as output."""

    input: float
    output: float
    cached_input: float | None = None
    """Of prompt tokens that the server had in its cache; null: as `input`."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1e6:
                raise ValueError(f"prices.{name} must be at least 0 and below 1e6, not {value}")
        if self.cached_input is not None and self.cached_input > self.input:
            raise ValueError("prices.cached_input is above prices.input")

    def cost(self, usage: Usage) -> int:
        """What `usage` costs, in 1e-12 dollars."""
        cached = min(usage.cached, usage.prompt)
        rate = self.input if self.cached_input is None else self.cached_input
        return (
            (usage.prompt - cached) * _units(self.input)
            + cached * _units(rate)
            + usage.completion * _units(self.output)
        )


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a run may spend, all its starts and the probe included; null for no limit."""

    usd: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"budget.{name} must be above 0, not {value}")


class OutOfBudget(Paused):
    """The next request does not fit what is left. Its words are those of the budget when they are read: requests that
    fit may still be answered after it was raised."""

    def __init__(self, budget: Budget, wanted: Totals) -> None:
        super().__init__()
        self._budget, self._wanted = budget, wanted

    def __str__(self) -> str:
        return self._budget.problem(self._wanted)


class Budget:
    """What is spent and what is reserved, against the limits. Those that wait are served in their order."""

    def __init__(self, limits: Limits, spent: Totals) -> None:
        self._tokens = math.inf if limits.tokens is None else limits.tokens
        self._cost = math.inf if limits.usd is None else int(Decimal(repr(limits.usd)) / UNIT)
        self.limits = limits
        self.spent = spent
        self.reserved = Totals()
        self._queue: deque[tuple[Totals, asyncio.Future[None]]] = deque()

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return self._tokens != math.inf or self._cost != math.inf

    async def reserve(self, tokens: int, cost: int) -> Reservation:
        """Set aside what a request may cost at most; waits while requests in flight may leave room.

        OutOfBudget if it does not fit although nothing is in flight.
        """
        wanted = Totals(1, tokens, cost)
        if self._queue or not self._fits(wanted):
            if not self._queue and not self.reserved.attempts:
                raise OutOfBudget(self, wanted)
            place = (wanted, asyncio.get_running_loop().create_future())
            self._queue.append(place)
            try:
                await place[1]
            except asyncio.CancelledError:
                if place in self._queue:
                    self._queue.remove(place)
                elif place[1].done() and not place[1].cancelled() and place[1].exception() is None:
                    self._free(wanted, Totals())
                raise
        else:
            self.reserved += wanted
        return Reservation(self, wanted)

    def _fits(self, wanted: Totals) -> bool:
        total = self.spent + self.reserved + wanted
        return total.tokens <= self._tokens and total.cost <= self._cost

    def _free(self, reserved: Totals, spent: Totals) -> None:
        self.reserved = Totals(*(a - b for a, b in zip(self.reserved, reserved)))
        self.spent += spent
        while self._queue:
            wanted, future = self._queue[0]
            if self._fits(wanted):
                self.reserved += wanted
                self._queue.popleft()
                _wake(future, None)
            elif not self.reserved.attempts:
                self._queue.popleft()
                _wake(future, OutOfBudget(self, wanted))
            else:
                return

    def problem(self, wanted: Totals) -> str:
        """That a request does not fit, with what is spent."""
        parts = []
        if self._tokens != math.inf:
            parts.append(
                f"{self.spent.tokens:,} of {self._tokens:,} tokens are spent and a request may take {wanted.tokens:,}"
            )
        if self._cost != math.inf:
            spent, limit = usd(self.spent.cost), usd(int(self._cost))
            parts.append(f"{spent} of {limit} USD are spent and a request may cost {usd(wanted.cost)}")
        return f"the budget is used up: {'; '.join(parts)}"


class Reservation:
    """A part of the budget, until it is settled."""

    def __init__(self, budget: Budget, amount: Totals) -> None:
        self._budget, self.amount, self._open = budget, amount, True

    def settle(self, tokens: int | None, cost: int | None) -> None:
        """Replace it by what was really spent: (0, 0) for nothing, None for all that was reserved."""
        if self._open:
            self._open = False
            spent = Totals(
                1, self.amount.tokens if tokens is None else tokens, self.amount.cost if cost is None else cost
            )
            self._budget._free(self.amount, spent)


def _wake(future: asyncio.Future[None], error: Exception | None) -> None:
    if not future.done():
        future.set_exception(error) if error else future.set_result(None)


def dollars(cost: int) -> Decimal:
    """1e-12 dollars as dollars, exactly and without superfluous zeros."""
    return (cost * UNIT).normalize() if cost else Decimal(0)


def usd(cost: int) -> str:
    """1e-12 dollars as dollars, rounded up to a hundredth of a cent."""
    return f"{(cost * UNIT).quantize(Decimal('0.0001'), rounding='ROUND_CEILING'):,}"


def prompt_bound(messages: str | Sequence[Any], tools: Sequence[Any]) -> int:
    """Most tokens that a server can count for a prompt of these plain values.

    A token holds at least one byte, so bytes bound tokens; a server's template adds marks to each message, and to
    tools a preamble and their schemas once more in a form of its own (llama.cpp does).
    """
    marks = 0 if isinstance(messages, str) else 16 * len(messages)
    size = len(msgspec.json.encode(messages))
    return size + marks + 128 + (2 * len(msgspec.json.encode(tools)) + 512 if tools else 0)


@lru_cache(maxsize=16)
def _units(price: float) -> int:
    """Dollars a million tokens as 1e-12 dollars a token, rounded up."""
    return math.ceil(Decimal(repr(price)) * 10**6)
