"""An export that goes on where it was stopped: finished shapes wait in a hidden folder of `out` until all are done.

A shape is kept if its inputs have the same fingerprint and its files the sha256 of its contract. At the end files go
to `out` before the contracts that name them, and after those that named what they replace: a contract in `out` never
names a file of another run, wherever the process dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

import distill
from distill.artifacts import canonical_json, require_replaceable_file, sha256_file, sha256_text, sweep, write_json
from distill.contract import Contract, FileRef, ShapeValidation, read_contract, sidecar_path
from distill.errors import InputError, describe_os_error
from distill.versions import versions

_STAGING = ".export.tmp"
_CONTRACT = "_contract.json"
_OWN = ("goldens", "evaluation")
"""Sidecar files of one shape; the others belong to the whole export."""


def fingerprint(inputs: Mapping[str, Any], parts: Sequence[str] = ("data", "export")) -> str:
    """sha256 over everything that files depend on: `inputs`, versions, the code of the floor and of `parts`."""
    return sha256_text(canonical_json(msgspec.to_builtins({**inputs, "code": _code(parts), "versions": versions()})))


def _code(parts: Sequence[str]) -> dict[str, str]:
    """Of the sources as they are, whether committed or not."""
    root = Path(distill.__file__).parent
    files = [*root.glob("*.py"), *(file for part in parts for file in (root / part).rglob("*.py"))]
    return {str(file.relative_to(root)): sha256_file(file) for file in files}


def seal(contract: Contract, inputs: str) -> str:
    """sha256 over a shape's own part of its contract and the fingerprint of its inputs: made_by.shape."""
    own = (contract.name, contract.mode, contract.inputs, contract.outputs, contract.states, contract.evaluation_items)
    return sha256_text(
        canonical_json(msgspec.to_builtins([inputs, *own, own_validation(contract), _own_files(contract)]))
    )


class Workspace(NamedTuple):
    """Where an export writes, and where it ends up."""

    staging: Path
    out: Path

    def kept(self, name: str, inputs: str) -> Contract | None:
        """The contract of a shape that an earlier run made from the same inputs, its files whole; else None."""
        for folder in (self.staging, self.out):
            with contextlib.suppress(InputError):
                found = read_contract(folder / f"{name}{_CONTRACT}")
                same = found.name == name and found.made_by.get("shape") == seal(found, inputs)
                if same and own_validation(found).status == "pass" and all(map(self._whole, _own_files(found))):
                    return found
        return None

    def _whole(self, ref: FileRef) -> bool:
        """Whether the file is there, unaltered: staged, or already where it belongs."""
        paths = [sidecar_path(folder, ref) for folder in self]
        return any(path.is_file() and sha256_file(path) == ref.sha256 for path in paths)

    def stage(self, contract: Contract, inputs: str) -> None:
        """From here on the shape is finished: its files were written before."""
        contract = msgspec.structs.replace(contract, made_by={"shape": seal(contract, inputs)})
        write_json(self.staging / f"{contract.name}{_CONTRACT}", msgspec.to_builtins(contract))

    def publish(self, contracts: Sequence[Contract]) -> list[Path]:
        """Move everything to `out`; returns the contracts there."""
        files = {ref.name: ref.sha256 for contract in contracts for ref in _files(contract)}
        targets = {self.out / f"{contract.name}{_CONTRACT}": contract for contract in contracts}
        for path in (*targets, *(self.out / name for name in files)):
            require_replaceable_file(path)
        outdated = {path: old for path, old in _contracts(self.out).items() if _outdated(old, targets.get(path), files)}
        for path in outdated:
            path.unlink()
        for name, sha256 in files.items():
            staged = self.staging / name
            if staged.is_file() and sha256_file(staged) == sha256:
                staged.replace(self.out / name)
        for path, contract in targets.items():
            sweep(path)
            write_json(path, msgspec.to_builtins(contract))
        self._remove_orphans(outdated.values())
        shutil.rmtree(self.staging)
        return list(targets)

    def _remove_orphans(self, outdated: Iterable[Contract]) -> None:
        """Remove the files that only contracts which are no longer there named."""
        named = {ref.name for contract in _contracts(self.out).values() for ref in _files(contract)}
        for ref in {ref for contract in outdated for ref in _files(contract) if ref.name not in named}:
            path = sidecar_path(self.out, ref)
            if path.is_file() and sha256_file(path) == ref.sha256:
                path.unlink()

    def discard(self) -> None:
        """Keep nothing: the primary shape failed."""
        shutil.rmtree(self.staging)

    def sweep(self) -> None:
        """Remove what no finished shape needs: halves, and everything where none is finished."""
        if self.staging.is_symlink():
            raise InputError(f"cannot write {self.staging}: a symbolic link is in the way")
        if not self.staging.is_dir():
            return
        finished = _contracts(self.staging)
        needed = {path.name for path in finished} | {ref.name for c in finished.values() for ref in _files(c)}
        for file in self.staging.iterdir():
            if not finished or file.name not in needed:
                file.unlink()
        if not finished:
            self.staging.rmdir()


@contextlib.contextmanager
def workspace(out: Path) -> Iterator[Workspace]:
    """The workspace of `out`, this process alone in it. An error leaves finished shapes for the next run."""
    work = Workspace(out / _STAGING, out)
    with _locked(out):
        try:
            work.sweep()
            work.staging.mkdir(exist_ok=True)
            yield work
        except OSError as error:
            raise InputError(f"cannot write {out}: {describe_os_error(error)}") from error
        finally:
            work.sweep()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {describe_os_error(error)}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
        yield
    except BlockingIOError as error:
        raise InputError(f"cannot write {folder}: another export is writing to it") from error
    finally:
        os.close(descriptor)


def _contracts(folder: Path) -> dict[Path, Contract]:
    """The export contracts of a folder that can be read; others are none of ours."""
    found = {}
    for path in sorted(folder.glob(f"*{_CONTRACT}")):
        with contextlib.suppress(InputError):
            contract = read_contract(path)
            for ref in _files(contract):
                sidecar_path(folder, ref)
            found[path] = contract
    return found


def _outdated(old: Contract, new: Contract | None, files: Mapping[str, str]) -> bool:
    """A contract that is to change, or that names a file which is about to."""
    return old != new if new else any(files.get(ref.name, ref.sha256) != ref.sha256 for ref in _files(old))


def own_validation(contract: Contract) -> ShapeValidation:
    """Of the contract's own shape; a finished export's contracts hold those of all."""
    length = max(contract.enumerated_T) if contract.states else contract.sequence()
    unknown = ShapeValidation("fail", reason="the contract does not say")
    return contract.shape_validation.get(str(length), unknown)


def _own_files(contract: Contract) -> list[FileRef]:
    refs = [contract.file, *(contract.sidecar.get(role) for role in _OWN)]
    return [ref for ref in refs if ref is not None]


def _files(contract: Contract) -> list[FileRef]:
    return [ref for ref in (contract.file, contract.tables, *contract.sidecar.values()) if ref is not None]
