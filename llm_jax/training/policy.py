"""Which steps are saved, and which of the saved ones stay."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping

from llm_jax.training.experiment import CheckpointConfig


def best_of(losses: Mapping[int, float], count: int) -> set[int]:
    """The ``count`` steps of lowest loss; of equal ones the earlier."""
    return set(sorted(losses, key=lambda step: (losses[step], step))[:count])


def kept(
    steps: Iterable[int],
    losses: Mapping[int, float],
    newest: int,
    best: int = 0,
    every: int = 0,
    at: Collection[int] = (),
) -> set[int]:
    """The checkpoints that stay: the ``newest``, the ``best`` by validation loss, all multiples of ``every``,
    those ``at`` the steps that are named.

    losses: of those steps that were evaluated; others cannot be among the best.
    """
    ordered = sorted(steps)
    known = {step: losses[step] for step in ordered if step in losses}
    forever = {step for step in ordered if step in at or (every and step % every == 0)}
    return {*ordered[max(len(ordered) - newest, 0) :], *best_of(known, best), *forever}


class SavePolicy:
    """When a checkpoint is due: by step, or by the time since the last one."""

    def __init__(self, config: CheckpointConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._last = clock()

    def due(self, step: int) -> bool:
        """Asked between dispatches."""
        c = self._config
        by_step = step in c.at or any(every and step % every == 0 for every in (c.every, c.keep_every))
        return by_step or bool(c.every_minutes and self._clock() - self._last >= 60 * c.every_minutes)

    def saved(self) -> None:
        """Time counts from here."""
        self._last = self._clock()
