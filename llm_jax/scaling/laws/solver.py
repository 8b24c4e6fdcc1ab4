"""Many small minimisations at once, by damped Newton steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# Doubles of one temporary array: 128 kB, so that a dozen of them fit into a core's second cache, and glibc's
# malloc does not map (and the kernel clear) new pages for each.
BLOCK = 16_000
THREADS = 2  # numpy lets go of the interpreter inside a block; the steps between blocks take one core
SHRINK, GROW = 0.4, 2.5  # of the damping, as the quadratic model foretells the gain well or badly
LONGEST = 5.0  # of a step, in any parameter
NOTHING = 1e-26  # an objective that is rounding: of 100 residuals of 1e-14
GIVEN_UP = 1e10  # damping at which no step helps any more

# (rows [k, p], which of the problems [k] they belong to) -> objective [k], gradient [k, p], Hessian [k, p, p]
# and metric [k, p, p], which is positive and what the Hessian is damped with
Evaluate = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


def minimise(
    evaluate: Evaluate, start: np.ndarray, size: int, tolerance: float = 1e-12, steps: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """A local minimum from every row of start [rows, p]: the rows [rows, p] and their objectives [rows].

    A step solves (Hessian + damping * metric) step = -gradient; the damping follows the gain as in
    Levenberg-Marquardt (Nocedal and Wright 2006, chapter 4). Rows are independent and leave as they end: when
    two steps in a row gain, or promise to gain, less than ``tolerance`` of the objective, when no step helps,
    or after ``steps``. size: doubles that ``evaluate`` has in a temporary array for each row.
    """
    x, damping, still = start.astype(float), np.ones(len(start)), np.zeros(len(start), int)
    live = np.arange(len(x))
    with ThreadPoolExecutor(THREADS) as pool, np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        state = _in_blocks(evaluate, x, live, size, pool)
        for _ in range(steps):
            value, gradient, hessian, metric = (part[live] for part in state)
            step = _step(gradient, hessian + damping[live, None, None] * metric, metric)
            tried = _in_blocks(evaluate, x[live] + step, live, size, pool)
            slope = np.einsum("rp,rp->r", step, gradient)
            promised = -slope - 0.5 * np.einsum("rp,rpq,rq->r", step, hessian, step)
            gain = value - tried[0]
            better = gain > 0  # False for nan
            moved = live[better]
            x[moved] += step[better]
            for part, new in zip(state, tried, strict=True):
                part[moved] = new[better]
            with np.errstate(divide="ignore", invalid="ignore"):
                good = np.where(better, gain / np.abs(promised), 0.0)
            damping[live] *= np.where(good > 0.75, SHRINK, np.where(good < 0.25, GROW, 1.0))
            small = np.where(better, gain, np.abs(slope)) <= tolerance * value + NOTHING
            still[live] = np.where(small, still[live] + 1, 0)
            live = live[(still[live] < 2) & (damping[live] < GIVEN_UP)]
            if not len(live):
                break
    return x, state[0]


def _step(gradient: np.ndarray, damped: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """[rows, p], at most LONGEST."""
    scale = np.maximum(np.einsum("rpp->rp", metric), np.einsum("rpp->rp", damped))
    floor = 1e-10 * scale + 1e-12 * scale.sum(-1, keepdims=True) + 1e-300  # for what nothing depends on
    damped = damped + floor[:, None] * np.eye(gradient.shape[1])
    step = -np.linalg.solve(damped, gradient[..., None])[..., 0]
    longest = np.abs(step).max(-1, keepdims=True)
    return step * np.minimum(1.0, LONGEST / np.maximum(longest, 1e-300))


def _in_blocks(
    evaluate: Evaluate, rows: np.ndarray, which: np.ndarray, size: int, pool: ThreadPoolExecutor
) -> list[np.ndarray]:
    rows_a_block = max(1, BLOCK // size)
    cuts = [slice(i, i + rows_a_block) for i in range(0, len(rows), rows_a_block)]
    if len(cuts) == 1:
        return list(evaluate(rows, which))

    def one(cut: slice) -> tuple[np.ndarray, ...]:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # it is each thread's own
            return evaluate(rows[cut], which[cut])

    return [np.concatenate(parts) for parts in zip(*pool.map(one, cuts), strict=True)]
