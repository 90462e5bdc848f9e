"""Exported program or ONNX file -> Core ML package with its contract.

python -m conversion.convert_coreml --backend pytorch|onnx --in P --out X.mlpackage --seq 128
    --compute-units all [--contract J] [--allow-placeholder]
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
import torch

from distill.artifacts import provenance, require_replaceable, sha256_file
from distill.contract import Contract, FileRef, TensorSpec, Weight, read_contract
from distill.convert.package import save_package, save_placeholder, sidecar_folder
from distill.errors import CheckpointError, DistillError, InputError, stage_main
from distill.model import ModelConfig
from distill.versions import import_coremltools, installed, quiet, require_python, versions

COMPUTE_UNITS = {
    "all": "ALL",
    "cpu_only": "CPU_ONLY",
    "cpu_and_gpu": "CPU_AND_GPU",
    "cpu_and_ne": "CPU_AND_NE",
}
TARGETS = ("iOS16", "iOS17", "iOS18")  # float16 outputs need iOS16


class ConvertConfig(NamedTuple):
    """What to convert."""

    source: Path
    out: Path
    backend: Literal["pytorch", "onnx"] = "pytorch"
    seq: int | None = None
    """Sequence length the program must have; None: whatever it has."""
    compute_units: str = "all"
    """Recorded for whoever loads the package; conversion does not depend on it."""
    contract: Path | None = None
    """None: `<name>_contract.json` beside the source."""
    allow_placeholder: bool = False
    target: str = "iOS18"


def run(config: ConvertConfig) -> Contract | None:
    """Convert; returns the package's contract (None for a placeholder or an ONNX file without one)."""
    require_python("conversion")
    if not config.source.is_file():
        raise InputError(f"{config.source}: no such file")
    if config.out.suffix != ".mlpackage":
        raise InputError(f"--out {config.out}: a Core ML package's name ends in .mlpackage")
    require_replaceable(config.out)
    if installed("coremltools") is None and config.allow_placeholder:
        save_placeholder(config.out, "coremltools is not installed where this was converted")
        return None
    require_replaceable(sidecar_folder(config.out))
    ct = import_coremltools()
    path = _contract_path(config)
    if config.backend == "pytorch" and not path.is_file():
        raise InputError(f"{config.source}: not loaded, since it is code, and no {path} names its sha256")
    contract = read_contract(path) if config.contract or path.is_file() else None
    if contract is not None:
        _check(contract, config, path)
    from_source = _from_torchscript if config.backend == "pytorch" else _from_onnx
    model = from_source(ct, config, contract)
    check_state_writes(model, contract)
    if contract is not None:
        made = provenance(
            {
                "backend": config.backend,
                "seq": config.seq,
                "compute_units": config.compute_units,
                "target": config.target,
            },
            {"source": config.source, "contract": path},
        )
        contract = msgspec.structs.replace(
            contract,
            enumerated_T=[contract.sequence()] if contract.mode != "decode" else contract.enumerated_T,
            tables=None,
            probes=probes(model, contract) if config.backend == "pytorch" else _onnx_probes(model, contract),
            made_by=made | {"export": contract.made_by},
            versions=versions(),
        )
    return save_package(model, config.out, contract, path.parent if contract is not None else None)


def _contract_path(config: ConvertConfig) -> Path:
    return config.contract or config.source.with_name(f"{config.source.stem}_contract.json")


def _check(contract: Contract, config: ConvertConfig, path: Path) -> None:
    if contract.schema != "distill-export/1" or contract.file is None:
        raise InputError(f"{path}: is a package's contract, not an export's")
    # an ONNX file is data, and surgery may have rewritten it: its meaning is checked by parity
    if config.backend == "pytorch" and sha256_file(config.source) != contract.file.sha256:
        raise CheckpointError(
            f"{config.source}: its sha256 is not the one in {path.name}; not loaded, since it is code"
        )
    if config.seq is not None and contract.mode != "decode" and config.seq != contract.sequence():
        lengths = contract.enumerated_T
        hint = f"this file is T={contract.sequence()}" if config.seq in lengths else f"T={config.seq} is not enumerated"
        raise InputError(f"--seq {config.seq}: {hint}; the export has T = {', '.join(map(str, lengths))}")
    checked = contract.shape_validation.get(str(max(contract.enumerated_T) if contract.states else contract.sequence()))
    if checked is not None and checked.status == "fail":
        raise InputError(f"{path}: the export of this shape failed its own validation: {checked.reason}")


def _from_torchscript(ct: Any, config: ConvertConfig, contract: Contract | None) -> Any:
    assert contract is not None
    try:
        program = torch.jit.load(str(config.source), map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{config.source}: not a TorchScript program: {str(error).splitlines()[0]}") from error
    with quiet(), one_line(config.source):
        return lower(ct, program, contract, _contract_path(config).parent, _target(config, contract), consume=True)


class Lowered(Protocol):
    """What lowering asks of a contract."""

    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> list[TensorSpec]: ...
    @property
    def outputs(self) -> list[TensorSpec]: ...
    @property
    def states(self) -> list[TensorSpec]: ...
    @property
    def model_config(self) -> ModelConfig: ...
    @property
    def weights(self) -> dict[str, Weight]: ...
    @property
    def tables(self) -> FileRef | None: ...


def lower(
    ct: Any, program: Any, contract: Lowered, folder: Path, target: str = "iOS18", *, consume: bool = False
) -> Any:
    """A traced program -> MLModel, its weights in their formats; `folder` holds the tables that the contract names.

    `consume`: the program is of no use afterwards, its weights are freed as they are halved.
    """
    from coremltools.converters.mil import Builder

    from distill.convert import compression, halving

    Builder.name_count.clear()  # a conversion that failed leaves its numbers, and the next one's names would differ
    passes = ct.PassPipeline()
    halving.use(passes, program if consume else None)
    compression.append(passes, contract, folder)
    return ct.convert(
        program,
        source="pytorch",
        inputs=[_tensor_type(ct, spec) for spec in contract.inputs],
        outputs=[ct.TensorType(spec.name, dtype=_dtype(spec)) for spec in contract.outputs],
        states=[
            ct.StateType(wrapped_type=ct.TensorType(shape=tuple(s.shape), dtype=_dtype(s)), name=s.name)
            for s in contract.states
        ]
        or None,
        convert_to="mlprogram",
        minimum_deployment_target=getattr(ct.target, target),
        compute_precision=ct.precision.FLOAT16,
        pass_pipeline=passes,
        skip_model_load=True,
    )


def _from_onnx(ct: Any, config: ConvertConfig, contract: Contract | None) -> Any:
    with quiet():
        from distill.convert import onnx

        target = _target(config, contract)
        return onnx.convert(config.source, compute_precision="fp16", minimum_deployment_target=target)


@contextlib.contextmanager
def one_line(source: Path | str) -> Iterator[None]:
    """coremltools raises bare exceptions of many lines; a full disk is not about `source` and passes."""
    try:
        yield
    except (OSError, DistillError):
        raise
    except Exception as error:
        if "FileWriter" in str(error):
            raise InputError(f"cannot write coremltools' temporary files: is {tempfile.gettempdir()} full?") from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{source}: coremltools cannot convert it: {lines[-1].strip()}") from error


def _target(config: ConvertConfig, contract: Contract | None) -> str:
    if contract is not None and config.target != "iOS18":
        if contract.states:
            raise InputError(f"--target {config.target}: a program with state needs iOS18")
        if compressed := sorted({weight.format for weight in contract.weights.values()} - {"fp16"}):
            raise InputError(f"--target {config.target}: weights in {', '.join(compressed)} need iOS18")
    return config.target


def _tensor_type(ct: Any, spec: TensorSpec) -> Any:
    return ct.TensorType(spec.name, shape=tuple(spec.shape), dtype=_dtype(spec))


def _dtype(spec: TensorSpec) -> Any:
    import numpy as np

    return np.dtype(spec.dtype).type


def check_state_writes(model: Any, contract: Lowered | None) -> None:
    """coremltools has been seen to drop state writes without a word: count them."""
    if contract is None or not contract.states:
        return
    expected = 2 * contract.model_config.num_hidden_layers
    operations = model._mil_program.functions["main"].operations
    found = sum(op.op_type in ("coreml_update_state", "write_state") for op in operations)
    updates = sum(op.op_type == "slice_update" for op in operations)
    if found < 1 or updates < expected:
        raise DistillError(f"conversion lost state writes: {updates} slice updates and {found} writes for {expected}")


def probes(model: Any, contract: Contract) -> dict[str, str]:
    """Twin module path -> the value that its last op makes, from the scopes that coremltools records.

    Only modules whose own call is in the graph have one; the value of a module is that of the last op whose scope
    lies in it.
    """
    out: dict[str, str] = {}
    for op in model._mil_program.functions["main"].operations:
        if op.op_type == "const" or not op.outputs:
            continue
        names = next((v for k, v in op.scopes.items() if k.name == "TORCHSCRIPT_MODULE_NAME"), None)
        if not names:
            continue
        for depth in range(1, len(names)):
            out[".".join(names[:depth])] = op.outputs[0].name
    if contract.mode == "prefill":
        out["logits"] = contract.outputs[0].name
    return out


def _onnx_probes(model: Any, contract: Contract) -> dict[str, str]:
    """Point -> value, following the names that the fp16 pass gives; a value that fusion removed has none."""
    made = {out.name for op in model._mil_program.functions["main"].operations for out in op.outputs}
    names = {
        point: next((n for n in (value, f"{value}_cast_fp16") if n in made), None)
        for point, value in contract.probes.items()
    }
    return {point: name for point, name in names.items() if name is not None}


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Parse and convert."""
    parser = argparse.ArgumentParser(prog="distill convert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=("pytorch", "onnx"), default="pytorch")
    parser.add_argument("--in", dest="source", type=Path, required=True, help="exported .pt or an .onnx file")
    parser.add_argument("--out", type=Path, required=True, help="X.mlpackage")
    parser.add_argument("--seq", type=int, help="sequence length that the program must have")
    parser.add_argument("--compute-units", choices=sorted(COMPUTE_UNITS), default="all")
    parser.add_argument("--contract", type=Path, help="default: <name>_contract.json beside the input")
    parser.add_argument(
        "--allow-placeholder",
        action="store_true",
        help="without coremltools, write a folder marked PLACEHOLDER instead of failing",
    )
    parser.add_argument("--target", choices=TARGETS, default="iOS18", help="minimum deployment target")
    args = parser.parse_args(argv)
    config = ConvertConfig(
        args.source,
        args.out,
        args.backend,
        args.seq,
        args.compute_units,
        args.contract,
        args.allow_placeholder,
        args.target,
    )
    print(f"converting {config.source} ({config.backend}) to {config.out}", flush=True)
    contract = run(config)
    if (config.out / "PLACEHOLDER").exists():
        print(f"SKIPPED: {config.out} is a placeholder: coremltools is not installed")
        return 0
    size = sum(f.stat().st_size for f in config.out.rglob("*") if f.is_file())
    what = (
        "no contract beside the input, so none in the package"
        if contract is None
        else f"weights sha256 {contract.file.sha256[:12] if contract.file else 'none'}"
    )
    print(f"wrote {config.out}: {size / 1e6:.2f} MB, {what}")
    return 0
