"""The package is the one that its contract records: program, weights, sidecar, and the interface between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill import gates
from distill.artifacts import sha256_file
from distill.contract import SIDECAR_NAMES, WITH_STATE, Contract, TensorSpec, read_contract
from distill.contract import Function as Promised
from distill.convert.package import SPEC_FILE, WEIGHT_FILE, WEIGHT_NAME, program_sha256, sidecar_folder
from distill.errors import PackageError
from distill.gates import Gate
from distill.mil.dtypes import packed_size
from distill.mil.program import TensorType
from distill.versions import import_coremltools

if TYPE_CHECKING:
    from distill.mil import Program
    from distill.mil.program import Feature, Function
    from distill.verify.runner import PackageRunner

_SPECIFICATIONS = {"iOS15": 6, "iOS16": 7, "iOS17": 8, "iOS18": 9}
"""Deployment target -> specification version, as coremltools writes it."""
LARGEST_SHARE = 1.01
_RECORD = 64
"""Bytes of the header of weight.bin, of what precedes each of its constants, and what they are aligned to."""
_LONG = {"fp16": "float16", "fp32": "float32"}


def contract_gate(runner: PackageRunner) -> Gate:
    """The contract beside the package is the one inside it, and does not contradict itself."""
    path = sidecar_folder(runner.path) / "contract.json"
    faults = [] if read_contract(path) == runner.contract else [f"{path} differs from the one in the metadata"]
    faults += contradictions(runner.contract)
    return gates.holds(not faults, reason="; ".join(faults) or None)


def contradictions(contract: Contract) -> list[str]:
    """What a package's contract says that cannot all be true."""
    faults = []
    if contract.schema != "distill-package/1":
        faults.append(f"its schema is {contract.schema}, not that of a package")
    length = max(contract.enumerated_T) if contract.mode in WITH_STATE else contract.sequence()
    for key, what in {name: name for name in contract.functions}.items() or [(str(length), f"T={length}")]:
        checked = contract.shape_validation.get(key)
        if checked is None:
            faults.append(f"{what} was not validated when it was exported")
        elif checked.status == "fail" or checked.max_abs_err is None or checked.tolerance is None:
            faults.append(f"{what} failed its validation: {checked.reason}")
        elif not checked.max_abs_err <= checked.tolerance:
            faults.append(f"{what} failed its validation: error {checked.max_abs_err:.3g} in fp32")
    return faults + [f"{what} contradicts model_config" for what in _unlike_the_model(contract, length)]


def _unlike_the_model(contract: Contract, length: int) -> list[str]:
    config, faults = contract.model_config, []
    if length > config.max_position_embeddings:
        faults.append(f"a length of {length}")
    out, states = contract.outputs[0].shape, [spec.shape for spec in contract.states]
    if contract.mode == "block":
        if out != [1, config.hidden_size, 1, length]:
            faults.append(f"output {out}")
    elif out != [1, contract.sequence(), config.vocab_size]:
        faults.append(f"output {out}")
    kv = [2 * config.num_hidden_layers, config.num_key_value_heads, length, config.head_dim]
    if states != ([kv] if contract.mode in WITH_STATE else []):
        faults.append(f"state {states}")
    return faults


def program_gate(runner: PackageRunner) -> Gate:
    """The program and its description are those that were converted; only the user-defined metadata may differ."""
    import_coremltools()  # without its chatter
    from coremltools.proto import Model_pb2

    from distill.mil.package import Package

    package, recorded = Package(runner.path), runner.contract.program_sha256
    if package.model != (runner.path / SPEC_FILE).resolve():
        raise PackageError(f"{runner.path}: Manifest.json names {package.model.name}, not {SPEC_FILE}")
    if recorded is None:
        raise PackageError(f"{runner.path}: its contract has no sha256 of the program; convert it again")
    observed = program_sha256(Model_pb2.Model.FromString(package.read_model()))
    return _same_sha256(observed, recorded, "the program is not the one that was converted")


def weights_gate(runner: PackageRunner) -> Gate:
    """The program reads weight.bin and no other file, and weight.bin is the one that was converted."""
    path, ref = runner.path / WEIGHT_FILE, runner.contract.file
    others = sorted({file.name for file in runner.program.weight_files if file != path.resolve()})
    if others:
        raise PackageError(f"{runner.path}: the program takes weights from {', '.join(others)}, not weight.bin alone")
    if ref is None:
        none = not path.is_file()
        return gates.holds(none, reason=None if none else "weight.bin exists but the contract names none")
    if not path.is_file():
        raise PackageError(f"{path}: missing")
    if ref.name != WEIGHT_NAME or ref.bytes != path.stat().st_size:
        raise PackageError(f"{path}: {path.stat().st_size} bytes, the contract says {ref.name} of {ref.bytes}")
    return _same_sha256(sha256_file(path), ref.sha256, "weight.bin is not the one that was converted")


def shared_gate(runner: PackageRunner) -> Gate:
    """The functions take their weights from the same places of weight.bin: it is no larger than one of them needs."""
    needed = []
    for function in runner.program.functions.values():
        kinds = [value.type for value in function.stored.values()]
        sizes = [packed_size(kind.dtype, kind.count or 0) for kind in kinds if isinstance(kind, TensorType)]
        needed.append(_RECORD + sum(_RECORD * (1 + -(-size // _RECORD)) for size in sizes))
    share = (runner.path / WEIGHT_FILE).stat().st_size / max(needed)
    reason = f"weight.bin against what the largest of {len(needed)} functions reads"
    return gates.at_most(share, LARGEST_SHARE, reason=reason)


def _same_sha256(observed: str, recorded: str, otherwise: str) -> Gate:
    same = observed == recorded
    return gates.holds(same, observed=observed[:16], threshold=recorded[:16], reason=None if same else otherwise)


def sidecar_gate(runner: PackageRunner) -> Gate:
    """Every file that the mode needs is there, and is the one that was exported."""
    contract = runner.contract
    roles = SIDECAR_NAMES.keys() - ({"evaluation"} if contract.mode == "block" else set())
    for role in sorted(roles | contract.sidecar.keys()):
        path, ref = runner.sidecar(role), contract.sidecar[role]
        if ref.bytes != path.stat().st_size:
            raise PackageError(f"{path}: {path.stat().st_size} bytes, the contract says {ref.bytes}")
    tokenizer = runner.tokenizer()
    if tokenizer.sha256 != contract.tokenizer_sha256:
        raise PackageError(f"{runner.sidecar('tokenizer')}: another tokenizer than the model was trained with")
    tokenizer.require_fits(contract.model_config.vocab_size, str(runner.path))
    template = runner.sidecar("chat_template")
    if sha256_file(template) != contract.chat_template_sha256:
        raise PackageError(f"{template}: another chat template than the model was trained with")
    return gates.holds(True, observed=len(contract.sidecar))


def interface_gate(runner: PackageRunner) -> Gate:
    """Names, shapes and types of inputs, outputs and states, against the serialized program and its description."""
    faults = interface_faults(runner.program, runner.contract)
    return gates.holds(not faults, reason="; ".join(faults) or None)


def interface_faults(program: Program, contract: Contract) -> list[str]:
    """Where a program's interface is not the contract's."""
    promised: dict[str, Contract | Promised] = {**contract.functions} or {"main": contract}
    if sorted(program.functions) != sorted(promised):
        named = ", ".join(sorted(promised)) if contract.functions else "main alone"
        return [f"the program has the functions {', '.join(sorted(program.functions))}, not {named}"]
    faults = []
    if contract.functions and program.default_function != "decode":
        faults.append(f"the default function is {program.default_function}, not decode")
    for function, specs in promised.items():
        wanted, found = _wanted(specs), _found(program.function(function))
        faults += [
            f"{kind} {name}: contract {wanted[kind].get(name, 'none')}, package {found[kind].get(name, 'none')}"
            + (f" in {function}" if contract.functions else "")
            for kind in wanted
            for name in sorted(wanted[kind].keys() | found[kind].keys())
            if wanted[kind].get(name) != found[kind].get(name)
        ]
    config = contract.made_by.get("config")
    target = config.get("target") if isinstance(config, dict) else None
    version = _SPECIFICATIONS.get(target) if isinstance(target, str) else None
    versions = set(_SPECIFICATIONS.values()) if version is None else {version}
    if program.specification_version not in versions:
        faults.append(f"specification version {program.specification_version} is not that of {target or 'any target'}")
    return faults


def _wanted(contract: Contract | Promised) -> dict[str, dict[str, str]]:
    def described(specs: list[TensorSpec]) -> dict[str, str]:
        return {spec.name: f"{spec.dtype}{spec.shape}" for spec in specs}

    return {
        "input": described(contract.inputs),
        "output": described(contract.outputs),
        "state": described(contract.states),
    }


def _found(function: Function) -> dict[str, dict[str, str]]:
    """Also the outputs that the program has and its description lacks."""
    outputs = {name: "undescribed" for name in function.block.outputs}
    return {
        "input": {f.name: _described(f) for f in function.inputs},
        "output": outputs | {f.name: _described(f) for f in function.outputs},
        "state": {f.name: _described(f) for f in function.states},
    }


def _described(feature: Feature) -> str:
    """As `_wanted` writes a tensor of one shape, and then whatever else the description allows or the program says."""
    text = _tensor(feature)
    if _tensor(feature.type) != text:
        text += f" but {_tensor(feature.type)} in the program"
    if feature.kind != "tensor":
        text += f" as {feature.kind}"
    if feature.enumerated or feature.ranges:
        text += " of flexible shape"
    return text + (" optional" if feature.optional else "")


def _tensor(value: Any) -> str:
    return f"{_LONG.get(value.dtype, value.dtype)}{list(value.shape)}"
