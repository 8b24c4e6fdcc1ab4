"""Power laws without an irreducible loss (Kaplan et al. 2020, arXiv 2001.08361)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_jax.errors import UserError
from llm_jax.scaling.laws.robust import align, least_squares
from llm_jax.scaling.runs import FLOPS_PER, Runs

EXPONENTS = (0.03, 0.1, 0.3)  # where the fit starts, for N and for D


@dataclass(frozen=True)
class Kaplan:
    """L(N, D) = [(Nc/N)^(alpha_N/alpha_D) + Dc/D]^alpha_D (eq. 1.5), C = flops_per N D.

    Its best split has N* ~ C^(alpha_D / (alpha_N + alpha_D)), 0.575 for the constants of the paper. The 0.73
    that it is known for is of another law, of runs that stop short: published.LAWS["kaplan-compute"].
    Fields: floats, or arrays [repeats].
    """

    Nc: np.ndarray | float
    Dc: np.ndarray | float
    alpha_N: np.ndarray | float
    alpha_D: np.ndarray | float
    flops_per: float = FLOPS_PER

    @property
    def a(self) -> np.ndarray | float:
        return self.alpha_D / (self.alpha_N + self.alpha_D)

    def loss(self, params: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """Nats a token: [repeats, ...runs]."""
        ndim = np.zeros(np.broadcast_shapes(np.shape(params), np.shape(tokens)))
        Nc, Dc, alpha_N, alpha_D = (align(x, ndim) for x in (self.Nc, self.Dc, self.alpha_N, self.alpha_D))
        return ((Nc / params) ** (alpha_N / alpha_D) + Dc / tokens) ** alpha_D

    def optimum(self, flops: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Parameters and tokens of least loss: where alpha_N/alpha_D times the first term is the second."""
        Nc, Dc, a = (align(x, flops) for x in (self.Nc, self.Dc, self.a))
        ratio = (1 - a) / a  # alpha_N / alpha_D
        params = (ratio * Nc**ratio * np.asarray(flops, float) / (self.flops_per * Dc)) ** a
        return params, flops / (self.flops_per * params)

    def frontier(self, flops: np.ndarray | float) -> np.ndarray:
        """The loss at the optimum: [repeats, ...flops]."""
        params, tokens = self.optimum(flops)
        Nc, Dc, alpha_N, alpha_D = (align(x, flops) for x in (self.Nc, self.Dc, self.alpha_N, self.alpha_D))
        return ((Nc / params) ** (alpha_N / alpha_D) + Dc / tokens) ** alpha_D


@dataclass(frozen=True)
class Power:
    """L(x) = (scale / x)^exponent, of N, D or C where nothing else holds the loss back (eq. 1.1 to 1.3)."""

    scale: float
    exponent: float

    def loss(self, x: np.ndarray | float) -> np.ndarray:
        return (self.scale / np.asarray(x, float)) ** self.exponent


def fit(runs: Runs) -> Kaplan:
    """Eq. 1.5 to log losses by Huber's loss, the best of 9 starts. Raises UserError for fewer than 5 runs."""
    if len(runs) < 5:
        raise UserError(f"Kaplan's law has 4 constants, and {len(runs)} runs cannot tell them: needs 5")
    low = np.log(runs.loss).min()
    starts = [(np.log(n), np.log(d), low, low) for n in EXPONENTS for d in EXPONENTS]
    theta, score = _solve(runs, np.array(starts), np.ones((9, len(runs))), runs.loss)
    law = _law(runs, theta[np.nanargmin(score)][None])
    return Kaplan(float(law.Nc[0]), float(law.Dc[0]), float(law.alpha_N[0]), float(law.alpha_D[0]))


def refit(law: Kaplan, runs: Runs, weights: np.ndarray, losses: np.ndarray | None = None) -> Kaplan:
    """One fit a row of ``weights`` [repeats, runs], and of ``losses``; all start at ``law``."""
    n, d = np.log(law.alpha_N), np.log(law.alpha_D)
    mean_N, mean_D = np.log(runs.params).mean(), np.log(runs.tokens).mean()
    start = [n, d, law.alpha_N * (np.log(law.Nc) - mean_N), law.alpha_D * (np.log(law.Dc) - mean_D)]
    theta, _ = _solve(
        runs, np.tile(start, (len(weights), 1)), weights, runs.loss if losses is None else losses
    )
    return _law(runs, theta)


def trend(runs: Runs, of: str) -> Power:
    """L(N), L(D) or L(C), ``of``: params, tokens or flops.

    Through the runs that beat every run with less of it: as far as the table goes the other was ample for
    them. Raises UserError where these are fewer than 3.
    """
    x = getattr(runs, of)
    order = np.lexsort((runs.loss, x))
    best = np.minimum.accumulate(runs.loss[order])
    records = order[np.r_[True, best[1:] < best[:-1]]]
    if len(np.unique(x[records])) < 3:
        raise UserError(f"a trend in {of} needs 3 runs that each beat all with less {of}; has {len(records)}")
    log_x, log_loss = np.log(x[records]), np.log(runs.loss[records])
    start = np.polyfit(log_x - log_x.mean(), log_loss, 1)[None]
    (slope, level), *_ = least_squares(
        lambda t, _: t[:, :1] * (log_x - log_x.mean()) + t[:, 1:] - log_loss,
        start,
        np.ones((1, len(records))),
    )[0]
    return Power(float(np.exp(log_x.mean() - level / slope)), float(-slope))


def _solve(
    runs: Runs, start: np.ndarray, weights: np.ndarray, losses: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """theta [repeats, 4]: logs of the exponents, and log losses at the mean log N and D were the other ample,
    which unlike log Nc and log Dc are hardly correlated with the exponents."""
    n = np.log(runs.params) - np.log(runs.params).mean()
    d = np.log(runs.tokens) - np.log(runs.tokens).mean()

    seen = np.broadcast_to(np.log(losses), weights.shape)

    def residual(theta: np.ndarray, which: np.ndarray) -> np.ndarray:
        alpha_N, alpha_D = np.exp(theta[:, :1]), np.exp(theta[:, 1:2])
        by_N, by_D = theta[:, 2:3] - alpha_N * n, theta[:, 3:] - alpha_D * d
        return alpha_D * np.logaddexp(by_N / alpha_D, by_D / alpha_D) - seen[which]

    return least_squares(residual, start, weights)


def _law(runs: Runs, theta: np.ndarray) -> Kaplan:
    alpha_N, alpha_D = np.exp(theta[:, 0]), np.exp(theta[:, 1])
    Nc = np.exp(np.log(runs.params).mean() + theta[:, 2] / alpha_N)
    Dc = np.exp(np.log(runs.tokens).mean() + theta[:, 3] / alpha_D)
    return Kaplan(Nc, Dc, alpha_N, alpha_D)
