"""What a training run carries from step to step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class State:
    """step: int32 scalar, batches seen; params: nested dict of float32; opt_state: optax's.

    There is no generator state: every random draw is folded in from the seed and the step.
    """

    step: jax.Array
    params: Any
    opt_state: Any

    @classmethod
    def create(cls, params: Any, opt_state: Any) -> State:
        return cls(jnp.zeros((), jnp.int32), params, opt_state)
