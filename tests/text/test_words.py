"""Where words begin, for the three tokenizers."""

import numpy as np
import pytest

from llm_jax.text.tokenizers import ByteConfig, CharConfig, SentencePieceConfig
from llm_jax.text.words import Vocabulary

TEXT = "To be, or not: café 42nd (日本)\n\tthe end."
CONFIGS = {
    "char": CharConfig(),
    "byte": ByteConfig(),
    "sentencepiece": SentencePieceConfig(vocab_size=300, model_type="bpe"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_words(kind):
    """Pieces joined from one beginning to the next are words, or single signs with the blanks before them."""
    tokenizer = CONFIGS[kind].train([TEXT] * 50)
    ids = tokenizer.encode(TEXT)
    begins = Vocabulary.of(tokenizer).begins_word(ids)
    assert begins[0]
    groups = np.split(ids, np.flatnonzero(begins)[1:])
    texts = [tokenizer.decode(group) for group in groups]
    assert "".join(texts) == TEXT
    words = [text.strip() for text in texts if text.strip().isalnum()]
    assert words == ["To", "be", "or", "not", "café", "42nd", "日本", "the", "end"]


def test_special_ids_belong_to_no_word():
    vocabulary = Vocabulary.of(CharConfig().train(["ab"]))
    assert vocabulary.begins_word(np.array([5, 6, 1, 5, 3, 6])).tolist() == [
        True,
        False,
        True,
        True,
        True,
        True,
    ]
