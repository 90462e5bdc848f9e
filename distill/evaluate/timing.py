"""Timing a package's functions: in Core ML by compute unit, and in the reference executor.

Calls of all sessions alternate, round by round, each round beginning with another, so that a slow moment of the machine
strikes all of them.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill import mil
from distill.contract import Contract
from distill.convert.package import refuse_placeholder
from distill.errors import DistillError, PackageError
from distill.evaluate.bounds import Cost, costs
from distill.mil.program import Function
from distill.verify.runner import read_package_contract
from distill.versions import import_coremltools

UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")
"""Core ML's compute units."""
EXECUTOR = "reference executor, not Core ML"
WARM_UP = 3
_SEED = 20261123


class Package(NamedTuple):
    """A package of ours, read."""

    path: Path
    program: mil.Program
    contract: Contract
    costs: dict[str, Cost]


class Session(NamedTuple):
    """A function loaded somewhere, and one call of it."""

    unit: str
    function: str
    load: float
    """Seconds to load it; Core ML compiles then."""
    call: Callable[[], object]


class Timing(NamedTuple):
    """Seconds of one call: median and quartiles."""

    median: float
    low: float
    high: float
    calls: int


def read(path: Path) -> Package:
    """PackageError for a placeholder or for what is no package of ours."""
    refuse_placeholder(path)
    program = mil.load(path)
    return Package(path, program, read_package_contract(program), costs(program))


def executor_sessions(package: Package) -> list[Session]:
    """Every function in the reference executor."""
    out = []
    for name, function in package.program.functions.items():
        start = time.perf_counter()
        program = mil.load(package.path)
        state = program.make_state(name) if function.states else None
        load = time.perf_counter() - start
        feeds = _feeds(function, package.contract)
        out.append(Session(EXECUTOR, name, load, _executor_call(program, name, state, feeds)))
    return out


def core_ml_sessions(package: Package, units: Sequence[str]) -> list[Session]:
    """Every function in Core ML, loaded for each compute unit. PackageError where Core ML does not load it."""
    ct = import_coremltools()
    out = []
    several = len(package.program.functions) > 1
    for unit in units:
        for name, function in package.program.functions.items():
            start = time.perf_counter()
            try:
                model = ct.models.MLModel(
                    str(package.path),
                    compute_units=getattr(ct.ComputeUnit, unit),
                    function_name=name if several else None,
                )
                state = model.make_state() if function.states else None
            except Exception as error:  # coremltools raises bare Exception and RuntimeError
                raise PackageError(f"{package.path}: Core ML does not load {name} on {unit}: {error}") from error
            feeds = _feeds(function, package.contract)
            out.append(Session(unit, name, time.perf_counter() - start, _core_ml_call(model, state, feeds)))
    return out


def time_all(sessions: Sequence[Session], rounds: int) -> list[Timing]:
    """Of each session, after warm-up."""
    for session in sessions:
        for _ in range(WARM_UP):
            session.call()
    seconds: list[list[float]] = [[] for _ in sessions]
    for round_ in range(rounds):
        for index in range(len(sessions)):
            at = (index + round_) % len(sessions)
            start = time.perf_counter()
            sessions[at].call()
            seconds[at].append(time.perf_counter() - start)
    return [_timing(found) for found in seconds]


def peak_memory(path: Path, unit: str) -> int:
    """Bytes that loading and calling every function on `unit` adds to a process's peak, in a process of its own.

    Memory that the system holds for the GPU or the Neural Engine outside the process is not in it.
    """
    command = [sys.executable, "-m", "distill", "speed", "--model", str(path), "--memory-of", unit]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise DistillError(f"{path}: measuring memory on {unit} ended with status {done.returncode}")
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])


def own_peak(package: Package, unit: str) -> int:
    """What `peak_memory` runs in its process."""
    before = _peak()
    sessions = executor_sessions(package) if unit == EXECUTOR else core_ml_sessions(package, [unit])
    time_all(sessions, 1)
    return _peak() - before


def _peak() -> int:
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()  # Linux's ru_maxrss begins with that of the parent process
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _timing(seconds: list[float]) -> Timing:
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return Timing(median, low, high, len(seconds))


def _executor_call(program: mil.Program, name: str, state: Any, feeds: Iterator[dict[str, Any]]) -> Callable[[], Any]:
    return lambda: program.predict(next(feeds), function=name, state=state)


def _core_ml_call(model: Any, state: Any, feeds: Iterator[dict[str, Any]]) -> Callable[[], Any]:
    if state is None:
        return lambda: model.predict(next(feeds))
    return lambda: model.predict(next(feeds), state=state)


def _feeds(function: Function, contract: Contract) -> Iterator[dict[str, Any]]:
    """Inputs for call after call: random tokens, positions going up to the end of the context and round again."""
    draw = np.random.default_rng(_SEED)
    first, *rest = function.inputs
    shape = [d or 1 for d in first.shape]
    last = max(contract.enumerated_T, default=1) - shape[-1]
    call = 0
    while True:
        if first.type.dtype == "int32":
            feed: dict[str, Any] = {first.name: draw.integers(0, contract.model_config.vocab_size, shape, np.int32)}
        else:
            feed = {first.name: draw.standard_normal(shape).astype(np.float32)}
        position = call * shape[-1] % (last + 1)
        feed |= {feature.name: np.full([d or 1 for d in feature.shape], position, np.int32) for feature in rest}
        yield feed
        call += 1
