"""Products of matrices in 8 bits: operands rounded to e4m3, gradients to e5m2, with a scale for each tensor,
from its own largest entry (Micikevicius et al. 2022, arXiv 2209.05433).

Nothing is multiplied here: a product of rounded operands is what XLA's GPU compiler turns into one of
cuBLASLt's in 8 bits. On other platforms the rounding alone is seen, which is what tests look at.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

OPERAND, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """``x`` as 8 bits can say it, in its own dtype; its largest entry becomes the type's largest."""
    spec = jax.typeof(x).sharding.spec
    if spec.reduced:  # says how gradients are summed, and jax refuses to take the largest of such an array
        return jax.sharding.reshard(
            rounded(jax.sharding.reshard(x, spec.update(reduced=frozenset())), dtype), spec
        )
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    # Rounded before it divides, so that what it multiplies comes back.
    scale = jnp.maximum(largest / float(jnp.finfo(dtype).max), float(jnp.finfo(x.dtype).tiny)).astype(x.dtype)
    small = jnp.clip(x.astype(jnp.float32) / scale, *_range(dtype)).astype(dtype)
    return small.astype(x.dtype) * scale


def _range(dtype: Any) -> tuple[float, float]:
    return float(jnp.finfo(dtype).min), float(jnp.finfo(dtype).max)


@jax.custom_vjp
def operand(x: jax.Array) -> jax.Array:
    """Rounded to e4m3; the gradient passes as it is."""
    return rounded(x, OPERAND)


operand.defvjp(lambda x: (rounded(x, OPERAND), None), lambda _, d_y: (d_y,))


@jax.custom_vjp
def result(y: jax.Array) -> jax.Array:
    """As it is; the gradient, which is an operand of two products, is rounded to e5m2."""
    return y


result.defvjp(lambda y: (y, None), lambda _, d_y: (rounded(d_y, GRADIENT),))
