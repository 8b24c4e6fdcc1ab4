"""Cutting a token stream into rows. Row ``r`` is a function of the stream and of ``r`` alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_jax.data.batch import Rows
from llm_jax.data.source import TokenSource
from llm_jax.errors import UserError
from llm_jax.text.tokenizers import PAD


@dataclass(frozen=True)
class Packed:
    """Documents concatenated and cut every ``length`` tokens; segments keep them apart.

    Rows overlap by one token, so that every token but the stream's first is a target once. The last row
    is padded.
    """

    source: TokenSource
    length: int

    def __len__(self) -> int:
        return -(-(self.source.tokens - 1) // self.length)

    def read(self, rows: np.ndarray) -> Rows:
        """The rows with these numbers, [len(rows), length + 1]."""
        return _collect([self._row(int(row)) for row in rows], self.length + 1)

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        start = row * self.length
        stop = min(start + self.length + 1, self.source.tokens)
        tokens, ends = self.source.read(start, stop), self.source.ends
        index = np.arange(start, stop)
        document = np.searchsorted(ends, index, side="right")
        begins = np.where(document > 0, ends[document - 1], 0)
        return tokens, document - document[0] + 1, index - np.maximum(begins, start)


@dataclass(frozen=True)
class Contiguous(Packed):
    """The same cuts, with every row one segment: attention and targets cross document boundaries."""

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        start = row * self.length
        tokens = self.source.read(start, min(start + self.length + 1, self.source.tokens))
        return tokens, np.ones_like(tokens), np.arange(len(tokens))


@dataclass(frozen=True)
class OneDocument:
    """Row ``r`` is document ``r``, cut after ``length + 1`` tokens or padded."""

    source: TokenSource
    length: int

    def __len__(self) -> int:
        return len(self.source.ends)

    def read(self, rows: np.ndarray) -> Rows:
        return _collect([self._row(int(row)) for row in rows], self.length + 1)

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        start = int(self.source.ends[row - 1]) if row else 0
        tokens = self.source.read(start, min(int(self.source.ends[row]), start + self.length + 1))
        return tokens, np.ones_like(tokens), np.arange(len(tokens))


def _collect(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], width: int) -> Rows:
    out = [np.full((len(rows), width), fill, np.int32) for fill in (PAD, 0, 0)]
    for i, row in enumerate(rows):
        for array, values in zip(out, row, strict=True):
            array[i, : len(values)] = values
    return Rows(*out)


PACKINGS = {"packed": Packed, "contiguous": Contiguous, "document": OneDocument}


def pack(source: TokenSource, kind: str, length: int) -> Packed | OneDocument:
    """The rows of a split. Raises UserError when there are none."""
    rows = PACKINGS[kind](source, length)
    if len(rows) < 1:
        raise UserError(f"a split has {source.tokens} tokens, too few for one row; give more text")
    return rows
