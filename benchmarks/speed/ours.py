"""llm_jax's side of a row, in a process of its own; benchmarks/speed/run.py starts it."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks.speed import clock
from benchmarks.speed.rows import ROWS
from llm_jax.data.batch import Batch
from llm_jax.training.program import Program


def random_tokens(program: Program) -> Batch:
    """The first batch, with tokens of all the vocabulary, as the peers have them: a text of characters has
    few, whose gradients wait for one another."""
    batch, draw = program.batches[0], np.random.default_rng(0)

    def tokens(like: jax.Array) -> jax.Array:
        drawn = draw.integers(0, program.experiment.model.vocab_size, like.shape, np.int32)
        return jax.device_put(drawn, like.sharding)

    return dataclasses.replace(batch, inputs=tokens(batch.inputs), targets=tokens(batch.targets))


class Step:
    """Our step of a row; compiled when it is told so, then a group of steps at a time."""

    def __init__(self, name: str, text: str, tiny: bool, directory: str) -> None:
        self.program = Program.prepare(ROWS[name].experiment(text, tiny), directory, say=lambda _: None)
        self.size = self.program.experiment.steps_per_dispatch
        self.batch = random_tokens(self.program)
        self._state = self.program.init()

    def compile(self) -> None:
        """Raises RuntimeError for a step that is another than it is called."""
        self.compiled = self.program.lower(self._state, self.batch).compile()
        if again := self.compiled.as_text().count(".remat"):
            raise RuntimeError(f"for want of memory XLA makes {again} parts again: another step than named")

    def group(self, batch: Batch | None = None) -> None:
        """``size`` steps on the batch, or on random tokens."""
        self._state, metrics = self.compiled(self._state, self.batch if batch is None else batch)
        jax.block_until_ready(metrics)


def main(name: str, text: str, tiny: bool, steps: int) -> None:
    steps = steps or ROWS[name].steps
    with tempfile.TemporaryDirectory() as directory:
        step = Step(name, text, tiny, directory)
        groups = step.program.batches.iterate(1, 10**6)

        def first() -> None:
            step.compile()
            step.group()

        def measure() -> dict[str, Any]:
            ms = clock.milliseconds(step.group, step.size, steps)
            loader_ms = clock.milliseconds(lambda: step.group(next(groups)), step.size, steps)
            device, e = jax.devices()[0], step.program.experiment
            memory = (device.memory_stats() or {}).get("peak_bytes_in_use") or clock.peak_memory()
            there = {"device": device.device_kind, "devices": jax.device_count(), "peak_bytes": memory}
            kernel = step.program.model.config.kernel
            choice = {"parts": e.accumulation, "remat": e.model.remat, "kernel": kernel}
            choice["temporary_bytes"] = step.compiled.memory_analysis().temp_size_in_bytes
            return {"ms": ms, "loader_ms": loader_ms, "choice": choice} | there

        clock.serve(measure, first)
        groups.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "tiny", int(sys.argv[4]))
