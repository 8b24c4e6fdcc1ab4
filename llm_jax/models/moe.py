"""A mixture of experts in place of the feed-forward half of a block: routing, and what is learnt from it.

Every token goes to ``experts_per_token`` of ``num_experts`` MLPs. With one (Switch; Fedus et al. 2021, arXiv
2101.03961) its output is multiplied by the router's probability; with more (Shazeer et al. 2017, arXiv
1701.06538) by the probabilities normalised over those chosen, as in Mixtral (arXiv 2401.04088). One
normalised probability would be 1, and the router would learn nothing. Experts have no biases.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.errors import UserError
from llm_jax.layout import Layout
from llm_jax.models import experts
from llm_jax.models.activations import ACTIVATIONS
from llm_jax.models.config import ModelConfig
from llm_jax.models.experts import Choices, Weights
from llm_jax.models.layers import param
from llm_jax.models.mlp import MLP


class MoE(nn.Module):
    """[batch, length, d] to the same, and {name of ``names``: float32 mean over the real tokens}."""

    config: ModelConfig
    layout: Layout
    dtype: str

    @nn.compact
    def __call__(
        self, x_bld: jax.Array, segments_bl: jax.Array, drops: bool = True
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """segments: 0 for padding, which no expert sees. drops=False: no capacity, whatever the config says,
        as in decoding, where a token's fate should not depend on the length of the prompt."""
        c, layout = self.config, self.layout
        real_bl = layout.shard(segments_bl, "batch", "residual") > 0
        logits_ble = self._logits(x_bld)
        choices, values = route(logits_ble, real_bl, c.experts_per_token)
        weights = self._weights()
        if c.capacity_factor and drops:
            room = experts.Room(c.capacity_factor, c.routing_group)
            y_bld, values["dropped"] = experts.with_capacity(x_bld, choices, weights, room, layout)
        else:
            y_bld = experts.dropless(x_bld, choices, weights, layout)
        if c.shared_experts:  # seen by every token (Dai et al. 2024, DeepSeekMoE, arXiv 2401.06066)
            wide = dataclasses.replace(c, mlp_dim=c.shared_experts * c.mlp_size)
            y_bld = y_bld + MLP(wide, layout, self.dtype, name="shared")(x_bld)
        return y_bld, values

    def _logits(self, x_bld: jax.Array) -> jax.Array:
        """Float32 [batch, length, experts], from float32 products: Switch is unstable with less."""
        c, layout = self.config, self.layout

        def init(key: jax.Array) -> jax.Array:
            w = c.std(fan_in=c.model_dim) * jax.random.normal(key, (c.model_dim, c.num_experts), jnp.float32)
            return layout.store(w, "embed", None)

        w_de = layout.gather(self.param("router", init), "float32", over=("batch", "residual"))
        spec = layout.spec("batch", "residual", None)
        return jnp.einsum("bld,de->ble", x_bld.astype(jnp.float32), w_de, out_sharding=spec)

    def _weights(self) -> Weights:
        c, activation = self.config, ACTIVATIONS[self.config.activation]
        shape, axes = (c.num_experts, c.model_dim, c.mlp_size), ("experts", "embed", "mlp")
        std, out_std = c.std(fan_in=c.model_dim), c.std(fan_in=c.mlp_size, residual=True)
        return Weights(
            activation.function,
            param(self, "in", shape, axes, std),
            param(self, "gate", shape, axes, std) if activation.gated else None,
            param(self, "out", (shape[0], *shape[:0:-1]), (axes[0], *axes[:0:-1]), out_std),
        )


def route(logits_ble: jax.Array, real_bl: jax.Array, per_token: int) -> tuple[Choices, dict[str, jax.Array]]:
    """The choices of every token, and means over the real ones of the micro-batch, the same on any mesh.

    balance_loss: experts * sum over them of (share of the choices) * (mean probability), 1 where all have the
    same (Switch, eq. 4 to 6). router_z_loss: log(sum(exp(logits)))^2 (Zoph et al. 2022, ST-MoE, arXiv
    2202.08906, eq. 5). load_entropy: of the shares of the choices, over log(experts): 1 = balanced, 0 = all
    tokens have the same expert. Every micro-batch has its own shares: with accumulation, balance_loss is the
    mean of theirs, and asks for balance in each.
    """
    count = logits_ble.shape[-1]
    probabilities_ble = jax.nn.softmax(logits_ble)
    # Not by lax.top_k: XLA's CPU compiler gathers the scores of the whole batch for it on every device.
    ids_blk = jnp.argsort(-jax.lax.stop_gradient(probabilities_ble), axis=-1, stable=True)[..., :per_token]
    weights_blk = jnp.take_along_axis(probabilities_ble, ids_blk, axis=-1)
    if per_token > 1:
        weights_blk = weights_blk / jnp.sum(weights_blk, axis=-1, keepdims=True)
    ids_blk = jnp.where(real_bl[:, :, None], ids_blk, count)

    tokens = jnp.maximum(jnp.sum(real_bl), 1)
    chosen_e = jnp.sum(ids_blk[..., None] == jnp.arange(count), axis=(0, 1, 2)) / (tokens * per_token)
    mean_e = jnp.sum(jnp.where(real_bl[:, :, None], probabilities_ble, 0.0), axis=(0, 1)) / tokens
    squares_bl = jnp.square(jax.nn.logsumexp(logits_ble, axis=-1))
    values = {
        "balance_loss": count * jnp.sum(chosen_e * mean_e),
        "router_z_loss": jnp.sum(jnp.where(real_bl, squares_bl, 0.0)) / tokens,
        "load_entropy": jnp.sum(jax.scipy.special.entr(chosen_e)) / math.log(max(count, 2)),
    }
    return Choices(ids_blk, weights_blk), values


def names(c: ModelConfig) -> tuple[str, ...]:
    """What a model with experts reports: ``route``'s, and "dropped", the share of the choices that found no
    room. Means over layers."""
    if not c.num_experts:
        return ()
    return ("balance_loss", "router_z_loss", "load_entropy", *(("dropped",) if c.capacity_factor else ()))


def coefficients(c: ModelConfig) -> dict[str, float]:
    """Of those that are trained on. A config's are for each layer's own loss, as in the papers."""
    trained = {"balance_loss": c.balance_loss, "router_z_loss": c.router_z_loss} if c.num_experts else {}
    return {name: x * c.num_layers for name, x in trained.items() if x}


def check(c: ModelConfig, length: int) -> None:
    """Raises UserError for experts that cannot be, with rows of ``length`` tokens."""
    for key in ("num_experts", "shared_experts", "capacity_factor", "routing_group"):
        value = getattr(c, key)
        if value < 0:
            raise UserError(f"config.model.{key} must be at least 0, not {value}")
        if value and not c.num_experts:
            raise UserError(f"config.model.{key}={value} is of a mixture of experts; set model.num_experts")
    if c.num_experts and not 1 <= c.experts_per_token <= c.num_experts:
        raise UserError(
            f"config.model.experts_per_token={c.experts_per_token} must be at least 1 and at most "
            f"num_experts={c.num_experts}"
        )
    if c.routing_group and not c.capacity_factor:
        raise UserError("config.model.routing_group shares out a capacity; set model.capacity_factor")
    if c.routing_group and length % c.routing_group:
        raise UserError(
            f"config.model.routing_group={c.routing_group} does not divide data.sequence_length={length}"
        )


def check_mesh(c: ModelConfig, length: int, sizes: Mapping[str, int]) -> None:
    """Raises UserError where the mesh cuts a group, or tokens on their way. sizes: {mesh axis: size}."""
    context, tensor = sizes["context"], sizes["tensor"]
    piece = length // (2 * context if c.causal else context)  # a decoder's length is dealt out in these
    if c.capacity_factor and context > 1 and (not c.routing_group or piece % c.routing_group):
        raise UserError(
            f"config.model.routing_group={c.routing_group}: with mesh.context={context} a group of tokens "
            f"must divide the {piece} of a piece of the length; set such a size"
        )
    if c.capacity_factor and c.model_dim % tensor:
        raise UserError(
            f"config.model.model_dim={c.model_dim} is not divisible by mesh.tensor={tensor}, along which "
            "tokens are cut on their way to experts; change one"
        )


def loss_weights(c: ModelConfig, segments: jax.Array) -> dict[str, jax.Array]:
    """{name: the number of real tokens}, of any number of batches."""
    return dict.fromkeys(names(c), jnp.sum(segments > 0, dtype=jnp.float32))
