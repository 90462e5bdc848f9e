"""Faults where no prompt reaches: far positions of the context, rows of the embedding that no token of a prompt reads,
and references that are made too wide to say anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.integration.conftest import Verify
from tests.integration.spoil import Spoilt


@pytest.mark.parametrize("table", ["cos_to_fp16", "sin_to_fp16"])
def test_a_far_row_of_a_rope_table_fails_the_state_gate(
    quick: dict[str, Path], tmp_path: Path, verify: Verify, table: str
) -> None:
    spoilt = Spoilt(quick["decode"], tmp_path / "spoilt")

    def far(rows: np.ndarray) -> np.ndarray:
        rows = rows.copy()
        rows[100:] *= 1.01
        return rows

    verdict = verify(spoilt.edit(table, far).seal())
    assert verdict.code == 1 and "state" in verdict.failed()


def test_a_mask_that_shows_the_next_row_fails_the_state_gate(
    quick: dict[str, Path], tmp_path: Path, verify: Verify
) -> None:
    """The next row is zero after real prompts, and random in the far steps."""
    spoilt = Spoilt(quick["decode"], tmp_path / "spoilt")
    record = spoilt.operation("steps").attributes["val"].blobFileValue.offset
    raw = bytearray(spoilt.weights.read_bytes())
    start, size = record + 64, 4 * 128  # the data of an int32 constant of 128 positions follow its record
    positions = np.frombuffer(raw, np.int32, 128, start)
    assert positions.tolist() == list(range(128))
    raw[start : start + size] = np.maximum(positions - 1, 0).tobytes()
    spoilt.weights.write_bytes(raw)
    verdict = verify(spoilt.seal())
    assert verdict.code == 1 and "state" in verdict.failed()


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("fault", ["zeroed", "swapped", "scaled"])
def test_rows_of_the_embedding_that_no_prompt_reads_are_checked(
    quick: dict[str, Path], tmp_path: Path, verify: Verify, mode: str, fault: str
) -> None:
    spoilt = Spoilt(quick[mode], tmp_path / "spoilt")

    def spoil(rows: np.ndarray) -> np.ndarray:
        rows = rows.copy()
        a, b = 1000, 1001  # bytes that occur in no prompt
        if fault == "zeroed":
            rows[a] = 0
        elif fault == "swapped":
            rows[[a, b]] = rows[[b, a]]
        else:
            rows[a] *= 1.01
        return rows

    verdict = verify(spoilt.edit("embed_weight_to_fp16", spoil).seal())
    assert verdict.code == 1 and "parity_exact" in verdict.failed()
    assert "embedding" in verdict.reason("parity_exact")


def _wide(items: list[dict[str, Any]]) -> None:
    for item in items:
        item["greedy"]["tokens"] = [3] * len(item["greedy"]["tokens"][:-1]) + item["greedy"]["tokens"][-1:]
        item["greedy"]["tolerance"] = [1e9] * len(item["greedy"]["tokens"])


def _broken_off(items: list[dict[str, Any]]) -> None:
    for item in items:
        for name, values in item["greedy"].items():
            item["greedy"][name] = values[:1]


@pytest.mark.parametrize(("change", "said"), [(_wide, "derived error"), (_broken_off, "breaks off")])
def test_a_reference_that_says_nothing_fails_greedy_decode(
    quick: dict[str, Path], tmp_path: Path, verify: Verify, change: Any, said: str
) -> None:
    spoilt = Spoilt(quick["prefill"], tmp_path / "spoilt")
    verdict = verify(spoilt.evaluation(change).seal())
    assert verdict.code == 1 and "greedy_decode" in verdict.failed()
    assert said in verdict.reason("greedy_decode")


def test_a_model_that_amplifies_rounding_too_much_is_inconclusive_never_passed(
    quick: dict[str, Path], tmp_path: Path, verify: Verify
) -> None:
    spoilt = Spoilt(quick["prefill"], tmp_path / "spoilt")
    verdict = verify(spoilt.contract(lambda data: data.update(fp16_gain=51.0)).seal())
    assert verdict["parity_fp16"]["status"] == "inconclusive" and verdict.code != 0


def test_goldens_without_their_named_points_fail(quick: dict[str, Path], tmp_path: Path, verify: Verify) -> None:
    spoilt = Spoilt(quick["prefill"], tmp_path / "spoilt")
    path = spoilt.sidecar / "goldens.safetensors"
    kept = {name: value for name, value in load_file(path).items() if not name.startswith("probe.")}
    save_file(kept, path)
    verdict = verify(spoilt.seal())
    assert verdict.code == 1 and verdict.failed() == ["named_points"]
