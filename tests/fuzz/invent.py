"""Operations that nobody wrote: any operator of the table, with arguments that are right in kind and odd in value."""

from __future__ import annotations

import random
from typing import Any

from coremltools.proto import MIL_pb2

import distill.mil.ops  # noqa: F401  (fills the table)
from distill.mil.ops.registry import TABLE, Parameter

SIZES = [0, 1, 1, 1, 2, 2, 3, 4, 5, 8, 16]
INTEGERS = [-(2**31), -(2**20), -100, -9, -5, -4, -3, -2, -1, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 4, 5, 7, 8, 16, 100]
INTEGERS += [2**10, 2**16, 2**20, 2**26, 2**31 - 1]
FLOATS = [0.0, 1.0, 1.0, 2.0, -1.0, 0.5, 1e-45, 65504.0, 1e38, -1e38, float("inf"), float("-inf"), float("nan")]
WORDS = (
    "fp16 fp32 int32 uint8 int8 bool same same_lower valid custom constant reflect replicate add sub mul div max min"
)
WORDS += " update EXACT TANH_APPROXIMATION NEAREST BILINEAR ALIGN_CORNERS STRICT_ALIGN_CORNERS DEFAULT UNALIGN_CORNERS"
WORDS += " OFFSET_CORNERS forward reverse bidirectional tanh sigmoid relu"
WORDS += " border zeros reflection normalized_minus_one_to_one"
WORDS += (
    " unnormalized nearest bilinear left right L2_NORM nchw,nwhu->nchu chw,whr->chr ij,jk->ik CORNERS_HEIGHT_FIRST x"
)
STRINGS = WORDS.split()
DTYPES = {"fp32": MIL_pb2.FLOAT32, "fp16": MIL_pb2.FLOAT16, "int32": MIL_pb2.INT32, "bool": MIL_pb2.BOOL}
NAMES = sorted(name for name, handler in TABLE.items() if not handler.wants_blocks)


def invent(model: Any, seed: int, where: int) -> None:
    """Append one operation to a function's block."""
    rng = random.Random(seed)
    functions = model.mlProgram.functions
    if not functions:
        return
    function = functions[sorted(functions)[0]]
    block = function.block_specializations[function.opset]
    scope = [i.name for i in function.inputs] + [o.name for op in block.operations for o in op.outputs]
    handler = TABLE[NAMES[where % len(NAMES)]]
    op = block.operations.add(type=handler.name)
    size = rng.choice(SIZES), rng.randint(0, 5)
    for name, parameter in handler.parameters.items():
        if parameter.required or rng.random() < 0.6:
            for _ in range(rng.randint(1, 3) if parameter.many and parameter.kind == "Tensor" else 1):
                argument = op.inputs[name].arguments.add()
                if scope and parameter.kind == "Tensor" and rng.random() < 0.4:
                    argument.name = rng.choice(scope)
                else:
                    constant(argument.value, parameter, rng, size)
    for n in range(rng.choice((1, 1, 1, 2, 3))):
        output = op.outputs.add(name=f"invented_{len(block.operations)}_{n}").type.tensorType
        output.dataType = rng.choice(list(DTYPES.values()))
        output.rank = -1


def constant(value: Any, parameter: Parameter, rng: random.Random, size: tuple[int, int]) -> None:
    kind = parameter.kind
    tensor = value.immediateValue.tensor
    shape: list[int] = []
    if kind == "Tensor" or kind not in ("int", "float", "bool", "str"):
        kind = rng.choice(("float", "float", "int", "bool"))
        shape = [
            rng.choice((size[0], size[0], rng.choice(SIZES))) for _ in range(rng.choice((size[1], rng.randint(0, 5))))
        ]
    elif parameter.many:
        shape = [rng.choice((1, 2, 2, 3, 4, 4, 5, 6))]
    count = 1
    for n in shape:
        count *= n
    if count > 2**12:
        shape, count = [1], 1
    calm = rng.random() < 0.7  # mostly numbers that something can be done with
    if kind == "str":
        dtype = MIL_pb2.STRING
        tensor.strings.values.extend(rng.choice(STRINGS) for _ in range(count))
    elif kind == "int":
        dtype = MIL_pb2.INT32
        tensor.ints.values.extend(rng.choice((0, 1, 1, 2, 3)) if calm else rng.choice(INTEGERS) for _ in range(count))
    elif kind == "bool":
        dtype = MIL_pb2.BOOL
        tensor.bools.values.extend(rng.random() < 0.5 for _ in range(count))
    else:
        dtype = MIL_pb2.FLOAT32
        tensor.floats.values.extend(rng.uniform(-2, 2) if calm else rng.choice(FLOATS) for _ in range(count))
    value.type.tensorType.dataType = dtype
    value.type.tensorType.rank = len(shape)
    for n in shape:
        value.type.tensorType.dimensions.add().constant.size = n
