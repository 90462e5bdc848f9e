"""distill.mil: lists, control flow, classifiers and blocks of space against values worked by hand."""

from __future__ import annotations

import time

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb

from distill import mil
from distill.errors import PackageError
from distill.mil.limits import Limits
from distill.mil.ops.registry import TABLE
from distill.mil.policy import Policy
from distill.mil.run import Run
from tests.unit import mil_build as b


def make_list(**arguments):
    return TABLE["make_list"].function(run=Run(Policy(), None), **arguments)


def call(op: str, *arguments):
    run = [Run(Policy(), None)] if TABLE[op].wants_run else []
    return TABLE[op].function(*run, *arguments)


def size(*sizes):
    return [n if isinstance(n, str) else torch.tensor(n, dtype=torch.int32) for n in sizes]


def test_writing_to_a_list_makes_a_new_list():
    empty = make_list(elem_shape=size(2), init_length=2)
    one = call("list_write", empty, 1, torch.tensor([1.0, 2.0]))
    assert call("list_read", empty, 1).tolist() == [0, 0]
    assert call("list_read", one, 1).tolist() == [1, 2]
    assert call("list_read", one, 0).tolist() == [0, 0]


def test_a_dynamic_list_grows_and_its_gaps_are_zero():
    grown = call("list_write", make_list(elem_shape=size(2)), 3, torch.tensor([5.0, 6.0]))
    assert int(call("list_length", grown)) == 4
    assert call("list_gather", grown, torch.tensor([3, 1])).tolist() == [[5, 6], [0, 0]]
    scattered = call("list_scatter", grown, torch.tensor([5, 0, 5]), torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
    assert int(call("list_length", scattered)) == 6
    assert call("list_gather", scattered, torch.tensor([0, 4, 5])).tolist() == [[2, 2], [0, 0], [3, 3]]


def test_a_named_size_is_that_of_the_first_element():
    ls = make_list(elem_shape=size("n", 2), init_length=2, dtype="int32")
    ls = call("list_write", ls, 0, torch.ones(3, 2, dtype=torch.int32))
    assert call("list_gather", ls, torch.tensor([1, 0])).sum((1, 2)).tolist() == [0, 6]
    assert call("list_gather", ls, torch.tensor([])).shape == (0, 3, 2)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("list_read", (2,), "index 2 in a list of 2"),
        ("list_read", (-1,), "index -1"),
        ("list_write", (2, torch.zeros(2)), "writing at"),
        ("list_write", (-1, torch.zeros(2)), "writing at"),
        ("list_write", (0, torch.zeros(3)), "shape"),
        ("list_write", (0, torch.zeros(1, 2)), "shape"),
        ("list_scatter", (torch.tensor([0, 2]), torch.zeros(2, 2)), "writing at"),
        ("list_scatter", (torch.tensor([0]), torch.zeros(2, 2)), "1 indices"),
        ("list_gather", (torch.tensor([0, 5]),), "index 5"),
    ],
)
def test_misuse_of_a_fixed_list_is_one_clear_error(op, arguments, message):
    fixed = make_list(elem_shape=size(2), init_length=2, dynamic_length=False)
    with pytest.raises((ValueError, IndexError), match=message):
        call(op, fixed, *arguments)


def test_hostile_list_sizes_are_refused():
    with pytest.raises(ValueError, match="refusing"):
        make_list(elem_shape=size(2), init_length=2**31 - 1)
    with pytest.raises(ValueError, match="refusing"):
        make_list(elem_shape=size(2), init_length=-1)
    with pytest.raises(PackageError, match="refusing"):
        make_list(elem_shape=size(2**30, 2**30))
    with pytest.raises(IndexError, match="writing at"):
        call("list_write", make_list(elem_shape=size(2)), 2**31 - 1, torch.zeros(2))
    large = make_list(elem_shape=size(2**20, 2**10), init_length=2**20)
    with pytest.raises(PackageError, match="refusing"):
        call("list_gather", large, torch.zeros(1000))
    with pytest.raises(TypeError, match="not a list"):
        call("list_length", torch.zeros(2))


def test_a_loop_fills_a_list(tmp_path):
    """squares[i] = i * i, n of them."""

    def body(x0):
        def step(i, ls):
            return mb.add(x=i, y=1.0), mb.list_write(ls=ls, index=mb.cast(x=i, dtype="int32"), value=square(i))

        def square(i):
            return mb.expand_dims(x=mb.mul(x=i, y=i), axes=[0])

        n = mb.squeeze(x=x0)
        _, ls = mb.while_loop(
            _cond=lambda i, ls: mb.less(x=i, y=n), _body=step, loop_vars=(0.0, mb.make_list(elem_shape=(1,)))
        )
        return mb.list_gather(ls=ls, indices=mb.range_1d(start=0, end=mb.list_length(ls=ls), step=1))

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((1,))], body, "fp32")
    (squares,) = program.predict({"x0": np.array([5.0], np.float32)}).values()
    assert squares.tolist() == [[0], [1], [4], [9], [16]]
    (many,) = program.predict({"x0": np.array([1000.0], np.float32)}).values()
    assert many.shape == (1000, 1) and many[-1] == 999.0**2
    strict = mil.load(tmp_path / "m.mlpackage", limits=Limits(iterations=999))
    strict.predict({"x0": np.array([999.0], np.float32)})
    with pytest.raises(PackageError, match="too many loop iterations"):
        strict.predict({"x0": np.array([1000.0], np.float32)})


def test_nested_loops_and_conditions_with_several_variables(tmp_path):
    """Collatz steps of n: a condition within a loop, and a loop that halves within the condition."""

    def even(n):
        return mb.equal(x=mb.mod(x=n, y=2.0), y=0.0)

    def halved(n, count):
        return mb.while_loop(
            _cond=lambda n, c: even(n),
            _body=lambda n, c: (mb.real_div(x=n, y=2.0), mb.add(x=c, y=1.0)),
            loop_vars=(n, count),
        )

    def step(n, count):
        return mb.cond(
            pred=even(n),
            _true_fn=lambda: halved(n, count),
            _false_fn=lambda: (mb.add(x=mb.mul(x=n, y=3.0), y=1.0), mb.add(x=count, y=1.0)),
        )

    def body(x0):
        start = mb.squeeze(x=x0)
        return mb.while_loop(_cond=lambda n, c: mb.greater(x=n, y=1.0), _body=step, loop_vars=(start, 0.0))

    program = b.load(tmp_path / "m.mlpackage", [b.tensor((1,))], body, "fp32")
    for start, steps in [(1, 0), (6, 8), (27, 111)]:
        n, count = program.predict({"x0": np.array([start], np.float32)}).values()
        assert (float(n), float(count)) == (1, steps)


def test_loops_within_loops_end_in_one_error(tmp_path):
    def forever(depth):
        def step(i):
            if depth:
                (i,) = [forever(depth - 1)(i)]
            return mb.add(x=i, y=1.0)

        return lambda i: mb.while_loop(_cond=lambda i: mb.greater(x=i, y=-1.0), _body=step, loop_vars=(i,))

    body = lambda x0: forever(2)(mb.squeeze(x=x0))  # noqa: E731 (the builder reads parameter names)
    program = b.load(tmp_path / "m.mlpackage", [b.tensor((1,))], body, "fp32")
    started = time.monotonic()
    with pytest.raises(PackageError) as error:
        program.predict({"x0": np.zeros(1, np.float32)})
    assert time.monotonic() - started < 60
    assert str(error.value).count("loop iterations in one prediction") == 1
    assert str(error.value).count("m.mlpackage") == 1


def hand_made(*ops) -> object:
    """x (2,) -> what a function of the MIL protobuf adds -> y."""
    model = b.raw_model()
    for change in ops:
        change(b.operations(model))
    return model


def add_condition(operations, block_outputs: list[list[str]], outputs: int) -> None:
    const = operations.add(type="const")
    const.outputs.add(name="pred").type.tensorType.dataType = 1
    value = const.attributes["val"]
    value.type.tensorType.dataType = 1
    value.immediateValue.tensor.bools.values.append(True)
    op = operations.add(type="cond")
    op.inputs["pred"].arguments.add(name="pred")
    for names in block_outputs:
        op.blocks.add().outputs.extend(names)
    for index in range(outputs):
        b.set_type(op.outputs.add(name=f"c{index}").type, "fp32", (2,))


def predicted(tmp_path, model):
    program = mil.load(b.write_package(tmp_path / "m.mlpackage", model))
    return program.predict({"x": np.ones(2, np.float32)})


def test_a_condition_may_have_no_outputs(tmp_path):
    outputs = predicted(tmp_path, hand_made(lambda ops: add_condition(ops, [[], []], 0)))
    assert outputs["y"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("blocks", "outputs", "message"),
    [([[]], 0, "1 blocks, not two"), ([["x"], ["x"]], 2, "1 results for 2 outputs")],
)
def test_a_malformed_condition_is_refused(tmp_path, blocks, outputs, message):
    with pytest.raises(PackageError, match=message):
        predicted(tmp_path, hand_made(lambda ops: add_condition(ops, blocks, outputs)))


def add_loop(operations, inputs: tuple[int, int], body_outputs: list[str], condition: str = "pred") -> None:
    add_condition(operations, [[], []], 0)
    op = operations.add(type="while_loop")
    op.inputs["loop_vars"].arguments.add(name="x")
    for index, count in enumerate(inputs):
        block = op.blocks.add()
        for n in range(count):
            b.set_type(block.inputs.add(name=f"i{index}{n}").type, "fp32", (2,))
        block.outputs.extend(body_outputs if index else [condition])
    b.set_type(op.outputs.add(name="w").type, "fp32", (2,))


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (((1, 1), []), "returns 0 values for 1 loop variables"),
        (((1, 1), ["i10", "i10"]), "returns 2 values for 1"),
        (((2, 1), ["i10"]), "1 values for a block of 2 inputs"),
        (((1, 1), ["i10"], "x"), "the loop's condition is not one value"),
    ],
)
def test_a_malformed_loop_is_refused(tmp_path, loop, message):
    with pytest.raises(PackageError, match=message):
        predicted(tmp_path, hand_made(lambda ops: add_loop(ops, *loop)))


def classifier(path, labels) -> mil.Program:
    return b.load(
        path,
        [b.tensor((1, 3))],
        lambda x0: mb.softmax(x=x0, axis=-1),
        "fp32",
        classifier_config=ct.ClassifierConfig(labels),
    )


@pytest.mark.parametrize("labels", [["cat", "dog", "7"], [10, -3, 2**40]])
def test_a_classifier_returns_its_label_and_a_dictionary(tmp_path, labels):
    program = classifier(tmp_path / "m.mlpackage", labels)
    x = np.array([[0.5, 2.0, -1.0]], np.float32)
    outputs = program.predict({"x0": x})
    expected = np.exp(x[0]) / np.exp(x[0]).sum()
    assert [f.kind for f in program.function().outputs] == ["label", "probabilities"]
    assert outputs["classLabel"] == labels[1] and type(outputs["classLabel"]) is type(labels[1])
    probabilities = outputs["classLabel_probs"]
    assert list(probabilities) == labels
    np.testing.assert_allclose(list(probabilities.values()), expected, rtol=1e-6)
    assert [step.op.type for step in program.trace({"x0": x})][-1] == "classify"


def test_a_classifier_with_too_few_classes_is_refused():
    with pytest.raises(ValueError, match="3 probabilities for 2 classes"):
        TABLE["classify"].function(torch.ones(3), [["a", "b"]])


def test_space_to_batch_and_back():
    x = torch.arange(2 * 1 * 2 * 3.0).reshape(2, 1, 2, 3)
    to_batch, to_space = TABLE["space_to_batch"].function, TABLE["batch_to_space"].function
    made = to_batch(x, [2, 2], [0, 0, 1, 0])
    # rows of x: [0 1 2], [3 4 5], one zero column on the left: blocks [0 0|1 2], [0 3|4 5]
    assert made.shape == (8, 1, 1, 2)
    assert made[0::2].reshape(4, 2).tolist() == [[0, 1], [0, 2], [0, 4], [3, 5]]
    assert torch.equal(to_space(made, [2, 2], [0, 0, 1, 0]), x)
