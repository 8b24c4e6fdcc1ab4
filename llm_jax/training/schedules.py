"""Learning rate as a function of the number of updates made: a dataclass each, ``build(peak, steps)``.

All are made of shares of the peak, reach their end at update ``steps`` and stay there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import jax.numpy as jnp
import optax
from jax import Array

from llm_jax.config import identity
from llm_jax.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from peak / (warmup_steps + 1) to the peak at update warmup_steps, then ``shape``."""

    warmup_steps: int = identity(20)

    def check(self, steps: int) -> None:
        """Raises UserError for what does not fit into a run of so many steps."""
        if not 0 <= self.warmup_steps < steps:
            raise UserError(
                f"config.schedule.warmup_steps={self.warmup_steps} must be less than steps={steps}"
                " and at least 0: set --config.schedule.warmup_steps, too"
            )

    def shape(self, t: Array, length: int) -> Array:
        """The share of the peak ``t`` updates after the warm-up; ``length`` is what is left of the run."""
        raise NotImplementedError

    def build(self, peak: float, steps: int) -> optax.Schedule:
        self.check(steps)
        warmup = self.warmup_steps

        def rate(count: Array | int) -> Array:
            count = jnp.minimum(count, steps)
            share = self.shape(jnp.maximum(count - warmup, 0), steps - warmup)
            return peak * jnp.where(count < warmup, (count + 1) / (warmup + 1), share)

        return rate


@dataclass(frozen=True)
class Constant(Schedule):
    """The peak, after the warm-up."""

    def shape(self, t: Array, length: int) -> Array:
        return jnp.ones_like(t, jnp.float32)


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """A half cosine to ``end_ratio * peak`` (Loshchilov and Hutter 2016, arXiv 1608.03983)."""

    end_ratio: float = identity(0.1)

    def shape(self, t: Array, length: int) -> Array:
        return _between(_half_cosine(t / length), self.end_ratio)


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line to ``end_ratio * peak``."""

    end_ratio: float = identity(0.0)

    def shape(self, t: Array, length: int) -> Array:
        return _between(1.0 - t / length, self.end_ratio)


@dataclass(frozen=True)
class StepDecay(Schedule):
    """The peak times ``factor`` for every boundary passed (He et al. 2015, arXiv 1512.03385).

    boundaries: shares of what is left after the warm-up, rounded up to an update.
    """

    boundaries: tuple[float, ...] = identity((0.5, 0.75))
    factor: float = identity(0.1)

    def check(self, steps: int) -> None:
        super().check(steps)
        if not all(0.0 < share < 1.0 for share in self.boundaries):
            raise UserError(f"config.schedule.boundaries must lie between 0 and 1, not {self.boundaries}")

    def shape(self, t: Array, length: int) -> Array:
        passed = sum(t >= math.ceil(share * length) for share in self.boundaries)
        return self.factor ** jnp.asarray(passed, jnp.float32)


@dataclass(frozen=True)
class Triangular(Schedule):
    """Up and down between ``low_ratio * peak`` and the peak (Smith 2015, arXiv 1506.01186).

    half_cycle: updates from low to high. decay: what each cycle's height is times the one before, 1 for
    Smith's "triangular", 0.5 for his "triangular2". The first rise is the warm-up, so there is no other.
    """

    warmup_steps: int = identity(0)
    half_cycle: int = identity(50)
    low_ratio: float = identity(0.1)
    decay: float = identity(1.0)

    def check(self, steps: int) -> None:
        super().check(steps)
        _at_least_one("half_cycle", self.half_cycle)

    def shape(self, t: Array, length: int) -> Array:
        cycle = t // (2 * self.half_cycle)
        place = t % (2 * self.half_cycle) / self.half_cycle  # 0 and 2 at the feet, 1 at the top
        return _between((1.0 - jnp.abs(place - 1.0)) * self.decay**cycle, self.low_ratio)


@dataclass(frozen=True)
class CosineRestarts(Schedule):
    """Half cosines that start again at the peak: SGDR (Loshchilov and Hutter 2016, arXiv 1608.03983).

    first_cycle: updates of the first; every other is ``growth`` times as long as the one before it.
    """

    first_cycle: int = identity(100)
    growth: int = identity(2)
    end_ratio: float = identity(0.0)

    def check(self, steps: int) -> None:
        super().check(steps)
        _at_least_one("first_cycle", self.first_cycle)
        _at_least_one("growth", self.growth)

    def shape(self, t: Array, length: int) -> Array:
        lengths, total = [], 0
        while total <= length:
            lengths.append(self.first_cycle * self.growth ** len(lengths))
            total += lengths[-1]
        starts = [0, *accumulate(lengths[:-1])]
        cycle = jnp.sum(t >= jnp.asarray(starts)) - 1
        passed = (t - jnp.asarray(starts)[cycle]) / jnp.asarray(lengths)[cycle]
        return _between(_half_cosine(passed), self.end_ratio)


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """peak * sqrt((warmup_steps + 1) / (updates + 1)) (Vaswani et al. 2017, arXiv 1706.03762): no horizon."""

    def shape(self, t: Array, length: int) -> Array:
        start = self.warmup_steps + 1
        return jnp.sqrt(start / (start + t))


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395): the peak until the last ``decay_share`` of
    all steps, then down to ``end_ratio * peak``.

    decay: "linear", or "sqrt" for 1 - sqrt, which is steep first (Hägele et al. 2024, arXiv 2405.18392).
    """

    decay_share: float = identity(0.2)
    decay: str = identity("sqrt")
    end_ratio: float = identity(0.0)

    def check(self, steps: int) -> None:
        super().check(steps)
        if self.decay not in DECAYS:
            raise UserError(f"config.schedule.decay is {self.decay!r}; choose one of {', '.join(DECAYS)}")
        if self.warmup_steps + self._decay_steps(steps) > steps:
            raise UserError(
                f"config.schedule: warmup_steps={self.warmup_steps} and the last "
                f"{self._decay_steps(steps)} steps (decay_share) do not fit into steps={steps}"
            )

    def _decay_steps(self, steps: int) -> int:
        return max(1, round(self.decay_share * steps))

    def shape(self, t: Array, length: int) -> Array:
        falling = self._decay_steps(length + self.warmup_steps)
        passed = jnp.clip((t - (length - falling)) / falling, 0.0, 1.0)
        return _between(DECAYS[self.decay](passed), self.end_ratio)


# the share left after a share of the decay
DECAYS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda passed: 1.0 - passed,
    "sqrt": lambda passed: 1.0 - jnp.sqrt(passed),
}

SCHEDULES = {
    "constant": Constant,
    "cosine": WarmupCosine,
    "linear": Linear,
    "step": StepDecay,
    "triangular": Triangular,
    "restarts": CosineRestarts,
    "inverse_sqrt": InverseSqrt,
    "wsd": WSD,
}


def _between(share: Array, low: float) -> Array:
    """1 to 1, 0 to ``low``."""
    return low + (1.0 - low) * share


def _half_cosine(passed: Array) -> Array:
    """1 at 0, 0 at 1."""
    return 0.5 * (1.0 + jnp.cos(jnp.pi * passed))


def _at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise UserError(f"config.schedule.{key} must be at least 1, not {value}")
