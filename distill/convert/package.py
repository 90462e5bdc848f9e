"""A Core ML package on disk with its contract: written whole, deterministic, self-describing.

`X.mlpackage` carries its contract (and the sha256 of weight.bin and of every sidecar file) in its user-defined
metadata; `X.contract/` beside it holds contract.json, the tokenizer, the chat template, goldens and evaluation prompts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import msgspec

from distill.artifacts import atomic_dir, canonical_json, sha256_file
from distill.contract import SIDECAR_NAMES, Contract, FileRef, sidecar_path
from distill.errors import InputError, PackageError

CONTRACT_KEY = "distill.contract"
SPEC_FILE = "Data/com.apple.CoreML/model.mlmodel"
WEIGHT_FILE = "Data/com.apple.CoreML/weights/weight.bin"
WEIGHT_NAME = "weights/weight.bin"
"""What a contract calls the weight file."""
PLACEHOLDER = "PLACEHOLDER"
_VOLATILE_METADATA = ("com.github.apple.coremltools.conversion_date",)
_UUID_SPACE = uuid.UUID("6f1a2c0e-6d0f-5e3c-9d6a-4a7f3f1b8f10")


def sidecar_folder(package: Path) -> Path:
    """`X.contract` for `X.mlpackage`."""
    return package.with_suffix(".contract")


def save_package(model: Any, out: Path, contract: Contract | None, sidecar_from: Path | None) -> Contract | None:
    """Write `out` and, where there is a contract, its sidecar from the files beside the export in `sidecar_from`.

    Returns the package's contract, with the fingerprints of weight.bin and of the program. Both folders appear whole
    or not at all.
    """
    with contextlib.ExitStack() as stack:
        # both are complete before either is renamed: a full disk leaves the old package and the old sidecar
        temporary = stack.enter_context(atomic_dir(out))
        _save_model(model, temporary)
        weights = temporary / WEIGHT_FILE
        spec = _read_spec(temporary / SPEC_FILE)
        if contract is not None and sidecar_from is not None:
            ref = FileRef(WEIGHT_NAME, sha256_file(weights), weights.stat().st_size) if weights.is_file() else None
            refs = {
                role: msgspec.structs.replace(ref_, name=SIDECAR_NAMES[role]) for role, ref_ in contract.sidecar.items()
            }
            contract_out = msgspec.structs.replace(
                contract,
                schema="distill-package/1",
                name=out.stem,
                file=ref,
                sidecar=refs,
                program_sha256=program_sha256(spec),
            )
            sidecar = stack.enter_context(atomic_dir(sidecar_folder(out)))
            _write_sidecar(sidecar, contract, contract_out, sidecar_from)
            contract = contract_out
        if contract is not None:
            spec.description.metadata.userDefined[CONTRACT_KEY] = canonical_json(msgspec.to_builtins(contract))
        (temporary / SPEC_FILE).write_bytes(spec.SerializeToString(deterministic=True))
        _fix_manifest(temporary / "Manifest.json")
    return contract


def save_placeholder(out: Path, reason: str) -> None:
    """A package-shaped folder that says why it is not a package."""
    with atomic_dir(out) as temporary:
        (temporary / PLACEHOLDER).write_text(reason + "\n")


def refuse_placeholder(package: Path) -> None:
    """PackageError if `package` is missing or a placeholder."""
    if not package.is_dir():
        raise PackageError(f"{package}: no such package")
    mark = package / PLACEHOLDER
    if mark.is_file():
        raise PackageError(f"{package} is a placeholder package, nothing in it can run: {mark.read_text().strip()}")


def program_sha256(spec: Any) -> str:
    """sha256 over a specification but for its user-defined metadata, where the contract that holds this lies."""
    bare = type(spec)()
    bare.CopyFrom(spec)
    bare.description.metadata.SetInParent()
    bare.description.metadata.userDefined.clear()
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def _save_model(model: Any, folder: Path) -> None:
    """MLModel.save insists on the .mlpackage suffix, so it writes inside and is moved up."""
    inner = folder / "inner.mlpackage"
    model.save(str(inner))
    for part in inner.iterdir():
        shutil.move(str(part), folder / part.name)
    inner.rmdir()


def _read_spec(path: Path) -> Any:
    """The specification that coremltools wrote, without what differs from run to run."""
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString(path.read_bytes())
    for key in _VOLATILE_METADATA:
        spec.description.metadata.userDefined.pop(key, None)
    return spec


def _fix_manifest(path: Path) -> None:
    """Replace the random identifiers of Manifest.json by ones derived from each item's path."""
    manifest = json.loads(path.read_text())
    renamed = {
        old: str(uuid.uuid5(_UUID_SPACE, item["path"])).upper() for old, item in manifest["itemInfoEntries"].items()
    }
    manifest["itemInfoEntries"] = {renamed[old]: item for old, item in manifest["itemInfoEntries"].items()}
    manifest["rootModelIdentifier"] = renamed[manifest["rootModelIdentifier"]]
    path.write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")


def _write_sidecar(folder: Path, exported: Contract, package: Contract, source: Path) -> None:
    for role, ref in exported.sidecar.items():
        origin = sidecar_path(source, ref)
        if sha256_file(origin) != ref.sha256:
            raise InputError(f"{origin}: does not match the sha256 in its contract")
        shutil.copyfile(origin, folder / package.sidecar[role].name)
    (folder / "contract.json").write_text(json.dumps(msgspec.to_builtins(package), indent=2) + "\n")
