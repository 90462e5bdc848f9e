"""The operators, one file a family. Importing this package fills the table."""

from distill.mil.ops import (
    activation,
    compression,
    control_flow,
    elementwise,
    gather,
    linear,
    normalization,
    reduction,
    shaping,
    slicing,
    state,
    tensor,
)

__all__ = [
    "activation",
    "compression",
    "control_flow",
    "elementwise",
    "gather",
    "linear",
    "normalization",
    "reduction",
    "shaping",
    "slicing",
    "state",
    "tensor",
]
