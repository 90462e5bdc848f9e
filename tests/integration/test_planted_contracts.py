"""Contracts, sidecars and program files that are wrong: the gate that looks at them fails, and nothing crashes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.convert.package import SPEC_FILE
from distill.verify.contracts import GATES
from tests.integration.conftest import Verify
from tests.integration.spoil import Spoilt


def _set(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(changes)


def _spec(role: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data[role][0].update(changes)


WRONG_CONTRACTS = {
    "shape of the input": (_spec("inputs", shape=[1, 128]), "interface"),
    "name of the input": (_spec("inputs", name="tokens"), "interface"),
    "type of the input": (_spec("inputs", dtype="float16"), "interface"),
    "shape of the output": (_spec("outputs", shape=[1, 64, 1000]), "interface"),
    "name of the output": (_spec("outputs", name="scores"), "interface"),
    "type of the output": (_spec("outputs", dtype="float32"), "interface"),
    "a state that is not there": (_set(states=[{"name": "kv", "shape": [4, 1], "dtype": "float16"}]), "interface"),
    "a shape that the package lacks": (_set(enumerated_T=[64, 128]), "shapes_run"),
    "another shape": (_set(enumerated_T=[128]), "shapes_run"),
    "no shape": (_set(enumerated_T=[]), "shapes_run"),
    "another tokenizer": (_set(tokenizer_sha256="0" * 64), "sidecar_unaltered"),
    "rows for half of the tokenizer": (lambda data: data["model_config"].update(vocab_size=512), "sidecar_unaltered"),
    "a point at another value": (lambda data: data["probes"].update(block_0=data["probes"]["block_1"]), "named_points"),
    "a point at no value": (lambda data: data["probes"].update(block_0="nothing"), "named_points"),
    "no input": (_set(inputs=[]), "package_loads"),
    "no output": (_set(outputs=[]), "package_loads"),
    "an unknown field": (_set(extra=1), "package_loads"),
    "a wrong type": (_set(enumerated_T="64"), "package_loads"),
    "no contract": (lambda data: data.clear(), "package_loads"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG_CONTRACTS)
def test_a_wrong_contract_fails(quick: dict[str, Path], fault: str, tmp_path: Path, verify: Verify) -> None:
    change, gate = WRONG_CONTRACTS[fault]
    verdict = verify(Spoilt(quick["prefill"], tmp_path).contract(change).save())
    assert verdict.code == 1 and verdict.failed()[0] == gate, verdict.failed()


@pytest.mark.parametrize("wrong", [[64, 256], [64]])
def test_a_decode_contract_of_another_context_fails(
    quick: dict[str, Path], wrong: list[int], tmp_path: Path, verify: Verify
) -> None:
    verdict = verify(Spoilt(quick["decode"], tmp_path).contract(_set(enumerated_T=wrong)).save())
    assert verdict.code == 1 and "shapes_run" in verdict.failed()


def test_a_contract_beside_the_package_that_is_not_the_one_inside_fails(
    quick: dict[str, Path], tmp_path: Path, verify: Verify
) -> None:
    spoilt = Spoilt(quick["prefill"], tmp_path).contract(_set(rope="none"), inside=False)
    verdict = verify(spoilt.path)
    assert verdict.code == 1 and verdict.failed() == ["contract"]
    (spoilt.sidecar / "contract.json").unlink()
    assert verify(spoilt.path).failed() == ["contract"]


@pytest.mark.parametrize("name", ["goldens.safetensors", "evaluation.json", "tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("how", ["altered", "missing"])
def test_an_altered_or_missing_sidecar_file_fails(
    quick: dict[str, Path], name: str, how: str, tmp_path: Path, verify: Verify
) -> None:
    spoilt = Spoilt(quick["prefill"], tmp_path)
    path = spoilt.sidecar / name
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b" ")
    verdict = verify(spoilt.path)
    assert verdict.code == 1 and "sidecar_unaltered" in verdict.failed()
    assert name in verdict.reason("sidecar_unaltered")


def test_another_tokenizer_fails_though_its_file_matches_its_own_sha256(
    quick: dict[str, Path], tmp_path: Path, verify: Verify
) -> None:
    spoilt = Spoilt(quick["prefill"], tmp_path)
    path = spoilt.sidecar / "tokenizer.json"
    data = json.loads(path.read_text())
    a, b = (next(t for t, i in data["model"]["vocab"].items() if i == n) for n in (300, 301))
    data["model"]["vocab"][a], data["model"]["vocab"][b] = 301, 300
    path.write_text(json.dumps(data))
    verdict = verify(spoilt.seal())
    assert verdict.code == 1 and "another tokenizer" in verdict.reason("sidecar_unaltered")


def test_goldens_that_cannot_be_what_they_should_fail_and_do_not_crash(
    quick: dict[str, Path], tmp_path: Path, verify: Verify
) -> None:
    from safetensors.numpy import load_file, save_file

    spoils: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
        "positions beyond the shape": lambda g: g.update(positions=g["positions"] + 1000),
        "ids of another rank": lambda g: g.update(input_ids=g["input_ids"][0]),
        "too many ids": lambda g: g.update(input_ids=np.concatenate([g["input_ids"]] * 2, 1)),
        "ids beyond the vocabulary": lambda g: g.update(input_ids=g["input_ids"] + 5000),
        "fewer logits": lambda g: g.update(logits_half=g["logits_half"][:, :3], logits=g["logits"][:, :3]),
        "nothing": lambda g: [g.pop(n) for n in list(g) if n != "logits"],
    }
    for fault, spoil in spoils.items():
        spoilt = Spoilt(quick["prefill"], tmp_path / fault.replace(" ", "_"))
        path = spoilt.sidecar / "goldens.safetensors"
        golden = load_file(path)
        spoil(golden)
        save_file(golden, path)
        verdict = verify(spoilt.seal())
        assert verdict.code == 1 and {"shapes_run", "parity_exact"} & set(verdict.failed()), fault


def test_a_package_whose_weights_are_missing_or_cut_off_does_not_load(
    quick: dict[str, Path], tmp_path: Path, verify: Verify
) -> None:
    spoilt = Spoilt(quick["prefill"], tmp_path)
    spoilt.weights.write_bytes(spoilt.weights.read_bytes()[:100_000])
    assert verify(spoilt.path).failed() == list(GATES)
    spoilt.weights.unlink()
    verdict = verify(spoilt.path)
    assert verdict.code == 1 and verdict.failed() == list(GATES)
    assert "not reached" in verdict.reason("parity_exact")


@pytest.mark.parametrize("file", [SPEC_FILE, "Manifest.json"])
def test_a_package_whose_program_is_not_one_does_not_load(
    quick: dict[str, Path], file: str, tmp_path: Path, verify: Verify
) -> None:
    spoilt = Spoilt(quick["prefill"], tmp_path)
    (spoilt.path / file).write_bytes(b"\xff not this")
    verdict = verify(spoilt.path)
    assert verdict.code == 1 and verdict.failed()[0] == "package_loads"
