"""A study, a ladder's plan and a forecast as lines to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm_jax.scaling import backtest
from llm_jax.scaling.cost import HOUR, Fleet
from llm_jax.scaling.forecast import Forecast
from llm_jax.scaling.ladder import Ladder
from llm_jax.scaling.study import AHEAD
from llm_jax.training.progress import clock

CONSTANTS = (
    "E",
    "A",
    "B",
    "K",
    "Nc",
    "Dc",
    "alpha",
    "beta",
    "gamma",
    "alpha_N",
    "alpha_D",
    "G",
    "H",
    "b",
    "a",
)


def study_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What a study found: laws, intervals, backtest, what it hangs on."""
    runs = found["table"]["runs"]
    yield f"{runs} runs up to {found['largest']:.4g} FLOPs"
    for name, entry in found["methods"].items():
        yield ""
        yield f"{name}: {entry['about']} ({entry['runs']} runs)"
        yield from (f"  {line}" for line in _constants(entry))
        scores = ", ".join(f"{kind} {score:.2%}" for kind, score in entry["backtest"].items())
        objective = f", objective {entry['objective']:.6g}" if "objective" in entry else ""
        yield f"  residual {entry['residual']:.2%}{objective}; backtest {scores or 'has no origin'}"
    for name, reason in found["failed"].items():
        yield f"\n{name}: not fitted; {reason}"
    for name, constants in found["further"].items():
        yield f"\n{name}: {_inline(constants)}"
    if found["sensitivity"]:
        yield ""
        yield from _table(
            ("surface, if", "E", "alpha", "beta", "a", f"loss at {AHEAD:g}x"),
            [
                (row["what"], *(f"{row[k]:.4f}" for k in ("E", "alpha", "beta", "a", "ahead")))
                for row in found["sensitivity"]
            ],
        )
    yield ""
    for kind, name in found["chosen"].items():
        score = found["methods"][name]["backtest"][kind]
        yield f"{QUESTIONS[kind]}: {name}, whose backtest was {score:.2%} off at up to {found['horizon']:g}x"
    if not found["chosen"]:
        yield "no backtest was possible: too few runs, or of one budget; a forecast from them is a guess"


QUESTIONS = {
    backtest.RUNS: "for the loss of a run of given size and tokens",
    backtest.FRONTIER: "for the best loss of a budget",
}


def _inline(values: Mapping[str, Any]) -> str:
    """{name: number, text or more of the same} in one line."""
    shown = {k: f"({_inline(v)})" if isinstance(v, Mapping) else v for k, v in values.items()}
    return ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())


def _constants(entry: Mapping[str, Any]) -> Iterator[str]:
    intervals = entry.get("intervals", {})
    for name in CONSTANTS:
        if name in entry:
            low, high = intervals.get(name, (None, None))
            between = f"  95%: {low:.6g} to {high:.6g}" if low is not None else ""
            yield f"{name:8}{entry[name]:<12.6g}{between}".rstrip()


def plan_lines(rows: Sequence[Mapping[str, Any]], ladder: Ladder, price: float | None) -> Iterator[str]:
    """A ladder's runs before any is made, from ladder.describe. price: dollars a chip-hour."""
    chips = 0 if ladder.machine == "cpu" else Fleet.parse(ladder.machine).chips
    yield from _table(
        ("budget", "shape", "N = C/6D", "tokens", "batch", "steps", "rate", "FLOPs", "time", "chip-hours"),
        [
            (
                f"{row['budget']:.3g}",
                row["shape"],
                f"{row['params']:.4g}",
                f"{row['tokens']:,}",
                f"{row['batch']:,}",
                f"{row['steps']:,}",
                f"{row['rate']:.4g}",
                f"{row['flops']:.4g}",
                clock(row["seconds"]),
                f"{chips * row['seconds'] / HOUR:.3g}" if chips else "-",
            )
            for row in rows
        ],
    )
    flops, seconds = (sum(row[key] for row in rows) for key in ("flops", "seconds"))
    last = rows[-1]["seconds"]
    yield (
        f"{flops:.4g} FLOPs in {len(rows)} runs; about {clock((seconds - last) / ladder.workers + last)}, "
        f"{ladder.workers} at a time, at {ladder.speed:.3g} FLOP/s each"
    )
    if price is not None and chips:
        yield f"{chips * seconds / HOUR:,.4g} chip-hours, {chips * seconds / HOUR * price:,.2f} dollars"


def forecast_lines(made: Forecast) -> Iterator[str]:
    yield (
        f"forecast of {made.made} by {made.method}: {made.loss:.4f} nats a token, "
        f"{made.level:.0%} between {made.low:.4f} and {made.high:.4f}"
    )
    yield f"  of {made.flops:.4g} FLOPs: {made.params:.4g} parameters, {made.tokens:.4g} tokens"


def score_line(scored: Mapping[str, Any]) -> str:
    where = "inside" if scored["inside"] else "OUTSIDE"
    return (
        f"foretold {scored['predicted']:.4f}, came out at {scored['seen']:.4f}: {scored['error']:+.2%}, "
        f"{where} {scored['low']:.4f} to {scored['high']:.4f}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        yield "  ".join((row[0].ljust(widths[0]), *cells))
