"""Line charts as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 36
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#475569")
MOST_POINTS = 500


class Series(NamedTuple):
    """One line: finite values over x, and whether its points are marked."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marked: bool = False


def chart(title: str, series: Sequence[Series], x_label: str = "step") -> str:
    """An <svg> with axes and a legend; "" when no series has a point."""
    series = [thin(line) for line in series if len(line.x)]
    if not series:
        return ""
    x_ticks = ticks(min(min(s.x) for s in series), max(max(s.x) for s in series))
    y_ticks = ticks(min(min(s.y) for s in series), max(max(s.y) for s in series))

    def px(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>']
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{label(y)}</text>')
    for x in x_ticks:
        place = f'x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 16}"'
        parts.append(f'<text {place} text-anchor="middle">{label(x)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    across = sum(8 * len(line.name) + 12 for line in series) < WIDTH / 2  # beside the title; else stacked
    right, down = WIDTH - RIGHT, 18 if across else TOP + 12
    for i, line in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        points = [(px(x), py(y)) for x, y in zip(line.x, line.y, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" stroke="{colour}"/>')
        if line.marked:
            for (x, y), value in zip(points, line.y, strict=True):
                tip = f"<title>{value:.4f}</title>"
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">{tip}</circle>')
        style = f'text-anchor="end" style="fill:{colour}"'
        parts.append(f'<text x="{right}" y="{down}" {style}>{escape(line.name)}</text>')
        right, down = (right - 8 * len(line.name) - 12, down) if across else (right, down + 14)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def thin(line: Series) -> Series:
    """At most MOST_POINTS points, each the mean of its neighbours."""
    width = -(-len(line.x) // MOST_POINTS)
    if width == 1:
        return line
    groups = range(0, len(line.x), width)
    xs = [line.x[min(i + width, len(line.x)) - 1] for i in groups]
    ys = [sum(part) / len(part) for part in (line.y[i : i + width] for i in groups)]
    return line._replace(x=xs, y=ys)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``, about ``count`` of them."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(m for m in (1, 2, 5, 10) if m * unit >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def label(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:,.10g}" if abs(value) < 1e6 else f"{value / 1e6:,.4g}M"
