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


def main(name: str, text: str, tiny: bool, steps: int) -> None:
    row = ROWS[name]
    with tempfile.TemporaryDirectory() as directory:
        program = Program.prepare(row.experiment(text, tiny), directory, say=lambda _: None)
        e = program.experiment
        size, steps = e.steps_per_dispatch, steps or row.steps
        state, batch = program.init(), random_tokens(program)
        groups, compiled = program.batches.iterate(1, 10**6), None

        def group(batch: Batch) -> None:
            nonlocal state
            state, metrics = compiled(state, batch)
            jax.block_until_ready(metrics)

        def first() -> None:
            nonlocal compiled
            compiled = program.lower(state, batch).compile()
            if again := compiled.as_text().count(".remat"):
                raise RuntimeError(
                    f"for want of memory XLA makes {again} parts again: another step than named"
                )
            group(batch)

        def measure() -> dict[str, Any]:
            ms = clock.milliseconds(lambda: group(batch), size, steps)
            loader_ms = clock.milliseconds(lambda: group(next(groups)), size, steps)
            device = jax.devices()[0]
            memory = (device.memory_stats() or {}).get("peak_bytes_in_use") or clock.peak_memory()
            there = {"device": device.device_kind, "devices": jax.device_count(), "peak_bytes": memory}
            kernel = program.model.config.kernel
            choice = {"parts": e.accumulation, "remat": e.model.remat, "kernel": kernel}
            choice["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
            return {"ms": ms, "loader_ms": loader_ms, "choice": choice} | there

        clock.serve(measure, first)
        groups.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "tiny", int(sys.argv[4]))
