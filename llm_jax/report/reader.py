"""Reads a run directory back. Nothing here asks jax for a device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_jax.errors import UserError
from llm_jax.training import metrics
from llm_jax.training.metrics import Record
from llm_jax.training.rundir import RunDirectory


@dataclass(frozen=True)
class Run:
    """config, environment: their JSON; story: the records; samples: text, "" before the end."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    story: list[Record]
    samples: str

    def series(self, kind: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one number; times are named ``time.tokens_per_second``."""
        steps, values = [], []
        for record in self.story:
            section = record.get("time", {}) if name.startswith("time.") else record
            value = section.get(name.removeprefix("time."))
            if record["kind"] == kind and value is not None:
                steps.append(record["step"])
                values.append(value)
        return steps, values

    def story_without_time(self) -> list[Record]:
        return metrics.without_time(self.story)


def read(workdir: str | Path) -> Run:
    """Raises UserError for a directory that is not a run, or whose files are damaged."""
    run = RunDirectory(Path(workdir))
    if not run.config.exists():
        raise UserError(f"--workdir={workdir} is not a run directory: it has no config.json")
    environment = run.path / "environment.json"
    return Run(
        path=run.path,
        config=json.loads(run.config.read_text()),
        environment=json.loads(environment.read_text()) if environment.exists() else {},
        story=metrics.read(run.metrics),
        samples=run.samples.read_text() if run.samples.exists() else "",
    )
