"""Attention on GPUs for packed rows and windows: a Pallas kernel in linear memory (flash_kernel.py), on each
device for its rows and heads.

Letters of the axes as in attend.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.layout import Layout
from llm_jax.models.attend import Mask, Scoring, on_each_device

FEWEST_FEATURES = 16  # of a head: what a tensor core multiplies at once


def unfit(q_blgrk: jax.Array, scoring: Scoring) -> str:
    """Why the kernel cannot take these, in words; "" where it can."""
    features = q_blgrk.shape[-1]
    if not scoring.plain:
        return "it has neither ALiBi slopes nor a soft-cap"
    if features < FEWEST_FEATURES or features & (features - 1):
        return f"head_dim={features} is no power of 2 of at least {FEWEST_FEATURES}"
    return ""


def flash(
    q_blgrk: jax.Array, k_bmgk: jax.Array, v_bmgk: jax.Array, mask: Mask, scoring: Scoring, layout: Layout
) -> jax.Array:
    """The same as ``attend.dense`` up to rounding, with O(l + m) memory. [batch, l, g, r, k].

    Raises UserError where the kernel cannot take these shapes.
    """
    if reason := unfit(q_blgrk, scoring):
        raise UserError(f"config.model.kernel is flash, but {reason}; choose auto")
    from llm_jax.models import flash_kernel  # and with it Pallas, 0.1 s that only GPUs need

    static = flash_kernel.Static(mask.causal, interpret=layout.platform != "gpu")

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *of_mask: jax.Array) -> jax.Array:
        return flash_kernel.on_one_device(static, q, k, v, *of_mask)

    window = jnp.asarray(0 if mask.window is None else mask.window, jnp.int32)
    start = jnp.asarray(mask.q_start, jnp.int32)
    arrays = (q_blgrk, k_bmgk, v_bmgk, mask.q_segments, mask.kv_segments, start, window)
    by_head = ("batch", None, "kv_heads", None)
    names = ((*by_head, None), by_head, by_head, ("batch", None), ("batch", None), (), ())
    return on_each_device(local, arrays, names, q_blgrk, layout)
