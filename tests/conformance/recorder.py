"""The pytest plugin of one worker: the executor in Core ML's place, tight comparisons, one JSON line a test.

Loaded by `python -m tests.conformance`; not meant to be used by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from distill.mil import coreml_proxy
from distill.mil.coreml_proxy import MLModelProxy
from tests.conformance import comparison, manners


def other_model(reason: str) -> NoReturn:
    pytest.skip(f"not an ML Program: {reason}")


coreml_proxy.install(on_refusal=other_model)
comparison.install()
manners.install()

_SUITE = os.path.join("mil", "ops", "tests", "")


def short_id(nodeid: str) -> str:
    """'iOS14/test_pool.py::TestAvgPool::test_x[...]', wherever coremltools is installed."""
    path, separator, rest = nodeid.partition("::")
    return path.rpartition(_SUITE)[2] + separator + rest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--record", required=True, help="JSON lines, one a test")
    group.addoption("--part", required=True, help="index/count: tests whose place in the order has this remainder")
    group.addoption("--match", required=True, help="regular expression on the identifier")
    group.addoption("--sample", required=True, type=int, help="how many tests; 0 means all")
    group.addoption("--seed", required=True, help="which sample")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    config.stash[_RECORD] = Path(config.getoption("--record"))


_RECORD = pytest.StashKey[Path]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every worker draws the same sample and takes its own part of it."""
    option = config.getoption
    chosen = [item for item in items if re.search(option("--match"), short_id(item.nodeid))]
    if option("--sample"):
        order = {item: hashlib.sha256(f"{option('--seed')}:{item.nodeid}".encode()).digest() for item in chosen}
        chosen = sorted(chosen, key=order.__getitem__)[: option("--sample")]
    index, count = (int(n) for n in option("--part").split("/"))
    items[:] = chosen[index::count]
    emit(config, {"tests": len(items)})


def emit(config: pytest.Config, line: dict[str, Any]) -> None:
    with config.stash[_RECORD].open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test's data depends on its name alone, not on what ran before it; its packages go when it ends."""
    seed = zlib.crc32(short_id(item.nodeid).encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    comparison.begin()
    MLModelProxy.predictions = 0
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        before, tempfile.tempdir = tempfile.tempdir, folder
        try:
            return (yield)
        finally:
            tempfile.tempdir = before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        write(item, report)
    return report


def write(item: pytest.Item, report: Any) -> None:
    message = ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else str(report.longrepr)
    elif report.skipped:
        message = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(getattr(report, "wasxfail", ""))
    line = {
        "id": short_id(item.nodeid),
        "outcome": report.outcome,
        "predictions": MLModelProxy.predictions,
        "comparisons": comparison.count,
        "precision": comparison.precision,
        "seconds": round(report.duration, 4),
        "message": message[:2000],
    }
    emit(item.config, line)
