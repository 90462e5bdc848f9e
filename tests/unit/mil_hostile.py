"""Programs written by hand to be refused: shared by the tests of hostile packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coremltools.proto import MIL_pb2

from distill import mil
from distill.errors import PackageError, UnsupportedOpError
from tests.unit import mil_build as b


def refused(tmp_path: Path, model: Any, message: str, weights: bytes | None = None, **options: Any) -> None:
    with pytest.raises((PackageError, UnsupportedOpError), match=message) as caught:
        run(b.write_package(tmp_path / "m.mlpackage", model, weights), **options)
    text = str(caught.value)
    assert "m.mlpackage" in text and "\n" not in text and len(text) < 20_000


def run(path: Path, size: int = 2, **options: Any) -> Any:
    return mil.load(path, **options).predict({"x": np.ones(size)})


def add_op(model: Any, kind: str, out: str, shape: tuple[int, ...], inputs: dict[str, Any], dtype: str = "fp32") -> Any:
    """`inputs` are names, or arrays written in place."""
    op = b.operations(model).add(type=kind)
    for name, value in inputs.items():
        for one in value if isinstance(value, list) else [value]:
            bind(op.inputs[name].arguments.add(), one)
    b.set_type(op.outputs.add(name=out).type, dtype, shape)
    return op


def bind(argument: Any, value: Any) -> None:
    if isinstance(value, str):
        argument.name = value
        return
    array = np.asarray(value)
    integer = array.dtype.kind in "iu"
    b.set_type(argument.value.type, "int32" if integer else "fp32", array.shape)
    tensor = argument.value.immediateValue.tensor
    (tensor.ints if integer else tensor.floats).values.extend(array.reshape(-1).tolist())


def dynamic(rank: int) -> Any:
    """A type of unknown sizes, which promises nothing."""
    kind = MIL_pb2.ValueType()
    kind.tensorType.dataType = MIL_pb2.FLOAT32
    kind.tensorType.rank = rank
    for _ in range(rank):
        kind.tensorType.dimensions.add().unknown.variadic = False
    return kind


def text(value: str) -> Any:
    made = MIL_pb2.Value()
    b.set_type(made.type, "fp32", ())
    made.type.tensorType.dataType = MIL_pb2.STRING
    made.immediateValue.tensor.strings.values.append(value)
    return made
