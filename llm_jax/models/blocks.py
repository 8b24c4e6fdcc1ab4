"""Blocks: what is stacked to make a model. A new architecture is a new block and a line in BLOCKS."""

from __future__ import annotations

import jax
from flax import linen as nn

from llm_jax.layout import Layout
from llm_jax.models.attention import Attention, Call, Kept, Layer
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import NORMS, drop_path, dropout
from llm_jax.models.mlp import MLP
from llm_jax.models.moe import MoE


class Block(nn.Module):
    """The parts of a block, by the config. A subclass says how they are joined, in ``__call__``:
    (x [batch, length, d], call, layer) -> (the same, what is kept)."""

    config: ModelConfig
    layout: Layout
    dtype: str

    ends_normed = False  # whether the output is normed already, so that the stack needs no final norm

    def norm(self, name: str) -> nn.Module:
        return NORMS[self.config.norm](self.layout, self.dtype, self.config.biases, name=name)

    def attention(self) -> Attention:
        return Attention(self.config, self.layout, self.dtype, name="attention")

    def mlp(self, x_bld: jax.Array, call: Call, kept: Kept) -> tuple[jax.Array, Kept]:
        """One MLP, or a mixture of experts, which adds to what is kept."""
        own = {"config": self.config, "layout": self.layout, "dtype": self.dtype, "name": "mlp"}
        if not self.config.num_experts:
            return MLP(**own)(x_bld), kept
        y_bld, router = MoE(**own)(x_bld, call.mask.q_segments, drops=kept.cache is None)
        return y_bld, kept._replace(router=router)

    def branch(self, x_bld: jax.Array, layer: Layer, number: int) -> jax.Array:
        """What a residual branch adds: by the config's scale, with dropout and stochastic depth."""
        x_bld = self.layout.in_memory(x_bld)  # the product would add it to a copy of the stream
        if self.config.residual_scale != 1.0:
            x_bld = self.config.residual_scale * x_bld
        if layer.key is None:
            return x_bld
        keys = jax.random.split(jax.random.fold_in(layer.key, number))
        return drop_path(dropout(x_bld, self.config.dropout, keys[0]), layer.drop_rate, keys[1])


class PreNormBlock(Block):
    """x + attention(norm(x)), then x + mlp(norm(x)) (Xiong et al. 2020, arXiv 2002.04745)."""

    @nn.compact
    def __call__(self, x_bld: jax.Array, call: Call, layer: Layer) -> tuple[jax.Array, Kept]:
        h_bld, kept = self.attention()(self.norm("attention_norm")(x_bld), call, layer)
        x_bld = x_bld + self.branch(h_bld, layer, 0)
        h_bld, kept = self.mlp(self.norm("mlp_norm")(x_bld), call, kept)
        return x_bld + self.branch(h_bld, layer, 1), kept


class PostNormBlock(Block):
    """norm(x + attention(x)), then norm(x + mlp(x)) (Vaswani et al. 2017, arXiv 1706.03762; BERT)."""

    ends_normed = True

    @nn.compact
    def __call__(self, x_bld: jax.Array, call: Call, layer: Layer) -> tuple[jax.Array, Kept]:
        h_bld, kept = self.attention()(x_bld, call, layer)
        x_bld = self.norm("attention_norm")(x_bld + self.branch(h_bld, layer, 0))
        h_bld, kept = self.mlp(x_bld, call, kept)
        return self.norm("mlp_norm")(x_bld + self.branch(h_bld, layer, 1)), kept


class ParallelBlock(Block):
    """x + attention(norm(x)) + mlp(norm(x)), one norm (Wang and Komatsuzaki 2021, GPT-J)."""

    @nn.compact
    def __call__(self, x_bld: jax.Array, call: Call, layer: Layer) -> tuple[jax.Array, Kept]:
        h_bld = self.norm("norm")(x_bld)
        a_bld, kept = self.attention()(h_bld, call, layer)
        m_bld, kept = self.mlp(h_bld, call, kept)
        return x_bld + self.branch(a_bld, layer, 0) + self.branch(m_bld, layer, 1), kept


BLOCKS = {"prenorm": PreNormBlock, "postnorm": PostNormBlock, "parallel": ParallelBlock}
