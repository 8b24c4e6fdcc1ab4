"""What a save costs a run: the wait for its arrays to be copied, and the slower steps while it is written.

  python -m benchmarks.reliability.save_stall

Trains on random tokens, which cost what others do. A save, the steps that pass while it is written, and as
many without one, by turns. "stall" is how long training stands still; "cost" is that and what the steps
beside the writing lost, which on a CPU is mostly that they share its cores. Writes
benchmarks/results/reliability_save_stall.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import record
from llm_jax import cli
from llm_jax.data.batch import Batch
from llm_jax.training import experiment
from llm_jax.training.checkpoint import MANIFEST, Checkpointer
from llm_jax.training.program import Program

ROOT = Path(__file__).resolve().parents[2]
EVERY_SECONDS = 300.0
VOCABULARY = 512
STEPS = 5  # at least, without a save
CASES = {"quickstart": (32, 128), "shakespeare_char_gpu": (8, 128), "gpt2_124m": (2, 64)}  # rows, length


def batch_of(program: Program) -> Batch:
    """One dispatch of random tokens on the devices."""
    e = program.experiment
    shape = (e.steps_per_dispatch, e.accumulation, e.micro_batch, e.data.sequence_length)
    tokens = np.random.default_rng(0).integers(5, e.model.vocab_size, shape, np.int32)
    ones = np.ones(shape, np.int32)
    places = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    batch = Batch(tokens, tokens, ones.astype(np.float32), places, ones)
    return jax.device_put(batch, program.layout.named(None, None, "batch"))


def build(name: str, rows: int, length: int) -> Program:
    """A shipped config at a small batch, without its text."""
    changes = {"data.text": "python:docs", "global_batch_size": str(rows), "accumulation": "1"}
    changes |= {"data.sequence_length": str(length), "steps_per_dispatch": "1"}
    config = experiment.override(cli.load_config(f"{ROOT}/configs/{name}.py"), changes)
    return Program.build(experiment.complete(experiment.resolve(config), VOCABULARY), Path("unused"))


def measure(program: Program, saves: int) -> dict:
    """A save, the steps that pass until it is complete, and as many without one; by turns, so many times."""
    state, batch = program.init(), batch_of(program)
    quiet, stalls, costs, written = [], [], [], []

    def step() -> float:
        nonlocal state
        began = time.perf_counter()
        state, _ = program.steps(state, batch)
        jax.block_until_ready(state)
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as directory:
        checkpointer = Checkpointer(Path(directory), keep=1)
        for number in range(saves + 1):  # the first warms up
            during, manifest = [], Path(directory, f"{number:08d}", MANIFEST)
            began = time.perf_counter()
            checkpointer.save(number, state)
            stall = time.perf_counter() - began
            while not manifest.exists():
                during.append(step())
            seconds = time.perf_counter() - began
            checkpointer.wait()  # for the one before to be removed
            after = [step() for _ in range(max(STEPS, len(during)))]
            if number:
                quiet += after
                stalls.append(stall)
                written.append(seconds)
                costs.append(stall + sum(during) - len(during) * statistics.median(after))
        checkpointer.close()
    return {
        "state_megabytes": round(sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6, 1),
        "seconds_of_a_step": round(statistics.median(quiet), 3),
        "seconds_until_complete": round(statistics.median(written), 2),
        "stall_seconds": round(statistics.median(stalls), 3),
        "cost_seconds": round(statistics.median(costs), 2),
        "cost_seconds_spread": [round(min(costs), 2), round(max(costs), 2)],
        "stall_share_of_five_minutes": round(statistics.median(stalls) / EVERY_SECONDS, 5),
        "cost_share_of_five_minutes": round(statistics.median(costs) / EVERY_SECONDS, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--saves", type=int, default=5)
    args = parser.parse_args()
    results = {}
    for name, (rows, length) in CASES.items():
        results[name] = measure(build(name, rows, length), args.saves)
        print(name, results[name])
    environment = record.environment("jax", "orbax-checkpoint", "tensorstore")
    record.write("reliability_save_stall", environment | {"results": results})


if __name__ == "__main__":
    main()
