"""Rows to batches on devices: batch ``s`` is a function of ``(config, s)`` alone.

The loader knows no objective: it is given ``to_batch(rows, draws)``. A draw is the global number of a
row over the whole run; it decides which row is read and every random choice made about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from llm_jax.data.batch import Batch, Rows

ToBatch = Callable[[Rows, np.ndarray], Batch]
RowRange = tuple[int, int]  # start, stop
AHEAD = 4  # dispatches that the reading thread may be ahead of the device


@dataclass(frozen=True)
class TrainBatches:
    """The training stream, by dispatch.

    Dispatch ``i`` holds steps ``i * steps_per_dispatch`` and on, as a Batch of arrays
    [steps_per_dispatch, accumulation, batch / accumulation, length]. ``sharding`` says how the rows
    (axis 2) lie; a process reads just the rows that its devices hold.
    """

    rows: Any  # of one source, as packing gives them, or a mixture.Mixture
    to_batch: ToBatch
    seed: int
    shape: tuple[int, int, int]  # steps per dispatch, accumulation, rows of a micro-batch
    sharding: NamedSharding

    def __getitem__(self, dispatch: int) -> Batch:
        """The dispatch as global arrays on devices."""
        return to_devices(self.host(dispatch), self.shape, self.sharding)

    def host(self, dispatch: int) -> dict[RowRange, Batch]:
        """{rows of the micro-batch: their part of the dispatch in numpy} for this process's devices."""
        steps, accumulation, micro = self.shape
        first = dispatch * steps * accumulation
        draws = (first + np.arange(steps * accumulation))[:, None] * micro + np.arange(micro)
        return {
            (start, stop): self._read(draws[:, start:stop])
            for start, stop in local_rows(self.sharding, self.shape)
        }

    def _read(self, draws: np.ndarray) -> Batch:
        flat = draws.reshape(-1)
        batch = self.to_batch(self.rows.draw(self.seed, flat), flat)
        lead = (*self.shape[:2], draws.shape[1])
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), batch)

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Dispatches start .. stop - 1, read ahead by a thread."""
        if start >= stop:
            return
        source = _HostDispatches(self, start, stop)
        import grain  # 0.3 s, with the orbax it brings: for training alone

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
        dispatches = iter(grain.MapDataset.source(source).to_iter_dataset(options))
        try:
            for host in dispatches:
                yield to_devices(host.parts, self.shape, self.sharding)
        finally:
            dispatches.close()


@dataclass(frozen=True)
class _Host:
    """One dispatch in numpy; a leaf to grain."""

    parts: dict[RowRange, Batch]


@dataclass(frozen=True)
class _HostDispatches:
    """Random access for grain."""

    batches: TrainBatches
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> _Host:
        return _Host(self.batches.host(self.start + index))


def local_rows(sharding: NamedSharding, lead: tuple[int, int, int]) -> list[RowRange]:
    """The distinct ranges of axis 2 that this process's devices hold."""
    indices = sharding.addressable_devices_indices_map((*lead, 1)).values()
    return sorted({index[2].indices(lead[2])[:2] for index in indices})


def to_devices(parts: dict[RowRange, Batch], lead: tuple[int, int, int], sharding: NamedSharding) -> Batch:
    """Global arrays from this process's rows."""

    def place(*leaves: np.ndarray) -> jax.Array:
        local = dict(zip(parts, leaves, strict=True))
        shape = (*lead, *leaves[0].shape[3:])

        def rows(index: tuple[slice, ...]) -> np.ndarray:
            return local[index[2].indices(lead[2])[:2]]

        return jax.make_array_from_callback(shape, sharding, rows)

    return jax.tree.map(place, *parts.values())


def evaluation_batches(
    rows: Any, to_batch: ToBatch, batch_size: int, sharding: NamedSharding, limit: int = 0
) -> Iterator[Batch]:
    """Every row once, in order, as [1, 1, batch, length]; the last batch is padded with weight 0.

    limit: at most so many batches, 0 for all. A row's draw is its number, so its masks never change.
    """
    shape = (1, 1, batch_size)
    count = -(-len(rows) // batch_size)
    for i in range(min(count, limit) if limit else count):
        parts = {}
        for start, stop in local_rows(sharding, shape):
            numbers = i * batch_size + np.arange(start, stop)
            batch = to_batch(rows.read(np.minimum(numbers, len(rows) - 1)), numbers)
            real = (numbers < len(rows)).astype(np.float32)
            batch = batch.replace(weights=batch.weights * real[:, None])
            parts[start, stop] = jax.tree.map(lambda x: x[None, None], batch)
        yield to_devices(parts, shape, sharding)
