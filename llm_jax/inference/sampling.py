"""From scores to the next token."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.models.config import NEVER


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"sampling: temperature={self.temperature} and top_k={self.top_k} must be at least 0, "
                f"top_p={self.top_p} in (0, 1]"
            )


def sample(logits_bv: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """int32 [batch] drawn from softmax(logits / temperature) over the tokens that are kept.

    top_k keeps the k best; top_p, of these, the fewest best whose probabilities sum to at least p
    (Holtzman et al. 2019, arXiv 1904.09751). The vocabulary must not be sharded.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    logits_bv = keep(logits_bv / sampling.temperature, sampling)
    noise_bv = jax.random.gumbel(key, logits_bv.shape, jnp.float32)
    return jnp.argmax(logits_bv + noise_bv, axis=-1).astype(jnp.int32)


def keep(logits_bv: jax.Array, sampling: Sampling) -> jax.Array:
    """Scores with the tokens outside top_k and top_p at -1e30."""
    if not sampling.top_k and sampling.top_p == 1.0:
        return logits_bv
    sorted_bv = jnp.sort(logits_bv, axis=-1, descending=True)
    rank = jnp.arange(logits_bv.shape[-1])
    if sampling.top_k:
        sorted_bv = jnp.where(rank < sampling.top_k, sorted_bv, NEVER)
    p_bv = jax.nn.softmax(sorted_bv, axis=-1)
    before_bv = jnp.cumsum(p_bv, axis=-1) - p_bv  # the best token is always kept
    sorted_bv = jnp.where(before_bv < sampling.top_p, sorted_bv, jnp.inf)
    sorted_bv = jnp.where(sorted_bv == NEVER, jnp.inf, sorted_bv)
    lowest_b1 = jnp.min(sorted_bv, axis=-1, keepdims=True)
    return jnp.where(logits_bv >= lowest_b1, logits_bv, NEVER)
