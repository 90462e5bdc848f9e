"""Open an .mlpackage: Manifest.json -> model.mlmodel, with every path kept inside the package."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import PackageError
from distill.mil.blob import BlobReader

if TYPE_CHECKING:
    from distill.mil.program import Program

PLACEHOLDER = "PLACEHOLDER"
_MANIFEST_LIMIT = 2**20
_MODEL_LIMIT = 2**31 - 1  # protobuf's own limit on a message
_MODEL_PATH = "@model_path/"


def load(path: str | Path) -> Program:
    """Load a package. Everything but the weights' bytes is read and checked now; PackageError names what is
    wrong.
    """
    package = Package(Path(path))
    # off macOS, coremltools announces at import each of Apple's libraries that it does not find
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    from distill.mil.parse import parse_model  # imports protobuf classes

    return parse_model(package)


class Package:
    """The folder and its files. No path may lead out of it, by `..`, absolute name or symbolic link."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise PackageError(f"{path}: no such package")
        if not path.is_dir():
            raise PackageError(f"{path}: an .mlpackage is a folder, this is a file")
        if (path / PLACEHOLDER).exists():
            raise PackageError(f"{path} is a placeholder package: it was made without Core ML and holds no model")
        self._root = path.resolve()
        self.model = self._find_model()
        self._readers: dict[Path, BlobReader] = {}

    def _find_model(self) -> Path:
        manifest_path = self.inside(self.path / "Manifest.json", "Manifest.json")
        try:
            if manifest_path.stat().st_size > _MANIFEST_LIMIT:
                raise PackageError(f"{self.path}: Manifest.json is larger than {_MANIFEST_LIMIT} bytes")
            manifest = json.loads(manifest_path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise PackageError(f"{self.path}: Manifest.json cannot be read: {error}") from error
        entry = self._root_entry(manifest)
        return self.inside(self.path / "Data" / entry, f"Manifest.json path {entry!r}")

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
            raise PackageError(f"{self.path}: {what} leads out of the package or cannot be read: {error}") from error
        return resolved

    def read_model(self) -> bytes:
        if self.model.stat().st_size > _MODEL_LIMIT:
            raise PackageError(f"{self.model}: larger than a protobuf can be")
        return self.model.read_bytes()

    def reader(self, name: str) -> BlobReader:
        """The weight file that the program calls `name` ('@model_path/weights/weight.bin')."""
        if not name.startswith(_MODEL_PATH):
            raise PackageError(f"{self.path}: weight file {name!r} does not start with {_MODEL_PATH}")
        path = self.inside(self._data_path(name), f"weight file {name!r}")
        if path not in self._readers:
            self._readers[path] = BlobReader(path)
        return self._readers[path]

    def _data_path(self, name: str) -> Path:
        # self.model is resolved; go back to a path below self.path so that `..` is judged as it was written
        folder = self.path / self.model.parent.relative_to(self._root)
        return folder / name.removeprefix(_MODEL_PATH)

    @property
    def weight_files(self) -> list[Path]:
        return list(self._readers)
