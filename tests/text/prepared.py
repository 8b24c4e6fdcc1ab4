"""A folder of documents, the shard set that is made of it, and what is in one."""

from llm_jax.data.source import TokenSource
from llm_jax.text import prepare, tokenizers
from llm_jax.text.sources import DataConfig
from llm_jax.text.tokenizers import ByteConfig

TEXTS = [f"Document number {i}: " + "words and words. " * (i % 7 + 1) for i in range(40)]


def make(folder, tokenizer=None, text="text", **changes):
    """The header of the shard set at folder/data."""
    changes = {"validation_fraction": 0.25, **changes}
    config = DataConfig(text=(str(folder / text),), **changes)
    return prepare.prepare(config, tokenizer or ByteConfig(), folder / "data", lambda line: None)


def read(folder, split):
    """The texts of a split's documents, markers and all."""
    source = TokenSource(folder / "data", split)
    tokenizer = tokenizers.load(folder / "data" / "tokenizer.json")
    starts = [0, *source.ends[:-1]]
    ids = [source.read(start, end) for start, end in zip(starts, source.ends, strict=True)]
    return ids, [tokenizer.decode(i) for i in ids]


def listing(folder):
    return sorted(path.name for path in folder.iterdir())
