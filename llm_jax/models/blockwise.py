"""Exact attention in linear memory: blocks of queries against blocks of keys, softmax kept running.

Rabe and Staats 2021 (arXiv 2112.05682) and Dao et al. 2022 (FlashAttention, arXiv 2205.14135), in plain jax,
for backends that have no such kernel of their own. Blocks that a causal mask or a window shuts out are not
computed. The backward pass makes the scores again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.layout import Layout
from llm_jax.models.attend import NOTHING, Mask, Scoring, scores

BLOCK = 256  # of queries and of keys; benchmarks/attention_kernels.py compares sizes


def blockwise(
    q_blgrk: jax.Array, k_bmgk: jax.Array, v_bmgk: jax.Array, mask: Mask, scoring: Scoring, layout: Layout
) -> jax.Array:
    """The same as ``attend.dense`` up to rounding, with O(l + m) memory. [batch, l, g, r, k]."""
    length = q_blgrk.shape[1]
    q_blgrk = _pad(layout.shard(q_blgrk, "batch", None, "kv_heads", None, None))
    k_bmgk, v_bmgk = (_pad(layout.shard(x, "batch", None, "kv_heads", None)) for x in (k_bmgk, v_bmgk))
    # Padding is a segment of its own, so that nothing looks at it.
    mask = mask._replace(q_segments=_pad(mask.q_segments), kv_segments=_pad(mask.kv_segments, -1))
    static = _Static(mask.causal, scoring.softcap, layout)
    q_start = jnp.asarray(mask.q_start)
    window = jnp.asarray(0 if mask.window is None else mask.window)
    arrays = _Arrays(mask.q_segments, mask.kv_segments, q_start, window, scoring.slopes)
    return _attention(static, q_blgrk, k_bmgk, v_bmgk, arrays)[:, :length]


@dataclass(frozen=True)
class _Static:
    causal: bool
    softcap: float
    layout: Layout


class _Arrays(NamedTuple):
    """What of mask and scoring is traced: it needs no gradient."""

    q_segments: jax.Array
    kv_segments: jax.Array
    q_start: jax.Array
    window: jax.Array
    slopes: jax.Array | None


def _pad(x: jax.Array, fill: int = 0) -> jax.Array:
    """Axis 1 up to a multiple of BLOCK."""
    extra = -x.shape[1] % BLOCK
    return jnp.pad(x, [(0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)], constant_values=fill) if extra else x


def _slice(x: jax.Array, block: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, block * BLOCK, BLOCK, axis=1)


def _place(x: jax.Array, part: jax.Array, block: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), block * BLOCK, axis=1)


def _key_blocks(static: _Static, a: _Arrays, q_block: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """first, last + 1 of the blocks of keys that a block of queries can see at all."""
    begin = a.q_start + q_block * BLOCK
    end = begin + BLOCK  # of the queries' places among the keys
    reach = jnp.where(a.window > 0, a.window - 1, count * BLOCK)
    last = end if static.causal else jnp.minimum(end + reach, count * BLOCK)
    return jnp.maximum(begin - reach, 0) // BLOCK, jnp.minimum(-(-last // BLOCK), count)


def _masked_scores(
    static: _Static, a: _Arrays, q_block: jax.Array, kv_block: jax.Array, q: jax.Array, k: jax.Array
) -> jax.Array:
    """Scores [b, g, r, BLOCK, BLOCK] of one block of queries against one of keys."""
    mask = Mask(a.q_segments, a.kv_segments, static.causal, a.q_start, a.window)
    place = (q_block * BLOCK, BLOCK, kv_block * BLOCK, BLOCK)
    s = scores(q, k, mask.distance(*place), Scoring(a.slopes, static.softcap), static.layout)
    return jnp.where(mask.block(*place)[:, None, None], s, NOTHING)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q: jax.Array, k: jax.Array, v: jax.Array, a: _Arrays) -> jax.Array:
    return _forward(static, q, k, v, a)[0]


def _forward(static: _Static, q: jax.Array, k: jax.Array, v: jax.Array, a: _Arrays) -> tuple:
    """Output, and what the backward pass needs: for each query the largest score and the sum above it."""
    by_query = static.layout.spec("batch", None, "kv_heads", None, None)
    by_score = static.layout.spec("batch", "kv_heads", None, None, None)

    def query_block(i: jax.Array, out: tuple) -> tuple:
        q_i = _slice(q, i)

        def key_block(j: jax.Array, carry: tuple) -> tuple:
            o, top, total = carry
            s = _masked_scores(static, a, i, j, q_i, _slice(k, j))
            new_top = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
            shrink = jnp.exp(top - new_top)
            p = jnp.exp(s - new_top)
            o_j = jnp.einsum(
                "bgrlm,bmgk->bgrlk",
                p.astype(v.dtype),
                _slice(v, j),
                preferred_element_type=jnp.float32,
                out_sharding=by_score,
            )
            return o * shrink + o_j, new_top, total * shrink + jnp.sum(p, axis=-1, keepdims=True)

        o = jnp.einsum("blgrk->bgrlk", jnp.zeros_like(q_i, jnp.float32), out_sharding=by_score)
        column = o[..., :1]
        bounds = _key_blocks(static, a, i, k.shape[1] // BLOCK)
        o, top, total = jax.lax.fori_loop(*bounds, key_block, (o, column + NOTHING, column))
        # A block of queries that sees no block of keys has no sum to divide by.
        total = jnp.where(total == 0.0, 1.0, total)
        o_i = jnp.einsum("bgrlk->blgrk", o / total, out_sharding=by_query)
        stats = (jnp.einsum("bgrlk->blgrk", x, out_sharding=by_query) for x in (top, total))
        return tuple(_place(x, part, i) for x, part in zip(out, (o_i, *stats), strict=True))

    wide = jnp.zeros_like(q, jnp.float32)
    empty = (jnp.zeros_like(q), wide[..., :1], wide[..., :1])
    o, top, total = jax.lax.fori_loop(0, q.shape[1] // BLOCK, query_block, empty)
    return o, (q, k, v, a, o, top, total)


def _backward(static: _Static, saved: tuple, d_o: jax.Array) -> tuple:
    q, k, v, a, o, top, total = saved
    by_key = static.layout.spec("batch", None, "kv_heads", None)
    by_score = static.layout.spec("batch", "kv_heads", None, None, None)
    # d loss / d score = p * (d_p - delta), delta the mean of d_p under p (FlashAttention, section 3.1).
    delta = jnp.sum(d_o.astype(jnp.float32) * o.astype(jnp.float32), axis=-1, keepdims=True)

    def query_block(i: jax.Array, sums: tuple) -> tuple:
        q_i, d_o_i = _slice(q, i), _slice(d_o, i)
        heads_first = partial(jnp.einsum, "blgrk->bgrlk", out_sharding=by_score)
        top_i, total_i, delta_i = (heads_first(_slice(x, i)) for x in (top, total, delta))

        def key_block(j: jax.Array, carry: tuple) -> tuple:
            d_q_i, d_k, d_v = carry
            k_j, v_j = _slice(k, j), _slice(v, j)
            s, pull = jax.vjp(partial(_masked_scores, static, a, i, j), q_i, k_j)
            p = jnp.exp(s - top_i) / total_i
            d_p = jnp.einsum("blgrk,bmgk->bgrlm", d_o_i, v_j, out_sharding=by_score).astype(jnp.float32)
            d_v_j = jnp.einsum("bgrlm,blgrk->bmgk", p.astype(d_o.dtype), d_o_i, out_sharding=by_key)
            d_q_ij, d_k_j = pull(p * (d_p - delta_i))
            d_k = _place(d_k, _slice(d_k, j) + d_k_j, j)
            return d_q_i + d_q_ij, d_k, _place(d_v, _slice(d_v, j) + d_v_j, j)

        d_q, d_k, d_v = sums
        bounds = _key_blocks(static, a, i, k.shape[1] // BLOCK)
        start = (jnp.zeros_like(q_i, jnp.float32), d_k, d_v)
        d_q_i, d_k, d_v = jax.lax.fori_loop(*bounds, key_block, start)
        return _place(d_q, d_q_i, i), d_k, d_v

    zeros = (jnp.zeros_like(q), jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32))
    d_q, d_k, d_v = jax.lax.fori_loop(0, q.shape[1] // BLOCK, query_block, zeros)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attention.defvjp(_forward, _backward)
