"""Charts as inline SVG: lines, points, bands between two lines, over plain or logarithmic axes."""

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
    """One line: finite values over x, and whether its points are marked.

    joined: False for points without a line, of which at most MOST_POINTS are drawn. radius, hollow: of the
    marks, and whether they are rings. colour: "" = the next of COLOURS. tips: what each mark says, else its
    value. A name of "" is not in the legend.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marked: bool = False
    joined: bool = True
    radius: int = 3
    hollow: bool = False
    colour: str = ""
    tips: Sequence[str] = ()


class Band(NamedTuple):
    """What is filled between two lines over x."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: str


class Axis(NamedTuple):
    """Its ends, the numbers that stand at it, and whether it is logarithmic."""

    low: float
    high: float
    ticks: list[float]
    log: bool

    def share(self, value: float) -> float:
        """How far from its low end to its high end, 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis(low: float, high: float, log: bool = False) -> Axis:
    """From at most ``low`` to at least ``high``."""
    if not log:
        numbers = ticks(low, high)
        return Axis(numbers[0], numbers[-1], numbers, log)
    room = (high / low) ** 0.04 if high > low else 2.0
    low, high = low / room, high * room
    return Axis(low, high, log_ticks(low, high), log)


class Frame(NamedTuple):
    """Where values lie in a drawing."""

    across: Axis
    up: Axis

    def x(self, value: float) -> float:
        return LEFT + self.across.share(value) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.up.share(value) * (HEIGHT - TOP - BOTTOM)


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str = "step",
    bands: Sequence[Band] = (),
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """An <svg> with axes and a legend; "" when no series has a point."""
    series = [thin(line) for line in series if len(line.x)]
    if not series:
        return ""
    series = [line._replace(colour=line.colour or COLOURS[i % len(COLOURS)]) for i, line in enumerate(series)]
    xs, ys = [s.x for s in (*series, *bands)], [s.y for s in series]
    ys += [edge for band in bands for edge in (band.low, band.high)]
    frame = Frame(
        *(
            axis(min(map(min, values)), max(map(max, values)), log)
            for values, log in ((xs, log_x), (ys, log_y))
        )
    )
    parts = [f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>', *axes(frame, x_label)]
    parts += [filled(band, frame) for band in bands]
    across = sum(8 * len(s.name) + 12 for s in series if s.name) < WIDTH / 2  # beside the title; else stacked
    right, down = WIDTH - RIGHT, 18 if across else TOP + 12
    for line in series:
        parts += drawn(line, frame)
        if line.name:
            style = f'text-anchor="end" style="fill:{line.colour}"'
            parts.append(f'<text x="{right}" y="{down}" {style}>{escape(line.name)}</text>')
            right, down = (right - 8 * len(line.name) - 12, down) if across else (right, down + 14)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def axes(frame: Frame, x_label: str) -> list[str]:
    parts = []
    for y in frame.up.ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {frame.y(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{frame.y(y) + 4:.1f}" text-anchor="end">{at(y, frame.up)}</text>'
        )
    for x in frame.across.ticks:
        place = f'x="{frame.x(x):.1f}" y="{HEIGHT - BOTTOM + 16}"'
        parts.append(f'<text {place} text-anchor="middle">{at(x, frame.across)}</text>')
    return [*parts, f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>']


def drawn(line: Series, frame: Frame) -> list[str]:
    """A line, then its marks."""
    points = [(frame.x(x), frame.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    parts = []
    if line.joined:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" stroke="{line.colour}"/>')
    if line.marked or not line.joined:
        ring = f'fill="#fff" fill-opacity="0" stroke="{line.colour}" stroke-width="1.6"'
        look = f'r="{line.radius}" ' + (ring if line.hollow else f'fill="{line.colour}"')
        for (x, y), tip in zip(points, line.tips or [f"{value:.4f}" for value in line.y], strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" {look}><title>{escape(tip)}</title></circle>')
    return parts


def filled(band: Band, frame: Frame) -> str:
    low = [(frame.x(x), frame.y(y)) for x, y in zip(band.x, band.low, strict=True)]
    high = [(frame.x(x), frame.y(y)) for x, y in zip(band.x, band.high, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*low, *reversed(high)))
    return f'<polygon points="{path}" fill="{band.colour}" fill-opacity="0.13"/>'


def thin(line: Series) -> Series:
    """At most MOST_POINTS points, each the mean of its neighbours; of points without a line some."""
    width = -(-len(line.x) // MOST_POINTS)
    if width == 1:
        return line
    if not line.joined:
        return line._replace(x=line.x[::width], y=line.y[::width], tips=line.tips[::width])
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


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Decades from ``low`` to ``high``; where these are fewer than three, 1, 2 and 5 of each, or round
    numbers."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5)):
        found = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k <= high]
        if len(found) >= 3:
            return found[:: -(-len(found) // most)]
    return [number for number in ticks(low, high) if low <= number <= high]


def at(value: float, place: Axis) -> str:
    """A tick's label."""
    return short(value) if place.log else label(value)


def short(value: float) -> str:
    """Four digits at most: 250, 1.5e11."""
    return f"{value:.4g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def label(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:,.10g}" if abs(value) < 1e6 else f"{value / 1e6:,.4g}M"
