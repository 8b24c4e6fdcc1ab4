"""llm_jax's side of a row, in a process of its own; benchmarks/speed/run.py starts it."""

from __future__ import annotations

import sys
import tempfile

import jax

from benchmarks.speed import clock
from benchmarks.speed.rows import ROWS
from llm_jax.planning.fit import fit
from llm_jax.training.program import Program


def main(name: str, text: str, tiny: bool, steps: int) -> None:
    row = ROWS[name]
    with tempfile.TemporaryDirectory() as directory:
        program = Program.prepare(row.experiment(text, tiny), directory, say=lambda _: None)
        if row.platform == "gpu":
            program = fit(program, say=lambda _: None)
        out, size = {}, program.experiment.steps_per_dispatch
        state, batch = program.init(), program.batches[0]

        def from_memory() -> None:
            nonlocal state
            state, metrics = program.steps(state, batch)
            jax.block_until_ready(metrics)

        out |= clock.measure(from_memory, size, steps or row.steps)
        groups = program.batches.iterate(1, program.experiment.steps // size)

        def from_loader() -> None:
            nonlocal state
            state, metrics = program.steps(state, next(groups))
            jax.block_until_ready(metrics)

        out["loader_ms"] = clock.measure(from_loader, size, steps or row.steps)["ms"]
        groups.close()
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use") or clock.peak_memory()
    e, there = program.experiment, {"device": device.device_kind, "devices": jax.device_count()}
    choice = {"parts": e.accumulation, "remat": e.model.remat, "kernel": program.model.config.kernel}
    clock.give(out | there | {"peak_bytes": memory, "choice": choice})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "tiny", int(sys.argv[4]))
