"""The Transformer: embeddings, a stack of blocks, a final norm and a tied head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.config import identity, runtime
from llm_jax.mesh import Layout
from llm_jax.models import layers
from llm_jax.models.attention import KVCache, Mask
from llm_jax.models.blocks import PreNormBlock

VOCAB_MULTIPLE = 128  # the lane width of a TPU; also lets the head be cut by any usual tensor axis


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder (causal) or an encoder. Zeros stand for values derived from the others.

    num_kv_heads: 0 = num_heads (MHA); less is GQA. head_dim: 0 = model_dim / num_heads.
    mlp_dim: 0 = 4 * model_dim, or 8/3 of it, rounded up to a multiple of 8, for gated activations.
    vocab_size: 0 = the tokenizer's. max_length: 0 = data.sequence_length; the learnt position table.
    init_std: 0 = 1 / sqrt(fan_in); matrices that write to the residual stream are divided by
    sqrt(2 * num_layers) in both cases (Radford et al. 2019).
    dtype: of matrix products; "auto" = bfloat16 on TPU and GPU, float32 on CPU.
    scan_layers: compile one block and scan; unrolled is faster on a CPU but compiles longer.
    remat: recompute blocks in the backward pass instead of keeping their activations.
    """

    num_layers: int = identity(2)
    model_dim: int = identity(64)
    num_heads: int = identity(4)
    num_kv_heads: int = identity(0)
    head_dim: int = identity(0)
    mlp_dim: int = identity(0)
    vocab_size: int = identity(0)
    max_length: int = identity(0)
    causal: bool = identity(True)
    positions: str = identity("rotary")
    rotary_base: float = identity(10000.0)
    norm: str = identity("rmsnorm")
    activation: str = identity("swiglu")
    dropout: float = identity(0.0)
    init_std: float = identity(0.0)
    dtype: str = runtime("auto")
    scan_layers: bool = runtime(True)
    remat: bool = runtime(False)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.model_dim // self.num_heads

    @property
    def mlp_size(self) -> int:
        gated = -(-8 * self.model_dim // 3 // 8) * 8
        return self.mlp_dim or (gated if self.activation == "swiglu" else 4 * self.model_dim)

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def std(self, fan_in: int, residual: bool = False) -> float:
        """Standard deviation of a matrix's initial entries."""
        std = self.init_std or 1.0 / math.sqrt(fan_in)
        return std / math.sqrt(2 * self.num_layers) if residual else std


POSITIONS = ("rotary", "learnt")


class Aux(NamedTuple):
    """What a forward pass gives beside the hidden states.

    losses: {name: (sum, weight)} of the model's own losses; cache: filled [layers, ...], or None.
    """

    losses: dict[str, tuple[jax.Array, jax.Array]]
    cache: KVCache | None


class Transformer(nn.Module):
    """tokens to hidden states; ``logits`` maps these to scores over the padded vocabulary."""

    config: ModelConfig
    layout: Layout

    @property
    def dtype(self) -> str:
        return self.config.dtype

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", self._init_embedding, c.padded_vocab, "vocab")
        if c.positions == "learnt":
            self.position_embedding = self.param(
                "position_embedding", self._init_embedding, c.max_length, None
            )
        self.blocks = self.param("blocks", self._init_blocks)
        self.final_norm = layers.NORMS[c.norm](self.layout, c.dtype)

    def _init_embedding(self, key: jax.Array, rows: int, axis: str | None) -> jax.Array:
        shape, std = (rows, self.config.model_dim), self.config.std(fan_in=self.config.model_dim)
        return self.layout.store(std * jax.random.normal(key, shape, jnp.float32), axis, "embed")

    def _block(self) -> PreNormBlock:
        return PreNormBlock(self.config, self.layout, self.config.dtype, parent=None)

    def _init_blocks(self, key: jax.Array) -> Any:
        """Parameters of all blocks, stacked on a leading axis."""
        ids = dummy_ids(self.layout)
        x_bld = jnp.zeros((*ids.shape, self.config.model_dim), self.config.dtype)
        mask = Mask(ids, ids, ids, ids, self.config.causal)

        def init_block(key: jax.Array) -> Any:
            return self._block().init(key, x_bld, ids, mask)["params"]

        return jax.vmap(init_block)(jax.random.split(key, self.config.num_layers))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        *,
        key: jax.Array | None = None,
        cache: KVCache | None = None,
        cache_index: jax.Array | int = 0,
    ) -> tuple[jax.Array, Aux]:
        """tokens, positions, segments: int32 [batch, length] to hidden states [batch, length, d].

        key: for dropout; None in evaluation. cache: [layers, batch, total, kv_heads, head_dim] pair;
        this call's tokens stand at ``cache_index`` of its rows (one segment a row).
        """
        c, layout = self.config, self.layout
        key = key if c.dropout else None
        x_bld = self._embed(self.embedding, tokens)
        if c.positions == "learnt":
            x_bld = x_bld + self._embed(self.position_embedding, positions)
        if key is not None:
            key, embedding_key = jax.random.split(key)
            x_bld = layers.dropout(x_bld, c.dropout, embedding_key)
        mask = self._mask(segments, cache, cache_index)
        block = self._block()

        def apply_block(x_bld: jax.Array, layer: tuple) -> tuple[jax.Array, KVCache | None]:
            params, key, cache = layer
            return block.apply({"params": params}, x_bld, positions, mask, key, cache, cache_index)

        keys = None if key is None else jax.random.split(key, c.num_layers)
        x_bld = layout.shard(x_bld, "batch", None, None)
        x_bld, cache = _run_stack(apply_block, x_bld, (self.blocks, keys, cache), c)
        return self.final_norm(x_bld), Aux({}, cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., length, d] to float32 scores [..., length, padded_vocab]; padded entries are -1e30."""
        c = self.config
        w_vd = self.layout.shard(self.embedding.astype(c.dtype), "vocab", None)
        scores = jnp.einsum(
            "bld,vd->blv",
            hidden,
            w_vd,
            preferred_element_type=jnp.float32,
            out_sharding=self.layout.spec("batch", None, "vocab"),
        )
        real = jnp.arange(c.padded_vocab) < c.vocab_size
        return jnp.where(real, scores, -1e30) if c.padded_vocab > c.vocab_size else scores

    def _embed(self, table: jax.Array, ids_bl: jax.Array) -> jax.Array:
        w = self.layout.shard(table.astype(self.config.dtype), None, None)
        return w.at[ids_bl].get(out_sharding=self.layout.spec("batch", None, None))

    def _mask(self, segments: jax.Array, cache: KVCache | None, cache_index: jax.Array | int) -> Mask:
        batch, length = segments.shape
        index = jnp.broadcast_to(jnp.arange(length), segments.shape)
        if cache is None:
            return Mask(index, index, segments, segments, self.config.causal)
        total = cache.k.shape[2]
        kv_index = jnp.broadcast_to(jnp.arange(total), (batch, total))
        ones = jnp.ones_like(kv_index)
        return Mask(index + cache_index, kv_index, jnp.ones_like(index), ones, causal=True)


def dummy_ids(layout: Layout) -> jax.Array:
    """int32 zeros [batch, 1], the smallest batch that the mesh can share; shapes ``init`` needs no more."""
    return jnp.zeros((layout.ways("batch"), 1), jnp.int32)


def init_params(model: Transformer, key: jax.Array) -> Any:
    """Fresh float32 parameters in their storage layout: a nested dict of arrays. Same on any mesh."""
    ids = dummy_ids(model.layout)
    return model.init(key, ids, ids, ids)["params"]


def _run_stack(
    apply_block: Callable, x_bld: jax.Array, stacked: Any, config: ModelConfig
) -> tuple[jax.Array, KVCache | None]:
    """Runs the blocks one after another, by a scan or unrolled; the same path for training and decoding."""
    if config.remat:
        apply_block = jax.checkpoint(apply_block)
    if config.scan_layers:
        return jax.lax.scan(apply_block, x_bld, stacked)
    caches = []
    for layer in _unstack(stacked, config.num_layers):
        x_bld, cache = apply_block(x_bld, layer)
        caches.append(cache)
    if caches[0] is None:
        return x_bld, None
    return x_bld, jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)


def _unstack(stacked: Any, count: int) -> list[Any]:
    """A list of per-layer trees. ``lax.split`` has one concatenation as its transpose; indexing would
    pad and add once a layer."""
    split = jax.tree.map(lambda x: [part[0] for part in jax.lax.split(x, [1] * count)], stacked)
    outer = jax.tree.structure(stacked)
    return jax.tree.transpose(outer, jax.tree.structure([0] * count), split)
