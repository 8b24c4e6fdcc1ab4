"""Checkpoints: orbax writes the arrays, a sealed manifest makes them count.

``checkpoints/00000500/state`` is orbax's; ``checkpoints/00000500/manifest.json`` is written last and
holds the size and hash of every file, the shape of every array, the validation loss at that step if
there was an evaluation, and what the run wants known ``about`` it. A directory without a manifest is
what a kill left behind: it is not a checkpoint and is removed at the next start. Nothing outside this
file knows orbax.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.training import policy
from llm_jax.training.rules import parameter_name

MANIFEST = "manifest.json"
PARAMS = "params/"  # how the names of parameters begin among those of a state


class Checkpointer:
    """Saves in the background, keeps what ``policy.kept`` says, restores after checking every byte."""

    def __init__(
        self,
        directory: Path,
        keep: int,
        keep_best: int = 0,
        keep_every: int = 0,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """keep, keep_best, keep_every: see policy.kept; about: JSON values for every manifest."""
        self._directory, self._about = directory.absolute(), dict(about or {})
        self._keep = {"newest": keep, "best": keep_best, "every": keep_every}
        self._losses: dict[int, float] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._sealing: Future | None = None

    @cached_property
    def _orbax(self) -> ocp.StandardCheckpointer:
        """Made when it is first used: it asks jax for its devices, which mesh.start chooses before."""
        return ocp.StandardCheckpointer()

    def clean(self) -> None:
        """Removes what a kill left behind. For the process that is about to write, not for readers."""
        storage.make_directory(self._directory)
        for path in self._directory.iterdir():
            if path.is_dir() and not (path / MANIFEST).exists():
                shutil.rmtree(path)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        found = self._directory.glob(f"[0-9]*/{MANIFEST}")
        return sorted(int(path.parent.name) for path in found)

    def is_among_best(self, step: int, loss: float) -> bool:
        """Whether a checkpoint of this step and validation loss would be kept for its loss."""
        losses = {**self.losses(), step: loss}
        return math.isfinite(loss) and step in policy.best_of(losses, self._keep["best"])

    def losses(self) -> dict[int, float]:
        """Validation losses of the checkpoints that have one: from their manifests, so that what is best
        survives a restart. A manifest that cannot be read has none, as its checkpoint cannot be restored."""
        if self._losses is None:
            self._losses = {}
            for step in self.steps():
                with suppress(UserError):
                    loss = storage.read_sealed(self._directory / f"{step:08d}" / MANIFEST).get("loss")
                    self._losses |= {} if loss is None else {step: loss}
        return self._losses

    def save(self, step: int, state: Any, loss: float | None = None) -> None:
        """Starts to write ``state``; returns when its arrays are copied. Waits for the one before.

        loss: the validation loss at this step, if it was evaluated.
        """
        self.wait()
        if step in self.steps():
            return
        path = self._directory / f"{step:08d}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._orbax.save(path / "state", state)
        except OSError as error:
            raise _cannot_write(path, error) from error
        if loss is not None and math.isfinite(loss):
            self._losses = {**self.losses(), step: loss}
        self._sealing = self._thread.submit(self._seal, path, step, describe(state))

    def wait(self) -> None:
        """Until the save in progress is complete. Raises UserError if it failed."""
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()
        if "_orbax" in self.__dict__:
            self._orbax.close()

    def arrays(self, step: int) -> dict[str, list[Any]]:
        """{name: [shape, dtype]} of the arrays saved at ``step``."""
        return storage.read_sealed(self._directory / f"{step:08d}" / MANIFEST)["arrays"]

    def restore(self, step: int, target: Any) -> Any:
        """The state saved at ``step``, in the shardings of ``target`` (ShapeDtypeStructs).

        Raises UserError naming the file that is missing or changed, or the array that does not fit.
        """
        path = self._directory / f"{step:08d}"
        manifest = storage.read_sealed(path / MANIFEST)
        _verify(path, manifest["files"], mend=f"delete {path} to go on from the checkpoint before it")
        _compare(path, manifest["arrays"], describe(target))
        return self._orbax.restore(path / "state", target)

    def _seal(self, path: Path, step: int, arrays: dict[str, Any]) -> None:
        try:
            self._orbax.wait_until_finished()
            files = {
                file.relative_to(path).as_posix(): {
                    "bytes": file.stat().st_size,
                    "sha256": storage.content_hash(file),
                }
                for file in sorted((path / "state").rglob("*"))
                if file.is_file()
            }
            loss = self.losses().get(step)
            about = {"loss": loss, "about": self._about}
            manifest = {"step": step, "arrays": arrays, "files": files, **about}
            storage.write_sealed(path / MANIFEST, manifest)
        except (OSError, ValueError) as error:
            raise _cannot_write(path, error) from error
        steps = self.steps()
        for old in sorted({*steps} - policy.kept(steps, self.losses(), **self._keep)):
            self._remove(old)

    def _remove(self, step: int) -> None:
        """The manifest first: half a checkpoint must not look like one."""
        path = self._directory / f"{step:08d}"
        (path / MANIFEST).unlink()
        shutil.rmtree(path)
        self._losses = {kept: loss for kept, loss in self.losses().items() if kept != step}


@dataclass(frozen=True)
class Source:
    """A checkpoint to take parameters from. hash: of its manifest, so of all its bytes."""

    path: Path
    manifest: dict[str, Any]
    hash: str

    @classmethod
    def find(cls, path: Path) -> Source:
        """Of a run directory its newest checkpoint, or ``path`` itself. Raises UserError."""
        if not (path / MANIFEST).exists():
            found = (path / "checkpoints").glob(f"[0-9]*/{MANIFEST}")
            newest = max(found, key=lambda file: int(file.parent.name), default=None)
            if newest is None:
                raise UserError(f"{path} is neither a checkpoint nor a run directory with one")
            path = newest.parent
        return cls(path, storage.read_sealed(path / MANIFEST), storage.content_hash(path / MANIFEST))

    @property
    def arrays(self) -> dict[str, list[Any]]:
        """{parameter: [shape, dtype]}."""
        arrays = self.manifest["arrays"].items()
        return {name.removeprefix(PARAMS): array for name, array in arrays if name.startswith(PARAMS)}

    def about(self, key: str) -> Any:
        """What the run said about its checkpoints, or UserError."""
        if key not in self.manifest.get("about", {}):
            raise UserError(f"{self.path} does not say its {key}: an older version wrote it; train it anew")
        return self.manifest["about"][key]

    def restore(self, target: dict[str, Any]) -> dict[str, Any]:
        """Some of the parameters, and nothing else that was saved, after checking every byte.

        target: a nested dict of ShapeDtypeStructs with shardings, of the shapes that were saved.
        """
        _verify(self.path, self.manifest["files"], mend="choose another checkpoint")
        wanted = {"params": target}
        options = ocp.checkpoint_utils.construct_restore_args(wanted)
        request = ocp.args.PyTreeRestore(wanted, restore_args=options, partial_restore=True)
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(self.path.absolute() / "state", args=request)["params"]


def describe(state: Any) -> dict[str, list[Any]]:
    """{name: [shape, dtype]} of every array, as JSON has it."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {parameter_name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


def _verify(path: Path, files: dict[str, dict[str, Any]], mend: str) -> None:
    for name, expected in files.items():
        file = path / name
        if not file.exists():
            raise UserError(f"{file} is missing; {mend}")
        if file.stat().st_size != expected["bytes"]:
            raise UserError(f"{file} has {file.stat().st_size} bytes, not {expected['bytes']}; {mend}")
        if storage.content_hash(file) != expected["sha256"]:
            raise UserError(f"{file} is corrupt: its hash is not the manifest's; {mend}")


def _compare(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in [*wanted, *saved]:
        if saved.get(name) != wanted.get(name):
            there = f"{name} is {saved[name]}" if name in saved else f"{name} is missing"
            here = str(wanted[name]) if name in wanted else "absent"
            raise UserError(f"{path} is of another model: there {there}, here {here}")


def _cannot_write(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(
        f"cannot write checkpoint {path}: {reason}; earlier checkpoints are intact, the same command "
        "goes on from the newest"
    )
