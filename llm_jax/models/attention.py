"""The attention layer: projects, turns by position, attends, projects back."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.errors import UserError
from llm_jax.layout import Layout
from llm_jax.models import attend, context, cudnn, flash, splash
from llm_jax.models.attend import MAX_DENSE_SCORES, Mask, Scoring
from llm_jax.models.blockwise import blockwise
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import Output, RMSNorm, dense, dense_together, vector_param
from llm_jax.models.positions import POSITIONS


class KVCache(NamedTuple):
    """Keys and values of the tokens read so far, [batch, length, kv_heads, head_dim] each."""

    k: jax.Array
    v: jax.Array


class Call(NamedTuple):
    """What all layers of one forward pass share.

    positions: int [batch, length]; cache_index: where this call's tokens stand in the caches; capture: names
    of what is kept from every layer, of "hidden" and "attention".
    """

    positions: jax.Array
    mask: Mask
    cache_index: jax.Array | int = 0
    capture: tuple[str, ...] = ()


class Layer(NamedTuple):
    """What is a layer's own; None where there is none.

    key: for dropout; window: int scalar; rotary_base, drop_rate: float scalars; first: bool scalar, and
    values: the first layer's, [batch, length, kv_heads, head_dim], where they are mixed with its own.
    """

    key: jax.Array | None = None
    cache: KVCache | None = None
    window: jax.Array | None = None
    rotary_base: jax.Array | None = None
    drop_rate: jax.Array | None = None
    first: jax.Array | None = None
    values: jax.Array | None = None


class Kept(NamedTuple):
    """What a layer gives beside its output: the filled cache, and what was captured, else None.

    hidden: the block's output [batch, length, d]; attention: float32 weights [batch, heads, l, m]; router:
    {name: float32 scalar} of a mixture of experts; values: as projected, if the config mixes them.
    """

    cache: KVCache | None = None
    hidden: jax.Array | None = None
    attention: jax.Array | None = None
    router: dict[str, jax.Array] | None = None
    values: jax.Array | None = None


def auto(
    q_blgrk: jax.Array, k_bmgk: jax.Array, v_bmgk: jax.Array, mask: Mask, scoring: Scoring, layout: Layout
) -> jax.Array:
    """On TPUs splash attention and on GPUs flash, where they fit; else dense while a device's scores fit
    comfortably, else blockwise. [batch, l, g, r, k]."""
    scores = math.prod(q_blgrk.shape[:-1]) * k_bmgk.shape[1]
    devices = layout.ways("batch") * layout.ways("kv_heads")
    many = q_blgrk.shape[1] >= FEWEST_QUERIES  # not one at a time, as in decoding
    if layout.platform == "tpu" and not splash.unfit(q_blgrk, k_bmgk, mask, scoring):
        kernel = splash.splash
    elif layout.platform == "gpu" and many and not flash.unfit(q_blgrk, scoring):
        kernel = flash.flash
    elif scores // devices > MAX_DENSE_SCORES:
        kernel = blockwise
    elif layout.platform == "cpu" and attend.is_triangle(q_blgrk, k_bmgk, mask):
        kernel = attend.triangle
    else:
        kernel = attend.dense
    return kernel(q_blgrk, k_bmgk, v_bmgk, mask, scoring, layout)


FEWEST_QUERIES = 64
KERNELS = {
    "auto": auto,
    "dense": attend.dense,
    "blockwise": blockwise,
    "splash": splash.splash,
    "flash": flash.flash,
    "cudnn": cudnn.cudnn,
}
FOR_TRAINING = ("splash", "flash", "cudnn")  # the queries of decoding are few, and start anywhere


def choose_kernel(config: ModelConfig, layout: Layout, one_segment: bool) -> str:
    """The config's kernel, but "cudnn" for "auto" where it fits: on a GPU, for rows of one segment each
    (one_segment), which is known of the data and not when a step is traced."""
    c = config
    if c.kernel != "auto" or layout.platform != "gpu" or not one_segment:
        return c.kernel
    if layout.axes("length") or layout.axes("layers"):
        return c.kernel
    q = jax.ShapeDtypeStruct((1, 1, c.kv_heads, c.num_heads // c.kv_heads, c.head_size), c.dtype)
    mask = Mask(q, q, c.causal, window=None, windows=c.windows)
    return c.kernel if cudnn.unfit(q, mask, _scoring(c), layout.platform) else "cudnn"


def _scoring(config: ModelConfig) -> Scoring:
    slopes = POSITIONS[config.positions].slopes
    return Scoring(
        None if slopes is None else jnp.asarray(slopes(config.num_heads)), config.attention_softcap
    )


class Attention(nn.Module):
    """[batch, length, d] to the same; heads, grouping, norms and kernel by the config."""

    config: ModelConfig
    layout: Layout
    dtype: str

    @nn.compact
    def __call__(self, x_bld: jax.Array, call: Call, layer: Layer) -> tuple[jax.Array, Kept]:
        """With a cache, this call's keys and values are written into it and all are read."""
        c, layout = self.config, self.layout
        q_blhk, k_bmgk, v_bmgk = self._project(layout.enter(x_bld), call, layer)
        values = None
        if c.value_residual:
            values, v_bmgk = v_bmgk, self._mix(v_bmgk, layer)
        cache = layer.cache
        if cache is not None:
            k_bmgk = jax.lax.dynamic_update_slice_in_dim(cache.k, k_bmgk, call.cache_index, axis=1)
            v_bmgk = jax.lax.dynamic_update_slice_in_dim(cache.v, v_bmgk, call.cache_index, axis=1)
            cache = KVCache(k_bmgk, v_bmgk)
        scoring = _scoring(c)
        mask = call.mask._replace(window=layer.window, windows=tuple(sorted({*c.windows})))
        kernel = auto if c.kernel in FOR_TRAINING and cache is not None else KERNELS[c.kernel]
        if layout.axes("length") or layout.apart:  # stages of a pipeline may have different windows
            kernel = partial(context.attend, kernel)
        o_blhk = attend.attend(q_blhk, k_bmgk, v_bmgk, mask, scoring, layout, kernel)
        weights = None
        if "attention" in call.capture:
            if layout.axes("length"):
                raise UserError("attention weights can be captured where mesh.context is 1; set it")
            q_blgrk = attend.group_heads(q_blhk, c.kv_heads, layout)
            p_bgrlm = attend.dense_weights(q_blgrk, k_bmgk, mask, scoring, layout)
            by_head = layout.spec("batch", "heads", "length", None)
            shape = (len(x_bld), c.num_heads, *p_bgrlm.shape[3:])
            weights = jnp.reshape(p_bgrlm, shape, out_sharding=by_head)
        shape, axes = (c.num_heads, c.head_size, c.model_dim), ("heads", "head", "embed")
        std = c.std(fan_in=c.num_heads * c.head_size, residual=True)
        y_bld = dense(self, "out", "blhk,hkd->bld", o_blhk, shape, axes, std)
        return y_bld, Kept(cache=cache, attention=weights, values=values)

    def _mix(self, v_bmgk: jax.Array, layer: Layer) -> jax.Array:
        """The layer's values and the first one's."""
        share = vector_param(self, "value_mix_scale", (1,), (None,), 0.5).astype(v_bmgk.dtype)
        return jnp.where(layer.first, v_bmgk, (1 - share) * v_bmgk + share * layer.values)

    def _project(self, x_bld: jax.Array, call: Call, layer: Layer) -> tuple[jax.Array, ...]:
        """Queries [b, l, h, k], keys and values [b, l, g, k], normed and turned."""
        c = self.config
        d, std = c.model_dim, c.std(fan_in=c.model_dim)
        outputs = [
            Output("query", (d, c.num_heads, c.head_size), ("embed", "heads", "head")),
            Output("key", (d, c.kv_heads, c.head_size), ("embed", "kv_heads", "head")),
            Output("value", (d, c.kv_heads, c.head_size), ("embed", "kv_heads", "head")),
        ]
        turn = POSITIONS[c.positions].turn
        q, k, v = dense_together(self, outputs, x_bld, std, untouched=not (turn or c.qk_norm))
        if c.qk_norm:  # Henry et al. 2020 (arXiv 2010.04245), Dehghani et al. 2023 (arXiv 2302.05442)
            q = RMSNorm(self.layout, self.dtype, axis="head", name="query_norm")(q)
            k = RMSNorm(self.layout, self.dtype, axis="head", name="key_norm")(k)
        if turn is None:
            return q, k, v
        base = c.rotary_base if layer.rotary_base is None else layer.rotary_base
        return turn(q, call.positions, base), turn(k, call.positions, base), v
