"""Small models of both families, on any mesh: what the model and training tests share."""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.sharding import NamedSharding

from llm_jax.data.batch import Batch
from llm_jax.mesh import MeshConfig, make_layout
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Transformer, init_params

VOCAB = 61
LENGTH = 16
ROWS = 8

DECODER = ModelConfig(
    num_layers=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=VOCAB,
    max_length=LENGTH,
    dtype="float32",
)
ENCODER = dataclasses.replace(
    DECODER,
    causal=False,
    num_kv_heads=0,
    positions="learnt",
    norm="layernorm",
    activation="gelu",
    scan_layers=False,
)
FAMILIES = {"decoder": DECODER, "encoder": ENCODER}


def layout_of(data=1, fsdp=1, tensor=1, zero=0, **others):
    config = MeshConfig(data, fsdp, tensor, zero=zero, **others)
    return make_layout(config, jax.devices()[: math.prod(config.sizes.values())])


def batch(rows=ROWS, seed=0, segments=None):
    """Random tokens, all in one segment unless given; two thirds of them are targets."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(5, VOCAB, (rows, LENGTH), dtype=np.int32)
    segments = np.ones_like(tokens) if segments is None else segments
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    targets = draw.integers(5, VOCAB, (rows, LENGTH), dtype=np.int32)
    weights = (draw.random((rows, LENGTH)) < 2 / 3).astype(np.float32)
    return Batch(tokens, targets, weights, np.array(positions), segments)


def make(config, layout, seed=0):
    """A model and its parameters: those of one device, which any mesh begins with (a test of its own), since
    compiling their initialisation for each mesh takes 2 s."""
    model, key = Transformer(config, layout), jax.random.key(seed)
    with jax.set_mesh(layout.mesh):
        like = jax.eval_shape(lambda key: init_params(model, key), key)

    def put(x, like):
        return jax.device_put(np.array(x), NamedSharding(layout.mesh, like.sharding.spec))

    return model, jax.tree.map(put, _on_one_device(config, seed), like)


def initial(config, layout, seed=0):
    """The parameters that a model begins with, made on its mesh."""
    model = Transformer(config, layout)
    with jax.set_mesh(layout.mesh):
        return jax.jit(lambda key: init_params(model, key))(jax.random.key(seed))


@functools.cache
def _on_one_device(config, seed):
    return jax.device_get(initial(config, layout_of(), seed))


def place(batch, layout, lead=0):
    """A numpy batch on the mesh; lead: how many axes stand before the rows."""
    return jax.device_put(batch, layout.named(*[None] * lead, "batch"))
