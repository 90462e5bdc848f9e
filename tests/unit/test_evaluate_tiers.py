"""`distill gates`: what the real stages left at toy size passes; what is missing, stale, failed or forged does not."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.artifacts import code_version, provenance, sha256_file, write_json
from distill.deploy import judge
from distill.deploy.manifest import Manifest, StudentFacts
from distill.evaluate import tier_cells, tiers, timing
from distill.evaluate.evidence import combined, content
from distill.gates import STATUSES, Gate, exit_code
from distill.verify import contracts
from tests.conftest import Toy
from tests.test_docs import is_target
from tests.unit.tier_places import (
    BUNDLE,
    EXPORTED,
    LATEST,
    MANIFEST,
    REPORTS,
    ROOT,
    build,
    golden_vectors,
    package,
    read,
    spoil,
    timed,
)


@pytest.fixture(scope="module")
def made(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything where the documented targets put it."""
    folder = tmp_path_factory.mktemp("documented")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        build(toy)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil. Files are shared until one is replaced (`spoil`)."""
    copy = tmp_path / "copy"
    shutil.copytree(made, copy, copy_function=os.link)
    monkeypatch.chdir(copy)
    return copy


def cells(tier: str | None = None) -> dict[str, Gate]:
    report = tiers.run(tiers.GatesConfig(tier, toy=Path("toy")))
    return {name: Gate(**value) for name, value in report["gates"].items()}


def cell(name: str) -> Gate:
    return cells(name.partition(":")[0])[name]


# --- as it should be -------------------------------------------------------------------------------------------------


def test_what_the_stages_left_passes_in_every_tier_and_what_a_mac_must_answer_is_skipped(here: Path) -> None:
    found = cells()
    performance = found.pop("full: Performance Targets")
    assert {name: gate for name, gate in found.items() if gate.status != "pass"} == {}
    assert performance == Gate("skipped", reason="not measured (Core ML runs on macOS only)")
    assert "core_ml skipped (Core ML runs on macOS only)" in str(found["toy: Contract Compliance"].reason)
    assert "test_core_ml_itself" in str(found["toy: Integration Tests"].reason)
    assert [exit_code(cells(tier)) for tier in tiers.TIERS] == [0, 0, 0]


def test_the_command_prints_the_table_and_writes_a_report_in_the_form_of_the_house(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiers.main(["--tier", "smoke", "--report", "out/gates.json"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^Pipeline Completeness +PASS$", printed, re.MULTILINE)
    assert re.search(r"^CAWS Evaluation +n/a$", printed, re.MULTILINE)
    assert printed.endswith("gates: 2 pass\n")
    report = read("out/gates.json")
    assert judge.gates_of(report, "gates.json").keys() == {
        "smoke: Pipeline Completeness",
        "smoke: CoreML Compatibility",
    }
    assert "smoke: CAWS Evaluation" in report["not_applicable"]
    used = report["made_by"]["inputs"][f"{REPORTS}/smoke_toy.json"]
    assert used["sha256"] == sha256_file(f"{REPORTS}/smoke_toy.json")


def test_where_nothing_was_run_each_cell_names_a_target_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = cells()
    assert {gate.status for gate in found.values()} == {"inconclusive"} and exit_code(found) == 3
    for name, gate in found.items():
        named = re.findall(r"not run: (?:make ([\w-]+)|pytest (tests/\S+))", str(gate.reason))
        assert named, name
        assert all(is_target(target) if target else (ROOT / path).is_file() for target, path in named)
    assert tiers.main(["--tier", "full"]) == 3
    assert capsys.readouterr().out.endswith("gates: 6 inconclusive\n")


def test_the_table_is_the_documents_and_the_names_are_those_of_what_is_judged() -> None:
    text = (ROOT / "docs/LOCAL_DEVELOPMENT_WORKFLOW.md").read_text()
    rows = re.findall(r"^\| \*\*(.+?)\*\* \|(.+)\|$", text, re.MULTILINE)
    applies = {row: [tier for tier, said in zip(tiers.TIERS, cells.split("|"), strict=True) if said.strip() != "n/a"]
               for row, cells in rows}  # fmt: skip
    assert applies == {row: list(found) for row, found in tiers.TABLE.items()}
    assert sorted(tier_cells.CORE_ML + tier_cells.CONTRACT) == sorted(contracts.GATES)
    assert tier_cells.UNITS == timing.UNITS
    golden = ast.parse((ROOT / "tests/test_coreml_golden_vectors.py").read_text()).body
    assert [node.name for node in golden if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")] == [
        *tier_cells.GOLDEN_VECTORS
    ]
    assert {"student", "files", "overridden"} <= set(Manifest.__struct_fields__)
    assert "checkpoint_sha256" in StudentFacts.__struct_fields__


def test_judging_loads_no_torch(here: Path) -> None:
    code = "import sys; from distill.evaluate import tiers; tiers.main([]); sys.exit('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False).returncode == 0


# --- stale -----------------------------------------------------------------------------------------------------------

WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


def older(report: Any) -> None:
    report["made_by"]["code"] = "0123456789ab"


def other_run(report: Any) -> None:
    report["fingerprint"] = "0" * 64


STALE = [
    ("smoke: Pipeline Completeness", "onnx/toy_sanitized.onnx", None, "make smoke_toy"),
    ("smoke: Pipeline Completeness", "models/toy_torch_checkpoint.pt", None, "make smoke_torch"),
    ("smoke: Pipeline Completeness", "training/toy_test/toy_dataset.jsonl", None, "make smoke_training"),
    ("smoke: CoreML Compatibility", f"coreml/artifacts/toy/model.mlpackage/{WEIGHTS}", None, "make smoke_toy"),
    ("smoke: CoreML Compatibility", f"{REPORTS}/smoke_torch.json", older, "make smoke_torch"),
    ("toy: Pipeline Completeness", "toy/toy_kd.jsonl", None, "make toy-e2e"),
    ("toy: Pipeline Completeness", "toy/toy.ckpt", None, "make toy-e2e"),
    ("toy: Pipeline Completeness", "toy/toy.report.json", other_run, "make toy-e2e"),
    ("toy: Pipeline Completeness", "toy/toy_exported/student_prefill_T128.pt", None, "make toy-e2e"),
    ("toy: Pipeline Completeness", f"{REPORTS}/toy_e2e.json", older, "make toy-e2e"),
    ("toy: CoreML Compatibility", f"toy/toy_T128.mlpackage/{WEIGHTS}", None, "make toy-e2e"),
    ("toy: Contract Compliance", f"toy/toy_T128.mlpackage/{WEIGHTS}", None, "make toy-e2e"),
    ("toy: Integration Tests", f"toy/toy_T128.mlpackage/{WEIGHTS}", None, "pytest tests/"),
    ("full: Pipeline Completeness", LATEST, None, "make pytorch-worker"),
    ("full: Pipeline Completeness", f"{EXPORTED}/student_decode_contract.json", None, "make coreml-worker"),
    ("full: Pipeline Completeness", "models/student/checkpoints/toy.report.json", other_run, "make worker"),
    ("full: Pipeline Completeness", f"{BUNDLE}/README", None, "make deploy-full"),
    ("full: CoreML Compatibility", f"coreml/artifacts/worker/decode.mlpackage/{WEIGHTS}", None, "make coreml-worker"),
    ("full: CAWS Evaluation", LATEST, None, "make eval-runner-local"),
    ("full: CAWS Evaluation", "data/contextual_final.jsonl", None, "make eval-runner-local"),
    ("full: CAWS Evaluation", "data/contextual_final.jsonl.d/fixtures.jsonl", None, "make eval-runner-local"),
    ("full: CAWS Evaluation", f"{REPORTS}/local.json",
     lambda report: report["header"]["fingerprints"].update(scorer_code="0" * 64), "make eval-runner-local"),
    ("full: Performance Targets", f"coreml/artifacts/worker/model.mlpackage/{WEIGHTS}", None, "make speed-coreml"),
    ("full: Integration Tests", f"coreml/artifacts/worker/decode.mlpackage/{WEIGHTS}", None, "pytest tests/"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "change", "target"), STALE)
def test_a_report_of_what_is_no_longer_there_is_stale(
    here: Path, name: str, path: str, change: Callable[[Any], Any] | None, target: str
) -> None:
    spoil(path, change)
    found = cell(name)
    assert found.status == "inconclusive" and "stale: " in str(found.reason) and target in str(found.reason)


@pytest.mark.parametrize(("name", "path", "target"), [
    ("toy: Pipeline Completeness", "toy/toy.ckpt", "make toy-e2e"),
    ("toy: Contract Compliance", f"{REPORTS}/toy_e2e.json", "make toy-e2e"),
    ("toy: Integration Tests", f"{REPORTS}/integration.json", "pytest tests/test_coreml_golden_vectors.py"),
    ("smoke: Pipeline Completeness", "training/toy_test/checkpoints/latest.pt", "make smoke_training"),
    ("full: Contract Compliance", f"{REPORTS}/worker_decode.json", "make coreml-worker"),
    ("full: Pipeline Completeness", f"{REPORTS}/worker_decode.json", "make coreml-worker"),
    ("full: CAWS Evaluation", f"{REPORTS}/local.json", "make eval-runner-local"),
    ("full: Performance Targets", f"{REPORTS}/speed.json", "make speed-coreml"),
    ("full: Pipeline Completeness", MANIFEST, "make deploy-full"),
])  # fmt: skip
def test_what_is_missing_was_not_run(here: Path, name: str, path: str, target: str) -> None:
    Path(path).unlink()
    found = cell(name)
    assert found.status == "inconclusive" and f"not run: {target}" in str(found.reason)


def test_a_trained_student_outlives_a_change_of_the_code_and_a_toy_does_not(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier_cells, "code_version", lambda: f"{code_version()}-later")
    assert exit_code(cells("full")) == 0
    assert {gate.status for name, gate in cells().items() if not name.startswith("full")} == {"inconclusive"}


def test_other_lengths_count_only_where_they_were_just_verified(here: Path) -> None:
    package(Path("toy/toy_T128.mlpackage"), Path("toy/toy_T256"))
    failed = read(f"{REPORTS}/toy_e2e.json")
    failed["gates"]["parity_fp16"]["status"] = "fail"
    write_json(f"{REPORTS}/toy_e2e_T256.json", failed)
    assert cell("toy: CoreML Compatibility").status == "fail"
    spoil(f"{REPORTS}/toy_e2e_T256.json", older)
    assert cell("toy: CoreML Compatibility").status == "pass"


# --- failed, forged, unreadable --------------------------------------------------------------------------------------


def status(gate: str, to: str) -> Callable[[Any], Any]:
    return lambda report: report["gates"][gate].update(status=to, reason="planted")


def golden(test: str, to: str | None) -> Callable[[Any], Any]:
    def change(report: Any) -> None:
        found = report["packages"]["toy/toy_T128.mlpackage"]["gates"]
        name = next(name for name in found if test in name)
        if to is None:
            del found[name]
        else:
            found[name]["status"] = to

    return change


E2E, LOCAL, SPEED, INTEGRATION = (f"{REPORTS}/{name}.json" for name in ("toy_e2e", "local", "speed", "integration"))
ON_LINUX = "core_ml_speed coreml/artifacts/worker/decode.mlpackage"
NOT_PASSED = [
    ("toy: CoreML Compatibility", E2E, status("parity_fp16", "fail"), "fail"),
    ("toy: Contract Compliance", E2E, status("tool_span_f1", "fail"), "fail"),
    ("toy: Contract Compliance", E2E, status("tool_span_f1", "skipped"), "inconclusive"),
    ("toy: Contract Compliance", E2E, status("greedy_decode", "inconclusive"), "inconclusive"),
    ("toy: Contract Compliance", E2E, status("contract", "error"), "error"),
    ("toy: Contract Compliance", E2E, status("contract", "passed"), "error"),
    ("toy: Contract Compliance", E2E, lambda report: report["gates"].pop("state"), "error"),
    ("toy: Contract Compliance", E2E, lambda report: report.pop("gates"), "error"),
    ("toy: Contract Compliance", E2E, lambda report: report.pop("made_by"), "error"),
    ("toy: CoreML Compatibility", E2E, lambda report: [g.update(status="skipped") for g in report["gates"].values()],
     "inconclusive"),
    ("toy: Pipeline Completeness", "toy/toy.report.json", lambda report: report.pop("provenance"), "error"),
    ("toy: Integration Tests", INTEGRATION, golden("fp16", "fail"), "fail"),
    ("toy: Integration Tests", INTEGRATION, golden("fp16", "skipped"), "inconclusive"),
    ("toy: Integration Tests", INTEGRATION, golden("fp16", None), "inconclusive"),
    ("toy: Integration Tests", INTEGRATION, lambda report: report["packages"].pop("toy/toy_T128.mlpackage"),
     "inconclusive"),
    ("toy: Integration Tests", INTEGRATION, lambda report: report.update(schema="distill-integration/0"), "error"),
    ("full: Contract Compliance", f"{REPORTS}/worker_decode.json", status("state", "fail"), "fail"),
    ("full: CAWS Evaluation", LOCAL, status("call_f1", "fail"), "error"),
    ("full: CAWS Evaluation", LOCAL, lambda report: report.update(overall="fail"), "error"),
    ("full: CAWS Evaluation", LOCAL, lambda report: report["gates"].pop("privacy"), "error"),
    ("full: CAWS Evaluation", LOCAL, lambda report: report["gates"].pop("self_test"), "error"),
    ("full: CAWS Evaluation", LOCAL, lambda report: report.update(schema="eval-report/0"), "error"),
    ("full: CAWS Evaluation", LOCAL, lambda report: report["header"]["criteria"].update(changed=["call_f1"]),
     "inconclusive"),
    ("full: CAWS Evaluation", LOCAL, lambda report: report["header"].update(items=20), "inconclusive"),
    ("full: CAWS Evaluation", LOCAL, lambda report: report["header"].update(broker="simulate"), "inconclusive"),
    ("full: CAWS Evaluation", LOCAL, lambda report: report["header"]["model"]["decoding"].update(constrained=True),
     "inconclusive"),
    ("full: Performance Targets", SPEED, status(ON_LINUX, "pass"), "error"),
    ("full: Performance Targets", SPEED, lambda report: report["gates"].pop(ON_LINUX), "error"),
    ("full: Pipeline Completeness", MANIFEST, lambda found: found.update(overridden=["evaluation: call_f1"]), "fail"),
    ("full: Pipeline Completeness", MANIFEST,
     lambda found: found["files"].update({"../checkpoints/latest.pt": {"sha256": sha256_file(LATEST)}}), "error"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "change", "expected"), NOT_PASSED)
def test_what_did_not_pass_says_so(
    here: Path, name: str, path: str, change: Callable[[Any], Any], expected: str
) -> None:
    spoil(path, change)
    found = cell(name)
    assert (found.status, bool(found.reason)) == (expected, True), found


def test_a_report_that_is_no_json_is_an_error_and_the_exit_code_is_1(here: Path) -> None:
    spoil(E2E, lambda report: None)
    Path(E2E).write_text("{")
    assert cell("toy: Contract Compliance").status == "error"
    assert tiers.main(["--tier", "toy", "--reports", REPORTS]) == 1


def test_a_failed_evaluation_is_a_failure_as_its_stage_wrote_it(here: Path) -> None:
    os.replace(f"{REPORTS}/local.failing.json", LOCAL)
    found = cell("full: CAWS Evaluation")
    assert found.status == "fail" and "call_f1" in str(found.reason)


def test_the_evaluation_of_a_package_counts_and_the_worse_of_two_evaluations(here: Path) -> None:
    path = Path("coreml/artifacts/worker/decode.mlpackage")

    def of_package(report: Any) -> None:
        inputs = {name: one for name, one in report["made_by"]["inputs"].items() if name.startswith("set/")}
        report["made_by"]["inputs"] = inputs | provenance({}, {f.name: f for f in content(path)})["inputs"]

    spoil(LOCAL, of_package)
    assert cell("full: CAWS Evaluation").status == "pass"
    shutil.copy(f"{REPORTS}/local.failing.json", f"{REPORTS}/production_eval.json")
    assert cell("full: CAWS Evaluation").status == "fail"


def test_a_speed_that_a_mac_measured_passes_and_one_from_elsewhere_or_of_nothing_does_not(here: Path) -> None:
    def measured(**changes: Any) -> Gate:
        Path(SPEED).unlink()
        write_json(SPEED, timed(measured=True) | changes)
        return cell("full: Performance Targets")

    found = measured()
    assert found.status == "pass" and "within_bound" in str(found.reason)
    assert measured(machine={"system": "Linux-6.8"}).status == "error"
    slow = timed(measured=True)["packages"]
    slow[0]["rows"][1]["tokens_per_second"] = 0.0
    assert measured(packages=slow).status == "error"
    assert measured(gates=timed(measured=True)["gates"] | {ON_LINUX: {"status": "fail"}}).status == "fail"


def test_a_placeholder_package_shows_nothing(here: Path) -> None:
    shutil.rmtree("toy/toy_T128.mlpackage")
    Path("toy/toy_T128.mlpackage").mkdir()
    Path("toy/toy_T128.mlpackage/PLACEHOLDER").write_text("no coremltools\n")
    Path(E2E).unlink()
    contracts.run(contracts.ContractsConfig(Path("toy/toy_T128.mlpackage"), report=Path(E2E)))
    assert {cell(f"toy: {row}").status for row in ("CoreML Compatibility", "Contract Compliance")} == {"inconclusive"}


def test_a_golden_vector_that_fails_is_kept_beside_what_other_packages_showed(here: Path) -> None:
    weights = Path("toy/toy_T128.mlpackage") / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[1024::2] = data[1025::2]  # half of every number
    weights.unlink()
    weights.write_bytes(data)
    assert golden_vectors("toy/toy_T128.mlpackage") == 1
    found = read(INTEGRATION)["packages"]
    assert found["toy/toy_T128.mlpackage"]["gates"][tier_cells.GOLDEN_VECTORS[0]]["status"] == "fail"
    assert len(found) == 4 and cell("full: Integration Tests").status == "pass"
    assert cell("toy: Integration Tests").status == "fail"


@given(st.lists(st.sampled_from(STATUSES), min_size=1), st.randoms())
def test_the_worst_status_decides_whatever_the_order(statuses: list[Any], random: Any) -> None:
    parts = [Gate(one) for one in statuses]
    found = combined(parts).status
    random.shuffle(parts)
    assert combined(parts).status == found
    assert (found == "pass") == (set(statuses) in ({"pass"}, {"pass", "skipped"}))
    assert (found == "skipped") == (set(statuses) == {"skipped"})
    assert found in statuses and (found == "error") == ("error" in statuses)


@pytest.mark.slow
def test_the_smoke_targets_leave_what_the_smoke_tier_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "scripts", "scripts")
    shutil.copy(ROOT / "Makefile", "Makefile")
    env = os.environ | {"VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(ROOT)}
    make_all = ["make", "smoke_toy", "smoke_torch", "smoke_training"]
    done = subprocess.run(make_all, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert tiers.main(["--tier", "smoke"]) == 0
