"""How a prediction is compared: fp32 at the suite's own tolerance, fp16 far tighter than the suite does it.

The suite loosens every fp16 comparison to atol 0.5, rtol 0.05. Here it is atol 2e-3, rtol 5e-3; an operator whose fp16
arithmetic itself needs more has a rule below, which says why. No rule names a test. What counts is the precision of the
program, not the test's label: some programs of "fp32" tests declare fp16 tensors, some of "fp16" tests hold none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from coremltools.proto.MIL_pb2 import FLOAT16

ATOL16, RTOL16 = 2e-3, 5e-3

count = 0  # numeric comparisons in the present test
precision = ""  # of the last program compared


class Rule(NamedTuple):
    """A wider fp16 tolerance for programs that hold an operator."""

    reason: str
    atol: Callable[[np.ndarray], float]  # of the expected values


# A product of a row with k weights that were rounded to fp16 errs by up to 2^-11 sum |x w|, and a recurrence feeds the
# error of each step to the next. The suite's longest is 8 steps of 64 inputs.
_RECURRENT = Rule("sums of products with rounded weights, the error of each step fed to the next", lambda _: 5e-3)

RULES: dict[str, Rule] = {"rnn": _RECURRENT, "gru": _RECURRENT, "lstm": _RECURRENT}


def begin() -> None:
    global count, precision
    count, precision = 0, ""


class Contents(NamedTuple):
    """What a serialized program holds."""

    operators: set[str]
    precision: str  # fp16 where any tensor is


def contents(mlmodel: Any) -> Contents:
    operators: set[str] = set()
    dtypes: set[int] = set()

    def walk(block: Any) -> None:
        for operation in block.operations:
            operators.add(operation.type)
            dtypes.update(output.type.tensorType.dataType for output in operation.outputs)
            for nested in operation.blocks:
                walk(nested)

    for function in mlmodel.get_spec().mlProgram.functions.values():
        dtypes.update(i.type.tensorType.dataType for i in function.inputs)
        for block in function.block_specializations.values():
            walk(block)
    return Contents(operators, "fp16" if FLOAT16 in dtypes else "fp32")


def tolerance(program: Contents, expected: np.ndarray, atol: float, rtol: float) -> tuple[float, float]:
    """(absolute, relative), from the suite's own for fp32."""
    if program.precision == "fp32":
        return atol, rtol
    rules = [RULES[name] for name in program.operators if name in RULES]
    return max([ATOL16, *(rule.atol(expected) for rule in rules)]), RTOL16


def compare_backend(
    mlmodel: Any,
    input_key_values: dict[str, Any],
    expected_outputs: Mapping[str, Any],
    dtype: str = "fp32",
    atol: float = 1e-04,
    rtol: float = 1e-05,
    also_compare_shapes: bool = True,
    state: Any = None,
    allow_mismatch_ratio: float = 0.0,
) -> Any:
    """In the place of the suite's function of this name; elements that may mismatch are not granted."""
    global count, precision
    import coremltools.converters.mil.testing_utils as suite

    program = contents(mlmodel)
    precision = program.precision
    predicted = suite.run_core_ml_predict(mlmodel, input_key_values, state)
    if also_compare_shapes:
        suite.compare_shapes(mlmodel, input_key_values, expected_outputs, pred=predicted)
    for name, expected in expected_outputs.items():
        value = suite._get_coreml_out_from_dict(predicted, name)
        count += 1
        if isinstance(value, np.ndarray):
            wanted = np.asarray(expected)
            atol_used, rtol_used = tolerance(program, wanted, atol, rtol)
            np.testing.assert_allclose(value, wanted, atol=atol_used, rtol=rtol_used, err_msg=name)
        elif isinstance(value, dict):
            assert value.keys() <= expected.keys()
            for key, probability in value.items():
                np.testing.assert_allclose(probability, expected[key], atol=atol, rtol=rtol, err_msg=str(key))
        else:
            assert value == expected
    return predicted


def install() -> None:
    """Before the suite's test modules take the function by name."""
    import coremltools.converters.mil.mil.ops.tests.testing_utils as op_suite
    import coremltools.converters.mil.testing_utils as suite

    suite.compare_backend = compare_backend
    op_suite.compare_backend = compare_backend
