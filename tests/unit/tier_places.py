"""What the documented targets leave, in the current folder, from the toys of a test session; and ways to spoil it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.artifacts import provenance, sha256_file, write_json
from distill.evaluate import local, speed, timing
from distill.evaluate.contextual import make
from distill.evaluate.items import KINDS
from distill.gates import to_json
from distill.verify import contracts
from tests.conftest import Toy

ROOT = Path(__file__).resolve().parents[2]
WORKER = {"model": "prefill", "prefill_T128": "prefill_long", "decode": "decode"}
LATEST, EXPORTED = "models/student/checkpoints/latest.pt", "models/student/exported"
REPORTS, BUNDLE = "eval/reports", "models/student/deployed"
MANIFEST = f"{BUNDLE}/deployment_manifest.json"


def build(toy: Toy) -> None:
    """Every tier, the toy tier in `toy/`. Reports are those of the real stages, but for speed and the bundle."""
    for name in ("prefill", "prefill_long", "decode"):
        contracts.run(contracts.ContractsConfig(getattr(toy, name), report=Path(f"verified/{name}.json")))
    _toy_tier(toy)
    _smoke_tier(toy)
    _full_tier(toy)
    assert (
        golden_vectors("toy/toy_T128.mlpackage", *(f"coreml/artifacts/worker/{name}.mlpackage" for name in WORKER)) == 0
    )


def golden_vectors(*packages: str) -> int:
    """pytest's exit code."""
    test = ROOT / "tests/test_coreml_golden_vectors.py"
    return int(pytest.main(["-q", "-p", "no:cacheprovider", str(test), "--package", *packages]))


def put(source: Path, target: str) -> None:
    """Copy a file."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def package(source: Path, target: Path) -> None:
    """Copy a package with what lies beside it."""
    for suffix in (".mlpackage", ".contract"):
        shutil.copytree(source.with_suffix(suffix), target.with_suffix(suffix))


def _toy_tier(toy: Toy) -> None:
    put(toy.data, "toy/toy_kd.jsonl")
    put(toy.checkpoint, "toy/toy.ckpt")
    put(toy.folder / "toy.report.json", "toy/toy.report.json")
    shutil.copytree(toy.exported, "toy/toy_exported")
    package(toy.prefill_long, Path("toy/toy_T128"))
    put(Path("verified/prefill_long.json"), f"{REPORTS}/toy_e2e.json")


def _smoke_tier(toy: Toy) -> None:
    """Both ways from one export; ONNX's own is in the slow test."""
    export = toy.exported / "student_prefill_T64"
    for folder, name, program, short in (("onnx", "toy", "toy_sanitized.onnx", "toy"),
                                         ("models", "toy_torch", "toy_torch.pt", "torch")):  # fmt: skip
        put(export.with_suffix(".pt"), f"{folder}/{program}")
        put(export.with_name(f"{export.name}_contract.json"), f"{folder}/{name}_contract.json")
        put(toy.checkpoint, f"{folder}/{name}_checkpoint.pt")
        package(toy.prefill, Path(f"coreml/artifacts/{name}/model"))
        put(Path("verified/prefill.json"), f"{REPORTS}/smoke_{short}.json")
    put(toy.data, "training/toy_test/toy_dataset.jsonl")
    put(toy.checkpoint, "training/toy_test/checkpoints/latest.pt")
    put(toy.folder / "toy.report.json", "training/toy_test/checkpoints/toy.report.json")


def _full_tier(toy: Toy) -> None:
    put(toy.checkpoint, LATEST)
    put(toy.folder / "toy.report.json", "models/student/checkpoints/toy.report.json")
    shutil.copytree(toy.exported, EXPORTED)
    for name, source in WORKER.items():
        package(getattr(toy, source), Path(f"coreml/artifacts/worker/{name}"))
        put(Path(f"verified/{source}.json"), f"{REPORTS}/worker_{name}.json")
    _evaluation()
    write_json(f"{REPORTS}/speed.json", timed(measured=False))
    Path(BUNDLE).mkdir()
    Path(BUNDLE, "README").write_text("a bundle")
    write_json(MANIFEST, {"student": {"checkpoint_sha256": sha256_file(LATEST)}, "overridden": [],
                          "files": {"README": {"sha256": sha256_file(f"{BUNDLE}/README"), "bytes": 8}}})  # fmt: skip


def _evaluation() -> None:
    """The toy's own, which fails, as local.failing.json; and the same as if every gate had passed."""
    found = make.scenarios(seed=3)
    chosen = [one for kind in KINDS for one in [one for one in found if one.item.kind == kind][:6]]
    make.write(Path("data/contextual_final.jsonl"), chosen, {"seed": 3, "scale": 1}, {})
    Path("evaluation.yaml").write_text("limits: {max_turns: 4, max_new_tokens: 4}\nbootstrap: {samples: 20}\n"
                                       "gates: {call_f1: {at_least: '0.85', n_min: 10}}\n")  # fmt: skip
    assert local.main(["--config", "evaluation.yaml"]) == 1
    report = read(f"{REPORTS}/local.json")
    report["header"]["criteria"]["changed"] = []
    write_json(f"{REPORTS}/local.failing.json", report)
    for gate in report["gates"].values():
        gate["status"] = "pass"
    write_json(f"{REPORTS}/local.json", report | {"overall": "pass"})


def timed(*, measured: bool) -> dict[str, Any]:
    """A report of `distill speed`, by its own judgement of timings."""
    packages = [Path(f"coreml/artifacts/worker/{name}.mlpackage") for name in sorted(WORKER)]
    results, verdicts = [], {}
    for path in packages:
        rows = [{"unit": unit, "function": "main", "status": "measured", "tokens_per_second": 100.0} if measured else
                {"unit": unit, "status": "skipped", "reason": "Core ML runs on macOS only"}
                for unit in timing.UNITS]  # fmt: skip
        own = {"unit": timing.EXECUTOR, "status": "measured", "function": "main", "tokens_per_second": 50.0}
        result = {"package": str(path), "rows": [own, *rows], "placement": {"status": "skipped", "reason": "no plan"},
                  "functions": {"main": {"at_most_tokens_per_second": []}}}  # fmt: skip
        results.append(result)
        verdicts |= {f"{name} {path}": gate for name, gate in speed._judge(result, None).items()}
    files = {str(file): file for path in packages for file in sorted(path.rglob("*")) if file.is_file()}
    return {"schema": "distill-speed/1", "machine": {"system": "macOS-15.1-arm64" if measured else "Linux-6.8"},
            "gates": to_json(verdicts), "packages": results, "made_by": provenance({}, files)}  # fmt: skip


def read(path: str) -> Any:
    """A JSON file."""
    return json.loads(Path(path).read_text())


def spoil(path: str, change: Callable[[Any], Any] | None = None) -> None:
    """Change a JSON file; any other gets one byte more. The file is replaced: copies may share it."""
    before = Path(path).read_bytes()
    Path(path).unlink()
    if change is None:
        Path(path).write_bytes(before + b"\n")
        return
    value = json.loads(before)
    change(value)
    Path(path).write_text(json.dumps(value))
