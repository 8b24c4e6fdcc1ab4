"""Bad steps on disk: what is kept of them for ``scripts/replay.py``, and the end of a run that has too many.

``bad_steps/00000123.json`` says what was bad about step 123, the first of its streak.
``bad_steps/00000123/00000100`` is the checkpoint to begin its replay from.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import hosts, storage
from llm_jax.errors import UserError
from llm_jax.training import norms
from llm_jax.training.checkpoint import MANIFEST, Checkpointer
from llm_jax.training.rundir import RunDirectory

KEPT = 2  # newest bad steps whose checkpoints stay; older ones are replayed from what the run still has


class GivenUp(UserError):
    """A run has had as many bad steps in a row as its guard has patience."""


@dataclass(frozen=True)
class BadStep:
    """Numbers of a bad step, as they were; step counts from 1, as in the metrics.

    limit: of the gradient's norm, infinity without one; begin: the step of the checkpoint to replay from,
    0 without one; grad_norms: by layer.
    """

    step: int
    reason: str
    loss: float
    grad_norm: float
    limit: float
    begin: int
    grad_norms: dict[str, float]

    def write(self, directory: Path) -> None:
        text = json.dumps(plain(dataclasses.asdict(self)), indent=1, allow_nan=False)
        storage.write_text(directory / f"{self.step:08d}.json", text + "\n")

    @classmethod
    def read(cls, directory: Path, step: int) -> BadStep | None:
        """What was kept of a step, or None."""
        path = directory / f"{step:08d}.json"
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text())
            kept = {name: float(values[name]) for name in ("loss", "grad_norm", "limit")}
            layers = {name: float(x) for name, x in values["grad_norms"].items()}
            return cls(**{**values, **kept, "grad_norms": layers})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is corrupt ({error}); delete it to replay without it") from None


def plain(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity: these become "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def steps(directory: Path) -> list[int]:
    """The bad steps that something is known about, oldest first."""
    return sorted(int(path.stem) for path in directory.glob("[0-9]*.json"))


def reason(loss: float, grad_norm: float, limit: float) -> str:
    """What was bad, in words."""
    if not math.isfinite(loss):
        return f"the loss is not finite ({loss})"
    if not math.isfinite(grad_norm):
        return f"the gradient is not finite (norm {grad_norm}, loss {loss:.4f})"
    return f"the gradient's norm {grad_norm:.4g} is above its limit {limit:.4g}"


class BadSteps:
    """Sees the numbers of every step. Every process does; the first one writes."""

    def __init__(self, run: RunDirectory, checkpointer: Checkpointer, patience: int) -> None:
        self._run, self._checkpointer, self._patience = run, checkpointer, patience
        self._first: BadStep | None = None  # of the newest streak

    def see(
        self, step: int, values: Mapping[str, float], grad_squares: Mapping[str, np.ndarray]
    ) -> str | None:
        """A line to be shown where a streak begins. grad_squares: of this step, as ``norms.squares`` gives.

        Raises GivenUp where the streak is as long as the guard's patience.
        """
        in_row = int(values["bad_in_row"])
        if in_row == 1:
            self._first = self._keep(step, values, grad_squares)
        if in_row >= self._patience:
            raise self._end(step, in_row)
        if in_row != 1:
            return None
        return f"step {step:,} is left out: {self._first.reason}; {self._how(step)}"

    def _keep(
        self, step: int, values: Mapping[str, float], grad_squares: Mapping[str, np.ndarray]
    ) -> BadStep:
        self._checkpointer.wait()  # so that none is written or removed meanwhile
        begin = max((s for s in self._checkpointer.steps() if s < step), default=0)
        numbers = values["loss"], values["grad_norm"], values.get("grad_norm_limit", math.inf)
        bad = BadStep(step, reason(*numbers), *numbers, begin, norms.by_layer(grad_squares))
        if hosts.leads():
            storage.make_directory(self._run.bad_steps)
            if begin:
                checkpoint = self._run.checkpoints / f"{begin:08d}"
                keep_checkpoint(checkpoint, self._run.bad_steps / f"{step:08d}")
            bad.write(self._run.bad_steps)
            self._forget()
        return bad

    def _forget(self) -> None:
        """Removes checkpoints of older bad steps: each may hold a whole state that the run has dropped."""
        for old in steps(self._run.bad_steps)[:-KEPT]:
            with suppress(OSError):
                storage.remove_tree(self._run.bad_steps / f"{old:08d}")

    def _end(self, step: int, in_row: int) -> GivenUp:
        if self._first is None:  # the streak began before the run was stopped and went on
            known = [s for s in steps(self._run.bad_steps) if s <= step]
            self._first = BadStep.read(self._run.bad_steps, known[-1]) if known else None
        first, why = (self._first.step, self._first.reason) if self._first else (step, "bad numbers")
        newest = max(self._checkpointer.steps(), default=0)
        return GivenUp(
            f"{in_row} bad steps in a row up to step {step:,} (config.guard.patience={self._patience}); "
            f"the first, {first:,}: {why}. None of them changed the state; the newest checkpoint is of step "
            f"{newest:,}; {self._how(first)}"
        )

    def _how(self, step: int) -> str:
        return f"python scripts/replay.py --workdir={shlex.quote(str(self._run.path))} --step={step} says why"


def keep_checkpoint(checkpoint: Path, directory: Path) -> None:
    """Copies a checkpoint into ``directory``, which holds nothing else; on a disk by hard links."""
    target = directory / checkpoint.name
    if (target / MANIFEST).exists():
        return
    try:
        storage.remove_tree(directory)
        storage.duplicate(checkpoint, target, MANIFEST)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}; free or choose another") from error
