"""Frontier through the minima of isoFLOP curves (Hoffmann et al. 2022, arXiv 2203.15556, approach 2).

At each budget of FLOPs a parabola of log loss in log N has its lowest point at N*; power laws in C go through
these points. Unlike a surface it says nothing of a model that is not of the best size, and in return does
not have to be right about one.

    log loss  the noise of a loss is about proportional to it, and the valley of E + A/N^alpha + B/D^beta
              is nearer to a parabola in log L than in L, by the term of fourth order
    window    a parabola is a worse picture of a wider valley (arXiv 2603.22339). Sizes within a factor
              WINDOW of the best one are fitted, and at least the LEAST nearest. Where alpha/beta is 0.5 and
              9 sizes go to +-16x, N* is 15% low instead of 23%, and 8% for sizes of +-4x; where they are
              equal 1% at most. A factor of 4 in place of 8 costs more in noise than it takes from this
    compute   real runs miss their budget by a few percent, and 3% of C is worth 0.2 to 0.4% of loss:
              losses are moved to the budget's C along the slope of the frontier, tokens in proportion
    E         three minima hardly tell E from gamma, and two say nothing of it. At 3x the largest of 3 budgets
              (sqrt 10 apart, noise 0.3%) a power law without E is 0.7 to 1.6% off and a free E 0.5 to 0.8%;
              with noise of 1% a free E is at 10x 1.8 to 4.5% off, and a log-log parabola 6%. So E has a
              prior: its share of the lowest loss is 0.4 +- 0.25 (E_SHARE). This is within 0.1% of the better
              one in the first case and 2.0 to 3.1% in the second, gives way as minima become many or exact,
              and leaves two of them with 0.4. A bare E of few budgets is this prior: see its interval.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llm_jax.errors import UserError
from llm_jax.scaling.laws.robust import align
from llm_jax.scaling.runs import Runs

TOLERANCE = 0.1  # runs whose FLOPs differ by at most twice this share are one budget
WINDOW, LEAST = 8.0, 5
E_SHARE = (0.4, 0.25)  # mean and deviation of E / (lowest loss)
NOISE = 0.003  # of the log of a loss, where no budget has more than three sizes to tell it from
EXACT = 1e-4  # the least noise that a minimum is taken to have


@dataclass(frozen=True)
class Budget:
    """One isoFLOP curve and the lowest point of its parabola: params, tokens, loss.

    interior: whether it curves upwards and this point has sizes tried on both sides; others are no minimum
    that was seen, and stay out of the frontier. curvature: second derivative of log loss in log N. width:
    largest size of the fit over the smallest. points: how many sizes. Nan for fewer than 3 of them.
    """

    flops: float
    params: float
    tokens: float
    loss: float
    interior: bool
    curvature: float
    width: float
    points: int

    def at(self, params: np.ndarray) -> np.ndarray:
        """The parabola: nats a token at a size, for the budget's FLOPs."""
        return self.loss * np.exp(0.5 * self.curvature * np.log(params / self.params) ** 2)


@dataclass(frozen=True)
class Frontier:
    """N*(C) = G C^a, D*(C) = H C^b, L*(C) = E + K C^-gamma. Fields: floats, or arrays [repeats]."""

    E: np.ndarray | float
    K: np.ndarray | float
    gamma: np.ndarray | float
    G: np.ndarray | float
    a: np.ndarray | float
    H: np.ndarray | float
    b: np.ndarray | float

    def optimum(self, flops: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Parameters and tokens of the best run of so much compute: [repeats, ...flops] each."""
        return _power(self.G, self.a, flops), _power(self.H, self.b, flops)

    def frontier(self, flops: np.ndarray | float) -> np.ndarray:
        """Its loss in nats a token: [repeats, ...flops]."""
        return align(self.E, flops) + _power(self.K, -np.asarray(self.gamma), flops)


@dataclass(frozen=True)
class _Curve:
    """The runs of a budget that are fitted: indices, log N from ``centre``, what the log loss of each is
    lowered by to bring it to the budget's FLOPs, and log D = ``line`` of log N."""

    flops: float
    which: np.ndarray
    centre: float
    x: np.ndarray
    moved: np.ndarray
    line: np.ndarray


def fit(runs: Runs, tolerance: float = TOLERANCE) -> Frontier:
    """Through the interior minima. Raises UserError for fewer than two of them."""
    found = budgets(runs, tolerance)
    inside = sum(budget.interior for budget in found)
    if inside < 2:
        outside = ", ".join(f"{budget.flops:.3g}" for budget in found if not budget.interior)
        raise UserError(
            f"isoFLOP: {inside} of {len(found)} budgets have their minimum within the sizes tried, and a "
            f"frontier needs 2: add sizes at C = {outside or 'another budget'}"
        )
    law = _fits(runs, np.ones((1, len(runs))), runs.loss[None], tolerance)
    return Frontier(*(float(value[0]) for value in vars(law).values()))


def refit(
    law: Frontier,
    runs: Runs,
    weights: np.ndarray,
    losses: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
) -> Frontier:
    """One fit a row of ``weights`` [repeats, runs], and of ``losses`` in place of the runs' own. The fit is
    direct, so ``law`` is no start for it. Which runs are near enough to a minimum is not drawn again. A
    budget without an interior minimum sits its repeat out; a repeat with fewer than two of them is nan."""
    losses = np.broadcast_to(runs.loss, weights.shape) if losses is None else losses
    return _fits(runs, weights, losses, tolerance)


def through(
    flops: np.ndarray, points: tuple[np.ndarray, np.ndarray, np.ndarray], weights: np.ndarray, noise: float
) -> Frontier:
    """Power laws through optima. flops: [points]; points: params, tokens, loss, [repeats, points] each, as
    weights; what has weight 0 may be nan. noise: standard deviation of the log of such a loss."""
    params, tokens, loss = points
    weights = np.where((weights > 0).sum(-1, keepdims=True) >= 2, weights, np.nan)
    G, a = _line(np.log(flops), np.log(params), weights)
    H, b = _line(np.log(flops), np.log(tokens), weights)
    return Frontier(*_losses(np.log(flops), loss, weights, noise), np.exp(G), a, np.exp(H), b)


def budgets(runs: Runs, tolerance: float = TOLERANCE) -> tuple[Budget, ...]:
    """Every isoFLOP curve of a table, from the smallest budget up, whether or not it has its minimum."""
    found = []
    for curve in _curves(runs, tolerance):
        params, tokens, loss, inside, curvature, _ = _alone(curve, runs)
        width, points = float(np.exp(np.ptp(curve.x))), len(np.unique(curve.x))
        found.append(Budget(curve.flops, params, tokens, loss, bool(inside), curvature, width, points))
    return tuple(found)


def fitted(runs: Runs, tolerance: float = TOLERANCE) -> np.ndarray:
    """[runs]: the loss of each by its parabola; nan for one too far from the minimum to be fitted."""
    found = np.full(len(runs), np.nan)
    for curve in _curves(runs, tolerance):
        params, _, loss, _, curvature, _ = _alone(curve, runs)
        away = curve.x + curve.centre - np.log(params)
        found[curve.which] = loss * np.exp(0.5 * curvature * away**2 + curve.moved)
    return found


def _fits(runs: Runs, weights: np.ndarray, losses: np.ndarray, tolerance: float) -> Frontier:
    curves = list(_curves(runs, tolerance))
    found = [_minimum(curve, weights, losses)[:4] for curve in curves]
    *points, inside = (np.stack(parts, -1) for parts in zip(*found, strict=True))
    noise = _noise(runs, curves, fitted(runs, tolerance))
    return through(np.array([curve.flops for curve in curves]), tuple(points), inside, noise)


def _curves(runs: Runs, tolerance: float) -> Iterator[_Curve]:
    groups = list(_groups(runs.flops, tolerance))
    levels = np.array([np.log(runs.flops[group]).mean() for group in groups])
    lowest = np.log([runs.loss[group].min() for group in groups])
    slope = np.polyfit(levels, lowest, 1)[0] if len(groups) > 1 else 0.0
    for group, level in zip(groups, levels, strict=True):
        over = np.log(runs.flops[group]) - level
        log_params, log_loss = np.log(runs.params[group]), np.log(runs.loss[group]) - slope * over
        centre = log_params[np.argmin(log_loss)]
        nearest = np.sort(np.abs(np.unique(log_params) - centre))[:LEAST]
        near = np.abs(log_params - centre) <= max(np.log(WINDOW), nearest[-1]) + 1e-9
        x, log_tokens = log_params[near] - centre, (np.log(runs.tokens[group]) - over)[near]
        line = np.polyfit(x, log_tokens, 1) if np.ptp(x) > 0 else np.array([-1.0, log_tokens[0]])
        yield _Curve(float(np.exp(level)), group[near], centre, x, slope * over[near], line)


def _groups(flops: np.ndarray, tolerance: float) -> Iterator[np.ndarray]:
    """Indices of the runs of one budget: from the smallest FLOPs up to (1 + tolerance)^2 times them."""
    left = np.argsort(flops, kind="stable")
    while len(left):
        inside = flops[left] <= flops[left[0]] * (1 + tolerance) ** 2
        yield left[inside]
        left = left[~inside]


def _minimum(curve: _Curve, weights: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each repeat's parabola: params, tokens, loss, interior, curvature, variance of the log of the loss
    in units of one run's; [repeats] each."""
    w = weights[:, curve.which].astype(float)
    y = np.log(losses[:, curve.which]) - curve.moved
    terms = np.stack([np.ones_like(curve.x), curve.x, curve.x**2])
    sizes = curve.x[:, None] == np.unique(curve.x)
    enough = ((w > 0) @ sizes > 0).sum(-1) >= 3
    w = np.where(enough[:, None], w, 1.0) if sizes.shape[1] >= 3 else w + np.nan
    gram = np.einsum("rn,in,jn->rij", w, terms, terms)
    inverse = np.linalg.inv(np.where(np.isfinite(gram), gram, np.eye(3)))
    c, b, a = np.einsum("rij,jn,rn->ir", inverse, terms, w * y)
    with np.errstate(all="ignore"):  # a parabola that is next to a line: not interior, wherever it is lowest
        x = np.where(enough, -b / (2 * a), np.nan)
        lowest = np.exp(curve.centre + x), np.exp(curve.line @ [x, np.ones_like(x)]), np.exp(c + b * x / 2)
    at = np.stack([np.ones_like(x), x, x**2])
    low = np.min(np.where(w > 0, curve.x, np.inf), -1)
    high = np.max(np.where(w > 0, curve.x, -np.inf), -1)
    inside = (a > 0) & (low < x) & (x < high)
    return *lowest, inside.astype(float), 2 * a, np.einsum("ir,rij,jr->r", at, inverse, at)


def _alone(curve: _Curve, runs: Runs) -> tuple[float, ...]:
    """_minimum of the runs as they are."""
    return tuple(float(value[0]) for value in _minimum(curve, np.ones((1, len(runs))), runs.loss[None]))


def _noise(runs: Runs, curves: list[_Curve], fitted: np.ndarray) -> float:
    """Standard deviation of the log of the loss at a minimum, by how far runs are from their parabolas."""
    squares, spare, spread = 0.0, 0, []
    for curve in curves:
        _, _, _, inside, _, variance = _alone(curve, runs)
        if inside:
            squares += np.sum(np.log(runs.loss[curve.which] / fitted[curve.which]) ** 2)
            spare += len(curve.which) - 3
            spread.append(variance)
    one = np.sqrt(squares / spare) if spare else NOISE
    return max(EXACT, float(one * np.sqrt(np.mean(spread)))) if spread else NOISE


def _line(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares over the last axis: value at 0 and slope. What has weight 0 may be anything."""
    y = np.where(w > 0, y, 0.0)
    total = w.sum(-1)
    mean_x, mean_y = (w * x).sum(-1) / total, (w * y).sum(-1) / total
    dx = x - mean_x[..., None]
    slope = (w * dx * y).sum(-1) / (w * dx**2).sum(-1)
    return mean_y - slope * mean_x, slope


def _losses(x: np.ndarray, loss: np.ndarray, w: np.ndarray, noise: float) -> tuple[np.ndarray, ...]:
    """E, K, gamma [repeats] of E + K C^-gamma: a grid over E's share of the lowest loss, then finer ones
    about its best point, with a line in logs at each."""
    lowest = np.min(np.where(w > 0, loss, np.inf), -1)[:, None]
    lowest[np.isinf(lowest)] = np.nan

    def lines(share: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rest = np.where(w > 0, loss, lowest)[:, None] - (share * lowest)[..., None]
        part = rest / (rest + (share * lowest)[..., None])  # what a change of log(rest) is in log(loss)
        log_K, slope = _line(x, np.log(rest), w[:, None] * part**2)
        left = np.log(rest) - log_K[..., None] - slope[..., None] * x
        misfit = np.sum(w[:, None] * (part * left / noise) ** 2, -1)
        return misfit + ((share - E_SHARE[0]) / E_SHARE[1]) ** 2, log_K, slope

    share, step = np.zeros((len(loss), 1)), 0.02
    offsets = np.arange(0, 0.98, step)
    for _ in range(4):
        shares = np.clip(share + offsets, 0.0, 0.98)
        share = np.take_along_axis(shares, lines(shares)[0].argmin(-1)[:, None], -1)
        step, offsets = step / 20, np.linspace(-step, step, 41)
    _, log_K, slope = lines(share)
    return (share * lowest)[:, 0], np.exp(log_K[:, 0]), -slope[:, 0]


def _power(scale: np.ndarray | float, exponent: np.ndarray | float, x: np.ndarray | float) -> np.ndarray:
    return align(scale, x) * np.asarray(x, float) ** align(exponent, x)
