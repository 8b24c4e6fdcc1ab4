"""Checkpoints: orbax writes the arrays, a sealed manifest makes them count.

``checkpoints/00000500/state`` is orbax's; ``checkpoints/00000500/manifest.json`` is written last and
holds the size and hash of every file, the shape of every array, the validation loss at that step if
there was an evaluation, and what the run wants known ``about`` it. A directory without a manifest is
what a kill left behind: it is not a checkpoint and is removed at the next start. Whether there is a manifest
is asked by its name, never taken from a listing, which of a bucket may be old. Nothing outside this file
knows orbax.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from llm_jax import hosts, storage
from llm_jax.errors import UserError
from llm_jax.training import policy
from llm_jax.training.rules import parameter_name

MANIFEST = "manifest.json"
PARAMS = "params/"  # how the names of parameters begin among those of a state
# Bytes. Devices that hold the same array write a part of it each; orbax compiles a program for each shape
# that it cuts. Six saves of parts this small took 2.6 s and 28 programs, of whole arrays 0.7 s and none.
WORTH_SHARING = 2**20


class Damaged(UserError):
    """A checkpoint is not what was written."""


class Checkpointer:
    """Saves in the background, keeps what ``policy.kept`` says, restores after checking every byte.

    Every process of a run calls every method; each hashes its share of the files, process 0 does what is done
    once.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        keep_best: int = 0,
        keep_every: int = 0,
        about: Mapping[str, Any] | None = None,
        verify: str = "all",
        keep_at: Collection[int] = (),
    ) -> None:
        """keep, keep_best, keep_every, keep_at: see policy.kept; about: JSON values for every manifest;
        verify: "all" bytes before they are restored, or "off"."""
        self._directory, self._about = storage.resolved(directory), dict(about or {})
        self._keep = {"newest": keep, "best": keep_best, "every": keep_every, "at": keep_at}
        self._losses: dict[int, float] | None = None
        self._intact: set[int] = set()  # verified, and by this process so far not written again
        self._verify = verify
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._sealing: Future | None = None

    @cached_property
    def _orbax(self) -> Any:
        """Made when it is first used: it asks jax for its devices, which mesh.start chooses before."""
        import orbax.checkpoint as ocp

        _say_failures_once()
        # Without orbax's own metadata of arrays: shapes and hashes are in the manifest.
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=WORTH_SHARING)
        ocp.type_handlers.register_type_handler(jax.Array, arrays, override=True)
        return ocp.StandardCheckpointer()

    def clean(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Removes what a kill left behind. For a run that is about to write, not for readers."""

        def remove() -> None:
            storage.make_directory(self._directory)
            for path in self._directory.glob("*"):
                if path.is_dir() and not (path / MANIFEST).exists():
                    say(f"removing {path}: it was not complete")
                    storage.remove_tree(path)

        hosts.first_alone("clean", lambda: remove() if hosts.leads() else None)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first, as process 0 sees them."""
        return hosts.gather("steps", complete_steps(self._directory))[0]

    def is_among_best(self, step: int, loss: float) -> bool:
        """Whether a checkpoint of this step and validation loss would be kept for its loss, by what process 0
        sees: all of them save, or none."""
        losses = {**self.losses(), step: loss}
        found = math.isfinite(loss) and step in policy.best_of(losses, self._keep["best"])
        return hosts.gather("best", found)[0]

    def losses(self) -> dict[int, float]:
        """Validation losses of the checkpoints that have one: from their manifests, so that what is best
        survives a restart. A manifest that cannot be read has none, as its checkpoint cannot be restored."""
        if self._losses is None:
            found = {}
            for step in complete_steps(self._directory):
                with suppress(UserError):
                    loss = storage.read_sealed(self._directory / _name(step) / MANIFEST).get("loss")
                    found |= {} if loss is None else {step: loss}
            self._losses = found  # as a whole: the thread that seals reads it, too
        return self._losses

    def save(self, step: int, state: Any, loss: float | None = None) -> None:
        """Starts to write ``state``; returns when its arrays are copied. Waits for the one before.

        loss: the validation loss at this step, if it was evaluated.
        """
        self.wait()
        path = self._directory / _name(step)
        if hosts.gather("saved", (path / MANIFEST).exists())[0]:
            return
        self._intact.discard(step)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._orbax.save(path / "state", state)
        except OSError as error:
            raise _cannot_write(path, error) from error
        if loss is not None and math.isfinite(loss):
            self._losses = {**self.losses(), step: loss}
        self._sealing = self._thread.submit(self._seal, path, step, describe(state))

    def check(self) -> None:
        """Raises UserError if the save in progress has failed; does not wait for it."""
        if self._sealing is not None and self._sealing.done():
            self.wait()

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
        return storage.read_sealed(self._directory / _name(step) / MANIFEST)["arrays"]

    def restore(self, step: int, target: Any) -> Any:
        """The state saved at ``step``, in the shardings of ``target`` (ShapeDtypeStructs).

        Raises Damaged naming the file that is missing or changed, UserError for an array that does not fit.
        """
        path = self._directory / _name(step)
        if damage := self.damage(step):
            raise Damaged(damage)
        _compare(path, self.arrays(step), describe(target))
        return self._orbax.restore(path / "state", target)

    def damage(self, step: int, say: Callable[[str], None] = lambda _: None) -> str:
        """What is wrong with the bytes of a checkpoint, "" for nothing. A process reads its share, once."""
        if step in self._intact or self._verify == "off":
            return ""
        path, began = self._directory / _name(step), time.monotonic()
        try:
            files = storage.read_sealed(path / MANIFEST)["files"]
            _verify(path, _share(files))
            found = ""
        except UserError as error:
            files, found = {}, str(error)
        damage = next(filter(None, hosts.gather("damage", found)), "")
        if not damage:
            self._intact.add(step)
            size = sum(file["bytes"] for file in files.values())
            took = f"{time.monotonic() - began:.1f} s"
            say(f"checkpoint {step:,}: {len(files)} files, {size / 1e6:.1f} MB, verified in {took}")
        return damage

    def newest(self, skip: bool = False, say: Callable[[str], None] = lambda _: None) -> int | None:
        """The step of the newest checkpoint, verified; None where there is none.

        skip: a damaged one is set aside, as ``damaged.STEP``, and the one before is taken. Otherwise raises
        Damaged, which says whether an earlier one is intact.
        """
        for step in reversed(steps := self.steps()):
            if not (damage := self.damage(step, say)):
                return step
            earlier = (s for s in reversed(steps) if s < step and not self.damage(s))
            if not skip and (good := next(earlier, None)):
                mend = f"that of step {good:,} is intact: --config.checkpoint.damaged=skip goes on from it"
                raise Damaged(f"{damage}; {mend}")
            if not skip:
                raise Damaged(f"{damage}; no earlier checkpoint is intact: use another --workdir")
            say(f"{damage}; it is set aside")
            if hosts.leads():
                aside = self._directory / f"damaged.{_name(step)}"
                storage.set_aside(self._directory / _name(step), aside, MANIFEST)
            self._losses = None
        return None

    def _seal(self, path: Path, step: int, arrays: dict[str, Any]) -> None:
        try:
            self._orbax.wait_until_finished()
            # As process 0 lists them: a shared file system may show another process fewer.
            found = [file.relative_to(path).as_posix() for file in storage.files(path / "state")]
            names = hosts.gather("files", found)[0]
            mine = {
                name: {"bytes": storage.size(path / name), "sha256": storage.content_hash(path / name)}
                for name in _share(dict.fromkeys(names))
            }
            shares = hosts.gather("hashes", mine)
            if hosts.leads():
                files = dict(sorted(entry for share in shares for entry in share.items()))
                about = {"loss": self.losses().get(step), "about": self._about}
                manifest = {"step": step, "arrays": arrays, "files": files, **about}
                storage.write_sealed(path / MANIFEST, manifest)
                self._prune(step)
        except (OSError, ValueError) as error:
            raise _cannot_write(path, error) from error
        hosts.gather("sealed", step)

    def _prune(self, step: int) -> None:
        """After ``step`` was written, which a listing may not show yet."""
        steps = sorted({*complete_steps(self._directory), step})
        kept = policy.kept(steps, self.losses(), **self._keep)
        storage.remember(self._directory, [_name(step) for step in kept])
        for old in sorted({*steps} - kept):
            self._remove(old)

    def _remove(self, step: int) -> None:
        """The manifest first: half a checkpoint must not look like one."""
        path = self._directory / _name(step)
        (path / MANIFEST).unlink()
        storage.remove_tree(path)
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
            steps = complete_steps(path / "checkpoints")
            if not steps:
                raise UserError(f"{path} is neither a checkpoint nor a run directory with one")
            path = path / "checkpoints" / _name(steps[-1])
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
        try:
            _verify(self.path, self.manifest["files"])
        except Damaged as error:
            raise UserError(f"{error}; choose another checkpoint") from None
        import orbax.checkpoint as ocp

        wanted = {"params": target}
        options = ocp.checkpoint_utils.construct_restore_args(wanted)
        request = ocp.args.PyTreeRestore(wanted, restore_args=options, partial_restore=True)
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(storage.resolved(self.path) / "state", args=request)["params"]


def _say_failures_once() -> None:
    """Of a full disk orbax, asyncio and tensorstore print 200 lines; one of ours says all."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    previous = sys.unraisablehook

    def hook(raised: Any) -> None:
        # Of writes that end after one has failed: tensorstore's threads come here with it.
        if str(raised.exc_value) != "Event loop is closed":
            previous(raised)

    sys.unraisablehook = hook


def _name(step: int) -> str:
    return f"{step:08d}"


def complete_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in a directory, oldest first."""
    listed = {path.parent.name for path in directory.glob(f"[0-9]*/{MANIFEST}")}
    names = listed.union(storage.remembered(directory))
    return sorted(int(name) for name in names if (directory / name / MANIFEST).exists())


def describe(state: Any) -> dict[str, list[Any]]:
    """{name: [shape, dtype]} of every array, as JSON has it."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {parameter_name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


def _share(files: Mapping[str, Any]) -> dict[str, Any]:
    """This process's part of the files of a checkpoint."""
    return dict(sorted(files.items())[hosts.index() :: hosts.count()])


def _verify(path: Path, files: Mapping[str, dict[str, Any]]) -> None:
    for name, expected in files.items():
        file = path / name
        try:
            size, found = storage.size(file), storage.content_hash(file)
        except FileNotFoundError:
            raise Damaged(f"{file} is missing") from None
        except OSError as error:
            raise Damaged(f"{file} cannot be read: {error.strerror or error}") from error
        if size != expected["bytes"]:
            raise Damaged(f"{file} has {size} bytes, not {expected['bytes']}")
        if found != expected["sha256"]:
            raise Damaged(f"{file} is corrupt: its hash is not the manifest's")


def _compare(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in [*wanted, *saved]:
        if saved.get(name) != wanted.get(name):
            there = f"{name} is {saved[name]}" if name in saved else f"{name} is missing"
            here = str(wanted[name]) if name in wanted else "absent"
            raise UserError(f"{path} is of another model: there {there}, here {here}")


def _cannot_write(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    if system := re.search(r"os_error_code='(\d+)'", reason):  # tensorstore's, 400 characters long
        reason = os.strerror(int(system[1]))
    reason = reason.partition(" [tensorstore_spec=")[0]
    return UserError(
        f"cannot write checkpoint {path}: {reason}; earlier checkpoints are intact, the same command "
        "goes on from the newest"
    )
