"""Masked language modelling: predict the tokens that were hidden (Devlin et al. 2018, 1810.04805)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llm_jax.config import identity
from llm_jax.data import order
from llm_jax.data.batch import Batch, Rows
from llm_jax.objectives import masking
from llm_jax.objectives.cross_entropy import PredictsTokens
from llm_jax.text.tokenizers import FIRST_TEXT_ID, MASK
from llm_jax.text.words import Vocabulary

UNITS = ("token", "word")


@dataclass(frozen=True)
class MLM(PredictsTokens):
    """A ``mask_rate`` share of each row's tokens is predicted, rounded, at least one where there is text. Of
    these, ``mask_share`` are replaced by the mask, ``random_share`` by a random token, and the rest stay.
    Drawn anew each time a row is read.

    unit: "token", or "word" for whole-word masking; max_ngram: up to so many units in a run.
    """

    mask_rate: float = identity(0.15)
    mask_share: float = identity(0.8)
    random_share: float = identity(0.1)
    unit: str = identity("token", neutral="token")
    max_ngram: int = identity(1, neutral=1)
    causal: ClassVar[bool] = False

    def to_batch(self, rows: Rows, draws: np.ndarray, seed: int, vocabulary: Vocabulary) -> Batch:
        """Special tokens and padding are never chosen; a row without text has no target and weighs 0."""
        tokens, segments = rows.tokens[:, :-1], rows.segments[:, :-1]
        chosen = self._choose(tokens, segments, draws, seed, vocabulary)
        draws, place = draws[:, None], np.arange(tokens.shape[1])
        fate = order.uniform(seed, "mask fate", draws, place)
        text_ids = np.uint64(vocabulary.size - FIRST_TEXT_ID)
        random_ids = order.bits(seed, "mask token", draws, place) % text_ids
        inputs = np.where(chosen & (fate < self.mask_share), MASK, tokens)
        swapped = chosen & (fate >= self.mask_share) & (fate < self.mask_share + self.random_share)
        inputs = np.where(swapped, random_ids.astype(np.int32) + FIRST_TEXT_ID, inputs).astype(np.int32)
        predict = masking.places_of(chosen, self.targets_of_row(tokens.shape[1]))
        weights = chosen.astype(np.float32)
        return Batch(inputs, tokens, weights, rows.positions[:, :-1], segments, predict)

    def targets_of_row(self, length: int) -> int:
        return max(1, round(self.mask_rate * length))

    def _choose(
        self, tokens: np.ndarray, segments: np.ndarray, draws: np.ndarray, seed: int, vocabulary: Vocabulary
    ) -> np.ndarray:
        """bool [rows, length]: the targets."""
        eligible = (tokens >= FIRST_TEXT_ID) & (segments > 0)
        text = eligible.sum(axis=1)
        counts = np.minimum(np.maximum(1, np.round(self.mask_rate * text)), text).astype(np.int64)
        if self.unit == "token" and self.max_ngram == 1:  # a hundred times faster than a search for runs
            return masking.choose_tokens(seed, draws, eligible, counts)
        begins = np.ones(tokens.shape, bool)
        if self.unit == "word":
            begins = vocabulary.begins_word(tokens)
            begins[:, 1:] |= segments[:, 1:] != segments[:, :-1]
        return masking.choose_spans(seed, draws, begins, eligible, counts, self.max_ngram)
