"""Raw text to a shard set, offline: split, train the tokenizer, encode, write.

The text is never in memory as a whole: it is read once to be measured, once or twice by a tokenizer that
learns, and once to be encoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.text import corpora, shards, tokenizers
from llm_jax.text.shards import TEST, TRAIN, split_name
from llm_jax.text.sources import DataConfig, SetConfig, SourceConfig

Say = Callable[[str], None]
SPLITS = (TRAIN, shards.VALIDATION)


def prepare(
    config: DataConfig, tokenizer_config: Any, directory: Path, say: Say, sets: Sequence[SetConfig] = ()
) -> dict[str, Any]:
    """Makes the shard set at ``directory`` unless it is there; gives its header.

    The set appears whole or not at all. Evaluation sets that a run's own shard set lacks are added to it.
    Raises UserError for bad text, and when the set there was made from other text or with another
    tokenizer or split.
    """
    recipe = recipe_of(config, tokenizer_config)
    if (directory / shards.HEADER).exists():
        header = shards.read_header(directory)
        _check_same(header, recipe, config, directory)
        return _with_sets(header, config, sets, directory, say)
    if config.shards:
        raise UserError(
            f"config.data.shards={config.shards} is not a shard set (it has no {shards.HEADER}); make it "
            "with scripts/prepare_data.py, or leave data.shards out"
        )
    if storage.occupied(directory):
        raise UserError(
            f"{directory / shards.HEADER} is missing: {directory} holds something else than a whole shard "
            "set; delete it or use another"
        )
    with storage.publish_directory(directory, shards.HEADER) as temporary:
        _write(config, tokenizer_config, sets, recipe, temporary, say)
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
        mend = shards.again(directory)
        raise UserError(f"{directory}/tokenizer.json is not the tokenizer that made these tokens; {mend}")
    return tokenizer


# ---- a shard set that is there --------------------------------------------------------------


def _check_same(header: dict[str, Any], recipe: dict[str, Any], config: DataConfig, directory: Path) -> None:
    """Raises UserError unless the set was made by this recipe from this text."""
    changed = [key for key in recipe if header["recipe"].get(key) != recipe[key]]
    if changed:
        raise UserError(
            f"{directory} was prepared with another {changed[0]} ({header['recipe'].get(changed[0])}, now "
            f"{recipe[changed[0]]}); use another directory"
        )
    for source in config.mixture:
        if source.name not in header["sources"]:
            raise UserError(
                f"{directory} has no source {source.name!r} but {', '.join(header['sources'])}; name these "
                "in config.data.sources, or use another directory"
            )
        _check_text(header["sources"][source.name], source, config, directory)


def _check_text(
    origin: dict[str, Any], source: SourceConfig | SetConfig, config: DataConfig, directory: Path
) -> None:
    """Raises UserError unless ``origin``, of the header, is this text.

    The same paths are taken at their word: a run's text is what it was when the run began.
    """
    here = {"text": list(source.text), "text_key": config.text_key}
    if config.shards or here == {key: origin[key] for key in here}:
        return
    hasher = corpora.Hasher()
    for document in corpora.read(source.text, config.text_key):
        hasher.add(document.text)
    if hasher.hexdigest() != origin["corpus"]:
        raise UserError(
            f"{directory} was prepared from {', '.join(origin['text'])}, which is other text than "
            f"{', '.join(source.text)}; use another directory"
        )


def _with_sets(
    header: dict[str, Any], config: DataConfig, sets: Sequence[SetConfig], directory: Path, say: Say
) -> dict[str, Any]:
    """The header, with the evaluation sets that were missing. What was there stays as it is."""
    missing = [entry for entry in sets if entry.name not in header["sets"]]
    for entry in sets:
        if entry not in missing:
            _check_text(header["sets"][entry.name], entry, config, directory)
    if not missing:
        return header
    if config.shards:
        raise UserError(
            f"{directory} has no evaluation set {missing[0].name!r}; add it with scripts/prepare_data.py, "
            "or leave it out"
        )
    storage.remove_leftovers(directory)
    encoder = Encoder(config, load_tokenizer(directory), directory, say)
    for entry in missing:
        encoder.add_set(header, entry)
    shards.write_header(directory, header)
    return shards.read_header(directory)


def prepare_set(
    config: DataConfig, tokenizer: tokenizers.Tokenizer, entry: SetConfig, directory: Path, say: Say
) -> None:
    """A shard set with one evaluation set in it, made with a tokenizer that is there already."""
    header = {
        "recipe": {},
        "tokenizer": tokenizers.fingerprint(tokenizer),
        "vocab_size": tokenizer.vocab_size,
    }
    header |= {"sources": {}, "sets": {}, "splits": {}}
    tokenizers.save(tokenizer, directory / "tokenizer.json")
    Encoder(config, tokenizer, directory, say).add_set(header, entry)
    shards.write_header(directory, header)


# ---- making one -----------------------------------------------------------------------------


def _write(
    config: DataConfig,
    tokenizer_config: Any,
    sets: Sequence[SetConfig],
    recipe: dict[str, Any],
    directory: Path,
    say: Say,
) -> None:
    hashes = {source.name: _survey(config, source, say) for source in config.mixture}
    tokenizer = tokenizer_config.train(TrainingText(config))
    tokenizers.save(tokenizer, directory / "tokenizer.json")
    say(f"data: {tokenizer.kind} tokenizer with {tokenizer.vocab_size:,} ids; encoding")
    header = {
        "recipe": recipe,
        "tokenizer": tokenizers.fingerprint(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "sources": {},
        "sets": {},
        "splits": {},
    }
    encoder = Encoder(config, tokenizer, directory, say)
    for source in config.mixture:
        encoder.add_source(header, source)
        if header["sources"][source.name]["corpus"] != hashes[source.name]:
            raise UserError(f"the text of {', '.join(source.text)} has changed while it was read; try again")
    for entry in sets:
        encoder.add_set(header, entry)
    shards.write_header(directory, header)


def _survey(config: DataConfig, source: SourceConfig, say: Say) -> str:
    """Reads all the text of a source; gives its hash. Raises UserError when a split would have none."""
    say(f"data: reading {', '.join(source.text)}")
    hasher, count, size, filled = corpora.Hasher(), 0, 0, set()
    for document in corpora.read(source.text, config.text_key):
        hasher.add(document.text)
        count += 1
        size += len(document.text.encode())
        filled |= {name for name, text in pieces(config, document.text) if text}
    empty = [name for name in SPLITS if name not in filled]
    if empty:
        raise UserError(
            f"data.text={', '.join(source.text)} leaves no {empty[0]} text (validation by "
            f"{config.validation}, fraction {config.validation_fraction}); try "
            "--config.data.validation=position or more text"
        )
    say(f"data: {count:,} documents, {size / 1e6:.1f} MB, sha256 {hasher.hexdigest()[:16]}")
    return hasher.hexdigest()


@dataclass(frozen=True)
class TrainingText:
    """What a tokenizer learns from: the training text of all sources. Every loop reads it anew."""

    config: DataConfig

    def __iter__(self) -> Iterator[str]:
        for source in self.config.mixture:
            for document in corpora.read(source.text, self.config.text_key):
                yield from (text for name, text in pieces(self.config, document.text) if name == TRAIN)


@dataclass(frozen=True)
class Encoder:
    """Writes the splits of sources and of evaluation sets, and their entries in a header."""

    config: DataConfig
    tokenizer: tokenizers.Tokenizer
    directory: Path
    say: Say

    def add_source(self, header: dict[str, Any], source: SourceConfig) -> None:
        names = {role: split_name(role, source.name) for role in SPLITS}
        header["sources"][source.name], entries = self._encode(source, names, pieces)
        header["splits"] |= entries

    def add_set(self, header: dict[str, Any], entry: SetConfig) -> None:
        names = {TEST: split_name(TEST, entry.name)}
        header["sets"][entry.name], entries = self._encode(entry, names, lambda _, text: [(TEST, text)])
        header["splits"] |= entries

    def _encode(
        self,
        source: SourceConfig | SetConfig,
        names: dict[str, str],
        cut: Callable[[DataConfig, str], list[tuple[str, str]]],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """names: {role: split}; cut: a document to [(role, text)]. Gives where the text is from and its
        hash, and the header's entries of the splits."""
        hasher = corpora.Hasher()
        size = self.tokenizer.vocab_size
        with ExitStack() as stack:
            writers = {
                role: stack.enter_context(shards.SplitWriter(self.directory, split, size))
                for role, split in names.items()
            }
            for document in corpora.read(source.text, self.config.text_key):
                hasher.add(document.text)
                for role, text in cut(self.config, document.text):
                    writers[role].add(encode(self.tokenizer, text, self.config.markers), len(text.encode()))
            entries = {names[role]: writer.finish() for role, writer in writers.items()}
        self.say(
            "data: " + ", ".join(f"{entry['tokens']:,} {name} tokens" for name, entry in entries.items())
        )
        origin = {"text": list(source.text), "text_key": self.config.text_key, "corpus": hasher.hexdigest()}
        return origin, entries


def pieces(config: DataConfig, text: str) -> list[tuple[str, str]]:
    """[(split, its part of a document)]: all in one split, or some in both."""
    if config.validation == "position":
        cut = int(len(text) * (1 - config.validation_fraction))
        return list(zip(SPLITS, (text[:cut], text[cut:]), strict=True))
    return [(SPLITS[held_out(text, config.validation_fraction)], text)]


def held_out(text: str, fraction: float) -> bool:
    """Whether a document is validation: decided by its text alone, so adding documents moves none."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") < fraction * 2**64


def encode(tokenizer: tokenizers.Tokenizer, text: str, markers: bool) -> np.ndarray:
    """int32 ids of one document, between BOS and EOS if it has markers."""
    ids = tokenizer.encode(text)
    ends = np.array([tokenizers.BOS], np.int32), np.array([tokenizers.EOS], np.int32)
    return np.concatenate([ends[0], ids, ends[1]]) if markers else ids
