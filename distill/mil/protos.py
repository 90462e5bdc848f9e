"""The protobuf classes that coremltools generated, without the rest of coremltools: importing the package takes a
second and some 90 MiB, and off macOS it warns of each of Apple's libraries that it does not find.

The classes are the same objects as coremltools' own, whoever is imported first.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

_PACKAGE = f"{__name__}.coremltools_proto"


def _load() -> Any:
    name = "coremltools.proto.Model_pb2"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec("coremltools")
    if spec is None or not spec.submodule_search_locations:
        return importlib.import_module(name)  # which says what is missing
    package = ModuleType(_PACKAGE)
    package.__path__ = [f"{spec.submodule_search_locations[0]}/proto"]
    sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.Model_pb2")


Model_pb2 = _load()
