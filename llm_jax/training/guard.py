"""The guard against bad numbers: it judges every step on the device, before anything is changed by it.

A step is bad when its loss or its gradient is not finite, or when the norm of its gradient lies far above
those of the steps before. It is left out: parameters, optimiser state and running mean stay as they are.
The judgement is arithmetic on two scalars that the step has anyway, the same on every device: nothing is
communicated and nothing goes to the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from llm_jax.config import identity, runtime
from llm_jax.errors import UserError


@struct.dataclass
class Guard:
    """in_row: int32 scalar, bad steps since the last one that was applied; norms: float32 [window], gradient
    norms of the last applied steps, as a ring; count: int32 scalar, how many were ever written to it. The
    ring is None where norms have no limit."""

    in_row: jax.Array
    norms: jax.Array | None = None
    count: jax.Array | None = None


class Verdict(NamedTuple):
    """applied: bool scalar; finite: bool scalar, of loss and gradient; guard: of the next step; metrics:
    float32 scalars."""

    applied: jax.Array
    finite: jax.Array
    guard: Guard
    metrics: dict[str, jax.Array]


@dataclass(frozen=True)
class GuardConfig:
    """sigma: a gradient norm is bad above the mean of the last ``window`` applied steps by so many of their
    standard deviations, from when there are so many; 0 = any finite norm is good. OLMo-core's numbers are 6
    and 128. patience: after so many bad steps in a row the run ends, with its state from before them.
    """

    sigma: float = identity(0.0, neutral=0.0)
    window: int = identity(128, neutral=128)
    patience: int = runtime(16)

    def check(self) -> None:
        """Raises UserError for values that make no guard."""
        if self.sigma < 0.0:
            raise UserError(f"config.guard.sigma must be at least 0, not {self.sigma}")
        if self.window < 2 or self.patience < 1:
            raise UserError(
                f"config.guard: window must be at least 2 and patience at least 1, not {self.window} "
                f"and {self.patience}"
            )

    def create(self) -> Guard:
        """Before the first step."""
        zero = jnp.zeros((), jnp.int32)
        if not self.sigma:
            return Guard(zero)
        return Guard(zero, jnp.zeros(self.window, jnp.float32), jnp.zeros((), jnp.int32))

    def limit(self, guard: Guard) -> jax.Array:
        """The largest good norm, float32 scalar: infinity until the window is full."""
        if guard.norms is None:
            return jnp.float32(jnp.inf)
        limit = jnp.mean(guard.norms) + self.sigma * jnp.std(guard.norms)
        return jnp.where(guard.count >= self.window, limit, jnp.inf)

    def judge(self, old: Guard, loss: jax.Array, grad_norm: jax.Array, scale: jax.Array | float) -> Verdict:
        """Whether a step is applied. loss, grad_norm: float32 scalars; scale: the loss scale, 1 without.

        A gradient that overflows under a loss scale above 1 is left out and not bad: the scale is about
        to be halved. After ``patience`` bad steps nothing is applied any more, so that the rest of a
        dispatch does not go on from a state that the run has given up.
        """
        limit = self.limit(old)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        overflow = jnp.isfinite(loss) & ~jnp.isfinite(grad_norm) & (scale > 1.0)
        halted = old.in_row >= self.patience
        good = finite & (grad_norm <= limit)
        applied = good & ~halted
        bad = ~good & ~overflow & ~halted
        in_row = jnp.where(applied, 0, old.in_row + bad)
        metrics = {"skipped": 1.0 - applied, "bad_in_row": jnp.where(bad | halted, in_row, 0.0)}
        guard = old.replace(in_row=in_row)
        if old.norms is not None:
            place = jnp.arange(self.window) == old.count % self.window
            guard = guard.replace(
                norms=jnp.where(place & applied, grad_norm, old.norms), count=old.count + applied
            )
            metrics["grad_norm_limit"] = limit
        return Verdict(applied, finite, guard, metrics)
