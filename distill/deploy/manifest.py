"""deployment_manifest.json: every file of a bundle with its size and sha256, what made it, and what was proved of it.

The manifest is read as a stranger's: its size is bounded, it must be the very bytes that `dump` writes (so no key
twice, no odd escapes), and its paths are plain names below the bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from distill.artifacts import sha256_file
from distill.errors import InputError, describe_os_error
from distill.gates import Gate

MANIFEST = "deployment_manifest.json"
MAX_BYTES = 4 << 20
MAX_FILES = 4096
MAX_DEPTH = 8
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}")
"""Of a path. No leading dot, no separator, no colon, nothing that two file systems read differently."""

Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Count = Annotated[int, msgspec.Meta(ge=0)]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file's fingerprint."""

    sha256: Sha256
    bytes: Count


class StudentFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint that the package was made from."""

    checkpoint_sha256: Sha256
    stage: str
    step: Count
    loss: float
    parameters: Count
    weights_sha256: Sha256
    tokenizer_sha256: Sha256
    chat_template_sha256: Sha256
    formats: dict[str, Any] | None
    """Weight formats; None: fp16."""


class TeacherFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who taught it, and on what terms. None: unknown."""

    model: str | None
    kind: str | None
    weights: str | None
    """Numeric format of the teacher's weights."""
    weights_sha256: str | None
    terms_url: str | None
    accepted_by: str | None
    stated_licence: str | None
    """From the configuration; nothing checks it."""
    source: str
    """Where this was read."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole of it. Nothing here varies between two builds from the same inputs."""

    schema: Literal["distill-deployment/1"] = "distill-deployment/1"
    name: str
    package: str
    """Name of the .mlpackage."""
    date: str | None
    """From SOURCE_DATE_EPOCH; None where that was not set."""
    files: dict[str, File]
    """By path below the bundle; every file but this one."""
    student: StudentFacts
    teacher: TeacherFacts
    licence: str | None
    """The student's."""
    data: dict[str, Any]
    """sha256 and run_id of the dataset of the last stage."""
    lineage: list[dict[str, Any]]
    """Every training stage, the first one first, with the fingerprint of its configuration."""
    training: dict[str, Any] | None
    """What the last stage's report says of held-out data; None where no report of this very run was there."""
    training_configuration: dict[str, Any]
    configuration: dict[str, Any]
    """configs/deploy.yaml as it was used, but for where the bundle was written."""
    versions: dict[str, dict[str, str]]
    """built_by: now; converted_by: when the package was made."""
    gates: dict[str, dict[str, Gate]]
    """By report: reports/NAME.json holds it."""
    overridden: list[str]
    """Gates that did not pass and were let through by --allow-failed-gates."""

    def __post_init__(self) -> None:
        if not self.files or len(self.files) > MAX_FILES:
            raise ValueError(f"files: a bundle has from 1 to {MAX_FILES} files, this lists {len(self.files)}")
        for path in self.files:
            require_plain(path)
        if MANIFEST in self.files:
            raise ValueError("files: the manifest lists itself")
        if len({path.casefold() for path in self.files}) != len(self.files):
            raise ValueError("files: two paths differ in case only")
        require_plain(self.package)
        if "/" in self.package or not self.package.endswith(".mlpackage"):
            raise ValueError(f"package: {self.package[:80]!r} is no name of a package")


def require_plain(path: str) -> None:
    """ValueError unless `path` is plain names below the bundle."""
    parts = path.split("/")
    if len(parts) > MAX_DEPTH or not all(_PART.fullmatch(part) for part in parts):
        raise ValueError(f"the path {path[:80]!a} is not of plain names below the bundle")


def dump(value: Any) -> bytes:
    """The one way in which a bundle's JSON is written: sorted, indented, ASCII."""
    plain = msgspec.to_builtins(value)
    return (json.dumps(plain, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def parse(data: bytes) -> Manifest:
    """A manifest from its bytes; ValueError, or RecursionError, where they are none."""
    return msgspec.convert(json.loads(data.decode()), Manifest)


def read_manifest(folder: Path, pinned: str | None = None) -> tuple[Manifest, str]:
    """A bundle's manifest and its sha256; InputError in one line where it is none, or is not the pinned one."""
    path = folder / MANIFEST
    data = _read_bounded(path)
    digest = hashlib.sha256(data).hexdigest()
    if pinned is not None and digest != pinned:
        raise InputError(f"{path}: its sha256 is {digest}, not the {pinned} that was asked for")
    try:
        manifest = parse(data)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error
    except (ValueError, RecursionError) as error:  # msgspec's and json's own errors are ValueErrors
        raise InputError(f"{path}: not a deployment manifest: {_short(error)}") from error
    if dump(manifest) != data:
        raise InputError(f"{path}: not as distill writes it: a key is given twice, or it was edited")
    return manifest, digest


def fingerprint(path: Path) -> File:
    """Size and sha256 of a file."""
    return File(sha256_file(path), path.stat().st_size)


def files_below(folder: Path) -> dict[str, File]:
    """Every file below `folder`, which we wrote."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in found}


def file_faults(folder: Path, manifest: Manifest) -> list[str]:
    """How the files differ from the manifest's: missing, extra, altered, or not files at all. Nothing is followed out
    of the bundle, and no more is read of a file than the manifest says it has."""
    found, faults = scan(folder)
    folders = {parent.as_posix() for path in manifest.files for parent in Path(path).parents} - {"."}
    faults += [f"{path!a}: not in the manifest" for path in sorted(found.keys() - manifest.files.keys() - folders)]
    for path, file in manifest.files.items():
        size = found.get(path)
        if size is None:
            faults.append(f"{path}: {'a folder' if path in found else 'missing'}")
        elif size != file.bytes:
            faults.append(f"{path}: {size} bytes, the manifest says {file.bytes}")
        elif sha256_file(folder / path) != file.sha256:
            faults.append(f"{path}: altered: its sha256 is not the manifest's")
    return faults


def scan(folder: Path) -> tuple[dict[str, int | None], list[str]]:
    """What lies below a bundle: path -> size, None of a folder; and what must not lie there."""
    found: dict[str, int | None] = {}
    faults: list[str] = []
    pending = [""]
    while pending:
        below = pending.pop()
        try:
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    path = f"{below}/{entry.name}" if below else entry.name
                    status = entry.stat(follow_symlinks=False)
                    if len(found) + len(faults) > 2 * MAX_FILES:
                        return found, [*faults, f"more than {2 * MAX_FILES} files"]
                    if stat.S_ISDIR(status.st_mode):
                        found[path] = None
                        if path.count("/") < MAX_DEPTH:
                            pending.append(path)
                    elif not stat.S_ISREG(status.st_mode):
                        link = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "no regular file"
                        faults.append(f"{path!a}: {link}")
                    elif path != MANIFEST:
                        found[path] = status.st_size
        except OSError as error:
            faults.append(describe_os_error(error, below))
    return found, faults


def _read_bounded(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise InputError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"not a bundle: cannot read {describe_os_error(error, path)}") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES >> 20} MiB")
    return data


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()).encode("ascii", "backslashreplace").decode()
    return text[:300] or type(error).__name__
