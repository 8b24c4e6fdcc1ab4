"""Splash attention on one device, as it comes with jax.

Letters of the axes as in attend.py.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from llm_jax.models.attend import Mask, by_window


def attend(
    q_blgrk: jax.Array,
    k_bmgk: jax.Array,
    v_bmgk: jax.Array,
    mask: Mask,
    softcap: float,
    block: int,
    interpret: bool,
) -> jax.Array:
    """On one device, ``block`` queries and as many keys at a time; a kernel a window, of which one runs."""
    b, l, g, r, k = q_blgrk.shape
    m = k_bmgk.shape[1]
    scaled = (q_blgrk.astype(jnp.float32) / math.sqrt(k)).astype(q_blgrk.dtype)
    q_bhlk = jnp.reshape(jnp.einsum("blgrk->bgrlk", scaled), (b, g * r, l, k))
    k_bgmk, v_bgmk = (jnp.einsum("bmgk->bgmk", x) for x in (k_bmgk, v_bmgk))
    segments = kernels.SegmentIds(mask.q_segments, mask.kv_segments)

    def within(window: int, *arrays: Any) -> jax.Array:
        static = _static_mask(l, m, mask.causal, window)
        return jax.vmap(_kernel(static, g * r, l, mask.q_start, softcap, block, interpret))(*arrays)

    o_bhlk = by_window(mask, within, q_bhlk, k_bgmk, v_bgmk, segments)
    return jnp.einsum("bgrlk->blgrk", jnp.reshape(o_bhlk, (b, g, r, l, k)))


def _static_mask(l: int, m: int, causal: bool, window: int) -> masks.Mask:
    """Of the keys as queries, [m, m]; where any query sees every key, only [l, m]."""
    if 0 < window < m:
        return masks.LocalMask((m, m), (window - 1, 0 if causal else window - 1), offset=0)
    return masks.CausalMask((m, m)) if causal else masks.FullMask((l, m))


def _kernel(
    mask: masks.Mask, heads: int, l: int, q_start: jax.Array, softcap: float, block: int, interpret: bool
) -> kernels.SplashAttentionKernel:
    """The kernel for l queries from ``q_start`` on, of all that the mask has."""
    pieces = mask.shape[0] // l
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(*[block] * 8),
        head_shards=1,
        q_seq_shards=pieces,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )

    def cut(x: jax.Array) -> jax.Array:
        """Lists of blocks [1, blocks of queries, blocks of keys] and places of queries [m], to one piece:
        as shard_map would cut them, were the queries dealt out in order."""
        axis = min(1, x.ndim - 1)
        size = x.shape[axis] // pieces
        return jax.lax.dynamic_slice_in_dim(x, q_start // l * size, size, axis)

    return jax.tree.map(cut, kernel) if pieces > 1 else kernel
