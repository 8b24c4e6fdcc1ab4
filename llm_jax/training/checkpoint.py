"""Checkpoints: orbax writes the arrays, a sealed manifest makes them count.

``checkpoints/00000500/state`` is orbax's; ``checkpoints/00000500/manifest.json`` is written last and
holds the size and hash of every file and the shape of every array. A directory without a manifest is
what a kill left behind: it is not a checkpoint and is removed at the next start. Nothing outside this
file knows orbax.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.training.optimizers import parameter_name

MANIFEST = "manifest.json"


class Checkpointer:
    """Saves in the background, keeps the newest ``keep``, restores after checking every byte."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory, self._keep = directory.absolute(), keep
        self._orbax = ocp.StandardCheckpointer()
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._sealing: Future | None = None

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

    def save(self, step: int, state: Any) -> None:
        """Starts to write ``state``; returns when its arrays are copied. Waits for the one before."""
        self.wait()
        if step in self.steps():
            return
        path = self._directory / f"{step:08d}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._orbax.save(path / "state", state)
        except OSError as error:
            raise _cannot_write(path, error) from error
        self._sealing = self._thread.submit(self._seal, path, step, describe(state))

    def wait(self) -> None:
        """Until the save in progress is complete. Raises UserError if it failed."""
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()
        self._orbax.close()

    def restore(self, step: int, target: Any) -> Any:
        """The state saved at ``step``, in the shardings of ``target`` (ShapeDtypeStructs).

        Raises UserError naming the file that is missing or changed, or the array that does not fit.
        """
        path = self._directory / f"{step:08d}"
        manifest = storage.read_sealed(path / MANIFEST)
        _verify(path, manifest["files"])
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
            manifest = {"step": step, "arrays": arrays, "files": files}
            storage.write_sealed(path / MANIFEST, manifest)
        except (OSError, ValueError) as error:
            raise _cannot_write(path, error) from error
        for old in self.steps()[: -self._keep]:
            self._remove(old)

    def _remove(self, step: int) -> None:
        """The manifest first: half a checkpoint must not look like one."""
        path = self._directory / f"{step:08d}"
        (path / MANIFEST).unlink()
        shutil.rmtree(path)


def describe(state: Any) -> dict[str, list[Any]]:
    """{name: [shape, dtype]} of every array, as JSON has it."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {parameter_name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


def _verify(path: Path, files: dict[str, dict[str, Any]]) -> None:
    mend = f"delete {path} to go on from the checkpoint before it"
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
