"""Weight formats: planted faults are seen, and what does not belong together is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill import checkpoint
from distill.artifacts import sha256_file
from distill.errors import CheckpointError, ConfigError, DistillError, InputError
from distill.export.deployed import parse_formats
from distill.formats import Formats
from distill.verify import contracts, probes
from tests.integration.spoil import Spoilt
from tests.unit.weight_bin import MIX, SEQ, Made, Maker, Reader, convert, export, trained


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(lambda: tmp_path_factory.mktemp("made"))


def changed(package: Path, folder: Path, weight: str, operand: str, change: Callable[[np.ndarray], Any]) -> Path:
    """A copy whose stored bytes of an operand are changed in place, with every fingerprint made to match."""
    spoilt, reader = Spoilt(package, folder), Reader(package)
    op = reader.makers[f"{weight}_weight_to_fp16"]
    kind, begin, size = reader.record(op.inputs[operand].arguments[0].value)
    raw = bytearray(spoilt.weights.read_bytes())
    array = np.frombuffer(raw[begin : begin + size], np.uint16 if kind == "fp16" else np.uint8).copy()
    change(array)
    assert raw[begin : begin + size] != array.tobytes()
    raw[begin : begin + size] = array.tobytes()
    spoilt.weights.write_bytes(raw)
    return spoilt.seal()


def one_up(values: np.ndarray) -> None:
    values[5] += 1


def shift(values: np.ndarray) -> None:
    values[:] = np.roll(values, 16)


def swap(values: np.ndarray) -> None:
    values[[2, 3]] = values[[3, 2]]


def nibbles(values: np.ndarray) -> None:
    values[:] = (values >> 4) | (values << 4)


@pytest.mark.parametrize(
    ("weight", "operand", "change"),
    [
        ("block_0_attention_q", "scale", one_up),  # the last bit of one scale
        ("embed", "scale", one_up),
        ("block_0_mlp_down", "scale", shift),
        ("block_0_mlp_gate", "data", nibbles),
        ("head_0", "indices", nibbles),
        ("head_0", "lut", swap),
        ("head_0", "lut", shift),  # every group has its neighbour's palette
    ],
)
def test_verification_sees_any_wrong_bit_of_a_stored_weight(
    make: Maker, weight: str, operand: str, change: Callable[[np.ndarray], Any], tmp_path: Path
) -> None:
    package = changed(make(MIX, False).package, tmp_path, weight, operand, change)
    gate = contracts.run(contracts.ContractsConfig(package))["gates"]["parity_exact"]
    assert gate["status"] == "fail"
    if weight == "embed":
        assert gate["reason"] == "1 rows of the embedding are not the trained ones, first 5"
    else:
        assert gate["reason"].replace(".", "_") == f"{weight}_weight: no matrix of the program has its values"


def test_verification_sees_a_weight_that_was_left_uncompressed(make: Maker, tmp_path: Path) -> None:
    """Its values are right: they are the deployed ones."""

    def promise(contract: dict[str, Any]) -> None:
        contract["weights"]["block_0.mlp.up.weight"]["format"] = "int8"

    package = Spoilt(make("embedding=lut6/8", True).package, tmp_path).contract(promise).seal()
    gate = contracts.run(contracts.ContractsConfig(package))["gates"]["parity_exact"]
    assert gate["reason"] == "block_0.mlp.up.weight: stored as fp16, the contract says int8"


def resealed(made: Made, folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """A copy of an export whose contract, or tables, are changed, with their fingerprints made to match."""
    shutil.copytree(made.export, folder)
    path = folder / f"student_prefill_T{SEQ}_contract.json"
    data, tables = json.loads(path.read_text()), load_file(folder / "student_tables.safetensors")
    change(data, tables)
    save_file(tables, folder / "student_tables.safetensors")
    data["tables"]["sha256"] = sha256_file(folder / "student_tables.safetensors")
    path.write_text(json.dumps(data))
    return folder


def wrong_table(data: dict[str, Any], tables: dict[str, torch.Tensor]) -> None:
    tables["block_0.mlp.up.weight"] *= 1.01


def wrong_weight(data: dict[str, Any], tables: dict[str, torch.Tensor]) -> None:
    data["weights"]["block_0.mlp.up.weight"]["sha256"] = "0" * 64


def wrong_names(data: dict[str, Any], tables: dict[str, torch.Tensor]) -> None:
    del tables["block_0.mlp.up.weight"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (wrong_table, r"block_0.mlp.up.weight: is not a weight in int4/32 with the scales"),
        (wrong_weight, r"conversion lost weights to compress: block_0.mlp.up.weight"),
        (wrong_names, r"student_tables.safetensors: tables of other weights"),
    ],
)
def test_conversion_never_guesses(make: Maker, change: Callable[[Any, Any], None], words: str, tmp_path: Path) -> None:
    folder = resealed(make(MIX, False), tmp_path / "e", change)
    with pytest.raises(DistillError, match=words):
        convert(folder, tmp_path / "p.mlpackage")
    assert not (tmp_path / "p.mlpackage").exists()


def test_altered_tables_and_older_systems_are_refused(make: Maker, tmp_path: Path) -> None:
    folder = resealed(make(MIX, False), tmp_path / "e", lambda data, tables: None)
    with pytest.raises(InputError, match=r"--target iOS17: weights in int4/32, int8, lut4/16 need iOS18"):
        convert(folder, tmp_path / "p.mlpackage", target="iOS17")
    (folder / "student_tables.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"student_tables.safetensors: missing, or does not match"):
        convert(folder, tmp_path / "p.mlpackage")


def test_other_formats_than_a_student_was_trained_in_are_refused(tmp_path: Path) -> None:
    saved, _ = trained(tmp_path, Formats(blocks="int8"))
    with pytest.raises(
        InputError, match=r"formats blocks=int4,embedding=fp16: the checkpoint was trained in blocks=int8"
    ):
        export(saved, tmp_path / "e", formats=Formats(blocks="int4"))
    export(saved, tmp_path / "e", formats=Formats(blocks="int8"))


@pytest.mark.parametrize("text", ["int8", "blocks=int8,blocks=int4", "blocks=int3", "layers=int8", "blocks"])
def test_a_malformed_list_of_formats_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=f"formats '{text}'"):
        parse_formats(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("formats"), "formats: "),
        (lambda d: d["formats"].update(blocks="int3"), "Core ML stores int4 or int8"),
        (lambda d: d["formats"].update(blocks="int8/7"), "leave a rest"),
        (lambda d: d["tables"].popitem(), "scales and palettes of another model"),
        (lambda d: d["tables"].update({"model.norm.weight": torch.zeros(3).half()}), r"norm.weight needs fp16 \[0\]"),
        (lambda d: d["tables"].update({"lm_head.weight": torch.zeros(3)}), "lm_head.weight needs fp16"),
        (lambda d: d["tables"].update({"lm_head.weight": "x"}), "lm_head.weight needs fp16"),
        (lambda d: d["tables"]["lm_head.weight"].fill_(math.nan), "not finite"),
        (lambda d: d.update(tables=[]), "tables is of type list"),
    ],
)
def test_a_checkpoint_s_tables_are_those_of_its_weights(
    change: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path
) -> None:
    saved, _ = trained(tmp_path, parse_formats(MIX))
    data = checkpoint.read(saved)
    change(data)
    checkpoint.write(saved, data)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(saved)


def test_probes_compare_with_the_deployed_weights(make: Maker) -> None:
    made = make(MIX)
    found = probes.run(made.package, made.export.parent / "c.pt")
    assert {gate.status for gate in found.gates.values()} == {"pass"}
