"""distill.mil: memory that two values share, and what no result may do to another; then corners of single operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb

import distill.mil.ops  # noqa: F401  (fills the table)
from distill import mil
from distill.mil.ops.registry import TABLE
from distill.mil.policy import Acc16, make_policy
from distill.mil.run import Run
from distill.mil.values import from_numpy, overlaps
from tests.conformance.manners import watched
from tests.unit import mil_build as b

RUN = Run(make_policy("fp32"), None)


def function(name: str):
    """An operator that fails if it changes an input or, marked fresh, returns one."""
    return watched(TABLE[name])


def test_a_single_gathered_element_is_a_copy():
    x = torch.arange(6.0).reshape(2, 3)
    for indices in ([1], [1, 2]):
        out = function("gather_nd")(run=RUN, x=x, indices=torch.tensor(indices))
        assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(2, 3), False),
        (torch.zeros(2, 3).t(), False),
        (torch.zeros(4, 6)[::2, 1:3], False),
        (torch.zeros(1, 5).expand(1, 5), False),
        (torch.zeros(()).expand(4), True),
        (torch.zeros(3, 1).expand(3, 2), True),
        (torch.zeros(5).unfold(0, 3, 1), True),
        (torch.zeros(5).unfold(0, 2, 2), False),
    ],
)
def test_overlapping_elements_are_recognised(x, expected):
    assert overlaps(x) is expected


def test_an_update_of_overlapping_windows_is_made_on_a_copy(tmp_path):
    def body(x):
        windows = mb.sliding_windows(x=mb.add(x=x, y=np.float32(0)), axis=0, size=3, stride=1)
        return mb.slice_update(x=windows, update=np.full((1, 3), 100, np.float32), begin=[1, 0], end=[2, 3])

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((6,))], body, "fp32")
    (got,) = program.predict({"x": np.arange(6.0)}, policy="fp32").values()
    np.testing.assert_array_equal(got, [[0, 1, 2], [100, 100, 100], [2, 3, 4], [3, 4, 5]])


def test_a_state_does_not_become_an_expanded_view(tmp_path):
    """Two steps: the first writes a broadcast value into the state, the second updates one element of it."""

    def body(x, position, kv):
        old = mb.read_state(input=kv)
        end = mb.add(x=position, y=np.array([1], np.int32))
        new = mb.slice_update(x=old, update=x, begin=position, end=end)
        mb.coreml_update_state(state=kv, value=new)
        return mb.identity(x=new)

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((1,), "fp16"), b.tensor((1,), "int32"), b.state((4,))], body)
    state = program.make_state()
    state.set(state.names[0], torch.zeros(()).expand(4))
    one = {"x": np.array([5.0]), "position": np.array([1])}
    (got,) = program.predict(one, state=state).values()
    np.testing.assert_array_equal(got, [0, 5, 0, 0])
    np.testing.assert_array_equal(state.read(state.names[0]), [0, 5, 0, 0])


def counter(tmp_path) -> mil.Program:
    def body(x, total):
        new = mb.add(x=mb.read_state(input=total), y=x)
        mb.coreml_update_state(state=total, value=new)
        return mb.identity(x=new)

    return b.load(tmp_path / "m.mlpackage", [b.tensor((1,), "fp16"), b.state((1,))], body)


def test_a_trace_writes_its_state_at_its_end_and_reads_it_at_its_beginning(tmp_path):
    program = counter(tmp_path)
    state = program.make_state()
    name = state.names[0]
    steps = program.trace({"x": np.array([2.0])}, state=state)
    next(steps)
    program.predict({"x": np.array([10.0])}, state=state)
    assert state.read(name) == 10
    list(steps)
    assert state.read(name) == 2
    next(program.trace({"x": np.array([2.0])}, state=state))  # abandoned
    assert state.read(name) == 2


def test_strict_reports_constants_whatever_ran_before(tmp_path):
    def body(x):
        weight = mb.constexpr_blockwise_shift_scale(
            data=np.full((2, 2), 127, np.int8), scale=np.full((2, 1), 60000, np.float16)
        )
        return mb.mul(x=x, y=weight)

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((2, 2), "fp16")], body)
    for policy in ("ieee16", "strict", "strict"):
        program.predict({"x": np.zeros((2, 2))}, policy=policy)
    kinds = {(f.kind, f.op_type) for f in program.findings}
    assert ("overflow", "constexpr_blockwise_shift_scale") in kinds and ("nan", "mul") in kinds


def test_an_equation_that_mil_does_not_allow_is_refused():
    x = torch.ones(2, 2, 2)
    assert function("einsum")(run=RUN, values=[x, x], equation="abc,cbd->abd").shape == (2, 2, 2)
    assert function("einsum")(run=RUN, values=[x, x], equation="chw,whr->chr").shape == (2, 2, 2)
    with pytest.raises(ValueError, match="not one that MIL allows"):
        function("einsum")(run=RUN, values=[x, x], equation="abc,abd->acd")


def test_a_kernel_beyond_the_padded_input_is_refused():
    x, weight = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3)
    for dilation in (4, 2**31, 2**62):
        with pytest.raises(ValueError, match="a kernel that reaches"):
            function("conv")(run=RUN, x=x, weight=weight, dilations=[dilation, dilation])


def test_no_axes_reduce_nothing():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for name in ("reduce_max", "reduce_min"):
        assert torch.equal(function(name)(x=x, axes=[]), x)
    for name in ("reduce_sum", "reduce_log_sum_exp"):
        assert torch.equal(function(name)(run=RUN, x=x, axes=[]), x)
    assert Acc16().sum(torch.zeros(0, 3), [1], False).shape == (0,)


def test_integer_powers_wrap_and_signs_keep_nan():
    power = function("pow")(x=torch.tensor([3, 2, -1, 2], dtype=torch.int32), y=torch.tensor([40, 3, -3, -1]))
    assert power.to(torch.int32).tolist() == [(3**40 + 2**31) % 2**32 - 2**31, 8, -1, 0]
    assert function("sign")(x=torch.tensor([-2.0, 0.0, float("nan")])).isnan().tolist() == [False, False, True]


def test_topk_of_minus_one_takes_all():
    values, indices = function("topk")(x=torch.tensor([1.0, 3.0, 2.0]), k=-1)
    assert values.tolist() == [3, 2, 1] and indices.tolist() == [1, 2, 0]


def test_a_large_unsigned_number_stays_positive():
    assert from_numpy(np.array([2**63], np.uint64), "fp32").item() == 2**63
