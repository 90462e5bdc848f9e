"""Does this package keep its contract? Every gate can fail, and a test plants the fault that each exists for.

python -m evaluation.toy_contracts --model X.mlpackage --seq 128 --report R.json [--strict]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill import gates
from distill.artifacts import provenance, read_json, write_json
from distill.convert.package import PLACEHOLDER, SPEC_FILE, WEIGHT_FILE
from distill.errors import DistillError, InputError, PackageError, Skipped, stage_main
from distill.export.tolerance import tolerance_factor
from distill.gates import Gate
from distill.verify import decoding, generator, in_use, integrity, native, outputs, parity
from distill.verify.runner import PackageRunner

GATES = (
    "package_loads",
    "contract",
    "program_unaltered",
    "weights_unaltered",
    "sidecar_unaltered",
    "interface",
    "shapes_run",
    "outputs_finite",
    "outputs_vary",
    "parity_exact",
    "parity_fp16",
    "state",
    "named_points",
    "greedy_decode",
    "tool_span_f1",
    "ane_eligibility",
    "core_ml",
)
"""In order. A gate that an earlier failure makes impossible fails with that reason."""
GENERATOR_GATES = (*GATES, "weights_shared", "use_tokens", "use_kv", "use_chunks", "use_conversations", "use_limit")
"""Of a package that generates, with several functions over one state."""
EXECUTOR = "distill.mil"
TOOL_F1 = 0.9


class ContractsConfig(NamedTuple):
    """What to verify."""

    model: Path
    seq: int | None = None
    """Sequence length that the package must have."""
    report: Path | None = None


class Check:
    """The gates of one package, filled in order; what one finds is at hand for the next."""

    def __init__(self, config: ContractsConfig) -> None:
        self.config = config
        self.gates: dict[str, Gate] = {}
        self.details: dict[str, Any] = {}
        self.runner: PackageRunner | None = None
        self.golden: dict[str, np.ndarray] = {}
        self.session: generator.Session | None = None
        """Of a generator."""
        self.logits: dict[str, np.ndarray] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the gates of this package, in order."""
        generates = self.runner is not None and self.runner.contract.mode == "generator"
        return GENERATOR_GATES if generates else GATES

    def gate(self, name: str, check: Callable[[], Gate]) -> bool:
        """Record a gate; what it checks may raise, and then it fails with that reason."""
        try:
            self.gates[name] = check()
        except Skipped as skipped:
            self.gates[name] = gates.skipped(skipped.reason)
        except DistillError as error:
            self.gates[name] = gates.failed(str(error), backend=EXECUTOR)
        return self.gates[name].status in ("pass", "skipped")

    def give_up(self, reason: str) -> None:
        """Fail what has not been checked."""
        for name in self.names:
            self.gates.setdefault(name, gates.failed(f"not reached: {reason}"))


def run(config: ContractsConfig) -> dict[str, Any]:
    """Verify a package; returns the report. InputError if it is missing or is not of length `seq`."""
    if not config.model.is_dir():
        raise InputError(f"{config.model}: no such package")
    check = Check(config)
    if (config.model / PLACEHOLDER).is_file():
        reason = f"{config.model} is a placeholder package"
        check.gates = {name: gates.skipped(reason) for name in GATES}
    else:
        _check_all(check)
    report = {
        "schema": "distill-contracts/1",
        "package": config.model.name,
        "gates": gates.to_json({name: check.gates[name] for name in check.names}),
        "counts": gates.count(check.gates),
        "details": check.details,
        "made_by": provenance(
            {"seq": config.seq},
            {
                n: config.model / f
                for n, f in (("spec", SPEC_FILE), ("weights", WEIGHT_FILE))
                if (config.model / f).is_file()
            },
        ),
    }
    if config.report is not None:
        write_json(config.report, report)
    return report


def _check_all(check: Check) -> None:
    config = check.config

    def load() -> Gate:
        check.runner = PackageRunner(config.model, checked=False)
        return gates.holds(True, observed=sorted(check.runner.program.functions), backend=EXECUTOR)

    if not check.gate("package_loads", load) or check.runner is None:
        check.give_up("the package does not load")
        return
    runner = check.runner
    contract = runner.contract
    if config.seq is not None and config.seq != check.runner.capacity:
        raise InputError(f"--seq {config.seq}: {config.model} is enumerated for T = {contract.enumerated_T}")
    check.gate("contract", lambda: integrity.contract_gate(runner))
    check.gate("program_unaltered", lambda: integrity.program_gate(runner))
    check.gate("weights_unaltered", lambda: integrity.weights_gate(runner))
    check.gate("sidecar_unaltered", lambda: integrity.sidecar_gate(runner))
    if not check.gate("interface", lambda: integrity.interface_gate(runner)):
        check.give_up("the interface is not the contract's")
        return
    if contract.mode == "generator":
        if not generator.check_functions(check, runner):
            return
    elif not _check_program(check, runner):
        return
    _check_decoding(check, runner)
    check.gate("ane_eligibility", lambda: _ane(check, runner))
    check.gate("core_ml", lambda: native.parity_gate(config.model, contract, check.golden))
    if contract.mode == "generator":
        in_use.check_use(check, runner)


def _check_program(check: Check, runner: PackageRunner) -> bool:
    """The gates of a package's one program; False where it does not run."""
    if not check.gate("shapes_run", lambda: _shapes(check, runner)):
        check.give_up("a shape does not run")
        return False
    found = check.logits["ieee16"]
    check.gate("outputs_finite", lambda: outputs.finite(found))
    check.gate("outputs_vary", lambda: outputs.vary(found))
    check.gate("parity_exact", lambda: _parity(check, runner, "fp32"))
    check.gate("parity_fp16", lambda: _parity(check, runner, "ieee16"))
    check.gate("state", lambda: _state(check, runner))
    check.gate("named_points", lambda: _points(check, runner))
    return True


def _shapes(check: Check, runner: PackageRunner) -> Gate:
    """Every shape of the contract runs, on the golden inputs."""
    contract = runner.contract
    if contract.mode != "decode" and contract.enumerated_T != [contract.sequence()]:
        raise PackageError(f"the contract lists T = {contract.enumerated_T}, the program takes {contract.sequence()}")
    if contract.states and contract.states[0].shape[2:3] != [max(contract.enumerated_T, default=0)]:
        raise PackageError(f"the contract lists T = {contract.enumerated_T}, the state is {contract.states[0].shape}")
    check.golden = parity.load_goldens(runner)
    check.logits["ieee16"] = parity.run_goldens(runner, check.golden)
    runner.policy = "fp32"
    check.logits["fp32"] = parity.run_goldens(runner, check.golden)
    runner.policy = "ieee16"
    return gates.holds(True, observed=contract.enumerated_T, backend=EXECUTOR)


def _parity(check: Check, runner: PackageRunner, policy: str) -> Gate:
    golden, contract = check.golden, runner.contract
    tolerance = golden["fp16_sigma"] * tolerance_factor(golden["logits"].shape[-1])
    reference = golden["logits_half" if policy == "fp32" else "logits"]
    result = parity.compare(check.logits[policy], reference, tolerance)
    name = "parity_exact" if policy == "fp32" else "parity_fp16"
    check.details[name] = {k: _plain(v) for k, v in result._asdict().items()}
    if policy == "fp32":
        if wrong := _wrong_weights(runner, golden):
            return gates.holds(
                False,
                observed=result.relative,
                threshold=parity.exact_tolerance(contract),
                backend=f"{EXECUTOR} fp32",
                reason=wrong,
            )
        return gates.at_most(
            result.relative,
            parity.exact_tolerance(contract),
            backend=f"{EXECUTOR} fp32",
            reason="||difference|| / ||logits||, worst position",
        )
    reason = (
        f"share of the derived fp16 error; max {result.max_error:.3g}, KL {result.kl:.2e}, top-1 {result.top1:.1%}, "
        f"gain {contract.fp16_gain:.2f}"
    )
    if contract.fp16_gain > generator.MAX_GAIN:
        return Gate(
            "inconclusive", _plain(result.sigmas), 1.0, f"{EXECUTOR} ieee16", f"{reason}, above {generator.MAX_GAIN:g}"
        )
    return gates.at_most(result.sigmas, 1.0, backend=f"{EXECUTOR} ieee16", reason=reason)


def _wrong_weights(runner: PackageRunner, golden: dict[str, np.ndarray]) -> str | None:
    if runner.contract.mode == "block":
        return None
    return parity.wrong_embedding(runner, golden) or parity.wrong_weights(runner)


def _state(check: Check, runner: PackageRunner) -> Gate:
    """After the golden steps the state holds the reference's keys and values, and the unused rest is untouched."""
    if not runner.contract.states:
        return gates.skipped("the program keeps no state")
    if "kv" not in check.golden:
        raise PackageError("the goldens hold no state")
    name = runner.contract.states[0].name
    runner.policy = "fp32"
    state = runner.program.make_state()
    for _ in runner.steps(check.golden["input_ids"][0].tolist(), state):
        pass
    runner.policy = "ieee16"
    reference = check.golden["kv"].astype(np.float64)
    kv = state.read(name).astype(np.float64)
    used, rest = kv[:, :, : reference.shape[2]], kv[:, :, reference.shape[2] :]
    error = float(np.linalg.norm(used - reference) / np.linalg.norm(reference))
    if np.any(rest):
        raise PackageError(f"state {name} was written beyond the tokens that were fed")
    far_logits, far_rows = parity.far_steps(runner, check.golden)
    check.details["far_steps"] = {"logits": _plain(far_logits), "keys_and_values": _plain(far_rows)}
    tolerance = parity.exact_tolerance(runner.contract)
    if far_logits > tolerance:
        return gates.at_most(
            far_logits, tolerance, backend=f"{EXECUTOR} fp32", reason="logits of single steps over a full context"
        )
    # the executor keeps a state as it is declared, in fp16
    return gates.at_most(
        max(error, far_rows), 2.0**-11, backend=f"{EXECUTOR} fp32", reason="relative error of keys and values"
    )


def _points(check: Check, runner: PackageRunner) -> Gate:
    expected = {k.removeprefix("probe."): v for k, v in check.golden.items() if k.startswith("probe.")}
    if not expected:
        if runner.contract.mode == "prefill" and any("." in name for name in runner.contract.probes):
            raise PackageError("the goldens lack the named points that a twin has")
        return gates.skipped("the goldens hold no named points")
    ids = check.golden["input_ids"][0].tolist()
    points = parity.compare_points(runner, expected, ids, check.golden["positions"])
    check.details["named_points"] = [{k: _plain(v) for k, v in p._asdict().items()} for p in points]
    return parity.points_gate(points, runner.contract)[1]


def _check_decoding(check: Check, runner: PackageRunner) -> None:
    results: list[decoding.Decoded] = []

    def greedy() -> Gate:
        contract = runner.contract
        if contract.mode == "block":
            raise Skipped("a block generates no text")
        evaluation = read_json(runner.sidecar("evaluation"))
        sigma = check.golden["fp16_sigma"]
        # prompts may lie somewhat further from zero than the goldens, not many times as far
        largest = 4 * float(sigma.max()) * tolerance_factor(contract.model_config.vocab_size)
        results.extend(decoding.decode_all(runner, evaluation, largest))
        if len(results) != contract.evaluation_items:
            raise PackageError(f"{len(results)} evaluation prompts, the export had {contract.evaluation_items}")
        gate, detail = decoding.greedy_gate(results)
        check.details["greedy_decode"] = detail
        return gate

    check.gate("greedy_decode", greedy)

    def f1() -> Gate:
        if len(results) != runner.contract.evaluation_items:
            raise PackageError("not reached: there is no text for every evaluation prompt")
        gate, detail = decoding.f1_gate(results, TOOL_F1)
        check.details["tool_span_f1"] = detail
        return gate

    check.gate("tool_span_f1", f1)


def _ane(check: Check, runner: PackageRunner) -> Gate:
    from distill.verify import ane

    report = ane.lint(runner.program)
    check.details["ane_eligibility"] = report.to_json() | {"model": runner.path.name}
    errors = [finding for finding in report.findings if finding.severity == "error"]
    return gates.holds(
        not errors,
        observed=f"{len(errors)} errors of {len(report.findings)} findings",
        reason=f"{errors[0].rule}: {errors[0].message}" if errors else "eligibility, not placement",
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Parse, verify, print the table and the closing line."""
    parser = argparse.ArgumentParser(prog="distill contracts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="X.mlpackage")
    parser.add_argument("--seq", type=int, help="sequence length that the package must have")
    parser.add_argument("--report", type=Path, help="where the JSON report goes")
    parser.add_argument("--strict", action="store_true", help="exit 3 if anything was skipped")
    args = parser.parse_args(argv)
    report = run(ContractsConfig(args.model, args.seq, args.report))
    result = {name: Gate(**value) for name, value in report["gates"].items()}
    print(gates.table(result))
    print(f"{args.model}: {gates.summary(result)}")
    if (args.model / PLACEHOLDER).is_file():
        print(f"error: {args.model} is a placeholder package: nothing was verified", file=sys.stderr)
        return 2
    return gates.exit_code(result, strict=args.strict)
