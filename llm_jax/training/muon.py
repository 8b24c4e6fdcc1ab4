"""Muon: momentum whose matrices are made orthogonal.

Jordan et al. 2024, kellerjordan.github.io/posts/muon.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from llm_jax.errors import UserError
from llm_jax.training import moments
from llm_jax.training.matrices import matrix_axes
from llm_jax.training.rules import parameter_name

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: steepest at 0, singular values end in about [0.7, 1.2]
ITERATIONS = 5


def scale_by_muon(beta: float, nesterov: bool, match_adamw: bool) -> optax.GradientTransformation:
    """Gradients to orthogonalised momentum; its state is ``optax.TraceState``, one momentum a parameter.

    match_adamw: the update's root mean square is about 0.2, AdamW's, whatever the shape (Liu et al. 2025,
    arXiv 2502.16982); else its spectral norm is about max(1, outputs / inputs)^0.5, as Jordan's.
    Raises UserError for a parameter that is no matrix.
    """
    momentum = moments.trace(beta, nesterov)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = momentum.update(updates, state, **extra)

        def one(path: tuple, m: jax.Array) -> jax.Array:
            return _orthogonal_update(parameter_name(path), m, match_adamw)

        return jax.tree_util.tree_map_with_path(one, updates), state

    return optax.GradientTransformationExtraArgs(momentum.init, update)


def _orthogonal_update(name: str, momentum: jax.Array, match_adamw: bool) -> jax.Array:
    """One parameter's update, where its momentum lies.

    The matrices are gathered whole on every device, which then all do the same work: products of sharded
    matrices with themselves have no unambiguous sharding, and would communicate at every iteration.
    """
    axes = matrix_axes(name, momentum.ndim)
    if axes is None:
        raise UserError(
            f"config.optimizer.rules gives {name} {list(momentum.shape)} to muon, which takes matrices "
            "only; give it another optimizer"
        )
    batch, inputs, outputs = axes.sizes(momentum.shape)
    whole = jax.sharding.reshard(momentum, PartitionSpec())
    x_nio = orthogonalize(whole.reshape(batch, inputs, outputs))
    size = 0.2 * math.sqrt(max(inputs, outputs)) if match_adamw else math.sqrt(max(1.0, outputs / inputs))
    update = size * x_nio.reshape(momentum.shape).astype(momentum.dtype)
    return jax.sharding.reshard(update, jax.typeof(momentum).sharding)


def orthogonalize(x_nio: jax.Array) -> jax.Array:
    """About the nearest matrices with orthonormal rows or columns, [n, i, o] in float32, by products in
    bfloat16 (on a CPU in float32).

    Five Newton-Schulz iterations of an odd quintic: with x = U S V^T it gives U p(S) V^T, where p takes
    (0, 1] close to 1. A zero matrix stays zero.
    """
    tall = x_nio.shape[1] > x_nio.shape[2]
    x = jnp.swapaxes(x_nio, 1, 2) if tall else x_nio  # the product x x^T is then the smaller one
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)  # no singular value above 1
    # By what is compiled for, which need not be what this process runs on.
    x = jax.lax.platform_dependent(x, cpu=_iterate, default=partial(_iterate, dtype=jnp.bfloat16))
    return jnp.swapaxes(x, 1, 2) if tall else x


def _iterate(x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """The iterations on wide matrices, [n, i, o], whose singular values are at most 1."""
    (a, b, c), x = COEFFICIENTS, x.astype(dtype)
    for _ in range(ITERATIONS):
        gram = x @ jnp.swapaxes(x, 1, 2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.astype(jnp.float32)
