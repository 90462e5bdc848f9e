"""Seeded choices that are the same on every machine and Python: SplitMix64 (Steele et al. 2014) over a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
_MASK = (1 << 64) - 1


class Draw:
    """A stream of choices named by `keys`; equal keys give equal choices."""

    def __init__(self, *keys: object) -> None:
        digest = hashlib.blake2b("\n".join(map(str, keys)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self._state = int.from_bytes(digest, "big")

    def bits(self) -> int:
        """64 random bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        value = self._state
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        return value ^ (value >> 31)

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return self.bits() * n >> 64

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + (self.below(high - low + 1) if high - low < _MASK else self.bits())

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return (self.bits() >> 11) / (1 << 53)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform() < probability

    def choice(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], n: int) -> list[T]:
        """n different options, in random order."""
        pool = list(options)
        for place in range(n):
            other = place + self.below(len(pool) - place)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:n]

    def shuffle(self, options: Sequence[T]) -> list[T]:
        """All options in random order."""
        return self.sample(options, len(options))
