"""Contracts, sidecars, interfaces and program files that are wrong: the gate that looks at them fails, and nothing
crashes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill import cli, mil
from distill.convert import coreml
from distill.convert.package import SPEC_FILE
from distill.export import toy as made_toy
from distill.verify import native, parity
from distill.verify.contracts import GATES
from distill.verify.runner import PackageRunner
from tests.conftest import Toy
from tests.integration.conftest import Verify
from tests.integration.spoil import Spoilt


def _set(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(changes)


def _validation(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["shape_validation"]["64"].update(changes)


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
    "an output of another rank": (_spec("outputs", shape=[1, 64]), "package_loads"),
    "no shape": (_set(enumerated_T=[]), "package_loads"),
    "a shape of nothing": (_set(enumerated_T=[0]), "package_loads"),
    "an input beyond all memory": (_spec("inputs", shape=[1, 10**12]), "interface"),
    "an output that is not there": (lambda data: data["outputs"].append(data["outputs"][0] | {"name": "b"}),
                                    "interface"),
    "another target": (lambda data: data["made_by"]["config"].update(target="iOS16"), "interface"),
    "the contract of an export": (_set(schema="distill-export/1"), "contract"),
    "a shape that failed its validation": (_validation(status="fail", reason="too far"), "contract"),
    "a validation that passed beyond its tolerance": (_validation(max_abs_err=1e9), "contract"),
    "a shape that was not validated": (_set(shape_validation={}), "contract"),
    "more positions than the model has": (lambda data: data["model_config"].update(max_position_embeddings=32),
                                          "contract"),
    "no sha256 of the program": (_set(program_sha256=None), "program_unaltered"),
    "another program": (_set(program_sha256="0" * 64), "program_unaltered"),
    "another weight file": (lambda data: data["file"].update(name="other.bin"), "weights_unaltered"),
    "a longer weight file": (lambda data: data["file"].update(bytes=1), "weights_unaltered"),
    "no weight file": (_set(file=None), "weights_unaltered"),
    "another chat template": (_set(chat_template_sha256="0" * 64), "sidecar_unaltered"),
    "a longer goldens file": (lambda data: data["sidecar"]["goldens"].update(bytes=1), "sidecar_unaltered"),
    "no tokenizer": (lambda data: data["sidecar"].pop("tokenizer"), "sidecar_unaltered"),
    "no chat template": (lambda data: data["sidecar"].pop("chat_template"), "sidecar_unaltered"),
    "no evaluation": (lambda data: data["sidecar"].pop("evaluation"), "sidecar_unaltered"),
    "more prompts than there are": (_set(evaluation_items=40), "greedy_decode"),
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
    # what contradicts the model as well fails there first
    assert verdict.code == 1 and gate in verdict.failed()[:2] and set(verdict.failed()[:1]) <= {"contract", gate}


@pytest.mark.parametrize("fault", ["no shape", "name of the output", "an input beyond all memory", "name of the input"])
def test_a_package_with_a_wrong_contract_is_refused_in_one_line_where_it_is_asked(
    quick: dict[str, Path], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = Spoilt(quick["prefill"], tmp_path).contract(WRONG_CONTRACTS[fault][0]).save()
    assert cli.main(["ask", str(package), "Will it rain?"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and str(package) in told.err


def _wrong_state(axis: int) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["states"][0]["shape"][axis] *= 2

    return change


@pytest.mark.parametrize("change", [
    *map(_wrong_state, range(4)),
    lambda data: data["model_config"].update(num_key_value_heads=2),
    lambda data: data["model_config"].update(num_hidden_layers=4),
    lambda data: data["states"].append(data["states"][0]),
])  # fmt: skip
def test_a_state_that_is_not_the_models_fails(
    quick: dict[str, Path], change: Callable[[dict[str, Any]], None], tmp_path: Path, verify: Verify
) -> None:
    verdict = verify(Spoilt(quick["decode"], tmp_path).contract(change).save())
    assert verdict.code == 1 and verdict.failed()[0] == "contract" and "state" in verdict.reason("contract")


# --- the program -----------------------------------------------------------------------------------------------------


def _weights_elsewhere(spoilt: Spoilt) -> None:
    """weight.bin stays what it was, and no constant comes from it."""
    shutil.copy(spoilt.weights, spoilt.weights.with_name("other.bin"))
    for op in spoilt.operations:
        if op.type == "const" and op.attributes["val"].WhichOneof("value") == "blobFileValue":
            op.attributes["val"].blobFileValue.fileName = "@model_path/weights/other.bin"


def _second_function(spoilt: Spoilt) -> None:
    spoilt.model.mlProgram.functions["other"].CopyFrom(spoilt.function)


def _flexible_input(spoilt: Spoilt) -> None:
    allowed = spoilt.model.description.input[0].type.multiArrayType.enumeratedShapes
    for length in (64, 128):
        allowed.shapes.add().shape.extend([1, length])


def _range_input(spoilt: Spoilt) -> None:
    ranges = spoilt.model.description.input[0].type.multiArrayType.shapeRange.sizeRanges
    for upper in (1, -1):
        ranges.add(lowerBound=1, upperBound=upper)


def _optional_input(spoilt: Spoilt) -> None:
    spoilt.model.description.input[0].type.isOptional = True


def _described_type(spoilt: Spoilt) -> None:
    """The description and the contract agree, and the program says something else."""
    spoilt.model.description.output[0].type.multiArrayType.dataType = 65568
    spoilt.contract(_spec("outputs", dtype="float32"))


def _future_specification(spoilt: Spoilt) -> None:
    spoilt.model.specificationVersion = 99


def _undescribed_output(spoilt: Spoilt) -> None:
    block = spoilt.function.block_specializations[spoilt.function.opset]
    block.outputs.append(next(op.outputs[0].name for op in spoilt.operations if op.type == "conv"))


PROGRAM_FAULTS = {
    _weights_elsewhere: "weights_unaltered",
    _second_function: "interface",
    _flexible_input: "interface",
    _range_input: "interface",
    _optional_input: "interface",
    _described_type: "interface",
    _future_specification: "interface",
    _undescribed_output: "interface",
}


@pytest.mark.parametrize("fault", PROGRAM_FAULTS)
def test_a_program_that_offers_more_than_its_contract_fails_though_every_sha256_matches(
    quick: dict[str, Path], fault: Callable[[Spoilt], None], tmp_path: Path, verify: Verify
) -> None:
    spoilt = Spoilt(quick["prefill"], tmp_path)
    fault(spoilt)
    verdict = verify(spoilt.seal())
    assert verdict["program_unaltered"]["status"] == "pass"
    assert verdict.code == 1 and verdict.failed()[0] == PROGRAM_FAULTS[fault]


def _updatable(spoilt: Spoilt) -> None:
    spoilt.model.isUpdatable = True


def _other_author(spoilt: Spoilt) -> None:
    spoilt.model.description.metadata.author = "somebody else"


@pytest.mark.parametrize("fault", [*PROGRAM_FAULTS, _updatable, _other_author])
def test_a_program_that_is_not_the_one_converted_fails(
    quick: dict[str, Path], fault: Callable[[Spoilt], None], tmp_path: Path, verify: Verify
) -> None:
    spoilt = Spoilt(quick["prefill"], tmp_path)
    fault(spoilt)
    verdict = verify(spoilt.save())
    assert verdict.code == 1 and verdict.failed()[0] == "program_unaltered"


def test_a_manifest_that_names_another_program_fails(quick: dict[str, Path], tmp_path: Path, verify: Verify) -> None:
    spoilt = Spoilt(quick["prefill"], tmp_path)
    shutil.copy(spoilt.path / SPEC_FILE, (spoilt.path / SPEC_FILE).with_name("other.mlmodel"))
    manifest = spoilt.path / "Manifest.json"
    manifest.write_text(manifest.read_text().replace("model.mlmodel", "other.mlmodel"))
    verdict = verify(spoilt.path)
    assert verdict.code == 1 and verdict.failed() == ["program_unaltered"]
    assert "other.mlmodel" in verdict.reason("program_unaltered")


# --- a block, and Core ML's own door ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One transformer block: no tokens, no text."""
    folder = tmp_path_factory.mktemp("block")
    made_toy.make_block(folder / "block.pt", 0)
    coreml.run(coreml.ConvertConfig(folder / "block.pt", folder / "block.mlpackage"))
    return folder / "block.mlpackage"


def test_a_block_needs_no_evaluation_and_is_checked_all_the_same(block: Path, tmp_path: Path, verify: Verify) -> None:
    assert verify(block).code == 0
    assert verify(Spoilt(block, tmp_path).contract(_spec("outputs", shape=[1, 32, 1, 64])).save()).failed()[:2] == [
        "contract",
        "interface",
    ]


class _StandIn:
    """Takes and gives what coremltools' MLModel does, run by the executor: Core ML itself is on macOS only."""

    def __init__(self, path: str) -> None:
        self.program = mil.load(path)

    def make_state(self) -> Any:
        return self.program.make_state()

    def predict(self, inputs: dict[str, np.ndarray], state: Any = None) -> dict[str, np.ndarray]:
        return self.program.predict(inputs, state=state)


@pytest.mark.parametrize("mode", ["prefill", "decode", "block"])
def test_the_core_ml_gate_feeds_every_mode(
    quick: dict[str, Path], block: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = SimpleNamespace(models=SimpleNamespace(MLModel=_StandIn))
    monkeypatch.setattr(native, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(native, "import_coremltools", lambda: tools)
    package = quick.get(mode, block)
    runner = PackageRunner(package)
    golden = parity.load_goldens(runner)
    assert native.parity_gate(package, runner.contract, golden).status == "pass"
    golden["logits"] = golden["logits"] + 1
    assert native.parity_gate(package, runner.contract, golden).status == "fail"


# --- the sidecar -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 1])
def test_fewer_evaluation_prompts_than_the_export_had_fail(toy: Toy, left: int, tmp_path: Path, verify: Verify) -> None:
    def cut(rows: list[dict[str, Any]]) -> None:
        del rows[left:]

    verdict = verify(Spoilt(toy.prefill, tmp_path).evaluation(cut).seal())
    assert verdict.code == 1 and verdict.failed()[0] == "greedy_decode"


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


def test_another_chat_template_fails_though_its_file_matches_its_own_sha256(
    quick: dict[str, Path], tmp_path: Path, verify: Verify
) -> None:
    spoilt = Spoilt(quick["prefill"], tmp_path)
    path = spoilt.sidecar / "chat_template.jinja"
    path.write_text(path.read_text().replace("user", "human") + " ")
    verdict = verify(spoilt.seal())
    assert verdict.code == 1 and verdict.failed() == ["sidecar_unaltered"]
    assert "another chat template" in verdict.reason("sidecar_unaltered")


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
