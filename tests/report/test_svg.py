"""Axes, points and bands of charts."""

import re

import pytest

from llm_jax.report import svg
from llm_jax.report.svg import Band, Series

CENTRES = re.compile(r'<circle cx="([\d.]+)" cy="([\d.]+)"')


def centres(chart):
    return [tuple(map(float, pair)) for pair in CENTRES.findall(chart)]


def test_equal_factors_are_equal_steps():
    x, y = [1e9, 1e11, 1e13], [2.0, 20.0, 200.0]
    (x0, y0), (x1, y1), (x2, y2) = centres(svg.chart("t", [Series("a", x, y, True)], log_x=True, log_y=True))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    (x0, _), (x1, _), (x2, _) = centres(svg.chart("t", [Series("a", x, y, True)]))
    assert x2 - x1 > 50 * (x1 - x0)


@pytest.mark.parametrize("ends", [(1e9, 1e14), (3e11, 3e12), (1.9, 2.3), (7.0, 7.0), (1e-6, 1e40)])
def test_ticks_of_a_logarithmic_axis(ends):
    axis = svg.axis(*ends, log=True)
    assert axis.low < ends[0] <= ends[1] < axis.high
    assert 1 <= len(axis.ticks) <= 9 and all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert 0 < axis.share(ends[0]) <= axis.share(ends[1]) < 1


def test_wide_axes_have_decades_and_narrow_ones_round_numbers():
    assert svg.axis(1e9, 1e12, log=True).ticks == [1e9, 1e10, 1e11, 1e12]
    assert svg.axis(3e11, 3e12, log=True).ticks == [5e11, 1e12, 2e12]
    assert svg.axis(1.9, 2.3, log=True).ticks == pytest.approx([1.9, 2.0, 2.1, 2.2, 2.3])
    assert [svg.short(x) for x in (1e12, 250, 1.5e-7, 2.25, 12345)] == [
        "1e12",
        "250",
        "1.5e-7",
        "2.25",
        "1.234e4",
    ]


def test_points_without_a_line():
    drawn = svg.chart("t", [Series("a", [1, 2], [1, 2], joined=False, tips=["first <", "second"])])
    assert "<polyline" not in drawn and len(centres(drawn)) == 2
    assert "<title>first &lt;</title>" in drawn and "<title>second</title>" in drawn
    ring = svg.chart("t", [Series("a", [1], [1], joined=False, hollow=True, colour="#123456")])
    assert 'stroke="#123456"' in ring and 'fill="#123456"' not in ring


def test_many_points_are_thinned_as_they_are():
    """Not to means, which nobody measured."""
    count = 3 * svg.MOST_POINTS
    kept = svg.thin(Series("a", range(count), [float(i % 2) for i in range(count)], joined=False))
    assert len(kept.x) == svg.MOST_POINTS and {*kept.y} <= {0.0, 1.0}


def test_a_band_is_inside_the_axes_and_behind_the_lines():
    line = Series("a", [1, 2], [10, 10])
    drawn = svg.chart("t", [line], bands=[Band([1, 2], [0, 2], [50, 80], "red")])
    points = [
        tuple(map(float, p.split(","))) for p in re.search(r'polygon points="([^"]*)"', drawn)[1].split()
    ]
    assert len(points) == 4 and drawn.index("<polygon") < drawn.index("<polyline")
    assert all(svg.TOP <= y <= svg.HEIGHT - svg.BOTTOM for _, y in points)
    (_, low), *_, (_, high) = points
    assert high < low  # upwards on a page


def test_nameless_lines_are_not_in_the_legend():
    alone = svg.chart("t", [Series("a", [0, 1], [0, 1])])
    both = svg.chart("t", [Series("a", [0, 1], [0, 1]), Series("", [0, 1], [1, 0])])
    assert both.count("<text") == alone.count("<text") and both.count("<polyline") == 2
