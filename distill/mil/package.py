"""Open an .mlpackage: Manifest.json -> model.mlmodel, with every path kept inside the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import PackageError
from distill.mil.blob import BlobReader
from distill.mil.collection import paused
from distill.mil.limits import DEFAULT, Limits

if TYPE_CHECKING:
    from distill.mil.program import Program

PLACEHOLDER = "PLACEHOLDER"
_MANIFEST_LIMIT = 2**20
_MODEL_GROWTH = 32  # a protobuf of tiny messages takes that many times its size in memory
_MODEL_PATH = "@model_path/"
_QUOTED = 100


def load(path: str | Path, limits: Limits = DEFAULT) -> Program:
    """Load a package. Everything but the weights' bytes is read and checked now; PackageError names what is
    wrong. `limits` says what a prediction may cost.
    """
    package = Package(Path(path), limits)
    from distill.mil.parse import parse_model  # imports protobuf classes

    with paused():
        return parse_model(package)


class Package:
    """The folder and its files. No path may lead out of it, by `..`, absolute name or symbolic link."""

    def __init__(self, path: Path, limits: Limits = DEFAULT) -> None:
        self.path = path
        self.limits = limits
        try:
            exists = path.exists()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a path"
            raise PackageError(f"{clip(str(path))}: {reason}") from error
        if not exists:
            shown = str(path).encode(errors="backslashreplace").decode()  # a name that is no text
            raise PackageError(f"{shown}: no such package")
        if not path.is_dir():
            raise PackageError(f"{path}: an .mlpackage is a folder, this is a file")
        if (path / PLACEHOLDER).exists():
            raise PackageError(f"{path} is a placeholder package: it was made without Core ML and holds no model")
        self._root = path.resolve()
        self.model = self._find_model()
        self._readers: dict[Path, BlobReader] = {}
        self._named: dict[str, BlobReader] = {}

    def _find_model(self) -> Path:
        manifest_path = self.inside(self.path / "Manifest.json", "Manifest.json")
        try:
            if manifest_path.stat().st_size > _MANIFEST_LIMIT:
                raise PackageError(f"{self.path}: Manifest.json is larger than {_MANIFEST_LIMIT} bytes")
            manifest = json.loads(manifest_path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise PackageError(f"{self.path}: Manifest.json cannot be read: {error}") from error
        entry = self._root_entry(manifest)
        return self.inside(self.path / "Data" / entry, f"Manifest.json path {clip(entry)}")

    def _root_entry(self, manifest: Any) -> str:
        items = manifest.get("itemInfoEntries") if isinstance(manifest, dict) else None
        root = manifest.get("rootModelIdentifier") if isinstance(manifest, dict) else None
        if not isinstance(items, dict) or not isinstance(root, str) or not isinstance(items.get(root), dict):
            raise PackageError(f"{self.path}: Manifest.json names no root model")
        entry = items[root].get("path")
        if not isinstance(entry, str) or not entry:
            raise PackageError(f"{self.path}: Manifest.json: the root model has no path")
        return entry

    def inside(self, path: Path, what: str) -> Path:
        """`path` resolved, if it is a regular file in the package."""
        try:
            resolved = path.resolve()
            if not resolved.is_relative_to(self._root) or ".." in path.relative_to(self.path).parts:
                raise PackageError(f"{self.path}: {what} leads out of the package")
            if not resolved.is_file():
                raise PackageError(f"{self.path}: {what}: no such file")
        except (OSError, ValueError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else clip(str(error))
            raise PackageError(f"{self.path}: {what} leads out of the package or cannot be read: {reason}") from error
        return resolved

    def read_model(self) -> bytes:
        size, most = self.model.stat().st_size, self.limits.memory // _MODEL_GROWTH
        if size > most:
            raise PackageError(f"{self.model}: {size} bytes, the limit is {most} (limits= of mil.load raises it)")
        return self.model.read_bytes()

    def reader(self, name: str) -> BlobReader:
        """The weight file that the program calls `name` ('@model_path/weights/weight.bin')."""
        if name not in self._named:
            if not name.startswith(_MODEL_PATH):
                raise PackageError(f"{self.path}: weight file {clip(name)} does not start with {_MODEL_PATH}")
            path = self.inside(self._data_path(name), f"weight file {clip(name)}")
            if path not in self._readers:
                self._readers[path] = BlobReader(path)
            self._named[name] = self._readers[path]
        return self._named[name]

    def _data_path(self, name: str) -> Path:
        # self.model is resolved; go back to a path below self.path so that `..` is judged as it was written
        folder = self.path / self.model.parent.relative_to(self._root)
        return folder / name.removeprefix(_MODEL_PATH)

    @property
    def weight_files(self) -> list[Path]:
        return list(self._readers)

    @property
    def size(self) -> int:
        """Bytes of the files that are used."""
        return self.model.stat().st_size + sum(reader.size for reader in self._readers.values())


def clip(text: str) -> str:
    """Quoted, and short enough for a message."""
    return repr(text) if len(text) <= _QUOTED else repr(text[:_QUOTED]) + "..."
