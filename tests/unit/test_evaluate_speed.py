"""Speed: what is counted equals counts by hand; what cannot be timed here is skipped; Core ML's branch runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distill import cli, mil
from distill.convert.package import save_placeholder
from distill.evaluate import bounds, speed, timing
from distill.evaluate.chips import CHIPS, LARGEST_CACHE, SOURCES, Chip
from distill.verify.runner import read_package_contract
from tests.conftest import SEQ, SEQ_LONG, Toy
from tests.unit import weight_bin

ROOT = Path(__file__).resolve().parents[2]


def matrices(package: Path) -> dict[str, int]:
    """Elements of each matrix, as the contract lists them."""
    contract = read_package_contract(mil.load(package))
    return {name: weight.shape[0] * weight.shape[1] for name, weight in contract.weights.items()}


def test_a_decode_step_costs_what_the_shapes_say(toy: Toy) -> None:
    (found,) = bounds.costs(mil.load(toy.decode)).values()
    config = read_package_contract(mil.load(toy.decode)).model_config
    size, layers = matrices(toy.decode), config.num_hidden_layers
    products = sum(count for name, count in size.items() if name != "embed.weight")
    attention = 2 * layers * config.num_attention_heads * config.head_dim * SEQ_LONG
    assert found.operations == 2 * (products + attention)
    assert found.state == 2 * 2 * layers * config.num_key_value_heads * SEQ_LONG * config.head_dim
    assert found.tokens == 1
    rest = found.weights - 2 * sum(size.values())  # RoPE tables, norms
    assert 0 <= rest < 0.2 * found.weights
    embedding = 2 * size["embed.weight"]
    row = embedding // config.vocab_size
    assert 2 * products + row <= found.read < found.weights - embedding + 2 * row  # of RoPE's tables rows, too


def test_a_prefill_costs_its_tokens_times_the_matrices(toy: Toy) -> None:
    (short,), (long,) = (bounds.costs(mil.load(p)).values() for p in (toy.prefill, toy.prefill_long))
    config = read_package_contract(mil.load(toy.prefill)).model_config
    products = sum(count for name, count in matrices(toy.prefill).items() if name != "embed.weight")
    for found, seq in ((short, SEQ), (long, SEQ_LONG)):
        attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq * seq
        assert found.operations == 2 * (seq * products + attention) and found.tokens == seq


@pytest.mark.parametrize("package", ["prefill", "decode"])
def test_the_weights_are_the_bytes_of_weight_bin(toy: Toy, package: str) -> None:
    """But for the file's headers and gaps, of 64 bytes each."""
    program = mil.load(getattr(toy, package))
    (found,) = bounds.costs(program).values()
    constants = {v.key for f in program.functions.values() for v in f.constants.values() if v.is_blob}
    size = sum(file.stat().st_size for file in program.weight_files)
    assert 0 <= size - found.weights <= 128 * (len(constants) + 1)


@pytest.mark.parametrize(("formats", "bits"), [("blocks=int8,head=int8", 8), ("blocks=int4/32,head=int4/32", 4.5),
                                               ("blocks=lut4,head=lut4", 4)])  # fmt: skip
def test_compressed_weights_are_counted_as_they_are_stored(tmp_path: Path, formats: str, bits: float) -> None:
    package = weight_bin.Maker(lambda: tmp_path)(formats).package
    program = mil.load(package)
    (found,) = bounds.costs(program).values()
    size, file = matrices(package), sum(f.stat().st_size for f in program.weight_files)
    inside = sum(count for name, count in size.items() if name != "embed.weight") * bits / 8
    assert 0 <= file - found.weights <= 128 * 200
    assert inside <= found.read < inside * 1.2 + 0.2 * file


def test_a_bound_is_tokens_over_the_slower_of_moving_and_computing() -> None:
    cost = bounds.Cost(tokens=10, weights=3_000_000_000, read=2_000_000_000, state=0, operations=5 * 10**12)
    assert bounds.bound(cost, Chip("X", 100.0, 10.0, ())) == ("X", 500.0, 20.0)
    assert bounds.bound(cost, Chip("X", None, None, ())) == ("X", None, None)
    small = cost._replace(read=LARGEST_CACHE)
    assert bounds.bound(small, Chip("X", 100.0, None, ())).bandwidth is None


def test_every_figure_of_a_chip_has_a_source_and_every_source_a_date() -> None:
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    for chip in CHIPS:
        assert chip.sources and all(name in SOURCES for name in chip.sources)
        assert all(value is None or value > 0 for value in (chip.bandwidth, chip.tops))
    assert {name for chip in CHIPS for name in chip.sources} | {"system cache"} == SOURCES.keys()
    assert all(s.url.startswith("https://") and s.date[:2] == "20" for s in SOURCES.values())


def test_calls_alternate_after_warm_up_and_a_slow_one_is_seen() -> None:
    calls: list[str] = []

    def session(name: str, seconds: float) -> timing.Session:
        return timing.Session(name, "main", 0.0, lambda: (calls.append(name), time.sleep(seconds)))

    slow, fast = timing.time_all([session("slow", 0.02), session("fast", 0.001)], 4)
    assert calls == ["slow"] * timing.WARM_UP + ["fast"] * timing.WARM_UP + ["slow", "fast", "fast", "slow"] * 2
    assert slow.median > 0.02 > fast.median and slow.low <= slow.median <= slow.high and slow.calls == 4


@pytest.mark.skipif(sys.platform == "darwin", reason="there Core ML is timed")
def test_off_macos_every_unit_is_skipped_with_the_reason_and_the_executor_is_named(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "speed",
        "--model",
        str(toy.prefill),
        str(toy.decode),
        "--report",
        str(tmp_path / "r.json"),
        "--rounds",
        "8",
    ]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "SKIPPED      CPU_ONLY, CPU_AND_GPU, CPU_AND_NE, ALL: Core ML runs on macOS only" in said
    assert "reference executor, not Core ML" in said and said.splitlines()[-1].startswith("speed: 6 skipped")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["counts"]["pass"] == 0 and report["counts"]["skipped"] == 6
    for result in report["packages"]:
        states = {row["unit"]: row["status"] for row in result["rows"]}
        assert states == dict.fromkeys(timing.UNITS, "skipped") | {timing.EXECUTOR: "measured"}
        assert result["peak_bytes"][timing.EXECUTOR] > 1_000_000
        measured = result["rows"][0]
        tokens = result["functions"]["main"]["cost"]["tokens"]
        assert measured["tokens_per_second"] == pytest.approx(tokens / measured["seconds"]["median"])
    assert cli.main(["speed", "--model", str(toy.prefill), *argv[4:], "--strict"]) == 3


PROXY = """
import json, sys
from pathlib import Path
from distill.mil import coreml_proxy
coreml_proxy.install()
from distill.evaluate import speed, timing
found = [speed.core_ml_rows(timing.read(Path(p)), 3) for p in sys.argv[1:]]
print(json.dumps({"rows": found, "predictions": coreml_proxy.MLModelProxy.predictions}))
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="there Core ML itself answers")
def test_the_branch_of_core_ml_runs_with_the_executor_in_core_ml_s_place(toy: Toy) -> None:
    """Its logic, not its speed: coremltools loads and predicts, distill.mil.coreml_proxy answers."""
    done = subprocess.run(
        [sys.executable, "-c", PROXY, str(toy.prefill), str(toy.decode)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["predictions"] == 2 * 4 * (timing.WARM_UP + 3)
    for rows, tokens in zip(found["rows"], (SEQ, 1), strict=True):
        assert [row["unit"] for row in rows] == list(timing.UNITS)
        for row in rows:
            assert row["status"] == "measured" and row["seconds"]["calls"] == 3 and row["load_seconds"] > 0
            assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"]["median"])


def judged(tokens_per_second: float, limit: float | None) -> dict[str, Any]:
    row = {"unit": "ALL", "status": "measured", "function": "main", "tokens_per_second": tokens_per_second}
    limits = [{"chip": "M4", "bandwidth": limit, "operations": None}]
    result = {"rows": [row], "functions": {"main": {"at_most_tokens_per_second": limits}},
              "placement": {"status": "skipped", "reason": "none"}}  # fmt: skip
    return {name: gate.status for name, gate in speed._judge(result, "M4").items()}


def test_a_speed_above_what_is_possible_fails() -> None:
    assert judged(90.0, 100.0)["within_bound"] == "pass"
    assert judged(110.0, 100.0)["within_bound"] == "fail"
    assert judged(110.0, None)["within_bound"] == "skipped"


def test_what_cannot_be_timed_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["speed"]) == 2
    assert "holds no package; run make coreml-worker first" in capsys.readouterr().err
    save_placeholder(tmp_path / "p.mlpackage", "nothing here")
    assert cli.main(["speed", "--model", "p.mlpackage"]) == 2
    assert "placeholder" in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()
