"""Dynamic loss scaling, which keeps float16 gradients between zero and infinity.

The loss is multiplied by a scale before it is differentiated and the gradients are divided by it after
(Micikevicius et al. 2017, arXiv 1710.03740). float16 has 5 bits of exponent: unscaled, small gradients
would become zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from llm_jax.config import runtime


@struct.dataclass
class LossScale:
    """scale: float32 scalar; good: int32 scalar, steps with finite gradients since it last changed."""

    scale: jax.Array
    good: jax.Array


@dataclass(frozen=True)
class LossScaleConfig:
    """Used with model.dtype="float16" alone. initial: the first scale; growth_interval: after so many steps
    with finite gradients it is doubled. One whose gradients are not halves it, to 1 at least."""

    initial: float = runtime(2.0**15)
    growth_interval: int = runtime(2000)

    def create(self) -> LossScale:
        return LossScale(jnp.float32(self.initial), jnp.zeros((), jnp.int32))

    def after(self, old: LossScale, finite: jax.Array) -> LossScale:
        """The scale of the next step. finite: bool scalar, whether this step's gradients were."""
        good = old.good + 1
        grow = good == self.growth_interval
        scale = jnp.where(grow, 2.0 * old.scale, old.scale)
        scale = jnp.where(finite, scale, jnp.maximum(0.5 * old.scale, 1.0))
        return LossScale(scale, jnp.where(finite & ~grow, good, 0))
