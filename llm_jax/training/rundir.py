"""The run directory: what is in it, whose it is, and what may change when a run goes on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from llm_jax import config as configs
from llm_jax import hosts, storage
from llm_jax.errors import UserError
from llm_jax.training.experiment import Experiment, resolve

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. Opening it creates it, or raises UserError for a directory that is not a run."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        run = cls(storage.path(path))
        if run.path.exists() and not run.path.is_dir():
            raise UserError(f"--workdir={path} is a file; name a directory")
        if run.path.is_dir() and not run.config.exists():
            for entry in sorted({*run.path.iterdir()} - {*storage.leftovers(run.path)}):
                if entry not in (run.data, run.lock):
                    raise UserError(
                        f"--workdir={path} is not a run directory (it holds {entry.name}); name a new "
                        "or empty one"
                    )
        storage.make_directory(run.path)
        return run

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @contextmanager
    def held(self) -> Iterator[None]:
        """While a run writes here; process 0 holds it for all. Raises UserError where another run does."""
        lock = storage.lock(self.lock) if hosts.leads() else None
        if hosts.leads() and lock is None:
            raise UserError(f"{self.path} is being trained by another process; use another --workdir")
        try:
            if lock:
                storage.remove_leftovers(self.path)
            yield
        finally:
            if lock:
                lock.close()

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def branch(self) -> Path:
        return self.path / "branch.json"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def bad_steps(self) -> Path:
        return self.path / "bad_steps"

    @property
    def samples(self) -> Path:
        return self.path / "samples.txt"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def stored(self) -> Experiment | None:
        """The experiment of an earlier start, or None. Raises UserError when it cannot be read."""
        return resolve(self._content()["config"], find_text=False) if self.config.exists() else None

    def _content(self) -> dict[str, Any]:
        """What config.json holds. Raises UserError unless it is what was written."""
        try:
            content = json.loads(self.config.read_text())
            if content.pop("sha256") == _seal(content):
                return content
        except (ValueError, KeyError, AttributeError):
            pass
        raise UserError(f"{self.config} is corrupt: its hash is not its own; restore it from a copy")

    def data_of(self, experiment: Experiment) -> Path:
        """The shard set that the run reads."""
        return storage.path(experiment.data.shards) if experiment.data.shards else self.data

    def begun_from(self) -> str:
        """The hash of the checkpoint whose parameters the run began with; "" for none."""
        return self._content().get("init", "") if self.config.exists() else ""

    def write_config(
        self, experiment: Experiment, mesh: Mapping[str, int], data: str, init: str = ""
    ) -> None:
        """config.json and environment.json of a new run, or of one that goes on with other choices.

        mesh: its shape; data, init: content hashes of the shards, and of the checkpoint of a warm start.
        """
        self._write_content(experiment, {"data": data} | ({"init": init} if init else {}))
        storage.write_text(self.environment, configs.dumps(environment(mesh), indent=1) + "\n")

    def _write_content(self, experiment: Experiment, hashes: Mapping[str, str]) -> None:
        content = {
            "fingerprint": configs.fingerprint(experiment, **hashes),
            **hashes,
            "config": configs.to_dict(experiment),
        }
        content |= {"sha256": _seal(content)}
        storage.write_text(self.config, configs.dumps(content, indent=1) + "\n")

    def branch_off(self, trunk: RunDirectory, step: int, steps: int) -> None:
        """Writes who this run is, one of ``steps`` that goes on from step ``step`` of another: branch.json,
        and the config and environment of ``trunk``, so that what was chosen at its first start holds here."""
        content = trunk._content()
        origin = {"from": content["fingerprint"], "step": step}
        storage.write_text(self.branch, json.dumps(origin, indent=1) + "\n")
        storage.write_text(self.environment, trunk.environment.read_text())
        hashes = {key: content[key] for key in ("data", "init") if key in content}
        self._write_content(dataclasses.replace(trunk.stored(), steps=steps), hashes)

    def branched(self) -> dict[str, Any]:
        """``from``, the fingerprint of the run whose beginning this one has, and the ``step`` up to which; {}
        for a run that made all its steps."""
        return json.loads(self.branch.read_text()) if self.branch.exists() else {}

    def moved(self, mesh: Mapping[str, int]) -> str:
        """What a run that goes on gives up because it no longer runs where it did; "" for nothing."""
        if not self.environment.exists():
            return ""
        before, now = json.loads(self.environment.read_text()), json.loads(json.dumps(environment(mesh)))
        here, there = ({**e, **e["packages"], "device": e["devices"]["kind"]} for e in (now, before))
        decisive = ("mesh", "processes", "device", "jax", "jaxlib")
        changed = [name for name in decisive if there.get(name) != here[name]]
        listed = ", ".join(f"{name} was {there.get(name)}, is {here[name]}" for name in changed)
        cost = "the same batches, and float32 losses within 1e-5 at first, but no longer the same bits"
        return f"{listed}: {cost}" if listed else ""

    def check_data(self, data: str) -> None:
        """Raises UserError when the run's tokens are not the ones that it began with."""
        if self.config.exists() and self._content()["data"] != data:
            raise UserError(f"the tokens of {self.path} have changed since it began; restore them")


def _seal(content: dict[str, Any]) -> str:
    return storage.text_hash(configs.dumps(content))


def carry_on(old: Experiment | None, new: Experiment, extend: bool) -> Experiment:
    """The experiment to go on with: ``new``, with what was chosen at the first start where it leaves
    the choice open. Raises UserError, naming the keys, when it is another experiment.
    """
    if old is None:
        return new
    model, mesh = new.model, new.mesh
    if model.dtype == "auto":
        model = dataclasses.replace(model, dtype=old.model.dtype)
    if mesh.cpu_devices == 0:
        mesh = dataclasses.replace(mesh, cpu_devices=old.mesh.cpu_devices)
    accumulation = new.accumulation
    if accumulation == 0:
        remat = new.model.remat or old.model.remat
        accumulation, model = old.accumulation, dataclasses.replace(model, remat=remat)
    changed = configs.differences(old, new, only_identity=True)
    if extend and new.steps > old.steps:
        changed.pop("steps", None)
    if changed:
        listed = ", ".join(f"{key}: {a!r} -> {b!r}" for key, (a, b) in changed.items())
        hint = "; --extend allows more steps" if set(changed) == {"steps"} else ""
        raise UserError(f"--workdir holds another experiment ({listed}); use another --workdir{hint}")
    chosen = {"model": model, "mesh": mesh, "accumulation": accumulation}
    return dataclasses.replace(new, **chosen, init_from=new.init_from or old.init_from)


def environment(mesh: Mapping[str, int]) -> dict[str, Any]:
    """Versions, machine and devices; asks jax, so call it after the mesh is made. mesh: its shape."""
    device = jax.devices()[0]
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": {"kind": device.device_kind, "count": jax.device_count()},
        "mesh": dict(mesh),
        "processes": jax.process_count(),
    }
