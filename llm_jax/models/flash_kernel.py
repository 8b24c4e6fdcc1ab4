"""FlashAttention in Pallas: exact, block by block, softmax kept running in float32 (Dao et al. 2022, arXiv
2205.14135; the backward pass as in FlashAttention-2, arXiv 2307.08691).

Which blocks can see one another is found before the kernel runs, from causality, the window and the segments
together, so that of a packed row only what lies inside its documents is computed. Compiled by Triton; on
other platforms it is interpreted: slow, for tests.

Letters of the axes as in attend.py; i a block of queries, j one of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from llm_jax.models.attend import NOTHING

BLOCK = 64  # of queries and of keys; not tuned on a GPU yet (benchmarks/attention_kernels.py does)


@dataclass(frozen=True)
class Static:
    """What of a kernel is known when it is traced."""

    causal: bool
    interpret: bool


class _Of(NamedTuple):
    """What of the mask is traced: segments [b, l] and [b, m], scalars [1]."""

    q_segments: jax.Array
    kv_segments: jax.Array
    start: jax.Array
    window: jax.Array


def on_one_device(
    static: Static,
    q_blgrk: jax.Array,
    k_bmgk: jax.Array,
    v_bmgk: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    start: jax.Array,
    window: jax.Array,
) -> jax.Array:
    """[b, l, g, r, k], q's shape. segments: [b, l] and [b, m]; start, window: int scalars as in Mask."""
    b, l, g, r, k = q_blgrk.shape
    q_bhlk = _pad(jnp.einsum("blgrk->bgrlk", q_blgrk).reshape(b, g * r, l, k), 2)
    k_bgmk, v_bgmk = (_pad(jnp.einsum("bmgk->bgmk", x), 2) for x in (k_bmgk, v_bmgk))
    # Padding is a segment of its own, so that nothing looks at it.
    of = _Of(_pad(q_segments, 1), _pad(kv_segments, 1, -1), start[None], window[None])
    o_bhlk = _attention(static, q_bhlk, k_bgmk, v_bgmk, of)[:, :, :l]
    return jnp.einsum("bgrlk->blgrk", o_bhlk.reshape(b, g, r, l, k))


def _pad(x: jax.Array, axis: int, fill: int = 0) -> jax.Array:
    """An axis up to a multiple of BLOCK."""
    extra = [(0, -x.shape[a] % BLOCK if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, extra, constant_values=fill)


def _visible(static: Static, of: _Of) -> jax.Array:
    """bool [b, i, j]: whether any query of a block may look at any key of the other, as far as places and the
    span of segments tell."""

    def span(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        blocks = segments.reshape(len(segments), -1, BLOCK)
        return jnp.min(blocks, axis=2), jnp.max(blocks, axis=2)

    (q_least, q_most), (kv_least, kv_most) = span(of.q_segments), span(of.kv_segments)
    meet = (q_least[:, :, None] <= kv_most[:, None]) & (kv_least[:, None] <= q_most[:, :, None])
    first_q = of.start + BLOCK * jnp.arange(q_least.shape[1])[:, None]
    first_kv = BLOCK * jnp.arange(kv_least.shape[1])[None, :]
    nearest = jnp.maximum(jnp.abs(first_q - first_kv) - (BLOCK - 1), 0)
    near = (of.window == 0) | (nearest < of.window)
    ahead = first_kv > first_q + BLOCK - 1
    return meet & near & ~(ahead & static.causal)


def _bounds(visible: jax.Array) -> jax.Array:
    """int32 [b, blocks, 2] of bool [b, blocks, others]: first and last + 1 of the others that are seen."""
    count = visible.shape[-1]
    first = jnp.argmax(visible, axis=-1)
    last = count - jnp.argmax(visible[..., ::-1], axis=-1)
    last = jnp.where(jnp.any(visible, axis=-1), last, 0)
    return jnp.stack([first, last], axis=-1).astype(jnp.int32)


def _allowed(static: Static, of: _Of, i: jax.Array, j: jax.Array) -> jax.Array:
    """bool [BLOCK, BLOCK] of a block of queries and one of keys; ``of`` holds the kernel's references."""
    q, kv = pl.ds(i * BLOCK, BLOCK), pl.ds(j * BLOCK, BLOCK)
    allowed = of.q_segments[q][:, None] == of.kv_segments[kv][None, :]
    places = jnp.arange(BLOCK)
    distance = (of.start[0] + i * BLOCK + places)[:, None] - (j * BLOCK + places)[None, :]
    if static.causal:
        allowed &= distance >= 0
    window = of.window[0]
    return allowed & ((jnp.abs(distance) < window) | (window == 0))


def _dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Of two blocks over these axes, in float32."""
    contract = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, contract, preferred_element_type=jnp.float32)


def _call(static: Static, kernel: Any, grid: tuple[int, ...], inputs: list, outputs: list) -> Any:
    """pallas_call. inputs: (array, block, index map) each; outputs: (shape, dtype, block, index map)."""
    arrays, blocks, maps = zip(*inputs, strict=True)
    shapes, dtypes, out_blocks, out_maps = zip(*outputs, strict=True)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[pl.BlockSpec(block, index) for block, index in zip(blocks, maps, strict=True)],
        out_specs=[pl.BlockSpec(block, index) for block, index in zip(out_blocks, out_maps, strict=True)],
        out_shape=[jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=static.interpret,
    )(*arrays)


# Where the grid (block, head, row of the batch) stands in an array by blocks.
def _block_at(block: jax.Array, head: jax.Array, row: jax.Array) -> tuple:
    """Of [b, h, blocks, k]."""
    return row, head, block, 0


def _stat_at(block: jax.Array, head: jax.Array, row: jax.Array) -> tuple:
    """Of [b, h, blocks]."""
    return row, head, block


def _head_at(_: jax.Array, head: jax.Array, row: jax.Array) -> tuple:
    """All of a head, of [b, h, m, k]."""
    return row, head, 0, 0


def _mask_inputs(of: _Of, bounds: jax.Array) -> list:
    def row_of(block: jax.Array, head: jax.Array, row: jax.Array) -> tuple:
        return row, 0

    def bounds_of(block: jax.Array, head: jax.Array, row: jax.Array) -> tuple:
        return row, block, 0

    def scalar(*_: jax.Array) -> tuple:
        return (0,)

    return [
        (of.q_segments, (None, of.q_segments.shape[1]), row_of),
        (of.kv_segments, (None, of.kv_segments.shape[1]), row_of),
        (of.start, (1,), scalar),
        (of.window, (1,), scalar),
        (bounds, (None, None, 2), bounds_of),
    ]


def _kv_head_at(heads: int, groups: int) -> Any:
    """All keys of a query head."""

    def at(_: jax.Array, head: jax.Array, row: jax.Array) -> tuple:
        return row, head * groups // heads, 0, 0

    return at


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, q: jax.Array, k: jax.Array, v: jax.Array, of: _Of) -> jax.Array:
    """q [b, h, l, k], k and v [b, g, m, k], lengths in whole blocks; [b, h, l, k]."""
    return _forward(static, q, k, v, of)[0]


def _forward(static: Static, q: jax.Array, k: jax.Array, v: jax.Array, of: _Of) -> tuple:
    """Output, and what the backward pass needs: the logarithm of each query's sum, [b, h, l]."""
    (b, h, l, features), (_, g, m, _) = q.shape, k.shape
    scale = 1.0 / math.sqrt(features)

    def kernel(*refs: Any) -> None:
        *mask, bounds, q_ref, k_ref, v_ref, o_ref, log_ref = refs
        i, own, q_i = pl.program_id(0), _Of(*mask), q_ref[...]

        def key_block(j: jax.Array, carry: tuple) -> tuple:
            o, top, total = carry
            here, allowed = pl.ds(j * BLOCK, BLOCK), _allowed(static, own, i, j)
            s = jnp.where(allowed, _dot(q_i, k_ref[here, :], (1, 1)) * scale, NOTHING)
            new_top = jnp.maximum(top, jnp.max(s, axis=1))
            shrink = jnp.exp(top - new_top)
            p = jnp.where(allowed, jnp.exp(s - new_top[:, None]), 0.0)
            o_j = _dot(p.astype(v_ref.dtype), v_ref[here, :], (1, 0))
            return o * shrink[:, None] + o_j, new_top, total * shrink + jnp.sum(p, axis=1)

        column = jnp.zeros(BLOCK, jnp.float32)
        zeros = jnp.zeros((BLOCK, features), jnp.float32), column + NOTHING, column
        o, top, total = jax.lax.fori_loop(bounds[0], bounds[1], key_block, zeros)
        total = jnp.where(total == 0.0, 1.0, total)  # of queries that see nothing
        o_ref[...] = (o / total[:, None]).astype(o_ref.dtype)
        log_ref[...] = top + jnp.log(total)

    one, whole = (None, None, BLOCK, features), (None, None, m, features)
    inputs = [
        *_mask_inputs(of, _bounds(_visible(static, of))),
        (q, one, _block_at),
        *((x, whole, _kv_head_at(h, g)) for x in (k, v)),
    ]
    outputs = [(q.shape, q.dtype, one, _block_at), (q.shape[:3], jnp.float32, (None, None, BLOCK), _stat_at)]
    o, log_total = _call(static, kernel, (l // BLOCK, h, b), inputs, outputs)
    return o, (q, k, v, of, o, log_total)


def _backward(static: Static, saved: tuple, d_o: jax.Array) -> tuple:
    q, k, v, of, o, log_total = saved
    # d loss / d score = p * (d_p - delta), delta the mean of d_p under p (FlashAttention, section 3.1).
    delta = jnp.sum(d_o.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
    by_query = (q, d_o, log_total, delta)
    return _d_queries(static, of, by_query, k, v), *_d_keys(static, of, by_query, k, v), None


def _d_scores(
    static: Static, of: _Of, at: tuple, by_query: tuple, k_j: jax.Array, v_j: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(p, d_scores) of a block of queries against one of keys, at = (i, j); float32 [BLOCK, BLOCK]."""
    q_i, d_o_i, log_total_i, delta_i = by_query
    scale = 1.0 / math.sqrt(q_i.shape[-1])
    s = _dot(q_i, k_j, (1, 1)) * scale
    p = jnp.where(_allowed(static, of, *at), jnp.exp(s - log_total_i[:, None]), 0.0)
    return p, p * (_dot(d_o_i, v_j, (1, 1)) - delta_i[:, None]) * scale


def _d_queries(static: Static, of: _Of, by_query: tuple, k: jax.Array, v: jax.Array) -> jax.Array:
    q, d_o, log_total, delta = by_query
    (b, h, l, features), (_, g, m, _) = q.shape, k.shape

    def kernel(*refs: Any) -> None:
        *mask, bounds, q_ref, do_ref, log_ref, delta_ref, k_ref, v_ref, out_ref = refs
        i, own = pl.program_id(0), _Of(*mask)
        of_queries = q_ref[...], do_ref[...], log_ref[...], delta_ref[...]

        def key_block(j: jax.Array, d_q: jax.Array) -> jax.Array:
            here = pl.ds(j * BLOCK, BLOCK)
            k_j = k_ref[here, :]
            _, d_s = _d_scores(static, own, (i, j), of_queries, k_j, v_ref[here, :])
            return d_q + _dot(d_s.astype(k_j.dtype), k_j, (1, 0))

        zeros = jnp.zeros((BLOCK, features), jnp.float32)
        out_ref[...] = jax.lax.fori_loop(bounds[0], bounds[1], key_block, zeros).astype(out_ref.dtype)

    one, whole, stat = (None, None, BLOCK, features), (None, None, m, features), (None, None, BLOCK)
    inputs = [
        *_mask_inputs(of, _bounds(_visible(static, of))),
        *((x, one, _block_at) for x in (q, d_o)),
        *((x, stat, _stat_at) for x in (log_total, delta)),
        *((x, whole, _kv_head_at(h, g)) for x in (k, v)),
    ]
    return _call(static, kernel, (l // BLOCK, h, b), inputs, [(q.shape, q.dtype, one, _block_at)])[0]


def _d_keys(
    static: Static, of: _Of, by_query: tuple, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    q, d_o, log_total, delta = by_query
    (b, h, l, features), (_, g, m, _) = q.shape, k.shape
    r = h // g  # query heads that share these keys

    def kernel(*refs: Any) -> None:
        *mask, bounds, q_ref, do_ref, log_ref, delta_ref, k_ref, v_ref, dk_ref, dv_ref = refs
        j, own = pl.program_id(0), _Of(*mask)
        k_j, v_j = k_ref[...], v_ref[...]

        def query_block(i: jax.Array, sums: tuple, head: int) -> tuple:
            here = pl.ds(i * BLOCK, BLOCK)
            q_i, d_o_i = q_ref[head, here, :], do_ref[head, here, :]
            of_queries = q_i, d_o_i, log_ref[head, here], delta_ref[head, here]
            p, d_s = _d_scores(static, own, (i, j), of_queries, k_j, v_j)
            d_k = sums[0] + _dot(d_s.astype(q_i.dtype), q_i, (0, 0))
            return d_k, sums[1] + _dot(p.astype(d_o_i.dtype), d_o_i, (0, 0))

        sums = (jnp.zeros((BLOCK, features), jnp.float32),) * 2
        for head in range(r):
            sums = jax.lax.fori_loop(bounds[0], bounds[1], partial(query_block, head=head), sums)
        dk_ref[...], dv_ref[...] = sums[0].astype(k.dtype), sums[1].astype(v.dtype)

    def stats_at(_: jax.Array, group: jax.Array, row: jax.Array) -> tuple:
        return row, group, 0

    one, group, stats = (None, None, BLOCK, features), (None, r, l, features), (None, r, l)
    inputs = [
        *_mask_inputs(of, _bounds(jnp.swapaxes(_visible(static, of), 1, 2))),
        *((x, group, _head_at) for x in (q, d_o)),
        *((x, stats, stats_at) for x in (log_total, delta)),
        *((x, one, _block_at) for x in (k, v)),
    ]
    outputs = [(x.shape, x.dtype, one, _block_at) for x in (k, v)]
    return tuple(_call(static, kernel, (m // BLOCK, g, b), inputs, outputs))


_attention.defvjp(_forward, _backward)
