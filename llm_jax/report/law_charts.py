"""The charts of a scaling law, each with a sentence that says what to look for."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

import numpy as np

from llm_jax.report import svg
from llm_jax.report.law_reader import Findings
from llm_jax.report.svg import Band, Series, short
from llm_jax.scaling import backtest, forecast
from llm_jax.scaling.laws import isoflop, resample
from llm_jax.scaling.laws.isoflop import Budget
from llm_jax.scaling.laws.methods import Law
from llm_jax.scaling.runs import Runs

PALETTE = (*svg.COLOURS, "#0891b2", "#db2777")  # of methods, the same in all charts
INK, GREY = "#0f172a", "#94a3b8"  # of what was seen, and of 0
POINTS = 60  # of a law's line
MOST_NAMES = 8  # of budgets, in a legend
BESIDE = 1.02  # between points of two methods at one place
ROOM = 1.3  # to the right of the points, for a legend of many methods


def charts(found: Findings) -> str:
    """All that there is something to show in."""
    drawn = [isoflops(found), losses(found), misfits(found), sizes(found), residuals(found)]
    drawn += [trials(found, kind) for kind in (backtest.FRONTIER, backtest.RUNS)]
    return "".join(f'<div>{chart}<p class="sub">{escape(says)}</p></div>' for chart, says in drawn if chart)


def isoflops(found: Findings) -> tuple[str, str]:
    series, count = [], len(found.budgets)
    for i, budget in enumerate(found.budgets):
        at, colour = found.at(budget), f"hsl({230 * (1 - i / max(1, count - 1)):.0f} 70% 42%)"
        named = short(float(f"{budget.flops:.2g}")) if i % -(-count // MOST_NAMES) == 0 else ""
        tips = [tip(at, j) for j in range(len(at))]
        series.append(Series(named, at.params, at.loss, joined=False, colour=colour, tips=tips))
        if budget.interior:  # another's is an extrapolation, and may be anything
            line = valley(budget, at)
            series.append(Series("", line, budget.at(line), colour=colour))
        series.append(lowest(found, budget, colour))
    chart = svg.chart("loss over N, by FLOPs, nats a token", series, "N, parameters", log_x=True)
    return chart, (
        "Each budget should have its lowest point (large dot) well inside the sizes tried; a ring is the "
        "best run of one that has not, which no frontier goes through."
    )


def losses(found: Findings) -> tuple[str, str]:
    """The best loss over compute."""
    series, bands = best(found)
    chart = svg.chart("loss of the best size, nats a token", series, "C, FLOPs", bands, True, True)
    return chart, (
        "The lines should go through the minima and agree beyond them; where they part, the forecast hangs "
        "on which form is right."
    )


def misfits(found: Findings) -> tuple[str, str]:
    """The same, as a share of what the chosen law says."""
    series, bands = best(found)
    name = found.method(backtest.FRONTIER)

    def over(flops: np.ndarray, loss: np.ndarray) -> np.ndarray:
        return 100 * (np.asarray(loss) / found.laws[name][0].frontier(np.asarray(flops)) - 1)

    series = [line._replace(y=over(line.x, line.y)) for line in series]
    bands = [b._replace(low=over(b.x, b.low), high=over(b.x, b.high)) for b in bands]
    title = f"best loss over {name}'s, percent"
    return svg.chart(title, series, "C, FLOPs", bands, log_x=True), (
        f"The {forecast.LEVEL:.0%} bands are of resampled fits, which know of noise alone; the forecast's "
        "bar also has what its method missed in the backtest, and what was seen (ring) should lie on it."
    )


def best(found: Findings) -> tuple[list[Series], list[Band]]:
    """The lines of laws, the minima, the forecast and what came of it."""
    series, bands = laws(found, lambda law, flops: law.frontier(flops))
    series += minima(found, lambda dot: dot.y) or everything(found.runs)
    if made := found.forecast:
        colour, bar = colour_of(found, made.method), (made.low, made.high)
        says = f"forecast {made.loss:.4f}, {made.level:.0%} between {made.low:.4f} and {made.high:.4f}"
        series.append(Series("forecast", [made.flops], [made.loss], True, False, colour=colour, tips=[says]))
        series.append(Series("", [made.flops] * 2, bar, colour=colour))
        if found.score:
            says, seen = f"seen {found.score['seen']:.4f}", [found.score["seen"]]
            series.append(Series("seen", [made.flops], seen, True, False, 6, True, INK, [says]))
    return series, bands


def sizes(found: Findings) -> tuple[str, str]:
    """The best size over compute."""
    series, bands = laws(found, lambda law, flops: law.optimum(flops)[0])
    series += minima(found, lambda dot: dot.x)
    if made := found.forecast:
        says = [f"N = {short(made.params)}, D = {short(made.tokens)}"]
        series.append(Series("foretold run", [made.flops], [made.params], True, False, 6, True, INK, says))
    chart = svg.chart("best size N*, parameters", series, "C, FLOPs", bands, True, True)
    return chart, (
        "The slope is the exponent a of N* ~ C^a; minima that lie off a line by more than its band say that "
        "the exponent hangs on which budgets are fitted."
    )


def residuals(found: Findings) -> tuple[str, str]:
    runs = found.runs
    series = [zero(runs.flops.min(), runs.flops.max())]
    tips = [tip(runs, i) for i in range(len(runs))]
    name = found.method(backtest.RUNS)
    fits = {name: found.laws[name][0].loss(runs.params, runs.tokens)} if name else {}
    if found.budgets:
        fits["parabolas"] = isoflop.fitted(runs)
    for fit, there in fits.items():
        kept = np.flatnonzero(np.isfinite(there))
        over = 100 * (runs.loss / there - 1)
        says = [f"{over[i]:+.3f}%: {tips[i]}" for i in kept]
        colour = colour_of(found, fit) if fit == name else INK
        series.append(Series(fit, runs.flops[kept], over[kept], joined=False, colour=colour, tips=says))
    chart = svg.chart("loss seen over loss fitted, percent", series, "C, FLOPs", log_x=True)
    return chart, (
        "Points should scatter about 0 without a trend or a bend over compute: one says that the form is "
        "wrong, however small the residual."
    )


def trials(found: Findings, kind: str) -> tuple[str, str]:
    """The backtest of one question."""
    names, tried = list(found.laws), [t for t in found.content["backtest"] if t["kind"] == kind]
    series = [zero(1.0, ROOM * max(t["flops"] / t["origin"] for t in tried))] if tried else []
    for i, name in enumerate(names):
        own = [t for t in tried if t["method"] == name]
        beside = BESIDE ** (i - (len(names) - 1) / 2)
        says = [
            f"{name}: {t['error']:+.3%}; of {t['fitted']} runs up to {short(t['origin'])} FLOPs, for "
            f"{short(t['flops'])}: foretold {t['predicted']:.4f}, seen {t['seen']:.4f}"
            for t in own
        ]
        x, y = [beside * t["flops"] / t["origin"] for t in own], [100 * t["error"] for t in own]
        series.append(Series(name, x, y, joined=False, colour=colour_of(found, name), tips=says))
    title = {backtest.FRONTIER: "best losses", backtest.RUNS: "single runs"}[kind]
    chart = svg.chart(f"backtest: {title}, percent off", series, "times the compute fitted", log_x=True)
    return chart, (
        "A method to believe stays near 0 and does not drift to one side further ahead; above 0 it foretold "
        "too high a loss. Methods are set side by side, with at most 500 points each."
    )


def laws(found: Findings, what: Callable[[Law, np.ndarray], np.ndarray]) -> tuple[list[Series], list[Band]]:
    """Lines over compute, out to what is foretold, and the bands of their resamples."""
    start = min((budget.flops for budget in found.budgets), default=found.runs.flops.min())
    end = found.forecast.flops if found.forecast else found.content["horizon"] * found.content["largest"]
    flops = np.geomspace(start, 1.1 * end, POINTS)
    series, bands = [], []
    for name in found.lines():
        law, resampled = found.laws[name]
        series.append(Series(name, flops, what(law, flops), colour=colour_of(found, name)))
        if resampled is not None:
            edges = resample.interval(what(resampled, flops), forecast.LEVEL)
            if np.isfinite(edges).all():
                bands.append(Band(flops, *edges, colour_of(found, name)))
    return series, bands


def minima(found: Findings, what: Callable[[Series], list[float]]) -> list[Series]:
    """The minima of all budgets over compute, rings for what is none."""
    dots = [(budget.flops, lowest(found, budget, INK)) for budget in found.budgets]
    return [
        dot._replace(name="minima" if i == 0 else "", x=[flops], y=what(dot), radius=4)
        for i, (flops, dot) in enumerate(dots)
    ]


def zero(start: float, end: float) -> Series:
    return Series("", [start, end], [0.0, 0.0], colour=GREY)


def everything(runs: Runs) -> list[Series]:
    tips = [tip(runs, i) for i in range(len(runs))]
    return [Series("runs", runs.flops, runs.loss, joined=False, colour=INK, tips=tips)]


def valley(budget: Budget, at: Runs) -> np.ndarray:
    """Sizes to draw a parabola over: those tried, without the ends where it is far above all runs."""
    line = np.geomspace(at.params.min(), at.params.max(), POINTS)
    return line[budget.at(line) <= 1.02 * at.loss.max()]


def lowest(found: Findings, budget: Budget, colour: str) -> Series:
    """A budget's minimum, or a ring at its best run where it has none within its sizes."""
    at = found.at(budget)
    best = np.argmin(at.loss)
    x, y = (budget.params, budget.loss) if budget.interior else (at.params[best], at.loss[best])
    what = "minimum" if budget.interior else "no minimum among the sizes tried; the best run"
    says = f"{short(budget.flops)} FLOPs: {what}, N = {short(x)}, loss {y:.4f}"
    return Series("", [x], [y], True, False, 6, not budget.interior, colour, [says])


def colour_of(found: Findings, method: str) -> str:
    return PALETTE[list(found.laws).index(method) % len(PALETTE)]


def tip(runs: Runs, i: int) -> str:
    n, d, c = (short(values[i]) for values in (runs.params, runs.tokens, runs.flops))
    return f"N = {n}, D = {d}, {c} FLOPs: {runs.loss[i]:.4f}"
