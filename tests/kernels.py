"""Attention kernels beside the dense one: outputs and gradients of packed rows, on any mesh."""

import dataclasses
from functools import partial

import families
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.models import attend, context
from llm_jax.models.attend import Mask, Scoring
from llm_jax.models.transformer import Transformer

ONE = families.layout_of()
# They end inside blocks of 128; the first spans two; padding is at the end.
SEGMENTS = np.repeat([1, 2, 0], [170, 50, 36]).astype(np.int32)


def inputs(batch, groups, repeats, length=256, head=128):
    draw = np.random.default_rng(0)
    q, d_o = draw.normal(size=(2, batch, length, groups, repeats, head)).astype(np.float32)
    k, v = draw.normal(size=(2, batch, length, groups, head)).astype(np.float32)
    return q, k, v, d_o


def segments_of(q, pattern=SEGMENTS):
    return np.tile(pattern, (len(q), q.shape[1] // len(pattern)))


def run(kernel, layout, arrays, causal=True, window=None, windows=(), softcap=0.0, pattern=SEGMENTS):
    """Output and gradients of a kernel. Where the layout cuts the length, it is dealt out and put back."""
    q, k, v, d_o = arrays
    segments = segments_of(q, pattern)
    d_o = d_o * (segments > 0)[..., None, None, None]  # what padding sees is nobody's matter

    @jax.jit
    def both(q, k, v, window):
        def scalar(q, k, v):
            q, k, v, s = context.deal((q, k, v, jnp.asarray(segments)), layout, causal)
            by_head = ("batch", "length", "kv_heads", None)
            q, k, v = layout.shard(q, *by_head, None), layout.shard(k, *by_head), layout.shard(v, *by_head)
            mask = Mask(s, s, causal, 0, window, windows=windows)
            arguments = (q, k, v, mask, Scoring(None, softcap), layout)
            o = context.attend(kernel, *arguments) if layout.axes("length") else kernel(*arguments)
            o = context.restore(layout.shard(o, *[None] * 5), layout, causal)
            return jnp.sum(o * d_o), o

        return jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    with jax.set_mesh(layout.mesh):
        (_, o), grads = jax.device_get(both(q, k, v, None if window is None else jnp.asarray(window)))
    return o, grads


def check(kernel, layout, arrays, atol=2e-5, dtype=jnp.float32, **options):
    """``kernel`` gives what the dense one gives, wherever there is a token."""
    o, grads = run(kernel, layout, [jnp.asarray(x, dtype) for x in arrays], **options)
    expected, expected_grads = run(attend.dense, ONE, arrays, **options)
    assert np.isfinite(o).all()
    real = segments_of(o, options.get("pattern", SEGMENTS)) > 0
    np.testing.assert_allclose(o[real], expected[real], atol=atol)
    for one, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(one, other, atol=5 * atol)


def check_model(kernel, head_dim):
    """A model of scanned layers, whose windows are traced, gives with ``kernel`` what it gives with dense."""
    shape = {"head_dim": head_dim, "num_heads": 2, "num_kv_heads": 1, "window": (0, 40)}
    config = dataclasses.replace(families.DECODER, **shape, kernel=kernel)
    dense, params = families.make(dataclasses.replace(config, kernel="dense"), families.layout_of())
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, families.VOCAB, (1, 128)))
    places, ones = jnp.arange(128)[None], jnp.ones((1, 128), jnp.int32)
    with jax.set_mesh(dense.layout.mesh):
        one, other = (
            jax.jit(partial(model.apply, {"params": params}))(tokens, places, ones)[0]
            for model in (dense, Transformer(config, dense.layout))
        )
    np.testing.assert_allclose(one, other, atol=1e-4)
