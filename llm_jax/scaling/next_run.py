"""Which run to make next: the one that takes most of the doubt from a forecast.

Each resampled fit foretells both the target and a candidate run. Where the two move together, seeing the one
narrows the other: to first order the variance of the target falls by cov^2 / (var + noise^2), noise being
what single runs scatter by (Chaloner and Verdinelli 1995, Statistical Science 10, linear-Gaussian design). It
knows of noise alone; a wrong form is better seen by a dearer run, which is why costs are shown beside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_jax.errors import UserError
from llm_jax.scaling.laws.methods import Law

SHARES = (0.01, 0.03, 0.1, 0.3)  # of the target's compute, that a candidate costs
SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the best size for it


@dataclass(frozen=True)
class Candidate:
    """A run, its cost, and what it would do: the share of the forecast's deviation that is left after it."""

    flops: float
    params: float
    tokens: float
    left: float


def candidates(law: Law, drawn: Law | None, target: float, noise: float) -> list[Candidate]:
    """Of each of SHARES of the target's compute the most telling size.

    law: a surface; drawn: its resamples, fields [repeats]; target: FLOPs of the run that is to be foretold,
    at its best size; noise: standard deviation of a run's log loss. Raises UserError for a law that has no
    loss of any run, or no resamples.
    """
    if drawn is None or not hasattr(law, "loss"):
        raise UserError(
            "the next run is chosen by a surface with resamples: --method=surface, --bootstrap > 0"
        )
    wanted = np.log(drawn.loss(*law.optimum(target)))
    found = []
    for flops in (share * target for share in SHARES):
        best = float(law.optimum(flops)[0])
        sizes = [(best * size, flops / (law.flops_per * best * size)) for size in SIZES]
        left = [_left(wanted, np.log(drawn.loss(*size)), noise) for size in sizes]
        found.append(Candidate(flops, *sizes[int(np.argmin(left))], min(left)))
    return found


def _left(target: np.ndarray, seen: np.ndarray, noise: float) -> float:
    good = np.isfinite(target) & np.isfinite(seen)
    both = np.cov(target[good], seen[good])
    return float(np.sqrt(max(0.0, 1.0 - both[0, 1] ** 2 / (both[0, 0] * (both[1, 1] + noise**2)))))
