"""Build the deployment bundle of a trained student, or prove that one is whole, unaltered and answers.

distill deploy [--config configs/deploy.yaml] [--package X.mlpackage] [--allow-failed-gates]
distill deploy verify DIR [--manifest-sha256 HEX] [--all-gates]
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from distill import config, gates
from distill.errors import InputError, stage_main

DEFAULT_CONFIG = Path("configs/deploy.yaml")


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Build, or verify. Exit 0 done; 1 a gate did not pass; 2 bad input."""
    args = sys.argv[1:] if argv is None else argv
    return _verify(args[1:]) if args[:1] == ["verify"] else _build(args)


def _build(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="distill deploy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help=f"default: {DEFAULT_CONFIG}; its keys are "
                        "documented in distill/deploy/config.py")  # fmt: skip
    parser.add_argument("--package", type=Path, help="bundle this package of the checkpoint instead of building one")
    parser.add_argument("--allow-failed-gates", action="store_true", help="build although gates did not pass, and say "
                        "so in the manifest and the model card")  # fmt: skip
    args = parser.parse_args(argv)
    from distill.deploy import bundle
    from distill.deploy.config import DeployConfig

    settings = config.load(args.config, DeployConfig)

    def say(line: str) -> None:
        print(line, flush=True)

    built = bundle.run(settings, args.package, allow_failed=args.allow_failed_gates, say=say)
    last = f"wrote {built.path}, manifest sha256 {built.manifest_sha256}"
    print(last + _although(built.overridden, "--allow-failed-gates"))
    return 0


def _verify(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="distill deploy verify", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="DIR")
    parser.add_argument("--manifest-sha256", metavar="HEX", help="what the manifest must be, as the build printed it")
    parser.add_argument("--all-gates", action="store_true", help="run every gate of the package's contract again")
    args = parser.parse_args(argv)
    pinned = args.manifest_sha256
    if pinned is not None and not re.fullmatch(r"[0-9a-f]{64}", pinned):
        raise InputError(f"--manifest-sha256 {pinned!a}: 64 digits of lower-case hexadecimal are expected")
    from distill.deploy import verify

    found = verify.run(args.bundle, pinned, all_gates=args.all_gates)
    print(gates.table(found.gates))
    if found.answer:
        print(f"it writes: {found.answer!r}")
    print(f"manifest sha256: {found.manifest_sha256}")
    print(f"{args.bundle}: {gates.summary(found.gates)}" + _although(found.manifest.overridden, "built"))
    return gates.exit_code(found.gates)


def _although(overridden: list[str], who: str) -> str:
    if not overridden:
        return ""
    names = ", ".join(line.split(" (")[0] for line in overridden)
    return f"; {who} although {len(overridden)} gates had not passed: {names}"
