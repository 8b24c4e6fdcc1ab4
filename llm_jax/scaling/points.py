"""A sweep is a list of points, and a point is a flat dict of what differs from the config:
``{"optimizer.learning_rate": 3e-4, "model.model_dim": 64}``.

The functions here build such lists for the ``def sweep()`` of a config file, and combine them; what they
cannot say, a loop that appends dicts can. Each takes any number of lists, and a mapping ``{key: values}`` as
short for one list a key:

    grid({"model.model_dim": (32, 64), "optimizer.learning_rate": (1e-3, 3e-3)})       # 4 points
    zip_({"model.model_dim": (32, 64), "optimizer.learning_rate": (3e-3, 1e-3)})       # 2: step by step
    chain(grid({"seed": (0, 1)}), [{"optimizer.name": "muon"}])                        # 3: one after another
    grid(zip_({"model.model_dim": (32, 64), "model.num_layers": (2, 4)}), {"seed": range(3)})  # 6
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llm_jax.errors import UserError

Overrides = dict[str, Any]
Part = Mapping[str, Iterable[Any]] | Iterable[Overrides]


def grid(*parts: Part) -> list[Overrides]:
    """Every combination of one point of each list; those of the last list change fastest."""
    return [_merged(points) for points in itertools.product(*_lists(parts))]


def zip_(*parts: Part) -> list[Overrides]:
    """The first points of all lists as one, then the second ones. Raises UserError for unequal lengths."""
    lists = list(_lists(parts))
    if len({len(points) for points in lists}) > 1:
        keys = ", ".join(f"{'/'.join(points[0])} {len(points)}" for points in lists if points)
        raise UserError(f"sweep: zip_ needs lists of one length, not {keys}")
    return [_merged(points) for points in zip(*lists, strict=True)]


def chain(*parts: Part) -> list[Overrides]:
    """The points of the first list, then those of the next."""
    return [dict(point) for points in _lists(parts) for point in points]


def _lists(parts: Iterable[Part]) -> Iterator[list[Overrides]]:
    for part in parts:
        if not isinstance(part, Mapping):
            yield list(part)
            continue
        for key, values in part.items():
            if isinstance(values, str):
                raise UserError(f"sweep: {key} is {values!r}, but takes a list of values: [{values!r}]")
            yield [{key: value} for value in values]


def _merged(points: Iterable[Overrides]) -> Overrides:
    merged: Overrides = {}
    for point in points:
        if twice := merged.keys() & point.keys():
            raise UserError(f"sweep: {min(twice)} is set by two of the lists that are combined")
        merged |= point
    return merged
