"""A fixed sample of mutated packages: each is run or refused, within bounds of time and memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.harness import Harness
from tests.fuzz.mutate import CHANGES, Change, Recipe
from tests.fuzz.packages import BUILDERS

NUMBER = st.integers(0, 2**32 - 1)
CHANGE = st.builds(Change, st.sampled_from(CHANGES), NUMBER, NUMBER)
RECIPES = st.builds(Recipe, st.sampled_from(sorted(BUILDERS)), st.lists(CHANGE, min_size=1, max_size=4).map(tuple))


@pytest.fixture(scope="module")
def harness(tmp_path_factory) -> Iterator[Harness]:
    made = Harness(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.close()


@pytest.mark.parametrize("name", BUILDERS)
def test_a_sound_package_runs(harness, name):
    assert harness.run(Recipe(name, ()))["outcome"] == "result"


@settings(max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe=RECIPES)
def test_a_damaged_package_is_run_or_refused(harness, recipe):
    harness.run(recipe)
