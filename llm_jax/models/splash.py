"""Attention on TPUs: splash attention, the Pallas kernel that comes with jax, on each device for its rows and
heads.

Exact, block by block, softmax kept running in float32 (Dao et al. 2022, FlashAttention, arXiv 2205.14135).
Blocks that the causal mask or a window shuts out are not visited; which these are is found when the step is
traced, so that a window must be known then. On other platforms it is interpreted: slow, for tests.

Letters of the axes as in attend.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.layout import Layout
from llm_jax.models.attend import Mask, Scoring, on_each_device

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

    from llm_jax.models import splash_kernel  # and with it Pallas, 0.1 s that only TPUs need

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *of_mask: jax.Array) -> jax.Array:
        own = mask._replace(**dict(zip(traced, of_mask, strict=True)))
        return splash_kernel.attend(q, k, v, own, scoring.softcap, block, interpret=layout.platform != "tpu")

    block = max(size for size in BLOCKS if q_blgrk.shape[1] % size == 0)
    traced = ("q_segments", "kv_segments", "q_start")
    arrays = (q_blgrk, k_bmgk, v_bmgk, mask.q_segments, mask.kv_segments, jnp.asarray(mask.q_start))
    by_head = ("batch", None, "kv_heads", None)
    names = ((*by_head, None), by_head, by_head, ("batch", None), ("batch", None), ())
    if isinstance(mask.window, jax.Array):
        traced, arrays, names = (*traced, "window"), (*arrays, mask.window), (*names, ())
    return on_each_device(local, arrays, names, q_blgrk, layout)
