"""What optimisers remember of gradients, and how a bad step leaves it as it was.

``update`` of these transformations takes ``applied``, a bool scalar, beside optax's arguments. Where it is
False the new state is the old one, bit for bit, and the updates mean nothing. The choice is made where the
new moments are, and the updates follow from what was chosen. Made afterwards, on the finished state, it would
have XLA compute the moments twice and keep a copy of the old ones: more bytes than a guard may cost
(``benchmarks/reliability/guard_cost.py`` counts them).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

Applied = jax.Array | bool


def choose(applied: Applied, new: Any, old: Any) -> Any:
    """``new`` or ``old``, leaf by leaf. where, not a product with 0: 0 x NaN is NaN."""
    return jax.tree.map(lambda new, old: jnp.where(applied, new, old), new, old)


def choosing(transformation: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Any transformation, with the choice made on its finished state: right, at the price above."""

    def update(
        updates: Any, state: Any, params: Any = None, *, applied: Applied = True, **_: Any
    ) -> tuple[Any, Any]:
        updates, new = transformation.update(updates, state, params)
        return updates, choose(applied, new, state)

    return optax.GradientTransformationExtraArgs(transformation.init, update)


def scale_by_adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam with the same state and the same bits."""

    def update(
        updates: Any, state: Any, params: Any = None, *, applied: Applied = True, **_: Any
    ) -> tuple[Any, Any]:
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, beta1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, beta2, 2)
        new = choose(applied, optax.ScaleByAdamState(count, mu, nu), state)
        mu = optax.tree.bias_correction(new.mu, beta1, count)
        nu = optax.tree.bias_correction(new.nu, beta2, count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mu, nu), new

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)


def trace(decay: float, nesterov: bool) -> optax.GradientTransformationExtraArgs:
    """optax.trace, momentum, with the same state and the same bits."""

    def update(
        updates: Any, state: Any, params: Any = None, *, applied: Applied = True, **_: Any
    ) -> tuple[Any, Any]:
        def add(g: jax.Array, t: jax.Array) -> jax.Array:
            return g + decay * t

        new = choose(applied, jax.tree.map(add, updates, state.trace), state.trace)
        return (jax.tree.map(add, updates, new) if nesterov else new), optax.TraceState(new)

    return optax.GradientTransformationExtraArgs(optax.trace(decay).init, update)
