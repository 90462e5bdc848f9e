"""The GitHub Actions workflow for macOS is of the right form, and what it runs is there. It has not been run."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.cli import STAGES

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github/workflows/macos.yml"
STEP = {"name", "if", "id", "uses", "with", "run", "env", "shell", "working-directory", "timeout-minutes"}
JOB = {"runs-on", "timeout-minutes", "env", "defaults", "steps", "needs", "strategy", "permissions", "if", "name"}
TOP = {"name", "on", "permissions", "concurrency", "jobs", "env", "defaults"}
INPUTS = {
    "actions/checkout": {"fetch-depth"},
    "actions/setup-python": {"python-version", "cache", "cache-dependency-path"},
    "actions/upload-artifact": {"name", "path", "if-no-files-found", "retention-days"},
}


def faults(text: str) -> list[str]:
    """What GitHub would refuse, and commands that are not ours."""
    workflow: dict[Any, Any] = yaml.safe_load(text)
    workflow["on"] = workflow.pop(True, None) or workflow.get("on")  # YAML 1.1 reads `on` as a truth value
    found = [f"unknown key {key!r}" for key in workflow.keys() - TOP]
    if not workflow["on"] or not workflow.get("jobs"):
        return [*found, "lacks `on` or `jobs`"]
    for job in workflow["jobs"].values():
        found += [f"unknown key {key!r} in a job" for key in job.keys() - JOB]
        if not re.fullmatch(r"macos-(1[4-9]|[2-9]\d)", str(job.get("runs-on"))):
            found.append(f"runs-on: {job.get('runs-on')}")
        for step in job.get("steps") or [{}]:
            found += [f"unknown key {key!r} in a step" for key in step.keys() - STEP]
            if ("uses" in step) == ("run" in step):
                found.append(f"a step has `uses` or `run`: {step}")
            found += _uses(step) if "uses" in step else _runs(str(step.get("run", "")))
    return found


def _uses(step: dict[str, Any]) -> list[str]:
    action, _, version = step["uses"].partition("@")
    if action not in INPUTS or not re.fullmatch(r"v\d+|[0-9a-f]{40}", version):
        return [f"action {step['uses']}"]
    return [f"{action}: unknown input {key}" for key in step.get("with", {}).keys() - INPUTS[action]]


def _runs(script: str) -> list[str]:
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    if checked.returncode or checked.stderr:
        return [f"not a script: {checked.stderr.strip()}"]
    found = []
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    doors = {stage.door for stage in STAGES.values()} | {"pytest", "venv", "pip"}
    for line in re.sub(r"<<'PYTHON'.*?PYTHON", "", script, flags=re.DOTALL).splitlines():
        words = shlex.split(line)
        if words[:1] == ["make"]:
            found += [f"no target {word}" for word in words[1:] if "=" not in word and word not in targets]
        elif words and words[0].endswith("python") and words[1] == "-m":
            found += [f"no module {words[2]}"] if words[2] not in doors else []
            found += [f"no file {w}" for w in words if w.startswith("tests/") and not (ROOT / w).exists()]
    return found


def test_the_workflow_has_the_right_form_and_runs_what_is_there() -> None:
    text = WORKFLOW.read_text()
    assert faults(text) == []
    assert text.startswith("# NOT RUN YET")
    assert {"make toy-e2e-multi", "make coreml-worker", "make speed-coreml"} <= set(
        line.strip().removeprefix("run: ") for line in text.splitlines()
    )
    assert "coreml/artifacts/worker/*.contract/goldens.safetensors" in text


@pytest.mark.parametrize(("old", "new"), [
    ("runs-on: macos-15", "runs-on: macos"),
    ("steps:", "step:"),
    ("make speed-coreml", "make speed-core-ml"),
    ("infra.version_gate", "infra.versions"),
    ("actions/checkout@v4", "actions/checkout"),
    ("fetch-depth", "depth"),
    ("make toy-e2e-multi", "if true; then make toy-e2e-multi"),
    ("tests/unit/test_ane.py", "tests/unit/test_anes.py"),
    ("jobs:", "job:"),
])  # fmt: skip
def test_a_fault_in_it_is_found(old: str, new: str) -> None:
    text = WORKFLOW.read_text()
    assert old in text and faults(text.replace(old, new))


def test_its_embedded_program_is_python_and_reads_what_the_verification_writes() -> None:
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["core-ml"]["steps"]
    (script,) = (step["run"] for step in steps if "<<'PYTHON'" in step.get("run", ""))
    body = script.split("<<'PYTHON'\n")[1].rsplit("PYTHON", 1)[0]
    compile(body, "step", "exec")
    assert '["gates"]["core_ml"]' in body
