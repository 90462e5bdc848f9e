"""Reports as evidence. One counts only while the files that it was made from are those that are there now.

What was not run, or was run on something else, is inconclusive and says which command would make it; a report that
cannot be read, or contradicts itself, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from distill.artifacts import read_json, sha256_file
from distill.errors import DistillError, InputError
from distill.gates import Gate, Status

_WORST: tuple[Status, ...] = ("error", "fail", "inconclusive", "pass", "skipped")
_MOST_REASONS = 4
T = TypeVar("T")


class NoEvidence(DistillError):
    """Nothing shows it: it was not run, or what was run is stale."""


class File(msgspec.Struct, frozen=True):
    """A file that something was made from."""

    sha256: str


class Origin(msgspec.Struct, frozen=True):
    """What artifacts.provenance writes, and what an export adds to it."""

    code: str
    inputs: dict[str, File]
    config: dict[str, Any] = {}
    stage: str = ""
    lineage: list[dict[str, Any]] = []


class Record(msgspec.Struct, frozen=True):
    """A contract (`made_by`) or a report of training (`provenance`)."""

    made_by: Origin | None = None
    provenance: Origin | None = None
    fingerprint: str = ""
    """Of a training run."""


class Verification(msgspec.Struct, frozen=True):
    """A report of `distill contracts`, or what the golden vectors showed of one package."""

    gates: dict[str, Gate]
    made_by: Origin


class Link(NamedTuple):
    """A file, the record that says which bytes of it something was made from, and the target that makes both."""

    file: Path
    record: Path
    role: str
    target: str


class Evidence:
    """What lies there: every file is hashed once, and every report that was read is remembered."""

    def __init__(self) -> None:
        self.read: dict[str, Path] = {}
        self._sha256s: dict[Path, str] = {}

    def sha256(self, path: Path, target: str) -> str:
        """Of a file as it is now; NoEvidence where there is none."""
        if path not in self._sha256s:
            if not path.is_file():
                raise NoEvidence(f"not run: {target} ({path} is not there)")
            self._sha256s[path] = sha256_file(path)
        return self._sha256s[path]

    def present(self, path: Path, target: str) -> Gate:
        """Pass; NoEvidence where the file is not there."""
        self.sha256(path, target)
        return Gate("pass")

    def report(self, path: Path, form: type[T], target: str) -> T:
        """A JSON file of a known form; NoEvidence where there is none, InputError where it is none of that form."""
        if not path.is_file():
            raise NoEvidence(f"not run: {target} ({path} is not there)")
        self.read[str(path)] = path
        try:
            return msgspec.convert(read_json(path), form)
        except msgspec.ValidationError as error:
            raise InputError(f"{path}: not the report that {target} writes: {error}") from error

    def record(self, path: Path, target: str) -> tuple[Record, Origin]:
        """A contract or training report, and what it was made from."""
        found = self.report(path, Record, target)
        origin = found.made_by or found.provenance
        if origin is None:
            raise InputError(f"{path}: does not say what it was made from")
        return found, origin

    def linked(self, link: Link, code: str | None) -> Gate:
        """Was `record` made from `file` as it is now, and by this version of the code if one is given?"""
        _, origin = self.record(link.record, link.target)
        made_from = origin.inputs.get(link.role)
        if made_from is None or made_from.sha256 != self.sha256(link.file, link.target):
            raise NoEvidence(f"stale: {link.record} was made from another {link.file.name}: {link.target}")
        require_code(origin, str(link.record), code, link.target)
        return Gate("pass")

    def package_files(self, package: Path, target: str) -> dict[str, str]:
        """Path -> sha256 of everything in a package but its manifest; NoEvidence where there is none."""
        if not package.is_dir():
            raise NoEvidence(f"not run: {target} ({package} is not there)")
        return {str(file): self.sha256(file, target) for file in content(package)}

    def require_package(self, inputs: Mapping[str, File], package: Path, report: str, target: str) -> None:
        """NoEvidence unless `inputs` are the files of the package as it is now."""
        if {file.sha256 for file in inputs.values()} != set(self.package_files(package, target).values()):
            raise NoEvidence(f"stale: {report} is of another {package}: {target}")


def content(package: Path) -> list[Path]:
    """The files of a package but for its manifest, which only lists them."""
    return [file for file in sorted(package.rglob("*")) if file.is_file() and file != package / "Manifest.json"]


def require_code(origin: Origin, what: str, code: str | None, target: str) -> None:
    """NoEvidence where another version of the code made it: of this one it says nothing."""
    if code is not None and origin.code != code:
        raise NoEvidence(f"stale: {what} was made by version {origin.code}, this is {code}: {target}")


def attempt(check: Callable[..., Gate], *arguments: Any) -> Gate:
    """A check's verdict: inconclusive without evidence, an error where that cannot be read."""
    try:
        return check(*arguments)
    except (NoEvidence, InputError) as error:
        return _unproved(error)


def gathered(checks: Callable[..., Iterator[Gate]], *arguments: Any) -> list[Gate]:
    """The verdicts of checks that are made one after the other, and why they could not go on if they could not."""
    found: list[Gate] = []
    try:
        for gate in checks(*arguments):
            found.append(gate)
    except (NoEvidence, InputError) as error:
        found.append(_unproved(error))
    return found


def in_order(checks: Iterable[Callable[[], Gate]]) -> Gate:
    """The first that did not pass: what comes after it would say the same."""
    for check in checks:
        if (gate := attempt(check)).status != "pass":
            return gate
    return Gate("pass")


def _unproved(error: DistillError) -> Gate:
    return Gate("inconclusive" if isinstance(error, NoEvidence) else "error", reason=str(error))


def judged(
    found: Mapping[str, Gate], wanted: Iterable[str], may_be_skipped: Collection[str], source: str
) -> Iterator[Gate]:
    """A report's gates that are wanted: all are there, and each passed or was skipped as it may be."""
    names = list(wanted)
    if missing := [name for name in names if name not in found]:
        raise InputError(f"{source}: lacks the gates {', '.join(missing)}")
    if not any(found[name].status == "pass" for name in names):
        yield Gate("inconclusive", reason=f"{source}: nothing passed, so nothing was shown")
    for name in names:
        gate, why = found[name], f" ({found[name].reason})" if found[name].reason else ""
        if gate.status == "skipped" and name in may_be_skipped:
            yield Gate("skipped", reason=f"{name} skipped{why}")
        elif gate.status == "skipped":
            yield Gate("inconclusive", reason=f"{source}: {name} skipped{why}")
        else:
            yield Gate(gate.status, reason=None if gate.status == "pass" else f"{source}: {name} {gate.status}{why}")


def combined(parts: Iterable[Gate]) -> Gate:
    """The worst verdict: error, fail, inconclusive, pass; skipped only where all are. Its reasons come first, and of a
    pass the reasons are those of what was skipped."""
    gates = list(parts)
    worst = next(status for status in _WORST if any(gate.status == status for gate in gates))
    named = [gate for gate in gates if gate.status == worst or worst == "pass"]
    reasons = list(dict.fromkeys(gate.reason for gate in named if gate.reason))
    if len(reasons) > _MOST_REASONS:
        reasons[_MOST_REASONS:] = [f"and {len(reasons) - _MOST_REASONS} more"]
    return Gate(worst, reason="; ".join(reasons) or None)
