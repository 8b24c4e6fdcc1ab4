"""Cross-entropy over a large vocabulary, in chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.data.batch import Batch

# The most float32 logits held at once, over all devices: 256 MB. Below it nothing is chunked.
MAX_LOGITS = 1 << 26


class TokenSums(NamedTuple):
    """Weighted sums over a batch, float32 scalars: nats, and right first guesses."""

    loss: jax.Array
    correct: jax.Array


def cross_entropy(
    logits_fn: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    max_logits: int = MAX_LOGITS,
) -> TokenSums:
    """Sums over tokens of weight * -log p(target), in float32.

    hidden: [batch, length, d]; targets: int [batch, length]; weights: float32 [batch, length];
    logits_fn: [batch, n, d] to float32 [batch, n, vocab]. When the logits of the whole batch would be
    more than ``max_logits`` numbers, they are made, used and made again in the backward pass, chunk of
    the length after chunk.
    """
    vocab = jax.eval_shape(logits_fn, hidden).shape[-1]
    batch, length, _ = hidden.shape
    count = next(
        n
        for n in range(1, length + 1)
        if length % n == 0 and (n == length or batch * (length // n) * vocab <= max_logits)
    )

    def chunk_sums(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> TokenSums:
        logits = logits_fn(hidden)
        top = jnp.max(logits, axis=-1, keepdims=True)
        log_total = jnp.log(jnp.sum(jnp.exp(logits - jax.lax.stop_gradient(top)), axis=-1))
        log_total += jax.lax.stop_gradient(top[..., 0])
        # A gather would not do: the vocabulary may be sharded.
        is_target = targets[..., None] == jnp.arange(vocab)
        label = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        correct = jnp.sum(jnp.where(label >= top[..., 0], weights, 0.0))
        return TokenSums(jnp.sum((log_total - label) * weights), correct)

    if count == 1:
        return chunk_sums(hidden, targets, weights)

    def body(total: TokenSums, chunk: tuple) -> tuple[TokenSums, None]:
        return jax.tree.map(jnp.add, total, jax.checkpoint(chunk_sums)(*chunk)), None

    chunks = tuple(_split_length(x, count) for x in (hidden, targets, weights))
    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(body, TokenSums(zero, zero), chunks)[0]


class PredictsTokens:
    """The losses of an objective whose targets are tokens.

    ``sums`` are divided by ``weights``, taken over the whole global batch, so that micro-batches and
    devices never change the mean. Only names with a coefficient are trained on; the rest are reported.
    """

    coefficients: ClassVar[dict[str, float]] = {"loss": 1.0}

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """{name: total weight}, float32 scalars, of any number of batches."""
        total = jnp.sum(batch.weights)
        return {"loss": total, "accuracy": total}

    def sums(
        self, logits_fn: Callable[[jax.Array], jax.Array], hidden: jax.Array, batch: Batch
    ) -> dict[str, jax.Array]:
        """{name: sum}, float32 scalars: nats, and right first guesses."""
        sums = cross_entropy(logits_fn, hidden, batch.targets, batch.weights)
        return {"loss": sums.loss, "accuracy": sums.correct}


def _split_length(x: jax.Array, count: int) -> jax.Array:
    """[batch, length, ...] to [count, batch, length / count, ...]."""
    batch, length, *rest = x.shape
    spec = jax.typeof(x).sharding.spec
    split = jax.sharding.PartitionSpec(spec[0], None, *spec[1:])
    x = jnp.reshape(x, (batch, count, length // count, *rest), out_sharding=split)
    return jnp.moveaxis(x, 1, 0)
