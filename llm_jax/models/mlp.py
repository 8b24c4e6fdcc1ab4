"""The feed-forward half of a block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.mesh import Layout
from llm_jax.models import layers


class MLP(nn.Module):
    """out(gelu(in(x))), exact GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""

    config: object  # transformer.ModelConfig
    layout: Layout
    dtype: str

    @nn.compact
    def __call__(self, x_bld: jax.Array) -> jax.Array:
        h_blf = jax.nn.gelu(_project_in(self, "in", x_bld), approximate=False)
        return _project_out(self, "out", h_blf)


class GatedMLP(nn.Module):
    """out(silu(gate(x)) * in(x)): SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    config: object  # transformer.ModelConfig
    layout: Layout
    dtype: str

    @nn.compact
    def __call__(self, x_bld: jax.Array) -> jax.Array:
        gate_blf = jax.nn.silu(_project_in(self, "gate", x_bld))
        return _project_out(self, "out", gate_blf * _project_in(self, "in", x_bld))


def _project_in(module: nn.Module, name: str, x_bld: jax.Array) -> jax.Array:
    c = module.config
    shape, std = (c.model_dim, c.mlp_size), c.std(fan_in=c.model_dim)
    w_df = layers.param(module, name, shape, ("embed", "mlp"), std)
    wide = module.layout.spec("batch", None, "mlp")
    return jnp.einsum("bld,df->blf", x_bld, w_df, out_sharding=wide)


def _project_out(module: nn.Module, name: str, h_blf: jax.Array) -> jax.Array:
    c = module.config
    shape, std = (c.mlp_size, c.model_dim), c.std(fan_in=c.mlp_size, residual=True)
    w_fd = layers.param(module, name, shape, ("mlp", "embed"), std)
    narrow = module.layout.spec("batch", None, None)
    return jnp.einsum("blf,fd->bld", h_blf, w_fd, out_sharding=narrow)


# name -> (module, weight matrices in it)
MLPS = {"gelu": MLP, "swiglu": GatedMLP}
