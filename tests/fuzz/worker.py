"""Loads and runs packages for the fuzzer, in a process that may die. Reads folders from stdin, one a line, and
answers each with one line of JSON.

Memory is limited to what it had at the start and one GiB, processor time to ten seconds a package, and every file
that is opened outside the package is reported.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import signal
import sys
import sysconfig
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # some calls without data import it, and it makes a folder for its cache

from distill import mil
from distill.errors import DistillError
from distill.mil.program import POLICIES

MEMORY = 2**30
SECONDS = 10
LIMITS = mil.Limits(memory=2**28, work=2**35)
_ALLOWED = (sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), str(Path(__file__).parents[2] / "distill"))
_SUSPECT = ("open", "os.remove", "os.rename", "os.mkdir", "os.symlink", "subprocess.Popen", "os.system")
_seen: list[str] = []
_watching = False


def audit(event: str, args: tuple[Any, ...]) -> None:
    if _watching and (event in _SUSPECT or event.startswith("socket.")):
        _seen.append(f"{event} {args[0] if args else ''}")


def sample(feature: mil.Feature) -> np.ndarray:
    """An input of a shape that the package says it takes."""
    shape = feature.enumerated[0] if feature.enumerated else tuple(d or 1 for d in feature.shape)
    if feature.ranges:
        shape = tuple(max(1, low) for low, _ in feature.ranges)
    if np.prod([float(d) for d in shape]) > 2**18:
        raise DistillError("an input that nobody has")
    if "int" in feature.type.dtype:
        return np.zeros(shape, np.int32)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def attempt(folder: str) -> None:
    """Load, and run every function under every policy."""
    program = mil.load(folder, limits=LIMITS)
    for name in sorted(program.functions)[:3]:
        function = program.function(name)
        for policy in POLICIES:
            with contextlib.suppress(DistillError):
                inputs = {f.name: sample(f) for f in function.inputs if not f.optional}
                state = program.make_state(name) if function.states else None
                program.predict(inputs, function=name, state=state, policy=policy)
    function = program.function()
    inputs = {f.name: sample(f) for f in function.inputs}
    state = program.make_state() if function.states else None
    program.predict(inputs, state=state)


def outside(folder: str) -> list[str]:
    """What was touched beyond the package and the interpreter's own files."""
    return [s for s in _seen if not s.removeprefix("open ").startswith((folder, *_ALLOWED))]


def answer(folder: str) -> dict[str, Any]:
    global _watching
    _seen.clear()
    _watching = True
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        attempt(folder)
        result: dict[str, Any] = {"outcome": "result"}
    except DistillError as error:
        result = {"outcome": "refused", "error": type(error).__name__, "message": str(error)}
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f for f in reversed(frames) if "distill" in f.filename), frames[-1])
        where = f"{Path(place.filename).name}:{place.name}"
        result = {
            "outcome": "escaped",
            "error": type(error).__name__,
            "where": where,
            "message": traceback.format_exc(),
        }
    signal.setitimer(signal.ITIMER_PROF, 0)
    _watching = False
    if outside(folder):
        result = {"outcome": "escaped", "error": "touched", "where": "", "message": "; ".join(outside(folder))}
    return result


def main() -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.addaudithook(audit)
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)
    first = sys.stdin.readline().strip()
    attempt(first)  # a sound package: imports everything
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    print(json.dumps({"outcome": "ready"}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
