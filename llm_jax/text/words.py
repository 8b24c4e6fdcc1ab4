"""Where words begin, for any tokenizer: what whole-word masking needs to know."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_jax.text.tokenizers import FIRST_TEXT_ID, Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """size: ids, special ones counted; opens, closes: bool [size], whether the first and the last character
    of a token's text belong to a word (a letter, a digit, or part of one)."""

    size: int
    opens: np.ndarray
    closes: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        texts = [tokenizer.piece(i) for i in range(FIRST_TEXT_ID, tokenizer.vocab_size)]
        none = [False] * FIRST_TEXT_ID
        opens = np.array(none + [_of_word(text[:1]) for text in texts])
        closes = np.array(none + [_of_word(text[-1:]) for text in texts])
        return cls(tokenizer.vocab_size, opens, closes)

    def begins_word(self, tokens: np.ndarray) -> np.ndarray:
        """bool [..., length]: whether a token begins a word, or stands for itself, like a full stop."""
        begins = np.ones(tokens.shape, bool)
        begins[..., 1:] = ~(self.closes[tokens[..., :-1]] & self.opens[tokens[..., 1:]])
        return begins


def _of_word(character: str) -> bool:
    """Letters and digits; U+FFFD stands for a byte of a character beyond ASCII, which is part of one."""
    return character.isalnum() or character == "\ufffd"
