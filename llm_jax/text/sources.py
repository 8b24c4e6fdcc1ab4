"""What text a run reads: one source, or several that are mixed by weight, and sets to be judged on."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llm_jax.config import identity, runtime
from llm_jax.errors import UserError
from llm_jax.text import corpora, shards

CUTS = ("document", "position")
NAME = re.compile(r"[A-Za-z0-9_-]+")  # a part of file names


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture. text: as in DataConfig; weight: its part of the rows that are trained on,
    relative to the others'; max_epochs: how often its rows may be read, 0 = without end."""

    name: str = identity("")
    text: tuple[str, ...] = runtime(())
    weight: float = identity(1.0)
    max_epochs: int = identity(0)


@dataclass(frozen=True)
class SetConfig:
    """A named evaluation set: all its text is held out. text: as in DataConfig."""

    name: str = runtime("")
    text: tuple[str, ...] = runtime(())


@dataclass(frozen=True)
class DataConfig:
    """What text, how it is split, and how its tokens are cut to rows.

    text: files, directories, globs, or python:source and python:docs; text_key: where a line of a .jsonl
    file has its text. sources: several named texts to mix, instead of text. shards: a shard set made
    before by scripts/prepare_data.py ("" = the run's own, made from the text at the first start); then
    no text is read, and sources may name some of its sources only.
    validation: "document" holds out whole documents by the hash of their text; "position" holds out
    the last part of every document. markers: put BOS before and EOS after every document.
    rows: "packed" cuts the concatenated documents and keeps them apart by segments; "contiguous" cuts
    the same stream and lets attention cross documents; "shifted" is the same, cut at other places in each
    epoch; "document" gives each document one row, cut or padded. Of "contiguous" and "shifted" the last row
    is padded, and in training an encoder's goes on with the beginning of the text.
    """

    text: tuple[str, ...] = runtime(("python:docs",))
    text_key: str = runtime("text")
    sources: tuple[SourceConfig, ...] = identity((), neutral=())
    shards: str = runtime("")
    validation: str = identity("document")
    validation_fraction: float = identity(0.05)
    markers: bool = identity(True)
    rows: str = identity("packed")
    sequence_length: int = identity(64)

    @property
    def mixture(self) -> tuple[SourceConfig, ...]:
        """The sources; of a config that names none, the one that ``text`` is."""
        return self.sources or (SourceConfig(shards.ONE_SOURCE, self.text),)


def check(config: DataConfig, sets: Sequence[SetConfig]) -> None:
    """Names, weights and epochs. Raises UserError with the key that is wrong."""
    for key, entries in (("data.sources", config.sources), ("evaluation.sets", sets)):
        names = [entry.name for entry in entries]
        for i, name in enumerate(names):
            if not NAME.fullmatch(name):
                raise UserError(f"config.{key}[{i}].name is {name!r}; use letters, digits, - and _")
            if key == "data.sources" and name == shards.ONE_SOURCE:
                raise UserError(f"config.{key}[{i}].name: {name!r} is kept for data.text; use another")
            if name in names[:i]:
                raise UserError(f"config.{key} has two of the name {name!r}; rename one")
    for i, source in enumerate(config.sources):
        if not (0 < source.weight < math.inf):
            raise UserError(
                f"config.data.sources[{i}].weight is {source.weight}; give a positive number, or leave "
                f"{source.name!r} out"
            )
        if source.max_epochs < 0:
            raise UserError(f"config.data.sources[{i}].max_epochs is {source.max_epochs}; 0 is without end")


def find(config: DataConfig, sets: Sequence[SetConfig]) -> None:
    """Raises UserError, with its key, for text that is not there; where there are shards, none need be."""
    if config.shards:
        return
    texts = {f"data.sources[{i}].text": source.text for i, source in enumerate(config.sources)}
    texts = texts or {"data.text": config.text}
    texts |= {f"evaluation.sets[{i}].text": entry.text for i, entry in enumerate(sets)}
    for key, text in texts.items():
        if not text:
            raise UserError(f"config.{key} is empty; name a file, a directory or a glob")
        for place in text:
            if place not in corpora.EMBEDDED:
                corpora.find(place, key)
