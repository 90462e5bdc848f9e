"""A trained student -> a bundle: package, tokenizer, template, runtime configuration, manifest, card, quick start.

Nothing is taken on trust: the package is built from the checkpoint (or given, and then shown to be made from it), and
its gates are run here. The folder appears whole or not at all; the same inputs give the same bytes.
"""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from distill import checkpoint, config, gates
from distill.artifacts import atomic_dir, code_version, require_regular, sha256_file
from distill.checkpoint import Checkpoint
from distill.contract import SIDECAR_NAMES, Contract
from distill.convert import functions
from distill.convert.package import SPEC_FILE, WEIGHT_FILE, sidecar_folder
from distill.data.records import Dataset, sidecar
from distill.deploy import facts, judge, verify
from distill.deploy.card import CARD, model_card
from distill.deploy.config import DeployConfig
from distill.deploy.manifest import MANIFEST, Manifest, dump, files_below, fingerprint, parse, read_manifest, scan
from distill.deploy.quickstart import QUICKSTART, quickstart
from distill.deploy.runtime import RUNTIME, runtime_config
from distill.errors import DistillError, InputError, Skipped, describe_os_error
from distill.export.prompts import TOY_ITEMS
from distill.gates import Gate
from distill.verify import contracts, distribution
from distill.verify.limits import LimitsConfig
from distill.verify.runner import PackageRunner
from distill.versions import installed, versions

Say = Callable[[str], None]
Reports = dict[str, dict[str, Any]]
"""By name: contracts, distribution, evaluation."""


class Built(NamedTuple):
    """A bundle that was written."""

    path: Path
    manifest_sha256: str
    overridden: list[str]


def run(settings: DeployConfig, package: Path | None = None, *, allow_failed: bool = False, say: Say = print) -> Built:
    """Build a bundle. `package` is bundled instead of one built from the checkpoint.

    InputError for inputs that are bad or do not belong together; DistillError where gates did not pass, unless
    `allow_failed`.
    """
    out, source = Path(settings.out), Path(settings.checkpoint)
    require_bundle_or_nothing(out)
    limits = config.load(settings.limits, LimitsConfig)
    say(f"1/5 reading {source}")
    judge.evaluation(Path(settings.evaluation), set())  # a report that is none is refused before the work
    loaded, sha256 = checkpoint.load(source), sha256_file(source)
    data = facts.data_path(loaded, settings.data)
    with atomic_dir(out) as folder:
        inside = _package(settings, loaded, package, folder, say)
        runner = PackageRunner(inside)
        runtime = runtime_config(runner.contract, inside.name, runner.tokenizer(), settings.sampling)
        student = facts.student_facts(loaded, sha256, runner.contract, inside.name)
        say(f"3/5 verifying {inside.name}: its contract")
        reports: Reports = {"contracts": contracts.run(contracts.ContractsConfig(inside))}
        say(f"4/5 verifying {inside.name}: held-out text of {data.name if data else 'no dataset'}")
        reports["distribution"] = _distribution(inside, source, data, limits)
        for place in (folder, data.parent if data else folder):
            reports = facts.without_folder(reports, place)
        reports["evaluation"] = judge.evaluation(Path(settings.evaluation), {sha256, *_of_package(inside)})
        verdicts = {name: judge.gates_of(report, name) for name, report in reports.items()}
        unmet = _require_met(verdicts, out, allow_failed, say)
        say(f"5/5 writing {out}")
        _write(runner, runtime, reports, folder)
        manifest = Manifest(
            name=settings.name,
            package=inside.name,
            date=_date(),
            files=files_below(folder),
            student=student,
            teacher=facts.teacher_facts(loaded, data, settings.teacher_licence),
            licence=settings.licence,
            data=facts.data_facts(loaded),
            lineage=facts.placeless(loaded.lineage),
            training=facts.training_facts(loaded, source),
            training_configuration=facts.placeless(loaded.provenance.get("config") or {}),
            configuration=_configuration(settings),
            versions=_versions(runner.contract),
            gates=verdicts,
            overridden=unmet,
        )
        digest = _finish(manifest, runtime, folder)
        _require_verified(folder, out, say)
    return Built(out, digest, unmet)


def _require_met(verdicts: dict[str, dict[str, Gate]], out: Path, allow_failed: bool, say: Say) -> list[str]:
    """The gates that did not pass; DistillError where there are some and that is not allowed."""
    unmet = judge.unmet(verdicts)
    for line in unmet:
        say(f"not passed: {line}")
    if unmet and not allow_failed:
        raise DistillError(f"{out} was not built: {len(unmet)} gates did not pass, the first: {unmet[0]}; "
                           "--allow-failed-gates builds it all the same, and says so in it")  # fmt: skip
    return unmet


def require_bundle_or_nothing(out: Path) -> None:
    """InputError if something is at `out` that is no bundle, or a bundle that somebody has put files into."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"cannot write {out}: something other than a folder is in the way")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / MANIFEST).is_file():
        raise InputError(f"cannot write {out}: a folder that is no bundle (no {MANIFEST}) is in the way")
    listed = read_manifest(out)[0].files
    if extra := sorted(path for path, size in scan(out)[0].items() if size is not None and path not in listed):
        raise InputError(f"cannot write {out}: it holds {extra[0]!a}, which is not the bundle's; move it away")


def _package(settings: DeployConfig, loaded: Checkpoint, given: Path | None, folder: Path, say: Say) -> Path:
    """The package and its sidecar in the bundle's folder."""
    if given is not None:
        say(f"2/5 taking {given}")
        runner = PackageRunner(given)  # refuses what is missing, a placeholder, or without its sidecar
        inside = folder / f"{settings.name}.mlpackage"
        if runner.contract.name != settings.name:
            raise InputError(f"{given}: is called {runner.contract.name} in its contract, not {settings.name}")
        for part, place in ((given, inside), (sidecar_folder(given), sidecar_folder(inside))):
            _copy(part, place)
        return inside
    say("2/5 building the package")
    toy = (loaded.provenance.get("dataset") or {}).get("kind") in TOY_ITEMS
    asked = functions.FunctionsConfig(
        Path(settings.checkpoint),
        folder / f"{settings.name}.mlpackage",
        settings.context,
        tuple(settings.prefill),
        settings.formats,
        toy,
    )
    functions.build(asked, lambda line: say(f"    {line}"))
    return asked.out


def _copy(source: Path, target: Path) -> None:
    """A folder of plain files; InputError where it holds anything else."""
    if not source.is_dir():
        raise InputError(f"{source}: missing")
    found, faults = scan(source)
    if faults:
        raise InputError(f"{source}: {faults[0]}")
    target.mkdir()
    for path, size in sorted(found.items()):
        if size is None:
            (target / path).mkdir(parents=True, exist_ok=True)
        else:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            require_regular(source / path)
            try:
                shutil.copyfile(source / path, target / path)
            except OSError as error:
                raise InputError(f"cannot write {target}: {describe_os_error(error)}") from error


def _distribution(package: Path, source: Path, data: Path | None, limits: LimitsConfig) -> dict[str, Any]:
    try:
        result, details = _verdict(package, source, data, limits)
    except Skipped as skipped:
        result, details = {"distribution": gates.skipped(skipped.reason)}, {}
    return {"schema": "distill-distribution/1", "gates": gates.to_json(result), **details}


def _verdict(
    package: Path, source: Path, data: Path | None, limits: LimitsConfig
) -> tuple[dict[str, Gate], dict[str, Any]]:
    if data is None or not data.is_file():
        raise Skipped(f"{data.name if data else 'the dataset'}: the KD dataset is not there")
    dataset, runner = Dataset.open(data), PackageRunner(package)
    models = distribution.load_models(runner, source)  # read again: facts rounds the weights in place
    examples = distribution.held_out(dataset, models.tokenizer, runner.capacity)
    verdict = distribution.verdict(runner, models.reference, models.deployed, examples, limits)
    inputs = {"data": sha256_file(data), "header": sha256_file(sidecar(data) / "header.json")}
    return verdict.gates, {**verdict.details, "inputs": inputs}


def _of_package(package: Path) -> set[str]:
    return {sha256_file(package / file) for file in (SPEC_FILE, WEIGHT_FILE) if (package / file).is_file()}


def _write(runner: PackageRunner, runtime: dict[str, Any], reports: Reports, folder: Path) -> None:
    """Tokenizer, template, runtime configuration and reports beside the package."""
    for role in ("tokenizer", "chat_template"):
        shutil.copyfile(runner.sidecar(role), folder / SIDECAR_NAMES[role])
    (folder / RUNTIME).write_bytes(dump(runtime))
    (folder / "reports").mkdir()
    for name, report in reports.items():
        (folder / "reports" / f"{name}.json").write_bytes(dump(report))


def _configuration(settings: DeployConfig) -> dict[str, Any]:
    """The configuration but for where the bundle lies, which it is not to depend on."""
    used: dict[str, Any] = facts.placeless(config.as_dict(settings))
    del used["out"]
    return used


def _versions(contract: Contract) -> dict[str, dict[str, str]]:
    return {
        "built by": {"distill": str(installed("distill")), "code": code_version()} | versions(),
        "converted by": {"code": str(contract.made_by.get("code", "unknown"))} | contract.versions,
    }


def _finish(manifest: Manifest, runtime: dict[str, Any], folder: Path) -> str:
    """The pages, and the manifest last. They are rendered from the manifest as it will be read."""
    manifest = parse(dump(manifest))
    pages = {CARD: model_card(manifest, runtime), QUICKSTART: quickstart(manifest, runtime)}
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    files = manifest.files | {name: fingerprint(folder / name) for name in pages}
    (folder / MANIFEST).write_bytes(dump(msgspec.structs.replace(manifest, files=files)))
    return sha256_file(folder / MANIFEST)


def _require_verified(folder: Path, out: Path, say: Say) -> None:
    """DistillError where the bundle does not verify: what --allow-failed-gates lets through, too, is whole."""
    found = verify.run(folder)
    if wrong := [f"{name}: {gate.reason}" for name, gate in found.gates.items() if gate.status in ("fail", "error")]:
        raise DistillError(f"{out} was not built: the bundle does not verify: {wrong[0]}")
    say(f"    it writes: {found.answer!r}")


def _date() -> str | None:
    """The day of SOURCE_DATE_EPOCH (reproducible-builds.org); None where it is not set."""
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if text is None:
        return None
    try:
        return datetime.datetime.fromtimestamp(int(text), datetime.UTC).date().isoformat()
    except (ValueError, OverflowError, OSError) as error:
        raise InputError(f"SOURCE_DATE_EPOCH {text!r} is no number of seconds") from error
