"""Many small robust least-squares problems at once, for laws with no direct fit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llm_jax.scaling.laws.solver import minimise

DELTA = 1e-3  # where Huber's loss turns linear, in logs of the loss (Hoffmann et al. 2022, arXiv 2203.15556)
TOLERANCE = 1e-10  # of the objective, for a step to be the last


def align(field: np.ndarray | float, x: np.ndarray | float) -> np.ndarray:
    """A law's field, a float or [repeats], so that it broadcasts against any array as the leading axis."""
    field = np.asarray(field)
    return field.reshape(field.shape + (1,) * np.ndim(x))


def least_squares(
    residual: Callable[[np.ndarray, np.ndarray], np.ndarray],
    start: np.ndarray,
    weights: np.ndarray,
    delta: float = DELTA,
) -> tuple[np.ndarray, np.ndarray]:
    """Least sum of weights * huber(residual), by iteratively reweighted Gauss-Newton steps.

    residual: (parameters [k, p], which [k] of the problems they are of) to [k, n]; start: [problems, p];
    weights: [problems, n]. Gives the parameters and the objective [problems]. Derivatives are central
    differences. A parameter that nothing depends on stays at its start.
    """

    def evaluate(
        rows: np.ndarray, which: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        r, jacobian = residual(rows, which), _jacobian(residual, rows, which)
        size = np.abs(r)
        value = np.where(size <= delta, 0.5 * r**2, delta * (size - 0.5 * delta))
        w = weights[which] * delta / np.maximum(size, delta)
        weighted = jacobian * w[..., None]
        curvature = weighted.swapaxes(1, 2) @ jacobian
        gradient = (weighted.swapaxes(1, 2) @ r[..., None])[..., 0]
        return np.sum(weights[which] * value, -1), gradient, curvature, curvature

    return minimise(evaluate, start, weights.shape[1] * start.shape[1], TOLERANCE)


def _jacobian(
    residual: Callable[[np.ndarray, np.ndarray], np.ndarray], rows: np.ndarray, which: np.ndarray
) -> np.ndarray:
    """[k, n, p]"""
    columns = []
    for unit in np.eye(rows.shape[1]):
        h = 1e-6 * np.maximum(1.0, np.abs(rows)) * unit
        up, down = residual(rows + h, which), residual(rows - h, which)
        columns.append((up - down) / (2 * h.sum(-1, keepdims=True)))
    return np.stack(columns, -1)
