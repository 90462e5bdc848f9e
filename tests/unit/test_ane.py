"""The ANE lint: every rule has a package that violates it, and one package violates none."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.models import compute_device

from distill import mil
from distill.errors import Skipped
from distill.verify import ane, ane_ops
from distill.verify.ane_ops import Limits
from distill.verify.ane_rules import RULES, rule
from tests.unit import ane_programs as programs
from tests.unit.ane_programs import ALLOWED, VIOLATIONS, build, network, operation, save


def found(program: mil.Program) -> set[str]:
    return {finding.rule for finding in ane.lint(program).findings}


@pytest.mark.parametrize("id", RULES)
def test_a_program_violates_the_rule(id: str) -> None:
    assert id in VIOLATIONS, f"no test program violates {id}"
    report = ane.lint(VIOLATIONS[id]())
    hits = [finding for finding in report.findings if finding.rule == id]
    assert hits and all(h.severity == RULES[id].severity and h.source and h.message for h in hits)
    assert report.status == ("fail" if report.counts["error"] else "pass")


def test_every_violating_program_names_a_rule_of_the_table() -> None:
    assert set(VIOLATIONS) == set(RULES)


def test_the_clean_package_violates_no_rule() -> None:
    report = ane.lint(programs.clean())
    assert not report.findings
    assert report.status == "pass"


@pytest.mark.parametrize("ids", ALLOWED)
def test_what_the_sources_allow_is_not_reported(ids: str) -> None:
    assert not found(ALLOWED[ids]()) & set(ids.split())


@pytest.mark.parametrize("op_type", sorted(ane_ops.OFF_ANE))
def test_an_operator_that_no_source_puts_on_the_ane_fails_the_gate(op_type: str) -> None:
    program = build(network)
    operation(program, "silu").type = op_type
    report = ane.lint(program)
    assert report.status == "fail"
    assert report.findings[0].rule == "op-off-ane"
    assert report.findings[0].where == f"main: {op_type} {operation(program, op_type).output_name}"


def test_the_operator_tables_do_not_contradict_each_other() -> None:
    tables: list[Any] = [
        ane_ops.ELIGIBLE,
        ane_ops.OFF_ANE,
        ane_ops.DISPUTED,
        ane_ops.ONE_SOURCE,
        ane_ops.FAMILY,
    ]
    assert sum(map(len, tables)) == len(ane_ops.LISTED)


def test_operations_in_the_branches_of_a_condition_are_checked_too() -> None:
    def body(x: Any) -> Any:
        positive = mb.greater(x=mb.reduce_max(x=x, axes=[0, 1, 2, 3]), y=np.float16(0))
        return mb.cond(pred=positive, _true_fn=lambda: mb.sin(x=x), _false_fn=lambda: mb.relu(x=x))

    assert {"op-off-ane", "op-family"} <= found(build(body))


def test_a_rule_id_is_taken_once() -> None:
    with pytest.raises(ValueError, match="'rank' is registered twice"):
        rule("rank", "info", "", "")(lambda view, limits: iter(()))


def test_several_enumerated_inputs_need_ios18() -> None:
    shape = ct.EnumeratedShapes([(1, 64, 1, 32), (1, 64, 1, 64)])
    program = programs.flexible(shape, "x", "y")
    assert "enumerated-limit" not in found(program)
    assert "enumerated-limit" in found(dataclasses.replace(program, specification_version=8))


def test_a_knob_moves_the_limit() -> None:
    report = ane.lint(programs.long_axis(), Limits(max_dim=65_536))
    assert "dim-16384" not in {finding.rule for finding in report.findings}


class Decoder(torch.nn.Module):
    """The recipe: ids in, BC1S inside, [x,-x] norm, a matmul per head, -1e4 mask, all logits out."""

    def __init__(self, vocab: int = 300, width: int = 64, heads: int = 2, length: int = 32) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.embedding = torch.nn.Embedding(vocab, width)
        self.q, self.k, self.v, self.o, self.up, self.gate = (torch.nn.Conv2d(width, width, 1) for _ in range(6))
        self.head = torch.nn.Conv2d(width, vocab, 1, bias=False)
        self.register_buffer("mask", torch.full((1, 1, length, length), -1e4).triu(1))

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.cat([x, -x], 1)
        d = z - z.mean(1, keepdim=True)
        return (d * ((d * d).mean(1, keepdim=True) + 1e-5).rsqrt())[:, : x.shape[1]]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids).transpose(1, 2).unsqueeze(2)
        h = self.norm(x)
        q, k, v = (layer(h).split(self.size, 1) for layer in (self.q, self.k, self.v))
        mixed = []
        for i in range(self.heads):
            scores = q[i].transpose(1, 3).transpose(1, 2) @ k[i].transpose(1, 2) + self.mask
            mixed.append((scores.softmax(-1) @ v[i].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        x = x + self.o(torch.cat(mixed, 1))
        h = self.norm(x)
        return self.head(self.norm(x + torch.nn.functional.silu(self.gate(h)) * self.up(h)))


@cache
def decoder() -> mil.Program:
    exported = torch.export.export(Decoder().eval(), (torch.zeros(1, 32, dtype=torch.int32),)).run_decompositions({})
    return save(
        ct.convert(
            exported, inputs=[ct.TensorType("input_ids", (1, 32), dtype=np.int32)],
            outputs=[ct.TensorType("logits", dtype=np.float16)], minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
    )  # fmt: skip


def test_a_decoder_by_the_recipe_is_eligible_with_warnings_about_its_token_ids() -> None:
    report = ane.lint(decoder())
    assert report.status == "pass", [f for f in report.findings if f.severity == "error"]
    assert {f.rule for f in report.findings if f.severity == "warning"} == {"int-ops", "dynamic-index"}


def test_the_json_report_has_gates_and_every_finding_with_its_source() -> None:
    report = json.loads(json.dumps(ane.lint(programs.infinite_mask()).to_json()))
    gate = report["gates"]["ane_eligibility"]
    assert (gate["status"], gate["observed"]["error"], gate["threshold"]) == ("fail", 1, {"error": 0})
    assert gate["reason"].startswith("mask-inf at main: add ") and "-inf" in gate["reason"]
    first = report["findings"][0]
    assert first["function"] == "main" and first["op_type"] == "add" and "neural_engine_rules.md" in first["source"]


def test_exit_codes_and_the_closing_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = str(decoder().path), str(programs.infinite_mask().path)
    out = tmp_path / "report.json"
    assert ane.main([good, "--json", str(out)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("ANE: 1 pass, 1 skipped (ane_placement: ") and "findings: 0 error, " in line
    assert json.loads(out.read_text())["gates"]["ane_placement"]["status"] == "skipped"
    assert ane.main([good, "--strict"]) == 3
    assert ane.main([bad]) == 1 and ane.main([bad, "--strict"]) == 1
    assert ane.main([str(tmp_path / "absent.mlpackage")]) == 2
    assert "absent.mlpackage: no such package" in capsys.readouterr().err


def test_a_placeholder_is_skipped_and_never_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "PLACEHOLDER").touch()
    assert ane.main([str(tmp_path)]) == 0
    assert "ANE: 1 skipped" in capsys.readouterr().out
    assert ane.main([str(tmp_path), "--strict"]) == 3


@pytest.mark.skipif(ct.utils._is_macos(), reason="on a Mac placement is asked of Core ML")
def test_placement_is_skipped_off_macos_with_its_reason() -> None:
    with pytest.raises(Skipped, match="needs macOS; this is Linux"):
        ane.placement(programs.clean().path)


class Plan:
    """A compute plan as coremltools shows it: two operations on the ANE, one on the CPU, and a constant."""

    def __init__(self) -> None:
        out = [SimpleNamespace(name="y")]
        kinds = ("conv", "silu", "gather", "const")
        ops = [SimpleNamespace(operator_name=k, outputs=out, blocks=[]) for k in kinds]
        block = SimpleNamespace(operations=ops)
        program = SimpleNamespace(functions={"main": SimpleNamespace(block=block)})
        self.model_structure = SimpleNamespace(program=program)

    def get_compute_device_usage_for_mlprogram_operation(self, op: Any) -> Any:
        on_cpu = op.operator_name == "gather"
        kind = compute_device.MLCPUComputeDevice if on_cpu else compute_device.MLNeuralEngineComputeDevice
        device = object.__new__(kind)
        return SimpleNamespace(preferred_compute_device=device) if op.operator_name != "const" else None

    def get_estimated_cost_for_mlprogram_operation(self, op: Any) -> Any:
        return SimpleNamespace(weight=0.05 if op.operator_name == "gather" else 0.475)


def test_a_compute_plan_is_counted_by_device_and_cost() -> None:
    placed = ane.placement_of(Plan(), "model")
    assert placed.operations == {"ane": 2, "cpu": 1} and placed.unplanned == 1
    assert placed.ane_cost == pytest.approx(0.95)
    assert placed.off_ane == ["main: gather y on cpu"]
