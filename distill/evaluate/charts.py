"""Small drawings of rates and differences, as SVG that needs no script."""

from __future__ import annotations

from collections.abc import Sequence

from distill.markup import Markup, text

_WIDTH, _HEIGHT = 190, 18
STYLE = """
svg.plot rect { fill: var(--soft) } svg.plot rect.part { fill: #2da44e } svg.plot line { stroke: currentColor }
svg.plot line.limit { stroke: #8250df; stroke-width: 2 } svg.plot line.zero { stroke: #8888 }
svg.plot line.spread { stroke: var(--bar); stroke-width: 2 } svg.plot circle { fill: var(--bar) }
svg.plot .better.better { fill: #2da44e; stroke: #2da44e } svg.plot .worse.worse { fill: #e5534b; stroke: #e5534b }
"""


def rate(value: float | None, ends: Sequence[float] | None, limit: float | None) -> Markup:
    """A rate on 0 to 1: a dot, its interval as a whisker, and the threshold as an upright line."""
    said = "nothing counted" if value is None else f"{value:.4f}"
    return _plot(said, value, ends, (0.0, 1.0), marks=[] if limit is None else [("limit", limit)])


def difference(value: float | None, ends: Sequence[float] | None, reach: float, verdict: str) -> Markup:
    """A difference on -reach to reach, coloured where the verdict is better or worse."""
    kind = verdict if verdict in ("better", "worse") else ""
    said = "nothing counted" if value is None else f"{value:+.4f}"
    return _plot(said, value, ends, (-reach, reach), marks=[("zero", 0.0)], kind=kind)


def share(part: int, whole: int) -> Markup:
    """So many of so many, as a bar."""
    width = round(_WIDTH / 2 * part / whole, 1) if whole else 0
    size = f'width="{_WIDTH // 2}" height="{_HEIGHT}"'
    return Markup(f'<svg class="plot" {size} role="img" aria-label="{part} of {whole}">'
                  f'<rect y="4" width="{_WIDTH // 2}" height="10"/>'
                  f'<rect class="part" y="4" width="{width}" height="10"/></svg>')  # fmt: skip


def _plot(
    said: str, value: float | None, ends: Sequence[float] | None, axis: tuple[float, float],
    marks: Sequence[tuple[str, float]], kind: str = "",
) -> Markup:  # fmt: skip
    low, high = axis

    def x(at: float) -> float:
        inside = min(max((at - low) / (high - low), 0.0), 1.0)
        return round(5 + inside * (_WIDTH - 10), 1)

    middle = _HEIGHT / 2
    drawn = f'<rect x="5" y="{middle - 2}" width="{_WIDTH - 10}" height="4"/>'
    drawn += "".join(
        f'<line class="{name}" x1="{x(at)}" x2="{x(at)}" y1="1" y2="{_HEIGHT - 1}"/>' for name, at in marks
    )
    if ends is not None:
        drawn += f'<line class="spread {kind}" x1="{x(ends[0])}" x2="{x(ends[1])}" y1="{middle}" y2="{middle}"/>'
        drawn += "".join(f'<line class="spread {kind}" x1="{x(at)}" x2="{x(at)}" y1="{middle - 4}" y2="{middle + 4}"/>'
                         for at in ends)  # fmt: skip
    if value is not None:
        drawn += f'<circle class="{kind}" cx="{x(value)}" cy="{middle}" r="4"/>'
    return Markup(f'<svg class="plot" width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{text(said)}">'
                  f"{drawn}</svg>")  # fmt: skip
