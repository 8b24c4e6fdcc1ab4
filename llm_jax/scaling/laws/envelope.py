"""Frontier along the lower envelope of training curves (Hoffmann et al. 2022, arXiv 2203.15556, approach 1).

A table with many rows a run, its loss at one token count after another, has a curve of loss against FLOPs a
run. At each C the lowest curve gives N*, D* and L*, and power laws go through these. It takes a loss in the
middle of a run for that of a run that ends there, which holds for a constant learning rate or one that is
matched to each end; under one long decay it favours runs near their end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_jax.errors import UserError
from llm_jax.scaling.laws.isoflop import NOISE, Frontier, through
from llm_jax.scaling.runs import Runs

RUN = "run_name"
POINTS = 200  # values of C; the paper takes 1,500


@dataclass(frozen=True)
class Envelope:
    """What is lowest at each C: flops, params, tokens, loss [points], and its run's number, best [points]."""

    flops: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    best: np.ndarray


def fit(runs: Runs, by: str = RUN) -> Frontier:
    """by: the column that says which run a row is of. Raises UserError where it is missing, or where curves
    of fewer than two sizes are lowest with one of a smaller and one of a larger size above them."""
    found = envelope(runs, by)
    if len(np.unique(found.params)) < 2:
        raise UserError(
            f"envelope: curves by {by!r} have {len(np.unique(found.params))} sizes that are best between a "
            "smaller and a larger one, and a frontier needs 2: add rows a run, or sizes"
        )
    return Frontier(*(float(value[0]) for value in vars(_through([found], found.flops)).values()))


def refit(
    law: Frontier, runs: Runs, weights: np.ndarray, losses: np.ndarray | None = None, by: str = RUN
) -> Frontier:
    """One fit a row of ``weights`` [repeats, runs], and of ``losses``. A row that was not drawn is left out
    of its curve, and one drawn twice counts once: draw whole runs. Nothing is kept of ``law``."""
    flops = _grid(runs)
    curves = _curves(runs, by)
    losses = np.broadcast_to(runs.loss, weights.shape) if losses is None else losses
    return _through([_lowest(runs, curves, flops, *row) for row in zip(weights, losses, strict=True)], flops)


def envelope(runs: Runs, by: str = RUN) -> Envelope:
    """The points of a fit: those C at which the lowest curve has a smaller and a larger model above it."""
    return _lowest(runs, _curves(runs, by), _grid(runs), np.ones(len(runs)), runs.loss)


def _curves(runs: Runs, by: str) -> list[np.ndarray]:
    """Indices of each run's rows, from its first to its last."""
    if by not in runs.columns:
        raise UserError(f"an envelope needs a column {by!r}, to tell the rows of a run by")
    names = runs.columns[by]
    order = np.argsort(runs.flops, kind="stable")
    return [order[names[order] == name] for name in np.unique(names)]


def _grid(runs: Runs) -> np.ndarray:
    return np.geomspace(runs.flops.min(), runs.flops.max(), POINTS)


def _lowest(
    runs: Runs, curves: list[np.ndarray], flops: np.ndarray, drawn: np.ndarray, losses: np.ndarray
) -> Envelope:
    curves = [rows[drawn[rows] > 0] for rows in curves]
    curves = [rows for rows in curves if len(rows) > 1]
    if not curves:
        return Envelope(*np.empty((4, 0)), np.empty(0, int))
    x = np.log(flops)

    def along(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.interp(x, np.log(runs.flops[rows]), np.log(values[rows]), left=np.inf, right=np.inf)

    loss = np.stack([along(rows, losses) for rows in curves])
    sizes = np.array([runs.params[rows[0]] for rows in curves])
    best = loss.argmin(0)
    there = np.isfinite(loss)
    smaller = (there & (sizes[:, None] < sizes[best])).any(0)
    larger = (there & (sizes[:, None] > sizes[best])).any(0)
    seen = np.flatnonzero(smaller & larger)
    best = best[seen]
    tokens = np.stack([along(rows, runs.tokens) for rows in curves])[best, seen]
    return Envelope(flops[seen], sizes[best], np.exp(tokens), np.exp(loss[best, seen]), best)


def _through(found: list[Envelope], flops: np.ndarray) -> Frontier:
    """Neighbours on an envelope are not independent: all points together weigh as one a run that is on it."""
    shape = (len(found), len(flops))
    params, tokens, loss, weights = (np.full(shape, value) for value in (np.nan, np.nan, np.nan, 0.0))
    for row, e in enumerate(found):
        at = np.searchsorted(flops, e.flops)
        params[row, at], tokens[row, at], loss[row, at] = e.params, e.tokens, e.loss
        if len(np.unique(e.params)) > 1:
            weights[row, at] = len(np.unique(e.best)) / len(at)
    return through(flops, (params, tokens, loss), weights, NOISE)
