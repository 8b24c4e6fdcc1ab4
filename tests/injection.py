"""Faults put into a training step on purpose, around ``step.make_gradients``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.training import norms
from llm_jax.training.rules import parameter_name

KINDS = ("nan", "inf", "spike")
PLACES = ("loss", "leaf", "shard")
SIGMAS = 10.0  # how far above the mean of the guard's window a spike's norm is put
SHARD_SPIKE = 1000.0  # by how much one device's rows weigh more in a spike: far more than 10 sigma


@dataclass(frozen=True)
class Fault:
    """At the step with this count. place: "loss", the one of the first token or, of a spike, all of it;
    "leaf", an entry of one gradient, or all of it; "shard", the rows that one device holds. number: of the
    leaf or the device, taken modulo how many there are."""

    step: int
    kind: str
    place: str
    number: int = 0


def faulty(make_gradients: Any, faults: list[Fault]) -> Any:
    """``make_gradients`` with these faults, all in one program. Spikes need a guard with sigma > 0."""

    def make(model: Any, objective: Any, seed: int) -> Any:
        true = make_gradients(model, objective, seed)

        def gradients(state: Any, batch: Any, weights: Any) -> Any:
            for fault in faults:
                batch = batch.replace(weights=_weights(fault, state.step == fault.step, batch, model.layout))
            means, grads = true(state, batch, weights)
            for fault in faults:
                hit = state.step == fault.step
                if fault.place == "leaf":
                    grads = _in_leaf(fault, hit, state.guard, grads)
                elif fault.place == "loss" and fault.kind == "spike":
                    factor = jnp.where(hit, _target(state.guard) / norms.total(norms.squares(grads)), 1.0)
                    means = means | {"loss": means["loss"] * factor}
                    grads = jax.tree.map(lambda g: g * factor, grads)  # noqa: B023
            return means, grads

        return gradients

    return make


def leaf_names(params: Any) -> list[str]:
    return [parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _value(fault: Fault) -> float:
    return {"nan": np.nan, "inf": np.inf, "spike": SHARD_SPIKE}[fault.kind]


def _target(guard: Any) -> jax.Array:
    """The norm of a spike, above what is usual."""
    return jnp.mean(guard.norms) + SIGMAS * jnp.std(guard.norms)


def _weights(fault: Fault, hit: jax.Array, batch: Any, layout: Any) -> jax.Array:
    """The batch's weights [accumulation, rows, length] with a fault of "loss" or "shard"."""
    mask = np.zeros(batch.weights.shape, bool)
    if fault.place == "shard":
        sharding = layout.named(None, "batch")
        devices = list(layout.mesh.devices.flat)
        held = sharding.devices_indices_map(mask.shape)[devices[fault.number % len(devices)]]
        mask[held] = True
    elif fault.place == "loss" and fault.kind != "spike":
        mask[0, 0] = True
    mask = jax.sharding.reshard(mask, jax.typeof(batch.weights).sharding)
    return jnp.where(hit & mask, batch.weights * _value(fault), batch.weights)


def _in_leaf(fault: Fault, hit: jax.Array, guard: Any, grads: Any) -> Any:
    leaves, tree = jax.tree.flatten(grads)
    number = fault.number % len(leaves)
    leaf = leaves[number]
    if fault.kind == "spike":
        own = jnp.sum(jnp.square(leaf))
        rest = jnp.square(norms.total(norms.squares(grads))) - own
        factor = jnp.sqrt((jnp.square(_target(guard)) - rest) / own)
        leaves[number] = jnp.where(hit, leaf * factor, leaf)
    else:
        mask = np.zeros(leaf.shape, bool)
        mask.flat[7919 * fault.number % mask.size] = True
        mask = jax.sharding.reshard(mask, jax.typeof(leaf).sharding)
        leaves[number] = jnp.where(hit & mask, _value(fault), leaf)
    return jax.tree.unflatten(tree, leaves)
