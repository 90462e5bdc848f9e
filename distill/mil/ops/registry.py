"""The op table. A handler is a function whose signature is the operator's: parameter names are MIL's,
annotations say how each is passed, defaults are MIL's defaults.

    @op("softmax")
    def softmax(x: Tensor, axis: int = -1) -> Tensor: ...

`Tensor` parameters come as torch tensors, `int`/`list[int]`/`str`... as plain Python values (converted once
where constant), `Any` as they are (lists of tensors, class labels). A first parameter `run: Run` gives the
policy and the state; `blocks: list[Body]` the nested blocks. A handler computes in float32 where MIL says fp16;
the interpreter rounds what it returns. It never changes its inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

_Handler = TypeVar("_Handler", bound=Callable[..., Any])

KINDS = frozenset({"Tensor", "Any", "int", "float", "bool", "str"})
UNCONVERTED = frozenset({"Tensor", "Any"})


class Parameter(NamedTuple):
    """One input: `kind` is the annotation without `list[]` and `| None`."""

    kind: str
    many: bool
    required: bool


class Handler(NamedTuple):
    """An operator's function with what the interpreter needs to call it."""

    name: str
    function: Callable[..., Any]
    parameters: dict[str, Parameter]
    wants_run: bool
    wants_blocks: bool
    exact: bool  # outputs hold only values of the inputs: nothing to round
    fresh: bool  # outputs never share memory with an input
    by_shape: bool  # what a call takes follows from its operands' shapes, whatever they hold


TABLE: dict[str, Handler] = {}


def op(*names: str, exact: bool = False, fresh: bool = False, by_shape: bool = False) -> Callable[[_Handler], _Handler]:
    """Register a handler for the operators `names`. Registering an operator twice is an error."""

    def register(function: _Handler) -> _Handler:
        parameters = dict(inspect.signature(function).parameters)
        wants_run = parameters.pop("run", None) is not None
        wants_blocks = parameters.pop("blocks", None) is not None
        parsed = {name: _parameter(function, p) for name, p in parameters.items()}
        for name in names:
            if name in TABLE:
                raise ValueError(f"operator {name!r} is registered twice")
            TABLE[name] = Handler(name, function, parsed, wants_run, wants_blocks, exact, fresh, by_shape)
        return function

    return register


def _parameter(function: Callable[..., Any], parameter: inspect.Parameter) -> Parameter:
    text = str(parameter.annotation).replace(" | None", "")
    many = text.startswith("list[")
    kind = text.removeprefix("list[").removesuffix("]")
    if kind not in KINDS:
        raise TypeError(f"{function.__name__}: parameter {parameter.name!r} has no usable annotation: {text!r}")
    return Parameter(kind, many, parameter.default is inspect.Parameter.empty)
