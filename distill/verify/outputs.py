"""Outputs that say something: finite, and not the same for every input."""

from __future__ import annotations

import numpy as np

from distill import gates
from distill.gates import Gate

_EXECUTOR = "distill.mil"


def finite(logits: np.ndarray) -> Gate:
    """No NaN and no infinity."""
    bad = int(np.count_nonzero(~np.isfinite(logits)))
    return gates.at_most(bad, 0, backend=_EXECUTOR, reason=f"{bad} of {logits.size} values" if bad else None)


def vary(logits: np.ndarray) -> Gate:
    """Neither constant over the vocabulary at any position, nor equal at all positions."""
    over_vocab = float(np.min(np.ptp(logits, axis=-1)))
    over_positions = float(np.ptp(logits, axis=1).max()) if logits.shape[1] > 1 else over_vocab
    ok = over_vocab > 0 and over_positions > 0
    return gates.holds(
        ok,
        observed=min(over_vocab, over_positions),
        backend=_EXECUTOR,
        reason=None if ok else "the output does not depend on the input",
    )
