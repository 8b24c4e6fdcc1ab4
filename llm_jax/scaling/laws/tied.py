"""The surface with one exponent, E + A/N^alpha + B/D^alpha (Gadre et al. 2024, arXiv 2403.08540, eq. 4).

Runs that are all trained equally far, D in proportion to N, then follow one power law in C, whatever that
proportion. It cannot say that N and D should grow apart (a = 1/2), and in return has a constant less, which
few runs, or a far extrapolation, may need more.
"""

from __future__ import annotations

import numpy as np

from llm_jax.errors import UserError
from llm_jax.scaling.laws.robust import DELTA, least_squares
from llm_jax.scaling.laws.surface import Surface
from llm_jax.scaling.runs import Runs

LEAST_RUNS = 5  # one more than constants
EXPONENTS, SHARES = (0.1, 0.3, 0.6, 1.2), (0.2, 0.5, 0.8)  # starts: alpha, and E of the lowest loss


def fit(runs: Runs) -> Surface:
    """By Huber's loss of log L, the best of 12 starts. Raises UserError for fewer than 5 runs."""
    if len(runs) < LEAST_RUNS:
        raise UserError(f"tied has 4 constants, and {len(runs)} runs cannot tell them: needs {LEAST_RUNS}")
    lowest = runs.loss.min()
    half = [(share, np.log((1 - share) * lowest / 2)) for share in SHARES]
    starts = [(np.log(share * lowest), rest, alpha, rest) for share, rest in half for alpha in EXPONENTS]
    theta, score = _solve(runs, np.array(starts), np.ones((len(starts), len(runs))), runs.loss)
    return _law(runs, theta[np.nanargmin(score)])


def refit(law: Surface, runs: Runs, weights: np.ndarray, losses: np.ndarray | None = None) -> Surface:
    """One fit a row of ``weights`` [repeats, runs], and of ``losses``; all start at ``law``."""
    n, d = _centre(runs)
    start = np.log(law.E), np.log(law.A) - law.alpha * n, law.alpha, np.log(law.B) - law.alpha * d
    theta, _ = _solve(
        runs, np.tile(start, (len(weights), 1)), weights, runs.loss if losses is None else losses
    )
    return _law(runs, theta)


def _centre(runs: Runs) -> tuple[float, float]:
    return np.log(runs.params).mean(), np.log(runs.tokens).mean()


def _solve(
    runs: Runs, start: np.ndarray, weights: np.ndarray, losses: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (log E, log A', alpha, log B'), A' and B' at the mean log N and log D; objectives [rows]."""
    n, d = _centre(runs)
    x, y = np.log(runs.params) - n, np.log(runs.tokens) - d
    seen = np.broadcast_to(np.log(losses), weights.shape)

    def residual(theta: np.ndarray, which: np.ndarray) -> np.ndarray:
        log_E, log_A, alpha, log_B = theta.T[:, :, None]
        return np.log(np.exp(log_E) + np.exp(log_A - alpha * x) + np.exp(log_B - alpha * y)) - seen[which]

    return least_squares(residual, start, weights, DELTA)


def _law(runs: Runs, theta: np.ndarray) -> Surface:
    n, d = _centre(runs)
    log_E, log_A, alpha, log_B = theta.T
    fields = np.exp(log_E), np.exp(log_A + alpha * n), np.exp(log_B + alpha * d), alpha, alpha
    if theta.ndim == 1:
        fields = map(float, fields)
    return Surface(*fields, flops_per=float(np.median(runs.flops / (runs.params * runs.tokens))))
