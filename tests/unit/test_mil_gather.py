"""distill.mil: gather and scatter, against numpy loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distill.mil.ops  # noqa: F401  (fills the operator table)
from distill.mil.ops.registry import TABLE
from distill.mil.policy import Policy, Strict
from distill.mil.run import Run

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
INDEX = np.array([2, 0], np.int32)


def computed(name: str, policy: Policy | None = None, **operands) -> np.ndarray:
    given = {k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in operands.items()}
    return TABLE[name].function(run=Run(policy or Policy(), None), **given).numpy()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 999))
def test_the_first_batch_dimensions_of_a_gather_go_in_step(data, shape, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    batch_dims = data.draw(st.integers(0, len(shape) - 1))
    axis = data.draw(st.integers(batch_dims, len(shape) - 1))
    batch, rest = tuple(shape[:batch_dims]), tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    indices = rng.integers(0, shape[axis], (*batch, *rest)).astype(np.int32)
    expected = np.empty(tuple(shape[:axis]) + rest + tuple(shape[axis + 1 :]), np.float32)
    for where in np.ndindex(batch):
        expected[where] = x[where].take(indices[where], axis - batch_dims)
    given_axis = axis - len(shape) if seed % 2 else axis
    got = computed("gather", x=x, indices=indices, axis=given_axis, batch_dims=batch_dims)
    np.testing.assert_array_equal(got, expected)


COMBINE = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": lambda a, b: a / b,
    "max": np.maximum,
    "min": np.minimum,
    "update": lambda a, b: b,
}


@pytest.mark.parametrize("mode", COMBINE)
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_scatter_combines_repeated_indices_one_after_the_other(mode, dtype):
    data, updates = np.array([120, 7, 49], dtype), np.array([2, 49, 3], dtype)
    indices = np.array([0, 2, 0], np.int32)
    expected = data.copy()
    for index, update in zip(indices, updates):
        expected[index] = COMBINE[mode](expected[index], update)
    got = computed("scatter", data=data, indices=indices, updates=updates, mode=mode)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    along = computed("scatter_along_axis", data=data, indices=indices, updates=updates, mode=mode)
    pointed = computed("scatter_nd", data=data, indices=indices.reshape(3, 1), updates=updates, mode=mode)
    np.testing.assert_array_equal(along, got)
    np.testing.assert_array_equal(pointed, got)


@pytest.mark.parametrize("name", ["gather", "gather_along_axis", "gather_nd"])
@pytest.mark.parametrize("bad", [-1, 3])
def test_a_checked_gather_refuses_an_index_that_is_out_of_bounds(name, bad):
    with pytest.raises(IndexError, match=f"index {bad} is out of bounds for a dimension of size 3"):
        computed(name, x=X[0, :, 0], indices=np.array([bad], np.int32), validate_indices=True)


@pytest.mark.parametrize("name", ["scatter", "scatter_along_axis", "scatter_nd"])
@pytest.mark.parametrize("bad", [-1, 3])
def test_scatter_refuses_or_leaves_out_an_index_that_is_out_of_bounds(name, bad):
    operands = {"data": X[0, :, 0], "updates": np.ones((1,), np.float32)}
    operands["indices"] = np.array([[bad]] if name == "scatter_nd" else [bad], np.int32)
    with pytest.raises(IndexError, match=f"index {bad} is out of bounds"):
        computed(name, **operands, validate_indices=True)
    strict = Strict()
    np.testing.assert_array_equal(computed(name, strict, **operands, validate_indices=False), X[0, :, 0])
    assert [finding.kind for finding in strict.findings] == ["index"]


@pytest.mark.parametrize(("validate", "remarks"), [(None, 1), (False, 2)])
def test_strict_is_told_of_an_unchecked_index_that_is_out_of_bounds(validate, remarks):
    """5 is out of bounds; -1 is too from iOS 17 on, where `validate_indices` is given. Neither leaves the memory."""
    strict = Strict()
    indices = np.array([-1, 5, 1], np.int32)
    got = computed("gather", strict, x=X, indices=indices, axis=1, validate_indices=validate)
    np.testing.assert_array_equal(got, X[:, [2, 2, 1]])
    assert [(finding.kind, finding.count) for finding in strict.findings] == [("index", remarks)]


def test_before_ios17_a_negative_index_counts_from_the_end():
    np.testing.assert_array_equal(computed("gather", x=X, indices=np.array([-1], np.int32), axis=1), X[:, 2:])
    updated = computed("scatter", data=X[0], indices=np.array([-1], np.int32), updates=X[0, :1], mode="update")
    np.testing.assert_array_equal(updated[2], X[0, 0])


@pytest.mark.parametrize(
    ("name", "operands", "message"),
    [
        ("gather", {"x": X, "indices": INDEX, "axis": 3}, "axis 3 of 3 dimensions"),
        ("gather", {"x": X, "indices": INDEX[None], "axis": 2, "batch_dims": 1}, "1 batch dimensions before axis 2"),
        ("scatter", {"data": X, "indices": INDEX, "updates": X[:1, :2], "axis": -4}, "axis -4 of 3"),
        ("scatter_along_axis", {"data": X[:, :2], "indices": np.zeros((2, 3, 4), np.int32), "updates": X}, "into data"),
        ("scatter", {"data": X, "indices": INDEX // 2, "updates": X, "mode": "most"}, "unknown mode 'most'"),
    ],
)
def test_operands_that_do_not_fit_are_one_clear_error(name, operands, message):
    with pytest.raises((ValueError, IndexError), match=message):
        computed(name, **operands)
