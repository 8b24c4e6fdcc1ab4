"""Continuing a text with a decoder, filling its blanks with an encoder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.inference.cache import empty_cache
from llm_jax.inference.sampling import Sampling, sample
from llm_jax.models.config import NEVER
from llm_jax.models.transformer import Transformer
from llm_jax.text.tokenizers import EOS, FIRST_TEXT_ID, MASK, PAD


def make_extend(model: Transformer, sampling: Sampling) -> Callable[..., jax.Array]:
    """(params, window int32 [batch, length], start, stop, key) -> window with start .. stop-1 drawn.

    The prompt is read in one pass that fills the cache; every token after it is one pass over one
    token. What stands behind ``start`` is not looked at.
    """

    def extend(params: Any, window: jax.Array, start: int, stop: int, key: jax.Array) -> jax.Array:
        batch, length = window.shape
        variables = {"params": params}

        def next_logits(hidden: jax.Array) -> jax.Array:
            logits = model.apply(variables, hidden, method="logits")
            logits = model.layout.shard(logits, "batch", None, None)[:, 0]
            ids = jnp.arange(logits.shape[-1])
            return jnp.where((ids >= FIRST_TEXT_ID) | (ids == EOS), logits, NEVER)

        def read(tokens: jax.Array, cache: Any, index: Any) -> tuple[jax.Array, Any]:
            places = jnp.broadcast_to(index + jnp.arange(tokens.shape[1]), tokens.shape)
            hidden, aux = model.apply(
                variables,
                tokens,
                places,
                jnp.ones_like(tokens),
                cache=cache,
                cache_index=index,
            )
            return hidden, aux.layers.cache

        def body(i: jax.Array, carry: tuple) -> tuple:
            window, cache, logits = carry
            token = sample(logits, jax.random.fold_in(key, i), sampling)[:, None]
            window = jax.lax.dynamic_update_slice_in_dim(window, token, i, axis=1)
            hidden, cache = read(token, cache, i)
            return window, cache, next_logits(hidden)

        hidden, cache = read(window, empty_cache(model.config, model.layout, batch, length), 0)
        last = jax.lax.dynamic_slice_in_dim(hidden, start - 1, 1, axis=1)
        drawn = jax.lax.fori_loop(start, stop, body, (window, cache, next_logits(last)))[0]
        return model.layout.shard(drawn, None, None)  # every process reads all of it

    return extend


@functools.lru_cache(maxsize=4)
def compiled_extend(model: Transformer, sampling: Sampling) -> Callable[..., jax.Array]:
    """``make_extend``, compiled once for every call with an equal model: samples may be asked for often."""
    return jax.jit(make_extend(model, sampling))


def generate(
    model: Transformer,
    params: Any,
    prompt: np.ndarray,
    *,
    tokens: int,
    count: int,
    length: int,
    seed: int,
    sampling: Sampling,
) -> list[np.ndarray]:
    """``count`` continuations of a prompt of at least one id: int32 arrays of at most ``tokens`` new
    ids, each ending before its first EOS.

    length: of the window the model looks at, as in training. When it is full, its second half is kept
    and read again.
    """
    model = model.clone(layout=model.layout.decoding())
    layout = model.layout
    rows = -(-count // layout.ways("batch")) * layout.ways("batch")
    with jax.set_mesh(layout.mesh):
        extend = compiled_extend(model, sampling)
        out = np.tile(prompt.astype(np.int32), (rows, 1))
        key = jax.random.key(seed)
        while (missing := len(prompt) + tokens - out.shape[1]) > 0:
            context = out[:, -length // 2 :] if out.shape[1] >= length else out
            start = context.shape[1]
            stop = min(length, start + missing)
            window = np.full((rows, length), PAD, np.int32)
            window[:, :start] = context
            placed = jax.device_put(window, layout.named("batch", None))
            window = np.asarray(extend(params, placed, start, stop, jax.random.fold_in(key, out.shape[1])))
            out = np.concatenate([out, window[:, start:stop]], axis=1)
    return [_until_end(row[len(prompt) :]) for row in out[:count]]


def _until_end(ids: np.ndarray) -> np.ndarray:
    ends = np.flatnonzero(ids == EOS)
    return ids[: ends[0]] if len(ends) else ids


def fill_blanks(model: Transformer, params: Any, ids: np.ndarray, best: int) -> tuple[np.ndarray, np.ndarray]:
    """For every MASK in ``ids`` (int32 [length]) the ``best`` ids and their probabilities.

    Gives int32 and float32 [blanks, best], best first. The blanks are filled independently.
    """
    model = model.clone(layout=model.layout.decoding())
    layout = model.layout
    rows = layout.ways("batch")

    def probabilities(params: Any, tokens: jax.Array) -> jax.Array:
        variables = {"params": params}
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = model.apply(variables, tokens, places, jnp.ones_like(tokens))
        logits = model.apply(variables, hidden, method="logits")
        logits = layout.shard(logits, None, None, None)  # every process reads all of it
        return jax.nn.softmax(
            jnp.where(jnp.arange(logits.shape[-1]) >= FIRST_TEXT_ID, logits, NEVER), axis=-1
        )

    with jax.set_mesh(layout.mesh):
        tokens = jax.device_put(np.tile(ids, (rows, 1)), layout.named("batch", None))
        p_blv = np.asarray(jax.jit(probabilities)(params, tokens))
    p_nv = p_blv[0][ids == MASK]
    order = np.argsort(-p_nv, axis=-1, kind="stable")[:, :best]
    return order.astype(np.int32), np.take_along_axis(p_nv, order, axis=-1)
