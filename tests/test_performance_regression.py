"""Performance: ratios of two things timed side by side, against a stored baseline; never absolute times.

    make toy-e2e && pytest tests/test_performance_regression.py -v
    PERFORMANCE_BASELINE=add pytest tests/test_performance_regression.py     adds this run to the baseline

The reference executor is no measure of a device's speed (that is `make speed-coreml`, on a Mac); it is what
verification runs on, so it must not become slow. Takes /tmp/toy_T128.mlpackage where `make toy-e2e` has made it, and
toy packages of its own in any case.

A ratio is that of the fastest calls of both sides in alternating rounds: other load on the machine makes calls slower,
never faster. It may be MARGIN times the largest of the baseline's runs, which were made on an idle and a busy machine.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import checkpoint
from distill.artifacts import write_json
from distill.convert import coreml
from distill.export import programs
from distill.export.twin import CachedTwin, PrefillTwin
from distill.mil.policy import Policy
from distill.verify.runner import PackageRunner
from tests.conftest import SEQ, Toy

BASELINE = Path(__file__).parent / "baselines/performance.json"
MARGIN = 2.0
"""Runs of one ratio on one machine, idle and busy, differ by less than this; a slow-down of half a baseline is seen."""


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


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(slow: Callable[[], object], fast: Callable[[], object], rounds: int) -> float:
    """The fastest of `slow` over the fastest of `fast`, called in turn after a first call of each."""
    slow(), fast()
    times = [(seconds(slow), seconds(fast)) for _ in range(rounds)]
    return min(first for first, _ in times) / min(second for _, second in times)


def runs(name: str) -> list[float]:
    return list(json.loads(BASELINE.read_text())["ratios"].get(name, []))


def limit(name: str) -> float:
    return MARGIN * max(runs(name))


def require_within(name: str, observed: float) -> None:
    """Compare with the baseline, or add to it where PERFORMANCE_BASELINE=add."""
    if os.environ.get("PERFORMANCE_BASELINE") == "add":
        data = json.loads(BASELINE.read_text())
        data["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
        data["ratios"][name] = [*runs(name), round(observed, 3)]
        write_json(BASELINE, data)
    print(f"{name}: {observed:.2f}, at most {limit(name):.2f}")
    assert observed <= limit(name)


def prefill_ratio(package: Path, saved: Path, policy: str | Policy, rounds: int = 30) -> float:
    """A prefill under the executor as a multiple of PyTorch's, eagerly, on the same twin and input."""
    runner = PackageRunner(package)
    runner.policy = policy  # type: ignore[assignment]
    twin = PrefillTwin(checkpoint.load(saved).student.float().eval(), runner.contract.sequence())
    ids = np.random.default_rng(0).integers(0, 1000, runner.contract.sequence()).tolist()
    tensor = torch.tensor([ids], dtype=torch.int32)
    with torch.no_grad():
        return ratio(lambda: runner.prefill(ids), lambda: twin(tensor), rounds)


@pytest.mark.parametrize("policy", ["fp32", "ieee16"])
def test_prefill_under_the_executor_keeps_up_with_pytorch(prefill: tuple[Path, Path], policy: str) -> None:
    require_within(f"prefill, {policy} / eager", prefill_ratio(*prefill, policy))


def test_decoding_under_the_executor_keeps_up_with_pytorch(toy: Toy) -> None:
    runner = PackageRunner(toy.decode)
    twin = CachedTwin(checkpoint.load(toy.checkpoint).student.float().eval(), runner.capacity)
    ids = np.random.default_rng(0).integers(0, 1000, 16).tolist()
    feeds = [(torch.tensor([[t]], dtype=torch.int32), torch.tensor([i], dtype=torch.int32)) for i, t in enumerate(ids)]
    with torch.no_grad():
        observed = ratio(lambda: list(runner.steps(ids)), lambda: [twin(*feed) for feed in feeds], 20)
    require_within("decode step / eager", observed)


def test_a_decode_step_costs_the_same_at_every_position(toy: Toy) -> None:
    """The fastest of late and of early steps over several sequences."""
    runner = PackageRunner(toy.decode)
    ids = np.random.default_rng(0).integers(0, 1000, runner.capacity).tolist()
    early, late = [], []
    for _ in range(5):
        times, start = [], time.perf_counter()
        for _logits in runner.steps(ids):
            times.append(time.perf_counter() - start)
            start = time.perf_counter()
        early += times[4 : runner.capacity // 4]
        late += times[-runner.capacity // 4 :]
    require_within("late decode step / early", min(late) / min(early))


def test_a_decode_step_is_cheaper_than_running_the_prompt_again(toy: Toy) -> None:
    """What the state is for. Toy steps are all overhead: the margin grows with the model."""
    decode, whole = PackageRunner(toy.decode), PackageRunner(toy.prefill_long)
    ids = np.random.default_rng(0).integers(0, 1000, 64).tolist()
    observed = ratio(lambda: list(decode.steps(ids[:8])), lambda: [whole.prefill(ids) for _ in range(8)], 12)
    assert observed < 1.0
    require_within("decode step / prefill", observed)


def test_conversion_keeps_its_distance_from_tracing(toy: Toy, tmp_path: Path) -> None:
    student = checkpoint.load(toy.checkpoint).student.float().eval()
    example = (torch.zeros((1, SEQ), dtype=torch.int32),)
    source = toy.exported / f"student_prefill_T{SEQ}.pt"
    observed = ratio(
        lambda: coreml.run(coreml.ConvertConfig(source, tmp_path / "p.mlpackage")),
        lambda: programs.trace(PrefillTwin(student, SEQ), example),
        2,
    )
    require_within("conversion / trace", observed)


class Slow(Policy):
    """Half a millisecond more an operation."""

    def settle(self, x: torch.Tensor, op_type: str, name: str, ours: bool = False) -> torch.Tensor:
        time.sleep(0.0005)
        return super().settle(x, op_type, name, ours)


def test_a_slow_down_is_seen(toy: Toy) -> None:
    name = "prefill, ieee16 / eager"
    assert prefill_ratio(toy.prefill_long, toy.checkpoint, Policy(), 10) <= limit(name)
    assert prefill_ratio(toy.prefill_long, toy.checkpoint, Slow(), 10) > limit(name)


def test_the_margin_covers_what_the_baseline_s_runs_differ_by() -> None:
    found = json.loads(BASELINE.read_text())
    for name, values in found["ratios"].items():
        assert len(values) >= 3 and max(values) < MARGIN * min(values), name
