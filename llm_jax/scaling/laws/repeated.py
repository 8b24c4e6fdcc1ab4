"""Repeated data (Muennighoff et al. 2023, arXiv 2305.16264): what epochs and excess parameters are worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llm_jax.errors import UserError
from llm_jax.scaling.laws.robust import align, least_squares
from llm_jax.scaling.runs import FLOPS_PER, Runs

R_D, R_N = 15.387756, 5.309743  # of the paper, appendix A: 182 runs of 7M to 9B parameters, 1 to 500 epochs
RANGE = 1e4  # an optimum is looked for within this factor of the one for unlimited data
UNIQUE = "unique_tokens"

Numbers = np.ndarray | float


class Base(Protocol):
    """E + A/N^alpha + B/D^beta, such as laws.surface.Surface."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    flops_per: float


@dataclass(frozen=True)
class Repeated:
    """L = E + A/N'^alpha + B/D'^beta of effective parameters N' and tokens D' (eq. 5 and 6).

    With U unique tokens seen R times more, D' = U + U R_D (1 - exp(-R / R_D)); the same with R_N for what N
    has beyond U_N, the compute-optimal size for U tokens. As in the paper U is at most D, so that a model too
    large for one epoch counts for less, too. No harm is known to it: a loss that rises with further epochs is
    outside of the law. Fields: floats, or arrays [repeats].
    """

    E: np.ndarray | float
    A: np.ndarray | float
    B: np.ndarray | float
    alpha: np.ndarray | float
    beta: np.ndarray | float
    R_D: np.ndarray | float = R_D
    R_N: np.ndarray | float = R_N
    flops_per: float = FLOPS_PER

    @property
    def a(self) -> np.ndarray | float:
        """Where data is not short."""
        return self.beta / (self.alpha + self.beta)

    def effective_tokens(self, tokens: Numbers, unique_tokens: Numbers) -> np.ndarray:
        """D': fresh tokens that would be worth as much. unique_tokens: how many there are."""
        tokens, unique = np.broadcast_arrays(tokens, unique_tokens)
        return _worth(np.minimum(tokens, unique), tokens, align(self.R_D, tokens))

    def effective_params(self, params: Numbers, unique_tokens: Numbers) -> np.ndarray:
        """N': parameters that would be worth as much with data enough. unique_tokens: those seen."""
        params, unique = np.broadcast_arrays(params, unique_tokens)
        return _worth(np.minimum(params, self._size(unique, params)), params, align(self.R_N, params))

    def loss(self, params: Numbers, tokens: Numbers, unique_tokens: Numbers = np.inf) -> np.ndarray:
        """Nats a token: [repeats, ...runs]. tokens: with repeats; unique_tokens: how many there are."""
        params, tokens, unique = np.broadcast_arrays(params, tokens, unique_tokens)
        return self._loss(params, params, tokens, unique)

    def optimum(self, flops: Numbers, unique_tokens: Numbers = np.inf) -> tuple[np.ndarray, np.ndarray]:
        """Parameters, and tokens with repeats, of least loss for so much compute: [repeats, ...flops]."""
        flops, unique = np.broadcast_arrays(np.asarray(flops, float), unique_tokens)
        A, B, alpha, beta = (align(x, flops) for x in (self.A, self.B, self.alpha, self.beta))
        work = flops / self.flops_per
        free = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * work ** (beta / (alpha + beta))
        centre = np.log(free) + 0 * align(self.R_D + self.R_N, flops)  # which alone may have repeats
        reach = np.log(RANGE)
        for _ in range(6):  # a grid of 33 sizes, then one over the two steps about its best
            grid = centre + np.linspace(-reach, reach, 33).reshape(-1, *(1,) * centre.ndim)
            losses = [self._loss(flops, np.exp(n), work / np.exp(n), unique) for n in grid]
            centre = np.take_along_axis(grid, np.argmin(losses, 0)[None], 0)[0]
            reach /= 16
        return np.exp(centre), work / np.exp(centre)

    def frontier(self, flops: Numbers, unique_tokens: Numbers = np.inf) -> np.ndarray:
        """The loss there: [repeats, ...flops]."""
        flops, unique = np.broadcast_arrays(np.asarray(flops, float), unique_tokens)
        return self._loss(flops, *self.optimum(flops, unique), unique)

    def _size(self, unique: np.ndarray, like: np.ndarray) -> np.ndarray:
        """U_N: where alpha A / N^alpha = beta B / U^beta."""
        A, B, alpha, beta = (align(x, like) for x in (self.A, self.B, self.alpha, self.beta))
        return (alpha * A / (beta * B)) ** (1 / alpha) * np.asarray(unique, float) ** (beta / alpha)

    def _loss(self, like: np.ndarray, params: np.ndarray, tokens: np.ndarray, unique: Numbers) -> np.ndarray:
        """like: of the shape without repeats, which params and tokens may have already."""
        E, A, B, alpha, beta = (align(x, like) for x in (self.E, self.A, self.B, self.alpha, self.beta))
        seen = np.minimum(tokens, unique)
        N = _worth(np.minimum(params, self._size(seen, like)), params, align(self.R_N, like))
        D = _worth(seen, tokens, align(self.R_D, like))
        return E + A * N**-alpha + B * D**-beta


def of(base: Base, R_D: np.ndarray | float = R_D, R_N: np.ndarray | float = R_N) -> Repeated:
    """base: the law of runs that see each token once. R_D, R_N: those of the paper."""
    return Repeated(base.E, base.A, base.B, base.alpha, base.beta, R_D, R_N, base.flops_per)


def fit(runs: Runs, base: Base, unique: str = UNIQUE) -> Repeated:
    """R_D and R_N by Huber's loss, base as it is (appendix A). unique: the column of unique tokens.

    Where no model is larger than U_N, nothing tells R_N, and it is that of the paper. Raises UserError for
    fewer than two runs that repeat tokens.
    """
    repeat = runs.tokens > _unique(runs, unique)
    if repeat.sum() < 2:
        raise UserError(f"R_D needs 2 runs with more tokens than their {unique!r}; there are {repeat.sum()}")
    starts = np.array([(d, n) for d in (4.0, R_D, 40.0) for n in (2.0, R_N, 20.0)])
    theta, score = _solve(
        runs, of(base), np.log(starts), np.ones((len(starts), len(runs))), runs.loss, unique
    )
    # the paper's R_N comes first among those that do as well
    score = score + 1e-9 * score.min() * np.abs(np.log(starts[:, 1] / R_N))
    return of(base, *(float(x) for x in np.exp(theta[score.argmin()])))


def refit(
    law: Repeated,
    runs: Runs,
    weights: np.ndarray,
    losses: np.ndarray | None = None,
    unique: str = UNIQUE,
) -> Repeated:
    """One fit a row of ``weights`` [repeats, runs], and of ``losses``; all start at ``law``, and its base,
    floats or [repeats], stays."""
    start = np.tile([np.log(law.R_D), np.log(law.R_N)], (len(weights), 1))
    theta, _ = _solve(runs, law, start, weights, runs.loss if losses is None else losses, unique)
    return of(law, *np.exp(theta.T))


def _solve(
    runs: Runs, law: Repeated, start: np.ndarray, weights: np.ndarray, losses: np.ndarray, unique: str
) -> tuple[np.ndarray, np.ndarray]:
    tokens = _unique(runs, unique)
    seen = np.broadcast_to(np.log(losses), weights.shape)
    base = {
        name: np.broadcast_to(getattr(law, name), len(start)) for name in ("E", "A", "B", "alpha", "beta")
    }

    def residual(theta: np.ndarray, which: np.ndarray) -> np.ndarray:
        fields = {name: value[which] for name, value in base.items()}
        law = Repeated(**fields, R_D=np.exp(theta[:, 0]), R_N=np.exp(theta[:, 1]))
        return np.log(law.loss(runs.params, runs.tokens, tokens)) - seen[which]

    return least_squares(residual, start, weights)


def _unique(runs: Runs, column: str) -> np.ndarray:
    if column not in runs.columns:
        raise UserError(f"the table has no column {column!r} of unique tokens: {', '.join(runs.columns)}")
    return runs.columns[column]


def _worth(used: np.ndarray, given: np.ndarray, R: np.ndarray) -> np.ndarray:
    """What ``given`` is worth where only ``used`` of it is fresh."""
    return used - used * R * np.expm1(-(given / used - 1) / R)
