"""Aligned plain text. Names come from packages, so nothing unprintable reaches the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[object]], indent: str = "  ") -> str:
    """Columns of equal width; a column whose cells are all numbers is right-aligned."""
    lines = [list(map(printable, header)), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = [all(_is_number(line[i]) for line in lines[1:]) for i in range(len(header))]
    out = []
    for line in lines:
        cells = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right))
        out.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(out)


def printable(value: object) -> str:
    """Text on one line; a float in few digits."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isprintable() else "?" for c in text)


def size(count: int) -> str:
    """Bytes in the largest unit that leaves at least one."""
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{count} bytes" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def plain(value: Any) -> Any:
    """For JSON, which has neither NaN nor infinities: they become text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(cell: str) -> bool:
    try:
        float(cell or "0")
    except ValueError:
        return False
    return True
