"""What the forward pass leaves for the backward pass, found by tracing both: exact for any architecture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from llm_jax.data.batch import Batch
from llm_jax.layout import Layout, abstractly
from llm_jax.models import moe
from llm_jax.models.transformer import Transformer
from llm_jax.planning.layout import batch, shard_shape
from llm_jax.training.program import Program
from llm_jax.training.step import dropout_key, loss_weights, make_losses


def kept(program: Program, remat: bool) -> float:
    """Bytes on a device that one micro-batch keeps, with or without recomputation of blocks; parameters at
    rest and chunked scores aside. The compiler may do with less: it does not keep what it finds twice."""
    program = dataclasses.replace(program, layout=_nowhere(program.layout))
    e, layout = program.experiment, program.layout
    config = dataclasses.replace(e.model, remat=remat, scan_layers=True)
    model = Transformer(config, layout)
    losses = make_losses(model, e.objective)
    coefficients = e.objective.coefficients | moe.coefficients(config)
    params = program.abstract_state().params

    def backward(params: object, micro: Batch) -> object:
        weights = loss_weights(model, e.objective, micro)
        key = dropout_key(e.seed, jnp.zeros((), jnp.int32))

        def loss(params: object) -> jax.Array:
            means = losses(params, micro, weights, key)
            return sum(means[name] * c for name, c in coefficients.items())

        return jax.vjp(loss, params)[1]

    with abstractly(layout.mesh):
        left = jax.eval_shape(backward, params, batch(program))
    at_rest = {identity for leaf in jax.tree.leaves(params) for identity in _identities(leaf, layout)}
    total = 0.0
    for array in jax.tree.leaves(left):
        spec = array.sharding.spec if array.sharding else PartitionSpec()
        gathered = bool(spec.reduced)
        if gathered or (array.shape, array.dtype, _padded(spec, array.ndim)) not in at_rest:
            shard = shard_shape(array.shape, spec, layout.mesh.shape)
            total += math.prod(shard) * (
                8 if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else array.dtype.itemsize
            )
    return total


def _nowhere(layout: Layout) -> Layout:
    """The same on devices of no kind, for which a loss makes its scores in chunks and keeps none."""
    mesh = layout.mesh
    anywhere = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types)
    return dataclasses.replace(layout, mesh=anywhere)


def _identities(leaf: jax.ShapeDtypeStruct, layout: Layout) -> Iterator[tuple]:
    """Shape, dtype and cuts of a parameter at rest, and of its layers dealt out to the stages of a pipeline,
    [layers of a stage, stages, ...], which with one round copies nothing."""
    cuts, stages = _padded(leaf.sharding.spec, leaf.ndim), layout.ways("layers")
    yield leaf.shape, leaf.dtype, cuts
    if stages > 1 and cuts[:1] == ("stage",):
        shape = (leaf.shape[0] // stages, stages, *leaf.shape[1:])
        yield shape, leaf.dtype, (None, *cuts)


def _padded(spec: PartitionSpec, ndim: int) -> tuple:
    return (*spec.partitions, *[None] * (ndim - len(spec.partitions)))
