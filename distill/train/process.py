"""Stage `proc`: process supervision, more training from a trained checkpoint with weights by kind of span.

python -m training.process_supervision --config configs/process_supervision.yaml [--plan] [--restart] [--max-steps N]
"""

from __future__ import annotations

from pathlib import Path

from distill.errors import ConfigError, stage_main
from distill.train import kd
from distill.train.config import TrainConfig


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Train on, from the checkpoint that the configuration names."""
    what = "Process supervision: train a checkpoint on, with weights by kind of span (span_weights)."
    return kd.command(argv, "distill proc", what, require_checkpoint)


def require_checkpoint(config: TrainConfig) -> None:
    """ConfigError unless the run starts from a checkpoint that is there and that it does not write over."""
    start = config.init.trained
    if start is None:
        raise ConfigError(f"init.checkpoint: stage {config.stage!r} starts from a trained checkpoint; give one")
    if not Path(start).is_file():
        raise ConfigError(f"{start}: no such checkpoint; `make worker` trains the one to start from")
    if config.final.resolve() == Path(start).resolve():
        raise ConfigError(f"stage {config.stage!r} would write over {start}, which it starts from; name another stage")
