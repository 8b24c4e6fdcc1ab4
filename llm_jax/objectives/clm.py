"""Causal language modelling: predict the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llm_jax.data.batch import Batch, Rows
from llm_jax.objectives.cross_entropy import PredictsTokens
from llm_jax.text.words import Vocabulary


@dataclass(frozen=True)
class CLM(PredictsTokens):
    """-log p(token | the tokens before it in its document)."""

    causal: ClassVar[bool] = True

    def to_batch(self, rows: Rows, draws: np.ndarray, seed: int, vocabulary: Vocabulary) -> Batch:
        """Every token whose predecessor stands in the row is a target."""
        del draws, seed, vocabulary
        here, following = rows.segments[:, :-1], rows.segments[:, 1:]
        weights = ((here == following) & (following > 0)).astype(np.float32)
        return Batch(rows.tokens[:, :-1], rows.tokens[:, 1:], weights, rows.positions[:, :-1], here)
