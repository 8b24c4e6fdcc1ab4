"""How a model knows where a token stands: a table of schemes, each of three functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def rotate(x_blhk: jax.Array, positions_bl: jax.Array, base: float | jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves convention.

    x: [batch, length, heads, head_dim], head_dim even; positions: int [batch, length].
    Feature i is paired with i + head_dim/2 and turned by position * base^(-2i / head_dim) radians.
    """
    half = x_blhk.shape[-1] // 2
    frequencies = jnp.exp(-jnp.log(base) / half * jnp.arange(half, dtype=jnp.float32))
    angles = positions_bl[:, :, None, None, None].astype(jnp.float32) * frequencies
    sign = jnp.array([[-1.0], [1.0]])
    # Halves change places by a reversal, which is fused with what is around it; XLA's GPU compiler makes a
    # kernel of its own of a concatenation, 5% of GPT-2's step (log).
    x_blh2k = jnp.reshape(x_blhk, (*x_blhk.shape[:-1], 2, half)).astype(jnp.float32)
    turned = x_blh2k * jnp.cos(angles) + jnp.flip(x_blh2k, axis=-2) * (sign * jnp.sin(angles))
    return jnp.reshape(turned, x_blhk.shape).astype(x_blhk.dtype)


def sinusoids(positions_bl: jax.Array, dim: int) -> jax.Array:
    """float32 [batch, length, dim] (Vaswani et al. 2017): sines in the first half, cosines in the second.

    Wavelengths go geometrically from 2 pi to 10000 * 2 pi.
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) / max(half - 1, 1) * jnp.arange(half))
    angles = positions_bl[:, :, None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """float32 [heads]: 2^(-8/n), 2^(-16/n), ... for n heads, n a power of two (Press et al. 2021,
    arXiv 2108.12409); for other n, those of the power below, then every second one of the power above."""
    below = 1 << (num_heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 / below * np.arange(1, below + 1))
    between = 2.0 ** (-4.0 / below * np.arange(1, 2 * below, 2))
    return np.concatenate([slopes, between])[:num_heads].astype(np.float32)


class Scheme(NamedTuple):
    """learnt: whether the model keeps a table of positions; embed: (positions, dim) -> what is added to the
    embeddings; turn: (queries or keys, positions, base) -> the same, turned; slopes: (heads) -> ALiBi's.
    """

    learnt: bool = False
    embed: Callable | None = None
    turn: Callable | None = None
    slopes: Callable | None = None


POSITIONS = {
    "rotary": Scheme(turn=rotate),
    "learnt": Scheme(learnt=True),
    "sinusoidal": Scheme(embed=sinusoids),
    "alibi": Scheme(slopes=alibi_slopes),
    "none": Scheme(),
}
