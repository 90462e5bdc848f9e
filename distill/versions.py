"""The version gate: is this Python and are these packages what the pipeline was proved with?

`python -m infra.version_gate [--skip-ort]`. Packages are asked for by their metadata, never by importing them: the
output folder onnx/ would answer for the package of that name.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from distill import gates
from distill.errors import InputError, stage_main

_PYTHON = (3, 11)
_ORT = {"onnxruntime"}


def require_python(what: str) -> None:
    """InputError unless this is Python 3.11, which coremltools 9.0 and torch 2.13 were proved with."""
    if sys.version_info[:2] != _PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        raise InputError(f"{what}: Python version error: needs Python 3.11, this is {found}; run it with python3.11")


def import_coremltools() -> ModuleType:
    """coremltools, without the chatter that it prints off macOS; InputError if it is absent or too old."""
    found = installed("coremltools")
    if found is None or int(found.split(".")[0]) < 9:
        have = f"found {found}" if found else "it is not installed"
        raise InputError(
            f"placeholder required: Core ML conversion needs coremltools 9 ({have}): pip install 'coremltools>=9.0', "
            "or pass --allow-placeholder for a package-shaped folder that every later stage reports as SKIPPED"
        )
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    logging.disable(logging.WARNING)  # it imports torchao where that is installed, which tells of every GPU library
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import coremltools
    finally:
        logging.disable(logging.NOTSET)
    return coremltools


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a library's progress bars and warnings off stderr; errors are exceptions and come through."""
    if os.environ.get("DISTILL_DEBUG"):
        yield
        return
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def optional(name: str, extra: str) -> ModuleType:
    """Import a package of an extra; InputError names the extra where it is absent."""
    if installed(name) is None:
        raise InputError(f"the package {name} is not installed: pip install 'distill[{extra}]'")
    return importlib.import_module(name)


def installed(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of what shapes an artefact, for contracts and manifests."""
    names = ("torch", "coremltools", "numpy", "safetensors", "tokenizers")
    found = {name: installed(name) for name in names}
    return {"python": ".".join(map(str, sys.version_info[:3]))} | {k: v for k, v in found.items() if v}


def check(*, skip_ort: bool = False) -> dict[str, gates.Gate]:
    """A gate a requirement: core ones must be there; an absent extra is skipped, a wrong version of it fails."""
    found = ".".join(map(str, sys.version_info[:3]))
    out = {
        "python": gates.holds(
            sys.version_info[:2] == _PYTHON,
            observed=found,
            threshold="3.11.x",
            reason=None if sys.version_info[:2] == _PYTHON else "use python3.11",
        )
    }
    for text, extra in _requirements():
        requirement = _parse(text)
        if skip_ort and requirement.name in _ORT:
            out[requirement.name] = gates.skipped("--skip-ort")
            continue
        version = installed(requirement.name)
        bound = str(requirement.specifier) or "any"
        if version is None and extra:
            out[requirement.name] = gates.skipped(f"not installed; pip install 'distill[{extra}]'")
        elif version is None:
            out[requirement.name] = gates.holds(
                False, observed="absent", threshold=bound, reason=f"pip install '{requirement.name}{bound}'"
            )
        else:
            ok = requirement.specifier.contains(version, prereleases=True)
            fix = None if ok else f"pip install '{requirement.name}{bound}'"
            out[requirement.name] = gates.holds(ok, observed=version, threshold=bound, reason=fix)
    return out


def _parse(text: str):  # type: ignore[no-untyped-def]
    from packaging.requirements import Requirement

    return Requirement(text)


def _requirements() -> list[tuple[str, str | None]]:
    """(requirement, extra or None) from pyproject.toml in a checkout, else from the installed metadata."""
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text())["project"]
        pairs: list[tuple[str, str | None]] = [(text, None) for text in project["dependencies"]]
        extras = project["optional-dependencies"]
        return pairs + [(text, name) for name in ("onnx", "teacher") for text in extras[name]]
    pairs = []
    for text in importlib.metadata.requires("distill") or []:
        body, _, marker = text.partition(";")
        extra = marker.split("==")[1].strip().strip("'\"") if "extra" in marker else None
        if extra in (None, "onnx", "teacher"):
            pairs.append((body.strip(), extra))
    return pairs


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Print the table and a closing line; exit 0 if nothing fails, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="distill versions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--skip-ort", action="store_true", help="do not ask for onnxruntime")
    args = parser.parse_args(argv)
    result = check(skip_ort=args.skip_ort)
    print(gates.table(result))
    print(f"version gate: {gates.summary(result)}")
    return gates.exit_code(result)
