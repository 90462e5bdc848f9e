"""Stage `worker`: distil a student as a configuration says.

python -m training.distill_kd --config configs/worker_9b.yaml [--plan [RANKS]] [--restart] [--max-steps N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from distill.config import build, load_yaml
from distill.errors import InputError, stage_main
from distill.train import loop, memory
from distill.train.config import TrainConfig
from distill.train.distributed import launched
from distill.train.prepare import device_of, require_device


def load_config(path: str, max_steps: int | None = None) -> TrainConfig:
    """Read a training configuration; `max_steps` replaces its own."""
    data = load_yaml(path)
    if max_steps is not None:
        least = 0 if isinstance(data, dict) and data.get("quantisation") else 1
        if max_steps < least:
            raise InputError(f"--max-steps must be at least {least}, not {max_steps}")
        data["max_steps"] = max_steps
    return build(data, TrainConfig, path)


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Train."""
    return command(argv, "distill worker", "Distil a student from a KD dataset.", lambda config: None)


def command(argv: list[str] | None, prog: str, what: str, require: Callable[[TrainConfig], None]) -> int:
    """The command of a stage that trains; `require` raises ConfigError where the configuration is not for it."""
    parser = argparse.ArgumentParser(prog=prog, description=what)
    parser.add_argument(
        "--config", required=True, help="configs/*.yaml: every key is documented in distill/train/config.py"
    )
    world = launched()
    parser.add_argument("--plan", nargs="?", type=int, const=world.size, metavar="RANKS", help="print the plan, and "
                        "stop: bytes by kind and tokens a step, of a process on each of RANKS devices; of this run's"
                        )  # fmt: skip
    parser.add_argument("--restart", action="store_true", help="train anew over a stopped or finished run")
    parser.add_argument("--max-steps", type=int, help="stop after so many steps, whatever the configuration says "
                        "(the schedule ends there: another number is another run)")  # fmt: skip
    args = parser.parse_args(argv)
    config = load_config(args.config, args.max_steps)
    require(config)
    if args.plan is not None and args.plan < 1:
        raise InputError(f"--plan must be a number of processes, not {args.plan}")
    plan = memory.plan(config, device_of(config), args.plan or world.size)
    if world.first:
        print(plan.table(), flush=True)
    if args.plan is not None:
        return 0
    require_device(config)
    plan.require_fits()
    report = loop.run(config, restart=args.restart)
    values = report.values
    if not world.first:
        return 0
    trained = f"loss {values['first_loss']:.4f} -> {values['loss']:.4f}" if values["steps"] else "not trained"
    print(f"{report.checkpoint}: stage {values['stage']}, {values['steps']:,} steps, {values['tokens']:,} tokens, "
          f"{trained}")  # fmt: skip
    return 0
