"""pytest -p distill.mil.pytest_plugin: `MLModel.predict` and `make_state` work in a test-suite off macOS.

On a Mac it changes nothing. A test that asks for what only Core ML can do (another kind of model, a compute plan) is
skipped with the reason: it is not counted as passed.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import pytest

from distill.mil import coreml_proxy
from distill.mil.coreml_proxy import MLModelProxy
from distill.mil.program import POLICIES

_COUNT = "distill_mil_predictions"


def skip(reason: str) -> NoReturn:
    pytest.skip(f"needs Core ML: {reason}")


# At import, before any conftest or test module has taken coremltools' names.
coreml_proxy.install(on_refusal=skip)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("distill.mil")
    group.addoption("--mil-policy", choices=POLICIES, default="ieee16", help="numeric policy of the predictions")


def pytest_configure(config: pytest.Config) -> None:
    MLModelProxy.policy = config.getoption("--mil-policy")


def pytest_report_header() -> str:
    if sys.platform == "darwin":
        return "Core ML: this system's own"
    return f"Core ML: distill.mil, policy {MLModelProxy.policy}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist tells its controller."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_COUNT] = MLModelProxy.predictions


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    MLModelProxy.predictions += getattr(node, "workeroutput", {}).get(_COUNT, 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if sys.platform != "darwin":
        terminalreporter.write_line(f"distill.mil made {MLModelProxy.predictions} predictions")
