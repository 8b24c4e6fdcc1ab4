"""Attention on TPUs: splash attention, the Pallas kernel that comes with jax, on each device for its rows and
heads.

Exact, block by block, softmax kept running in float32 (Dao et al. 2022, FlashAttention, arXiv 2205.14135).
Blocks that the causal mask or a window shuts out are not visited; which these are is found when the step is
traced, so that a window must be known then. On other platforms it is interpreted: slow, for tests.

Letters of the axes as in attend.py.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from llm_jax.errors import UserError
from llm_jax.layout import Layout
from llm_jax.models.attend import Mask, Scoring, by_window

# Of queries and of keys, 512 as in MaxText; the largest that divides the length is taken.
BLOCKS = (512, 256, 128)


def unfit(q_blgrk: jax.Array, k_bmgk: jax.Array, mask: Mask, scoring: Scoring) -> str:
    """Why the kernel cannot take these, in words; "" where it can."""
    queries, keys = q_blgrk.shape[1], k_bmgk.shape[1]
    if scoring.slopes is not None:
        return "it has no ALiBi slopes"
    if queries % BLOCKS[-1]:
        return f"{queries} queries at a time are no multiple of {BLOCKS[-1]}"
    if keys % queries:
        return f"{keys} keys are no multiple of the {queries} queries"
    start = mask.q_start if isinstance(mask.q_start, int) else mask.q_multiple
    if start % queries:
        return f"the queries start at any of the {keys} keys"
    unknown = isinstance(mask.window, jax.Array) and not mask.windows
    return "what the window may be is not known" if unknown else ""


def splash(
    q_blgrk: jax.Array, k_bmgk: jax.Array, v_bmgk: jax.Array, mask: Mask, scoring: Scoring, layout: Layout
) -> jax.Array:
    """The same as ``attend.dense`` up to rounding, with O(l + m) memory. [batch, l, g, r, k].

    Queries are divided by sqrt(head_dim) before the products, not the scores after them: in bfloat16 that
    rounds once more. Raises UserError where the kernel cannot take these shapes.
    """
    if reason := unfit(q_blgrk, k_bmgk, mask, scoring):
        raise UserError(f"config.model.kernel is splash, but {reason}; choose auto")

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *of_mask: jax.Array) -> jax.Array:
        own = mask._replace(**dict(zip(traced, of_mask, strict=True)))
        return _attend(q, k, v, own, scoring.softcap, interpret=layout.platform != "tpu")

    traced = ("q_segments", "kv_segments", "q_start")
    arrays = (q_blgrk, k_bmgk, v_bmgk, mask.q_segments, mask.kv_segments, jnp.asarray(mask.q_start))
    by_head = ("batch", None, "kv_heads", None)
    names = ((*by_head, None), by_head, by_head, ("batch", None), ("batch", None), ())
    if isinstance(mask.window, jax.Array):
        traced, arrays, names = (*traced, "window"), (*arrays, mask.window), (*names, ())
    if jax.sharding.get_abstract_mesh().manual_axes:  # inside context.attend each device has its own already
        return local(*arrays)
    arrays = tuple(layout.shard(x, *own) for x, own in zip(arrays, names, strict=True))
    # The kernel does not say along which mesh axes its results vary, so this cannot be checked.
    return layout.on_devices(local, arrays, q_blgrk, layout.spec(*by_head, None), check_vma=False)


def _attend(
    q_blgrk: jax.Array, k_bmgk: jax.Array, v_bmgk: jax.Array, mask: Mask, softcap: float, interpret: bool
) -> jax.Array:
    """On one device; a kernel for each window, of which one runs."""
    b, l, g, r, k = q_blgrk.shape
    m = k_bmgk.shape[1]
    scaled = (q_blgrk.astype(jnp.float32) / math.sqrt(k)).astype(q_blgrk.dtype)
    q_bhlk = jnp.reshape(jnp.einsum("blgrk->bgrlk", scaled), (b, g * r, l, k))
    k_bgmk, v_bgmk = (jnp.einsum("bmgk->bgmk", x) for x in (k_bmgk, v_bmgk))
    segments = kernels.SegmentIds(mask.q_segments, mask.kv_segments)

    def within(window: int, *arrays: Any) -> jax.Array:
        static = _static_mask(l, m, mask.causal, window)
        return jax.vmap(_kernel(static, g * r, l, mask.q_start, softcap, interpret))(*arrays)

    o_bhlk = by_window(mask, within, q_bhlk, k_bgmk, v_bgmk, segments)
    return jnp.einsum("bgrlk->blgrk", jnp.reshape(o_bhlk, (b, g, r, l, k)))


def _static_mask(l: int, m: int, causal: bool, window: int) -> masks.Mask:
    """Of the keys as queries, [m, m]; where any query sees every key, only [l, m]."""
    if 0 < window < m:
        return masks.LocalMask((m, m), (window - 1, 0 if causal else window - 1), offset=0)
    return masks.CausalMask((m, m)) if causal else masks.FullMask((l, m))


def _kernel(
    mask: masks.Mask, heads: int, l: int, q_start: jax.Array, softcap: float, interpret: bool
) -> kernels.SplashAttentionKernel:
    """The kernel for l queries from ``q_start`` on, of all that the mask has."""
    block = max(size for size in BLOCKS if l % size == 0)
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
