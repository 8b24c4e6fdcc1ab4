"""A sweep on disk: its points, their data, their runs, and how far each has come.

    data/KEY/              token shards, shared by the points that read the same text in the same way
    points/FINGERPRINT/    config.json, log.txt, lock and outcome.json: what the sweep knows of a point
    points/groups.json     which points are trained together, see groups.py
    runs/FINGERPRINT/      the run directory of a point, as of any run
    table.jsonl, .csv      one line a point, see table.py

Nothing here asks jax for a device but the CPU: the others belong to the points.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from llm_jax import config as configs
from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.scaling import trunks
from llm_jax.scaling.points import Overrides
from llm_jax.text import shards
from llm_jax.text.prepare import Say, prepare, recipe_of
from llm_jax.training import experiment as experiments
from llm_jax.training.checkpoint import Source
from llm_jax.training.experiment import Experiment
from llm_jax.training.rundir import RunDirectory

WAITING, RUNNING, UNFINISHED = "waiting", "running", "unfinished"
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
SETTLED = (FINISHED, DIVERGED)  # a point that failed is tried again by the next start
KNOWN = ("data", "points", "runs", "table.jsonl", "table.csv", "table.lock")


@dataclass(frozen=True)
class Point:
    """experiment: resolved, not complete: its data may not be there yet."""

    index: int
    overrides: Overrides
    experiment: Experiment

    def __str__(self) -> str:
        return f"point {self.index} ({describe(self.overrides)})"


def describe(overrides: Overrides) -> str:
    return ", ".join(f"{key}={value}" for key, value in overrides.items()) or "as the config is"


def resolve(
    config: ml_collections.ConfigDict, sweep: Iterable[Overrides], common: Mapping[str, Any]
) -> tuple[Point, ...]:
    """The points of ``sweep``, each checked as a whole. common: overrides of all of them.

    Raises UserError that names the first point that cannot be run, or two that would be the same run.
    """
    points = []
    for index, given in enumerate(sweep):
        if not isinstance(given, Mapping):
            raise UserError(f"point {index} of sweep() is {given!r}; a point is a dict of dotted keys")
        own = {key: v.item() if isinstance(v, np.generic) else v for key, v in given.items()}
        if both := own.keys() & common.keys():
            raise UserError(f"--config.{min(both)} is set by the sweep itself; leave it out")
        try:
            e = experiments.resolve(experiments.override(config, {**common, **own}))
        except UserError as error:
            raise UserError(f"point {index} ({describe(own)}): {error}") from None
        points.append(Point(index, own, e))
    if not points:
        raise UserError("sweep() gives no points")
    check_distinct(points, [_what(point.experiment) for point in points])
    return tuple(points)


def check_distinct(points: Iterable[Point], identities: Iterable[str | None]) -> None:
    """Raises UserError for two points of one identity; None is not known yet."""
    seen: dict[str, Point] = {}
    for point, identity in zip(points, identities, strict=True):
        if identity is not None and identity in seen:
            raise UserError(f"{seen[identity]} and {point} are the same run; remove one")
        if identity is not None:
            seen[identity] = point


def _what(e: Experiment) -> str:
    """What a run is, as far as it is known before its data are there."""
    return configs.dumps([dict(configs.leaves(e, only_identity=True)), data_key(e), e.init_from])


def data_key(e: Experiment) -> str:
    """Names the shard set of an experiment by all that decides it: text, split and tokenizer."""
    if e.data.shards:
        return e.data.shards
    text = {source.name: source.text for source in e.data.mixture}
    what = {**recipe_of(e.data, e.tokenizer), "text": text, "text_key": e.data.text_key}
    return storage.text_hash(configs.dumps(what))[:16]


@dataclass(frozen=True)
class PointDirectory:
    """The files of one point."""

    path: Path
    run: RunDirectory

    def make(self) -> None:
        storage.make_directory(self.path)

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    def read_outcome(self) -> dict[str, str]:
        """How the last attempt ended: ``status`` and ``error``. An empty one before, and for a run that was
        deleted since."""
        if not self.outcome.exists():
            return {}
        outcome = json.loads(self.outcome.read_text())
        return outcome if outcome["status"] == FAILED or self.run.config.exists() else {}

    def write_outcome(self, status: str, error: str) -> None:
        content = {"status": status, "error": error}
        storage.write_text(self.outcome, json.dumps(content, indent=1) + "\n")

    def status(self) -> str:
        begun = UNFINISHED if self.run.config.exists() else WAITING
        return self.read_outcome().get("status", begun)


class Sweep:
    """Points and the directory they live in."""

    def __init__(self, path: Path, points: tuple[Point, ...]) -> None:
        """Raises UserError for a directory that holds something else. It may hold another sweep, or an
        earlier form of this one: points that both have are run once."""
        if not storage.has_locks(path):
            raise UserError(
                f"--workdir={path}: a sweep needs locks, which a bucket has not; use a disk that all see"
            )
        self.path, self.points = path.expanduser().absolute(), points
        self._fingerprints: dict[int, str] = {}
        self._headers: dict[Path, dict[str, Any]] = {}
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--workdir={path} is a file; name a directory")
        foreign = {entry.name for entry in self.path.glob("[!.]*")} - {*KNOWN}
        if foreign:
            raise UserError(
                f"--workdir={path} is not a sweep's directory (it holds {min(foreign)}); name a new one"
            )

    def select(self, index: int | None) -> tuple[Point, ...]:
        """One point, or all of them."""
        if index is None:
            return self.points
        if not 0 <= index < len(self.points):
            raise UserError(f"--index={index}: the sweep has the points 0 to {len(self.points) - 1}")
        return (self.points[index],)

    def prepare(self, points: Iterable[Point], say: Say) -> None:
        """Makes the token shards that ``points`` read and that are not there, once each.

        Raises UserError for bad text, and for two points that turn out to be the same run.
        """
        for point in points:
            e = point.experiment
            if e.data.shards:
                continue
            directory = self.shards(point)
            storage.make_directory(directory.parent)
            with storage.lock(directory.with_suffix(".lock"), wait=True):
                prepare(e.data, e.tokenizer, directory, say, e.evaluation.sets)
        check_distinct(self.points, [self.fingerprint(point) for point in self.points])

    def shards(self, point: Point) -> Path:
        key = data_key(point.experiment)
        return storage.path(key) if point.experiment.data.shards else self.path / "data" / key

    def complete(self, point: Point) -> Experiment | None:
        """With what the data decide; None before they are there. Raises UserError where they do not fit."""
        header = self.header(point)
        try:
            return experiments.complete(point.experiment, header["vocab_size"]) if header else None
        except UserError as error:
            raise UserError(f"{point}: {error}") from None

    def fingerprint(self, point: Point) -> str | None:
        """The one that its run writes to config.json; None before its data are there."""
        header, init = self.header(point), point.experiment.init_from
        if header and point.index not in self._fingerprints:
            hashes = {"data": shards.content_id(header)}
            hashes |= {"init": Source.find(storage.path(init)).hash} if init else {}
            self._fingerprints[point.index] = configs.fingerprint(self.complete(point), **hashes)
        return self._fingerprints.get(point.index)

    def header(self, point: Point) -> dict[str, Any] | None:
        """Of its token shards; None before they are there."""
        directory = self.shards(point)
        if directory not in self._headers and (directory / shards.HEADER).exists():
            self._headers[directory] = shards.read_header(directory)
        return self._headers.get(directory)

    def directory(self, point: Point) -> PointDirectory | None:
        """None before its data are there."""
        name = self.fingerprint(point)
        if name is None:
            return None
        return PointDirectory(self.path / "points" / name, RunDirectory(self.path / "runs" / name))

    def status(self, point: Point) -> str:
        """From what is on disk alone: all but RUNNING."""
        directory = self.directory(point)
        return directory.status() if directory else WAITING

    def status_now(self, point: Point) -> str:
        """Also whether some process is running it: its lock is held."""
        directory = self.directory(point)
        if directory and directory.lock.exists():
            lock = storage.lock(directory.lock)
            if lock is None:
                return RUNNING
            lock.close()
        return self.status(point)

    @cached_property
    def branches(self) -> dict[int, trunks.Branch]:
        """{index of a point: where it leaves the run of a longer one}."""
        return trunks.plan([point.experiment for point in self.points])

    def steps_of_others(self, point: Point) -> int:
        """How many of its first steps another point has made, or will."""
        run, branch = self.directory(point).run, self.branches.get(point.index)
        if run.config.exists():
            return run.branched().get("step", 0)
        return branch.step if branch else 0

    def write_config(self, point: Point, directory: PointDirectory) -> None:
        """The config of a point for scripts/train.py: whole, so that nothing which happens to the config file
        while the sweep runs can reach it. For the process that holds its lock."""
        e = point.experiment
        data = dataclasses.replace(e.data, shards=str(storage.resolved(self.shards(point))))
        left_at = {branch.step for branch in self.branches.values() if branch.trunk == point.index}
        checkpoint = dataclasses.replace(e.checkpoint, at=tuple(sorted(left_at.union(e.checkpoint.at))))
        whole = dataclasses.replace(e, data=data, checkpoint=checkpoint)
        content = {"config": configs.to_dict(whole)}
        storage.remove_leftovers(directory.path)
        directory.outcome.unlink(missing_ok=True)
        storage.write_text(directory.config, configs.dumps(content, indent=1) + "\n")
