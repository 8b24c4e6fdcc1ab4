"""Reads a run directory back. Nothing here asks jax for a device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.text.shards import VALIDATION
from llm_jax.training import metrics
from llm_jax.training.metrics import Record
from llm_jax.training.rundir import RunDirectory

GAP_STEPS = 20  # enough to smooth a batch's chance, few enough to be of the same model


@dataclass(frozen=True)
class Run:
    """config, environment: their JSON; story: the records; samples: text, "" before the end."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    story: list[Record]
    samples: str

    @property
    def tokens_per_step(self) -> int:
        return self.config["config"]["global_batch_size"] * self.config["config"]["data"]["sequence_length"]

    def series(self, kind: str, name: str, of: str = VALIDATION) -> tuple[list[int], list[float]]:
        """Steps and values of one number; times are named ``time.tokens_per_second``.

        of: the set, where the kind is evaluation.
        """
        steps, values = [], []
        for record in self.story:
            section = record.get("time", {}) if name.startswith("time.") else record
            value = section.get(name.removeprefix("time."))
            if (record["kind"], record.get("set", of)) == (kind, of) and value is not None:
                steps.append(record["step"])
                values.append(value)
        return steps, values

    def sets(self) -> list[str]:
        """The sets it was evaluated on, the one it is judged by first."""
        found = {r.get("set", VALIDATION) for r in self.story if r["kind"] == "evaluation"}
        return sorted(found, key=lambda name: (name != VALIDATION, name))

    def gap(self) -> tuple[list[int], list[float]]:
        """Validation loss minus the mean loss of the GAP_STEPS training steps before it: what was learnt of
        the training text only."""
        trained = dict(zip(*self.series("train", "loss"), strict=True))
        steps, gaps = [], []
        for step, loss in zip(*self.series("evaluation", "loss"), strict=True):
            window = [trained[s] for s in range(step - GAP_STEPS + 1, step + 1) if s in trained]
            if window:
                steps.append(step)
                gaps.append(loss - sum(window) / len(window))
        return steps, gaps

    def block_norms(self, name: str) -> dict[int, list[float]]:
        """{step: norm of every block} at evaluations that have them; name: "param_norms" or "grad_norms"."""
        found = {}
        for record in metrics.evaluations(self.story):
            norms = record.get(name, {})
            layers = [norms[part] for part in norms if part.startswith("blocks/")]
            if layers and None not in layers:
                found[record["step"]] = layers
        return found

    def story_without_time(self) -> list[Record]:
        return metrics.without_time(self.story)


def read(workdir: str | Path) -> Run:
    """Raises UserError for a directory that is not a run, or whose files are damaged."""
    run = RunDirectory(storage.path(workdir))
    if not run.config.exists():
        raise UserError(f"--workdir={workdir} is not a run directory: it has no config.json")
    return Run(
        path=run.path,
        config=json.loads(run.config.read_text()),
        environment=json.loads(run.environment.read_text()) if run.environment.exists() else {},
        story=metrics.read(run.metrics),
        samples=run.samples.read_text() if run.samples.exists() else "",
    )
