"""coremltools' own `MLModel.predict` and `make_state`, off macOS: what Apple's binary `libcoremlpython` does there,
done by the executor.

    from distill.mil import coreml_proxy
    coreml_proxy.install()
    coremltools.models.MLModel("model.mlpackage").predict({"x": x})

Only ML Programs run. Placement (compute plans, compute devices) is Core ML's knowledge, and is refused.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import tempfile
import time
import types
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from distill.errors import DistillError, ModelTypeError
from distill.mil.images import is_pil, to_pil
from distill.mil.package import load
from distill.mil.program import Feature, Function, Program
from distill.mil.state import State

MACOS_VERSION = (26, 0)  # what coremltools is told: the newest system that its 9.0 release knows
_NEWEST_SPECIFICATION = 10
_LOAD = "Failed to load the model"
_PREDICT = "Unable to compute the prediction using ML Program"
_STATE = "Unable to use the state"


def refuse(reason: str) -> NoReturn:
    """What happens on a request that only Core ML can answer; `install` may put another in its place."""
    raise RuntimeError(reason)


class MLModelProxy:
    """One loaded model, as coremltools drives it; the methods' names are Apple's."""

    policy = "ieee16"
    refuse: Callable[[str], NoReturn] = staticmethod(refuse)
    predictions = 0  # by all models

    def __init__(self, path: str, compute_units: str, function: str, hints: Mapping[str, str], asset: Any) -> None:
        started = time.perf_counter_ns()
        self._path = Path(asset.path if asset is not None else path)
        self._function = function or None
        self._program, self._reason = _open(self._path)
        if self._program is not None:
            _checked(_LOAD, self._program.function, self._function)
        self._compiled: str | None = None
        self._load_time = time.perf_counter_ns() - started
        self._predict_time: int | None = None

    def _ready(self) -> tuple[Program, Function]:
        if self._program is None:
            self.refuse(self._reason)
        return self._program, self._program.function(self._function)

    def predict(self, inputs: Mapping[str, Any], state: MLStateProxy | None = None) -> dict[str, Any]:
        """Numbers are cast to the declared types, as Core ML does; scalars come and go as vectors of one."""
        program, function = self._ready()
        started = time.perf_counter_ns()
        given = {name: _as_declared(function, name, value) for name, value in inputs.items()}
        buffers = state.state if state is not None else None
        outputs = _checked(_PREDICT, program.predict, given, self._function, buffers, self.policy)
        self._predict_time = time.perf_counter_ns() - started
        MLModelProxy.predictions += 1
        return {f.name: _as_returned(f, outputs[f.name]) for f in function.outputs}

    def __deepcopy__(self, memo: dict[int, Any]) -> MLModelProxy:
        return self  # nothing of it changes

    def batchPredict(self, batch: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self.predict(inputs) for inputs in batch]

    def newState(self) -> MLStateProxy:
        program, function = self._ready()
        return MLStateProxy(_checked(_STATE, program.make_state, function.name))

    def get_compiled_model_path(self) -> str:
        self._ready()
        if self._compiled is None:
            self._compiled = self.compileModel(str(self._path))
            weakref.finalize(self, shutil.rmtree, Path(self._compiled).parent, ignore_errors=True)
        return self._compiled

    def get_load_duration_in_nano_seconds(self) -> int:
        return self._load_time

    def get_last_predict_duration_in_nano_seconds(self) -> int | None:
        return self._predict_time

    @staticmethod
    def compileModel(path: str) -> str:
        """There is nothing to compile: the .mlmodelc is the package under another name."""
        source = Path(path)
        target = Path(tempfile.mkdtemp(prefix="compiled-")) / f"{source.stem}.mlmodelc"
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            target.mkdir()
            shutil.copy(source, target / source.name)
        return str(target)

    @staticmethod
    def maximum_supported_specification_version() -> int:
        return _NEWEST_SPECIFICATION

    @staticmethod
    def auto_set_specification_version(specification: Any) -> Any:
        """Core ML would lower the version to the least that suffices; every version runs here."""
        return specification

    @staticmethod
    def create_model_asset_from_path(path: str) -> Any:
        return _asset(MLModelAssetProxy(Path(path)))

    @staticmethod
    def create_model_asset_from_memory(specification: bytes, blobs: Mapping[str, bytes]) -> Any:
        return _asset(MLModelAssetProxy.from_memory(specification, blobs))

    @classmethod
    def get_compute_plan(cls, *_: Any) -> NoReturn:
        cls.refuse("a compute plan needs Core ML: where operations are placed is not known here")

    @classmethod
    def get_model_structure(cls, *_: Any) -> NoReturn:
        cls.refuse("a model structure object needs Core ML")

    @classmethod
    def get_available_compute_devices(cls, *_: Any) -> NoReturn:
        cls.refuse("compute devices are known to Core ML alone")

    @classmethod
    def get_all_compute_devices(cls, *_: Any) -> NoReturn:
        cls.refuse("compute devices are known to Core ML alone")


class MLStateProxy:
    """The buffers of one conversation."""

    def __init__(self, state: State) -> None:
        self.state = state

    def read_state(self, name: str) -> np.ndarray:
        array: np.ndarray = _checked(_STATE, self.state.read, name)
        return array

    def write_state(self, name: str, value: np.ndarray) -> None:
        _checked(_STATE, self.state.write, name, value)


class MLModelAssetProxy:
    """A compiled model by path, or made from bytes in memory (and then removed with this object)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def from_memory(cls, specification: bytes, blobs: Mapping[str, bytes]) -> MLModelAssetProxy:
        folder = Path(tempfile.mkdtemp(prefix="asset-")) / "model.mlmodelc"
        files = {"model.mlmodel": specification, **{_inside(name): data for name, data in blobs.items()}}
        for name, data in files.items():
            path = folder / "Data" / "com.apple.CoreML" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        root = str(uuid.uuid4())
        entry = {"name": "model.mlmodel", "path": "com.apple.CoreML/model.mlmodel"}
        manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": {root: entry}, "rootModelIdentifier": root}
        (folder / "Manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        asset = cls(folder)
        weakref.finalize(asset, shutil.rmtree, folder.parent, ignore_errors=True)
        return asset


def _inside(name: str) -> str:
    """A blob's path ('@model_path/weights/weight.bin', or below the model), which may not lead elsewhere."""
    relative = name.removeprefix("@model_path/")
    if relative.startswith("/") or ".." in Path(relative).parts:
        raise RuntimeError(f"blob path {name!r} leads out of the model")
    return relative


def _asset(proxy: MLModelAssetProxy) -> Any:
    from coremltools.models.model import MLModelAsset

    return MLModelAsset(proxy)


def _open(path: Path) -> tuple[Program | None, str]:
    """The program, or why this model cannot run here although Core ML could run it."""
    if path.is_file() or (not (path / "Manifest.json").exists() and any(path.glob("*.mlmodel"))):
        return None, f"{path.name} is not an ML Program, and only ML Programs run here"
    try:
        return _checked(_LOAD, load, path), ""
    except RuntimeError as error:
        if isinstance(error.__cause__, ModelTypeError):
            return None, str(error.__cause__)
        raise


def _checked(failure: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Errors as Core ML raises them; test-suites look for its words."""
    try:
        return call(*arguments)
    except DistillError as error:
        raise RuntimeError(f"{failure}: {error}") from error


def _as_declared(function: Function, name: str, value: Any) -> Any:
    """A number where a tensor of one element is declared; fractions that an integer type drops."""
    feature = next((f for f in function.inputs if f.name == name), None)
    if feature is None or feature.kind != "tensor" or is_pil(value):
        return value
    if isinstance(value, np.ndarray | np.generic | int | float) and np.ndim(value) == 0:
        value = np.full([1] * len(feature.shape), value)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and "int" in feature.type.dtype:
        value = np.trunc(value)
    return value


def _as_returned(feature: Feature, value: Any) -> Any:
    """Core ML has no scalars: a vector of one. An image is a PIL image."""
    if feature.kind == "image":
        return to_pil(feature, value)
    return value.reshape(1) if isinstance(value, np.ndarray) and value.ndim == 0 else value


def install(policy: str = "ieee16", on_refusal: Callable[[str], NoReturn] = refuse) -> None:
    """Put the executor where coremltools looks for Core ML; does nothing on a Mac, where Core ML itself is."""
    if sys.platform == "darwin":
        return
    MLModelProxy.policy = policy
    MLModelProxy.refuse = staticmethod(on_refusal)
    _stand_in()
    importlib.import_module("coremltools")
    replacements = {
        "_MLModelProxy": MLModelProxy,
        "_MLModelAssetProxy": MLModelAssetProxy,
        "_is_macos": lambda: True,
        "_macos_version": lambda: MACOS_VERSION,
        "_IS_MACOS": True,
    }
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "coremltools" and module is not None:
            for attribute in replacements.keys() & vars(module).keys():
                setattr(module, attribute, replacements[attribute])


def _stand_in() -> None:
    """A module in the place of the binary; what only Core ML can do is None in it, as where the binary is absent."""
    module = types.ModuleType("coremltools.libcoremlpython", "distill.mil in the place of Apple's binary")
    module.__dict__["_MLModelProxy"] = MLModelProxy
    module.__dict__["_MLModelAssetProxy"] = MLModelAssetProxy
    for name in ("_MLComputePlanProxy", "_MLCPUComputeDeviceProxy", "_MLGPUComputeDeviceProxy"):
        module.__dict__[name] = None
    module.__dict__["_MLNeuralEngineComputeDeviceProxy"] = None
    sys.modules["coremltools.libcoremlpython"] = module
