"""Layers dealt out along mesh axis ``stage``: rows go through the devices part by part, a pipeline.

One circular schedule (Narayanan et al. 2021, arXiv 2104.04473, section 2.2, as one program for all devices):
every device has ``rounds`` runs of layers, and a part goes round the ring of s devices as many times. Parts
enter in groups of s: when the last of a group has entered, its first is back, and nothing waits. At tick t
stage i works on turn n = t - i: on part s * (n // (s * rounds)) + n % s, in round n // s % rounds. Of
parts * rounds + s - 1 ticks a device is idle in s - 1: the bubble. All devices compute at all ticks; what
idle ones give is thrown away.

Outside, the rows are cut along ``stage`` too, so that embedding and head are not computed s times. Letters as
in layers.py; s stage, r round, n layer of a run, m part of the rows, t tick.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from llm_jax.layout import Layout, all_but_gathered, mesh_axes
from llm_jax.models.attention import Call, Kept, Layer

STAGE = "stage"
Stack = Callable[[jax.Array, Call, tuple[Any, Layer]], tuple[jax.Array, Kept]]


def map_layers(function: Callable, stacked: Any, layout: Layout) -> Any:
    """``jax.lax.map`` over layers; with stages, each does its own."""
    stages = layout.ways("layers")
    if stages == 1:
        return jax.lax.map(function, stacked)
    stacked = jax.tree.map(lambda x: _cut(x.reshape(stages, -1, *x.shape[1:])), stacked)
    made = _over_stages(partial(jax.lax.map, function))(stacked)
    return jax.tree.map(lambda x: _reshape(x, (-1, *x.shape[2:]), (STAGE, *_cuts(x)[2:])), made)


def whole(tree: Any) -> Any:
    """Leaves stacked by layer, gathered from all stages: for what is not worth a pipeline, as decoding."""
    return jax.tree.map(lambda x: _reshard(x, (None, *_cuts(x)[1:])), tree)


def ticks(layout: Layout, rows: int) -> int:
    """Of a forward pass over so many rows: in each a stage does one run of layers on one part, or nothing."""
    return layout.parts(rows) * layout.rounds + layout.ways("layers") - 1


def bubble(layout: Layout, rows: int) -> float:
    """The share of the ticks in which a device has nothing to do."""
    return (layout.ways("layers") - 1) / ticks(layout, rows)


def schedule(
    tick: jax.Array | int, stages: int, rounds: int, parts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What every stage works on: its part, its round, and whether there is work; ints and bools [stages]."""
    n = tick - jnp.arange(stages)
    part, turn = stages * (n // (stages * rounds)) + n % stages, n // stages % rounds
    return jnp.clip(part, 0, parts - 1), turn, (n >= 0) & (n < parts * rounds)


def _done(part: np.ndarray, stages: int, rounds: int) -> np.ndarray:
    """The tick in which the last stage gives what has become of a part."""
    return stages * rounds * (part // stages) + stages * (rounds - 1) + part % stages + stages - 1


def run(
    stack: Stack, x_bld: jax.Array, call: Call, layers: tuple[Any, Layer], layout: Layout, remat: bool
) -> tuple[jax.Array, Kept]:
    """What ``stack(x_bld, call, layers)`` gives, which is called for every part and run of layers.

    stack: for ``layout.inside_stage()``; remat: with several rounds, recompute a run as a whole, so that it
    should not do so itself. layers: (parameters, Layer), stacked by layer. Of what is kept, the
    means of a mixture of experts alone: every part has its own, like micro-batches, weighted by tokens.
    """
    stages, rounds, parts = layout.ways("layers"), layout.rounds, layout.parts(len(x_bld))
    inside, length = layout.inside_stage(), ("batch", "length")
    layers = jax.tree.map(partial(_deal, stages=stages, rounds=rounds), layers)
    x_mbld = _split(inside.widen(x_bld, "batch", "residual", None), parts)
    positions_mbl = _split(inside.shard(call.positions, *length), parts)
    segments_mbl = _split(inside.shard(call.mask.q_segments, *length), parts)
    tokens_m = jnp.sum(segments_mbl > 0, axis=(1, 2))

    def work(
        part: jax.Array, x_bld: jax.Array, positions: jax.Array, segments: jax.Array, layers: Any
    ) -> Any:
        """One stage in one tick."""
        params, own = layers
        if own.key is not None:  # its own draws, as every micro-batch has
            own = own._replace(key=jax.vmap(jax.random.fold_in, (0, None))(own.key, part))
        mask = call.mask._replace(q_segments=segments, kv_segments=segments)
        x_bld, kept = stack(x_bld, call._replace(positions=positions, mask=mask), (params, own))
        return x_bld, kept.router

    # A round's weights stay out of what a tick keeps for the backward pass: that would be a copy a tick.
    if rounds == 1:
        only = jax.tree.map(lambda w_srn: w_srn[:, 0], layers)

        def in_round(_turn_s: jax.Array, *own: jax.Array) -> Any:
            return _over_stages(work)(*own, only)

    else:

        @partial(jax.checkpoint, policy=None if remat else _all_but_weights)
        def in_round(turn_s: jax.Array, *own: jax.Array) -> Any:
            return _over_stages(work)(*own, jax.tree.map(lambda w_srn: _pick(w_srn, turn_s), layers))

    def tick(x_sbld: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
        part, turn, real = schedule(t, stages, rounds, parts)
        x_sbld = _enter(x_sbld, x_mbld[part[0]], turn[0] == 0)
        at = _cut(part)
        positions, segments = (_of_part(x, at) for x in (positions_mbl, segments_mbl))
        x_sbld, router = in_round(_cut(turn), at, x_sbld, positions, segments)
        share_s = _cut(jnp.where(real, tokens_m[part] / jnp.maximum(jnp.sum(tokens_m), 1), 0.0))
        router = jax.tree.map(lambda x_sn: jnp.sum(share_s * jnp.mean(x_sn, axis=1)), router)
        return x_sbld, (x_sbld, router)

    shape, cuts = (stages, *x_mbld.shape[1:]), (STAGE, *_cuts(x_mbld)[1:])
    zeros = jnp.zeros(shape, x_bld.dtype, out_sharding=PartitionSpec(*cuts))
    _, (x_tsbld, router) = jax.lax.scan(tick, zeros, jnp.arange(ticks(layout, len(x_bld))))
    done = _done(np.arange(parts), stages, rounds)
    y_bld = layout.shard(_join(_leave(x_tsbld[done])), "batch", "residual", None)
    return y_bld, Kept(router=jax.tree.map(lambda x_t: jnp.sum(x_t) / (stages * rounds), router))


# ---- between stages ---------------------------------------------------------------------------------


def _enter(x_sbld: jax.Array, fresh_bld: jax.Array, enters: jax.Array) -> jax.Array:
    """What every stage works on next: what the one before it gave, or in the first what ``enters``."""

    def local(x: jax.Array, fresh: jax.Array, enters: jax.Array) -> jax.Array:
        count = jax.lax.axis_size(STAGE)
        x = jax.lax.ppermute(x, STAGE, [(i, (i + 1) % count) for i in range(count)])
        fresh = jax.lax.pcast(fresh, (STAGE,), to="varying")  # its gradient is of the first stage alone
        return jnp.where(enters & (jax.lax.axis_index(STAGE) == 0), fresh[None], x)

    specs = tuple(_spec(x) for x in (x_sbld, fresh_bld, enters))
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0])(x_sbld, fresh_bld, enters)


def _leave(x_msbld: jax.Array) -> jax.Array:
    """The last stage's, as parts to be summed: all others have zeros. [m, b, l, d]"""

    def local(x: jax.Array) -> jax.Array:
        last = jax.lax.axis_index(STAGE) == jax.lax.axis_size(STAGE) - 1
        return jax.lax.pcast(jnp.where(last, x[:, 0], 0), (STAGE,), to="unreduced")

    spec = _spec(x_msbld)
    out = PartitionSpec(None, *spec[2:], unreduced={STAGE})
    return jax.shard_map(local, in_specs=spec, out_specs=out)(x_msbld)


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[b, ...] to [m, b / m, ...], each device its own rows."""
    rows, *rest = _cuts(x)
    x = _reshape(x, (_ways(x, rows), parts, -1, *x.shape[1:]), (rows, None, None, *rest))
    return _reshape(jnp.moveaxis(x, 1, 0), (parts, -1, *x.shape[3:]), (None, rows, *rest))


def _join(x: jax.Array) -> jax.Array:
    """The inverse of ``_split``."""
    _, rows, *rest = _cuts(x)
    x = _reshape(x, (len(x), _ways(x, rows), -1, *x.shape[2:]), (None, rows, None, *rest))
    return _reshape(jnp.moveaxis(x, 1, 0), (-1, *x.shape[3:]), (rows, *rest))


def _of_part(x_mbl: jax.Array, part_s: jax.Array) -> jax.Array:
    return x_mbl.at[part_s].get(out_sharding=PartitionSpec(STAGE, *_cuts(x_mbl)[1:]))


# ---- layers to stages -------------------------------------------------------------------------------


def _deal(w: jax.Array, stages: int, rounds: int) -> jax.Array:
    """[layers, ...] to [s, r, n, ...]: in round r stage s has run r * stages + s.

    Parameters rest in the order of the layers, cut in ``stages`` pieces. With several rounds two all-to-alls
    bring them where they are needed, once a forward pass.
    """
    cuts, shape = _cuts(w), w.shape[1:]
    if cuts[0] is None:
        return _cut(jnp.swapaxes(w.reshape(rounds, stages, -1, *shape), 0, 1))
    if rounds == 1:
        return _reshape(w, (stages, 1, -1, *shape), (STAGE, None, None, *cuts[1:]))
    spec = _spec(w)
    out = spec.update(partitions=(STAGE, None, None, *cuts[1:]))
    return jax.shard_map(partial(_trade, stages=stages, rounds=rounds), in_specs=spec, out_specs=out)(w)


def _trade(w: jax.Array, stages: int, rounds: int) -> jax.Array:
    """Inside shard_map: this device's neighbouring layers to its runs [1, r, n, ...]."""
    axis = next((i for i in range(1, w.ndim) if w.shape[i] % stages == 0), None)
    if axis is None:
        w = jax.lax.all_gather(w, STAGE, axis=0, tiled=True)
        w = jnp.reshape(w, (rounds, stages, -1, *w.shape[1:]))
        return jax.lax.dynamic_index_in_dim(w, jax.lax.axis_index(STAGE), 1, keepdims=False)[None]
    w = jax.lax.all_to_all(w, STAGE, split_axis=axis, concat_axis=0, tiled=True)  # all layers, 1/s of each
    w = jnp.swapaxes(jnp.reshape(w, (rounds, stages, -1, *w.shape[1:])), 0, 1)
    return jax.lax.all_to_all(w, STAGE, split_axis=0, concat_axis=axis + 2, tiled=True)


@jax.custom_vjp
def _pick(w_srn: jax.Array, turn_s: jax.Array) -> jax.Array:
    """Of every stage the run of its round: [s, n, ...]."""

    def local(w: jax.Array, turn: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(w[0], turn[0])

    spec, cuts = _spec(w_srn), _cuts(w_srn)
    out = spec.update(partitions=(cuts[0], *cuts[2:]))
    return jax.shard_map(local, in_specs=(spec, _spec(turn_s)), out_specs=out)(w_srn, turn_s)


def _pick_forward(w_srn: jax.Array, turn_s: jax.Array) -> tuple:
    return _pick(w_srn, turn_s), (w_srn.shape[1], turn_s)


def _pick_backward(kept: tuple, grad_sn: jax.Array) -> tuple:
    rounds, turn_s = kept
    spec, cuts = _spec(grad_sn), _cuts(grad_sn)

    def local(grad: jax.Array, turn: jax.Array) -> jax.Array:
        here = (turn == jnp.arange(rounds)).astype(grad.dtype)
        here = jax.lax.pcast(here, tuple(spec.unreduced), to="reduced") if spec.unreduced else here
        return jnp.stack([grad * one for one in here], axis=1)

    out = spec.update(partitions=(cuts[0], None, *cuts[1:]))
    return jax.shard_map(local, in_specs=(spec, _spec(turn_s)), out_specs=out)(grad_sn, turn_s), None


_pick.defvjp(_pick_forward, _pick_backward)


def _all_but_weights(primitive: Any, *inputs: Any, **params: Any) -> bool:
    """A policy of jax.checkpoint: keep everything for the backward pass but what is picked and gathered."""
    called = params["call_jaxpr"].jaxpr.eqns if primitive.name == "custom_vjp_call" else ()
    picked = [equation.primitive.name for equation in called] == ["shard_map"]
    return not picked and all_but_gathered(primitive, *inputs, **params)


# ---- shardings --------------------------------------------------------------------------------------


def _over_stages(function: Callable) -> Callable:
    """``function``, of one stage's arrays, for arrays with a leading axis that is cut along the stages.

    ``jax.vmap`` (jax 0.10 to 0.12) refuses arrays whose gradients are parts to be summed, gathered weights,
    as arguments. A rule for vmap brings them in.
    """

    def run(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        summed = {i: _way_in(x) for i, x in enumerate(leaves) if _spec(x).reduced}

        def of_stage(stage: jax.Array, *others: jax.Array) -> Any:
            plain = iter(others)
            own = [summed[i](stage) if i in summed else next(plain) for i in range(len(leaves))]
            return function(*tree.unflatten(own))

        stages = _cut(jnp.arange(len(leaves[0])))
        return jax.vmap(of_stage)(stages, *(x for i, x in enumerate(leaves) if i not in summed))

    return run


def _way_in(x: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """stage -> its own of ``x``, for use under vmap."""

    def own(_stage: jax.Array) -> jax.Array:
        return jnp.zeros(x.shape[1:], x.dtype)  # says the shape; what is called is the rule

    own = jax.custom_batching.custom_vmap(own)
    own.def_vmap(lambda _size, _batched, _stages: (x, True))
    return own


def _spec(x: jax.Array) -> PartitionSpec:
    return jax.typeof(x).sharding.spec


def _cuts(x: jax.Array) -> tuple:
    return _spec(x).partitions


def _ways(x: jax.Array, cut: Any) -> int:
    return math.prod(jax.typeof(x).sharding.mesh.shape[axis] for axis in mesh_axes(PartitionSpec(cut)))


def _cut(x: jax.Array) -> jax.Array:
    return _reshard(x, (STAGE, *_cuts(x)[1:]))


def _reshard(x: jax.Array, cuts: tuple) -> jax.Array:
    return jax.sharding.reshard(x, _spec(x).update(partitions=cuts))


def _reshape(x: jax.Array, shape: tuple[int, ...], cuts: tuple) -> jax.Array:
    return jnp.reshape(x, shape, out_sharding=_spec(x).update(partitions=cuts))
