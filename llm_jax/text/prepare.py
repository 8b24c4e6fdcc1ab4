"""Raw text to a shard set, offline: split, train the tokenizer, encode, write."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import storage
from llm_jax.config import identity, runtime
from llm_jax.errors import UserError
from llm_jax.text import corpora, shards, tokenizers

SPLITS = ("train", "validation")
VALIDATION = ("document", "position")


@dataclass(frozen=True)
class DataConfig:
    """What text, how it is split, and how its tokens are cut to rows.

    text: files, directories, globs, or python:source and python:docs. shards: a shard set made before
    by scripts/prepare_data.py ("" = the run's own, made from text at the first start).
    validation: "document" holds out whole documents by the hash of their text; "position" holds out
    the last part of every document. markers: put BOS before and EOS after every document.
    rows: "packed" cuts the concatenated documents and keeps them apart by segments; "contiguous" cuts
    the same stream and lets attention cross documents; "document" gives each document one row, cut
    or padded.
    """

    text: tuple[str, ...] = runtime(("python:docs",))
    shards: str = runtime("")
    validation: str = identity("document")
    validation_fraction: float = identity(0.05)
    markers: bool = identity(True)
    rows: str = identity("packed")
    sequence_length: int = identity(64)


def prepare(
    config: DataConfig, tokenizer_config: Any, directory: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Makes the shard set at ``directory`` unless it is there; gives its header.

    The set appears whole or not at all. Raises UserError for bad text, and when the set there was made
    from other text or with another tokenizer or split.
    """
    recipe = recipe_of(config, tokenizer_config)
    if (directory / shards.HEADER).exists():
        header = shards.read_header(directory)
        _same_text(header, recipe, config, directory)
        return header
    if directory.exists() and (directory.is_file() or any(directory.iterdir())):
        raise UserError(f"{directory} holds something else than a whole shard set; delete it or use another")
    say(f"data: reading {', '.join(config.text)}")
    storage.make_directory(directory.parent)
    for leftover in directory.parent.glob(f".{directory.name}.*.tmp"):
        shutil.rmtree(leftover)
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp")
    storage.make_directory(temporary)
    try:
        _write(config, tokenizer_config, recipe, temporary, say)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return shards.read_header(directory)


def recipe_of(config: DataConfig, tokenizer_config: Any) -> dict[str, Any]:
    """What decides the content of a shard set beside the text."""
    return {
        "tokenizer": repr(tokenizer_config),
        "validation": config.validation,
        "validation_fraction": config.validation_fraction,
        "markers": config.markers,
    }


def load_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a shard set. Raises UserError when it is not the one that wrote the tokens."""
    tokenizer = tokenizers.load(directory / "tokenizer.json")
    if tokenizers.fingerprint(tokenizer) != shards.read_header(directory)["tokenizer"]:
        raise UserError(f"{directory}/tokenizer.json is not the tokenizer that made these tokens")
    return tokenizer


def _same_text(header: dict[str, Any], recipe: dict[str, Any], config: DataConfig, directory: Path) -> None:
    """Raises UserError unless the set was made by this recipe from this text.

    The same paths are taken at their word: a run's text is what it was when the run began.
    """
    changed = [key for key in recipe if header["recipe"].get(key) != recipe[key]]
    if changed:
        raise UserError(
            f"{directory} was prepared with another {changed[0]} ({header['recipe'].get(changed[0])}, now "
            f"{recipe[changed[0]]}); use another directory"
        )
    if config.shards or header["text"] == list(config.text):
        return
    hasher = corpora.Hasher()
    for document in corpora.read(config.text):
        hasher.add(document.text)
    if hasher.hexdigest() != header["corpus"]:
        raise UserError(
            f"{directory} was prepared from {', '.join(header['text'])}, which is other text than "
            f"{', '.join(config.text)}; use another --workdir"
        )


def _write(
    config: DataConfig,
    tokenizer_config: Any,
    recipe: dict[str, Any],
    directory: Path,
    say: Callable[[str], None],
) -> None:
    hasher, documents = corpora.Hasher(), []
    for document in corpora.read(config.text):
        hasher.add(document.text)
        documents.append(document.text)
    pieces = {name: list(_pieces(config, name, documents)) for name in SPLITS}
    empty = [name for name in SPLITS if not any(pieces[name])]
    if empty:
        raise UserError(
            f"data.text={', '.join(config.text)} leaves no {empty[0]} text (validation by "
            f"{config.validation}, fraction {config.validation_fraction}); try "
            "--config.data.validation=position or more text"
        )
    size = sum(len(text.encode()) for text in documents)
    say(f"data: {len(documents):,} documents, {size / 1e6:.1f} MB, sha256 {hasher.hexdigest()[:16]}")
    tokenizer = tokenizer_config.train(pieces["train"])
    tokenizers.save(tokenizer, directory / "tokenizer.json")
    say(f"data: {tokenizer.kind} tokenizer with {tokenizer.vocab_size:,} ids; encoding")
    splits = {}
    for name in SPLITS:
        writer = shards.SplitWriter(directory, name, tokenizer.vocab_size)
        for text in pieces[name]:
            writer.add(encode(tokenizer, text, config.markers), len(text.encode()))
        splits[name] = writer.finish()
    content = {
        "corpus": hasher.hexdigest(),
        "text": list(config.text),
        "recipe": recipe,
        "tokenizer": tokenizers.fingerprint(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "splits": splits,
    }
    shards.write_header(directory, content)
    say("data: " + ", ".join(f"{splits[name]['tokens']:,} {name} tokens" for name in SPLITS))


def _pieces(config: DataConfig, split: str, documents: list[str]) -> Iterator[str]:
    """The text of one split, document by document."""
    train = split == "train"
    for text in documents:
        if config.validation == "position":
            cut = int(len(text) * (1 - config.validation_fraction))
            yield text[:cut] if train else text[cut:]
        elif held_out(text, config.validation_fraction) != train:
            yield text


def held_out(text: str, fraction: float) -> bool:
    """Whether a document is validation: decided by its text alone, so adding documents moves none."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") < fraction * 2**64


def encode(tokenizer: tokenizers.Tokenizer, text: str, markers: bool) -> np.ndarray:
    """int32 ids of one document, between BOS and EOS if it has markers."""
    ids = tokenizer.encode(text)
    ends = np.array([tokenizers.BOS], np.int32), np.array([tokenizers.EOS], np.int32)
    return np.concatenate([ends[0], ids, ends[1]]) if markers else ids
