"""Attention itself: one function, a mask as a small object, kernels behind a table.

Letters of the axes as in layers.py: b batch, l queries, m keys, h query heads, g key-value heads,
r = h / g, k features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.layout import Layout

NOTHING = float(jnp.finfo(jnp.float32).min)  # the score of a key that may not be looked at

# Above so many scores on a device (1 GB in float32) the automatic choice is the blockwise kernel.
MAX_DENSE_SCORES = 1 << 28
TRIANGLE_BLOCK = 128  # queries at least; with 64, products of 256 tokens are too small (log)


class Mask(NamedTuple):
    """Who may look at whom: the same segment; if causal, not ahead; within a window, not too far.

    q_segments: int [batch, l], kv_segments: int [batch, m], 0 for padding. q_start: int, place of the first
    query among the keys (more than 0 when decoding), known to be a multiple of q_multiple. window: int
    scalar or None; a query sees the keys at a distance less than it, 0 = all. windows: what it may be, in
    ascending order, for a kernel that must know when it is traced. unpadded: that every row is one segment
    to its end, likewise.
    """

    q_segments: jax.Array
    kv_segments: jax.Array
    causal: bool
    q_start: jax.Array | int = 0
    window: jax.Array | int | None = None
    q_multiple: int = 1
    windows: tuple[int, ...] = ()
    unpadded: bool = False

    def dense(self) -> jax.Array:
        """bool [batch, l, m], True where a query may look."""
        return self._allowed(self.q_segments, self.kv_segments, 0, 0)

    def block(self, q: jax.Array | int, rows: int, kv: jax.Array | int, columns: int) -> jax.Array:
        """The part of ``dense`` at queries q .. q + rows - 1 and keys kv .. kv + columns - 1."""
        q_segments = jax.lax.dynamic_slice_in_dim(self.q_segments, q, rows, axis=1)
        kv_segments = jax.lax.dynamic_slice_in_dim(self.kv_segments, kv, columns, axis=1)
        return self._allowed(q_segments, kv_segments, q, kv)

    def _allowed(
        self, q_segments: jax.Array, kv_segments: jax.Array, q: jax.Array | int, kv: jax.Array | int
    ) -> jax.Array:
        allowed = q_segments[:, :, None] == kv_segments[:, None, :]
        distance = self.distance(q, q_segments.shape[1], kv, kv_segments.shape[1])
        if self.causal:
            allowed &= distance >= 0
        if self.window is not None:
            allowed &= (jnp.abs(distance) < self.window) | (self.window == 0)
        return allowed

    def distance(self, q: jax.Array | int, rows: int, kv: jax.Array | int, columns: int) -> jax.Array:
        """int [rows, columns]: place of the query less place of the key."""
        return (self.q_start + q + jnp.arange(rows))[:, None] - (kv + jnp.arange(columns))[None, :]


class Scoring(NamedTuple):
    """How scores are made of products. slopes: float [h], ALiBi's, or None; softcap: 0 = none."""

    slopes: jax.Array | None = None
    softcap: float = 0.0

    @property
    def plain(self) -> bool:
        return self.slopes is None and not self.softcap


def scores(
    q_blgrk: jax.Array, k_bmgk: jax.Array, distance_lm: jax.Array, scoring: Scoring, layout: Layout
) -> jax.Array:
    """float32 scores [batch, g, r, l, m] before the mask: q k / sqrt(head_dim), capped, less ALiBi's slopes.

    softcap: cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118). ALiBi: a score falls by slope * distance
    (Press et al. 2021, arXiv 2108.12409), to both sides in an encoder.
    """
    by_head = layout.spec("batch", "kv_heads", None, None)
    s_bgnm = jnp.einsum(
        "bgnk,bmgk->bgnm",
        _heads_first(q_blgrk, layout),
        k_bmgk,
        preferred_element_type=jnp.float32,
        out_sharding=by_head,
    )
    b, l, g, r, k = q_blgrk.shape
    s_bgrlm = s_bgnm.reshape(b, g, r, l, -1) / math.sqrt(k)
    if scoring.softcap:
        s_bgrlm = scoring.softcap * jnp.tanh(s_bgrlm / scoring.softcap)
    if scoring.slopes is not None:
        slopes_gr = jnp.reshape(scoring.slopes, q_blgrk.shape[2:4])
        slopes_gr = jax.sharding.reshard(slopes_gr, layout.spec("kv_heads", None))
        s_bgrlm -= slopes_gr[:, :, None, None] * jnp.abs(distance_lm)
    return s_bgrlm


def dense_weights(
    q_blgrk: jax.Array, k_bmgk: jax.Array, mask: Mask, scoring: Scoring, layout: Layout
) -> jax.Array:
    """float32 attention weights [batch, g, r, l, m]. Where a query may look at nothing they are equal."""
    rows, columns = q_blgrk.shape[1], k_bmgk.shape[1]
    s_bgrlm = scores(q_blgrk, k_bmgk, mask.distance(0, rows, 0, columns), scoring, layout)
    s_bgrlm = jnp.where(mask.dense()[:, None, None, :, :], s_bgrlm, NOTHING)
    return jax.nn.softmax(s_bgrlm, axis=-1)


def dense(
    q_blgrk: jax.Array, k_bmgk: jax.Array, v_bmgk: jax.Array, mask: Mask, scoring: Scoring, layout: Layout
) -> jax.Array:
    """The reference: all scores at once. [batch, l, g, r, k]."""
    b, l, g, r, k = q_blgrk.shape
    if scoring.plain:
        bias_blm = jnp.where(mask.dense(), 0.0, NOTHING)
        o_bgnk = _plain(layout, _heads_first(q_blgrk, layout), k_bmgk, v_bmgk, bias_blm)
    else:
        p_bgrlm = dense_weights(q_blgrk, k_bmgk, mask, scoring, layout).astype(v_bmgk.dtype)
        p_bgnm, by_head = p_bgrlm.reshape(b, g, r * l, -1), layout.spec("batch", "kv_heads", None, None)
        o_bgnk = jnp.einsum("bgnm,bmgk->bgnk", p_bgnm, v_bmgk, out_sharding=by_head)
    out = layout.spec("batch", None, "kv_heads", None, None)
    return jnp.einsum("bgrlk->blgrk", o_bgnk.reshape(b, g, r, l, k), out_sharding=out)


def triangle(
    q_blgrk: jax.Array, k_bmgk: jax.Array, v_bmgk: jax.Array, mask: Mask, scoring: Scoring, layout: Layout
) -> jax.Array:
    """``dense``, in blocks of queries with the keys up to the block's end: most scores that a causal mask
    takes away are not made, a quarter of all at 256 tokens, 7 sixteenths from 1,024 on. At most eight blocks,
    each of which is compiled. In bfloat16 the gradients of keys and values are rounded once a block (1,024
    tokens: off by 0.35% and 0.38%, ``dense`` by 0.26% and 0.30%, by ``tests/models/test_layers.py``).
    [batch, l, g, r, k]."""
    length, blocks = q_blgrk.shape[1], []
    size = max(TRIANGLE_BLOCK, -(-length // 8))
    for start in range(0, length, size):
        rows, keys = slice(start, start + size), slice(start + size)
        segments = {"q_segments": mask.q_segments[:, rows], "kv_segments": mask.kv_segments[:, keys]}
        own = mask._replace(**segments, q_start=start)
        blocks.append(dense(q_blgrk[:, rows], k_bmgk[:, keys], v_bmgk[:, keys], own, scoring, layout))
    return jnp.concatenate(blocks, axis=1)


def is_triangle(q_blgrk: jax.Array, k_bmgk: jax.Array, mask: Mask) -> bool:
    """Whether the queries are those of the keys, causal, and more than a block."""
    from_start = isinstance(mask.q_start, int) and mask.q_start == 0
    whole = from_start and q_blgrk.shape[1] == k_bmgk.shape[1]
    return mask.causal and whole and q_blgrk.shape[1] > TRIANGLE_BLOCK


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _plain(
    layout: Layout, q_bgnk: jax.Array, k_bmgk: jax.Array, v_bmgk: jax.Array, bias_blm: jax.Array
) -> jax.Array:
    """softmax(q k / sqrt(head_dim) + bias) v, [b, g, r * l, k], n being r * l; the bias has no gradient.

    With a derivative of its own, which passes over the scores less often than jax's: what a row of them is
    divided by is kept, and its mean gradient is known from the output (FlashAttention, section 3.1).
    """
    return _plain_forward(layout, q_bgnk, k_bmgk, v_bmgk, bias_blm)[0]


def _plain_forward(
    layout: Layout, q_bgnk: jax.Array, k_bmgk: jax.Array, v_bmgk: jax.Array, bias_blm: jax.Array
) -> tuple[jax.Array, tuple]:
    product = _product(layout)
    s_bgnm = product("bgnk,bmgk->bgnm", q_bgnk, k_bmgk, jnp.float32) / math.sqrt(q_bgnk.shape[-1])
    b, g, n, m = s_bgnm.shape
    s_bgrlm = s_bgnm.reshape(b, g, -1, bias_blm.shape[1], m) + bias_blm[:, None, None]
    s_bgnm = s_bgrlm.reshape(b, g, n, m)
    p_bgnm = jnp.exp(s_bgnm - jnp.max(s_bgnm, axis=-1, keepdims=True))
    inverse_bgn1 = 1.0 / jnp.sum(p_bgnm, axis=-1, keepdims=True)
    p_bgnm = p_bgnm.astype(v_bmgk.dtype)
    o_bgnk = product("bgnm,bmgk->bgnk", p_bgnm, v_bmgk, jnp.float32) * inverse_bgn1
    o_bgnk = o_bgnk.astype(v_bmgk.dtype)
    return o_bgnk, (q_bgnk, k_bmgk, v_bmgk, p_bgnm, inverse_bgn1, o_bgnk)


def _plain_backward(layout: Layout, kept: tuple, d_o_bgnk: jax.Array) -> tuple:
    q_bgnk, k_bmgk, v_bmgk, p_bgnm, inverse_bgn1, o_bgnk = kept
    product, scale = _product(layout), 1.0 / math.sqrt(q_bgnk.shape[-1])
    d_o32_bgnk = d_o_bgnk.astype(jnp.float32)
    delta_bgn1 = jnp.sum(d_o32_bgnk * o_bgnk.astype(jnp.float32), axis=-1, keepdims=True)
    d_p_bgnm = product("bgnk,bmgk->bgnm", d_o_bgnk, v_bmgk, jnp.float32)
    d_s_bgnm = (p_bgnm * (d_p_bgnm - delta_bgn1) * (scale * inverse_bgn1)).astype(q_bgnk.dtype)
    d_o_bgnk = (d_o32_bgnk * inverse_bgn1).astype(v_bmgk.dtype)  # of p before it is divided
    d_q_bgnk = product("bgnm,bmgk->bgnk", d_s_bgnm, k_bmgk)
    d_k_bmgk = product("bgnm,bgnk->bmgk", d_s_bgnm, q_bgnk)
    d_v_bmgk = product("bgnm,bgnk->bmgk", p_bgnm, d_o_bgnk)
    return d_q_bgnk, d_k_bmgk, d_v_bmgk, None


_plain.defvjp(_plain_forward, _plain_backward)


def _product(layout: Layout) -> Callable[..., jax.Array]:
    """einsum of arrays by head; the result's dtype is the inputs' where none is asked for."""
    specs = {
        "bg": layout.spec("batch", "kv_heads", None, None),
        "bm": layout.spec("batch", None, "kv_heads", None),
    }

    def product(equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
        spec = specs[equation.split("->")[1][:2]]
        return jnp.einsum(equation, x, y, preferred_element_type=dtype, out_sharding=spec)

    return product


def _heads_first(q_blgrk: jax.Array, layout: Layout) -> jax.Array:
    """[batch, g, r * l, k]: rows to be multiplied with the keys of their head. In any other order XLA's CPU
    compiler copies scores, transposed, for each product (40% of attention; log)."""
    b, l, g, r, k = q_blgrk.shape
    by_head = layout.spec("batch", "kv_heads", None, None, None)
    return jnp.einsum("blgrk->bgrlk", q_blgrk, out_sharding=by_head).reshape(b, g, r * l, k)


def on_each_device(
    local: Callable[..., jax.Array], arrays: tuple, names: tuple, q_blgrk: jax.Array, layout: Layout
) -> jax.Array:
    """``local(*arrays)`` for the rows and heads of each device: of a kernel that jax cannot cut. names: the
    logical axes of the arrays; the result is cut as the queries are. [batch, l, g, r, k]."""
    if jax.sharding.get_abstract_mesh().manual_axes:  # inside context.attend each device has its own already
        return local(*arrays)
    arrays = tuple(layout.shard(x, *own) for x, own in zip(arrays, names, strict=True))
    by_head = layout.spec("batch", None, "kv_heads", None, None)
    # Such kernels do not say along which mesh axes their results vary, so this cannot be checked.
    return layout.on_devices(local, arrays, q_blgrk, by_head, check_vma=False)


def by_window(mask: Mask, within: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """``within(window, *arrays)`` for a kernel that must know the window, an int, when it is traced: one for
    each that it may be, of which one runs."""
    if not isinstance(mask.window, jax.Array):
        return within(mask.window or 0, *arrays)
    if len(mask.windows) == 1:
        return within(mask.windows[0], *arrays)
    chosen = jnp.searchsorted(jnp.asarray(mask.windows), mask.window)
    return jax.lax.switch(chosen, [partial(within, window) for window in mask.windows], *arrays)


Kernel = Callable[..., jax.Array]


def attend(
    q_blhk: jax.Array,
    k_bmgk: jax.Array,
    v_bmgk: jax.Array,
    mask: Mask,
    scoring: Scoring,
    layout: Layout,
    kernel: Kernel,
) -> jax.Array:
    """softmax(scores) v, scores and softmax in float32 (Vaswani et al. 2017). [batch, l, h, head_dim].

    h is a multiple of g: query heads share key-value heads (Ainslie et al. 2023, arXiv 2305.13245).
    A query that may look at nothing gets something finite, never NaN.
    """
    q_blgrk = group_heads(q_blhk, k_bmgk.shape[2], layout)
    o_blgrk = kernel(q_blgrk, k_bmgk, v_bmgk, mask, scoring, layout)
    return jnp.reshape(o_blgrk, q_blhk.shape, out_sharding=layout.spec("batch", "length", "heads", None))


def group_heads(q_blhk: jax.Array, groups: int, layout: Layout) -> jax.Array:
    """[batch, l, h, k] to [batch, l, g, h / g, k]."""
    b, l, h, k = q_blhk.shape
    grouped = layout.spec("batch", "length", "kv_heads", None, None)
    return jnp.reshape(q_blhk, (b, l, groups, h // groups, k), out_sharding=grouped)
