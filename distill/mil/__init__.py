"""The ML Program reference executor: reads a serialized .mlpackage and runs it anywhere.

program = mil.load("model.mlpackage")
outputs = program.predict({"input_ids": ids})
"""

from distill.mil.limits import Limits
from distill.mil.package import load
from distill.mil.program import (
    Binding,
    Block,
    Feature,
    Function,
    ListType,
    NamedType,
    Operation,
    OtherType,
    Program,
    StateType,
    TensorType,
    Value,
    ValueType,
)

__all__ = [
    "Binding",
    "Block",
    "Feature",
    "Function",
    "Limits",
    "ListType",
    "NamedType",
    "Operation",
    "OtherType",
    "Program",
    "StateType",
    "TensorType",
    "Value",
    "ValueType",
    "load",
]
