"""Several sources as one stream: which row of which source draw ``g`` is, by arithmetic alone.

Draws are handed to sources like seats to parties, one at a time, by Webster's (Sainte-Lague's) method:
after ``s`` draws every source has its weight's share of them to within a few rows, whatever ``s`` is. Blocks
of draws are then permuted, so that no pattern of the order meets a pattern of the batch. A source that is
used up ends a stage; the others share on by their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from llm_jax.data import order
from llm_jax.data.batch import Rows
from llm_jax.errors import UserError

BLOCK = 256  # draws that are permuted among themselves
GRAIN = 1 << 22  # weights are whole parts of about this; int64 is enough for 2^39 draws


def seats(parts: np.ndarray, total: int) -> np.ndarray:
    """int64: how many of the first ``total`` draws each source has. parts: int64 weights.

    Seat ``n`` of source ``i`` is due at (n + 1/2) / share, rounded down; of equal ones the first source
    goes first. All that is due before ``total - len(parts) / 2`` is surely given; the few that are left
    go one by one.
    """
    whole = int(parts.sum())
    given = due_before(parts, max(0, total - (len(parts) + 1) // 2))
    for _ in range(total - int(given.sum())):
        given[np.argmin((2 * given + 1) * whole // (2 * parts))] += 1
    return given


def due_before(parts: np.ndarray, time: int) -> np.ndarray:
    """int64: how many seats of each source are due before ``time``."""
    whole = parts.sum()
    return (2 * time * parts + whole - 1) // (2 * whole)


def draw_of(parts: np.ndarray, source: int, seat: int) -> int:
    """The draw at which a source has its seat number ``seat``, counted from 0."""
    due = int((2 * seat + 1) * parts.sum() // (2 * parts[source]))
    earlier = due_before(parts, due)
    earlier[:source] = due_before(parts, due + 1)[:source]  # where it is as early, the first goes first
    return int(np.delete(earlier, source).sum()) + seat


@dataclass(frozen=True)
class Stage:
    """Draws ``first`` to ``stop`` (None: without end), shared by the sources ``active`` in proportion to
    ``parts``; ``used``: rows of each that earlier stages have read."""

    first: int
    stop: int | None
    active: np.ndarray
    parts: np.ndarray
    used: np.ndarray


@dataclass(frozen=True)
class Mixture:
    """Rows of several sources in proportion to their weights.

    rows: of each source, as packing gives them; max_epochs: 0 = without end. A source goes through its
    rows epoch after epoch, each in an order of its own, which does not depend on the other sources.
    """

    names: Sequence[str]
    rows: Sequence[Any]
    weights: Sequence[float]
    max_epochs: Sequence[int]

    def draw(self, seed: int, draws: np.ndarray) -> Rows:
        """The rows of these global draws."""
        source, turn = self._turns(seed, draws)
        parts = [
            (source == i, self.rows[i].draw(seed, turn[source == i], self._purpose(i)))
            for i in np.unique(source)
        ]
        whole = [np.empty((len(draws), *array.shape[1:]), array.dtype) for array in parts[0][1]]
        for mine, part in parts:
            for out, array in zip(whole, part, strict=True):
                out[mine] = array
        return Rows(*whole)

    def locate(self, seed: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 source and row of each draw. Raises UserError beyond the last row that the epochs allow."""
        source, turn = self._turns(seed, draws)
        numbers = np.empty_like(turn)
        for i in np.unique(source):
            mine = source == i
            numbers[mine] = order.shuffled_rows(seed, turn[mine], len(self.rows[i]), self._purpose(i))
        return source, numbers

    def _purpose(self, source: int) -> str:
        return f"order.{self.names[source]}"

    def _turns(self, seed: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 source of each draw, and how many rows of that source come before it."""
        draws = np.asarray(draws, np.int64)
        if self.limit is not None and draws.size and draws.max() >= self.limit:
            raise UserError(f"row {draws.max():,} of the mixture is asked for; {self.allowance()}")
        stage = np.searchsorted([stage.first for stage in self.stages], draws, side="right") - 1
        block = (draws - np.array([stage.first for stage in self.stages])[stage]) // BLOCK
        source, turn = np.empty_like(draws), np.empty_like(draws)
        for s, b in np.unique(np.stack([stage, block], 1), axis=0):
            mine = (stage == s) & (block == b)
            source[mine], turn[mine] = self._in_block(seed, self.stages[s], int(b), draws[mine])
        return source, turn

    def _in_block(
        self, seed: int, stage: Stage, block: int, draws: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Source of draws of one block, and how many rows of that source come before each."""
        begin = stage.first + block * BLOCK
        end = begin + BLOCK if stage.stop is None else min(begin + BLOCK, stage.stop)
        before = seats(stage.parts, begin - stage.first)
        counts = seats(stage.parts, end - stage.first) - before
        place = order.permute(seed, begin, draws - begin, end - begin, "mixture")
        ends = np.cumsum(counts)
        local = np.searchsorted(ends, place, side="right")
        turn = stage.used[local] + before[local] + place - (ends - counts)[local]
        return stage.active[local], turn

    @cached_property
    def stages(self) -> list[Stage]:
        """One after the other until every source is used up, or the last has only endless ones."""
        parts = np.array([max(1, round(w / sum(self.weights) * GRAIN)) for w in self.weights], np.int64)
        caps = np.array([n * len(rows) for n, rows in zip(self.max_epochs, self.rows, strict=True)], np.int64)
        stages, first, used = [], 0, np.zeros_like(parts)
        while len(active := np.flatnonzero((caps == 0) | (used < caps))):
            share, left = parts[active], (caps - used)[active]
            capped = np.flatnonzero(caps[active])
            length = min((draw_of(share, i, int(left[i])) for i in capped), default=None)
            stop = None if length is None else first + length
            stages.append(Stage(first, stop, active, share, used[active]))
            if length is None:
                break
            used = used.copy()
            used[active] += seats(share, length)
            first = stop
        return stages

    @property
    def limit(self) -> int | None:
        """How many draws there are; None: without end."""
        return self.stages[-1].stop

    def allowance(self) -> str:
        """What the epochs allow, in words."""
        each = zip(self.names, self.max_epochs, self.rows, strict=True)
        listed = ", ".join(f"{name} {n} x {len(rows):,}" for name, n, rows in each)
        return f"data.sources[].max_epochs allow {self.limit:,} ({listed})"
