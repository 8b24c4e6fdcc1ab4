"""A sweep is a list of points, and a point is a flat dict of what differs from the config:
``{"optimizer.learning_rate": 3e-4, "model.model_dim": 64}``.

The functions here build such lists for the ``def sweep()`` of a config file, and combine them; what they
cannot say, a loop that appends dicts can. Each takes any number of lists, and a mapping ``{key: values}`` as
short for one list a key:

    grid({"model.model_dim": (32, 64), "optimizer.learning_rate": (1e-3, 3e-3)})       # 4 points
    zip_({"model.model_dim": (32, 64), "optimizer.learning_rate": (3e-3, 1e-3)})       # 2: step by step
    chain(grid({"seed": (0, 1)}), [{"optimizer.name": "muon"}])                        # 3: one after another
    grid(zip_({"model.model_dim": (32, 64), "model.num_layers": (2, 4)}), {"seed": range(3)})  # 6

Where a grid would be too large, points are drawn from ranges: spread evenly over all of them at once (Sobol),
or each by itself. The same call gives the same points, and a larger count the same ones and more:

    ranges = {"optimizer.learning_rate": log_uniform(1e-4, 1e-2), "model.dropout": uniform(0, 0.3)}
    sobol(ranges, count=16, seed=0)                          # 16 points
    draw(ranges, count=16, seed=0)                           # 16 others
    grid(sobol(ranges, count=16), {"model.model_dim": (32, 64)})  # 32
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from llm_jax.errors import UserError

Overrides = dict[str, Any]
Part = Mapping[str, Iterable[Any]] | Iterable[Overrides]
Range = Callable[[float], float]  # the value below which a share of all values lies, 0 to 1
DIGITS = 6  # of a value drawn: it goes into a fingerprint, which must not hang on the last bit of a power


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


def uniform(low: float, high: float) -> Range:
    """Values between ``low`` and ``high``, all as likely."""
    if not low < high:
        raise UserError(f"sweep: uniform({low:g}, {high:g}) is no range: the first must be the smaller")
    return lambda share: low + (high - low) * share


def log_uniform(low: float, high: float) -> Range:
    """Values whose logarithms are uniform, so that each factor of 2 has as many."""
    if not 0 < low < high:
        raise UserError(f"sweep: log_uniform({low:g}, {high:g}) is no range: it needs 0 < low < high")
    return lambda share: low * (high / low) ** share


def sobol(ranges: Mapping[str, Range], count: int, seed: int = 0) -> list[Overrides]:
    """The first ``count`` of a Sobol sequence (Sobol' 1967), scrambled by ``seed`` (Matousek 1998): no corner
    of the ranges is left empty, whatever the number of keys. Most even where the count is a power of 2."""
    _check_count("sobol", count)
    from scipy.stats import qmc  # 1 s, and most config files draw nothing

    sequence = qmc.Sobol(len(ranges), scramble=True, rng=np.random.default_rng(seed))
    shares = sequence.random_base2((count - 1).bit_length())[:count]
    return _values(ranges, shares)


def draw(ranges: Mapping[str, Range], count: int, seed: int = 0) -> list[Overrides]:
    """``count`` points, every value drawn by itself (random search, Bergstra and Bengio 2012)."""
    _check_count("draw", count)
    return _values(ranges, np.random.default_rng(seed).random((count, len(ranges))))


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise UserError(f"sweep: {name} needs a count of at least 1, not {count}")


def _values(ranges: Mapping[str, Range], shares: np.ndarray) -> list[Overrides]:
    """shares: [points, keys], 0 to 1."""
    return [
        {
            key: float(f"{value_at(share):.{DIGITS}g}")
            for (key, value_at), share in zip(ranges.items(), row, strict=True)
        }
        for row in shares.tolist()
    ]


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
