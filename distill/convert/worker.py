"""Convert every program of an export folder: the primary prefill shape is model.mlpackage, decode is decode.mlpackage.

distill convert-all --in models/student/exported --out coreml/artifacts/worker
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from distill.artifacts import read_json, require_replaceable, sha256_file, write_json
from distill.contract import Contract, read_contract
from distill.convert import coreml
from distill.convert.package import sidecar_folder
from distill.errors import InputError, stage_main
from distill.export import resume

_RECORD = ".converted.json"
"""In the folder of packages: what each was made from, and the sha256 of its files."""


class Converted(NamedTuple):
    """What an export folder became."""

    packages: list[Path]
    """The primary first."""
    failed: list[str]
    """Programs that had failed their validation when they were exported: there is no package of them."""


def run(source: Path, out: Path) -> Converted:
    """Convert all; a package that is there, whole, and of the same inputs is kept.

    InputError if there is no prefill program, or programs of two models.
    """
    contracts = {path: read_contract(path) for path in sorted(source.glob("*_contract.json"))}
    primary = next((p for p, c in contracts.items() if c.mode == "prefill" and c.sequence() == _primary(c)), None)
    if primary is None:
        raise InputError(f"{source}: holds no exported prefill program; run make pytorch-worker first")
    lengths = {c.sequence() for c in contracts.values() if c.mode == "prefill"}
    if absent := sorted(set(contracts[primary].enumerated_T) - lengths):
        raise InputError(f"{source}: lacks the enumerated T = {', '.join(map(str, absent))}; export it again")
    if alien := [p.name for p, c in contracts.items() if c.weights_sha256 != contracts[primary].weights_sha256]:
        raise InputError(f"{source}: {alien[0]} is of another model than {primary.name}; export into an empty folder")
    converted = Converted([], [])
    for path in [primary, *(p for p in contracts if p != primary)]:
        contract = contracts[path]
        name = {"decode": "decode", "block": "block"}.get(contract.mode, f"prefill_T{contract.sequence()}")
        package = out / f"{'model' if path == primary else name}.mlpackage"
        if (checked := resume.own_validation(contract)).status == "fail":
            print(f"not converted: {contract.name} failed its validation when it was exported: {checked.reason}")
            _remove(package)
            converted.failed.append(contract.name)
            continue
        assert contract.file is not None
        _convert(source / contract.file.name, path, package)
        converted.packages.append(package)
    return converted


def _convert(program: Path, contract: Path, package: Path) -> None:
    """Make a package, or keep it."""
    given = {"program": sha256_file(program), "contract": sha256_file(contract)}
    inputs = resume.fingerprint(given, ("data", "export", "convert"))
    if _record(package.parent).get(package.name) == {"inputs": inputs, "files": _files(package)}:
        print(f"kept {package}: made from {program.name}")
        return
    print(f"converting {program.name} to {package}", flush=True)
    coreml.run(coreml.ConvertConfig(program, package, contract=contract))
    record = _record(package.parent) | {package.name: {"inputs": inputs, "files": _files(package)}}
    write_json(package.parent / _RECORD, record)


def _record(out: Path) -> dict[str, Any]:
    """What was made; nothing where the record cannot be read."""
    try:
        found = read_json(out / _RECORD)
    except InputError:
        return {}
    return found if isinstance(found, dict) else {}


def _files(package: Path) -> dict[str, str]:
    folders = (package, sidecar_folder(package))
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(package.parent)): sha256_file(file) for file in sorted(files)}


def _remove(package: Path) -> None:
    """A package of an earlier export would be taken for one of this."""
    for folder in (package, sidecar_folder(package)):
        require_replaceable(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _primary(contract: Contract) -> int:
    return int(contract.made_by.get("config", {}).get("primary", 0))


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Parse and convert; exit 1 where a program could not be, the others being converted all the same."""
    parser = argparse.ArgumentParser(prog="distill convert-all", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--in", dest="source", type=Path, default=Path("models/student/exported"))
    parser.add_argument("--out", type=Path, default=Path("coreml/artifacts/worker"))
    args = parser.parse_args(argv)
    found = run(args.source, args.out)
    failed = f"; failed: {', '.join(found.failed)}" if found.failed else ""
    print(f"{len(found.packages)} packages in {args.out}{failed}")
    return 1 if found.failed else 0
