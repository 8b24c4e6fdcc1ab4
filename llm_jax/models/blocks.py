"""Blocks: what is stacked to make a model. A new architecture is a new block here."""

from __future__ import annotations

import jax
from flax import linen as nn

from llm_jax.mesh import Layout
from llm_jax.models.attention import Attention, KVCache, Mask
from llm_jax.models.layers import NORMS, dropout
from llm_jax.models.mlp import MLPS


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (Xiong et al. 2020, arXiv 2002.04745)."""

    config: object  # transformer.ModelConfig
    layout: Layout
    dtype: str

    @nn.compact
    def __call__(
        self,
        x_bld: jax.Array,
        positions_bl: jax.Array,
        mask: Mask,
        key: jax.Array | None = None,
        cache: KVCache | None = None,
        cache_index: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        """[batch, length, d] to the same; key: for dropout, None in evaluation."""
        c = self.config
        common = {"layout": self.layout, "dtype": self.dtype}
        keys = (None, None) if key is None else jax.random.split(key)
        h_bld = NORMS[c.norm](**common, name="attention_norm")(x_bld)
        attention = Attention(c, **common, name="attention")
        h_bld, cache = attention(h_bld, positions_bl, mask, cache, cache_index)
        x_bld = x_bld + dropout(h_bld, c.dropout, keys[0])
        h_bld = NORMS[c.norm](**common, name="mlp_norm")(x_bld)
        h_bld = MLPS[c.activation](c, **common, name="mlp")(h_bld)
        return x_bld + dropout(h_bld, c.dropout, keys[1]), cache
