"""Experts: two ways of bringing tokens to MLPs that lie on different devices.

Letters beside those of layers.py: n groups of a row, s tokens of a group, k choices of a token, a = s * k
choices of a group, e experts, c places of an expert. Bytes are those one device sends and receives in the
forward pass for its t tokens of d numbers, with x devices along ``expert``; the backward pass has as many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.layout import Layout


class Choices(NamedTuple):
    """ids: int [b, l, k], the number of experts where there is none; weights: float32 [b, l, k]."""

    ids: jax.Array
    weights: jax.Array


class Weights(NamedTuple):
    """Of all experts: ``into`` and ``gate`` [e, d, f], gate None without gating; out [e, f, d]."""

    function: Callable[[jax.Array], jax.Array]
    into: jax.Array
    gate: jax.Array | None
    out: jax.Array

    def hidden(self, product: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """What stands before ``out``; product: multiplies the tokens with [e, d, f]."""
        if self.gate is None:
            return self.function(product(self.into))
        return self.function(product(self.gate)) * product(self.into)


class Room(NamedTuple):
    """How many choices an expert takes of a group: factor 1 is what all would have if they had the same.

    group: tokens of a row that share the room, 0 = the row. It does not depend on the mesh.
    """

    factor: float
    group: int

    def places(self, tokens: int, per_token: int, experts: int) -> int:
        return min(math.ceil(self.factor * tokens * per_token / experts), tokens)


class _Queue(NamedTuple):
    """Choices [..., a] behind one another by expert, in each expert those of earlier tokens first.

    order: the choices in this order; ranks: the place of every choice in it; counts, starts: [..., e].
    """

    order: jax.Array
    ranks: jax.Array
    counts: jax.Array
    starts: jax.Array


def _queue(ids: jax.Array, experts: int) -> _Queue:
    order = jnp.argsort(ids, axis=-1, stable=True)
    counts = jnp.sum(ids[..., None] == jnp.arange(experts), axis=-2)
    return _Queue(order, jnp.argsort(order, axis=-1), counts, jnp.cumsum(counts, axis=-1) - counts)


def with_capacity(
    x_bld: jax.Array, choices: Choices, w: Weights, room: Room, layout: Layout
) -> tuple[jax.Array, jax.Array]:
    """(weighted sum of the experts' outputs [b, l, d], share of the choices dropped), by batched products.

    Every expert takes so many choices of a group, first come, first served: a token is never turned away for
    one behind it, so that a causal model stays causal. What is dropped adds nothing; the residual passes it
    by (GShard, Lepikhin et al. 2020, arXiv 2006.16668).

    Tokens travel cut along ``tensor``, of m devices. Two all-to-alls along ``expert`` move
    t * k * factor * d / m * (x - 1) / x numbers each; the gather and the reduce-scatter along ``tensor``
    t * k * factor * d * (m - 1) / m each.
    """
    _, length, d = x_bld.shape
    per_token, experts = choices.ids.shape[-1], w.into.shape[0]
    size = math.gcd(room.group, length // layout.ways("length"))  # at init there may be fewer than a group
    places = room.places(size, per_token, experts)
    x_bnsd = _grouped(x_bld, (size, d), ("features",), layout)
    ids_bna, weights_bna = (_grouped(x, (size * per_token,), (None,), layout) for x in choices)
    queue = _queue(ids_bna, experts)

    # A place beyond an expert's last choice is filled with some token; nothing reads what comes of it.
    spots = queue.starts[..., None] + jnp.arange(places)
    spots = jnp.minimum(spots.reshape(*spots.shape[:2], -1), size * per_token - 1)
    tokens = jnp.take_along_axis(queue.order, spots, axis=2) // per_token
    x = jnp.take_along_axis(x_bnsd, tokens[..., None], axis=2)
    x_bnecd = x.reshape(*x.shape[:2], experts, places, d)
    y_bnecd = _compute(x_bnecd, w, layout)

    starts_bna = jnp.take_along_axis(queue.starts, jnp.minimum(ids_bna, experts - 1), axis=2)
    place_bna = queue.ranks - starts_bna
    taken_bna = (ids_bna < experts) & (place_bna < places)
    spots = jnp.where(taken_bna, ids_bna * places + place_bna, 0)
    y = jnp.take_along_axis(y_bnecd.reshape(x.shape), spots[..., None], axis=2)
    y = y * jnp.where(taken_bna, weights_bna, 0.0).astype(y.dtype)[..., None]
    y_bnsd = jnp.sum(y.reshape(*x_bnsd.shape[:3], per_token, d), axis=3)
    spec = layout.spec("batch", "length", "features")
    y_bld = layout.shard(jnp.reshape(y_bnsd, x_bld.shape, out_sharding=spec), "batch", "residual", None)
    asked = jnp.sum(queue.counts)
    return y_bld, (asked - jnp.sum(taken_bna)) / jnp.maximum(asked, 1)


def _grouped(x: jax.Array, shape: tuple[int, ...], last: tuple[str | None], layout: Layout) -> jax.Array:
    """[b, l, last] to [b, n, *shape]."""
    x = layout.shard(x, "batch", "length", *last)
    spec = layout.spec("batch", "length", *[None] * (len(shape) - 1), *last)
    return jnp.reshape(x, (len(x), -1, *shape), out_sharding=spec)


def _compute(x_bnecd: jax.Array, w: Weights, layout: Layout) -> jax.Array:
    """The places of all experts, taken to where these lie, through them and back."""
    there = ("groups", "length", "experts", None)
    x_bnecd = layout.widen(layout.shard(x_bnecd, *there, "features"), *there, None)

    def product(w_edf: jax.Array) -> jax.Array:
        return jnp.einsum("bnecd,edf->bnecf", x_bnecd, w_edf, out_sharding=layout.spec(*there, "mlp"))

    parts = layout.spec(*there, None, summed=layout.axes("mlp"))
    y_bnecd = jnp.einsum("bnecf,efd->bnecd", w.hidden(product), w.out, out_sharding=parts)
    y_bnecd = layout.shard(y_bnecd, *there, "features")
    return layout.shard(y_bnecd, "batch", "length", None, None, "features")


def dropless(x_bld: jax.Array, choices: Choices, w: Weights, layout: Layout) -> jax.Array:
    """The weighted sum of the experts' outputs [b, l, d] of all choices, by products of unequal groups
    (Gale et al. 2022, MegaBlocks, arXiv 2211.15841).

    Tokens are gathered along ``expert``; a device runs its own experts on those that chose them, and the
    parts are summed and cut again. Gather and reduce-scatter move t * d * (x - 1) numbers each, whatever the
    routing; an all-to-all of what is needed would move t * k * d * (x - 1) / x, less where k < x. Since all
    tokens may choose one device, it holds rows for all their choices: x * t * k of d numbers.
    """
    axes = layout.axes("experts")
    summed = (*axes, *layout.axes("mlp"))
    here = ("groups", "length", None)

    def local(*args: Any) -> jax.Array:
        x_bld, choices, *matrices = jax.tree.map(_vary, args, specs)
        first = jax.lax.axis_index(axes) * len(w.into) // layout.ways("experts") if axes else 0
        mine = choices._replace(ids=choices.ids - first)
        y_bld = _run_experts(x_bld, mine, Weights(w.function, *matrices))
        return jax.lax.pcast(y_bld, summed, to="unreduced")

    gathered = Choices(layout.shard(choices.ids, *here), layout.widen(choices.weights, *here))
    args = (layout.widen(x_bld, *here), gathered, *w[1:])
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, args)
    y_bld = layout.on_devices(local, args, args[0], layout.spec(*here, summed=summed))
    y_bld = layout.shard(y_bld, "batch", "residual", None)
    # Without the barrier XLA's partitioner (jaxlib 0.10.2, 0.12.0) takes the gathered gradient of y for other
    # products with that gradient, those of a shared expert, and aborts.
    return jax.lax.optimization_barrier(y_bld)


def _vary(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """``x`` inside shard_map, whose gradient on each device is a part to be summed."""
    return jax.lax.pcast(x, tuple(sorted(spec.reduced)), to="varying") if spec.reduced else x


def _run_experts(x_bld: jax.Array, choices: Choices, w: Weights) -> jax.Array:
    """The weighted sum over the choices that are of these experts, counted from 0; arrays of one device."""
    d, per_token, experts = x_bld.shape[-1], choices.ids.shape[-1], len(w.into)
    ids_a = choices.ids.reshape(-1)
    mine_a = (ids_a >= 0) & (ids_a < experts)
    queue = _queue(jnp.where(mine_a, ids_a, experts), experts)
    x_ad = x_bld.reshape(-1, d)[queue.order // per_token]
    h_af = w.hidden(lambda w_edf: jax.lax.ragged_dot(x_ad, w_edf, queue.counts))
    y_ad = jax.lax.ragged_dot(h_af, w.out, queue.counts)[queue.ranks]
    weights_a = choices.weights.reshape(-1).astype(y_ad.dtype)
    y_ad = jnp.where(mine_a[:, None], y_ad * weights_a[:, None], 0.0)
    return jnp.sum(y_ad.reshape(*choices.ids.shape, d), axis=2)
