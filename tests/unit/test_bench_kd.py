"""The benchmark of the divergence operator: it runs, and each bar that is missed is named."""

from __future__ import annotations

import pytest

from tests import bench_kd

GOOD = {"seconds": 1.0, "bytes": 100.0, "error": 1e-6}


def test_it_runs_and_prints_a_line_a_contender(capfd: pytest.CaptureFixture[str]) -> None:
    bench_kd.main(["--kinds", "skew_kl", "cross_entropy", "--rounds", "1", "--tokens", "160", "--width", "16",
                   "--vocabulary", "3000"])  # fmt: skip
    lines = [line.split()[:3] for line in capfd.readouterr().out.splitlines()[2:7]]
    assert lines == [["skew_kl", "dense", "naive"], ["skew_kl", "dense", "ours"],
                     *(["cross_entropy", "labels", who] for who in ("naive", "ours", "torch"))]  # fmt: skip


@pytest.mark.parametrize(
    ("who", "worse", "named"),
    [
        ("ours", {"seconds": 1.06}, "of the naive time"),
        ("ours", {"bytes": 26.0}, "of the naive memory"),
        ("ours", {"error": 1.6e-6}, "gradient error"),
        ("trl", {"seconds": 0.4}, "trl needs less time"),
        ("trl", {"bytes": 19.0}, "trl needs less memory"),
    ],
)
def test_every_bar_can_be_missed(who: str, worse: dict[str, float], named: str) -> None:
    ours = {"seconds": 0.5, "bytes": 20.0, "error": 1e-6}
    found = {"naive": dict(GOOD), "ours": ours, "trl": {"seconds": 2.0, "bytes": 200.0, "error": 1e-6}}
    assert bench_kd.report(bench_kd.Cell("jsd", "dense"), found) == []
    found[who] |= worse
    (missed,) = bench_kd.report(bench_kd.Cell("jsd", "dense"), found)
    assert missed.startswith("jsd dense") and named in missed
