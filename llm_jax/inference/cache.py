"""The key-value cache of a whole model."""

from __future__ import annotations

import jax.numpy as jnp

from llm_jax.layout import Layout
from llm_jax.models.attention import KVCache
from llm_jax.models.config import ModelConfig


def empty_cache(config: ModelConfig, layout: Layout, batch: int, length: int) -> KVCache:
    """Zeros [layers, batch, length, kv_heads, head_dim] in the compute dtype. Call inside jit."""
    shape = (config.num_layers, batch, length, config.kv_heads, config.head_size)
    zeros = jnp.zeros(shape, config.dtype)
    zeros = layout.shard(zeros, None, "batch", None, "kv_heads", None)
    return KVCache(zeros, zeros)
