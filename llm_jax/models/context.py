"""The length cut along mesh axis ``context``: each device has some of the queries and gathers all the keys.

Keys and values are gathered, as for Llama 3 (Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.2), not
passed round a ring: with few key-value heads they are small, and any mask and any kernel stay as they are.
Under a causal mask late queries see more keys than early ones. So the length is dealt out in 2 n equal
pieces for n devices, and device i has pieces i and 2 n - 1 - i: a kernel that skips what the mask shuts out
has the same work on all of them.

Letters of the axes as in attend.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.layout import Layout
from llm_jax.models.attend import Kernel, Mask, Scoring


def deal(tree: Any, layout: Layout, causal: bool) -> Any:
    """Leaves [batch, length, ...] from their order to that in which the devices hold them: pieces 0, 2 n - 1,
    1, 2 n - 2 and so on. The length is whole; for an encoder, and for one device, nothing changes."""
    ways = layout.ways("length")
    return jax.tree.map(partial(_deal, ways=ways), tree) if causal and ways > 1 else tree


def restore(tree: Any, layout: Layout, causal: bool) -> Any:
    """The inverse of ``deal``."""
    ways = layout.ways("length")
    return jax.tree.map(partial(_restore, ways=ways), tree) if causal and ways > 1 else tree


def _deal(x: jax.Array, ways: int) -> jax.Array:
    pieces = jnp.reshape(x, (x.shape[0], 2 * ways, -1, *x.shape[2:]))
    pairs = jnp.stack([pieces[:, :ways], pieces[:, ways:][:, ::-1]], axis=2)
    return jnp.reshape(pairs, x.shape)


def _restore(x: jax.Array, ways: int) -> jax.Array:
    pairs = jnp.reshape(x, (x.shape[0], ways, 2, -1, *x.shape[2:]))
    pieces = jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], axis=1)
    return jnp.reshape(pieces, x.shape)


def attend(
    kernel: Kernel,
    q_blgrk: jax.Array,
    k_bmgk: jax.Array,
    v_bmgk: jax.Array,
    mask: Mask,
    scoring: Scoring,
    layout: Layout,
) -> jax.Array:
    """``kernel``, called on each device for its queries and all the keys. [batch, l, g, r, k].

    Everything is dealt; queries, keys and values are cut along the length, if anything is, and segments are
    whole. On the way back the gradients of keys and values are reduce-scattered.
    """
    axes, causal = layout.axes("length"), mask.causal

    def local(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        q_segments: jax.Array,
        kv_segments: jax.Array,
        window: jax.Array | None,
        slopes: jax.Array | None,
    ) -> jax.Array:
        k, v = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (k, v)) if axes else (k, v)
        k, v = restore((k, v), layout, causal)
        pieces, own = _pieces(axes, causal), scoring._replace(slopes=slopes)
        parts = []
        queries = (jnp.split(x, len(pieces), axis=1) for x in (q, q_segments))
        for i, q_i, segments_i in zip(pieces, *queries, strict=True):
            length = q_i.shape[1]
            mask_i = Mask(segments_i, kv_segments, causal, i * length, window, length, mask.windows)
            parts.append(kernel(q_i, k, v, mask_i, own, layout.local()))
        return jnp.concatenate(parts, axis=1)

    q_segments = layout.shard(mask.q_segments, "batch", "length")
    kv_segments = layout.shard(restore(mask.kv_segments, layout, causal), "batch", None)
    slopes = None if scoring.slopes is None else layout.shard(scoring.slopes, "heads")
    by_query = layout.spec("batch", "length", "kv_heads", None, None)
    args = (q_blgrk, k_bmgk, v_bmgk, q_segments, kv_segments, mask.window, slopes)
    # Unchecked, since Pallas kernels do not say along which mesh axes their results vary.
    out = jax.ShapeDtypeStruct(q_blgrk.shape, v_bmgk.dtype)
    return layout.on_devices(local, args, out, by_query, check_vma=False)


def _pieces(axes: tuple[str, ...], causal: bool) -> tuple[jax.Array | int, ...]:
    """The numbers of this device's pieces of the length; an encoder's device has one."""
    if not axes:
        return (0,)
    i, n = jax.lax.axis_index(axes), jax.lax.axis_size(axes)
    return (i, 2 * n - 1 - i) if causal else (i,)
