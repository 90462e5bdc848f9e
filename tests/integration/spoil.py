"""Plant a fault in a copy of a package: edit constants of weight.bin, operations of the program, or the contract.

`Spoilt.seal()` makes every sha256 agree with the fault again (contract.json, the contract in the metadata, the
sidecar's fingerprints): what is left to notice it is the package's behaviour alone.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from coremltools.proto import Model_pb2

from distill.artifacts import canonical_json, sha256_file
from distill.convert.package import CONTRACT_KEY, SPEC_FILE, WEIGHT_FILE, program_sha256, sidecar_folder

_RECORD = struct.Struct("<IIQQQ")  # sentinel, dtype, bytes, offset of the data, padding


class Spoilt:
    """A copy of a package and its sidecar, to be spoilt."""

    def __init__(self, package: Path, folder: Path, entry: str = "main") -> None:
        """`entry`: of several functions, the one to change."""
        self.path, self.entry = folder / package.name, entry
        shutil.copytree(package, self.path)
        shutil.copytree(sidecar_folder(package), self.sidecar)
        self.model = Model_pb2.Model()
        self.model.ParseFromString((self.path / SPEC_FILE).read_bytes())

    @property
    def sidecar(self) -> Path:
        return sidecar_folder(self.path)

    @property
    def weights(self) -> Path:
        return self.path / WEIGHT_FILE

    @property
    def function(self) -> Any:
        return self.model.mlProgram.functions[self.entry]

    @property
    def operations(self) -> Any:
        return self.function.block_specializations[self.function.opset].operations

    def operation(self, output: str) -> Any:
        """The operation that makes `output`."""
        return next(op for op in self.operations if any(o.name == output for o in op.outputs))

    def blobs(self) -> dict[str, tuple[int, ...]]:
        """fp16 constants in weight.bin: name -> shape."""
        found = {}
        for op in self.operations:
            if op.type == "const" and op.attributes["val"].WhichOneof("value") == "blobFileValue":
                shape = tuple(d.constant.size for d in op.outputs[0].type.tensorType.dimensions)
                if op.outputs[0].type.tensorType.dataType == 10:  # FLOAT16
                    found[op.outputs[0].name] = shape
        return found

    def edit(self, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Spoilt:
        """Replace an fp16 constant's values in weight.bin by `change(values in fp32)`."""
        raw = bytearray(self.weights.read_bytes())
        record = self.operation(name).attributes["val"].blobFileValue.offset
        sentinel, _, size, start, _ = _RECORD.unpack_from(raw, record)
        assert sentinel == 0xDEADBEEF
        values = np.frombuffer(raw, np.float16, size // 2, start).reshape(self.blobs()[name])
        with np.errstate(over="ignore"):
            raw[start : start + size] = change(values.astype(np.float32)).astype(np.float16).tobytes()
        self.weights.write_bytes(raw)
        return self

    def detach(self, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Spoilt:
        """Give this function an fp16 constant of its own, at the end of weight.bin."""
        raw = self.weights.read_bytes()
        value = self.operation(name).attributes["val"].blobFileValue
        sentinel, kind, size, start, padding = _RECORD.unpack_from(raw, value.offset)
        values = np.frombuffer(raw, np.float16, size // 2, start).astype(np.float32)
        raw += bytes(-len(raw) % 64)
        record = _RECORD.pack(sentinel, kind, size, len(raw) + 64, padding).ljust(64, b"\0")
        value.offset = len(raw)
        self.weights.write_bytes(raw + record + change(values).astype(np.float16).tobytes())
        return self

    def remove(self, *doomed: Any) -> Spoilt:
        """Drop operations (those without outputs, or whose outputs nothing uses any more)."""
        kept = [type(op).FromString(op.SerializeToString()) for op in self.operations if op not in doomed]
        operations = self.operations
        del operations[:]
        operations.extend(kept)
        return self

    def rename_use(self, old: str, new: str) -> Spoilt:
        """Feed `new` to every operation that took `old`."""
        for op in self.operations:
            for argument in op.inputs.values():
                for binding in argument.arguments:
                    if binding.WhichOneof("binding") == "name" and binding.name == old:
                        binding.name = new
        return self

    def contract(self, change: Callable[[dict[str, Any]], None], *, inside: bool = True, beside: bool = True) -> Spoilt:
        """Change the contract in the metadata and the one in the sidecar."""
        metadata = self.model.description.metadata.userDefined
        if inside:
            data = json.loads(metadata[CONTRACT_KEY])
            change(data)
            metadata[CONTRACT_KEY] = canonical_json(data)
        if beside:
            path = self.sidecar / "contract.json"
            data = json.loads(path.read_text())
            change(data)
            path.write_text(json.dumps(data))
        return self

    def only(self, items: int) -> Spoilt:
        """Keep the first evaluation prompts, and have the contract say that there are no more."""
        path = self.sidecar / "evaluation.json"
        data = json.loads(path.read_text())
        del data["items"][items:]
        path.write_text(json.dumps(data))
        return self.contract(lambda contract: contract.update(evaluation_items=items))

    def evaluation(self, change: Callable[[list[dict[str, Any]]], Any]) -> Spoilt:
        """Change the items of evaluation.json in place, or by what `change` returns."""
        path = self.sidecar / "evaluation.json"
        data = json.loads(path.read_text())
        data["items"] = change(data["items"]) or data["items"]
        path.write_text(json.dumps(data))
        return self

    def save(self) -> Path:
        """Write the program; sha256s stay as they were."""
        (self.path / SPEC_FILE).write_bytes(self.model.SerializeToString(deterministic=True))
        return self.path

    def seal(self) -> Path:
        """Write the program with every sha256 made to match."""

        def match(data: dict[str, Any]) -> None:
            data["program_sha256"] = program_sha256(self.model)
            for ref, path in [
                (data["file"], self.weights),
                *((ref, self.sidecar / ref["name"]) for ref in data["sidecar"].values()),
            ]:
                if path.is_file():
                    ref.update(sha256=sha256_file(path), bytes=path.stat().st_size)

        self.contract(match)
        return self.save()


def only_evaluate(package: Path, folder: Path, items: int) -> Path:
    """A copy with fewer evaluation prompts: verification in a tenth of the time."""
    folder.mkdir(parents=True, exist_ok=True)
    return Spoilt(package, folder).only(items).seal()
