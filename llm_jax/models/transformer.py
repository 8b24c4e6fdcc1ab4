"""The Transformer: embeddings, a stack of blocks, a final norm and a head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.errors import UserError
from llm_jax.layout import Layout, all_but_gathered
from llm_jax.models import head_product, layers, look_up, moe, pipeline
from llm_jax.models.attend import Mask
from llm_jax.models.attention import Call, Kept, KVCache, Layer
from llm_jax.models.blocks import BLOCKS, Block
from llm_jax.models.config import NEVER, ModelConfig
from llm_jax.models.positions import POSITIONS

CAPTURES = ("hidden", "attention")
# Rows of a table that an accelerator reads by a product with one-hot vectors: when few rows have many places,
# the sums of its gradient wait for one another, 32 of 104 ms of GPT-2's step on characters (H200; log).
SMALL_TABLE = 1024


Carry = tuple[jax.Array, jax.Array | None]  # from layer to layer: x_bld, and the first layer's values


class Aux(NamedTuple):
    """What a forward pass gives beside the hidden states.

    losses: {name: (sum, weight)} of the model's own losses, those of ``moe.names``; layers: what the blocks
    kept, stacked on a leading axis: the filled cache, and what was captured.
    """

    losses: dict[str, tuple[jax.Array, jax.Array]]
    layers: Kept


class Transformer(nn.Module):
    """tokens to hidden states; ``logits`` maps these to scores over the padded vocabulary. unpadded: that it
    is given rows of one segment to their end, and none else."""

    config: ModelConfig
    layout: Layout
    unpadded: bool = False

    @property
    def dtype(self) -> str:
        return self.config.dtype

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", self._init_embedding, c.padded_vocab, "vocab")
        if POSITIONS[c.positions].learnt:
            self.position_embedding = self.param(
                "position_embedding", self._init_embedding, c.max_length, None
            )
        if c.embedding_norm:
            self.embedding_norm = layers.NORMS[c.norm](self.layout, c.dtype, c.biases)
        self.blocks = self.param("blocks", self._init_blocks)
        if not BLOCKS[c.block].ends_normed:
            self.final_norm = layers.NORMS[c.norm](self.layout, c.dtype, c.biases)
        if not c.tied_head:
            self.head = self.param("head", self._init_embedding, c.padded_vocab, "vocab", c.zero_init)

    def _init_embedding(self, key: jax.Array, rows: int, axis: str | None, zero: bool = False) -> jax.Array:
        shape, c = (rows, self.config.model_dim), self.config
        std = 0.0 if zero else c.embedding_std or c.std(c.model_dim)
        table, rows_cut = std * jax.random.normal(key, shape, jnp.float32), self.layout.ways("vocab_rows")
        # Whole rows where they can be dealt out: their gradients are then reduce-scattered, while libtpu
        # all-reduces those of a table that is cut across.
        if axis == "vocab" and rows % rows_cut == 0:
            return self.layout.store(table, "vocab_rows", None)
        return self.layout.store(table, axis, "embed")

    def _init_blocks(self, key: jax.Array) -> Any:
        """Parameters of all blocks, stacked on a leading axis."""
        c, layout = _any_length(self.config), self.layout.inside_stage()
        ids = dummy_ids(layout)
        x_bld = layout.shard(jnp.zeros((*ids.shape, c.model_dim), c.dtype), "batch", "residual", None)
        call = Call(ids, Mask(ids, ids, c.causal))

        own = Layer(first=jnp.array(True), values=_no_values(c, layout, x_bld))

        def init_block(key: jax.Array) -> Any:
            return _block(c, layout).init(key, x_bld, call, own)["params"]

        return pipeline.map_layers(init_block, jax.random.split(key, c.num_layers), self.layout)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        *,
        key: jax.Array | None = None,
        cache: KVCache | None = None,
        cache_index: jax.Array | int = 0,
        capture: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Aux]:
        """tokens, positions, segments: int32 [batch, length] to hidden states [batch, length, d]. Where the
        length is cut, a decoder's are dealt (``context.deal``), and so is what it gives.

        key: for dropout; None in evaluation. cache: [layers, batch, total, kv_heads, head_dim] pair;
        this call's tokens stand at ``cache_index`` of its rows (one segment a row). capture: "hidden"
        gives every block's output [layers, batch, length, d] in ``aux.layers``, "attention" its weights
        [layers, batch, heads, length, keys], whatever the kernel. Raises UserError for another name.
        """
        if unknown := {*capture} - {*CAPTURES}:
            raise UserError(f"capture: {', '.join(unknown)} is none of {', '.join(CAPTURES)}")
        c = self.config
        drawing = c.dropout or c.stochastic_depth
        key, embedding_key = jax.random.split(key) if key is not None and drawing else (None, None)
        x_bld = layers.dropout(self.embed(tokens, positions), c.dropout, embedding_key)
        if cache is None:
            mask = Mask(segments, segments, c.causal, unpadded=self.unpadded)
        else:
            mask = _decoding_mask(segments.shape, cache.k.shape[2], cache_index)
        call = Call(self.layout.shard(positions, "batch", "length"), mask, cache_index, capture)
        blocks, own = self.blocks, _layers(c, key, cache)
        if self.layout.axes("layers") and cache is None and not capture:
            in_run = dataclasses.replace(c, remat=c.remat and self.layout.rounds == 1)
            stack = partial(_run_stack, in_run, self.layout.inside_stage())
            x_bld, kept = pipeline.run(stack, x_bld, call, (blocks, own), self.layout, c.remat)
        else:
            blocks = pipeline.whole(blocks) if self.layout.axes("layers") else blocks
            x_bld, kept = _run_stack(c, self.layout, x_bld, call, (blocks, own))
        x_bld = x_bld if BLOCKS[c.block].ends_normed else self.final_norm(x_bld)
        return self.layout.enter(x_bld), Aux(_losses(c, kept, segments), kept)

    def head_matrix(self) -> jax.Array:
        """[padded_vocab, d], gathered: once for all the chunks of a loss. It is float32 again, so that their
        gradients add up in float32; its values have passed through ``dtype``."""
        c = self.config
        head = self.embedding if c.tied_head else self.head
        return self.layout.gather(head, c.dtype).astype(jnp.float32)

    def logits(self, hidden: jax.Array, head: jax.Array | None = None) -> jax.Array:
        """[batch, length, d] to float32 scores [..., length, padded_vocab]; padded entries are -1e30.
        head: ``head_matrix()``, if it is at hand."""
        c = self.config
        head = self.head_matrix() if head is None else head
        spec, rounded = self.layout.spec("batch", "length", "vocab"), self.layout.platform == "gpu"
        scores = head_product.scores(spec, rounded, hidden, head.astype(c.dtype))
        if c.logit_scale != 1.0:
            scores = c.logit_scale * scores
        if c.logit_softcap:
            scores = c.logit_softcap * jnp.tanh(scores / c.logit_softcap)
        real = jnp.arange(c.padded_vocab) < c.vocab_size
        return jnp.where(real, scores, NEVER) if c.padded_vocab > c.vocab_size else scores

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """int32 [batch, length] to [batch, length, d]: token embeddings, with what the positions add, normed
        where the config says so."""
        c, scheme = self.config, POSITIONS[self.config.positions]
        tokens, positions = (self.layout.shard(x, "batch", "length") for x in (tokens, positions))
        x_bld = self._look_up(self.embedding, tokens)
        if scheme.learnt:
            x_bld = x_bld + self._look_up(self.position_embedding, positions)
        if scheme.embed is not None:
            x_bld = x_bld + scheme.embed(positions, c.model_dim).astype(x_bld.dtype)
        x_bld = self.layout.shard(x_bld, "batch", "residual", None)
        return self.embedding_norm(x_bld) if c.embedding_norm else x_bld

    def _look_up(self, table: jax.Array, ids_bl: jax.Array) -> jax.Array:
        w_vd = self.layout.gather(table, self.config.dtype, whole=("fsdp", "tensor"))
        spec = self.layout.spec("batch", "length", None)
        if len(table) <= SMALL_TABLE and self.layout.platform != "cpu":
            one_hot_blv = jax.nn.one_hot(ids_bl, len(table), dtype=w_vd.dtype)
            return jnp.einsum("blv,vd->bld", one_hot_blv, w_vd, out_sharding=spec)
        # In float32, so that the gradients of a row's many places add up in it.
        return look_up.rows_of(w_vd.astype(jnp.float32), ids_bl, spec).astype(w_vd.dtype)


def _losses(c: ModelConfig, kept: Kept, segments: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The model's own losses, means over layers."""
    weights = moe.loss_weights(c, segments)
    return {name: (jnp.mean(kept.router[name]) * w, w) for name, w in weights.items() if name in kept.router}


def _decoding_mask(shape: tuple[int, int], total: int, cache_index: jax.Array | int) -> Mask:
    """One segment a row, new tokens from ``cache_index`` on."""
    batch, length = shape
    ones = jnp.ones((batch, total), jnp.int32)
    return Mask(ones[:, :length], ones, causal=True, q_start=cache_index)


def _layers(c: ModelConfig, key: jax.Array | None, cache: KVCache | None) -> Layer:
    """What is each layer's own, stacked on a leading axis."""
    windows = jnp.asarray(c.windows, jnp.int32)
    bases = jnp.where(windows > 0, c.rotary_local_base, c.rotary_base)
    share = jnp.linspace(0.0, 1.0, c.num_layers) if c.num_layers > 1 else jnp.ones(1)
    return Layer(
        key=None if key is None else jax.random.split(key, c.num_layers),
        cache=cache,
        window=windows if any(c.windows) else None,
        rotary_base=bases if c.rotary_local_base else None,
        drop_rate=c.stochastic_depth * share if c.stochastic_depth else None,
        first=jnp.arange(c.num_layers) == 0 if c.value_residual else None,
    )


def dummy_ids(layout: Layout) -> jax.Array:
    """int32 zeros, the smallest batch that the mesh can share; shapes ``init`` needs no more."""
    zeros = jnp.zeros((layout.ways("batch"), 2 * layout.ways("residual")), jnp.int32)
    return layout.shard(zeros, "batch")


def init_params(model: Transformer, key: jax.Array) -> Any:
    """Fresh float32 parameters in their storage layout: a nested dict of arrays. Same on any mesh."""
    ids = dummy_ids(model.layout)
    model = model.clone(config=_any_length(model.config))
    return model.init(key, ids, ids, ids)["params"]


def _any_length(config: ModelConfig) -> ModelConfig:
    """With the attention kernel that takes rows as short as ``dummy_ids``."""
    return dataclasses.replace(config, kernel="dense")


def scorer(model: Transformer, params: Any) -> Callable[[jax.Array], jax.Array]:
    """``model.logits`` with the head gathered once, for a loss that asks for them chunk by chunk."""
    head = model.apply({"params": params}, method="head_matrix")
    return lambda hidden: model.apply({"params": params}, hidden, head, method="logits")


def _block(c: ModelConfig, layout: Layout) -> Block:
    return BLOCKS[c.block](c, layout, c.dtype, parent=None)


def _run_stack(
    c: ModelConfig, layout: Layout, x_bld: jax.Array, call: Call, stacked: tuple[Any, Layer]
) -> tuple[jax.Array, Kept]:
    """Runs blocks one after another, by a scan or unrolled; the same path for training and decoding."""
    block = _block(c, layout)

    def apply_block(carry: Carry, layer: tuple[Any, Layer]) -> tuple[Carry, Kept]:
        (x_bld, first_bmgk), (params, own) = carry, layer
        x_bld, kept = block.apply({"params": params}, x_bld, call, own._replace(values=first_bmgk))
        if c.value_residual:  # the first layer's from there on
            first_bmgk = jnp.where(own.first, kept.values, first_bmgk)
        hidden = x_bld if "hidden" in call.capture else None
        return (x_bld, first_bmgk), kept._replace(hidden=hidden, values=None)

    if c.remat:
        apply_block = jax.checkpoint(apply_block)
    elif layout.zero == 3 and layout.axes("embed"):  # kept, the gathered weights would be a whole model
        apply_block = jax.checkpoint(apply_block, policy=all_but_gathered)
    carry = x_bld, _no_values(c, layout, x_bld)
    if c.scan_layers:
        (x_bld, _), kept = jax.lax.scan(apply_block, carry, stacked)
        return x_bld, kept
    kept = []
    for layer in _unstack(stacked):
        carry, one = apply_block(carry, layer)
        kept.append(one)
    return carry[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)


def _no_values(c: ModelConfig, layout: Layout, x_bld: jax.Array) -> jax.Array | None:
    """What stands for the first layer's values before it, [batch, length, g, k]; None where nobody asks."""
    if not c.value_residual:
        return None
    zeros = jnp.zeros((*x_bld.shape[:2], c.kv_heads, c.head_size), x_bld.dtype)
    return layout.shard(zeros, "batch", "length", "kv_heads", None)


def _unstack(stacked: Any) -> list[Any]:
    """A list of per-layer trees. ``lax.split`` has one concatenation as its transpose; indexing would
    pad and add once a layer."""
    count = len(jax.tree.leaves(stacked)[0])
    split = jax.tree.map(lambda x: [part[0] for part in jax.lax.split(x, [1] * count)], stacked)
    outer = jax.tree.structure(stacked)
    return jax.tree.transpose(outer, jax.tree.structure([0] * count), split)
