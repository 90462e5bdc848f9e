"""Performance: ratios of two things timed side by side, never absolute times.

    make toy-e2e && pytest tests/test_performance_regression.py -v

The reference executor is no measure of a device's speed (that is `make speed-coreml`, on a Mac); it is what
verification runs on, so it must not become slow. Takes /tmp/toy_T128.mlpackage where `make toy-e2e` has made it, and
toy packages of its own in any case. Measured on 2 cores x86-64, one thread, T=128: see each bound.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import checkpoint
from distill.export.twin import PrefillTwin
from distill.verify.runner import PackageRunner
from tests.conftest import Toy

PREFILL_BOUND = {"fp32": 5.0, "ieee16": 6.0}
"""Time of a prefill under the executor as a multiple of PyTorch's, eagerly, on the same twin and input; 1.7 and 1.8."""
GROWTH_BOUND = 1.5
"""Late decode steps as a multiple of early ones: a step's cost does not depend on its position; 0.97."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["toy-e2e", "own"])
def prefill(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A T=128 package and the checkpoint that it was made from."""
    if request.param == "toy-e2e":
        made = request.getfixturevalue("toy_e2e")
        return made.package, made.checkpoint
    toy: Toy = request.getfixturevalue("toy")
    return toy.prefill_long, toy.checkpoint


def ratio(slow: Callable[[], object], fast: Callable[[], object], rounds: int) -> float:
    """Median over rounds of time(slow) / time(fast), interleaved, so that other load strikes both."""
    slow(), fast()
    found = []
    for _ in range(rounds):
        times = []
        for work in (slow, fast):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        found.append(times[0] / times[1])
    return statistics.median(found)


@pytest.mark.parametrize("policy", PREFILL_BOUND)
def test_prefill_under_the_executor_keeps_up_with_pytorch(prefill: tuple[Path, Path], policy: str) -> None:
    package, saved = prefill
    runner = PackageRunner(package, policy)
    twin = PrefillTwin(checkpoint.load(saved).student.float().eval(), runner.contract.sequence())
    ids = np.random.default_rng(0).integers(0, 1000, runner.contract.sequence()).tolist()
    tensor = torch.tensor([ids], dtype=torch.int32)
    with torch.no_grad():
        observed = ratio(lambda: runner.prefill(ids), lambda: twin(tensor), 30)
    print(f"prefill, {policy}: {observed:.2f} times PyTorch")
    assert observed < PREFILL_BOUND[policy]


def test_a_decode_step_costs_the_same_at_every_position(toy: Toy) -> None:
    """Early and late steps of one sequence, several sequences, so that a slow moment is outvoted."""
    runner = PackageRunner(toy.decode)
    ids = np.random.default_rng(0).integers(0, 1000, runner.capacity).tolist()
    early, late = [], []
    for _ in range(4):
        times, start = [], time.perf_counter()
        for _logits in runner.steps(ids):
            times.append(time.perf_counter() - start)
            start = time.perf_counter()
        early += times[4 : runner.capacity // 4]
        late += times[-runner.capacity // 4 :]
    observed = statistics.median(late) / statistics.median(early)
    print(f"decode: late steps take {observed:.2f} times early ones")
    assert observed < GROWTH_BOUND


def test_a_decode_step_is_cheaper_than_running_the_prompt_again(toy: Toy) -> None:
    """What the state is for; 0.5 to 0.7. Toy steps are all overhead: the margin grows with the model."""
    decode, whole = PackageRunner(toy.decode), PackageRunner(toy.prefill_long)
    ids = np.random.default_rng(0).integers(0, 1000, 64).tolist()
    observed = ratio(lambda: list(decode.steps(ids[:8])), lambda: [whole.prefill(ids) for _ in range(8)], 9)
    print(f"decode: a step takes {observed:.2f} of a prefill")
    assert observed < 1.0
