"""A stop reaches a stage wherever it arrives."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

_STAGE = """
import signal, sys, time, weakref
from distill.errors import stage_main

class Thing:
    def __del__(self):
        if {place!r} == "finaliser":
            signal.raise_signal({number})

def body(argv):
    thing = Thing()
    watch = weakref.ref(thing, lambda _: signal.raise_signal({number}) if {place!r} == "callback" else None)
    del thing
    for _ in range(100):
        time.sleep(0.05)
    return 0

sys.exit(stage_main(body)([]))
"""


@pytest.mark.parametrize("place", ["finaliser", "callback"])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stop_inside_a_finaliser_is_not_lost(place: str, name: str, code: int) -> None:
    """Python drops what is raised there: without our hook the stage would run its five seconds and end with 0."""
    began = time.monotonic()
    script = _STAGE.format(place=place, number=f"signal.{name}")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done
    assert "Traceback" not in done.stderr and time.monotonic() - began < 4.5
