"""What a package may cost. A package is untrusted input, and a small file can ask for much."""

from __future__ import annotations

import os
from typing import NamedTuple

# What each byte of the package's files and of the inputs allows beyond the fixed part. One bit a weight, widened
# to float32, takes 32 bytes a byte; each weight is used for thousands of tokens or pixels.
MEMORY_PER_BYTE = 32
WORK_PER_BYTE = 2**16


class Limits(NamedTuple):
    """The fixed part of the limits of one prediction: `mil.load(path, limits=Limits(memory=...))`."""

    memory: int = 2**30  # bytes held at once, inputs and mapped files apart
    work: int = 2**40  # arithmetic operations; what else takes time counts as some: tens of seconds of any program
    iterations: int = 100_000  # of all loops together; what is done in them is work

    def memory_for(self, size: int) -> int:
        """Bytes that files and inputs of `size` bytes allow, never more than the machine has."""
        return min(self.memory + MEMORY_PER_BYTE * size, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))

    def work_for(self, size: int) -> int:
        return self.work + WORK_PER_BYTE * size


DEFAULT = Limits()


def refusal(need: float, limit: int) -> str:
    return f"this takes {need / 2**20:.0f} MiB, the limit is {limit / 2**20:.0f} MiB (limits= of mil.load raises it)"
