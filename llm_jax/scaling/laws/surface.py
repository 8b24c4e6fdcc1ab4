"""The parametric law L(N, D) = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, arXiv 2203.15556, approach 3).

Its five constants minimise the sum over runs of Huber's loss of log L^ - log L: r^2/2 up to ``delta``,
delta (|r| - delta/2) beyond. It is a sum, not a mean, as in Besiroglu et al. 2024 (arXiv 2404.10102); where
it is least does not depend on that. A delta far below the noise is nearly least absolute deviations, and
delta = 1 is least squares.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from llm_jax.errors import UserError
from llm_jax.scaling.laws.robust import DELTA, align
from llm_jax.scaling.laws.solver import Evaluate, minimise
from llm_jax.scaling.runs import FLOPS_PER, Runs

LEAST_RUNS = 6  # one more than constants
STRAIGHT = 0.01  # of log D, about a line in log N: one ratio of tokens to parameters, or one budget
REFIT_TOLERANCE = 1e-9  # of the objective: far below what noise moves it by
# Appendix D.3 of Hoffmann et al.: 4,500 starts
START_EXPONENTS = np.arange(0, 2.1, 0.5)
START_LOG_E = np.arange(-1, 1.1, 0.5)
START_LOG_COEFFICIENTS = np.arange(0, 25.1, 5)
PROJECTED = np.linspace(0.05, 1.95, 20)  # of alpha and of beta
POLISHED = 8  # of its points
PART = slice(0, 1), slice(1, 3), slice(3, 5)  # of a row, by term of the sum
PAIRS = tuple(itertools.combinations_with_replacement(range(3), 2))
LINEAR, EXPONENTS = [0, 1, 3], [2, 4]  # of a row (log E, log A, alpha, log B, beta)


@dataclass(frozen=True)
class Surface:
    """E + A/N^alpha + B/D^beta, of runs that cost ``flops_per`` N D. Fields: floats, or arrays [repeats]."""

    E: np.ndarray | float
    A: np.ndarray | float
    B: np.ndarray | float
    alpha: np.ndarray | float
    beta: np.ndarray | float
    flops_per: float = FLOPS_PER

    @property
    def a(self) -> np.ndarray | float:
        """The exponent of N* ~ C^a."""
        return self.beta / (self.alpha + self.beta)

    def loss(self, params: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """Nats a token: [repeats, ...runs]."""
        of = np.broadcast_to(0.0, np.broadcast_shapes(np.shape(params), np.shape(tokens)))
        E, A, B, alpha, beta = (align(x, of) for x in (self.E, self.A, self.B, self.alpha, self.beta))
        return E + A / np.asarray(params, float) ** alpha + B / np.asarray(tokens, float) ** beta

    def optimum(self, flops: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Parameters and tokens of least loss for so much compute, [repeats, ...flops] each: N* = G (C/k)^a,
        D* = (C/k)^(1-a) / G, with k = flops_per and G = (alpha A / (beta B))^(1/(alpha + beta)) (eq. 4)."""
        A, B, alpha, beta = (align(x, flops) for x in (self.A, self.B, self.alpha, self.beta))
        product = np.asarray(flops, float) / self.flops_per
        G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
        params = G * product ** (beta / (alpha + beta))
        return params, product / params

    def frontier(self, flops: np.ndarray | float) -> np.ndarray:
        """The loss at the optimum, nats a token: [repeats, ...flops]."""
        params, tokens = self.optimum(flops)
        E, A, B, alpha, beta = (align(x, flops) for x in (self.E, self.A, self.B, self.alpha, self.beta))
        return E + A / params**alpha + B / tokens**beta


def fit(runs: Runs, delta: float = DELTA) -> Surface:
    """From every start of the published grid, the best end. Raises UserError for fewer than 6 runs, and
    where sizes or tokens do not differ, or do so along one line in logs."""
    rows, values = solve_grid(runs, delta)
    return _law(runs, rows[values.argmin()])


def solve_grid(runs: Runs, delta: float = DELTA) -> tuple[np.ndarray, np.ndarray]:
    """Where each of the 4,500 starts ends: rows [4500, 5] of (log E, log A', alpha, log B', beta), A' and B'
    being the terms at the mean log N and log D; and the objectives [4500]."""
    _check(runs)
    n, d = _centre(runs)
    steps = (START_LOG_E, START_LOG_COEFFICIENTS, START_EXPONENTS, START_LOG_COEFFICIENTS, START_EXPONENTS)
    starts = np.array(list(itertools.product(*steps)))
    starts[:, 1] -= starts[:, 2] * n
    starts[:, 3] -= starts[:, 4] * d
    return minimise(_huber(runs, delta), starts, len(runs))


def fit_projected(runs: Runs, delta: float = DELTA) -> Surface:
    """The same minimum by variable projection (Golub and Pereyra 1973): over a grid of alpha and beta alone,
    E, A and B follow from what is linear in them; from the lowest points of that valley steps in all five
    find its bottom. Raises UserError as ``fit`` does."""
    _check(runs)
    evaluate = _huber(runs, delta)
    grid = np.array(list(itertools.product(PROJECTED, PROJECTED)))

    def of_linear(rows: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, ...]:
        value, gradient, hessian, metric = evaluate(_joined(rows, grid[which]), which)
        part = np.ix_(range(len(rows)), LINEAR, LINEAR)
        return value, gradient[:, LINEAR], hessian[part], metric[part]

    linear, values = minimise(of_linear, _linear(runs, grid), len(runs), 1e-6)
    lowest = values.argsort()[:POLISHED]
    rows, values = minimise(evaluate, _joined(linear, grid)[lowest], len(runs))
    return _law(runs, rows[values.argmin()])


def refit(
    law: Surface, runs: Runs, weights: np.ndarray, losses: np.ndarray | None = None, delta: float = DELTA
) -> Surface:
    """One fit a row of ``weights`` [repeats, runs], and of ``losses`` in place of the runs' own; all start
    at ``law``."""
    n, d = _centre(runs)
    row = (np.log(law.E), np.log(law.A) - law.alpha * n, law.alpha, np.log(law.B) - law.beta * d, law.beta)
    starts = np.tile(np.array(row, float), (len(weights), 1))
    rows, _ = minimise(_huber(runs, delta, weights, losses), starts, len(runs), REFIT_TOLERANCE)
    return _law(runs, rows)


def objective(law: Surface, runs: Runs, delta: float = DELTA) -> float:
    """The sum that ``fit`` makes least."""
    size = np.abs(np.log(law.loss(runs.params, runs.tokens) / runs.loss))
    inner = np.minimum(size, delta)
    return float(np.sum(inner * (size - 0.5 * inner)))


def _check(runs: Runs) -> None:
    if len(runs) < LEAST_RUNS:
        raise UserError(
            f"a surface has 5 constants, and {len(runs)} runs cannot tell them: add runs, up to {LEAST_RUNS}"
        )
    for name, values in {"size": runs.params, "number of tokens": runs.tokens}.items():
        if np.ptp(np.log(values)) < 1e-9:
            raise UserError(
                f"all {len(runs)} runs have one {name}, {values[0]:.4g}: a surface needs two or more"
            )
    n, d = np.log(runs.params), np.log(runs.tokens)
    if np.ptp(d - np.polyval(np.polyfit(n, d, 1), n)) < STRAIGHT:
        raise UserError(
            f"tokens are one power of the size in all {len(runs)} runs, which cannot tell the terms of N and "
            "D apart: add runs of another ratio or budget"
        )


def _centre(runs: Runs) -> tuple[float, float]:
    """Mean log N and log D: measured from there, a coefficient and its exponent are nearly independent."""
    return np.log(runs.params).mean(), np.log(runs.tokens).mean()


def _law(runs: Runs, rows: np.ndarray) -> Surface:
    """rows: [5], or [repeats, 5] for a law of arrays. The FLOPs of N D are the median of the runs' own."""
    n, d = _centre(runs)
    log_E, log_A, alpha, log_B, beta = rows.T
    fields = np.exp(log_E), np.exp(log_A + alpha * n), np.exp(log_B + beta * d), alpha, beta
    if rows.ndim == 1:
        fields = map(float, fields)
    return Surface(*fields, flops_per=float(np.median(runs.flops / (runs.params * runs.tokens))))


def _huber(
    runs: Runs, delta: float, weights: np.ndarray | None = None, losses: np.ndarray | None = None
) -> Evaluate:
    """The objective of rows (log E, log A', alpha, log B', beta) and its derivatives, exact ones.

    With p_k the share of a term in the sum, the log of the sum has the gradient p_k f_k and the second
    derivatives (p_k 1(k = l) - p_k p_l) f_k f_l', f being (1, -log N) of a term A/N^alpha. All of them are
    products of [rows, runs] with a few columns of the runs' own. The metric leaves out what may be negative,
    and takes delta/|r| for the weight of a residual beyond delta, as reweighted least squares does.
    """
    n0, d0 = _centre(runs)
    n, d = np.log(runs.params) - n0, np.log(runs.tokens) - d0
    target = np.log(runs.loss if losses is None else losses)
    one = np.ones_like(n)
    features = (np.stack([one], -1), np.stack([one, -n], -1), np.stack([one, -d], -1))
    outer = {(k, l): np.einsum("ni,nj->nij", features[k], features[l]).reshape(len(n), -1) for k, l in PAIRS}

    def evaluate(rows: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, ...]:
        log_E, log_A, alpha, log_B, beta = rows.T[:, :, None]
        terms = np.exp(log_E), np.exp(log_A - alpha * n), np.exp(log_B - beta * d)
        total = terms[0] + terms[1] + terms[2]
        r = np.log(total) - (target if losses is None else target[which])
        size = np.abs(r)
        inner = np.minimum(size, delta)
        w = 1.0 if weights is None else weights[which]
        value = np.sum(w * inner * (size - 0.5 * inner), -1)
        pull = w * np.clip(r, -delta, delta)
        newton, reweighted = w * (size < delta) - pull, w * (delta / np.maximum(size, delta))
        share = [term / total for term in terms]
        gradient, hessian, metric = (np.empty((len(rows), *[5] * rank)) for rank in (1, 2, 2))
        for k, l in PAIRS:
            both = share[k] * share[l]
            second, positive = (newton * both) @ outer[k, l], (reweighted * both) @ outer[k, l]
            if k == l:
                alone = pull * share[k]
                gradient[:, PART[k]] = alone @ features[k]
                second += alone @ outer[k, k]
                positive += np.abs(alone) @ outer[k, k]
            for out, block in (hessian, second), (metric, positive):
                block = block.reshape(len(rows), features[k].shape[1], -1)
                out[:, PART[k], PART[l]] = block
                out[:, PART[l], PART[k]] = block.swapaxes(1, 2)
        return value, gradient, hessian, metric

    return evaluate


def _linear(runs: Runs, exponents: np.ndarray) -> np.ndarray:
    """Rows (log E, log A', log B') [pairs, 3] of least squares of relative errors, kept above 0."""
    n0, d0 = _centre(runs)
    alpha, beta = exponents.T[:, :, None]
    powers = np.exp(-alpha * (np.log(runs.params) - n0)), np.exp(-beta * (np.log(runs.tokens) - d0))
    terms = np.stack([np.ones_like(powers[0]), *powers], -1) / runs.loss[:, None]
    gram = np.einsum("pni,pnj->pij", terms, terms)
    found = np.linalg.solve(gram, terms.sum(1)[..., None])[..., 0]
    return np.log(np.maximum(found, 0.01 * runs.loss.min()))


def _joined(linear: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    rows = np.empty((len(linear), 5))
    rows[:, LINEAR], rows[:, EXPONENTS] = linear, exponents
    return rows
