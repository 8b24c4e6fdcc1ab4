"""Attention: a mask as a small object, one function that attends, one module that projects."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.mesh import Layout
from llm_jax.models import layers


class Mask(NamedTuple):
    """Who may look at whom: the same segment and, if causal, not ahead.

    q_index: int [batch, l] and kv_index: int [batch, m], places in the row; q_segments, kv_segments:
    int, same shapes, 0 for padding.
    """

    q_index: jax.Array
    kv_index: jax.Array
    q_segments: jax.Array
    kv_segments: jax.Array
    causal: bool

    def dense(self) -> jax.Array:
        """bool [batch, l, m], True where a query may look."""
        allowed = self.q_segments[:, :, None] == self.kv_segments[:, None, :]
        if self.causal:
            allowed &= self.kv_index[:, None, :] <= self.q_index[:, :, None]
        return allowed


class KVCache(NamedTuple):
    """Keys and values of the tokens read so far, [batch, length, kv_heads, head_dim] each."""

    k: jax.Array
    v: jax.Array


def attend(q_blhk: jax.Array, k_bmgk: jax.Array, v_bmgk: jax.Array, mask: Mask, layout: Layout) -> jax.Array:
    """softmax(q k / sqrt(head_dim)) v, scores and softmax in float32 (Vaswani et al. 2017).

    h is a multiple of g: query heads share key-value heads (GQA, Ainslie et al. 2023). A query that
    may look at nothing gets the mean of the values, never NaN. Gives [batch, l, h, head_dim].
    """
    b, l, h, k = q_blhk.shape
    g = k_bmgk.shape[2]
    grouped = layout.spec("batch", None, "kv_heads", None, None)
    q_blgrk = jnp.reshape(q_blhk, (b, l, g, h // g, k), out_sharding=grouped)
    scores = layout.spec("batch", "kv_heads", None, None, None)
    s_bgrlm = jnp.einsum(
        "blgrk,bmgk->bgrlm",
        q_blgrk,
        k_bmgk,
        preferred_element_type=jnp.float32,
        out_sharding=scores,
    )
    allowed_b11lm = mask.dense()[:, None, None, :, :]
    s_bgrlm = jnp.where(allowed_b11lm, s_bgrlm / math.sqrt(k), jnp.finfo(jnp.float32).min)
    p_bgrlm = jax.nn.softmax(s_bgrlm, axis=-1).astype(v_bmgk.dtype)
    o_blgrk = jnp.einsum("bgrlm,bmgk->blgrk", p_bgrlm, v_bmgk, out_sharding=grouped)
    return jnp.reshape(o_blgrk, (b, l, h, k), out_sharding=layout.spec("batch", None, "heads", None))


class Attention(nn.Module):
    """Projects to queries, keys and values, turns them by position, attends, projects back."""

    config: object  # transformer.ModelConfig
    layout: Layout
    dtype: str

    @nn.compact
    def __call__(
        self,
        x_bld: jax.Array,
        positions_bl: jax.Array,
        mask: Mask,
        cache: KVCache | None = None,
        cache_index: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        """With a cache, this call's keys and values are written at ``cache_index`` and all are read."""
        c, layout = self.config, self.layout
        d, h, g, k = c.model_dim, c.num_heads, c.kv_heads, c.head_size
        std, out_std = c.std(fan_in=d), c.std(fan_in=h * k, residual=True)
        wq = layers.param(self, "query", (d, h, k), ("embed", "heads", "head"), std)
        wk = layers.param(self, "key", (d, g, k), ("embed", "kv_heads", "head"), std)
        wv = layers.param(self, "value", (d, g, k), ("embed", "kv_heads", "head"), std)
        wo = layers.param(self, "out", (h, k, d), ("heads", "head", "embed"), out_std)
        heads = layout.spec("batch", None, "heads", None)
        q_blhk = jnp.einsum("bld,dhk->blhk", x_bld, wq, out_sharding=heads)
        k_bmgk = jnp.einsum("bld,dgk->blgk", x_bld, wk, out_sharding=heads)
        v_bmgk = jnp.einsum("bld,dgk->blgk", x_bld, wv, out_sharding=heads)
        if c.positions == "rotary":
            q_blhk = layers.rotate(q_blhk, positions_bl, c.rotary_base)
            k_bmgk = layers.rotate(k_bmgk, positions_bl, c.rotary_base)
        if cache is not None:
            k_bmgk = jax.lax.dynamic_update_slice_in_dim(cache.k, k_bmgk, cache_index, axis=1)
            v_bmgk = jax.lax.dynamic_update_slice_in_dim(cache.v, v_bmgk, cache_index, axis=1)
            cache = KVCache(k_bmgk, v_bmgk)
        o_blhk = attend(q_blhk, k_bmgk, v_bmgk, mask, layout)
        y_bld = jnp.einsum("blhk,hkd->bld", o_blhk, wo, out_sharding=layout.spec("batch", None, None))
        return y_bld, cache
