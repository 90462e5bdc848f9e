"""Core AI assets: built whole, run by Apple's runtime as PyTorch computes; a faulty or altered one does not pass."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("coreai_torch", reason="coreai-torch is not installed: pip install 'distill[coreai]'")

from distill import checkpoint
from distill.artifacts import sha256_file
from distill.contract import read_contract
from distill.convert import coreai
from distill.errors import InputError, PackageError
from distill.export.deployed import parse_formats
from distill.export.twin import ChannelRMSNorm
from distill.tokenizer import toy_tokenizer
from distill.verify import coreai as verify
from tests.unit.weight_bin import MIX, student

CONTEXT, CHUNK = 32, 12


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("c") / "c.pt"
    return checkpoint.save(path, student(), toy_tokenizer(), step=1, loss=math.nan, stage="worker")


def build(saved: Path, out: Path, **changes: Any) -> Path:
    coreai.run(coreai.CoreAIConfig(saved, out, (CHUNK,), CONTEXT, **changes))
    return out


@pytest.fixture(scope="module")
def exact(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(saved, tmp_path_factory.mktemp("a") / "x.aimodel", precision="fp32")


def statuses(path: Path) -> dict[str, str]:
    return {name: gate.status for name, gate in verify.run(path).items()}


def copy(asset: Path, folder: Path) -> Path:
    shutil.copytree(asset, folder / asset.name)
    shutil.copytree(coreai.contract_folder(asset), coreai.contract_folder(folder / asset.name))
    return folder / asset.name


REST = [("int8", "lut6"), ("lut2", "lut8"), ("lut4/16", "lut1"), ("int4", "int8")]
GATES = ["interface", "through_decode", f"through_prefill_{CHUNK}", "as_used", "greedy", "far_calls"]


def test_an_fp32_asset_is_the_student_to_fp32_rounding(exact: Path) -> None:
    found = verify.run(exact)
    assert {name: gate.status for name, gate in found.items()} == dict.fromkeys(GATES, "pass")
    assert found["through_decode"].threshold == 2e-5


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "formats", [None, MIX, *(pytest.param(f"blocks={a},embedding={b}", marks=SLOW) for a, b in REST)]
)
def test_an_fp16_asset_is_the_student_within_the_derived_error(
    saved: Path, formats: str | None, tmp_path: Path
) -> None:
    asset = build(saved, tmp_path / "x.aimodel", formats=formats and parse_formats(formats))
    assert statuses(asset) == dict.fromkeys(GATES, "pass")


def test_functions_share_their_weights(saved: Path, exact: Path, tmp_path: Path) -> None:
    coreai.run(coreai.CoreAIConfig(saved, tmp_path / "x.aimodel", (4, 8, CHUNK), CONTEXT, "fp32"))
    weights = sum(p.numel() * 4 for p in student().parameters())
    sizes = [(path / coreai.PROGRAM).stat().st_size for path in (exact, tmp_path / "x.aimodel")]
    assert sizes[1] - sizes[0] < 0.1 * weights


def test_compressed_weights_make_a_smaller_asset(saved: Path, tmp_path: Path) -> None:
    sizes = {f: (build(saved, tmp_path / f"{f}.aimodel", formats=f and parse_formats(f"blocks={f},embedding={f}"))
                 / coreai.PROGRAM).stat().st_size for f in (None, "int8", "lut4")}  # fmt: skip
    assert sizes["int8"] < 0.6 * sizes[None] and sizes["lut4"] < 0.4 * sizes[None]


@SLOW
def test_two_builds_differ_in_numbering_only_and_without_address_randomisation_not_at_all(
    saved: Path, tmp_path: Path
) -> None:
    """Apple's serialiser numbers operator names in the order of their addresses."""
    if shutil.which("setarch") is None:
        pytest.skip("setarch is not installed")
    for name in ("a", "b"):
        arguments = [
            "--checkpoint",
            saved,
            "--out",
            tmp_path / name / "x.aimodel",
            "--context",
            "32",
            "--prefill",
            "12",
        ]
        command = ["setarch", "-R", sys.executable, "-m", "distill", "coreai", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if "Operation not permitted" in done.stderr:
            pytest.skip("this system lets no process turn off address randomisation")
        assert done.returncode == 0, done.stderr
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 7
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def wrong_weight(twin: coreai.ExportableTwin) -> None:
    twin.block_0.mlp.up.weight.data *= 1.01


def future_seen(twin: coreai.ExportableTwin) -> None:
    twin.steps -= 1


def wrong_rope(twin: coreai.ExportableTwin) -> None:
    twin.sin.neg_()


def rope_one_position_late(twin: coreai.ExportableTwin) -> None:
    for table in twin.rope():
        table.copy_(table.roll(1, 0))


def wrong_epsilon(twin: coreai.ExportableTwin) -> None:
    for module in twin.modules():
        if isinstance(module, ChannelRMSNorm):
            module.eps = 0.1


@pytest.mark.parametrize(
    "fault", [wrong_weight, future_seen, wrong_rope, rope_one_position_late, wrong_epsilon], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=SLOW)])
def test_an_asset_of_a_perturbed_twin_fails(
    saved: Path, fault: Callable[[Any], None], precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault lies in the prefill function alone, so that decode's own gate still passes."""
    if precision == "fp16" and fault is wrong_weight:
        fault = lambda twin: twin.block_0.mlp.up.weight.data.mul_(1.5)  # noqa: E731  1% is within fp16's error
    true = coreai.twin

    def planted(built: coreai.Built, seq: int) -> coreai.ExportableTwin:
        made = true(built, seq)
        if seq != 1:
            with torch.no_grad():
                fault(made)
        return made

    monkeypatch.setattr(coreai, "twin", planted)
    found = statuses(build(saved, tmp_path / "x.aimodel", precision=precision))
    assert found["through_decode"] == "pass"
    assert found[f"through_prefill_{CHUNK}"] == "fail" and found["as_used"] == "fail", found


def test_a_decode_that_writes_one_row_late_fails(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(self: Any, position: torch.Tensor) -> Any:
        row = position[0].item()
        torch._check(row >= 0)
        torch._check(row + self.seq + 1 <= self.kv.shape[2])
        return row + (self.seq == 1)

    monkeypatch.setattr(coreai.ExportableTwin, "first", late)
    found = statuses(build(saved, tmp_path / "x.aimodel"))
    assert found["through_decode"] == found["as_used"] == "fail"


def test_what_is_altered_is_refused_before_apple_s_code_reads_it(exact: Path, tmp_path: Path) -> None:
    for name in (f"x.aimodel/{coreai.PROGRAM}", "x.aimodel.contract/goldens.safetensors"):
        asset = copy(exact, tmp_path / name.split("/")[1])
        path = asset.parent / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(PackageError, match="altered: its sha256 is not the one in the contract"):
            verify.run(asset)


def test_an_interface_other_than_the_contract_s_fails(exact: Path, tmp_path: Path) -> None:
    asset = copy(exact, tmp_path)
    path = coreai.contract_folder(asset) / "contract.json"
    path.write_text(path.read_text().replace('"logits"', '"scores"'))
    found = verify.run(asset)
    assert found["interface"].status == "fail" and "scores" in str(found["interface"].reason)
    assert {gate.status for gate in found.values()} == {"fail"}


def test_a_program_that_is_no_bytecode_is_one_clear_error(exact: Path, tmp_path: Path) -> None:
    """Its fingerprint is the contract's: what is left is that Apple's reader refuses it."""
    asset = copy(exact, tmp_path)
    (asset / coreai.PROGRAM).write_bytes(b"no bytecode")
    path = coreai.contract_folder(asset) / "contract.json"
    contract = json.loads(path.read_text())
    contract["file"]["sha256"] = sha256_file(asset / coreai.PROGRAM)
    path.write_text(json.dumps(contract))
    with pytest.raises(PackageError, match="Core AI does not load it"):
        verify.run(asset)


def test_without_the_runtime_every_gate_is_skipped_by_name(exact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "installed", lambda name: None)
    found = verify.run(exact)
    assert {gate.status for gate in found.values()} == {"skipped"} and sorted(found) == sorted(GATES)
    assert "pip install 'distill[coreai]'" in str(found["greedy"].reason)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": Path("x.mlpackage")}, "a Core AI asset's name ends in .aimodel"),
        ({"checkpoint": Path("none.pt")}, "none.pt"),
        ({"context": 33}, "--context 33: the model has positions for 2 to 32 tokens"),
        ({"context": 1}, "--context 1"),
        ({"prefill": (4, 4)}, "distinct"),
        ({"prefill": ()}, "at least one"),
        ({"prefill": (33,)}, "must lie in 2 to the context of 32"),
        ({"formats": parse_formats("blocks=lut3")}, "Core AI's converter packs no codes of 3 bits"),
        ({"formats": parse_formats("blocks=int4/7")}, "int4/7"),
    ],
)
def test_bad_input_is_one_clear_error_and_nothing_is_written(
    saved: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    changes = {key: tmp_path / value if isinstance(value, Path) else value for key, value in changes.items()}
    config = coreai.CoreAIConfig(saved, tmp_path / "x.aimodel", (CHUNK,), CONTEXT)._replace(**changes)
    with pytest.raises(InputError, match=message):
        coreai.run(config)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_ours_is_left_alone(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "x.aimodel").mkdir()
    (tmp_path / "x.aimodel" / "letters").write_text("mine")
    with pytest.raises(InputError, match="not ours"):
        build(saved, tmp_path / "x.aimodel")
    assert (tmp_path / "x.aimodel" / "letters").read_text() == "mine"


def test_tokens_and_positions_outside_are_refused_before_the_call(exact: Path) -> None:
    contract, golden = verify.read(exact)
    with verify.Asset(exact, contract) as asset:
        ids = golden["input_ids"][0][:1]
        for tokens, first in ((ids, CONTEXT), (ids, -1), (ids + 5000, 0), (ids[:0], 0)):
            with pytest.raises(InputError):
                asset.call("decode", tokens, first, asset.state())


def test_the_contract_says_what_the_asset_takes(exact: Path) -> None:
    contract = read_contract(coreai.contract_folder(exact) / "contract.json")
    assert [f.tokens() for f in contract.functions.values()] == [1, CHUNK]
    assert contract.states[0].dtype == contract.outputs[0].dtype == "float32"
    assert contract.versions.keys() >= {"coreai-torch", "coreai-core"}
