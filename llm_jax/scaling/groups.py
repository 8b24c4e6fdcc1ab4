"""Which points of a sweep are trained together, as one program (training/together.py): points/groups.json.

The last bits of a run may depend on how many it is trained with, so who is with whom is decided once, before
the first of them starts, and kept: by every later start, with however many workers, and when points are
added. A point that shares a beginning with others (trunks.py) is by itself: a branch that began with the last
bits of a group would differ from the point trained alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.scaling.sweep import Point, Sweep
from llm_jax.text.prepare import Say
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


def prepare(sweep: Sweep, points: Sequence[Point], largest: int, workers: int, say: Say) -> tuple[Point, ...]:
    """Prepares the data of ``points`` and settles who is with whom; gives them and those they are with."""
    among = sweep.points if largest > 1 else points
    sweep.prepare(among, say)
    chosen = {point.index for point in points}
    found = [g for g in settle(sweep, among, largest, workers) if any(p.index in chosen for p in g)]
    together = tuple(point for group in found for point in group)
    if largest > 1:
        say(f"{len(together)} points in {len(found)} groups, which {sweep.path / 'points' / FILE} keeps")
    return together


def settle(sweep: Sweep, points: Sequence[Point], largest: int, workers: int = 1) -> list[Group]:
    """The groups of ``points``, whose data are there, in the order of their first ones: as they are recorded,
    with others of the sweep, and of points that are not, as ``plan`` has it, which is recorded now. A point
    that has begun by itself stays by itself, as does a trunk or a branch."""
    names, place = {sweep.fingerprint(point): point for point in sweep.points}, sweep.path / "points"
    asked = [sweep.fingerprint(point) for point in points]
    tied = {index for at, branch in sweep.branches.items() for index in (at, branch.trunk)}
    storage.make_directory(place)
    with storage.lock(place / LOCK, wait=True):
        recorded = read(place / FILE)
        known = {name for group in recorded for name in group}
        new = [name for name in asked if name not in known]
        begun = {name for name in new if sweep.directory(names[name]).run.config.exists()}
        alone = [name for name in new if name in begun or names[name].index in tied]
        fresh = [name for name in new if name not in alone]
        planned = plan([names[name].experiment for name in fresh], largest, workers)
        added = [[name] for name in alone] + [[fresh[i] for i in group] for group in planned]
        if added:
            storage.remove_leftovers(place, FILE)
            storage.write_text(place / FILE, json.dumps([*recorded, *added], indent=1) + "\n")
    whole = [group for group in [*recorded, *added] if not set(asked).isdisjoint(group)]
    groups = [tuple(names[name] for name in group if name in names) for group in whole]
    return sorted(groups, key=lambda group: group[0].index)


def read(path: Path) -> list[list[str]]:
    """The recorded groups, of fingerprints. Raises UserError for a file that is something else."""
    if not path.exists():
        return []
    try:
        return [[str(name) for name in group] for group in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is corrupt ({error}); restore it, or delete it to group anew") from None
