"""What building a program does to Python's memory.

Python's cycle collector looks at every object again and again while hundreds of thousands are made; and glibc keeps
what the parser freed, some 25 MB for a model of 2 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No collection inside: for building a program, of which nothing is garbage yet. Then freed memory goes back."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        give_back()


def give_back() -> None:
    """Return freed memory to the system, where the C library has a call for it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
