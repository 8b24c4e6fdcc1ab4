"""Which tokens of a row are hidden: single ones, whole words, n-grams. All by keyed draws."""

from __future__ import annotations

import numpy as np

from llm_jax.data import order


def choose_tokens(seed: int, draws: np.ndarray, eligible: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """bool [rows, length]: ``counts`` [rows] tokens of each row, any eligible one as likely as another."""
    place = np.arange(eligible.shape[1])
    score = np.where(eligible, order.uniform(seed, "mask", draws[:, None], place), np.inf)
    rank = np.argsort(np.argsort(score, axis=1), axis=1)
    return eligible & (rank < counts[:, None])


def choose_spans(
    seed: int, draws: np.ndarray, begins: np.ndarray, eligible: np.ndarray, counts: np.ndarray, longest: int
) -> np.ndarray:
    """bool [rows, length]: at most ``counts`` [rows] tokens of each row, in runs of whole units.

    begins: bool [rows, length], where a unit (a word, or a token) begins. A run has n units, n in 1 ..
    ``longest`` with probability in proportion to 1 / n (Cui et al. 2020, MacBERT, arXiv 2004.13922), and ends
    early at what is not eligible. Runs are taken in random order; one that would be too many is passed over.
    """
    place = np.arange(eligible.shape[1])
    score = order.uniform(seed, "mask", draws[:, None], place)
    sizes = 1 + np.searchsorted(
        _cumulative(longest), order.uniform(seed, "mask size", draws[:, None], place), side="right"
    )
    chosen = np.zeros(eligible.shape, bool)
    for row in range(len(eligible)):
        starts = np.flatnonzero(begins[row] & eligible[row])
        bounds = np.append(starts, eligible.shape[1])
        budget = counts[row]
        for unit in np.argsort(score[row, starts], kind="stable"):
            if budget <= 0:
                break
            stop = bounds[min(unit + sizes[row, starts[unit]], len(starts))]
            run = slice(starts[unit], stop)
            broken = np.flatnonzero(~eligible[row, run])
            run = slice(run.start, run.start + broken[0]) if len(broken) else run
            if run.stop - run.start <= budget and not chosen[row, run].any():
                chosen[row, run] = True
                budget -= run.stop - run.start
    return chosen


def _cumulative(longest: int) -> np.ndarray:
    """Cumulative probabilities of the sizes 1 .. longest - 1."""
    shares = 1.0 / np.arange(1, longest + 1)
    return np.cumsum(shares / shares.sum())[:-1]


def places_of(chosen: np.ndarray, count: int) -> np.ndarray:
    """int32 [rows, count]: the places of the chosen tokens in order, then places of others."""
    return np.argsort(~chosen, axis=1, kind="stable")[:, :count].astype(np.int32)
