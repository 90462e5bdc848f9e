"""Files that appear whole or not at all, their sha256, and the record of what made them."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import distill
from distill.errors import InputError, describe_os_error

_CHUNK = 1 << 20
_MARKS = {
    ".mlpackage": ("Manifest.json", "PLACEHOLDER"),
    ".aimodel": ("main.mlirb",),
    ".contract": ("contract.json",),
}
_MARKS_OTHER = ("config.json", "port.json", "deployment_manifest.json")
"""By a folder's suffix, files of which it holds one if this project made it; of any other suffix: Hugging Face's, or
those of `distill port` and `distill deploy`."""


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it is fsynced and renamed over `path`.

    On any error the temporary file is removed and `path` is untouched. An OSError (disk full, no
    permission) becomes an InputError that names `path`; so does anything there but a regular file, before the work.
    """
    target = Path(path)
    require_replaceable_file(target)
    temporary = _temporary_beside(target)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # some writers make private files
        _fsync(temporary)
        os.replace(temporary, target)
        _fsync(target.parent)
    except OSError as error:
        raise InputError(f"cannot write {target}: {describe_os_error(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def sweep(path: str | os.PathLike[str]) -> None:
    """Remove what a killed `atomic_file` left beside `path`. Only for who holds a lock on it."""
    target = Path(path)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Like `atomic_file` for a folder (a package): the old one stays until the new one is complete.

    What is not empty and not recognisably ours is never replaced (`require_replaceable`).
    """
    target = Path(path)
    require_replaceable(target)
    temporary = _temporary_beside(target)
    old = temporary.with_name(temporary.name + ".old")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                os.chmod(file, 0o666 & ~_umask())  # some writers make private files
                _fsync(file)
        require_replaceable(target)  # once more: the work may have taken long
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(temporary, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        _fsync(target.parent)
    except OSError as error:
        raise InputError(f"cannot write {target}: {describe_os_error(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def require_writable(folder: str | os.PathLike[str]) -> None:
    """InputError if no file can be written in `folder`, which is made."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write {describe_os_error(error, folder)}") from error


def require_replaceable_file(path: str | os.PathLike[str]) -> None:
    """InputError if `path` is there and is a folder, a symbolic link, a device or a pipe."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise InputError(f"cannot write {path}: something other than a regular file is in the way")


def require_replaceable(path: str | os.PathLike[str]) -> None:
    """InputError if `path` is there and is neither an empty folder nor one that this project made."""
    target = Path(path)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"cannot write {target}: something other than a folder is in the way")
    marks = _MARKS.get(target.suffix, _MARKS_OTHER)
    if target.is_dir() and any(target.iterdir()) and not any((target / mark).is_file() for mark in marks):
        raise InputError(f"cannot write {target}: a folder that is not ours (no {' or '.join(marks)}) is in the way")


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text atomically; returns the path."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write indented JSON atomically; NaN and infinities are an error, since JSON has none."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def require_regular(path: str | os.PathLike[str]) -> None:
    """InputError if `path` is there and is no regular file: opening a pipe waits for ever, a device has no end."""
    with contextlib.suppress(OSError, ValueError):  # a missing file is for its reader to name
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"cannot read {path}: not a regular file")


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text; a missing file or one that is not text is an InputError that names it."""
    require_regular(path)
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {describe_os_error(error, path)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; a missing or malformed one is an InputError that names it."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a file's bytes."""
    require_regular(path)
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"cannot read {describe_os_error(error, path)}") from error
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """Hex sha256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """Sorted, compact JSON: one text for one value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def provenance(config: Mapping[str, Any], inputs: Mapping[str, str | os.PathLike[str]]) -> dict[str, Any]:
    """What made a file: configuration, code version and the sha256 of every input file.

    Holds nothing that varies between two runs on the same inputs (no times, no host names).
    """
    return {
        "made_by": f"distill {distill.__version__}",
        "code": code_version(),
        "config": dict(config),
        "inputs": {name: {"file": Path(path).name, "sha256": sha256_file(path)} for name, path in inputs.items()},
    }


@cache
def code_version() -> str:
    """`git describe` of the checkout that this package runs from, else the package version."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return distill.__version__
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return distill.__version__
    return out.stdout.strip()


def _temporary_beside(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {target}: {describe_os_error(error)}") from error
    handle = tempfile.mktemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    return Path(handle)


@cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
