"""Attention on GPUs for rows that are one segment each: cuDNN's kernel, through jax, on each device for its
rows and heads.

Linear memory (Dao et al. 2022, FlashAttention, arXiv 2205.14135). It knows a causal mask, a window and
where a row ends, but no documents inside it: packed rows are for flash.py. On other platforms jax's own
implementation stands in for it, with the same arguments.

Letters of the axes as in attend.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.layout import Layout
from llm_jax.models.attend import Mask, Scoring, by_window, on_each_device

MOST_FEATURES = 128  # of a head


def unfit(q_blgrk: jax.Array, mask: Mask, scoring: Scoring, platform: str) -> str:
    """Why the kernel cannot take these, in words; "" where it can."""
    features = q_blgrk.shape[-1]
    if not scoring.plain:
        return "it has neither ALiBi slopes nor a soft-cap"
    if features % 8 or features > MOST_FEATURES:
        return f"head_dim={features} is no multiple of 8 up to {MOST_FEATURES}"
    if platform == "gpu" and q_blgrk.dtype == jnp.float32:
        return "float32 is not among its types"
    if not isinstance(mask.q_start, int) or mask.q_start:
        return "the queries do not start with the first key"
    if not mask.causal and (mask.window is not None or any(mask.windows)):
        return "an encoder's window is none of its masks"
    unknown = isinstance(mask.window, jax.Array) and not mask.windows
    return "what the window may be is not known" if unknown else ""


def cudnn(
    q_blgrk: jax.Array, k_bmgk: jax.Array, v_bmgk: jax.Array, mask: Mask, scoring: Scoring, layout: Layout
) -> jax.Array:
    """The same as ``attend.dense`` up to rounding where a row is one segment, padded at its end. Of segments
    it reads only how many tokens are in an encoder's. [batch, l, g, r, k].

    Raises UserError where the kernel cannot take these.
    """
    if reason := unfit(q_blgrk, mask, scoring, layout.platform):
        raise UserError(f"config.model.kernel is cudnn, but {reason}; choose auto")
    by_head = ("batch", None, "kv_heads", None)
    arrays = [q_blgrk, k_bmgk, v_bmgk, mask.q_segments, mask.kv_segments]
    names = [(*by_head, None), by_head, by_head, ("batch", None), ("batch", None)]
    if isinstance(mask.window, jax.Array):
        arrays, names = [*arrays, mask.window], [*names, ()]

    traced = ("q_segments", "kv_segments", "window")

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *of_mask: jax.Array) -> jax.Array:
        own = mask._replace(**dict(zip(traced, of_mask, strict=False)))
        return _attend(q, k, v, own, layout.platform)

    return on_each_device(local, tuple(arrays), tuple(names), q_blgrk, layout)


def _attend(q_blgrk: jax.Array, k_bmgk: jax.Array, v_bmgk: jax.Array, mask: Mask, platform: str) -> jax.Array:
    """On one device."""
    b, l, g, r, k = q_blgrk.shape
    tokens = [None, None]
    if not (mask.causal or mask.unpadded):  # a decoder's tokens see nothing of the padding behind them
        tokens = [jnp.sum(x > 0, axis=1, dtype=jnp.int32) for x in (mask.q_segments, mask.kv_segments)]

    def within(window: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        reach = (window - 1, 0) if window else None
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=mask.causal,
            query_seq_lengths=tokens[0],
            key_value_seq_lengths=tokens[1],
            local_window_size=reach,
            implementation="cudnn" if platform == "gpu" else "xla",
        )

    o_blhk = by_window(mask, within, q_blgrk.reshape(b, l, g * r, k), k_bmgk, v_bmgk)
    return o_blhk.reshape(q_blgrk.shape)
