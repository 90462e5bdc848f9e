"""Packages in weight formats hold, bit for bit, the weights that training computed with."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import checkpoint, mil
from distill.artifacts import sha256_file
from distill.contract import read_contract
from distill.convert.package import SPEC_FILE, WEIGHT_FILE
from distill.errors import ConfigError
from distill.export.deployed import matrices, parse_formats
from distill.export.twin import HEAD_SLICE, PrefillTwin
from distill.formats import Format, Formats, compress, decompress, encode, stored_bytes
from distill.tokenizer import toy_tokenizer
from distill.verify import contracts
from tests.unit.weight_bin import MIX, SEQ, Maker, Reader, convert, export, student, trained

FORMATS = ["int8", "int4", "int4/32", "lut1", "lut2", "lut3", "lut4", "lut6", "lut8", "lut4/16"]
CASES = [(f"blocks={name},embedding={name}", tied) for name, tied in zip(FORMATS, itertools.cycle([False, True]))] + [
    (MIX, False),
    ("blocks=lut3,embedding=int4", True),
    ("embedding=lut6/8", True),
    ("head=int4/8", False),
]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(lambda: tmp_path_factory.mktemp("made"))


def same(a: np.ndarray, b: torch.Tensor) -> bool:
    """Equal bit for bit."""
    assert a.dtype == np.float16 and b.dtype == torch.float16
    return a.tobytes() == b.contiguous().numpy().tobytes()


OPERATORS = {"fp": "const", "int": "constexpr_blockwise_shift_scale", "lut": "constexpr_lut_to_dense"}


@pytest.mark.parametrize(("text", "tied"), CASES)
def test_weight_bin_holds_the_weights_that_training_computed_with(make: Maker, text: str, tied: bool) -> None:
    made, formats = make(text, tied), parse_formats(text)
    loaded = checkpoint.load(made.export.parent / "c.pt")
    found = Reader(made.package).matrices()
    expected = list(matrices(loaded.student))
    assert {m.name.replace(".", "_") for m in expected} == set(found)
    for m in expected:
        kind, values = found[m.name.replace(".", "_")]
        form = formats.of(m.parameter)
        weight = dict(loaded.student.named_parameters())[m.parameter].detach()
        stored = encode(weight, form, loaded.tables[m.parameter])
        assert kind == OPERATORS[form.kind] and list(values.shape) == m.shape
        assert same(values, made.applied[m.parameter]), m.name
        assert same(values, decompress(stored)), m.name


@pytest.mark.parametrize(("text", "tied"), CASES)
def test_the_file_is_as_long_as_its_formats_say(make: Maker, text: str, tied: bool) -> None:
    made = make(text, tied)
    reader, contract = Reader(made.package), read_contract(made.export / f"student_prefill_T{SEQ}_contract.json")
    rest = 0
    names = {f"{name.replace('.', '_')}_to_fp16" for name in contract.weights}
    for op in reader.operations:
        if op.type == "const" and not names & {out.name for out in op.outputs}:
            value = op.attributes["val"]
            if value.WhichOneof("value") == "blobFileValue":
                rest += 64 + -(-reader.record(value)[2] // 64) * 64
    compressed = sum(stored_bytes(Format.parse(w.format), tuple(w.shape[:2])) for w in contract.weights.values())
    assert -(-len(reader.raw) // 64) * 64 == 64 + rest + compressed


@pytest.mark.parametrize(("text", "tied"), [(MIX, False), *CASES[2:9:3]])
def test_the_executor_gives_the_logits_of_the_same_weights_in_fp16(
    make: Maker, text: str, tied: bool, tmp_path: Path
) -> None:
    """The same program, converted with its weights as they are."""
    made = make(text, tied)
    path = made.export / f"student_prefill_T{SEQ}_contract.json"
    data = json.loads(path.read_text())
    for weight in data["weights"].values():
        weight["format"] = "fp16"
    plain = path.with_name("plain_contract.json")
    plain.write_text(json.dumps(data | {"tables": None}))
    whole = convert(made.export, tmp_path / "fp16.mlpackage", contract=plain)
    assert {kind for kind, _ in Reader(whole).matrices().values()} == {"const"}
    ids = {"input_ids": np.arange(SEQ, dtype=np.int32)[None] * 67 % 1088}
    for policy in ("ieee16", "fp32"):
        a, b = (mil.load(p).predict(ids, policy=policy)["logits"] for p in (made.package, whole))
        assert np.ptp(a) > 1 and a.tobytes() == b.tobytes()
    assert (whole / WEIGHT_FILE).stat().st_size > 1.5 * (made.package / WEIGHT_FILE).stat().st_size


def test_a_compressed_package_passes_verification_and_so_does_its_decoder(make: Maker, tmp_path: Path) -> None:
    made = make(MIX, False)
    decoder = convert(made.export, tmp_path / "decode.mlpackage", "student_decode")
    for package in (made.package, decoder):
        report = contracts.run(contracts.ContractsConfig(package))
        assert {n: g["reason"] for n, g in report["gates"].items() if g["status"] not in ("pass", "skipped")} == {}
        assert report["gates"]["parity_exact"]["observed"] < contracts.parity.EXACT_TOLERANCE / 5
    runner = contracts.PackageRunner(made.package)
    assert runner.contract.formats == parse_formats(MIX) and runner.contract.tables is None
    assert runner.contract.weights["block_0.mlp.up.weight"].format == "int4/32"
    shared = Reader(made.package).matrices(), Reader(decoder).matrices()
    assert all(shared[0][n][1].tobytes() == shared[1][n][1].tobytes() for n in shared[0])


def test_two_conversions_give_the_same_bytes(make: Maker, tmp_path: Path) -> None:
    made = make(MIX, False)
    again = convert(made.export, tmp_path / "p.mlpackage")
    for file in (WEIGHT_FILE, SPEC_FILE, "Manifest.json"):
        assert sha256_file(made.package / file) == sha256_file(again / file)


def test_a_student_that_was_not_trained_for_it_gets_the_best_scales_and_palettes(tmp_path: Path) -> None:
    model = student()
    saved = checkpoint.save(tmp_path / "c.pt", model, toy_tokenizer(), step=0, loss=math.nan, stage="random")
    package = convert(export(saved, tmp_path / "e", formats=parse_formats(MIX)), tmp_path / "p.mlpackage")
    found, weights = Reader(package).matrices(), dict(model.named_parameters())
    for m in matrices(model):
        stored = compress(weights[m.parameter].detach(), parse_formats(MIX).of(m.parameter))
        assert same(found[m.name.replace(".", "_")][1], decompress(stored)), m.name


def test_a_head_in_slices_is_stored_slice_by_slice(tmp_path: Path) -> None:
    """Each with its own rows of the scales, or its own palettes."""
    for index, name in enumerate(("int4/16", "lut2/16")):
        folder = tmp_path / str(index)
        changes = dict(vocab_size=HEAD_SLICE + 1040, hidden_size=32)
        saved, applied = trained(folder, Formats(head=name), **changes)
        found = Reader(convert(export(saved, folder / "e"), folder / "p.mlpackage")).matrices()
        parts = [found[f"head_{i}_weight"] for i in range(2)]
        assert all(kind.startswith("constexpr_") for kind, _ in parts)
        assert same(np.concatenate([values for _, values in parts]), applied["lm_head.weight"])
    with pytest.raises(ConfigError, match=r"head_0.weight: weight format lut2/48: a slice of 16384 channels cuts"):
        saved, _ = trained(tmp_path, Formats(head="lut2/48"), vocab_size=48 * 342, hidden_size=32)
        export(saved, tmp_path / "e")


def test_the_twin_s_matrices_are_the_student_s() -> None:
    """Nothing is folded into one: then it would not be the one that was trained."""
    model = student(tied=True, num_hidden_layers=2, qk_norm=True)
    twin, weights = dict(PrefillTwin(model, SEQ).named_parameters()), dict(model.named_parameters())
    listed = {m.name: weights[m.parameter][m.first : m.last].reshape(m.shape) for m in matrices(model)}
    assert set(listed) == {name for name, p in twin.items() if sum(n > 1 for n in p.shape) > 1}
    assert all(torch.equal(twin[name], value) for name, value in listed.items())
