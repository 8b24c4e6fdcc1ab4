"""The ways to fit a law that foretells a run's loss, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llm_jax.errors import UserError
from llm_jax.scaling.laws import envelope, isoflop, power, surface, tied
from llm_jax.scaling.runs import Runs

NEAR = 0.02  # of a budget's lowest loss: what "near" is fitted to

Law = Any  # see laws/: a dataclass with some of loss, optimum, frontier


class Method(NamedTuple):
    """fit: (runs) -> law. refit: (law, runs, weights [repeats, runs], losses or None) -> law of arrays.

    about: one line. runs: which of a table's runs are fitted. quick: finds what ``fit`` finds, where it has
    to be found often. by: a column whose rows of one value are resampled together."""

    about: str
    fit: Callable[[Runs], Law]
    refit: Callable[..., Law]
    runs: Callable[[Runs], Runs] = lambda runs: runs
    quick: Callable[[Runs], Law] | None = None
    by: str = ""


def near_optimum(runs: Runs) -> Runs:
    """Of every isoFLOP budget with a minimum the runs whose loss is near the lowest: the form of a surface
    must then be right where it is used, and need not be elsewhere. Raises UserError without budgets."""
    kept = np.zeros(len(runs), bool)
    for budget in isoflop.budgets(runs):
        if not budget.interior:
            continue
        at = np.abs(np.log(runs.flops / budget.flops)) <= 2 * isoflop.TOLERANCE
        kept |= at & (runs.loss <= (1 + NEAR) * runs.loss[at].min())
    if not kept.any():
        raise UserError("no isoFLOP budget has its minimum within the sizes tried")
    return runs.take(kept)


METHODS = {
    "surface": Method(
        "E + A/N^alpha + B/D^beta, Huber's loss, 4,500 starts",
        surface.fit,
        surface.refit,
        quick=surface.fit_projected,
    ),
    "projected": Method("the same minimum by variable projection", surface.fit_projected, surface.refit),
    "tied": Method("the surface with one exponent for N and D", tied.fit, tied.refit),
    "near": Method("the surface near the isoFLOP minima", surface.fit_projected, surface.refit, near_optimum),
    "frontier": Method("power laws through the isoFLOP minima", isoflop.fit, isoflop.refit),
    "envelope": Method(
        "power laws along the envelope of training curves", envelope.fit, envelope.refit, by=envelope.RUN
    ),
    "kaplan": Method("[(Nc/N)^(aN/aD) + Dc/D]^aD, no irreducible loss", power.fit, power.refit),
}
