"""Stage `qat`: quantisation-aware training, the distillation continued through the weights that the device will have.

python -m training.quantise --config configs/quant_qat_int8.yaml [--plan] [--restart] [--max-steps N]
"""

from __future__ import annotations

from distill.errors import ConfigError, stage_main
from distill.train import kd
from distill.train.config import TrainConfig
from distill.train.process import require_checkpoint


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Train on, in the formats that the configuration names; --max-steps 0: their formats alone, without training."""
    what = "Quantisation-aware training: train a checkpoint on through its weights as deployed (quantisation.formats)."
    return kd.command(argv, "distill qat", what, require_formats)


def require_formats(config: TrainConfig) -> None:
    """ConfigError unless the run has formats, and a checkpoint to start from."""
    if config.quantisation is None:
        raise ConfigError("quantisation.formats: the weight formats to train in are missing, such as {blocks: int8}")
    require_checkpoint(config)
