"""Packages: the same bytes for the same input, a contract that survives its journey, other families than the toy's."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from distill import checkpoint, mil
from distill.artifacts import sha256_file
from distill.contract import Contract, parse_contract, read_contract
from distill.convert import coreml, worker
from distill.convert.package import CONTRACT_KEY, sidecar_folder
from distill.errors import InputError, PackageError
from distill.export import pytorch
from distill.model import ModelConfig, RopeScaling, Student
from distill.tokenizer import toy_tokenizer
from distill.verify import contracts
from distill.verify.runner import PackageRunner
from tests.conftest import Toy
from tests.integration.spoil import Spoilt

SMALL: dict[str, Any] = dict(vocab_size=1088, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                             max_position_embeddings=64)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
    "qwen3": {"qk_norm": True, "rms_norm_eps": 1e-6},
    "windowed": {"sliding_window": 7, "output_bias": True, "mlp_bias": True,
                 "rope_scaling": RopeScaling("llama3", 8.0, original_max_position_embeddings=16)},
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES, ids=list(FAMILIES))
def packages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.mlpackage (T=32) and decode.mlpackage of a small random student of the family."""
    folder = tmp_path_factory.mktemp(request.param)
    student = Student(ModelConfig(**SMALL | FAMILIES[request.param])).init_weights(0)
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    saved = checkpoint.save(folder / "c.pt", student, toy_tokenizer(), step=0, loss=math.nan, stage="random")
    pytorch.run(pytorch.ExportConfig(saved, folder / "e", "both", 32, (32,)))
    worker.run(folder / "e", folder)
    return folder


@pytest.mark.parametrize("name", ["model", "decode"])
def test_a_package_of_every_family_passes_verification(packages: Path, name: str) -> None:
    report = contracts.run(contracts.ContractsConfig(packages / f"{name}.mlpackage"))
    assert {n: g["reason"] for n, g in report["gates"].items() if g["status"] not in ("pass", "skipped")} == {}
    assert report["gates"]["parity_exact"]["observed"] < contracts.parity.EXACT_TOLERANCE / 5
    assert report["gates"]["parity_exact"]["status"] == report["gates"]["parity_fp16"]["status"] == "pass"


@pytest.mark.parametrize("name", ["model", "decode"])
@pytest.mark.parametrize("matrix", ["attention_q", "attention_k", "attention_v", "mlp_down"])
def test_one_percent_on_a_matrix_is_seen_where_a_norm_follows_it_too(
    packages: Path, name: str, matrix: str, tmp_path: Path
) -> None:
    """Qwen3's QK-norm undoes the scale of q and k: what is seen there is the rounding of the scaled weights."""
    spoilt = Spoilt(packages / f"{name}.mlpackage", tmp_path)
    package = spoilt.edit(f"block_1_{matrix}_weight_to_fp16", lambda values: values * 1.01).seal()
    assert contracts.run(contracts.ContractsConfig(package))["gates"]["parity_exact"]["status"] == "fail"


def test_two_conversions_give_the_same_bytes(toy: Toy, tmp_path: Path) -> None:
    """Every file of the package and of its sidecar, for a prefill and for a stateful program."""
    for program in ("student_prefill_T64", "student_decode"):
        found = []
        for folder in ("a", "b"):
            package = tmp_path / folder / f"{program}.mlpackage"
            coreml.run(coreml.ConvertConfig(toy.exported / f"{program}.pt", package))
            files = [p for p in (tmp_path / folder).rglob("*") if p.is_file() and program in str(p)]
            found.append({str(p.relative_to(tmp_path / folder)): sha256_file(p) for p in files})
        assert found[0] == found[1] and len(found[0]) == 8


def test_converting_again_replaces_a_package_as_a_whole(toy: Toy, tmp_path: Path) -> None:
    package = tmp_path / "p.mlpackage"
    shutil.copytree(toy.prefill, package)
    shutil.copytree(sidecar_folder(toy.prefill), sidecar_folder(package))
    for folder in (package, sidecar_folder(package)):
        (folder / "left-over").write_text("from an earlier run")
    coreml.run(coreml.ConvertConfig(toy.exported / "student_prefill_T64.pt", package))
    assert not list(tmp_path.rglob("left-over"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.contract", "p.mlpackage"]


def test_the_package_carries_its_contract_and_the_fingerprints_of_its_files(toy: Toy) -> None:
    runner = PackageRunner(toy.prefill)
    beside = read_contract(sidecar_folder(toy.prefill) / "contract.json")
    assert beside == runner.contract == parse_contract(json.loads(runner.program.metadata[CONTRACT_KEY]), "metadata")
    assert (beside.schema, beside.name, beside.enumerated_T) == ("distill-package/1", "prefill", [64])
    for role, ref in beside.sidecar.items():
        assert sha256_file(runner.sidecar(role)) == ref.sha256
    exported = read_contract(toy.exported / "student_prefill_T64_contract.json")
    assert beside.weights_sha256 == exported.weights_sha256 and exported.enumerated_T == [64, 128]


def test_the_default_package_needs_ios_18_and_an_older_one_is_made_on_request(toy: Toy, tmp_path: Path) -> None:
    assert mil.load(toy.prefill).specification_version == 9
    package = tmp_path / "old.mlpackage"
    coreml.run(coreml.ConvertConfig(toy.exported / "student_prefill_T64.pt", package, target="iOS16"))
    assert mil.load(package).specification_version == 7
    assert contracts.run(contracts.ContractsConfig(package))["counts"]["fail"] == 0


def test_all_programs_of_an_export_are_converted_the_primary_shape_as_the_model(toy: Toy, tmp_path: Path) -> None:
    packages = worker.run(toy.exported, tmp_path).packages
    assert [p.name for p in packages] == ["model.mlpackage", "decode.mlpackage", "prefill_T128.mlpackage"]
    assert [PackageRunner(p).contract.sequence() for p in packages] == [64, 1, 128]


# --- contracts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["student_prefill_T64", "student_prefill_T128", "student_decode"])
def test_a_contract_survives_json(toy: Toy, program: str) -> None:
    contract = read_contract(toy.exported / f"{program}_contract.json")
    again = parse_contract(json.loads(json.dumps(msgspec.to_builtins(contract))), "memory")
    assert again == contract and isinstance(again, Contract)


def test_the_contract_answers_what_the_documents_ask_of_it(toy: Toy) -> None:
    """The snippet of spec/local-development-workflow.md."""
    contract = json.loads((toy.exported / "student_prefill_T64_contract.json").read_text())
    assert contract.get("enumerated_T", []) == [64, 128]
    assert {t: row["status"] for t, row in contract.get("shape_validation", {}).items()} == {
        "64": "pass",
        "128": "pass",
    }


@pytest.mark.parametrize(("change", "named"), [
    ({"mode": "both"}, "mode"),
    ({"inputs": [{"name": "x"}]}, "inputs"),
    ({"surplus": 1}, "surplus"),
    ({"model_config": {"hidden_size": 3}}, "model_config"),
    ({"outputs": []}, "gives an output"),
])  # fmt: skip
def test_a_malformed_contract_names_the_file_and_the_field(
    toy: Toy, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    data = json.loads((toy.exported / "student_prefill_T64_contract.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(data | change))
    with pytest.raises(InputError, match=named) as refused:
        read_contract(tmp_path / "c.json")
    assert str(tmp_path / "c.json") in str(refused.value)


def test_a_package_without_a_contract_is_refused_by_name(toy: Toy, tmp_path: Path) -> None:
    spoilt = Spoilt(toy.prefill, tmp_path)
    del spoilt.model.description.metadata.userDefined[CONTRACT_KEY]
    with pytest.raises(PackageError, match="carries no contract"):
        PackageRunner(spoilt.save())
