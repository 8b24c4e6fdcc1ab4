"""What a training run carries from step to step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llm_jax.training.guard import Guard, GuardConfig
from llm_jax.training.loss_scale import LossScale


@struct.dataclass
class State:
    """step: int32 scalar, batches seen; params: nested dict of float32; opt_state: optax's.

    guard: what it remembers of the steps before; ema: the running mean of the parameters, shaped as they
    are, or None; loss_scale: with float16, or None. There is no generator state: every random draw is
    folded in from the seed and the step.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    guard: Guard
    ema: Any = None
    loss_scale: LossScale | None = None

    @classmethod
    def create(
        cls,
        params: Any,
        opt_state: Any,
        guard: Guard | None = None,
        ema: bool = False,
        loss_scale: LossScale | None = None,
    ) -> State:
        """At step 0. guard: the default one if not given; ema: keep a running mean, which begins at the
        parameters."""
        # A copy: a step that is given its state to use up cannot be given one buffer twice.
        mean = jax.tree.map(jnp.copy, params) if ema else None
        guard = guard or GuardConfig().create()
        return cls(jnp.zeros((), jnp.int32), params, opt_state, guard, mean, loss_scale)

    @property
    def judged(self) -> Any:
        """The parameters to evaluate, to sample and to ship: the running mean where there is one."""
        return self.params if self.ema is None else self.ema
