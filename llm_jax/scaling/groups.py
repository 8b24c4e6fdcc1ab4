"""Which points of a sweep are trained together, as one program (training/together.py): points/groups.json.

The last bits of a run may depend on how many it is trained with, so who is with whom is decided once, before
the first of them starts, and kept: by every later start, with however many workers, and when points are
added.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.scaling.sweep import Point, Sweep
from llm_jax.training import together
from llm_jax.training.experiment import Experiment

FILE = "groups.json"  # in points/, where a sweep has what it knows of its points
LOCK = "groups.lock"

Group = tuple[Point, ...]


def plan(experiments: Sequence[Experiment], largest: int, workers: int = 1) -> list[list[int]]:
    """Indices of the experiments, each in one group: neighbours among those that can be one program, at most
    ``largest``, and fewer where some of ``workers`` would otherwise have nothing to do. The groups of one
    program differ in size by one at most, so that most of them share what is compiled."""
    largest = min(largest, -(-len(experiments) // workers))
    kinds: dict[str, list[int]] = {}
    for index, e in enumerate(experiments):
        kind = f"{index}" if together.alone(e) else together.alike(e)
        kinds.setdefault(kind, []).append(index)
    return sorted(group for kind in kinds.values() for group in _deal(kind, -(-len(kind) // largest)))


def _deal(items: list[int], parts: int) -> list[list[int]]:
    cuts = [len(items) * part // parts for part in range(parts + 1)]
    return [items[start:stop] for start, stop in pairwise(cuts)]


def settle(sweep: Sweep, points: Sequence[Point], largest: int, workers: int = 1) -> list[Group]:
    """The groups of ``points``, whose data are there, in the order of their first ones: as they are recorded,
    and of those that are not, as ``plan`` has it, which is recorded now. A point that has begun by itself
    stays by itself."""
    names, place = {sweep.fingerprint(point): point for point in points}, sweep.path / "points"
    storage.make_directory(place)
    with storage.lock(place / LOCK, wait=True):
        recorded = read(place / FILE)
        known = {name for group in recorded for name in group}
        new = [name for name in names if name not in known]
        begun = [name for name in new if sweep.directory(names[name]).run.config.exists()]
        fresh = [name for name in new if name not in begun]
        planned = plan([names[name].experiment for name in fresh], largest, workers)
        added = [[name] for name in begun] + [[fresh[i] for i in group] for group in planned]
        if added:
            storage.remove_leftovers(place, FILE)
            storage.write_text(place / FILE, json.dumps([*recorded, *added], indent=1) + "\n")
    groups = [tuple(names[name] for name in group if name in names) for group in [*recorded, *added]]
    return sorted((group for group in groups if group), key=lambda group: group[0].index)


def read(path: Path) -> list[list[str]]:
    """The recorded groups, of fingerprints. Raises UserError for a file that is something else."""
    if not path.exists():
        return []
    try:
        return [[str(name) for name in group] for group in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is corrupt ({error}); restore it, or delete it to group anew") from None
