"""The GitHub Actions workflows keep GitHub's own schema, and what they run is there. macos.yml has not been run.

The schema is the one that check-jsonschema carries; it says nothing of expressions, of actions' inputs and of commands,
which are looked at here.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

from tests.test_docs import check_flags, check_make, check_path, check_pip, statement_words

ROOT = Path(__file__).resolve().parents[2]
MACOS, CI = ROOT / ".github/workflows/macos.yml", ROOT / ".github/workflows/ci.yml"
INPUTS = {
    "actions/checkout": {"fetch-depth", "persist-credentials"},
    "actions/setup-python": {"python-version", "cache", "cache-dependency-path"},
    "actions/upload-artifact": {"name", "path", "if-no-files-found", "retention-days"},
}
INPUT_TYPES = {"boolean", "choice", "environment", "number", "string"}
RUNNER = re.compile(r"macos-(1[4-9]|[2-9]\d)|ubuntu-2[4-9]\.04|\$\{\{ inputs\.\w+ \}\}")
ELSEWHERE = {"echo", "sw_vers", "sysctl"}
"""Commands that are not ours."""


def read(text: str) -> dict[str, Any]:
    workflow: dict[Any, Any] = yaml.safe_load(text)
    if True in workflow:
        workflow["on"] = workflow.pop(True)  # YAML 1.1 reads `on` as a truth value
    return workflow


def faults(text: str) -> list[str]:
    """What GitHub would refuse, what is unsafe, and commands that are not ours."""
    workflow = read(text)
    found = [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message}"
        for name in ("vendor.github-workflows", "custom.github-workflows-require-timeout")
        for error in jsonschema.Draft7Validator(get_builtin_schema(name)).iter_errors(workflow)
    ]
    return found or [*_unsafe(text, workflow), *_jobs(workflow["jobs"])]


def _unsafe(text: str, workflow: dict[str, Any]) -> Iterator[str]:
    """Rights beyond reading, and inputs that nobody declared."""
    if workflow.get("permissions") != {"contents": "read"} or any(
        "permissions" in j for j in workflow["jobs"].values()
    ):
        yield "permissions beyond contents: read"
    if not workflow.get("concurrency"):
        yield "no concurrency"
    inputs = (workflow["on"].get("workflow_dispatch") or {}).get("inputs", {})
    yield from (f"no input {name}" for name in re.findall(r"\binputs\.(\w+)", text) if name not in inputs)
    yield from (f"input {name} of no type" for name, one in inputs.items() if one.get("type") not in INPUT_TYPES)


def _jobs(jobs: dict[str, Any]) -> Iterator[str]:
    for job in jobs.values():
        needs = job.get("needs", [])
        yield from (f"no job {name}" for name in ([needs] if isinstance(needs, str) else needs) if name not in jobs)
        if not RUNNER.fullmatch(str(job["runs-on"])):
            yield f"runs-on: {job['runs-on']}"
        for step in job["steps"]:
            yield from _uses(step) if "uses" in step else _runs(step["run"])


def _uses(step: dict[str, Any]) -> Iterator[str]:
    action, _, version = step["uses"].partition("@")
    if action not in INPUTS or not re.fullmatch(r"v\d+|[0-9a-f]{40}", version):
        yield f"action {step['uses']}"
    yield from (f"{action}: unknown input {key}" for key in step.get("with", {}).keys() - INPUTS.get(action, set()))


def _runs(script: str) -> Iterator[str]:
    if "${{" in script:
        yield "an expression in a script: whoever sets it writes shell; pass it in env"
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    if checked.returncode or checked.stderr:
        yield f"not a script: {checked.stderr.strip()}"
        return
    words: list[str] = []
    for word in statement_words(re.sub(r"<<'PYTHON'.*?PYTHON", "", script, flags=re.DOTALL)):
        if word != ";":
            words.append(word)
        elif words:
            if fault := _fault(tuple(words)):
                yield f"{' '.join(words)}: {fault}"
            words = []


@functools.cache
def _fault(words: tuple[str, ...]) -> str | None:
    """What the documents' own checks say of a command."""
    program, *arguments = words
    try:
        if program == "make":
            check_make(arguments)
        elif program == "distill":
            check_flags("distill", arguments)
        elif program == "pytest" or words[1:3] == ("-m", "pytest"):
            for word in words:
                check_path(word)
            assert any(word.startswith("tests/") for word in words)
        elif program.endswith("python"):
            _check_python(arguments)
        else:
            assert program in ELSEWHERE, "nobody knows it"
    except (AssertionError, IndexError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def _check_python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "pip"]:
        check_pip([word for word in arguments[2:] if word != "--disable-pip-version-check"])
    elif arguments[:2] != ["-m", "venv"] and arguments[:1] != ["-"]:
        assert arguments[0] == "-m"
        check_flags(arguments[1], arguments[2:])


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").iterdir()), ids=lambda path: path.name)
def test_a_workflow_has_the_right_form_and_runs_what_is_there(path: Path) -> None:
    assert faults(path.read_text()) == []


def commands(path: Path) -> dict[str, list[str]]:
    """The lines of scripts, by job."""
    return {
        name: [line for step in job["steps"] for line in step.get("run", "").splitlines()]
        for name, job in read(path.read_text())["jobs"].items()
    }


def test_the_macos_workflow_asks_a_mac() -> None:
    text = MACOS.read_text()
    assert text.startswith("# NOT RUN YET")
    (lines,) = commands(MACOS).values()
    assert {"make toy-e2e-multi", "make coreml-worker", "make speed-coreml"} <= set(lines)
    assert "coreml/artifacts/worker/*.contract/goldens.safetensors" in text
    assert {str(job["runs-on"])[:5] for job in read(text)["jobs"].values()} == {"macos"}


def test_ci_runs_each_tier_and_ends_with_its_gates() -> None:
    lines = commands(CI)
    assert {"make smoke_toy", "make smoke_torch", "make smoke_training"} <= set(lines["smoke"])
    assert {"make toy-e2e", "pytest tests/test_coreml_golden_vectors.py"} <= set(lines["toy"])
    targets = [line.split()[1] for line in lines["production"] if line.startswith("make ")]
    wanted = ["worker", "pytorch-worker", "coreml-worker", "eval-runner-local", "deploy-full"]
    assert [target for target in targets if target in wanted] == wanted
    for job, tier in (("smoke", "smoke"), ("toy", "toy"), ("production", "full")):
        assert lines[job][-1] == f"distill gates --tier {tier} --report eval/reports/gates_{tier}.json"


def test_ci_trains_on_demand_only_and_keeps_every_tiers_reports() -> None:
    jobs = read(CI.read_text())["jobs"]
    assert "workflow_dispatch" in jobs["production"]["if"] and "inputs.production" in jobs["production"]["if"]
    for job in jobs.values():
        judged, kept = job["steps"][-2:]
        assert judged["if"] == kept["if"] == "${{ !cancelled() }}"
        assert kept["with"]["path"] == "eval/reports"


def test_the_actions_of_ci_are_pinned_to_a_commit_with_its_version() -> None:
    used = re.findall(r"uses: (.*)", CI.read_text())
    assert used and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line) for line in used)


FAULTS = [
    (MACOS, "runs-on: macos-15", "runs-on: macos"),
    (MACOS, "steps:", "step:"),
    (MACOS, "make speed-coreml", "make speed-core-ml"),
    (MACOS, "infra.version_gate", "infra.versions"),
    (MACOS, "actions/checkout@v4", "actions/checkout"),
    (MACOS, "fetch-depth", "depth"),
    (MACOS, "make toy-e2e-multi", "if true; then make toy-e2e-multi"),
    (MACOS, "tests/unit/test_ane.py", "tests/unit/test_anes.py"),
    (MACOS, "jobs:", "job:"),
    (CI, "make eval-runner-local", "make eval-runner-locale"),
    (CI, "distill gates --tier toy", "distill gate --tier toy"),
    (CI, "distill gates --tier toy", "distill gates --level toy"),
    (CI, "tests/test_coreml_golden_vectors.py\n", "tests/test_coreml_golden_vector.py\n"),
    (CI, 'CONFIG="$CONFIG"', 'CONFIGURATION="$CONFIG"'),
    (CI, 'TOTAL="$TOTAL"', "TOTAL=${{ inputs.total }}"),
    (CI, "inputs.runner", "inputs.machine"),
    (CI, "needs: smoke", "needs: smokes"),
    (CI, "    timeout-minutes: 360\n", ""),
    (CI, "contents: read", "contents: write"),
    (CI, "type: boolean", "type: bool"),
    (CI, "cancel-in-progress", "cancel"),
    (CI, "retention-days: 90", "retention: 90"),
    (CI, "  # v7.0.1", "f"),
    (CI, "run: make smoke_torch", "runs: make smoke_torch"),
    (CI, "run: make smoke_torch", "run: ./smoke_torch"),
    (CI, "pull_request:", "pull_requests:"),
]


@pytest.mark.parametrize(("path", "old", "new"), FAULTS)
def test_a_fault_in_a_workflow_is_found(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text and faults(text.replace(old, new))


def test_its_embedded_program_is_python_and_reads_what_the_verification_writes() -> None:
    steps = yaml.safe_load(MACOS.read_text())["jobs"]["core-ml"]["steps"]
    (script,) = (step["run"] for step in steps if "<<'PYTHON'" in step.get("run", ""))
    body = script.split("<<'PYTHON'\n")[1].rsplit("PYTHON", 1)[0]
    compile(body, "step", "exec")
    assert '["gates"]["core_ml"]' in body
