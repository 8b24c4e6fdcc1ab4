"""The feed-forward half of a block."""

from __future__ import annotations

import jax
from flax import linen as nn

from llm_jax.layout import Layout
from llm_jax.models.activations import ACTIVATIONS
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import Output, dense, dense_together


class MLP(nn.Module):
    """[batch, length, d] to the same, through ``mlp_size`` features."""

    config: ModelConfig
    layout: Layout
    dtype: str

    @nn.compact
    def __call__(self, x_bld: jax.Array) -> jax.Array:
        c = self.config
        activation = ACTIVATIONS[c.activation]
        std, out_std = c.std(fan_in=c.model_dim), c.std(fan_in=c.mlp_size, residual=True)
        shape, axes = (c.model_dim, c.mlp_size), ("embed", "mlp")
        x_bld = self.layout.enter(x_bld)
        names = ("in", "gate") if activation.gated else ("in",)
        h_blf, *gate = dense_together(self, [Output(name, shape, axes) for name in names], x_bld, std)
        h_blf = activation.function(*gate) * h_blf if gate else activation.function(h_blf)
        return dense(self, "out", "blf,fd->bld", h_blf, shape[::-1], axes[::-1], out_std)
