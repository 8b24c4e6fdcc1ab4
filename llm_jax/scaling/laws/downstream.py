"""From loss to accuracy, in two steps (Bhagia et al. 2024, arXiv 2412.04403; Llama 3, arXiv 2407.21783), and
whether a jump in accuracy is one of the model or of its measure (Schaeffer et al. 2023, arXiv 2304.15004).

    runs.loss = the loss of the right answers, nats a token       a continuous measure
    law       = surface.fit(runs)                                 step 1: N, D to this loss
    link      = fit(runs.loss, accuracy)                          step 2: loss to accuracy
    TwoStep(law, link).accuracy(params, tokens)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llm_jax.errors import UserError
from llm_jax.scaling.laws.robust import align, least_squares

DELTA = 0.02  # of accuracy: what is further off counts linearly


class Law(Protocol):
    """Any law with a loss."""

    def loss(self, params: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray: ...


@dataclass(frozen=True)
class Sigmoid:
    """accuracy = low + height / (1 + exp(slope (loss - middle))). Fields: floats, or arrays [repeats]."""

    low: np.ndarray | float
    height: np.ndarray | float
    slope: np.ndarray | float
    middle: np.ndarray | float

    def accuracy(self, loss: np.ndarray | float) -> np.ndarray:
        """[repeats, ...losses]"""
        low, height, slope, middle = (align(x, loss) for x in vars(self).values())
        return low + height * _logistic(-slope * (loss - middle))


@dataclass(frozen=True)
class TwoStep:
    """A law of the task's loss, and the link from it to accuracy."""

    law: Law
    link: Sigmoid

    def accuracy(self, params: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        return self.link.accuracy(self.law.loss(params, tokens))


@dataclass(frozen=True)
class Emergence:
    """jump: the largest step of accuracy between runs next to each other in compute. smooth: the same step
    in what a loss that is a smooth function of compute gives through the link. share: smooth / jump.
    explained: of the variance of accuracy, what the smooth loss explains (1 is all of it)."""

    jump: float
    smooth: float
    share: float
    explained: float

    @property
    def of_the_metric(self) -> bool:
        """Whether the jump is what the measure makes of a smooth loss: most of it, and of all the rest."""
        return self.share >= 0.8 and self.explained >= 0.9


def fit(loss: np.ndarray, accuracy: np.ndarray, chance: float | None = None) -> Sigmoid:
    """loss, accuracy: [runs]. chance: the accuracy of guessing, where it is known; else it is fitted.

    Raises UserError for fewer than 5 runs, and where losses or accuracies do not differ.
    """
    loss, accuracy = np.asarray(loss, float), np.asarray(accuracy, float)
    if len(loss) < 5 or np.ptp(loss) == 0 or np.ptp(accuracy) == 0:
        raise UserError(f"a sigmoid needs 5 runs of different loss and accuracy; there are {len(loss)}")
    low = np.array([chance]) if chance is not None else accuracy.min() - np.array([0.0, 0.1])
    middles = np.quantile(loss, (0.1, 0.5, 0.9))
    slopes = np.array([1.0, 3.0, 9.0]) / np.ptp(loss)
    grid = np.meshgrid(low, [1.1 * np.ptp(accuracy), 1.0 - low[0]], slopes, middles, indexing="ij")
    starts = np.stack([part.ravel() for part in grid], -1)
    theta, score = _solve(loss, accuracy, starts, np.ones((len(starts), len(loss))), chance)
    return Sigmoid(*(float(x) for x in theta[np.nanargmin(score)]))


def refit(
    link: Sigmoid,
    loss: np.ndarray,
    accuracy: np.ndarray,
    weights: np.ndarray,
    chance: float | None = None,
) -> Sigmoid:
    """One fit a row of ``weights`` [repeats, runs]; all start at ``link``."""
    start = np.tile(list(vars(link).values()), (len(weights), 1))
    return Sigmoid(*_solve(np.asarray(loss, float), np.asarray(accuracy, float), start, weights, chance)[0].T)


def exact_match(loss: np.ndarray | float, length: float) -> np.ndarray:
    """Accuracy of an answer that is right if ``length`` tokens are, each with probability exp(-loss)."""
    return np.exp(-length * np.asarray(loss, float))


def emergence(
    flops: np.ndarray,
    loss: np.ndarray,
    accuracy: np.ndarray,
    link: Callable[[np.ndarray], np.ndarray],
) -> Emergence:
    """Whether accuracy jumps with compute because its measure does.

    flops, loss (of the right answers, nats a token), accuracy: [runs]. link: what the measure makes of a
    loss, such as ``lambda loss: exact_match(loss, 5)`` or ``Sigmoid.accuracy``. The loss is made smooth, a
    parabola of log loss in log C, before it goes through the link: what of a jump is still there is made by
    the measure, and what is not by the models. Raises UserError for fewer than 5 runs, and where accuracy
    never rises.
    """
    if len(flops) < 5:
        raise UserError(f"emergence needs 5 runs; there are {len(flops)}")
    order = np.argsort(flops)
    x, seen = np.log(flops[order]), np.asarray(accuracy, float)[order]
    smooth = link(np.exp(np.polyval(np.polyfit(x - x.mean(), np.log(loss[order]), 2), x - x.mean())))
    steps = np.diff(seen)
    at = steps.argmax()
    if steps[at] <= 0:
        raise UserError("emergence: accuracy never rises with compute, so that there is no jump to explain")
    explained = 1 - np.sum((seen - smooth) ** 2) / np.sum((seen - seen.mean()) ** 2)
    step = smooth[at + 1] - smooth[at]
    return Emergence(float(steps[at]), float(step), float(step / steps[at]), float(explained))


def _solve(
    loss: np.ndarray, accuracy: np.ndarray, start: np.ndarray, weights: np.ndarray, chance: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """theta [repeats, 4]: the fields; a known chance stays where it starts."""

    def residual(theta: np.ndarray, which: np.ndarray) -> np.ndarray:
        low = theta[:, 0] if chance is None else np.full(len(theta), chance)
        return Sigmoid(low, *theta[:, 1:].T).accuracy(loss) - accuracy

    return least_squares(residual, start, weights, DELTA)


def _logistic(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))
