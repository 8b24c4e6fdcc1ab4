"""Euclidean norms of a tree named like a model's parameters: of all of it, and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Squares = Mapping[str, jax.Array]


def squares(tree: Mapping[str, Any]) -> dict[str, jax.Array]:
    """{section: float32 sum of squares}: scalars, but [layers] for ``blocks``, whose leaves are stacked."""

    def square(name: str, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=range(int(name == "blocks"), x.ndim))

    sums = {name: sum(square(name, x) for x in jax.tree.leaves(section)) for name, section in tree.items()}
    return {name: _everywhere(x) for name, x in sums.items()}


def _everywhere(x: jax.Array) -> jax.Array:
    """Whole on every device: a stage of a pipeline has its own layers' alone."""
    cut = any(jax.typeof(x).sharding.spec)
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec()) if cut else x


def total(parts: Squares) -> jax.Array:
    """The norm of the whole tree, a float32 scalar."""
    return jnp.sqrt(sum(jnp.sum(part) for part in parts.values()))


def clip(most: float) -> optax.GradientTransformation:
    """Scales a tree down to the norm ``most`` where its own is above (Pascanu et al. 2013, arXiv 1211.5063).

    As optax.clip_by_global_norm, but by one factor, which is part of whatever reads the gradients: chosen
    leaf by leaf, the clipped ones are a copy of their own, and their squares a second sum (log).
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, most / total(squares(updates)))
        return jax.tree.map(lambda g: (factor * g).astype(g.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def by_layer(parts: Squares) -> dict[str, float]:
    """Norms {"embedding": ..., "blocks/0": ..., "blocks/1": ...} on the host."""
    norms = {}
    for name, part in jax.device_get(parts).items():
        rows = {f"{name}/{i}": x for i, x in enumerate(part)} if np.ndim(part) else {name: part}
        norms |= {key: math.sqrt(x) for key, x in rows.items()}
    return norms
