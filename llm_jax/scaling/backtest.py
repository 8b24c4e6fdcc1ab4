"""Rolling-origin backtest: every method fitted on the cheaper runs of a table, judged on the dearer ones.

A small residual says nothing of extrapolation: on real isoFLOP sweeps surfaces whose residual was 0.3% have
missed by 3 to 5%. So what a method foretells is compared with what was seen, as a forecaster would have had
it (Tashman 2000, Int. J. Forecasting 16): fit up to an origin in compute, foretell what lies within
``horizon`` times it, move the origin on. Two questions are asked, and a method may be able to answer one:

    runs      the loss of a run of so many parameters and tokens
    frontier  the loss at the minimum of an isoFLOP budget: the best that so much compute can give
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from llm_jax.errors import UserError
from llm_jax.scaling.laws import isoflop
from llm_jax.scaling.laws.methods import METHODS, Law, Method
from llm_jax.scaling.runs import Runs

HORIZON = 3.5  # budgets are mostly half a decade apart
ORIGINS = 6  # at most
FEWEST = 6  # runs before the first origin
APART = 1.1  # origins closer than this are one
RUNS, FRONTIER = "runs", "frontier"


@dataclass(frozen=True)
class Trial:
    """What a method, fitted to the ``fitted`` runs up to ``origin`` FLOPs, foretold of one of ``flops``;
    losses in nats a token."""

    method: str
    kind: str
    origin: float
    fitted: int
    flops: float
    predicted: float
    seen: float

    @property
    def error(self) -> float:
        """As a share of what was seen."""
        return self.predicted / self.seen - 1.0


def backtest(
    runs: Runs, methods: Mapping[str, Method] = METHODS, horizon: float = HORIZON
) -> tuple[Trial, ...]:
    """The trials of all methods. One that cannot be fitted up to an origin has none there."""
    minima = [budget for budget in isoflop.budgets(runs) if budget.interior]
    trials = []
    for origin in origins(runs):
        known = runs.up_to(origin)
        ahead = runs.take((runs.flops > origin * (1 + 1e-6)) & (runs.flops <= origin * horizon))
        wanted = [b for b in minima if origin * APART < b.flops <= origin * horizon]
        for name, method in methods.items():
            try:
                law = (method.quick or method.fit)(method.runs(known))
            except UserError:  # too few runs, or budgets without a minimum
                continue
            trials += [
                Trial(name, kind, float(origin), len(known), *one) for kind, one in _judge(law, ahead, wanted)
            ]
    return tuple(trials)


def origins(runs: Runs) -> np.ndarray:
    """Compute [origins] up to which to fit: the levels of a table with budgets, evenly spaced others."""
    levels = [np.sort(runs.flops)[FEWEST - 1 :][0]] if len(runs) >= FEWEST else []
    for flops in np.sort(runs.flops)[FEWEST:]:
        if flops > levels[-1] * APART:
            levels.append(flops)
        else:  # of one budget the dearest, so that none of its runs is foretold by the others
            levels[-1] = flops
    levels = np.array(levels[:-1])
    if len(levels) <= ORIGINS:
        return levels
    return levels[np.unique(np.linspace(0, len(levels) - 1, ORIGINS).round().astype(int))]


def _judge(
    law: Law, ahead: Runs, minima: list[isoflop.Budget]
) -> Iterable[tuple[str, tuple[float, float, float]]]:
    """(kind, (flops, predicted, seen)) of all that a law can answer."""
    if hasattr(law, "loss") and len(ahead):
        foretold = law.loss(ahead.params, ahead.tokens)
        for one in zip(ahead.flops, foretold, ahead.loss, strict=True):
            yield RUNS, tuple(map(float, one))
    if hasattr(law, "frontier"):
        for budget in minima:
            yield FRONTIER, (budget.flops, float(law.frontier(budget.flops)), budget.loss)


def errors(trials: Iterable[Trial], method: str, kind: str) -> dict[float, np.ndarray]:
    """{origin: relative errors of a method's trials from there}."""
    found: dict[float, list[float]] = {}
    for trial in trials:
        if (trial.method, trial.kind) == (method, kind):
            found.setdefault(trial.origin, []).append(trial.error)
    return {origin: np.array(some) for origin, some in found.items()}


def scores(trials: tuple[Trial, ...], kind: str) -> dict[str, float]:
    """{method: mean |error|} of those that can answer: of each origin's trials, then of the origins, each by
    how many runs were fitted there, since one with few is less like the fit of them all. All are judged from
    the same origins, those where each has trials; a method that has none from the last one is left out."""
    fitted = {t.origin: t.fitted for t in trials}
    by_method = {t.method: errors(trials, t.method, kind) for t in trials if t.kind == kind}
    last = max((max(found) for found in by_method.values()), default=0.0)
    able = {name: found for name, found in by_method.items() if last in found}
    shared = [o for o in able[min(able)] if all(o in found for found in able.values())] if able else []
    return {
        name: float(
            np.average([np.abs(found[o]).mean() for o in shared], weights=[fitted[o] for o in shared])
        )
        for name, found in able.items()
    }


def choose(trials: tuple[Trial, ...], kind: str) -> str | None:
    """The method of least score, or None without a trial."""
    found = scores(trials, kind)
    return min(found, key=found.__getitem__, default=None)
