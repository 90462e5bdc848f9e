"""How the cells of `distill gates` are judged, but for the completeness of a pipeline (tier_pipelines.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from distill import gates
from distill.artifacts import code_version
from distill.errors import InputError
from distill.evaluate.evidence import (
    Evidence,
    File,
    NoEvidence,
    Origin,
    Verification,
    attempt,
    combined,
    gathered,
    judged,
    require_code,
)
from distill.gates import Gate

CORE_ML = ("package_loads", "shapes_run", "outputs_finite", "outputs_vary", "parity_exact", "parity_fp16",
           "ane_eligibility", "core_ml")  # fmt: skip
CONTRACT = ("contract", "program_unaltered", "weights_unaltered", "sidecar_unaltered", "interface", "state",
            "named_points", "greedy_decode", "tool_span_f1")  # fmt: skip
"""With CORE_ML, the gates of distill/verify/contracts.py."""
MAY_BE_SKIPPED = {
    "smoke": {"core_ml"},
    "toy": {"core_ml", "state"},
    "full": {"core_ml", "state", "named_points", "tool_span_f1"},
}
"""What only a Mac can answer; a program without state; a deep model's points; prompts that ask for no call."""
UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")
"""Core ML's compute units, as distill/evaluate/timing.py times them."""
GOLDEN_VECTORS = (
    "test_without_rounding_the_package_computes_what_the_trained_model_means",
    "test_as_it_runs_in_fp16_the_package_stays_within_the_derived_error",
    "test_the_golden_vectors_tell_a_different_model_apart",
    "test_core_ml_itself_stays_within_the_derived_error",
)
"""tests/test_coreml_golden_vectors.py; the last is skipped off macOS."""

ARTIFACTS, WORKER = Path("coreml/artifacts"), Path("coreml/artifacts/worker")
LATEST, BUNDLE = Path("models/student/checkpoints/latest.pt"), Path("models/student/deployed")
DATASET = Path("data/contextual_final.jsonl")
CONVERT, EVALUATE, MULTI = "make coreml-worker", "make eval-runner-local", "make toy-e2e-multi"
EVALUATIONS = ("local.json", "production_eval.json")
"""Where the documented commands write."""
GOLDEN = "pytest tests/test_coreml_golden_vectors.py"


class Look(NamedTuple):
    """One column as it is judged."""

    tier: str
    reports: Path
    toy: Path
    """Where `make toy-e2e` works."""
    evidence: Evidence

    @property
    def code(self) -> str | None:
        """The version that must have made the evidence. A toy is evidence of the code; a trained student is evidence
        of itself, whatever was changed since."""
        return code_version() if self.tier != "full" else None


class Verified(NamedTuple):
    """A package, the report that verifies it, and the target that makes both."""

    package: Path
    report: Path
    target: str


def packages_of(look: Look) -> list[Verified]:
    """The packages of a tier; NoEvidence where a student has none."""
    reports, toy = look.reports, look.toy
    if look.tier == "smoke":
        return [Verified(ARTIFACTS / name / "model.mlpackage", reports / f"smoke_{short}.json", f"make smoke_{short}")
                for name, short in (("toy", "toy"), ("toy_torch", "torch"))]  # fmt: skip
    if look.tier == "toy":
        return [Verified(toy / "toy_T128.mlpackage", reports / "toy_e2e.json", "make toy-e2e"),
                *(Verified(toy / f"toy_T{length}.mlpackage", reports / f"toy_e2e_T{length}.json", MULTI)
                  for length in (64, 256))]  # fmt: skip
    if not (WORKER / "model.mlpackage").is_dir():
        raise NoEvidence(f"not run: {CONVERT} ({WORKER / 'model.mlpackage'} is not there)")
    return [Verified(path, reports / f"worker_{path.stem}.json", CONVERT)
            for path in sorted(WORKER.glob("*.mlpackage"))]  # fmt: skip


def verification(look: Look, one: Verified) -> Verification:
    """The report of a package, of this very package; NoEvidence otherwise."""
    report = look.evidence.report(one.report, Verification, one.target)
    look.evidence.require_package(report.made_by.inputs, one.package, str(one.report), one.target)
    require_code(report.made_by, str(one.report), look.code, one.target)
    return report


def was_verified(look: Look, one: Verified) -> Gate:
    """However that went."""
    verification(look, one)
    return Gate("pass")


def core_ml(look: Look) -> Iterator[Gate]:
    """The packages load, run, and compute what they should."""
    return _each_package(look, CORE_ML)


def contracts(look: Look) -> Iterator[Gate]:
    """The packages keep their contracts, as a whole."""
    return _each_package(look, CORE_ML + CONTRACT)


def _each_package(look: Look, wanted: tuple[str, ...]) -> Iterator[Gate]:
    def check(one: Verified) -> Iterator[Gate]:
        return judged(verification(look, one).gates, wanted, MAY_BE_SKIPPED[look.tier], one.report.name)

    for one in packages_of(look):
        # the lengths that toy-e2e does not make count only where toy-e2e-multi has just made them
        if one.target != MULTI or attempt(was_verified, look, one).status != "inconclusive":
            yield from gathered(check, one)


# --- CAWS ------------------------------------------------------------------------------------------------------------


class _Header(msgspec.Struct, frozen=True):
    fingerprints: dict[str, str | None]
    model: dict[str, Any]
    broker: str
    criteria: dict[str, Any]
    items: int | None = None


class _Inputs(msgspec.Struct, frozen=True):
    inputs: dict[str, File]


class _Evaluation(msgspec.Struct, frozen=True):
    """What is looked at of an evaluation's report."""

    schema: Literal["eval-report/1"]
    overall: str
    gates: dict[str, Gate]
    header: _Header
    made_by: _Inputs


def evaluations(look: Look) -> dict[str, _Evaluation]:
    """The reports on what is here; NoEvidence where there is none."""
    found, stale = {}, []
    for name in EVALUATIONS:
        if (path := look.reports / name).is_file():
            try:
                found[name] = _evaluation(look, path)
            except NoEvidence as error:
                stale.append(error)
    if not found:
        raise stale[0] if stale else NoEvidence(f"not run: {EVALUATE} ({look.reports / EVALUATIONS[0]} is not there)")
    return found


def _evaluation(look: Look, path: Path) -> _Evaluation:
    """The report on the checkpoint or a package that is here, on the set that is here, by these rules."""
    from distill.evaluate.report import scorer_sha256

    found = look.evidence.report(path, _Evaluation, EVALUATE)
    inputs = {name: file.sha256 for name, file in found.made_by.inputs.items()}
    beside = DATASET.with_name(f"{DATASET.name}.d")
    of_set = {"set/items": DATASET} | {f"set/{name}": beside / name for name in ("fixtures.jsonl", "tools.jsonl")}
    for name, file in of_set.items():
        if inputs.get(name) != look.evidence.sha256(file, "make contextual-dataset"):
            raise NoEvidence(f"stale: {path} is of another {file}: {EVALUATE}")
    used = {sha256 for name, sha256 in inputs.items() if name not in of_set}
    packages = [*sorted(WORKER.glob("*.mlpackage")), *sorted(BUNDLE.glob("*.mlpackage"))]
    models = [set(look.evidence.package_files(package, CONVERT).values()) for package in packages]
    models += [{look.evidence.sha256(LATEST, "make worker")}] if LATEST.is_file() else []
    if not any(model and model <= used for model in models):
        raise NoEvidence(f"stale: {path} is of another model than the checkpoint and packages here: {EVALUATE}")
    if found.header.fingerprints.get("scorer_code") != scorer_sha256():
        raise NoEvidence(f"stale: {path} was scored by another version of the rules: {EVALUATE}")
    return found


def caws(look: Look) -> Iterator[Gate]:
    """What was evaluated passed: every gate, by the risk tier's own criteria, on the whole set."""
    for name, found in evaluations(look).items():
        yield from _caws(name, found)


def _caws(name: str, found: _Evaluation) -> Iterator[Gate]:
    from distill.evaluate.criteria import CRITERIA

    wanted = dict.fromkeys([*CRITERIA, "fingerprints", "complete", "self_test", *found.gates])
    verdicts = list(judged(found.gates, wanted, (), name))
    yield from verdicts
    said = combined(verdicts).status
    if (said == "pass") != (found.overall == "pass"):
        raise InputError(f"{name}: overall is {found.overall!r}, its gates say {said}")
    header = found.header
    weaker = {
        f"judged by other criteria than those of {header.criteria.get('tier')}": bool(header.criteria.get("changed")),
        f"of {header.items} items, not of the whole set": header.items is not None,
        f"its broker was {header.broker}, not replay": header.broker != "replay",
        "its decoding was constrained": bool((header.model.get("decoding") or {}).get("constrained")),
    }
    yield from (Gate("inconclusive", reason=f"{name}: {why}: {EVALUATE}") for why, is_so in weaker.items() if is_so)


# --- performance -----------------------------------------------------------------------------------------------------


class _Timed(msgspec.Struct, frozen=True):
    package: str
    rows: list[dict[str, Any]]


class _Speed(msgspec.Struct, frozen=True):
    """What is looked at of a report of `distill speed`."""

    schema: Literal["distill-speed/1"]
    machine: dict[str, Any]
    gates: dict[str, Gate]
    packages: list[_Timed]
    made_by: Origin


def performance(look: Look) -> Iterator[Gate]:
    """Core ML's speed was measured on a Mac, of every package."""
    target, packages = "make speed-coreml", [one.package for one in packages_of(look)]
    found = look.evidence.report(look.reports / "speed.json", _Speed, target)
    for package in packages:
        yield from gathered(_speed_of, look, found, package, target)


def _speed_of(look: Look, found: _Speed, package: Path, target: str) -> Iterator[Gate]:
    """Skipped where it was not measured, with the reason; InputError where it says pass without timings of a Mac."""
    timed = next((one for one in found.packages if one.package == str(package)), None)
    inputs = {name: file.sha256 for name, file in found.made_by.inputs.items()}
    if timed is None or any(inputs.get(f) != now for f, now in look.evidence.package_files(package, CONVERT).items()):
        raise NoEvidence(f"stale: speed.json is of another {package}: {target}")
    rows = [row for row in timed.rows if row.get("unit") in UNITS and row.get("status") == "measured"]
    names = [f"{name} {package}" for name in ("core_ml_speed", "within_bound", "placement")]
    speed = found.gates.get(names[0], Gate("error"))
    if not rows and speed.status == "skipped":
        yield gates.skipped(f"not measured ({speed.reason})")
        return
    figures = [row.get("tokens_per_second") for row in rows]
    real = figures and all(isinstance(figure, float) and math.isfinite(figure) and figure > 0 for figure in figures)
    if not real or not str(found.machine.get("system")).startswith("macOS"):
        raise InputError(f"speed.json: {package} was not timed by Core ML on macOS, and is not called skipped")
    yield from judged(found.gates, names, names[1:], "speed.json")


# --- golden vectors --------------------------------------------------------------------------------------------------


class _Golden(msgspec.Struct, frozen=True):
    """What tests/conftest.py writes of the golden vectors, by package."""

    schema: Literal["distill-integration/1"]
    packages: dict[str, Verification]


def integration(look: Look) -> Iterator[Gate]:
    """The golden vectors passed, on the packages of this tier."""
    packages = [one.package for one in packages_of(look) if one.target != MULTI]
    target = GOLDEN if look.tier == "toy" else f"{GOLDEN} --package {WORKER}/*.mlpackage"
    for package in packages:
        yield from gathered(_golden, look, package, target)


def _golden(look: Look, package: Path, target: str) -> Iterator[Gate]:
    path = look.reports / "integration.json"
    found = look.evidence.report(path, _Golden, target).packages
    one = next((made for name, made in found.items() if Path(name).resolve() == package.resolve()), None)
    if one is None:
        raise NoEvidence(f"not run: {target} ({path} has nothing of {package})")
    look.evidence.require_package(one.made_by.inputs, package, str(path), target)
    require_code(one.made_by, str(path), look.code, target)
    if missing := [name for name in GOLDEN_VECTORS if name not in one.gates]:
        raise NoEvidence(f"not run: {target} ({path} lacks {', '.join(missing)} of {package})")
    yield from judged(one.gates, GOLDEN_VECTORS, GOLDEN_VECTORS[-1:], f"{path.name}: {package.name}")
