"""Masked language modelling: predict the tokens that were hidden (Devlin et al. 2018, 1810.04805)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llm_jax.config import identity
from llm_jax.data import order
from llm_jax.data.batch import Batch, Rows
from llm_jax.objectives.cross_entropy import PredictsTokens
from llm_jax.text.tokenizers import FIRST_TEXT_ID, MASK


@dataclass(frozen=True)
class MLM(PredictsTokens):
    """A ``mask_rate`` share of the tokens is predicted. Of these, ``mask_share`` are replaced by the
    mask, ``random_share`` by a random token, and the rest stay. Drawn anew each time a row is read.
    """

    mask_rate: float = identity(0.15)
    mask_share: float = identity(0.8)
    random_share: float = identity(0.1)
    causal: ClassVar[bool] = False

    def to_batch(self, rows: Rows, draws: np.ndarray, seed: int, vocab_size: int) -> Batch:
        """Special tokens and padding are never chosen; a row may have no target and then weighs 0."""
        tokens, segments = rows.tokens[:, :-1], rows.segments[:, :-1]
        draws, place = draws[:, None], np.arange(tokens.shape[1])
        is_text = (tokens >= FIRST_TEXT_ID) & (segments > 0)
        chosen = is_text & (order.uniform(seed, "mask", draws, place) < self.mask_rate)
        fate = order.uniform(seed, "mask fate", draws, place)
        random_ids = order.bits(seed, "mask token", draws, place) % np.uint64(vocab_size - FIRST_TEXT_ID)
        inputs = np.where(chosen & (fate < self.mask_share), MASK, tokens)
        swapped = chosen & (fate >= self.mask_share) & (fate < self.mask_share + self.random_share)
        inputs = np.where(swapped, random_ids.astype(np.int32) + FIRST_TEXT_ID, inputs)
        weights = chosen.astype(np.float32)
        return Batch(inputs.astype(np.int32), tokens, weights, rows.positions[:, :-1], segments)
