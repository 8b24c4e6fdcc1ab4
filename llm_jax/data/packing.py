"""Cutting a token stream into rows. Row ``r`` is a function of the stream and of ``r`` alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_jax.data import order
from llm_jax.data.batch import Rows
from llm_jax.data.source import TokenSource
from llm_jax.errors import UserError
from llm_jax.text.tokenizers import PAD


@dataclass(frozen=True)
class _Cut:
    """Rows of ``length + 1`` tokens of a source; how they lie in it is up to the kinds below."""

    source: TokenSource
    length: int

    def read(self, rows: np.ndarray) -> Rows:
        """The rows with these numbers, [len(rows), length + 1]."""
        return self._read(*self._spans(np.asarray(rows, np.int64)))

    def _read(self, starts: np.ndarray, stops: np.ndarray) -> Rows:
        tokens = np.full((len(starts), self.length + 1), PAD, np.int32)
        for out, start, stop in zip(tokens, starts.tolist(), stops.tolist(), strict=True):
            out[: stop - start] = self.source.read(start, stop)
        segments, positions = self._places(starts, stops)
        padding = stops - starts <= self.length
        if padding.any():
            real = np.arange(self.length + 1) < (stops - starts)[padding, None]
            segments[padding] *= real
            positions[padding] *= real
        return Rows(tokens, segments, positions)

    def draw(self, seed: int, draws: np.ndarray, purpose: str = "order") -> Rows:
        """The rows of global draws: epoch after epoch, each in an order of its own."""
        return self.read(order.shuffled_rows(seed, draws, len(self), purpose))

    def _places(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Segments and positions, int32 [rows, length + 1], where a row is one segment."""
        shape = len(starts), self.length + 1
        return np.ones(shape, np.int32), np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))


@dataclass(frozen=True)
class Contiguous(_Cut):
    """Documents concatenated and cut every ``length`` tokens, with every row one segment: attention and
    targets cross document boundaries.

    Rows overlap by one token, so that every token but the stream's first is a target once. The last row
    is padded.
    """

    def __len__(self) -> int:
        return -(-(self.source.tokens - 1) // self.length)

    def _spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = rows * self.length
        return starts, np.minimum(starts + self.length + 1, self.source.tokens)


@dataclass(frozen=True)
class Shifted(Contiguous):
    """The same, but every epoch after the first cuts at other places, so that a token is seen in other rows
    and positions: of use where a small text is read many times. ``read`` knows the first epoch's cuts alone.
    """

    def draw(self, seed: int, draws: np.ndarray, purpose: str = "order") -> Rows:
        draws = np.asarray(draws, np.int64)
        rows, epochs = order.shuffled_rows(seed, draws, len(self), purpose), draws // len(self)
        drawn = order.bits(seed, f"{purpose}.shift", epochs) % np.uint64(self.length)
        shift = np.where(epochs > 0, drawn.astype(np.int64), 0)
        starts = rows * self.length + shift
        stops = np.minimum(starts + self.length + 1, self.source.tokens)
        behind = starts >= self.source.tokens - 1  # the end: what was left out at the beginning
        return self._read(np.where(behind, 0, starts), np.where(behind, shift + 1, stops))


@dataclass(frozen=True)
class Packed(Contiguous):
    """The same cuts; segments keep the documents apart."""

    def _places(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shape, ends = (len(starts), self.length + 1), self.source.ends
        first = np.searchsorted(ends, starts, side="right")
        counts = np.searchsorted(ends, stops - 1, side="right") - first
        # Every document that begins inside a row, as a cell of the flat table of rows.
        row = np.repeat(np.arange(shape[0]), counts)
        document = np.arange(len(row)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        column = ends[document] - starts[row]
        cell = row * shape[1] + column
        begins = np.zeros(shape, np.int32)
        begins.reshape(-1)[cell] = 1
        segments = 1 + np.cumsum(begins, axis=1, dtype=np.int32)
        begins.reshape(-1)[cell] = column
        return segments, np.arange(shape[1], dtype=np.int32) - np.maximum.accumulate(begins, axis=1)


@dataclass(frozen=True)
class OneDocument(_Cut):
    """Row ``r`` is document ``r``, cut after ``length + 1`` tokens or padded."""

    def __len__(self) -> int:
        return len(self.source.ends)

    def _spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ends = self.source.ends
        starts = np.where(rows > 0, ends[rows - 1], 0)
        return starts, np.minimum(ends[rows], starts + self.length + 1)


@dataclass(frozen=True)
class Filled:
    """Rows that are one segment each, with the beginning of the text in place of padding: where all tokens
    are real, an encoder's attention needs no mask (on a GPU 15.8 ms of BERT base's step for 17; log). For
    training alone, where it does not matter that some tokens come twice in an epoch."""

    rows: Contiguous

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, seed: int, draws: np.ndarray, purpose: str = "order") -> Rows:
        tokens, segments, _ = self.rows.draw(seed, draws, purpose)
        source = self.rows.source
        for row in np.flatnonzero(segments[:, -1] == 0):
            padding = segments[row] == 0
            count = int(padding.sum())
            tokens[row, padding] = np.resize(source.read(0, min(count, source.tokens)), count)
        return Rows(tokens, *self.rows._places(draws, draws))


WHOLE = "contiguous", "shifted"  # every row is one segment, and only a split's last one is padded
PACKINGS = {"packed": Packed, "contiguous": Contiguous, "shifted": Shifted, "document": OneDocument}


def pack(source: TokenSource, kind: str, length: int) -> Contiguous | OneDocument:
    """The rows of a split. Raises UserError when there are none."""
    rows = PACKINGS[kind](source, length)
    if len(rows) < 1:
        raise UserError(f"a split has {source.tokens} tokens, too few for one row; give more text")
    return rows
