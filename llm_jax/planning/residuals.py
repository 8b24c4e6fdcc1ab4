"""What the forward pass leaves for the backward pass, found by tracing both: exact for any architecture."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.data.batch import Batch
from llm_jax.layout import abstractly
from llm_jax.models import moe
from llm_jax.models.transformer import Transformer
from llm_jax.planning.layout import shard_shape
from llm_jax.training.program import Program
from llm_jax.training.step import dropout_key, loss_weights, make_losses


def kept(program: Program, remat: bool) -> float:
    """Bytes on a device that one micro-batch keeps, with or without recomputation of blocks; parameters at
    rest aside. The compiler may do with less: it does not keep what it finds twice."""
    e, layout = program.experiment, program.layout
    config = dataclasses.replace(e.model, remat=remat, scan_layers=True)
    model = Transformer(config, layout)
    losses = make_losses(model, e.objective)
    coefficients = e.objective.coefficients | moe.coefficients(config)
    shape = (e.micro_batch, e.data.sequence_length)
    params = program.abstract_state().params

    def backward(params: object, micro: Batch) -> object:
        weights = loss_weights(model, e.objective, micro)
        key = dropout_key(e.seed, jnp.zeros((), jnp.int32))

        def loss(params: object) -> jax.Array:
            means = losses(params, micro, weights, key)
            return sum(means[name] * c for name, c in coefficients.items())

        return jax.vjp(loss, params)[1]

    def leaf(dtype: object) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.named("batch", None))

    ints, floats = leaf(jnp.int32), leaf(jnp.float32)
    with abstractly(layout.mesh):
        left = jax.eval_shape(backward, params, Batch(ints, ints, floats, ints, ints))
    at_rest = {_identity(leaf) for leaf in jax.tree.leaves(params)}
    total = 0.0
    for array in jax.tree.leaves(left):
        if array.sharding is None or _identity(array) not in at_rest:
            spec = array.sharding.spec if array.sharding else PartitionSpec()
            shard = shard_shape(array.shape, spec, layout.mesh.shape)
            total += math.prod(shard) * (
                8 if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else array.dtype.itemsize
            )
    return total


def _identity(array: jax.ShapeDtypeStruct) -> tuple:
    """What tells an array from others, also where a pipeline has dealt out its layers, which is no copy."""
    return math.prod(array.shape), array.dtype, array.shape[-1:], array.sharding.spec.partitions[-1:]
