"""Convert every program of an export folder: the primary prefill shape is model.mlpackage, decode is decode.mlpackage.

distill convert-all --in models/student/exported --out coreml/artifacts/worker
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill.contract import Contract, read_contract
from distill.convert import coreml
from distill.errors import InputError, stage_main


def run(source: Path, out: Path) -> list[Path]:
    """Convert all; returns the packages, the primary first. InputError if there is no prefill program."""
    contracts = {path: read_contract(path) for path in sorted(source.glob("*_contract.json"))}
    primary = next((p for p, c in contracts.items() if c.mode == "prefill" and c.sequence() == _primary(c)), None)
    if primary is None:
        raise InputError(f"{source}: holds no exported prefill program; run make pytorch-worker first")
    lengths = {c.sequence() for c in contracts.values() if c.mode == "prefill"}
    if absent := sorted(set(contracts[primary].enumerated_T) - lengths):
        raise InputError(f"{source}: lacks the enumerated T = {', '.join(map(str, absent))}; export it again")
    packages = []
    for path in [primary, *(p for p in contracts if p != primary)]:
        contract = contracts[path]
        name = {"decode": "decode", "block": "block"}.get(contract.mode, f"prefill_T{contract.sequence()}")
        package = out / f"{'model' if path == primary else name}.mlpackage"
        assert contract.file is not None
        print(f"converting {contract.file.name} to {package}", flush=True)
        coreml.run(coreml.ConvertConfig(source / contract.file.name, package, contract=path))
        packages.append(package)
    return packages


def _primary(contract: Contract) -> int:
    return int(contract.made_by.get("config", {}).get("primary", 0))


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Parse and convert."""
    parser = argparse.ArgumentParser(prog="distill convert-all", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--in", dest="source", type=Path, default=Path("models/student/exported"))
    parser.add_argument("--out", type=Path, default=Path("coreml/artifacts/worker"))
    args = parser.parse_args(argv)
    packages = run(args.source, args.out)
    print(f"wrote {len(packages)} packages to {args.out}")
    return 0
