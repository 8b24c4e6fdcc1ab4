"""The functions inside an MLP."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Activation(NamedTuple):
    """gated: out(function(gate(x)) * in(x)), else out(function(in(x)))."""

    function: Callable[[jax.Array], jax.Array]
    gated: bool = False


def relu_squared(x: jax.Array) -> jax.Array:
    """max(x, 0)^2 (So et al. 2021, Primer, arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution up to x, exact (Hendrycks and Gimpel 2016, arXiv 1606.08415).

    With a derivative of its own, which is made once, behind a barrier, and kept: XLA's CPU compiler otherwise
    makes ``erf`` again inside every product of the backward pass, a quarter of a small model's step (log). A
    GPU's makes it again where it is multiplied, once, and writes less without the barrier. And in jax 0.12.0
    the derivative of ``erf`` has no rule inside ``jax.shard_map``, where experts are.
    """
    return (x * _normal_cdf(x)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (d_x,) = primals, tangents
    slope = _gelu_slope(x).astype(x.dtype)
    slope = jax.lax.platform_dependent(slope, cuda=lambda s: s, default=jax.lax.optimization_barrier)
    return gelu(x), d_x * slope


def _normal_cdf(x: jax.Array) -> jax.Array:
    """In float32: in bfloat16 nothing is left of 1 + erf at -3."""
    return 0.5 * (1.0 + jax.lax.erf(x.astype(jnp.float32) * math.sqrt(0.5)))


def _gelu_slope(x: jax.Array) -> jax.Array:
    """In float32. Of bfloat16 what is beyond |x| is the exponential that the slope needs anyhow, times a
    polynomial in 1 / (1 + c |x|) (Hastings 1955, here with the least largest error, 1.9e-4 of it, a tenth of
    bfloat16's rounding): a GPU is busier with ``erf`` than with memory."""
    bell = jnp.exp(-0.5 * jnp.square(x.astype(jnp.float32)))
    if x.dtype == jnp.bfloat16:
        t = 1.0 / (1.0 + 0.297514 * jnp.abs(x.astype(jnp.float32)))
        beyond = t * (0.116568 + t * (0.1415502 + t * (0.02197404 + t * 0.2200004))) * bell
        below = jnp.where(x < 0, beyond, 1.0 - beyond)
    else:
        below = _normal_cdf(x)
    return below + x * bell / math.sqrt(2.0 * math.pi)


ACTIVATIONS = {
    "gelu": Activation(gelu),
    "gelu_tanh": Activation(partial(jax.nn.gelu, approximate=True)),
    "relu2": Activation(relu_squared),
    "swiglu": Activation(jax.nn.silu, gated=True),  # Shazeer 2020, arXiv 2002.05202
    "geglu": Activation(gelu, gated=True),
}
