"""The small pieces every model is made of.

Arrays carry their shape as a suffix, one letter an axis: b batch, l length (queries), m length (keys),
d model, h query heads, g key-value heads, r query heads per key-value head, k head, f mlp, v vocabulary.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.mesh import Layout


def param(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], std: float
) -> jax.Array:
    """Declares a float32 parameter, normal with ``std``, and gives it in its compute layout.

    The module has a ``layout`` and a ``dtype``. Called inside a rematerialised block, the gather from
    storage to compute layout happens there too, so gathered weights are not kept for the backward pass.
    """
    layout: Layout = module.layout

    def init(key: jax.Array) -> jax.Array:
        return layout.store(std * jax.random.normal(key, shape, jnp.float32), *axes)

    return layout.shard(module.param(name, init).astype(module.dtype), *axes)


def scale_param(module: nn.Module, name: str, size: int, axis: str) -> jax.Array:
    """Declares a float32 vector of ones: the gain of a norm."""
    layout: Layout = module.layout
    scale = module.param(name, lambda _: layout.store(jnp.ones((size,), jnp.float32), axis))
    return jax.sharding.reshard(scale, jax.sharding.PartitionSpec(None))


class RMSNorm(nn.Module):
    """x / rms(x) * scale in float32 (Zhang and Sennrich 2019, arXiv 1910.07467). [..., d] to [..., d]."""

    layout: Layout
    dtype: str
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        scale = scale_param(self, "scale", x.shape[-1], "embed")
        return (x32 * rms * scale).astype(self.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale in float32, no bias (Ba et al. 2016, arXiv 1607.06450)."""

    layout: Layout
    dtype: str
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        scale = scale_param(self, "scale", x.shape[-1], "embed")
        return (x32 * inverse * scale).astype(self.dtype)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a ``rate`` share of ``x`` and scales the rest up (Srivastava et al. 2014).

    The mask is drawn in the sharding of ``x`` and is the same on any mesh. key=None: evaluation.
    """
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape, out_sharding=jax.typeof(x).sharding)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def rotate(x_blhk: jax.Array, positions_bl: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves convention.

    x: [batch, length, heads, head_dim], head_dim even; positions: int [batch, length].
    Feature i is paired with i + head_dim/2 and turned by position * base^(-2i / head_dim) radians.
    """
    half = x_blhk.shape[-1] // 2
    frequencies = jnp.exp(-math.log(base) / half * jnp.arange(half, dtype=jnp.float32))
    angles = positions_bl[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = x_blhk[..., :half].astype(jnp.float32), x_blhk[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_blhk.dtype)
